"""``llem import``: points, axes and cycles of result files, and what their comparison finds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pytest_llem import StudyResult
from pytest_llem.cli import main
from pytest_llem.results.manifest import read_manifest
from tests.support.imports import GOLDEN, write_vllm

REPEATED = "runs of one server are one cycle and no repetitions"


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _files(folder: str, count: int, *, first_seed: int = 0, step: float = 0.01) -> list[str]:
    """Write the results of *count* runs to *folder*; every run has another seed."""
    seeds = range(first_seed, first_seed + count)
    return [str(write_vllm(Path(folder, f"{seed}.json"), seed=seed, step=step)) for seed in seeds]


def _compared(capsys: pytest.CaptureFixture[str], candidate: str) -> dict[str, str]:
    capsys.readouterr()
    main(["compare", "main", candidate, "--format", "json"])
    verdicts = json.loads(capsys.readouterr().out)["verdicts"]
    return {one["metric"]: one["verdict"] for one in verdicts}


def test_one_file_is_one_cycle_with_its_requests(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(GOLDEN / "vllm_0.32.0.json"), "-o", "out"]) == 0
    assert capsys.readouterr().out == "out: 1 point\n  model=smol: 1 cycle\n"
    result = StudyResult.load("out")
    [point] = result.points
    assert (result.name, result.status, point.axes) == ("out", "completed", {"model": "smol"})
    assert point.metrics["output_tokens_per_second"].values == [pytest.approx(116.3, abs=0.05)]
    assert len(result.to_dataframe()) == 1
    [entry] = read_manifest("out").experiments
    assert entry.started_at == "2026-11-28T12:27:45.000Z"
    assert len(Path("out", entry.result_file or "").with_suffix(".requests.csv").read_text().splitlines()) == 41
    stored = json.loads(Path("out", entry.result_file or "").read_text())["imported"]
    assert stored["tool"] == "vllm bench serve"
    assert stored["files"][0]["name"] == "vllm_0.32.0.json"
    assert len(stored["files"][0]["sha256"]) == 64


def test_results_of_an_import_make_a_report() -> None:
    main(["import", str(GOLDEN / "guidellm_0.8.1.json"), "-o", "out"])
    assert main(["report", "out"]) == 0
    assert "guidellm" in Path("out/report.html").read_text()


def test_settings_that_differ_between_files_are_axes() -> None:
    files = [
        str(write_vllm(Path(f"{slots}-{seed}.json"), seed=seed, slots=slots, requests=8 * slots))
        for slots in (1, 2)
        for seed in (0, 1)
    ]
    assert main(["import", *files, "-o", "out", "--cycle-per", "file"]) == 0
    found = {point.id: len(point.cycles) for point in StudyResult.load("out").points}
    assert found == {"max_concurrency=1": 2, "max_concurrency=2": 2}


def test_axis_is_taken_from_a_path_in_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    axis = ["--axis", "streams=config.profile.streams[0]"]
    assert main(["import", str(GOLDEN / "guidellm_0.8.1.json"), "-o", "out", *axis]) == 0
    assert [point.axes for point in StudyResult.load("out").points] == [{"streams": 8}]
    capsys.readouterr()
    assert main(["import", str(GOLDEN / "guidellm_0.8.1.json"), "-o", "o2", "--axis", "a=config.strategie"]) == 2
    assert "guidellm_0.8.1.json: --axis a=config.strategie: there is no 'strategie'" in capsys.readouterr().err


def test_starts_of_the_server_are_cycles_and_are_judged(capsys: pytest.CaptureFixture[str]) -> None:
    for at, (name, step) in enumerate({"main": 0.01, "same": 0.01, "slow": 0.011}.items()):
        files = _files(f"files-{name}", 10, first_seed=10 * at, step=step)
        assert main(["import", *files, "-o", name, "--cycle-per", "file"]) == 0
    found = _compared(capsys, "same")
    assert found.pop("energy_per_output_token_j") == "NOT JUDGED"  # no file has it
    assert set(found.values()) == {"SAME"}
    found = _compared(capsys, "slow")
    assert found["output_tokens_per_second"] == found["ttft_p50_ms"] == "REGRESSION"


def test_runs_of_one_server_are_refused_as_repetitions(capsys: pytest.CaptureFixture[str]) -> None:
    for at, name in enumerate(("main", "changed")):
        assert main(["import", *_files(f"files-{name}", 10, first_seed=10 * at), "-o", name]) == 0
        assert f"warning: 10 {REPEATED}" in capsys.readouterr().out
    [point] = StudyResult.load("main").points
    assert point.cycles == [1]
    capsys.readouterr()
    assert main(["compare", "main", "changed"]) == 0
    assert f"10 {REPEATED}" in capsys.readouterr().out


def test_start_of_the_server_that_a_file_names_is_its_cycle() -> None:
    for name in ("a", "b"):
        for seed in (0, 1):
            write_vllm(Path(f"{name}{seed}.json"), seed=seed + 2 * (name == "b"), server_start=name)
    main(["import", *sorted(map(str, Path().glob("*.json"))), "-o", "out"])
    [point] = StudyResult.load("out").points
    assert point.cycles == [1, 2]
    assert point.not_repeated is None
    stored = Path("out", read_manifest("out").experiments[0].result_file or "").read_text()
    assert json.loads(stored)["imported"]["runs"] == 2


def test_folders_are_cycles_of_several_runs_each() -> None:
    files = [file for at in range(3) for file in _files(f"start-{at}", 2, first_seed=2 * at)]
    main(["import", *files, "-o", "out", "--cycle-per", "folder"])
    [point] = StudyResult.load("out").points
    assert point.cycles == [1, 2, 3]


def test_tests_of_llama_bench_are_points_and_its_files_cycles() -> None:
    test = {"build_commit": "abc", "build_number": 7, "model_type": "llama", "n_prompt": 512, "n_gen": 0}
    for at in (1, 2):
        tests = [
            {**test, "avg_ns": 50_000_000 + at, "test_time": "2026-01-31T12:00:00Z"},
            {**test, "n_prompt": 0, "n_gen": 128, "avg_ns": 1_000_000_000 + at},
        ]
        Path(f"{at}.json").write_text(json.dumps(tests))
    assert main(["import", "1.json", "2.json", "-o", "out"]) == 0
    prompt, generation = StudyResult.load("out").points
    assert prompt.id == "n_prompt=512"
    assert prompt.cycles == [1, 2]
    assert prompt.metrics["output_tokens_per_second"].mean is None
    assert generation.metrics["output_tokens_per_second"].mean == pytest.approx(128)
    assert prompt.sut["llama-bench"] == "b7 abc"


def test_outputs_of_llama_bench_are_the_same_points_in_every_format() -> None:
    files = [str(GOLDEN / f"llama-bench_b11434.{ending}") for ending in ("json", "jsonl", "csv")]
    main(["import", *files, "-o", "out"])
    found = {point.id: len(point.cycles) for point in StudyResult.load("out").points}
    assert found == {"n_prompt=64": 3, "n_prompt=0": 3}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.json", "b.json"], "b.json: has the same content as a.json: one run is not two"),
        (["a.json", "a.json", "--cycle-per", "file"], "a.json: is given twice: one run is not two"),
        (["a.json", "own.json"], "a.json of vllm bench serve, own.json of script: tools measure differently"),
        (["missing.json"], "missing.json: no such file or folder"),
        (["a.json", "--axis", "x"], "--axis x: must be NAME=JSON.path"),
        (["a.json", "--axis", "x=model_id", "--axis", "x=duration"], "--axis x=duration: x is given twice"),
        (["a.json", "--name", "../a"], "--name: must be a name without path separators or control characters"),
        (
            ["a.json", "--name", ""],
            "--name: must be a name without path separators or control characters",
        ),
        (["a.json", "--name", 201 * "a"], "--name: must be at most 200 bytes long"),
        (["a.json", "-o", "a\tb"], "a\\tb: --name: must be a name without path separators or control characters"),
        (["untimed.json"], "untimed.json: has neither the duration of the run nor the times of its requests"),
        (["a.json", "-o", "full"], "full: exists already: give the name of a new folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_import_that_cannot_be_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.json", "b.json"):
        write_vllm(Path(name))
    Path("own.json").write_text('{"llem_run": 1, "seconds": 1, "metrics": {"seconds": 1}}')
    write_vllm(Path("full/a.json"))
    untimed = json.loads((GOLDEN / "llama-bench_b11434.json").read_text())
    Path("untimed.json").write_text(json.dumps([{**untimed[0], "avg_ns": None}]))
    assert main(["import", "-o", "out", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not Path("out").exists()
