"""``llem fetch``: download what studies need, so that they run offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pytest_llem.cli.downloads import Need, needs
from pytest_llem.engines.tiny_llama import tiny_llama
from pytest_llem.study.loading import load_study
from tests.conftest import Results
from tests.support import command
from tests.support.hub import COMMIT, Hub, serving

TINY = "n: 1\nmax_output_tokens: 2\nwarmup: {enabled: false}\nmeasurement: {min_window_seconds: 0}\n"

#: Writes the text of a study, and returns its name.
WriteText = Callable[..., str]


def llem(*arguments: str, **environment: str) -> tuple[int, list[str], str]:
    """Run ``llem fetch`` and return its exit status, the lines of its output, and its standard error."""
    status, out, err = command.fetch(*arguments, env={**os.environ, **environment})
    assert "Traceback" not in out + err
    return status, out.splitlines(), err


@pytest.fixture
def study(pytester: pytest.Pytester) -> WriteText:
    """Write a study into the current folder and return its name."""

    def write(text: str, name: str = "study.yaml") -> str:
        (pytester.path / name).write_text(text)
        return name

    return write


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of models with the files that the hub has."""
    names = ("whole", "sharded", "empty", "pickled")
    whole, sharded, empty, pickled = (tmp_path_factory.mktemp(name) / "model" for name in names)
    shutil.copytree(tiny_llama(), whole)
    shutil.copytree(tiny_llama(), sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    shutil.copytree(sharded, empty)
    shutil.copytree(sharded, pickled)
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for name in shards:
        (sharded / name).write_bytes(b"weights of " + name.encode())
    (sharded / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict(zip("ab", shards, strict=True))})
    )
    (pickled / "pytorch_model.bin").write_bytes(b"weights")
    return {"owner/whole": whole, "owner/sharded": sharded, "owner/empty": empty, "owner/pickled": pickled}


@pytest.fixture
def hub(models: dict[str, Path]) -> Iterator[Hub]:
    with serving(models) as hub:
        yield hub


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}  # where nobody answers


