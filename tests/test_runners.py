"""Engines in another Python interpreter: checking the interpreter, and running experiments with it."""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import distribution, metadata, version
from pathlib import Path
from typing import Any

import pytest

from pytest_llem.engines.shipped import Packages, unmet_by_pytorch
from pytest_llem.isolation import interpreter
from pytest_llem.isolation.interpreter import MIN_PYTHON, Interpreter, ask, package_versions
from pytest_llem.planning import runner_environment
from pytest_llem.planning.runner_environment import (
    WORKER_PACKAGES,
    check_runner_environment,
    how_to_install,
    missing_here,
)
from pytest_llem.results.environment import PACKAGES
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.study.config import ExperimentConfig
from tests.conftest import Results, WriteStudy
from tests.support.environments import EVERYTHING, NOOP_ENGINE, ROOT, Environment
from tests.support.marks import slow
from tests.support.processes import gone, wait_until

OURS = version("pytest-llem")

#: An engine that records the interpreter that it runs in.
FARAWAY = """
    import json, os, sys
    from pathlib import Path
    from noop_engine import NoopEngine
    from pytest_llem.results.experiment import EngineRecord

    class Engine(NoopEngine):
        def __init__(self, config, context):
            super().__init__(config, context)
            note = {"prefix": sys.prefix, "pid": os.getpid(), "inherited": os.environ.get("PYTHONPATH")}
            Path(os.environ["NOTES"], f"{os.getpid()}.json").write_text(json.dumps(note))

        def describe(self):
            return EngineRecord(name="faraway", device="cpu")
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with an engine that this one does not have and another version of a package."""
    environment = Environment(tmp_path_factory.mktemp("elsewhere") / "env", *EVERYTHING)
    environment.add("tokenizers", "0.0.7")
    engines = "[pytest_llem.engines]\nfaraway = faraway_engine:Engine\n"
    environment.add("faraway", "3.1", "pydantic", entry_points=engines, faraway_engine=FARAWAY)
    return environment


