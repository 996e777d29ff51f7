"""Energy that does not cover the engine's devices is shown but not judged."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llem import StudyResult
from pytest_llem.doctor.findings import findings
from pytest_llem.doctor.records import (
    Cpu,
    Driver,
    EnergyAccess,
    Examination,
    Package,
    Rapl,
    Software,
    Surroundings,
)
from pytest_llem.energy.account import Account, Total
from pytest_llem.energy.metering import EnergyReading
from pytest_llem.execution.energy_budget import EnergyBudget
from pytest_llem.gates.baselines import BaselineError, load
from pytest_llem.gates.budgets import judge_budget
from pytest_llem.gates.decisions import UndecidableError
from pytest_llem.gates.regression import compare
from pytest_llem.gates.saving import save
from pytest_llem.gates.sessions import session_effect
from pytest_llem.measurement.accounting import with_covers_engine
from pytest_llem.measurement.quality_warnings import energy_warnings
from pytest_llem.reporting.html.formatting import details
from pytest_llem.reporting.terminal.points import points_table
from pytest_llem.results.experiment import EngineRecord
from pytest_llem.results.metrics import metric
from pytest_llem.results.pareto import best
from pytest_llem.results.tabular import point_table
from pytest_llem.study.gates import Budget, GatesConfig
from tests.conftest import Results, WriteStudy
from tests.support.measured import pass_window, window_warnings
from tests.support.powercap import Powercap
from tests.support.study_results import H100, point, study_result, summary
from tests.support.warned import texts

METRIC = "energy_per_output_token_j"
STEADY = [1.000, 1.001, 0.999, 1.0005, 0.9995]
GPU = "GPU-aaaaaaaa-0000-0000-0000-000000000001"
OTHER = "GPU-bbbbbbbb-0000-0000-0000-000000000002"
CUDA, CPU = EngineRecord(name="e", device="cuda"), EngineRecord(name="e", device="cpu")
NAMED = {"precision": "bf16", "energy": {"backend": "rapl", "allow_estimated": False}}


@pytest.fixture
def rising_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU package that draws power while the test runs."""
    folder = Powercap(tmp_path / "powercap")
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(folder.root))
    counter = folder.zone("intel-rapl:0", "package-0")
    ended = threading.Event()

    def rise() -> None:
        energy_uj = 1_000_000
        while not ended.wait(0.005):
            energy_uj += 100_000
            fresh = counter.with_suffix(".new")  # a reader never finds it empty
            fresh.write_text(f"{energy_uj}\n")
            fresh.replace(counter)

    thread = threading.Thread(target=rise)
    thread.start()
    yield
    ended.set()
    thread.join()


@pytest.mark.parametrize(
    ("energy", "gates"),
    [
        pytest.param({"backend": "auto"}, {"passed": 1, "failed": 1}, id="auto"),
        pytest.param({"backend": "rapl"}, {"passed": 2}, id="named"),
    ],
)
def test_budget_on_cpu_energy_of_cuda_engine(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    results: Results,
    rising_package: None,
    energy: dict[str, str],
    gates: dict[str, int],
) -> None:
    """NVML fails and RAPL works: its energy is within any budget for a GPU."""
    write_study(
        noop={"gpu": GPU, "seconds": 0.05},
        energy=energy,
        baseline={"enabled": False},
        budgets={"energy_j": 1e6},
        sweep={"n": [2]},
        execution={"n_cycles": 1, "experiment_gap_seconds": 0},
    )
    done = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--llem-start-method=forkserver")
    done.assert_outcomes(**gates)
    [found] = StudyResult.load(results.directory).points
    assert found.metrics["energy_j"].mean is not None
    assert found.metrics["energy_j"].boundary == "cpu_package"
    assert found.metrics["energy_j"].covers_engine is False
    if energy == {"backend": "auto"}:
        [verdict] = found.verdicts
        assert verdict.verdict == "NOT JUDGED"
        assert verdict.reason == (
            "the energy covers cpu_package and not the devices that the engine ran on "
            "(name the meter in energy.backend if that is meant)"
        )


