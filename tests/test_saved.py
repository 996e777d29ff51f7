"""Baselines: finding by name or path, saving with readable differences, and loading."""

from __future__ import annotations

import difflib
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import StudyResult
from pytest_llem.gates.baselines import BaselineError, load, resolve
from pytest_llem.gates.saving import WIDTH, missing_results, save
from pytest_llem.results.manifest_records import ErrorRecord, ManifestEntry
from pytest_llem.times import now
from tests.support.study_results import H100, H100_KEY, point, study_result, summary


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
    assert file == tmp_path / "main" / H100_KEY / "made-up.json"
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
    assert not any(tmp_path.iterdir())
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
    folder = tmp_path / "saved"
    file = save(result, "main", folder)
    (tmp_path / "main").mkdir()
    (tmp_path / "other").mkdir()
    assert resolve("main", folder) == file.parent.parent, "a baseline, before a folder of that name"
    assert [str(resolve(given, folder)) for given in ("./main", "other")] == ["main", "other"]
    assert load(str(file), folder, "made-up") == load(str(file.parent), folder, "made-up")


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
    assert _refused("main", tmp_path) == f"main: {missing}; there are no baselines in {tmp_path}"
    save(result, "main", tmp_path)
    save(result, "nightly", tmp_path)
    assert _refused("mian", tmp_path) == f"mian: {missing} (did you mean 'main'?); baselines: main, nightly"
    assert _refused("no/where", tmp_path) == "no/where: no such file or folder"
    assert _refused("nowhere.json", tmp_path) == "nowhere.json: no such file or folder"
    assert _refused("", tmp_path) == "'': no such file or folder"
    folder = tmp_path / "main"
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
    assert _refused("main", tmp_path) == f"{file.parent.parent}: holds no results"
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
    folder = save(result.model_copy(update={"name": "second"}), "main", tmp_path).parent.parent
    assert _refused("main", tmp_path) == f"{folder}: holds several results: give one of them: made-up, second"
    assert load("main", tmp_path, "second").name == "second"


A100 = H100 | {"gpu": "2 × NVIDIA A100-SXM4-80GB", "power_limit": "400 W", "host_cpu": "AMD EPYC 7742"}
A100_KEY = "nvidia-a100-sxm4-80gb_400-w_amd-epyc-7742"


def _on(testbed: dict[str, Any], seconds: float = 1.0, **fields: Any) -> StudyResult:
    return study_result(point({"n": 1}, seconds=[seconds, seconds], testbed=testbed), **fields)


def test_baselines_of_testbeds_are_kept_apart(tmp_path: Path) -> None:
    save(_on(H100), "main", tmp_path)
    assert save(_on(A100, 2.0), "main", tmp_path).parent.name == A100_KEY
    assert load("main", tmp_path, "made-up", testbeds=[A100_KEY]).points[0].metrics["seconds"].mean == 2
    assert load("main", tmp_path, testbeds=["nothing", H100_KEY]).points[0].metrics["seconds"].mean == 1
    assert _refused("main", tmp_path).startswith(
        f"{tmp_path / 'main'}: holds results of 'made-up' on several testbeds: give one of them: "
    )


def test_baseline_of_no_fitting_testbed_is_refused(tmp_path: Path) -> None:
    save(_on(H100), "main", tmp_path)
    save(_on(A100), "main", tmp_path)
    with pytest.raises(BaselineError) as raised:
        load("main", tmp_path, "made-up", testbeds=["nvidia-l4_72-w_amd"], only_fitting=True)
    assert str(raised.value) == (
        f"main: no baseline of 'made-up' fits this testbed (nvidia-l4_72-w_amd); there are: {A100_KEY}, {H100_KEY}"
    )


def test_baseline_of_earlier_version_is_used_and_replaced(tmp_path: Path) -> None:
    old = tmp_path / "main" / "made-up.json"
    old.parent.mkdir()
    old.write_text(_on(H100).model_dump_json())
    assert load("main", tmp_path, "made-up", testbeds=["any"]).points[0].metrics["seconds"].mean == 1
    save(_on(A100), "main", tmp_path)
    assert old.exists(), "it is of another testbed"
    save(_on(H100, 3.0), "main", tmp_path)
    assert not old.exists()


def test_corrupt_baseline_of_another_testbed_does_no_harm(tmp_path: Path) -> None:
    save(_on(H100), "main", tmp_path).write_text("<<<<<<< HEAD")
    save(_on(A100), "main", tmp_path)
    assert load("main", tmp_path, "made-up", testbeds=[A100_KEY]).points


@pytest.mark.parametrize(
    ("started", "problem"),
    [
        ("2026-01-01T00:00:00.000Z", "measured on 2026-01-01, "),
        (None, "it is not known when it was measured, and at most 7 days are allowed"),
        ("yesterday", "it is not known when it was measured, and at most 7 days are allowed"),
        pytest.param(now(), None, id="now"),  # workers of xdist need equal ids
    ],
)
def test_old_baseline_is_refused(tmp_path: Path, started: str | None, problem: str | None) -> None:
    file = save(_on(H100, started_at=started), "main", tmp_path)
    assert load("main", tmp_path).started_at == started
    if problem is None:
        assert load("main", tmp_path, max_age=7 * 86400)
    else:
        with pytest.raises(BaselineError, match=re.escape(f"{file}: {problem}")):
            load("main", tmp_path, max_age=7 * 86400)


def test_age_of_a_baseline_is_in_the_unit_of_its_limit(tmp_path: Path) -> None:
    started = (datetime.now(UTC) - timedelta(hours=20)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    save(_on(H100, started_at=started), "main", tmp_path)
    with pytest.raises(BaselineError, match=", 20 hours ago, and at most 12 hours are allowed"):
        load("main", tmp_path, max_age=12 * 3600)
