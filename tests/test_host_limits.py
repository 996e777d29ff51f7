"""Limits of a process are in its result, must match in comparisons, and count in preflight."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from pytest_llem.gates.regression import compare
from pytest_llem.hardware.environment import environment, layout, ranges
from pytest_llem.planning import host, preflight
from pytest_llem.results import facts
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.gates import GatesConfig
from pytest_llem.study.loading import load_study

GOLDEN = Path(__file__).parent / "golden" / "1.0"

UNLIMITED = {
    "cpu_limit": None,
    "memory_limit_mb": None,
    "nice": 0,
    "scheduling_policy": "other",
    "cpu_affinity": "0-1",
    "cpu_layout": "2 CPUs on 2 cores",
}


def _facts(device: str = "cpu", **changes: Any) -> dict[str, Any]:
    """Return the testbed facts of the golden experiment with the given limits."""
    data = json.loads(min(GOLDEN.glob("experiments/*.json")).read_text())
    data["environment"] |= UNLIMITED | changes
    data["engine"]["device"] = device
    return facts.testbed_facts([ExperimentResult.model_validate(data)])


def _study(**changes: Any) -> StudyResult:
    study = StudyResult.load(GOLDEN)
    for point in study.points:
        point.cycles = [1, 2, 3]
        point.testbed = _facts(**changes)
        for summary in point.metrics.values():
            summary.values = [1.0, 1.001, 1.002] if summary.n else []
    return study


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"cpu_limit": 0.3}, "CPU time limit: 0.3 CPUs in the candidate, none in the reference"),
        ({"nice": 10}, "scheduling priority: nice 10 in the candidate, nice 0 in the reference"),
        (
            {"scheduling_policy": "idle"},
            "scheduling priority: nice 0, idle in the candidate, nice 0 in the reference",
        ),
        ({"memory_limit_mb": 2_000}, "memory limit: 2,000 MB in the candidate, none in the reference"),
        (
            {"cpu_layout": "2 CPUs on 1 core"},
            "cores of these CPUs: 2 CPUs on 1 core in the candidate, 2 CPUs on 2 cores in *",
        ),
    ],
    ids=["CPU quota", "niceness", "scheduling policy", "memory limit", "siblings of one core"],
)
def test_results_under_other_limits_are_not_compared(changes: dict[str, Any], difference: str) -> None:
    comparison = compare(_study(**changes), _study(), GatesConfig(), name="main")
    assert len(comparison.record.testbed) == 1
    assert comparison.record.testbed[0].startswith(difference.removesuffix("*"))
    judged = [one for one in comparison.verdicts if one.verdict != "NOT JUDGED"]
    assert not judged
    assert any("cannot be compared" in (one.reason or "") for one in comparison.verdicts)


def test_results_under_the_same_limits_are_compared() -> None:
    comparison = compare(
        _study(cpu_limit=0.5, cpu_affinity="0-1"),
        _study(cpu_limit=0.5, cpu_affinity="2-3"),
        GatesConfig(),
        name="main",
    )
    assert comparison.record.testbed == []
    assert any(one.verdict == "SAME" for one in comparison.verdicts)


def test_limits_that_only_one_result_records_are_a_warning() -> None:
    older = _study()
    for point in older.points:
        point.testbed = facts.testbed_facts(
            [ExperimentResult.model_validate_json(min(GOLDEN.glob("experiments/*.json")).read_text())]
        )
    record = compare(_study(cpu_limit=0.3), older, GatesConfig(), name="main").record
    assert record.testbed == []
    assert any(
        "CPU time limit: 0.3 CPUs in the candidate, unknown in the reference" in one for one in record.warnings
    )


def test_limits_count_beside_a_gpu_too() -> None:
    found = _facts(device="cuda", cpu_limit=1.5)
    assert (found["cpu_limit"], found["priority"], found["memory_limit"]) == ("1.5 CPUs", "nice 0", "none")


def test_a_result_has_the_limits_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytest_llem.hardware.environment.cpu_limit", lambda: 0.3)
    monkeypatch.setattr("pytest_llem.hardware.environment.memory_limit_bytes", lambda: 500_000_000)
    found = environment([])
    assert (found["cpu_limit"], found["memory_limit_mb"]) == (0.3, 500)
    assert found["nice"] == os.getpriority(os.PRIO_PROCESS, 0)
    assert found["scheduling_policy"] == "other"
    allowed = found["cpu_affinity"].replace("-", ",").split(",")
    assert {int(allowed[0]), int(allowed[-1])} <= os.sched_getaffinity(0)


def test_cpus_are_listed_as_the_kernel_does() -> None:
    assert ranges({0, 1, 2, 3, 8, 10, 11}) == "0-3,8,10-11"
    assert ranges(set()) == ""


def _cpus(root: Path, cores: list[tuple[int, int, int]]) -> Path:
    """Describe CPUs like sysfs: package, core and maximum clock in MHz of each."""
    for number, (package, core, mhz) in enumerate(cores):
        for name, value in (
            ("topology/physical_package_id", package),
            ("topology/core_id", core),
            ("cpufreq/cpuinfo_max_freq", mhz * 1000),
        ):
            file = root / f"cpu{number}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{value}\n")
    return root


def test_layout_distinguishes_siblings_packages_and_slower_cores(tmp_path: Path) -> None:
    root = _cpus(tmp_path, [(0, 0, 5200), (0, 0, 5200), (0, 1, 5000), (1, 0, 5200), (1, 8, 3900), (1, 9, 3900)])
    assert layout({0, 1}, root) == "2 CPUs on 1 core"
    assert layout({0, 2}, root) == "2 CPUs on 2 cores"
    assert layout({0, 3}, root) == "2 CPUs on 2 cores of 2 packages"
    assert layout({3, 4, 5}, root) == "3 CPUs on 3 cores, 2 of them slow"
    assert layout({7}, root) is None


def _reasons(folder: Path, study: str) -> list[str | None]:
    path = folder / "study.yaml"
    path.write_text(study)
    loaded = load_study(path)
    found = preflight.Preflight(loaded, (), [folder], host.host_for(None))
    return [found.refusal(point) for point in loaded.points]


def test_preflight_refuses_experiment_beyond_the_memory_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = "model: builtin:tiny-llama\nn: 64\nsweep: {pytorch.batch_size: [1, 64]}\nmax_input_tokens: 3968"
    monkeypatch.setattr(host, "memory_limit_bytes", lambda: 700_000_000)
    monkeypatch.setattr(host, "host_for", host.host_for.__wrapped__)
    fits, refused = _reasons(tmp_path, study)
    assert fits is None
    assert refused is not None
    assert refused.startswith("model 'builtin:tiny-llama' needs about ")
    assert refused.endswith(
        "the memory limit here is 0.7 GiB: raise the limit of the container or of its control group"
    )
    monkeypatch.setattr(host, "memory_limit_bytes", lambda: 500_000_000)
    assert None not in _reasons(tmp_path, study)
    monkeypatch.setattr(host, "memory_limit_bytes", lambda: None)
    assert _reasons(tmp_path, study) == [None, None]