@pytest.mark.parametrize(
    ("engine", "gpus", "boundary", "devices", "covered"),
    [
        (CUDA, [GPU], "gpu_board", [GPU], True),
        (CUDA, [GPU], "gpu_board", [GPU, OTHER], True),
        (CUDA, [GPU, OTHER], "gpu_board", [GPU], False),
        (CUDA, [GPU], "cpu_package+dram", ["package-0", "dram-0"], False),
        (CUDA, [], "gpu_board", [GPU], None),
        (CPU, [], "cpu_package", ["package-0"], True),
        (CPU, [], "gpu_board", [GPU], False),
        (CPU, [], "wall", ["socket-1"], None),
        (CUDA, [GPU], "wall", ["socket-1"], None),
        (CPU, [GPU], "gpu_board", [GPU], False),
    ],
)
def test_metric_has_covers_engine(
    engine: EngineRecord, gpus: list[str], boundary: str, devices: list[str], covered: bool | None
) -> None:
    energy = metric("energy_j", 1.0, method="measured", boundary=boundary, devices=devices)
    absent = metric("cpu_energy_j", None, method="unavailable", reason="no meter")
    found = with_covers_engine(
        {"energy_j": energy, "cpu_energy_j": absent, "seconds": metric("seconds", 1.0)}, engine, gpus
    )
    assert found["energy_j"].covers_engine is covered
    assert found["energy_j"].devices == devices
    assert found["cpu_energy_j"].covers_engine is found["seconds"].covers_engine is None


def test_every_energy_of_invalid_counter_is_invalid() -> None:
    """Load energy and idle power are from the counter that the window has shown to be wrong."""
    board: dict[str, Any] = {"method": "measured", "boundary": "gpu_board", "devices": [GPU]}
    metrics = {
        "energy_j": metric("energy_j", 1.0, invalid="counter_disagrees", **board),
        "load_energy_j": metric("load_energy_j", 1.0, **board),
        "cpu_energy_j": metric("cpu_energy_j", 1.0, method="measured", boundary="cpu_package"),
    }
    found = with_covers_engine(metrics, CUDA, [GPU])
    assert [one.invalid for one in found.values()] == ["counter_disagrees", "counter_disagrees", None]


def test_uncovered_engine_is_warned_of_first() -> None:
    total = Total(1.0, "measured", "rapl_package", "cpu_package", devices=("package-0",))
    assert window_warnings(pass_window([[]], 1.0, Account((), total, 1.0)), CUDA, covers_engine=False)[0].text == (
        "the engine ran on cuda, and the energy covers cpu_package only"
    )


def test_estimate_of_foreign_meter_is_named_by_its_source() -> None:
    total = Total(1.0, "estimated", "codecarbon_tdp", "cpu_package")
    assert texts(energy_warnings(Account((), total, 1.0), {})) == [
        "energy is estimated by codecarbon_tdp, not measured"
    ]
    ours = Total(1.0, "estimated", "cpu_time_model", "cpu_package")
    assert texts(energy_warnings(Account((), ours, 1.0), {})) == [
        "energy is estimated from CPU time, not measured"
    ]


# ---- gates ----


def _study(name: str = METRIC, config: Any = None, factor: float = 1.0, **provenance: Any) -> StudyResult:
    values = [factor * value for value in STEADY]
    fields = {"config": config} if config else {}
    bench = {**H100, "energy_boundary": provenance.get("boundary", "gpu_board")}
    return study_result(point({"n": 1}, **{name: summary(name, values, **provenance)}, testbed=bench, **fields))


def _budget(study: StudyResult, name: str = METRIC) -> tuple[str, str | None]:
    [one] = study.points
    budget = Budget(id="b", metric=name, point=one.id, maximum=100.0, minimum=None, line=1)
    found = judge_budget(budget, one, file=None)
    return found.verdict, found.reason


def _compared(candidate: StudyResult, reference: StudyResult, **settings: Any) -> tuple[str, str, str | None]:
    found = compare(candidate, reference, GatesConfig(metrics=[METRIC]), name="main", **settings)
    [verdict] = found.verdicts
    return verdict.verdict, verdict.outcome, verdict.reason