class TestHub:
    @pytest.mark.slow
    def test_fetched_models_are_found_offline(
        self,
        pytester: pytest.Pytester,
        study: WriteText,
        online: Hub,
        monkeypatch: pytest.MonkeyPatch,
        results: Results,
    ) -> None:
        file = study(f"model: owner/whole\n{TINY}execution: {{n_cycles: 1}}\n")
        assert llem(file)[:2] == (0, ["fetched: owner/whole"])
        assert sorted(online.downloads) == [
            f"owner/whole/{name}"
            for name in (
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "tokenizer.json",
                "tokenizer_config.json",
            )
        ]
        for name, value in OFFLINE.items():
            monkeypatch.setenv(name, value)
        done = pytester.runpytest_subprocess(file, "-p", "llem")
        done.assert_outcomes(passed=1)
        done.stdout.no_fnmatch_line("*preflight*")
        result = json.loads(next((results.directory / "experiments").glob("*.json")).read_text())
        assert (result["engine"]["model_source"], result["engine"]["model_revision"]) == ("hub", COMMIT)
        assert llem(file)[:2] == (0, ["already here: owner/whole"])

    def test_only_missing_files_are_downloaded(self, study: WriteText, online: Hub, tmp_path: Path) -> None:
        file = study("model: owner/sharded")
        assert llem(file)[:2] == (0, ["fetched: owner/sharded"])
        online.downloads.clear()
        assert llem(file)[:2] == (0, ["already here: owner/sharded"])
        assert online.downloads == []
        [shard] = (tmp_path / "hf").rglob("snapshots/*/model-00002*")
        shard.resolve().unlink()
        shard.unlink()
        status, lines, _ = llem(file, **OFFLINE)
        assert (status, lines) == (
            1,
            [
                "not available: owner/sharded: model-00002-of-00002.safetensors is missing "
                "(1 of 2 files with weights)"
            ],
        )
        assert llem(file)[:2] == (0, ["fetched: owner/sharded"])
        assert online.downloads == ["owner/sharded/model-00002-of-00002.safetensors"]

    def test_weights_in_another_format_are_fetched_if_there_are_no_others(
        self, study: WriteText, online: Hub
    ) -> None:
        file = study("model: owner/pickled")
        assert llem(file)[:2] == (0, ["fetched: owner/pickled"])
        assert "owner/pickled/pytorch_model.bin" in online.downloads
        assert llem(file, **OFFLINE)[:2] == (0, ["already here: owner/pickled"])

    def test_each_model_revision_is_fetched_once_for_all_studies(self, study: WriteText, online: Hub) -> None:
        first = study("sweep: {model: [owner/whole, owner/sharded], n: [1, 2]}", "a.yaml")
        second = study(
            f"model: owner/whole\nsweep: {{pytorch.revision: [null, '{COMMIT}'], precision: [bf16, fp16]}}",
            "b.yaml",
        )
        status, lines, _ = llem(first, second)
        assert status == 0
        assert lines == [
            "fetched: owner/whole",
            "fetched: owner/sharded",
            f"already here: owner/whole (revision {COMMIT})",
        ]

    def test_fetch_continues_after_an_unavailable_model(self, study: WriteText, online: Hub) -> None:
        file = study(
            "experiments:\n"
            "- {model: owner/none}\n"
            "- {model: owner/whole, pytorch: {revision: v9}}\n"
            "- {model: owner/empty}\n"
            "- {model: a/b/c}\n"
            '- {model: "a\\n\\e[31mb"}\n'
            "- {model: builtin:other}\n"
            "- {model: owner/whole}\n"
        )
        status, lines, _ = llem(file)
        assert status == 1
        nowhere = "llem_model_path is not set; "
        assert lines == [
            f"not available: owner/none: no folder owner/none; {nowhere}not on the Hugging Face hub, or private "
            "(then set HF_TOKEN)",
            f"not available: owner/whole (revision v9): no folder owner/whole; {nowhere}the Hugging Face hub has "
            "it, but no revision 'v9'",
            "not available: owner/empty: it has weights neither in *.safetensors files nor in pytorch_model*.bin",
            f"not available: a/b/c: no folder a/b/c; {nowhere}not the name of a model on the hub either "
            "(expected owner/name)",
            lines[4],
            "not available: builtin:other: the only builtin is builtin:tiny-llama",
            "fetched: owner/whole",
        ]
        assert lines[4].startswith("not available: a\\n\\x1b[31mb: ")

    def test_unreachable_hub_is_reported_as_the_reason(self, study: WriteText, tmp_path: Path) -> None:
        file = study("model: owner/whole")
        status, lines, _ = llem(file, HF_HOME=str(tmp_path / "hf"), HF_HUB_OFFLINE="1")
        assert (status, lines) == (
            1,
            [
                "not available: owner/whole: no folder owner/whole; llem_model_path is not set; "
                "not in the Hugging Face cache (HF_HUB_OFFLINE is set, so the hub was not asked)"
            ],
        )


