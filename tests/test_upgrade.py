"""Results of schema 1.x are converted to 2.0 without loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import ExperimentResult, StudyResult
from pytest_llem.catalogue import CATALOGUE
from pytest_llem.results.document import SCHEMA_VERSION, RecordFile, upgrade
from pytest_llem.results.manifest import read_manifest

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = ["1.0", "1.4"]

#: What 2.0 calls otherwise.
FORMER = {"bench", "subject", "baseline", "idle_context_w", "idle_bare_w", "times_floor", "compared_anyway"}


def keys(value: Any) -> set[str]:
    """Return every key of a document except those of configurations, which users choose."""
    if isinstance(value, list):
        return set[str]().union(*map(keys, value))
    if not isinstance(value, dict):
        return set()
    named = {"config", "effective_config", "axes", "environment"}
    return {*value}.union(*(keys(item) for key, item in value.items() if key not in named))


def experiment(version: str) -> Path:
    return next((GOLDEN / version / "experiments").glob("*-c1.json"))


@pytest.mark.parametrize("version", VERSIONS)
def test_documents_of_older_schemas_are_read_as_of_this_one(version: str) -> None:
    folder = GOLDEN / version
    assert FORMER & keys(json.loads((folder / "study_result.json").read_text()))
    documents: list[RecordFile] = [
        StudyResult.load(folder),
        ExperimentResult.read(experiment(version)),
        ExperimentResult.model_validate_json(experiment(version).read_text()),
        read_manifest(folder),
    ]
    for document in documents:
        assert document.schema_version == SCHEMA_VERSION
        assert not FORMER & keys(document.model_dump(mode="json"))
        again = type(document).model_validate_json(document.model_dump_json())
        assert again == document, "an upgraded document is one of this schema"


def test_every_metric_of_1_4_is_one_of_2_0_with_its_value() -> None:
    former = json.loads(experiment("1.4").read_text())["metrics"]
    found = ExperimentResult.read(experiment("1.4")).metrics
    assert found.keys() <= CATALOGUE.keys()
    assert [one["value"] for one in former.values()] == [one.value for one in found.values()]
    assert found["idle_power_w"].value == 61.5


def test_idle_power_of_1_4_keeps_its_figures() -> None:
    idle = ExperimentResult.read(experiment("1.4")).idle_power
    assert idle is not None
    assert (idle.idle_power_w, idle.idle_power_no_context_w) == (61.5, {"GPU-1": 55.0})
    assert (idle.no_context_method, idle.no_context_age_seconds) == ("sampled", 12.5)


def test_facts_and_verdicts_of_1_4_keep_their_values() -> None:
    former = json.loads((GOLDEN / "1.4" / "study_result.json").read_text())
    found = StudyResult.load(GOLDEN / "1.4")
    for point, then in zip(found.points, former["points"], strict=True):
        assert (point.testbed, point.sut) == (then["bench"], then["subject"])
        assert [one.id for one in point.verdicts] == [one["id"] for one in then["verdicts"]]
    assert found.comparison is not None
    assert found.comparison.family == former["comparison"]["family"]


def test_metric_of_a_former_verdict_has_its_present_name() -> None:
    verdict = {"gate": "budget", "id": "idle_context_w-p=1", "metric": "idle_context_w"}
    found = upgrade({"schema_version": "1.4", "points": [{"verdicts": [verdict]}]})
    assert found["points"][0]["verdicts"][0]["metric"] == "idle_power_w"


def test_names_chosen_by_users_are_kept() -> None:
    config = {"axes": {"bench": 1}, "effective_config": {"baseline": {"enabled": True}, "subject": "x"}}
    assert upgrade({"schema_version": "1.4", **config}) == {"schema_version": "2.0", **config}


def test_sentences_of_1_0_are_unclassified_warnings(tmp_path: Path) -> None:
    former = json.loads((GOLDEN / "1.0" / "study_result.json").read_text())
    (tmp_path / "study_result.json").write_text(json.dumps(former | {"warnings": ["clocks were held down"]}))
    (warning,) = StudyResult.load(tmp_path).warnings
    assert (warning.code, warning.severity, str(warning)) == ("unclassified", "warning", "clocks were held down")


def test_energy_of_1_0_covers_the_engine_by_its_facts() -> None:
    point = {"bench": {"cpu": "X"}, "metrics": {"energy_j": {"boundary": "cpu_package+dram"}}}
    on_gpu = {"bench": {"gpus": ["X"]}, "metrics": {"energy_j": {"boundary": "cpu_package"}}}
    found = upgrade({"schema_version": "1.0", "points": [point, on_gpu]})["points"]
    assert [one["metrics"]["energy_j"]["covers_engine"] for one in found] == [True, False]


@pytest.mark.parametrize("version", ["0.9", "3.0"])
def test_other_major_versions_are_refused(version: str, tmp_path: Path) -> None:
    former = json.loads((GOLDEN / "1.4" / "study_result.json").read_text())
    (tmp_path / "study_result.json").write_text(json.dumps(former | {"schema_version": version}))
    with pytest.raises(ValueError, match=f"schema version {version} cannot be read"):
        StudyResult.load(tmp_path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("points", 5),
        ("points.0", []),
        ("points.0.bench", 5),
        ("points.0.metrics", -1),
        ("points.0.metrics.energy_j", None),
        ("points.0.metrics.energy_j.boundary", 5),
        ("points.0.verdicts.0.metric", []),
    ],
)
def test_value_of_a_wrong_type_is_named(tmp_path: Path, place: str, value: Any) -> None:
    former = json.loads((GOLDEN / "1.4" / "study_result.json").read_text())
    *parents, last = [int(key) if key.isdigit() else key for key in place.split(".")]
    section = former
    for key in parents:
        section = section[key]
    section[last] = value
    (tmp_path / "study_result.json").write_text(json.dumps(former))
    with pytest.raises(ValueError, match=f"not a StudyResult: {place.replace('bench', 'testbed')}: "):
        StudyResult.load(tmp_path)


def test_llem_compares_two_results_of_1_4(tmp_path: Path) -> None:
    former = json.loads((GOLDEN / "1.4" / "study_result.json").read_text())
    for point in former["points"]:
        point["result_digests"] = []
    other = tmp_path / "study_result.json"
    other.write_text(json.dumps(former | {"experiments": [], "started_at": "2026-01-01T00:00:00Z"}))
    command = [sys.executable, "-m", "pytest_llem.cli", "compare", str(other), str(GOLDEN / "1.4")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "6 INCONCLUSIVE" in done.stdout or "6 SAME" in done.stdout, done.stderr