CPU_JOULES: Any = {"boundary": "cpu_package", "covers_engine": False}


def test_uncovered_engine_is_not_judged() -> None:
    verdict, reason = _budget(_study(**CPU_JOULES))
    assert verdict == "NOT JUDGED"
    assert str(reason).startswith("the energy covers cpu_package and not the devices that the engine ran on")
    found = _compared(_study(**CPU_JOULES), _study(**CPU_JOULES))
    assert found == ("NOT JUDGED", "failed", reason)


def test_unknown_coverage_is_not_judged() -> None:
    verdict, reason = _budget(_study(covers_engine=None))
    assert verdict == "NOT JUDGED"
    assert str(reason).startswith("unknown whether the energy covers the devices that the engine ran on")


def test_named_boundary_is_judged() -> None:
    named = _study(config=NAMED, **CPU_JOULES)
    assert _budget(named) == ("WITHIN", None)
    assert _compared(named, _study(**CPU_JOULES))[:2] == ("SAME", "passed")
    assert _compared(_study(**CPU_JOULES), named)[0] == "NOT JUDGED", "the study that is judged names it"


def test_metric_that_names_its_boundary_is_judged() -> None:
    assert _budget(_study("cpu_energy_j", **CPU_JOULES), "cpu_energy_j") == ("WITHIN", None)


def test_saved_baseline_keeps_coverage(tmp_path: Path) -> None:
    with pytest.raises(BaselineError, match="not the devices that the engine ran on"):
        save(_study(**CPU_JOULES), "main", tmp_path)
    save(_study(**CPU_JOULES), "main", tmp_path, force=True)
    reference = load("main", tmp_path)
    assert reference.points[0].metrics[METRIC].covers_engine is False
    candidate = _study(boundary="cpu_package", covers_engine=True)
    verdict, outcome, _ = _compared(candidate, reference)
    assert (verdict, outcome) == ("NOT JUDGED", "failed")


@pytest.mark.parametrize(
    ("testbed", "boundary", "verdict"),
    [
        (H100, "gpu_board", "WITHIN"),
        (H100, "cpu_package", "NOT JUDGED"),
        ({"cpu": "Xeon", "cpus": 8}, "cpu_package+dram", "WITHIN"),
        ({"cpu": "Xeon", "cpus": 8}, "gpu_board", "NOT JUDGED"),
    ],
)
def test_coverage_of_older_schema_follows_from_its_facts(testbed: Any, boundary: str, verdict: str) -> None:
    document = _study(boundary=boundary, covers_engine=None).model_dump(mode="json") | {"schema_version": "1.3"}
    [point] = document["points"]
    del point["testbed"]
    point["bench"] = {**testbed, "energy_boundary": boundary}
    assert _budget(StudyResult.model_validate(document))[0] == verdict


def test_two_boundaries_never_compare() -> None:
    module = _study(boundary="module", covers_engine=True)
    board = _study(boundary="gpu_board", covers_engine=True)
    for allow_mismatch in (False, True):
        assert _compared(module, board, allow_mismatch=allow_mismatch) == (
            "NOT JUDGED",
            "failed",
            "cannot be compared: energy boundary: module in the candidate, gpu_board in the reference",
        )


def test_invalid_energy_is_shown_and_not_judged() -> None:
    invalid = _study(covers_engine=True, invalid="counter_disagrees")
    verdict, reason = _budget(invalid)
    assert verdict == "NOT JUDGED"
    assert reason == (
        "invalid (counter_disagrees): the energy counter and the integral of sampled power differ by more than 5 %"
    )
    fine = _study(covers_engine=True)
    assert _compared(invalid, fine)[:2] == _compared(fine, invalid)[:2] == ("NOT JUDGED", "failed")
    with pytest.raises(UndecidableError, match="invalid \\(counter_disagrees\\)"):
        session_effect([fine, invalid], METRIC, alpha=0.01, metrics=1)