@pytest.fixture
def notes(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    folder = pytester.mkdir("notes")
    monkeypatch.setenv("NOTES", str(folder))
    return lambda: [json.loads(path.read_text()) for path in sorted(folder.iterdir())]


def script(path: Path, text: str) -> Path:
    """Write a program to use in place of an interpreter."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


class TestInterpreterQuery:
    def test_packages_engines_and_modules_are_reported(self, elsewhere: Environment) -> None:
        found = ask(elsewhere.python, ["json", "no_such_module", "faraway_engine"])
        assert isinstance(found, Interpreter)
        assert found.python == "{}.{}.{}".format(*sys.version_info)
        assert (found.packages["tokenizers"], found.packages["pytest-llem"]) == ("0.0.7", OURS)
        assert (found.engines["faraway"], found.engines["pytorch"]) == ("faraway", "pytest-llem")
        assert found.requires["faraway"] == ["pydantic"]
        assert {"json", "faraway_engine", "pytest_llem"} <= found.modules
        assert "no_such_module" not in found.modules

    def test_other_output_of_the_interpreter_is_ignored(self, tmp_path: Path, elsewhere: Environment) -> None:
        """Its start-up may print text and leave a process that keeps its output open."""
        noisy = script(
            tmp_path / "noisy",
            f'echo {{}}; sleep 1000 & echo >&2 oh; {shlex.quote(str(elsewhere.python))} "$@"; echo x',
        )
        assert ask(noisy) == ask(elsewhere.python)

    def test_current_folder_and_pythonpath_are_not_searched(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: Environment
    ) -> None:
        (tmp_path / "bitsandbytes.py").touch()
        (tmp_path / "json.py").write_text("raise SystemExit('mine')")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.setenv("PYTHONHOME", str(tmp_path))
        found = ask(elsewhere.python, ["a"])
        assert isinstance(found, Interpreter)
        assert "bitsandbytes" not in found.modules

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "echo garbage; echo; exit 0",
                "does not answer as Python does (status 0, last output 'garbage'): name a ",
            ),
            ("echo oh >&2; exit 3", "does not answer as Python does (status 3, last output 'oh'): name a Python "),
            ("kill -9 $$", "does not answer as Python does (status -9): name a Python interpreter that works"),
            ('echo "$@"', "does not answer as Python does (invalid answer, last output "),
            ("yes", "does not answer as Python does (output without end, last output 'y'): name a "),
            ("""echo "$4"'{"python": "3.x"}'""", "does not answer as Python does (invalid answer, last output "),
            ("""echo "$4"'[]'""", "does not answer as Python does (invalid answer, last output "),
        ],
    )
    def test_program_that_is_not_python_is_an_error(self, tmp_path: Path, text: str, message: str) -> None:
        found = ask(script(tmp_path / "fake", text))
        assert isinstance(found, str)
        assert found.startswith(message)

    def test_interpreter_that_hangs_is_ended_with_its_children(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(interpreter, "ANSWER_SECONDS", 1.0)
        hanging = script(tmp_path / "fake", f"sleep 1000 & echo $! > {tmp_path}/pid; exec sleep 1000")
        assert ask(hanging) == (
            "does not answer as Python does (no answer within 1 s): name a Python interpreter that works"
        )
        assert gone(int((tmp_path / "pid").read_text()))

    def test_interpreter_that_cannot_be_run_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "plain").write_text("")
        (tmp_path / "binary").write_bytes(b"\0\1")
        (tmp_path / "binary").chmod(0o755)
        (tmp_path / "dangling").symlink_to("nowhere")
        names = ("plain", "binary", "dangling", "nowhere", ".", "x" * 300, "a\0b")
        assert {name[:9]: ask(tmp_path / name) for name in names} == {
            "plain": "cannot be run (Permission denied): name a Python interpreter",
            "binary": "cannot be run (Exec format error): name a Python interpreter",
            ".": "is a directory: name the interpreter in it, such as bin/python",
            "x" * 9: "cannot be run (File name too long): name a Python interpreter",
            **dict.fromkeys(
                ("dangling", "nowhere", "a\0b"),
                "does not exist: name a Python interpreter (in runners: absolute, or relative to the study)",
            ),
        }

    def test_old_python_is_an_error(self, tmp_path: Path) -> None:
        pretend = (
            "import sys; sys.version_info = (3, 9, 18); start = sys.argv.pop(2); sys.argv.pop(1); exec(start)"
        )
        old = script(tmp_path / "old", f'exec {shlex.quote(sys.executable)} -c {shlex.quote(pretend)} "$@"')
        assert ask(old) == (
            "is Python 3.9.18, and pytest-llem needs 3.11 or newer: make that environment with a newer one"
        )
        assert metadata("pytest-llem")["Requires-Python"] == f">={'.'.join(map(str, MIN_PYTHON))}"

    def test_package_versions_of_both_interpreters(self, tmp_path: Path, elsewhere: Environment) -> None:
        own, other = package_versions(None), package_versions(elsewhere.python)
        assert own["pytest"] == other["pytest"] == pytest.__version__
        assert (other["tokenizers"], own["tokenizers"]) == ("0.0.7", version("tokenizers"))
        assert {*own} <= {*PACKAGES}
        assert other["faraway"] == "3.1"
        assert package_versions(tmp_path / "nowhere") == {}


def make_interpreter(*requires: str, **changes: Any) -> Interpreter:
    """Return an interpreter with the plugin's requirements and an engine of the distribution ``other``."""
    fields = {
        "python": "3.12.1",
        "packages": {"pytest-llem": OURS, "torch": "2.13.0+cpu", "old": "not a version"},
        "engines": {"theirs": "other"},
        "requires": {"pytest-llem": [], "other": list(requires)},
        "modules": ["pytest_llem"],
    }
    return Interpreter.model_validate({**fields, **changes})


class TestRequirements:
    @pytest.mark.parametrize(
        "requires",
        [
            [],
            ["torch>=2.11"],
            ["torch"],
            ["old>=3"],
            ["a; extra == 'test'", "b; python_version < '3.12'", "c; sys_platform == 'win32'"],
            ["what (is this"],
        ],
    )
    def test_environment_with_all_packages_is_accepted(self, requires: list[Any]) -> None:
        assert check_runner_environment(make_interpreter(*requires), "theirs", "pip") is None

    @pytest.mark.parametrize(
        ("requires", "message"),
        [
            (["a"], "needs a: PIP install a"),
            (
                ["a>=2,<3", "a>=2,<3", "torch>=99"],
                "needs a and torch>=99 (found 2.13.0+cpu): PIP install 'a<3,>=2' 'torch>=99'",
            ),
            (["a[x]>1; python_version >= '3.12'"], "needs a: PIP install 'a[x]>1'"),
            (
                ["a @ https://a.example/a.whl"],
                "needs a: PIP install 'a @ https://a.ex",
            ),
        ],
    )
    def test_missing_requirement_of_the_engine_is_an_error(self, requires: list[str], message: str) -> None:
        assert (check_runner_environment(make_interpreter(*requires), "theirs", "PIP") or "").startswith(message)

    def test_only_the_workers_requirements_of_the_plugin_count(self) -> None:
        ours = [f"{name}>=1" for name in WORKER_PACKAGES]
        other = make_interpreter(requires={"pytest-llem": [*ours, "torch>=99", "rich"], "other": []})
        wanted = " and ".join(WORKER_PACKAGES)
        assert (check_runner_environment(other, "theirs", "PIP") or "").startswith(
            f"needs {wanted}: PIP install 'nvidia-ml-py>=1' 'ps"
        )
        assert check_runner_environment(other, None, "PIP") == check_runner_environment(other, "theirs", "PIP")

    def test_extra_of_the_engines_name_is_required(self) -> None:
        requires = ["a; extra == 'theirs'", "torch>=99; extra == 'theirs'", "b; extra == 'test'"]
        assert check_runner_environment(make_interpreter(*requires), "theirs", "PIP") == (
            "needs a and torch>=99 (found 2.13.0+cpu): PIP install 'other[theirs]'"
        )
        assert check_runner_environment(make_interpreter("torch; extra == 'theirs'"), "theirs", "PIP") is None

    def test_missing_packages_of_an_engine_are_found_here(self, monkeypatch: pytest.MonkeyPatch) -> None:
        here = make_interpreter("a; extra == 'theirs'")
        monkeypatch.setattr(runner_environment, "this_interpreter", lambda: here)
        monkeypatch.syspath_prepend("/nowhere")  # answers are kept for each sys.path
        assert missing_here("theirs") == "needs a: pip install 'other[theirs]'"
        assert missing_here("package.module:Class") is None

    @pytest.mark.parametrize("change", [{"packages": {}}, {"modules": []}])
    def test_missing_plugin_is_an_error(self, change: dict[str, Any]) -> None:
        assert check_runner_environment(make_interpreter(**change), "theirs", "PIP") == (
            f"has no pytest-llem: install it there: PIP install pytest-llem=={OURS}"
        )

    def test_other_version_of_the_plugin_is_an_error(self) -> None:
        assert check_runner_environment(make_interpreter(packages={"pytest-llem": "0.0.7"}), "theirs", "PIP") == (
            f"has pytest-llem 0.0.7, and {OURS} runs here: PIP install pytest-llem=={OURS}"
        )

    def test_missing_engine_is_an_error(self, noop_engine: None) -> None:
        message = "has no engine of that name (there are: theirs): "
        assert (
            check_runner_environment(make_interpreter(), "noop", "PIP")
            == f"{message}install its package there: PIP install noop-engine==1.0"
        )
        assert (
            check_runner_environment(make_interpreter(), "nobodys", "PIP")
            == f"{message}{how_to_install('nobodys')}"
        )
        assert check_runner_environment(make_interpreter(), None, "PIP") is None

    def test_requirements_of_options_are_checked(self) -> None:
        config = ExperimentConfig.model_validate(
            {"model": "m", "pytorch": {"device_map": "auto", "attn_implementation": "flash_attention_2"}}
        )
        assert list(unmet_by_pytorch(config, Packages(lambda module: False, "PIP"))) == [
            "pytorch.device_map needs accelerate: PIP install accelerate",
            "pytorch.attn_implementation 'flash_attention_2' needs flash-attn or kernels: PIP install flash-attn",
        ]
        assert list(unmet_by_pytorch(config, Packages({"accelerate", "kernels"}.__contains__, "PIP"))) == []


class TestRunning:
    @pytest.mark.parametrize("written", ["absolute", slow("relative"), slow("home")])
    def test_engine_of_another_environment_runs(
        self,
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        results: Results,
        elsewhere: Environment,
        notes: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
        written: str,
    ) -> None:
        python = elsewhere.python
        if written == "home":
            monkeypatch.setenv("HOME", str(elsewhere.folder.parent))
        runner = {"absolute": python, "relative": os.path.relpath(python), "home": "~/env/bin/python"}[written]
        write_study(
            backend="faraway",
            faraway={"size": 2},
            sweep={"n": [1]},
            execution={"n_cycles": 1},
            runners={"faraway": str(runner)},
        )
        run = pytester.runpytest_inprocess("study.yaml", "-p", "llem")
        run.assert_outcomes(passed=1)
        run.stdout.no_fnmatch_line("*preflight*")
        assert [(note["prefix"], note["inherited"]) for note in notes()] == [(str(elsewhere.folder), None)]
        for result in results.experiments():
            assert result.engine.name == "faraway"
            versions = package_versions(python)
            assert result.environment["packages"] == {
                name: versions[name] for name in PACKAGES if name in versions
            }
        assert results.manifest["environment"]["packages"]["tokenizers"] == version("tokenizers")
        message = [
            path.read_text()
            for path in results.directory.rglob("*")
            if path.name != "study.yaml" and path.is_file()
        ]
        assert not [text for text in message if str(elsewhere.folder) in text]

    def test_engine_of_another_environment_needs_a_runner(
        self, pytester: pytest.Pytester, write_study: WriteStudy
    ) -> None:
        write_study(backend="faraway", sweep={"n": [1]})
        run = pytester.runpytest_inprocess("study.yaml", "-p", "llem")
        run.stdout.fnmatch_lines(["*study.yaml:3:1: backend: no engine of that name (got 'faraway'; there are: *"])

    def test_experiment_needs_only_the_workers_requirements(
        self,
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        results: Results,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> None:
        """An experiment process needs only the requirements that preflight checks, neither torch nor pytest."""
        environment = Environment(tmp_path_factory.mktemp("bare") / "env", ROOT, NOOP_ENGINE)
        ours = distribution("pytest-llem")
        announced = ours.read_text("entry_points.txt") or ""
        environment.add("pytest-llem", OURS, *(ours.requires or ()), entry_points=announced)
        environment.share(*WORKER_PACKAGES)
        write_study(sweep={"n": [1]}, execution={"n_cycles": 1}, runners={"noop": str(environment.python)})
        pytester.runpytest_inprocess("study.yaml", "-p", "llem").assert_outcomes(passed=1)
        result = results.read(results.manifest["experiments"][0]["result_file"])
        assert {*result["environment"]["packages"]} == {"pytest-llem", "nvidia-ml-py"}
        found = ask(environment.python)
        assert isinstance(found, Interpreter)
        assert check_runner_environment(found, "noop", "PIP") is None
        assert (
            check_runner_environment(found, "pytorch", "PIP")
            == "needs torch and transformers: PIP install 'pytest-llem[pytorch]'"
        )

    @pytest.mark.parametrize("workers", [(), slow(("-n", "2"))], ids=["serial", "xdist"])
    def test_two_environments_in_one_study(
        self,
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        results: Results,
        elsewhere: Environment,
        notes: Callable[..., Any],
        workers: tuple[str, ...],
    ) -> None:
        write_study(
            backend=None,
            sweep={"backend": ["noop", "faraway"], "n": [1, 2]},
            execution={"n_cycles": 1},
            runners={"faraway": str(elsewhere.python), "noop": "local"},
        )
        pytester.runpytest_inprocess("study.yaml", "-p", "llem", *workers).assert_outcomes(passed=4)
        found = [results.read(entry["result_file"]) for entry in results.manifest["experiments"]]
        by_engine = {(one["engine"]["name"], one["environment"]["packages"]["tokenizers"]) for one in found}
        assert by_engine == {("faraway", "0.0.7"), ("noop", version("tokenizers"))}
        assert {note["prefix"] for note in notes()} == {str(elsewhere.folder)}

    @pytest.mark.slow
    def test_failures_in_another_environment_are_reported(
        self,
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        results: Results,
        elsewhere: Environment,
        notes: Callable[..., Any],
    ) -> None:
        write_study(
            backend="faraway",
            sweep={"faraway.fault": ["raise", "hang", "_exit"]},
            execution={"n_cycles": 1, "experiment_timeout_seconds": 5},
            runners={"faraway": str(elsewhere.python)},
        )
        pytester.runpytest_inprocess("study.yaml", "-p", "llem").assert_outcomes(failed=3)
        errors = {entry["experiment_id"]: entry["error"] for entry in results.manifest["experiments"]}
        assert {name: (error["kind"], error["phase"]) for name, error in errors.items()} == {
            "fault=raise": ("exception", "measuring"),
            "fault=hang": ("timeout", "measuring"),
            "fault=_exit": ("crash", "measuring"),
        }
        assert "the engine says no" in errors["fault=raise"]["message"]
        assert all(gone(note["pid"]) for note in notes())

    @pytest.mark.parametrize("ini", [None, "[pytest]\npythonpath = mine"])
    def test_own_engine_class_is_found_from_another_environment(
        self,
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        results: Results,
        elsewhere: Environment,
        notes: Callable[..., Any],
        ini: str | None,
    ) -> None:
        folder = pytester.path / "mine" if ini else pytester.path
        folder.mkdir(exist_ok=True)
        (folder / "of_my_own.py").write_text(
            "from faraway_engine import Engine as Mine"
        )  # installed only in the other environment
        if ini:
            pytester.makeini(ini)
        name = "of_my_own:Mine"
        write_study(
            backend=name, sweep={"n": [1]}, runners={name: str(elsewhere.python)}, execution={"n_cycles": 1}
        )
        pytester.runpytest_inprocess("study.yaml", "-p", "llem").assert_outcomes(passed=1)
        assert [note["prefix"] for note in notes()] == [str(elsewhere.folder)]

    def test_interpreter_is_asked_once_in_a_session(
        self, pytester: pytest.Pytester, write_study: WriteStudy, elsewhere: Environment
    ) -> None:
        real = shlex.quote(str(elsewhere.python))
        python = script(pytester.path / "python", f'echo "$1 $2" >> asked; exec {real} "$@"')
        for name in ("one.yaml", "two.yaml"):
            write_study(name, sweep={"n": [1]}, runners={"noop": str(python)}, execution={"n_cycles": 1})
        pytester.runpytest_inprocess("one.yaml", "two.yaml", "-p", "llem").assert_outcomes(passed=2)
        asked = [line for line in (pytester.path / "asked").read_text().splitlines() if line.startswith("-")]
        # For each study, the digest of the engine's code, and an experiment. Once, the environment and the engine.
        assert sorted(asked) == ["-P -m"] * 4 + ["-c "] * 2

    def test_interpreter_is_not_asked_where_nothing_runs_there(
        self, pytester: pytest.Pytester, write_study: WriteStudy
    ) -> None:
        python = script(pytester.path / "python", "touch asked; exit 1")
        write_study(
            backend=None,
            sweep={"backend": ["noop", "faraway"]},
            runners={"faraway": str(python)},
            execution={"n_cycles": 1},
        )
        pytester.runpytest_inprocess("study.yaml", "-p", "llem", "-k", "backend=noop").assert_outcomes(passed=1)
        assert not (pytester.path / "asked").exists()

    def test_missing_interpreter_fails_preflight_and_others_run(
        self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results
    ) -> None:
        write_study(
            backend=None,
            sweep={"backend": ["noop", "faraway"], "n": [1, 2]},
            runners={"faraway": "env/bin/python"},
            execution={"n_cycles": 1, "cycle_order": "sequential"},
        )
        run = pytester.runpytest_inprocess("study.yaml", "-p", "llem")
        run.assert_outcomes(passed=2, failed=2)
        message = "runner 'env/bin/python' of engine 'faraway' does not exist: name a Python interpreter (in *"
        run.stdout.fnmatch_lines(
            [f"  preflight, will fail: backend=faraway-n=1 and 1 more: {message}", f"preflight: {message}"]
        )
        kinds = {entry["error"]["kind"] for entry in results.manifest["experiments"] if entry["error"]}
        assert kinds == {"preflight"}

    @pytest.mark.parametrize("text", [None, "exit 1"])
    def test_wrong_interpreter_fails_without_preflight(
        self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results, text: str | None
    ) -> None:
        """With skip_preflight, a wrong path or a program that is not Python must fail quickly."""
        if text:
            script(pytester.path / "fake", text)
        write_study(
            sweep={"n": [1, 2]}, runners={"noop": "fake"}, execution={"n_cycles": 1, "skip_preflight": True}
        )
        pytester.runpytest_inprocess("study.yaml", "-p", "llem").assert_outcomes(failed=2)
        errors = [entry["error"] for entry in results.manifest["experiments"]]
        assert {error["kind"] for error in errors} == {"crash"}
        assert ("status 1" if text else "No such file") in errors[0]["message"]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
    def test_interpreter_that_is_asked_does_not_outlive_pytest(
        self, pytester: pytest.Pytester, write_study: WriteStudy, number: signal.Signals
    ) -> None:
        script(pytester.path / "fake", "sleep 1000 & echo $$ $! > pids.tmp; mv pids.tmp pids; wait; sleep 1000")
        write_study(sweep={"n": [1]}, runners={"noop": "fake"})
        run = subprocess.Popen(
            [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem"],
            start_new_session=True,
            stdout=subprocess.DEVNULL,
        )
        wait_until((pytester.path / "pids").exists)
        run.send_signal(number)
        assert run.wait(30) == (pytest.ExitCode.INTERRUPTED if number == signal.SIGINT else -number)
        for pid in map(int, (pytester.path / "pids").read_text().split()):
            wait_until(functools.partial(gone, pid))


OTHER = "transformers==5.22.2"


@pytest.fixture(scope="module")
def other_transformers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """An environment that differs from this one only in the version of transformers."""
    environment = Environment(tmp_path_factory.mktemp("other") / "env", *EVERYTHING)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--disable-pip-version-check"]
    done = subprocess.run(
        [*command, "--target", str(environment.site_packages), OTHER], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = f"{OTHER} is not available: {done.stderr.strip().splitlines()[-1:]}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    yield environment
    shutil.rmtree(environment.folder)


@pytest.mark.slow
def test_results_have_the_transformers_version_they_ran_with(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results, other_transformers: Environment
) -> None:
    """Each result records the version of transformers that it ran with."""
    changes = {
        "model": "builtin:tiny-llama",
        "backend": None,
        "precision": "fp32",
        "sweep": None,
        "execution": {"n_cycles": 1},
    }
    write_study("here.yaml", name="here", **changes)
    write_study("there.yaml", name="there", runners={"pytorch": str(other_transformers.python)}, **changes)
    pytester.runpytest_subprocess("here.yaml", "there.yaml", "-p", "llem").assert_outcomes(passed=2)
    found: dict[str, set[tuple[str, str]]] = {}
    for manifest in results.root.glob("*/manifest.json"):
        for entry in json.loads(manifest.read_text())["experiments"]:
            result = ExperimentResult.model_validate_json((manifest.parent / entry["result_file"]).read_text())
            packages, engine = (
                result.environment["packages"]["transformers"],
                result.engine.versions["transformers"],
            )
            found.setdefault(manifest.parent.name.partition("_")[0], set()).add((packages, engine))
            assert result.tokens.output_tokens == 6
    here, other = version("transformers"), OTHER.partition("==")[2]
    assert found == {"here": {(here, here)}, "there": {(other, other)}}
    assert here != other
    assert package_versions(other_transformers.python)["transformers"] == other
