"""Comparison of two results: verdicts, outcomes, and what cannot be compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import StudyResult
from pytest_llem.gates.matching import missing_points
from pytest_llem.gates.regression import compare
from pytest_llem.gates.verdict_text import verdict_text
from pytest_llem.study.gates import GatesConfig
from tests.support.study_results import H100, point, study_result, summary

GOLDEN = Path(__file__).parent / "golden" / "1.0"

STEADY = [1.000, 1.001, 0.999, 1.0005, 0.9995]

#: A metric of time, and one of energy.
SECONDS, ENERGY = GatesConfig(metrics=["seconds"]), GatesConfig(metrics=["energy_j"])


def times(values: Any, factor: Any) -> Any:
    return [value * factor for value in values]


def one(candidate: Any, reference: Any, settings: Any = SECONDS, **options: Any) -> Any:
    """Return the record and the only verdict of the comparison of two points."""
    found = compare(study_result(candidate), study_result(reference), settings, name="main", **options)
    (verdict,) = found.verdicts
    return found.record, verdict


def outcome_of(verdict: Any) -> Any:
    return verdict.verdict, verdict.outcome, verdict.reason


def test_regression_verdict_matches_hand_calculation() -> None:
    reference = [math.exp(-0.01), math.exp(0.01)]
    candidate = times(reference, math.exp(0.2))
    record, verdict = one(point({}, seconds=candidate), point({}, seconds=reference))
    assert outcome_of(verdict) == ("REGRESSION", "failed", None)
    # Variances of 0.0002 over 2 cycles each: Welch's error is 0.01 · √2, with 2 degrees of freedom.
    error, t_01 = 0.01 * math.sqrt(2), 6.964557
    assert verdict.ratio == pytest.approx(math.exp(0.2))
    assert verdict.interval == pytest.approx((math.exp(0.2 - t_01 * error), math.exp(0.2 + t_01 * error)))
    t = (0.2 - math.log(1.02)) / error
    assert verdict.p == pytest.approx((1 - t / math.sqrt(2 + t * t)) / 2)  # Student's distribution for 2 degrees
    assert (verdict.confidence, verdict.alpha, verdict.delta) == (0.98, 0.01, 0.02)
    assert verdict.mean == pytest.approx(math.exp(0.2) * math.cosh(0.01))
    assert verdict.reference_mean == pytest.approx(math.cosh(0.01))
    assert (verdict.n, verdict.reference_n, verdict.paired, verdict.unit) == (2, 2, False, "s")
    assert (verdict.gate, verdict.id, verdict.metric, verdict.point) == ("regression", "seconds-", "seconds", "")
    assert (record.reference, record.reference_version) == ("main", "0.1.0")
    assert (record.family, record.alpha, record.paired, record.compared_despite_mismatch) == (
        1,
        0.01,
        False,
        False,
    )


@pytest.mark.parametrize(
    ("metric", "factor", "expected"),
    [
        ("seconds", 1.2, ("REGRESSION", "failed", None)),
        ("seconds", 0.8, ("IMPROVEMENT", "passed", None)),
        ("seconds", 1.001, ("SAME", "passed", None)),
        ("output_tokens_per_second", 1.2, ("IMPROVEMENT", "passed", None)),
        ("output_tokens_per_second", 0.8, ("REGRESSION", "failed", None)),
    ],
)
def test_verdict_follows_the_better_direction_of_the_metric(
    metric: str, factor: float, expected: tuple[str, str, None]
) -> None:
    settings = GatesConfig(metrics=[metric])
    _, verdict = one(point({}, **{metric: times(STEADY, factor)}), point({}, **{metric: STEADY}), settings)
    assert outcome_of(verdict) == expected


@pytest.mark.parametrize(("fail_on", "outcome"), [("regression", "skipped"), ("inconclusive", "failed")])
def test_noisy_comparison_is_inconclusive(fail_on: str, outcome: str) -> None:
    noisy = [0.98, 1.0, 1.02]
    _, verdict = one(point({}, seconds=noisy), point({}, seconds=noisy), fail_on=fail_on)
    assert verdict.cycles_to_decide > 3
    assert outcome_of(verdict) == (
        "INCONCLUSIVE",
        outcome,
        f"about {verdict.cycles_to_decide} cycles on either side would decide it",
    )
    assert verdict.ratio == pytest.approx(1)
    wild = point({}, seconds=[0.5, 1.0, 2.0])
    _, verdict = one(wild, wild, fail_on=fail_on)
    assert outcome_of(verdict) == ("INCONCLUSIVE", outcome, "not even 1,000 cycles on either side would decide it")
    assert verdict.cycles_to_decide is None


@pytest.mark.parametrize(("fail_on", "outcome"), [("regression", "skipped"), ("inconclusive", "failed")])
@pytest.mark.parametrize(("candidate", "reference"), [([1.0], STEADY), (STEADY, [1.0]), ([1.0, None], STEADY)])
def test_single_cycle_is_inconclusive(
    candidate: list[Any], reference: list[float], fail_on: str, outcome: str
) -> None:
    record, verdict = one(point({}, seconds=candidate), point({}, seconds=reference), fail_on=fail_on)
    assert (verdict.verdict, verdict.outcome) == ("INCONCLUSIVE", outcome)
    assert "at least 2 cycles on either side" in verdict.reason
    assert (verdict.ratio, verdict.cycles_to_decide, record.family) == (None, None, 0)
    assert verdict.mean == 1.0


def test_pairing_finds_a_change_that_drift_hides() -> None:
    drift = [1.0, 1.5, 2.0, 2.5, 3.0]
    slower = [value * 1.1 * noise for value, noise in zip(drift, STEADY, strict=True)]
    candidate, reference = point({}, seconds=slower), point({}, seconds=drift)
    assert one(candidate, reference)[1].verdict == "INCONCLUSIVE"
    record, verdict = one(candidate, reference, paired=True)
    assert (verdict.verdict, verdict.paired, record.paired) == ("REGRESSION", True, True)


def test_cycles_are_paired_by_number() -> None:
    reference = point({}, seconds=[1.0, 2.0, 3.0])
    candidate = point({}, seconds=[3.3, 2.2001, 9.0], cycles=[3, 2, 4])
    assert one(candidate, reference, paired=True)[1].ratio == pytest.approx(1.1, rel=1e-3)
    apart = point({}, seconds=[1.0, 2.0], cycles=[7, 8])
    assert outcome_of(one(apart, reference, paired=True)[1])[0] == "INCONCLUSIVE"


def test_holm_family_is_all_judged_gates() -> None:
    # One-sided p of 0.00305, as by hand above: below 0.01 alone, and not times 4.
    reference = [math.exp(-0.01), math.exp(0.01)]
    points = [point({"n": n}, seconds=reference) for n in range(4)]
    worse = point({"n": 0}, seconds=times(reference, math.exp(0.2)))
    found = compare(study_result(worse, *points[1:]), study_result(*points), SECONDS, name="main")
    assert (found.record.family, found.verdicts[0].verdict) == (4, "INCONCLUSIVE")
    assert found.verdicts[0].p == pytest.approx(4 * 0.0030505, rel=1e-3)
    chosen = compare(study_result(worse, *points[1:]), study_result(*points), SECONDS, name="main", points=["n=0"])
    assert [verdict.verdict for verdict in chosen.verdicts] == ["REGRESSION"]
    assert chosen.record.family == 1


def test_delta_is_set_by_metric() -> None:
    settings = GatesConfig(metrics=["seconds", "load_seconds"], delta={"load_seconds": 0.5})
    candidate = point({}, seconds=times(STEADY, 1.2), load_seconds=times(STEADY, 1.2))
    reference = point({}, seconds=STEADY, load_seconds=STEADY)
    found = compare(study_result(candidate), study_result(reference), settings, name="main")
    assert [(one.verdict, one.delta) for one in found.verdicts] == [("REGRESSION", 0.02), ("SAME", 0.5)]


def test_points_match_by_the_values_of_their_axes() -> None:
    candidate = study_result(
        point({"precision": "bf16", "n": 1}, seconds=STEADY), point({"precision": "fp16", "n": 1}, seconds=STEADY)
    )
    reference = study_result(
        point({"n": 1.0, "precision": "bf16"}, id="another", seconds=STEADY),
        point({"precision": "fp32", "n": 1}, seconds=STEADY),
        point({"precision": "fp32", "n": 2}),
    )
    found = compare(candidate, reference, SECONDS, name="main")
    assert [(one.id, *outcome_of(one)) for one in found.verdicts] == [
        ("seconds-precision=bf16-n=1", "SAME", "passed", None),
        ("seconds-precision=fp16-n=1", "NOT JUDGED", "skipped", "new: not in the reference"),
        (
            "missing-precision=fp32-n=1",
            "NOT JUDGED",
            "failed",
            "in the reference, but no longer in the study: measure it, or save the reference again",
        ),
    ]
    assert found.verdicts[-1].reference_n == 5
    assert found.record.new_points == ["precision=fp16-n=1"]
    assert found.record.missing_points == ["precision=fp32-n=1"], "what was never measured is not missing"
    (missing,) = missing_points([one.axes for one in candidate.points], reference)
    assert missing.id == "precision=fp32-n=1"
    assert missing_points([one.axes for one in reference.points], reference) == []


TESTBED = [
    ("gpu", "NVIDIA A100", "GPU model: NVIDIA A100 in the candidate, NVIDIA H100 80GB HBM3 in the reference"),
    ("power_limit", "500 W", "power limit: 500 W in the candidate, 700 W in the reference"),
    ("mig", "on", "MIG: on in the candidate, none in the reference"),
    ("length_mode", "natural", "length mode: natural in the candidate, fixed in the reference"),
    ("dataset_hash", "e" * 64, "dataset hash: eeeeeeeeeeee in the candidate, dddddddddddd in the reference"),
    ("concurrent", True, "other experiments at the same time: yes in the candidate, no in the reference"),
    (
        "gpu",
        ["NVIDIA A100", "NVIDIA L4"],
        "GPU model: NVIDIA A100, NVIDIA L4 in the candidate, NVIDIA H100 80GB HBM3 in the reference",
    ),
]


@pytest.mark.parametrize(("fact", "value", "line"), TESTBED, ids=[f"{fact} {value}" for fact, value, _ in TESTBED])
def test_different_testbed_facts_are_not_compared(fact: str, value: bool | list[str] | str, line: str) -> None:
    candidate, reference = point({}, seconds=STEADY, testbed={**H100, fact: value}), point({}, seconds=STEADY)
    record, verdict = one(candidate, reference)
    hint = "(--llem-compare-mismatch, or llem compare --allow-mismatch, compares despite this)"
    reason = f"cannot be compared: {line} {hint}"
    assert outcome_of(verdict) == ("NOT JUDGED", "failed", reason)
    assert (verdict.mean, verdict.reference_mean, verdict.ratio) == (1.0, 1.0, None)
    assert (record.testbed, record.compared_despite_mismatch, record.family) == ([line], False, 0)
    record, verdict = one(candidate, reference, allow_mismatch=True)
    assert outcome_of(verdict) == ("SAME", "passed", None)
    assert (record.testbed, record.compared_despite_mismatch) == ([line], True)


def test_allowed_mismatch_is_recorded_only_for_differences() -> None:
    record, _ = one(point({}, seconds=STEADY), point({}, seconds=STEADY), allow_mismatch=True)
    assert not record.compared_despite_mismatch


def test_cpu_and_gpu_results_are_not_compared() -> None:
    record, verdict = one(point({}, seconds=STEADY, testbed={"cpu": "A processor"}), point({}, seconds=STEADY))
    assert verdict.outcome == "failed"
    assert "GPU model: none in the candidate, NVIDIA H100 80GB HBM3 in the reference" in record.testbed
    assert "CPU model: A processor in the candidate, none in the reference" in record.testbed


@pytest.mark.parametrize(
    ("fact", "value", "line"),
    [
        ("driver", "590.2", "GPU driver: 590.2 in the candidate, 580.1 in the reference"),
        (
            "gpu_uuids",
            "GPU-2",
            "GPU: GPU-2 in the candidate, GPU-1 in the reference (boards of one model differ by about 8 %)",
        ),
        ("power_limit", None, "power limit: unknown in the candidate, 700 W in the reference"),
    ],
)
def test_differences_of_minor_facts_are_warnings(fact: str, value: str | None, line: str) -> None:
    candidate, reference = point({}, seconds=STEADY, testbed={**H100, fact: value}), point({}, seconds=STEADY)
    record, verdict = one(candidate, reference)
    assert verdict.verdict == "SAME"
    assert (record.warnings, record.testbed) == ([line], [])


@pytest.mark.parametrize(
    ("metric", "compared"), [("energy_j", False), ("seconds", True), ("peak_memory_mb", True)]
)
@pytest.mark.parametrize("provenance", [{"method": "sampled"}, {"boundary": "cpu_package"}])
def test_energy_method_must_match_for_energy_metrics_only(
    metric: str, compared: bool, provenance: dict[str, str]
) -> None:
    fact = {f"energy_{key}": value for key, value in provenance.items()}
    given = summary(metric, STEADY, **(provenance if metric == "energy_j" else {}))
    candidate = point({}, testbed=H100 | fact, **{metric: given})
    record, verdict = one(candidate, point({}, **{metric: STEADY}), GatesConfig(metrics=[metric]))
    assert (verdict.verdict == "SAME") is compared
    assert bool(record.testbed) is not compared


@pytest.mark.parametrize(("metric", "compared"), [("peak_memory_mb", False), ("seconds", True)])
def test_start_method_must_match_for_memory_metrics_only(metric: str, compared: bool) -> None:
    candidate = point({}, testbed=H100 | {"start_method": "forkserver"}, **{metric: STEADY})
    reference = point({}, testbed=H100 | {"start_method": "spawn"}, **{metric: STEADY})
    record, verdict = one(candidate, reference, GatesConfig(metrics=[metric]))
    assert (verdict.verdict == "SAME") is compared
    assert record.testbed == (
        [] if compared else ["start method: forkserver in the candidate, spawn in the reference"]
    )


def test_cpu_energy_is_compared_by_its_own_method() -> None:
    values = summary("cpu_energy_j", STEADY, method="measured", boundary="cpu_package")
    candidate, reference = point({}, cpu_energy_j=values), point({}, cpu_energy_j=values)
    settings = GatesConfig(metrics=["cpu_energy_j"])
    assert one(candidate, reference, settings)[1].verdict == "SAME"
    reference.testbed["energy_method"] = "sampled"  # of energy_j
    assert one(candidate, reference, settings)[1].verdict == "SAME"


ESTIMATED = summary("energy_j", STEADY, method="estimated", boundary="cpu_package", covers_engine=True)
ALLOWED = {"energy": {"allow_estimated": True}}


def _estimated(**fields: Any) -> Any:
    bench = H100 | {"energy_method": "estimated", "energy_boundary": "cpu_package"}
    return point({}, energy_j=ESTIMATED, energy_per_output_token_j=ESTIMATED, testbed=bench, **fields)


def test_estimate_is_not_judged_unless_allowed() -> None:
    record, verdict = one(_estimated(), _estimated(), ENERGY)
    reason = "energy is estimated, not measured: set energy.allow_estimated: true to let it decide"
    assert outcome_of(verdict) == ("NOT JUDGED", "failed", reason)
    assert record.family == 0
    assert one(_estimated(config=ALLOWED), _estimated(), ENERGY)[1].verdict == "SAME"
    assert one(_estimated(), _estimated(config=ALLOWED), ENERGY)[1].verdict == "NOT JUDGED"
    found = compare(study_result(_estimated()), study_result(_estimated()), GatesConfig(), name="main")
    assert outcome_of(found.verdicts[0]) == ("NOT JUDGED", "skipped", reason), (
        "the study does not gate energy by name"
    )


def test_estimate_is_not_compared_with_measurement() -> None:
    measured = point({}, energy_j=STEADY)
    _, verdict = one(_estimated(), measured, ENERGY)
    assert verdict.outcome == "failed"
    assert "energy method: estimated in the candidate, measured in the reference" in verdict.reason
    _, verdict = one(_estimated(), measured, ENERGY, allow_mismatch=True)
    assert (verdict.verdict, verdict.outcome) == ("NOT JUDGED", "failed")
    assert "allow_estimated" in verdict.reason
    _, verdict = one(_estimated(config=ALLOWED), measured, ENERGY, allow_mismatch=True)
    assert verdict.verdict == "NOT JUDGED", "nor of one boundary"
    package = summary("energy_j", STEADY, boundary="cpu_package", covers_engine=True)
    measured = point({}, energy_j=package, testbed=H100 | {"energy_boundary": "cpu_package"})
    _, verdict = one(_estimated(config=ALLOWED), measured, ENERGY, allow_mismatch=True)
    assert (verdict.verdict, verdict.method) == ("SAME", "estimated")


def test_default_family_skips_metrics_without_values() -> None:
    no_energy = summary("energy_per_output_token_j", [], reason="no meter")
    candidate = point({}, energy_per_output_token_j=no_energy, output_tokens_per_second=STEADY)
    found = compare(study_result(candidate), study_result(candidate), GatesConfig(), name="main")
    assert [(one.metric, *outcome_of(one)) for one in found.verdicts] == [
        ("energy_per_output_token_j", "NOT JUDGED", "skipped", "no value in the candidate: no meter"),
        ("output_tokens_per_second", "SAME", "passed", None),
        ("ttft_p50_ms", "NOT JUDGED", "skipped", "no value in the candidate"),
    ]
    assert found.record.family == 1


def test_named_metric_without_values_fails() -> None:
    nothing = point({}, energy_j=[])
    assert outcome_of(one(nothing, nothing, ENERGY)[1]) == ("NOT JUDGED", "failed", "no value in the candidate")


def test_metric_missing_on_one_side_fails() -> None:
    with_ttft, without = point({}, ttft_p50_ms=STEADY), point({}, ttft_p50_ms=[])
    for candidate, reference, reason in (
        (without, with_ttft, "no value in the candidate"),
        (with_ttft, without, "no value in the reference"),
    ):
        found = compare(study_result(candidate), study_result(reference), GatesConfig(), name="main")
        assert outcome_of(found.verdicts[-1]) == ("NOT JUDGED", "failed", reason)


def test_values_not_above_0_are_not_compared() -> None:
    candidate, reference = point({}, active_energy_j=[1.0, -1.0]), point({}, active_energy_j=[1.0, 2.0])
    _, verdict = one(candidate, reference, GatesConfig(metrics=["active_energy_j"]))
    assert (verdict.verdict, verdict.outcome) == ("NOT JUDGED", "failed")
    assert "above 0" in verdict.reason


def test_metric_of_0_on_one_side_fails() -> None:
    some, nothing = point({}, ttft_p50_ms=STEADY), point({}, ttft_p50_ms=[0.0] * 5)
    part = point({}, ttft_p50_ms=[0.0, *times(STEADY[1:], 9)])
    for candidate, reference, outcome in (
        (nothing, some, "failed"),
        (part, some, "failed"),
        (some, nothing, "failed"),
        (nothing, nothing, "skipped"),
    ):
        found = compare(study_result(candidate), study_result(reference), GatesConfig(), name="main")
        assert (found.verdicts[-1].verdict, found.verdicts[-1].outcome) == ("NOT JUDGED", outcome)


def test_metric_without_a_better_direction_is_not_judged() -> None:
    given = point({}, mean_power_w=STEADY)
    _, verdict = one(given, given, GatesConfig(metrics=["mean_power_w"]))
    assert outcome_of(verdict) == (
        "NOT JUDGED",
        "failed",
        "neither higher nor lower is better, so the metric cannot get worse",
    )


@pytest.mark.parametrize("side", [0, 1])
def test_energy_window_of_few_ticks_is_not_judged(side: int) -> None:
    candidate, reference = (point({}, energy_j=STEADY, load_energy_j=STEADY, seconds=STEADY) for _ in range(2))
    changed = (candidate, reference)[side]
    changed.testbed["energy_ticks"] = 19.4
    _, verdict = one(candidate, reference, ENERGY)
    assert outcome_of(verdict) == (
        "NOT JUDGED",
        "failed",
        "a window holds 19.4 ticks of the energy counter, and a gate needs 20: "
        "raise measurement.min_window_seconds",
    )
    assert one(candidate, reference, ENERGY, allow_mismatch=True)[1].verdict == "NOT JUDGED", (
        "it is not a mismatch"
    )
    for metric in ("load_energy_j", "seconds"):
        assert one(candidate, reference, GatesConfig(metrics=[metric]))[1].verdict == "SAME"
    changed.testbed["energy_ticks"] = 20.0
    assert one(candidate, reference, ENERGY)[1].verdict == "SAME"


@pytest.mark.parametrize("side", [0, 1])
def test_energy_boundary_that_changes_between_cycles_is_not_judged(side: int) -> None:
    candidate, reference = (point({}, energy_j=STEADY) for _ in range(2))
    changed = (candidate, reference)[side]
    changed.metrics["energy_j"].boundary = None
    changed.testbed = H100 | {"energy_boundary": ["gpu_board", "cpu_package"]}
    assert "energy boundary: " in one(candidate, reference, ENERGY)[1].reason
    _, verdict = one(candidate, reference, ENERGY, allow_mismatch=True)
    assert outcome_of(verdict) == ("NOT JUDGED", "failed", "its cycles differ in what their energy covers")


def test_ticks_of_prefill_window_count_for_prefill_energy_only() -> None:
    candidate, reference = (
        point({}, energy_j=STEADY, prefill_energy_j=STEADY, testbed=H100 | {"prefill_ticks": 5}) for _ in range(2)
    )
    assert one(candidate, reference, ENERGY)[1].verdict == "SAME"
    assert one(candidate, reference, GatesConfig(metrics=["prefill_energy_j"]))[1].verdict == "NOT JUDGED"


def test_changed_facts_of_the_system_under_test_are_listed() -> None:
    candidate = point(
        {"n": 1},
        seconds=STEADY,
        config={"precision": "fp16", "pytorch": {"batch_size": 8}, "measurement": {"length_mode": "fixed"}},
        sut={"torch": "2.13.0", "model_fingerprint": "a" * 64, "precision": "fp16"},
    )
    reference = point({"n": 1}, seconds=STEADY, sut={"torch": "2.11.0", "commit": "c" * 40, "precision": "bf16"})
    record, verdict = one(candidate, reference)
    assert verdict.verdict == "SAME"
    assert record.sut == [
        "precision: fp16 in the candidate, bf16 in the reference",
        "pytorch.batch_size: 8 in the candidate, none in the reference",
        "torch: 2.13.0 in the candidate, 2.11.0 in the reference",
        "model_fingerprint: aaaaaaaaaaaa in the candidate, none in the reference",
        "commit: none in the candidate, cccccccccccc in the reference",
    ]


def test_point_without_a_result_has_no_differences() -> None:
    """Its facts are unknown, which is not a difference."""
    candidate, reference = point({}, seconds=STEADY, sut={"torch": "2.13.0"}), point({}, seconds=[], sut={})
    assert one(candidate, reference)[0].sut == one(reference, candidate)[0].sut == []


def test_difference_names_the_points_it_concerns() -> None:
    candidate = [
        point({"n": n}, seconds=STEADY, testbed=H100 | {"driver": "590" if n else "580.1"}) for n in range(4)
    ]
    reference = [point({"n": n}, seconds=STEADY) for n in range(4)]
    found = compare(study_result(*candidate), study_result(*reference), SECONDS, name="main")
    assert found.record.warnings == ["GPU driver: 590 in the candidate, 580.1 in the reference [n=1 and 2 more]"]


def test_results_of_older_versions_are_not_judged() -> None:
    golden = StudyResult.load(GOLDEN)
    settings = GatesConfig(metrics=["seconds"])
    found = compare(golden, golden, settings, name="main")
    assert outcome_of(found.verdicts[0]) == (
        "NOT JUDGED",
        "failed",
        "the candidate was written by a version that kept no cycle values: measure it again",
    )
    candidate = golden.model_copy(deep=True)
    candidate.points[0].cycles = [1, 2]
    candidate.points[0].metrics["seconds"].values = [1.0, 2.0]
    assert outcome_of(compare(candidate, golden, settings, name="main").verdicts[0])[2] == (
        "the reference was written by a version that kept no cycle values: measure it again"
    )
    assert [verdict.outcome for verdict in found.verdicts] == ["failed", "failed"]
    assert found.verdicts[1].reason == "no value in the candidate: no completed cycle"


AUTO = {"n_cycles": "auto", "min_cycles": 4, "max_cycles": 20}


def test_points_without_a_look_count_in_the_family() -> None:
    worse, few = times(STEADY, 1.2), [1.0, 1.001]
    candidate = study_result(
        point({"n": 1}, seconds=worse), point({"n": 2}, seconds=few), measurement_protocol=AUTO
    )
    reference = study_result(point({"n": 1}, seconds=STEADY), point({"n": 2}, seconds=few))
    found = compare(candidate, reference, SECONDS, name="main", paired=True)
    assert [one.verdict for one in found.verdicts] == ["REGRESSION", "INCONCLUSIVE"]
    assert found.record.family == 2
    assert found.verdicts[0].confidence == pytest.approx(1 - 2 * 0.01 / 2)


def test_gate_of_cycles_until_decided_names_its_look() -> None:
    values, there = times([*STEADY, 1.0, 1.0], 1.2), [*STEADY[::-1], 1.0, 1.0]  # looks after 4, 5 and 6
    candidate = study_result(point({}, seconds=values), measurement_protocol=AUTO)
    reference = study_result(point({}, seconds=there))
    (verdict,) = compare(candidate, reference, SECONDS, name="main", paired=True).verdicts
    assert (verdict.verdict, verdict.n, verdict.judged_after) == ("REGRESSION", 7, 6)
    assert "n = 7 against 7, paired, judged after 6 cycles, p " in verdict_text(verdict)
    assert one(point({}, seconds=values), point({}, seconds=there))[1].judged_after is None
