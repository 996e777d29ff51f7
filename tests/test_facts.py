"""Testbed facts, system-under-test facts, and concurrent experiments of a point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pytest_llem import ExperimentResult, StudyResult
from pytest_llem.results import facts, study_result
from pytest_llem.results.facts import flat, overlapping, sut_facts
from pytest_llem.results.manifest import ManifestWriter
from pytest_llem.results.manifest_records import ErrorRecord, Manifest, ManifestEntry

GOLDEN = Path(__file__).parent / "golden" / "1.0"

GPU = {
    "uuid": "GPU-1",
    "name": "NVIDIA H100",
    "driver": "580.1",
    "power_limit_w": 700.0,
    "mig_mode": False,
    "sm_clock_mhz": 1980,
}


def _result(**changes: Any) -> Any:
    """Return the golden experiment's result with *changes*, whose dotted keys use ``__``."""
    data = json.loads(min(GOLDEN.glob("experiments/*.json")).read_text())
    for key, value in changes.items():
        *parts, last = key.split("__")
        section = data
        for part in parts:
            section = section[part]
        section[last] = value
    return ExperimentResult.model_validate(data)


def _on_gpus(*gpus: Any, **changes: Any) -> Any:
    return _result(environment__gpus=list(gpus), engine__device="cuda", **changes)


def test_testbed_facts_on_a_cpu() -> None:
    assert facts.testbed_facts([_result(tokens__dataset_hash="ab", environment__cpu_governor="performance")]) == {
        "cpu": "A processor",
        "cpus": 2,
        "energy_boundary": "cpu_package",
        "energy_method": "estimated",
        "energy_source": "cpu_time_model",
        "length_mode": "fixed",
        "dataset_hash": "ab",
        "cpu_governor": "performance",
    }


def test_start_method_is_a_testbed_fact_on_cpus_only() -> None:
    start = {"method": "spawn", "began_at": "2026-11-25T23:00:00.000Z", "ready_at": "2026-11-25T23:00:03.000Z"}
    forked = _result(start=start | {"method": "forkserver"})
    assert facts.testbed_facts([_result(start=start)])["start_method"] == "spawn"
    assert facts.testbed_facts([_result(start=start), forked])["start_method"] == ["spawn", "forkserver"]
    assert "start_method" not in facts.testbed_facts([_on_gpus(GPU, start=start)])


def test_testbed_facts_on_a_gpu() -> None:
    found = facts.testbed_facts([_on_gpus(GPU)])
    assert found["gpu"] == "NVIDIA H100"
    assert (found["power_limit"], found["driver"], found["gpu_uuids"]) == ("700 W", "580.1", "GPU-1")
    assert found["host_cpu"] == "A processor"
    assert not {"cpu", "cpus", "mig"} & set(found)


def test_testbed_facts_on_several_gpus() -> None:
    other = GPU | {"uuid": "GPU-0", "power_limit_w": 500.0, "mig_mode": True}
    found = facts.testbed_facts([_on_gpus(GPU, other)])
    assert (found["gpu"], found["gpu_uuids"]) == ("2 × NVIDIA H100", "GPU-0, GPU-1")
    assert (found["power_limit"], found["mig"], found["driver"]) == ("500 W, 700 W", "on", "580.1")


def test_gpu_unknown_to_nvml_is_named_by_the_engine() -> None:
    found = facts.testbed_facts(
        [_on_gpus({"uuid": "GPU-1", "nvml": "no library"}, engine__device_names=["NVIDIA T4"])]
    )
    assert found["gpu"] == "NVIDIA T4"
    assert "power_limit" not in found


def test_missing_energy_is_not_a_fact() -> None:
    found = facts.testbed_facts([_result(metrics__energy_j={"value": None, "unit": "J", "method": "unavailable"})])
    assert not {"energy_method", "energy_boundary"} & set(found)


def test_facts_that_differ_between_cycles_are_listed() -> None:
    found = facts.testbed_facts([_on_gpus(GPU), _on_gpus(GPU | {"uuid": "GPU-2"}), _on_gpus(GPU)])
    assert found["gpu_uuids"] == ["GPU-1", "GPU-2"]
    assert found["gpu"] == "NVIDIA H100"


def test_ticks_are_those_of_the_shortest_window() -> None:
    cycles = [_result(window__quantisation_error=share) for share in (1 / 100, 1 / 16, None)]
    assert facts.testbed_facts(cycles)["energy_ticks"] == 16
    split = _result(prefill_window={"passes": 1, "window_seconds": 1.0, "quantisation_error": 0.1})
    assert facts.testbed_facts([split])["prefill_ticks"] == 10
    assert "energy_ticks" not in facts.testbed_facts([split])


def test_facts_of_the_system_under_test() -> None:
    found = sut_facts(
        [
            _result(
                engine__versions={"vllm": "0.9", "torch": "2.13.0+cu130"},
                engine__model_revision="abc",
                engine__settings={"dtype": "bf16", "generation": {"top_k": 50, "seed": None}},
                environment__variables={"OMP_NUM_THREADS": "4"},
                environment__git={"commit": "f" * 40, "dirty": True},
            )
        ]
    )
    assert {key: found[key] for key in ("python", "vllm", "torch", "pytest-llem", "precision")} == {
        "python": "3.11.7",
        "vllm": "0.9",
        "torch": "2.13.0+cu130",  # the engine knows better than the host
        "pytest-llem": "0.1.0",
        "precision": "bf16",
    }
    assert found["settings.generation.top_k"] == 50
    assert found["variables.OMP_NUM_THREADS"] == "4"
    assert (found["model_revision"], found["commit"], found["uncommitted_changes"]) == ("abc", "f" * 40, True)
    assert not {"settings.generation.seed", "model_fingerprint", "random_weights"} & set(found)


