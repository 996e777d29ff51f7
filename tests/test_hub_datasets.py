"""Datasets of the Hugging Face hub: downloaded once, read from the cache, errors in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import ExperimentConfig
from pytest_llem.engines.shipped import Packages
from pytest_llem.study.dataset import ALIASES, HubDataset
from pytest_llem.workload.prompts import dataset_problem, hub_dataset
from tests.conftest import Results
from tests.support import command
from tests.support.forks import ForkServer
from tests.support.hub import COMMIT, Hub, serving
from tests.support.narrow import not_none

pyarrow = pytest.importorskip("pyarrow", reason="the extra datasets is not installed")
pytest.importorskip("datasets")

from tests.support import hub_reader  # noqa: E402
from tests.support.hub_reader import Answer  # noqa: E402

CARD = """---
configs:
- config_name: main
  data_files:
  - {split: test, path: main/test.jsonl}
  - {split: validation, path: main/validation.jsonl}
- config_name: other
  data_files:
  - {split: test, path: other/test.jsonl}
---
"""

#: Metadata that declares two rows, although there are four.
WRONG_CARD = """---
dataset_info:
  features: [{name: text, dtype: string}, {name: label, dtype: int64}]
  splits: [{name: train, num_bytes: 20, num_examples: 2}]
---
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of datasets with the files that the hub has."""
    from pyarrow import parquet

    root = tmp_path_factory.mktemp("datasets")
    names = ("parquet", "several", "script", "numbers", "broken", "wrong", "gated", "plain", "verses")
    made = {f"owner/{name}": root / name for name in names}
    made[ALIASES["aienergyscore"]] = root / "energy"
    for folder in made.values():
        folder.mkdir()
    rows = {
        "source": ["A", "A", "A", "B", "B", None],
        "id": [1, 2, 3, 4, 5, 6],
        "text": ["a1", "a2", None, "b1", " \n", "c1"],
    }
    (root / "parquet" / "data").mkdir()
    parquet.write_table(pyarrow.table(rows), root / "parquet" / "data" / "train-00000-of-00001.parquet")
    (root / "parquet" / "loader.py").write_text("raise SystemExit('was run')")
    for subset, split in (("main", "test"), ("main", "validation"), ("other", "test")):
        file = root / "several" / subset / f"{split}.jsonl"
        file.parent.mkdir(exist_ok=True)
        lines = [{"id": n, "question": f"{subset} {split} {n}", "answer": f"{n}"} for n in range(3)]
        file.write_text("\n".join(map(json.dumps, lines)))
    (root / "several" / "README.md").write_text(CARD)
    (root / "script" / "script.py").write_text("raise SystemExit('was run')")
    (root / "numbers" / "train.csv").write_text("a,b\n1,2\n")
    (root / "verses" / "train.csv").write_text("verse,b\nx,2\ny,3\n")
    (root / "broken" / "train.parquet").write_bytes(b"PAR1 and no more")
    for name in ("wrong", "plain", "energy"):
        (root / name / "train.csv").write_text("text,label\none,1\ntwo,2\nthree,3\nfour,4\n")
    (root / "wrong" / "README.md").write_text(WRONG_CARD)
    return made


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Iterator[Hub]:
    with serving({}, folders) as hub:
        hub.gated.add("owner/gated")
        yield hub


@pytest.fixture
def hub(served: Hub) -> Hub:
    served.downloads.clear()
    return served


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9"}  # where nobody answers

#: Read datasets by name, or ``name|n|order``, with changes to the environment.
Read = Callable[..., list[Answer]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hugging Face's folder for all tests of ``read``, which empties it."""
    return tmp_path_factory.mktemp("hf") / "home"


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, ForkServer]]:
    """Forkservers by network setting: the library reads it once, on import, which is slow."""
    servers: dict[str, ForkServer] = {}
    yield servers
    for server in servers.values():
        server.close()


@pytest.fixture
def read(hub: Hub, home: Path, servers: dict[str, ForkServer]) -> Read:
    """Read datasets in a new process with an empty cache."""
    shutil.rmtree(home, ignore_errors=True)

    def ask(*wanted: str, **environment: str) -> list[Answer]:
        rows = [one.split("|") if "|" in one else [one, "2", "interleaved"] for one in wanted]
        env = hub.environment(home) | environment
        key = json.dumps(environment)
        if key not in servers:
            servers[key] = ForkServer(env)
        answers = servers[key].call(env, hub_reader.read, [(name, int(n), order) for name, n, order in rows])
        assert isinstance(answers, list)
        return answers

    return ask