def test_invalid_energy_is_never_best() -> None:
    low = summary(METRIC, [0.5] * 3, covers_engine=True, invalid="counter_disagrees")
    points = [point({"n": n}, **{METRIC: given}) for n, given in ((1, [1.0] * 3), (2, [2.0] * 3), (3, low))]
    assert best(points, METRIC).first == {0}


# ---- display ----

INVALID_JOULES: Any = {"covers_engine": True, "invalid": "counter_disagrees"}


@pytest.mark.parametrize(
    ("provenance", "label", "words"),
    [
        (CPU_JOULES, "measured, cpu_package", "measured, cpu_package, does not cover the engine's devices"),
        (INVALID_JOULES, "invalid", "measured, gpu_board, invalid: counter_disagrees"),
        ({"covers_engine": True}, "measured", "measured, gpu_board"),
    ],
)
def test_energy_has_its_label_wherever_it_is_shown(provenance: dict[str, Any], label: str, words: str) -> None:
    study = _study(**provenance)
    one = study.points[0].metrics[METRIC]
    assert one.label == label
    assert details(one, "J").endswith(f"n = 5, {words}")
    [row] = point_table(study).rows
    cells = dict(zip(point_table(study).columns, row, strict=True))
    assert cells[f"{METRIC}_invalid"] == one.invalid
    assert cells[f"{METRIC}_boundary"] == one.boundary
    headings = [str(one.header) for one in points_table(study.points, {"0" * 16: 5}, 200).table.columns]
    assert any(heading.endswith(f"\n{label}") for heading in headings)


# ---- energy budgets of marked tests ----


def _reading(monkeypatch: pytest.MonkeyPatch, total: Total, *, cuda: bool) -> EnergyReading:
    torch = SimpleNamespace(cuda=SimpleNamespace(is_initialized=lambda: cuda))
    monkeypatch.setitem(sys.modules, "torch", torch)
    reading = EnergyReading()
    reading._complete(Account((), total, 1.0))
    return reading


@pytest.mark.parametrize(
    ("cuda", "boundary", "unjudged"),
    [
        (True, "cpu_package", True),
        (True, "module", False),
        (True, "gpu_board", False),
        (False, "cpu_package", False),
    ],
)
def test_energy_budget_of_test_on_gpu(
    monkeypatch: pytest.MonkeyPatch, cuda: bool, boundary: str, unjudged: bool
) -> None:
    reading = _reading(monkeypatch, Total(1.0, "measured", "s", boundary), cuda=cuda)
    found = list(EnergyBudget(joules=100.0).problems(reading))
    assert bool(found) is unjudged
    assert not found or "the test uses a GPU, and the energy covers cpu_package only" in found[0]


def test_energy_budget_judges_no_invalid_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    total = Total(1.0, "measured", "nvml_total_energy", "gpu_board", invalid="counter_disagrees")
    [found] = EnergyBudget(joules=100.0).problems(_reading(monkeypatch, total, cuda=False))
    assert found.startswith(
        "its energy budget of 100.0 J cannot be judged: the energy is invalid (counter_disagrees)"
    )


# ---- llem doctor ----


@pytest.mark.parametrize(("torch", "blocked"), [("2.13.0+cu130", True), ("2.13.0+cpu", False)])
def test_doctor_blocks_where_nvml_fails_under_cuda_engines(torch: str, blocked: bool) -> None:
    """With a working RAPL, engines on GPUs would get its energy. The exit status used to be 0."""
    seen = Examination(
        version="0.1.0",
        energy=EnergyAccess(
            method="measured", source="rapl_package", boundary="cpu_package", meter="rapl", device="cpu"
        ),
        driver=Driver(error="NVML: nvmlInit: Driver Not Loaded", present=True),
        rapl=Rapl(root="/sys/class/powercap"),
        cpu=Cpu(),
        software=Software(executable="python", packages=[Package(name="torch", version=torch, purpose="engines")]),
        surroundings=Surroundings(os="Linux", kernel="6.1"),
    )
    [severity] = [one.severity for one in findings(seen, []) if one.about == "NVML"]
    assert severity == ("blocks" if blocked else "hinders")