def test_nested_settings_are_flattened() -> None:
    assert flat({"a": {"b": {"c": 1}, "d": [1, {"x": 2}]}, "e": None, "f": {}, "g": False}) == {
        "a.b.c": 1,
        "a.d": [1, {"x": 2}],
        "g": False,
    }


MOMENTS = st.integers(0, 30)


@given(st.lists(st.tuples(MOMENTS, MOMENTS).map(sorted).filter(lambda span: span[0] < span[1]), max_size=12))
def test_overlapping_finds_every_overlapping_pair(spans: Any) -> None:
    texts = [(f"2026-11-23T20:55:{begun:02}.000Z", f"2026-11-23T20:55:{ended:02}.000Z") for begun, ended in spans]
    assert overlapping(texts) == [
        any(one != at and begin < ended and end > begun for one, (begin, end) in enumerate(spans))
        for at, (begun, ended) in enumerate(spans)
    ]


def _time(seconds: Any) -> Any:
    return f"2026-11-23T20:00:{seconds:02}.000Z"


def _built(tmp_path: Path, spans: Any, failed: Any = ()) -> Any:
    """Return the StudyResult of experiments given as (point, cycle, start, end)."""
    given = json.loads(min(GOLDEN.glob("experiments/*.json")).read_text())
    places = [(point, cycle) for point, cycle, *_ in [*spans, *failed]]
    entries = [
        ManifestEntry(experiment_id=f"{point}-{cycle}", config_hash=point, config_summary=point, cycle=cycle)
        for point, cycle in places
    ]
    manifest = Manifest(
        study_name="s",
        study_design_hash="0" * 16,
        pytest_llem_version="0",
        started_at=_time(0),
        total_experiments=len(entries),
        experiments=entries,
    )
    writer = ManifestWriter(tmp_path, manifest)
    for point, cycle, began, ended, *host in spans:
        name = f"{point}-{cycle}"
        identity = {"experiment_id": name, "config_hash": point, "cycle": cycle}
        times = {"started_at": _time(began), "completed_at": _time(ended)}
        environment = given["environment"] | ({"host_id": host[0]} if host else {})
        facts = {"identity": identity, "environment": environment}
        writer.completed(name, json.dumps(given | facts | times), {})
    for point, cycle, began, ended in failed:
        writer.failed(f"{point}-{cycle}", ErrorRecord(kind="crash", type="Killed", message="gone"))
        entry = writer.entry(f"{point}-{cycle}")
        entry.started_at, entry.completed_at = _time(began), _time(ended)
    writer.finish("completed")
    design = StudyResult.load(GOLDEN)
    (one,) = design.points[:1]
    ids = dict.fromkeys(point for point, _ in places)
    design.points = [
        one.model_copy(update={"id": point, "config_hash": point, "testbed": {}, "metrics": {}}) for point in ids
    ]
    built = study_result.build_study_result(design, writer.manifest, tmp_path)
    return {point.id: point for point in built.points}


@pytest.mark.parametrize(
    ("spans", "failed", "concurrent"),
    [
        ([("a", 1, 0, 5), ("b", 1, 5, 9), ("a", 2, 10, 12)], [], {"a": False, "b": False}),
        ([("a", 1, 0, 5), ("b", 1, 4, 9), ("c", 1, 10, 12)], [], {"a": True, "b": True, "c": False}),
        ([("a", 1, 0, 2), ("a", 2, 3, 5), ("b", 1, 4, 9)], [], {"a": True, "b": True}),
        ([("a", 1, 0, 5), ("b", 1, 6, 9)], [("c", 1, 1, 2)], {"a": True, "b": False, "c": None}),
        ([("a", 1, 0, 5, "one"), ("b", 1, 4, 9, "two")], [], {"a": False, "b": False}),
        ([("a", 1, 0, 5, "one"), ("b", 1, 4, 9, "one"), ("b", 2, 0, 9, "two")], [], {"a": True, "b": True}),
    ],
    ids=[
        "one after the other",
        "side by side",
        "one cycle of two",
        "beside one that failed",
        "on two hosts",
        "on one of two hosts",
    ],
)
def test_concurrent_experiments_are_a_fact(
    tmp_path: Path, spans: list[Any], failed: list[Any], concurrent: dict[str, Any]
) -> None:
    points = _built(tmp_path, spans, failed)
    assert {name: point.testbed.get("concurrent") for name, point in points.items()} == concurrent


def test_facts_are_in_the_study_result(tmp_path: Path) -> None:
    point = _built(tmp_path, [("a", 1, 0, 1), ("a", 2, 2, 3)])["a"]
    assert point.testbed["cpu"] == "A processor"
    assert point.sut["torch"] == "2.13.0+cpu"
    assert point.cycles == [1, 2]


def test_a_point_without_a_result_has_no_facts(tmp_path: Path) -> None:
    point = _built(tmp_path, [("a", 1, 0, 1)], [("b", 1, 2, 3)])["b"]
    assert (point.testbed, point.sut, point.cycles) == ({}, {}, [])
