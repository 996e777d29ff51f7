"""Baselines: finding by name or path, saving with readable differences, and loading."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import StudyResult
from pytest_llem.gates.saved import WIDTH, BaselineError, load, missing_results, resolve, save
from pytest_llem.results.models import ErrorRecord, ManifestEntry
from tests.support.study_results import point, study_result, summary


@pytest.fixture
def result() -> StudyResult:
    return study_result(
        point(
            {"precision": "bf16"},
            seconds=[0.1 + 0.2, 1 / 3, 1e-17],
            energy_j=[10.0, 11.0, None],
            ttft_p50_ms=[],
            sut={"torch": "2.13.0", "settings.eos_token_id": [1, 2]},
        ),
        point({"precision": "fp32"}, seconds=[2.0, 2.5, 3.0]),
        environment={"os": "Linux", "packages": {"torch": "2.13.0"}},
        warnings=[{"code": "unclassified", "severity": "warning", "text": "a warning, with an é"}],
        result_files=["experiments/a-c1.json"],
        excluded=[{"axes": {}, "reason": "no"}],
    )


def test_saved_baseline_is_loaded_unchanged(tmp_path: Path, result: StudyResult) -> None:
    file = save(result, "main", tmp_path)
    assert file == tmp_path / ".llem" / "baselines" / "main" / "made-up.json"
    found = load("main", tmp_path, "made-up")
    assert found == StudyResult.load(file)
    del result.points[0].metrics["ttft_p50_ms"]  # what is null says nothing
    result.result_files, result.excluded = [], []
    assert found == result
    assert found.points[0].metrics["seconds"].values == [0.1 + 0.2, 1 / 3, 1e-17]


def test_baseline_has_one_line_per_metric(tmp_path: Path, result: StudyResult) -> None:
    text = save(result, "main", tmp_path).read_text(encoding="utf-8")
    lines = text.splitlines()
    assert text.endswith("}\n")
    metrics = [line for line in lines if re.match(r' *"(seconds|energy_j)": \{"mean": .*\},?$', line)]
    assert len(metrics) == 3
    assert max(len(line) for line in lines if line not in metrics) < WIDTH + 1
    assert '   "axes": {"precision": "bf16"},' in lines
    assert '"text": "a warning, with an é"' in text
    assert "null" not in "".join(metrics).replace("11.0, null]", "")


def test_saving_the_same_result_again_changes_nothing(tmp_path: Path, result: StudyResult) -> None:
    file = save(result, "main", tmp_path)
    before = file.read_bytes()
    save(load("main", tmp_path), "main", tmp_path)
    assert file.read_bytes() == before
    assert [one.name for one in file.parent.iterdir()] == [file.name], "nothing is left beside it"


def test_a_changed_metric_changes_its_line(tmp_path: Path, result: StudyResult) -> None:
    before = save(result, "main", tmp_path).read_text(encoding="utf-8").splitlines()
    changed = point({}, seconds=[2.0, 2.5, 3.1]).metrics["seconds"]
    result.points[1].metrics["seconds"] = changed
    after = save(result, "main", tmp_path).read_text(encoding="utf-8").splitlines()
    delta = [line[0] for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert delta == ["-", "+"]


def test_a_new_metric_adds_a_line(tmp_path: Path) -> None:
    one = save(study_result(point({}, seconds=[1.0, 2.0])), "one", tmp_path).read_text()
    both = study_result(point({}, seconds=[1.0, 2.0], requests_per_second=[1.0, 2.0]))
    two = save(both, "two", tmp_path).read_text()
    assert len(two.splitlines()) == len(one.splitlines()) + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "interrupted"}, "the run is interrupted"),
        ({"status": "running"}, "the run is running"),
        ({"experiments": ["completed", "failed", "failed"]}, "experiments failed: 2"),
        ({"experiments": ["completed", "deselected", "pending"]}, "experiments not run: 2"),
        ({"measurement_protocol": {"n_cycles": 5}}, "precision=bf16 has fewer cycles than 5"),
    ],
)
def test_partial_run_is_saved_only_if_asked(
    tmp_path: Path, result: StudyResult, changes: dict[str, Any], message: str
) -> None:
    if statuses := changes.get("experiments"):
        changes = {"experiments": [_entry(number, status) for number, status in enumerate(statuses)]}
    result = result.model_copy(update=changes)
    assert missing_results(result) == message
    with pytest.raises(BaselineError, match=f"^{message}: a baseline needs the results of a whole run$"):
        save(result, "main", tmp_path)
    assert not (tmp_path / ".llem").exists()
    assert load("main", tmp_path).points if save(result, "main", tmp_path, partial=True) else None


def test_skipped_experiments_are_not_missing(result: StudyResult) -> None:
    result.experiments = [_entry(1, "completed"), _entry(2, "skipped")]
    assert missing_results(result) is None


def test_points_without_a_result_are_left_out(tmp_path: Path, result: StudyResult) -> None:
    result.points.append(point({"precision": "fp16"}))
    save(result, "main", tmp_path, partial=True)
    assert [one.id for one in load("main", tmp_path).points] == ["precision=bf16", "precision=fp32"]
    with pytest.raises(BaselineError, match="there is no result to save"):
        save(study_result(point({})), "empty", tmp_path)


def test_gated_metric_without_a_value_is_not_saved(tmp_path: Path) -> None:
    metrics: dict[str, Any] = {"seconds": [1.0, 1.0], "ttft_p50_ms": summary("ttft_p50_ms", [], reason="no times")}
    result = study_result(point({"n": 1}, **metrics))
    result.measurement_protocol["gates"] = {"metrics": ["ttft_p50_ms"]}
    with pytest.raises(BaselineError, match=r"^ttft_p50_ms of n=1, which .* names, has no value: no times$"):
        save(result, "main", tmp_path)
    assert save(result, "main", tmp_path, force=True).exists()
    result.points[0].cycles = []
    result.points.append(point({"n": 2}, ttft_p50_ms=[1.0, 1.0]))
    assert save(result, "main", tmp_path, partial=True).exists()
    result = study_result(point({"n": 1}, **metrics))
    result.measurement_protocol["gates"] = {"metrics": None}
    assert save(result, "main", tmp_path).exists()


def _entry(number: Any, status: Any) -> Any:
    error = (
        ErrorRecord(kind="crash", type="Killed", message="gone", traceback="secret")
        if status == "failed"
        else None
    )
    return ManifestEntry(
        experiment_id=f"e{number}", config_hash="0", config_summary="", cycle=1, status=status, error=error
    )


def test_tracebacks_are_not_saved(tmp_path: Path, result: StudyResult) -> None:
    result.experiments = [_entry(1, "failed")]
    assert "secret" not in save(result, "main", tmp_path, partial=True).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["", "..", "a/b", "/a", "a\\b", "a\nb", "."])
def test_invalid_names_are_refused(tmp_path: Path, result: StudyResult, name: str) -> None:
    with pytest.raises(BaselineError, match="the name of a baseline must be one without path separators"):
        save(result, name, tmp_path)
    assert not any(tmp_path.iterdir())


def test_names_and_paths_are_resolved(
    tmp_path: Path, result: StudyResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = save(result, "main", tmp_path)
    (tmp_path / "main").mkdir()
    (tmp_path / "other").mkdir()
    assert resolve("main", tmp_path) == file.parent, "a baseline, before a folder of that name"
    assert [str(resolve(given, tmp_path)) for given in ("./main", "other")] == ["main", "other"]
    assert load(str(file), tmp_path, "made-up") == load(str(file.parent), tmp_path, "made-up")


def test_results_directory_is_loaded(tmp_path: Path, result: StudyResult) -> None:
    (tmp_path / "study_result.json").write_text(result.model_dump_json())
    assert load(str(tmp_path), tmp_path, "made-up") == result
    assert load(str(tmp_path / "study_result.json"), tmp_path) == result


def _refused(given: Any, root: Any, study: Any = None) -> Any:
    with pytest.raises(BaselineError) as raised:
        load(given, root, study)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_missing_baseline_is_reported_with_suggestions(tmp_path: Path, result: StudyResult) -> None:
    missing = "no such baseline, file or folder"
    assert _refused("main", tmp_path) == f"main: {missing}; there are no baselines in .llem/baselines"
    save(result, "main", tmp_path)
    save(result, "nightly", tmp_path)
    assert _refused("mian", tmp_path) == f"mian: {missing} (did you mean 'main'?); baselines: main, nightly"
    assert _refused("no/where", tmp_path) == "no/where: no such file or folder"
    assert _refused("nowhere.json", tmp_path) == "nowhere.json: no such file or folder"
    assert _refused("", tmp_path) == "'': no such file or folder"
    folder = tmp_path / ".llem/baselines/main"
    assert _refused("main", tmp_path, "made-op") == (
        f"{folder}: holds no results of the study 'made-op' (did you mean 'made-up'?); there are: made-up"
    )


def test_baseline_of_another_study_is_refused(tmp_path: Path, result: StudyResult) -> None:
    file = save(result, "main", tmp_path)
    assert (
        _refused(str(file), tmp_path, "other") == f"{file}: holds results of the study 'made-up', not of 'other'"
    )


def test_unreadable_baseline_is_refused(tmp_path: Path, result: StudyResult) -> None:
    file = save(result, "main", tmp_path)
    data = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(data | {"schema_version": "3.0"}))
    assert (
        _refused("main", tmp_path, "made-up")
        == f"{file}: schema version 3.0 cannot be read (this pytest-llem has schema 2.0)"
    )
    file.write_text("{}")
    assert _refused("main", tmp_path).startswith(f"{file}: not a StudyResult: ")
    file.unlink()
    assert _refused("main", tmp_path) == f"{file.parent}: holds no results"
    file.mkdir()
    assert _refused("main", tmp_path).startswith(f"{file}: ")


def test_name_too_long_for_a_file_is_refused(tmp_path: Path) -> None:
    assert _refused("a" * 300, tmp_path).endswith(": File name too long")


@pytest.mark.parametrize("name", ["a\n::error::b", "\x1b[31m", "é"])
def test_invalid_point_ids_are_refused(tmp_path: Path, result: StudyResult, name: str) -> None:
    result.points[1].id = name
    file = save(result, "main", tmp_path)
    assert _refused("main", tmp_path) == f"{file}: invalid point id {name!a}: it must be printable ASCII"


def test_two_points_with_the_same_axes_are_refused(tmp_path: Path, result: StudyResult) -> None:
    result.points[1].axes = {"precision": "bf16"}
    file = save(result, "main", tmp_path)
    assert _refused("main", tmp_path) == f"{file}: precision=bf16 and precision=fp32 have the same axes"


def test_ambiguous_baseline_is_refused(tmp_path: Path, result: StudyResult) -> None:
    save(result, "main", tmp_path)
    assert load("main", tmp_path) == load("main", tmp_path, "made-up")
    folder = save(result.model_copy(update={"name": "second"}), "main", tmp_path).parent
    assert _refused("main", tmp_path) == f"{folder}: holds several results: name one of them: made-up, second"
    assert load("main", tmp_path, "second").name == "second"