class TestNoDownload:
    @pytest.mark.slow
    def test_builtin_model_is_generated_once(self, study: WriteText, tmp_path: Path) -> None:
        file = study("model: builtin:tiny-llama")
        assert llem(file, XDG_CACHE_HOME=str(tmp_path))[:2] == (0, ["fetched: builtin:tiny-llama"])
        assert (tmp_path / "pytest-llem" / "tiny-llama-v1" / "model.safetensors").is_file()
        assert llem(file, XDG_CACHE_HOME=str(tmp_path))[:2] == (0, ["already here: builtin:tiny-llama"])

    def test_unwritable_cache_is_reported_in_one_line(self, study: WriteText, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        (tmp_path / f"pytest-llem-{os.geteuid()}").touch()
        status, [line, other], _ = llem(
            study("sweep: {model: ['builtin:tiny-llama', .]}"),
            XDG_CACHE_HOME=str(tmp_path / "file"),
            TMPDIR=str(tmp_path),
        )
        assert (status, other) == (1, "already here: .")
        assert line.startswith("not available: builtin:tiny-llama: ")
        assert "is not a folder of this user's alone: remove it" in line

    def test_model_folders_are_found_by_name(self, pytester: pytest.Pytester, study: WriteText) -> None:
        for folder in ("one/owner/a", "two/owner/b", "three/owner/c", "local"):
            (pytester.path / folder).mkdir(parents=True)
        file = study("sweep: {model: [owner/a, owner/b, owner/c, ./local]}")
        here = [f"already here: {name}" for name in ("owner/a", "owner/b", "owner/c", "./local")]
        pytester.makeini("[pytest]\nllem_model_path = three\n")
        assert llem(file, "--model-path", "one", "--model-path=two") == (0, here, "")
        status, lines, _ = llem(file, "--model-path", "one")
        assert status == 1
        assert lines[0:1] + lines[2:] == here[0:1] + here[2:]
        assert lines[1].startswith("not available: owner/b: no folder owner/b; none of that name under ")
        assert f"(one, {pytester.path / 'three'})" in lines[1]

    def test_model_of_a_server_is_fetched_by_name(self, pytester: pytest.Pytester, study: WriteText) -> None:
        (pytester.path / "m.gguf").touch()
        (pytester.path / "local").mkdir()
        server = "backend: server\nserver: {command: [serve, '{port}']}\nload: {concurrency: 1}\n"
        file = study(f"{server}sweep: {{model: [m.gguf, ./local]}}")
        assert llem(file) == (0, ["already here: m.gguf", "already here: ./local"], "")
        assert llem(study(server)) == (0, [], "")

    def test_skipped_experiments_need_nothing(self, study: WriteText) -> None:
        file = study("sweep: {model: [owner/none, .]}\nskip: [{where: {model: owner/none}}]")
        assert llem(file) == (0, ["already here: ."], "")

    def test_fetch_has_no_limit_of_experiments(self, study: WriteText) -> None:
        file = study("model: .\nsweep: {n: [1, 2], max_output_tokens: [1, 2]}")
        assert llem(file, PYTEST_ADDOPTS="-o llem_max_experiments=3") == (0, ["already here: ."], "")


class TestMistakes:
    def test_invalid_study_does_not_stop_the_others(self, pytester: pytest.Pytester, study: WriteText) -> None:
        wrong = study("modle: m\nn: 0\nsweep: {n: [1]}", "wrong.yaml")
        good = study("model: .", "good.yaml")
        status, lines, stderr = llem(wrong, "missing.yaml", good)
        assert (status, lines) == (1, ["already here: ."])
        errors = stderr.splitlines()
        assert errors[0] == "wrong.yaml:1:1: modle: unknown key (did you mean 'model'?)"
        assert errors[-1] == "missing.yaml:1:1: no such file or folder"
        collected = pytester.runpytest_inprocess(wrong, "-p", "llem", "--collect-only").outlines
        assert errors[:-1] == [line for line in collected if line.startswith("wrong.yaml:")]

    def test_invalid_ini_file_is_reported(self, pytester: pytest.Pytester, study: WriteText) -> None:
        pytester.makeini("[pytest]\nllem_model_path = '\n")
        status, lines, stderr = llem(study("model: ."))
        assert (status, lines) == (1, [])
        assert "ERROR: llem_model_path: No closing quotation" in stderr

    def test_pytest_addopts_do_not_change_fetch(self, study: WriteText) -> None:
        """In a new process, as users start it."""
        options = "-n 2 --collect-only -q -W error -p no:llem-recorder"
        done = subprocess.run(
            [sys.executable, "-m", "pytest_llem.cli", "fetch", study("model: .")],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTEST_ADDOPTS": options},
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "already here: .\n", "")

    def test_strict_applies_to_fetch(self, pytester: pytest.Pytester, study: WriteText) -> None:
        pytester.makeini("[pytest]\nllem_strict = true\n")
        file = study("model: .\nsweep: {pytorch.load_in_4bit: [true, false], pytorch.load_in_8bit: [true, false]}")
        status, lines, stderr = llem(file)
        assert (status, lines) == (1, [])
        assert "is excluded, an error with --llem-strict" in stderr


OWN_ENGINE = """
import sys
from pathlib import Path
from typing import Any
from pytest_llem import EngineOptions
from pytest_llem.engines.protocol import PreflightError

class Options(EngineOptions):
    level: Any = None

class Engine:
    options = Options

    def __init__(self, config, context):
        self.name, self.section, self.context = config.model, config.engine_section, context

    def fetch(self):
        with Path("log").open("a") as log:
            print(self.name, self.section, [one.name for one in self.context.model_path], file=log)
        if self.name == "refused":
            raise PreflightError("there is\\nno such thing")
        if self.name == "broken":
            1 / 0
        if self.name == "leaving":
            sys.exit("bye")
        if self.name == "partly" and self.section["level"] != 2:
            raise PreflightError(f"no level {self.section['level']}")
"""


class TestOwnEngine:
    def test_model_of_a_function_is_left_to_it(self, pytester: pytest.Pytester, study: WriteText) -> None:
        pytester.makepyfile(fns="def answer(model, prompt): ...")
        file = study("model: my/model\nbackend: 'fns:answer'")
        assert llem(file)[:2] == (0, ["left to the engine: my/model (by engine fns:answer)"])

    @pytest.mark.parametrize("folder", [".", "engines"])
    def test_user_engine_fetches_its_own_models(
        self, pytester: pytest.Pytester, study: WriteText, folder: str
    ) -> None:
        (pytester.path / folder).mkdir(exist_ok=True)
        (pytester.path / folder / "mine.py").write_text(OWN_ENGINE)
        pytester.makeini("[pytest]\npythonpath = engines\nllem_model_path = models\n")
        file = study(
            "backend: 'mine:Engine'\n"
            "sweep: {model: [refused, broken, leaving, good], 'mine:Engine.level': [1, 2], n: [1, 2]}"
        )
        status, lines, _ = llem(file)
        assert (status, lines) == (
            1,
            [
                "not available: refused (by engine mine:Engine): there is no such thing",
                "not available: broken (by engine mine:Engine): ZeroDivisionError: division by zero",
                "not available: leaving (by engine mine:Engine): SystemExit: bye",
                "fetched: good (by engine mine:Engine)",
            ],
        )
        log = (pytester.path / "log").read_text().splitlines()
        assert [line for line in log if line.startswith("good")] == [
            f"good {{'level': {level}}} ['models']" for level in (1, 2)
        ]

    def test_failing_configurations_are_reported_and_others_fetched(
        self, pytester: pytest.Pytester, study: WriteText
    ) -> None:
        pytester.makepyfile(mine=OWN_ENGINE)
        file = study("model: partly\nbackend: 'mine:Engine'\nsweep: {'mine:Engine.level': [1, 2, 3]}")
        which = "2 of 3 configurations: no level 1; no level 3"
        assert llem(file)[:2] == (1, [f"not available: partly (by engine mine:Engine): {which}"])
        assert len((pytester.path / "log").read_text().splitlines()) == 3

    def test_missing_engine_is_reported_in_one_line(self, study: WriteText) -> None:
        file = study("model: m\nbackend: [tensorrt, 'nowhere.to_be:Found']")
        status, [first, second], _ = llem(file)
        assert status == 1
        assert first.startswith("not available: m (by engine tensorrt): engine 'tensorrt' cannot be loaded: ")
        assert second == (
            "not available: m (by engine nowhere.to_be:Found): engine 'nowhere.to_be:Found' cannot be loaded: "
            "No module named 'nowhere'"
        )

    def test_models_of_engines_with_a_runner_are_fetched(self, tmp_path: Path) -> None:
        (tmp_path / "s.yaml").write_text(
            "model: owner/name\nbackend: [tensorrt, 'own:Engine']\nrunners: {tensorrt: /opt/trt/bin/python}"
        )
        found = needs([load_study(tmp_path / "s.yaml")])
        assert found[0] == Need("owner/name")
        assert (found[1].name, found[1].engine) == ("owner/name", "own:Engine")