def test_rows_with_text_are_the_prompts_in_file_order(read: Read, hub: Hub) -> None:
    found = read("owner/parquet|4|interleaved", "owner/parquet|4|grouped", "owner/parquet|3|shuffled")
    assert [prompts for prompts, _, _ in found[:2]] == [["a1", "b1", "c1", "a2"], ["a1", "a2", "b1", "c1"]]
    assert len({*found[2][0]} & {"a1", "a2", "b1", "c1"}) == 3
    assert {(commit, fetches) for _, commit, fetches in found} == {(COMMIT, 1)}
    assert sorted(hub.downloads) == ["owner/parquet/train-00000-of-00001.parquet"], "once, and no program"


@pytest.mark.slow
def test_dataset_is_available_offline_after_one_read(read: Read, hub: Hub) -> None:
    wanted = ("owner/parquet", f"owner/parquet@{COMMIT}", "owner/several/main:test", "aienergyscore")
    online = read(*wanted)
    assert [prompts for prompts, _, _ in online] == [
        ["a1", "b1"],
        ["a1", "b1"],
        ["main test 0", "main test 1"],
        ["one", "two"],
    ]
    hub.downloads.clear()
    assert read(*wanted, **OFFLINE) == online
    assert read(*wanted, HF_ENDPOINT=OFFLINE["HF_ENDPOINT"]) == online, "nor need anyone say that there is none"
    assert hub.downloads == []


def test_subset_split_and_column_are_selected(read: Read) -> None:
    assert read("owner/several/other", "owner/several/main:validation", "owner/several/main:test#answer") == [
        [["other test 0", "other test 1"], COMMIT, 1],
        [["main validation 0", "main validation 1"], COMMIT, 1],
        [["0", "1"], COMMIT, 1],
    ]


NO_FILE = "no file of that name; "


def test_unavailable_dataset_is_reported_in_one_line(read: Read) -> None:
    wanted = {
        "owner/none": f"not found: {NO_FILE}not on the Hugging Face hub, or private (then set HF_TOKEN)",
        "owner/plain@v9": f"not found: {NO_FILE}the Hugging Face hub has it, but no revision 'v9'",
        "owner/gated": f"not found: {NO_FILE}gated on the Hugging Face hub (accept its terms there and set "
        "HF_TOKEN)",
        "owner/several": "cannot be read: ValueError: Config name is missing. Please pick one among the available "
        "configs: ['main', 'other'] Example of usage: `load_dataset('owner/several', 'main')`",
        "owner/several/main": "has the splits 'test', 'validation': name one, as owner/several/main:test",
        "owner/several/nope": "cannot be read: ValueError: BuilderConfig 'nope' not found. Available: ['main', "
        "'other']",
        "owner/several/main:nope": "cannot be read: ValueError: Unknown split \"nope\". Should be one of ['test', "
        "'validation'].",
        "owner/several/main:test#id": "has no column 'id' of strings (it has 'id', 'question', 'answer'; strings "
        "in 'question', 'answer')",
        "owner/numbers": "has no column 'prompt', 'text', 'question', 'instruction', 'query', 'input' or "
        "'content' of strings (it has 'a', 'b'; none has strings)",
        "owner/script": "cannot be read: FileNotFoundError: Couldn't find any data file at owner/script.",
    }
    for name, message in zip(wanted, read(*wanted), strict=True):
        assert message == f"dataset {not_none(HubDataset.parse(name)).name!r} {wanted[name]}"
    [broken, wrong, few] = read("owner/broken", "owner/wrong", "owner/plain|5|interleaved")
    assert broken.startswith("dataset 'owner/broken' cannot be read: ")
    assert "\n" not in broken
    assert wrong.startswith("dataset 'owner/wrong' cannot be read: NonMatchingSplitsSizesError: ")
    assert few == "dataset 'owner/plain' has 4 prompts, but the experiment needs n: 5"


def test_other_column_is_suggested(read: Read) -> None:
    suggestion, found = read("owner/verses", "owner/verses#verse")
    assert "name one, as owner/verses#verse" in suggestion
    assert found[0] == ["x", "y"]


@pytest.mark.slow
def test_incomplete_download_counts_as_missing(read: Read, home: Path) -> None:
    read("owner/parquet")
    [file] = home.rglob("snapshots/*/data/*.parquet")
    file.unlink()
    assert "not in the Hugging Face cache" in read("owner/parquet", **OFFLINE)[0]
    assert read("owner/parquet")[0][0] == ["a1", "b1"], "it is completed"


def test_missing_dataset_is_known_at_once_offline(read: Read) -> None:
    [message] = read("owner/plain", **OFFLINE)
    assert message == (
        f"dataset 'owner/plain' not found: {NO_FILE}not in the Hugging Face cache (HF_HUB_OFFLINE is set, so the "
        "hub was not asked)"
    )


def problem(name: Any, directory: Any, **packages: Any) -> Any:
    return dataset_problem(ExperimentConfig(model="m", dataset=name), directory, Packages(**packages))


def test_preflight_knows_that_the_library_is_missing(tmp_path: Path) -> None:
    assert problem("owner/name", tmp_path, has=lambda module: False, pip="there/bin/python -m pip") == (
        "dataset 'owner/name' is looked for on the Hugging Face hub, and that needs datasets: "
        "there/bin/python -m pip install datasets"
    )
    assert problem("aienergyscore", tmp_path, has=lambda module: False).startswith(
        "dataset 'AIEnergyScore/text_generation' is looked for"
    )


def test_local_files_are_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "prompts.csv").touch()
    assert problem("owner/prompts.csv", tmp_path).startswith("dataset 'owner/prompts.csv': expected ")
    assert problem("owner/prompts.jsonl", tmp_path).startswith("dataset 'owner/prompts.jsonl' cannot be read: ")
    assert hub_dataset("owner/other.csv", tmp_path) == HubDataset("owner/other.csv")


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("a/b", ("a/b", None, None, None, None)),
        ("a-1/b.c_d", ("a-1/b.c_d", None, None, None, None)),
        ("a/b@v1/main:test#my col", ("a/b", "v1", "main", "test", "my col")),
        ("a/b@refs/convert/parquet", ("a/b", "refs/convert/parquet", None, None, None)),
        ("a/b@refs/pr/3/main:test", ("a/b", "refs/pr/3", "main", "test", None)),
        ("a/b@refs/main", ("a/b", "refs", "main", None, None)),
        ("a/b:test", ("a/b", None, None, "test", None)),
        ("a/b/main", ("a/b", None, "main", None, None)),
        ("a/b#c", ("a/b", None, None, None, "c")),
        ("aienergyscore", ("AIEnergyScore/text_generation", None, None, None, None)),
    ],
)
def test_dataset_names_are_parsed(text: str, fields: tuple[Any, ...]) -> None:
    found = not_none(HubDataset.parse(text))
    assert (found.name, found.revision, found.subset, found.split, found.column) == fields
    assert HubDataset.parse(str(found)) == found


@pytest.mark.parametrize(
    "text", ["a", "a/b/c/d", "/a/b", "./a/b", "~/a/b", "a/b:", "a/b.jsonl", "a//b", "a/b@", "../a"]
)
def test_invalid_dataset_names_are_refused(text: str) -> None:
    assert HubDataset.parse(text) is None


STUDY = """
model: builtin:tiny-llama
dataset: owner/plain
n: 2
max_input_tokens: 4
max_output_tokens: 2
warmup: {enabled: false}
measurement: {min_window_seconds: 0}
execution: {n_cycles: 1}
"""


@pytest.mark.slow
def test_fetched_study_runs_offline(
    pytester: pytest.Pytester, online: Hub, monkeypatch: pytest.MonkeyPatch, results: Results
) -> None:
    (pytester.path / "study.yaml").write_text(STUDY)

    def fetch() -> tuple[int, str]:
        status, out, _ = command.fetch("study.yaml", env=os.environ)
        return status, out.splitlines()[-1]

    assert fetch() == (0, "fetched: dataset owner/plain")
    assert fetch() == (0, "already here: dataset owner/plain")
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    pytester.runpytest_subprocess("study.yaml", "-p", "llem").assert_outcomes(passed=1)
    tokens = json.loads(next((results.directory / "experiments").glob("*.json")).read_text())["tokens"]
    assert (tokens["dataset_revision"], tokens["input_tokens"]) == (COMMIT, 4 + 4)
    monkeypatch.setenv("HF_HOME", str(pytester.path / "empty"))
    plan = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "--collect-only")
    plan.stdout.fnmatch_lines(["*dataset 'owner/plain' not found: *not in the Hugging Face cache*"])
