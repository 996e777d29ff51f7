"""``llem aa``: the spread of a metric between sessions, checked by hand and by simulation, and its output."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from pytest_llem import cli
from pytest_llem.catalogue import CATALOGUE
from pytest_llem.gates.decisions import UndecidableError
from pytest_llem.gates.sessions import Spread, session_delta, session_effect, session_spread
from pytest_llem.results.manifest_records import ManifestEntry
from pytest_llem.results.points import PointResult
from pytest_llem.results.statistics import Summary
from pytest_llem.results.study_result import StudyResult, StudySummary
from pytest_llem.study.gates import DEFAULT_FAMILY, GatesConfig

METRIC = "energy_per_output_token_j"


def summary(cycles: Any, **more: Any) -> Any:
    known = [value for value in cycles if value is not None]
    mean = statistics.fmean(known) if known else None
    return Summary(**{"mean": mean, "n": len(known), "unit": CATALOGUE[METRIC].unit, "values": cycles} | more)


def session(
    points: Any,
    *,
    design: Any = "0" * 16,
    metric: Any = METRIC,
    number: int = 1,
    facts: Any = None,
    entry: Any = None,
) -> Any:
    """Return the result of a session, given the values of the cycles of each point or a Summary."""
    return StudyResult(
        pytest_llem_version="0",
        name="study",
        study_design_hash=design,
        status="completed",
        summary=StudySummary(total=1, completed=1, failed=0, wall_seconds=1.0),
        points=[
            PointResult(
                id=name,
                axes={},
                config={},
                config_hash=name,
                metrics={metric: values if isinstance(values, Summary) else summary(values)},
                **(facts or {}),
            )
            for name, values in points.items()
        ],
        experiments=[
            ManifestEntry(
                **{"experiment_id": "one", "config_hash": "a", "config_summary": "", "cycle": 1}
                | {"status": "completed", "completed_at": f"2026-11-23T12:00:{number:02}Z"}
                | (entry or {})
            )
        ],
    )


def effect(*sessions: Any, metrics: int = 1) -> Any:
    return session_effect(sessions, METRIC, alpha=0.01, metrics=metrics)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Write sessions as results directories and return their names."""
    monkeypatch.chdir(tmp_path)

    def write(*sessions: Any) -> Any:
        names = []
        for number, one in enumerate(sessions, start=1):
            (tmp_path / f"r{number}").mkdir()
            (tmp_path / f"r{number}" / "study_result.json").write_text(one.model_dump_json())
            names.append(f"r{number}")
        return names

    return write


@pytest.fixture
def llem(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Return a function that runs ``llem aa`` and returns its exit status, output lines and standard error."""

    def run(*arguments: Any) -> Any:
        status = cli.main(["aa", *arguments])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err

    return run


#: Five sessions of two points with three cycles each; sessions differ by a common shift and noise.
SHIFTS = (0.0, 0.012, -0.008, 0.005, -0.011)
RUNS: list[dict[str, Any]] = [
    {"a": [math.exp(s + e) for e in (0, 0.002, -0.001)], "b": [9 * math.exp(s + e) for e in (0.003, 0, -0.002)]}
    for s in SHIFTS
]


class TestSpread:
    def test_spread_matches_hand_calculation(self) -> None:
        # Means 1 and 3 of two cycles each: variance between sessions 2, within 2, so 1 for a mean.
        found = session_spread([[[0.0, 2.0], [2.0, 4.0]]])
        assert found.sigma == pytest.approx(1.0)
        assert found.degrees == 1
        assert found.noise_known
        assert found.upper == pytest.approx(math.sqrt(2 / stats.chi2.ppf(0.05, 1) - 1))

    def test_points_are_pooled_but_not_counted_as_sessions(self) -> None:
        points = [[[0.0, 2.0], [2.0, 4.0]], [[5.0, 5.0], [9.0, 9.0]]]
        found = session_spread(points)
        assert found.sigma == pytest.approx(math.sqrt((1 + 8) / 2))
        assert found.degrees == 1

    def test_a_point_of_more_sessions_weighs_more(self) -> None:
        found = session_spread([[[0.0], [2.0]], [[1.0], [1.0], [1.0]]])
        assert found.sigma == pytest.approx(math.sqrt(2 / 3))
        assert found.degrees == 2
        assert not found.noise_known

    def test_noise_alone_is_no_session_effect(self) -> None:
        assert session_spread([[[0.0, 2.0], [0.1, 2.1], [-0.1, 1.9]]]).sigma == 0

    def test_identical_sessions_have_no_spread(self) -> None:
        assert session_spread([[[1.0, 1.0], [1.0, 1.0]]]) == Spread(0.0, 0.0, 1, True)

    @pytest.mark.parametrize("lengths", [(3, 3, 3, 3), (1, 2, 5, 4)])
    def test_spread_is_unbiased_and_its_bound_holds(self, lengths: tuple[int, ...]) -> None:
        random, rounds = np.random.default_rng(6), 2000
        found = []
        for _ in range(rounds):
            runs = [random.normal(random.normal(0, 2), 1.5, n).tolist() for n in lengths]
            found.append(session_spread([runs]))
        # Sigma is biased upwards where it is cut off at 0, which is rare for a sigma this large.
        assert statistics.fmean(one.sigma**2 for one in found) == pytest.approx(4, rel=0.05)
        assert sum(one.upper > 2 for one in found) / rounds == pytest.approx(0.95, abs=0.02)


class TestDelta:
    def test_delta_is_a_prediction_bound(self) -> None:
        spread = Spread(0.01, 0.02, 4, True)
        bound = stats.t.isf(0.01, 4) * math.sqrt(2) * 0.01
        assert session_delta(spread, alpha=0.01, metrics=1) == pytest.approx(math.expm1(bound))
        three = stats.t.isf(0.01 / 3, 4) * math.sqrt(2) * 0.01
        assert session_delta(spread, alpha=0.01, metrics=3) == pytest.approx(math.expm1(three))

    def test_more_sessions_give_a_smaller_delta(self) -> None:
        deltas = [session_delta(Spread(0.01, 0.02, df, True), alpha=0.01, metrics=3) for df in (1, 2, 4, 9, 100)]
        assert deltas == sorted(deltas, reverse=True)
        assert deltas[-1] > 2 * 0.01

    def test_delta_is_at_least_two_percent(self) -> None:
        assert session_delta(Spread(0.0, 0.01, 4, True), alpha=0.01, metrics=3) == 0.02

    def test_next_session_is_within_delta(self) -> None:
        random, rounds, beyond = np.random.default_rng(7), 4000, 0
        for _ in range(rounds):
            *runs, here, there = random.normal(0, 0.03, (6, 1)).tolist()
            delta = session_delta(session_spread([runs]), alpha=0.05, metrics=1)
            beyond += here[0] - there[0] > math.log1p(delta)
        assert beyond / rounds == pytest.approx(0.05, abs=0.012)


class TestEffect:
    def test_effect_of_results_matches_its_points(self) -> None:
        found = effect(*map(session, RUNS), metrics=3)
        points = [[[math.log(value) for value in run[name]] for run in RUNS] for name in ("a", "b")]
        assert (found.metric, found.sessions, found.points, found.notes) == (METRIC, 5, 2, ())
        assert found.spread == session_spread(points)
        assert found.delta == session_delta(found.spread, alpha=0.01, metrics=3)
        assert found.spread.sigma == pytest.approx(statistics.stdev(SHIFTS), rel=0.02)

    @pytest.mark.parametrize(
        ("bad", "reason"),
        [
            (summary([1.0, 0.0]), "a cycle is 0, and ratios need values above 0"),
            (summary([1.0, -0.5]), "a cycle is -0.5, and ratios need values above 0"),
            (summary([1.0], values=[]), "the version that measured it did not keep the values of cycles"),
            (summary([1.0], boundary="cpu_package"), "the energy boundary differs between sessions"),
        ],
    )
    def test_unusable_point_is_left_out_with_the_reason(self, bad: Summary, reason: str) -> None:
        found = effect(session(RUNS[0]), session(RUNS[1] | {"b": bad}))
        assert (found.points, found.notes) == (1, (f"without b: {reason}",))
        with pytest.raises(UndecidableError, match=reason):
            effect(session({"b": RUNS[0]["b"]}), session({"b": bad}))

    def test_metric_without_values_raises_with_the_reason(self) -> None:
        empty = {name: summary([None], reason="no meter") for name in ("a", "b", "c")}
        with pytest.raises(UndecidableError, match=r"^no meter$"):
            effect(session(empty), session(empty))
        with pytest.raises(UndecidableError, match=r"^no session has values$"):
            session_effect([session(RUNS[0])] * 2, "seconds", alpha=0.01, metrics=1)

    def test_failed_cycles_are_left_out(self) -> None:
        runs = [RUNS[0], RUNS[1] | {"b": [None, 9.1, None]}, {"a": RUNS[2]["a"]}]
        found = effect(*map(session, runs))
        logs = [[[math.log(value) for value in run["a"]] for run in runs]]
        logs.append([[math.log(value) for value in RUNS[0]["b"]], [math.log(9.1)]])
        assert (found.sessions, found.points) == (3, 2)
        assert found.spread == session_spread(logs)

    def test_point_of_one_session_is_left_out(self) -> None:
        found = effect(session(RUNS[0]), session({"a": RUNS[1]["a"]}))
        assert found.notes == ("without b: only one session has values",)

    def test_point_that_the_first_session_does_not_have_counts(self) -> None:
        found = effect(session({"a": RUNS[0]["a"]}), session(RUNS[1]), session(RUNS[2]))
        assert (found.sessions, found.points, found.notes) == (3, 2, ())

    def test_notes_on_single_cycles_and_estimates(self) -> None:
        runs = [{"a": summary([value], method="estimated")} for value in (1.0, 1.1)]
        assert effect(*map(session, runs)).notes == (
            "one cycle per session: sigma_session includes the noise of cycles",
            "estimated, not measured",
        )


class TestCommand:
    def test_table_is_followed_by_yaml_to_paste(
        self, folders: Callable[..., Any], llem: Callable[..., Any]
    ) -> None:
        names = folders(*(session(run, number=number) for number, run in enumerate(RUNS)))
        status, lines, error = llem(*names, "--metric", METRIC)
        assert (status, error) == (0, "")
        found = effect(*map(session, RUNS))
        delta = math.ceil(1000 * found.delta) / 1000
        assert lines[0].split() == ["metric", "sessions", "points", "sigma_session", "upper", "bound", "delta"]
        figures = [f"{100 * one:.3g}" for one in (found.spread.sigma, found.spread.upper, delta)]
        assert lines[1].replace("%", "").split() == [METRIC, "5", "2", *figures]
        start = lines.index("gates:")
        pasted = yaml.safe_load("\n".join(lines[start:]))
        assert pasted == {"gates": {"delta": {METRIC: delta}}}
        assert GatesConfig.model_validate(pasted["gates"]).delta_of(METRIC) == delta

    def test_default_metrics_are_those_of_gates(
        self, folders: Callable[..., Any], llem: Callable[..., Any]
    ) -> None:
        runs = [session(run, number=number) for number, run in enumerate(RUNS)]
        for one in runs:
            for point in one.points:
                point.metrics["output_tokens_per_second"] = summary([5.0, 5.1, 4.9])
        status, lines, error = llem(*folders(*runs))
        assert (status, error) == (0, "llem: ttft_p50_ms: no session has values\n")
        deltas = yaml.safe_load("\n".join(lines[lines.index("gates:") :]))["gates"]["delta"]
        assert list(deltas) == [*DEFAULT_FAMILY[:2]]
        assert deltas["output_tokens_per_second"] == 0.02
        assert deltas[METRIC] == math.ceil(1000 * effect(*runs, metrics=3).delta) / 1000

    def test_default_metrics_of_an_open_loop_are_those_of_its_gates(
        self, folders: Callable[..., Any], llem: Callable[..., Any]
    ) -> None:
        runs = [session(run, number=number, metric="ttft_p99_ms") for number, run in enumerate(RUNS)]
        for one in runs:
            for point in one.points:
                point.config["load"] = {"rate": 4.0}
                # A server that sends several tokens at a time has no times between tokens.
                point.metrics["tpot_p99_ms"] = point.metrics["ttft_p99_ms"]
        status, lines, error = llem(*folders(*runs))
        assert (status, error) == (0, f"llem: {METRIC}: no session has values\n")
        deltas = yaml.safe_load("\n".join(lines[lines.index("gates:") :]))["gates"]["delta"]
        assert list(deltas) == ["ttft_p99_ms", "tpot_p99_ms"]

    @pytest.mark.parametrize("saved_first", [True, False])
    def test_baseline_and_the_run_it_was_saved_from_are_one_session(
        self, folders: Callable[..., Any], llem: Callable[..., Any], saved_first: bool
    ) -> None:
        run = session(RUNS[0], entry={"result_sha256": "a" * 64})
        run.points[0].cycles, run.points[0].result_digests = [1], ["a" * 64]
        saved = run.model_copy(update={"experiments": []})
        names = folders(*((saved, run) if saved_first else (run, saved)))
        message = "not independent: both have the same measurement of 1 experiment; measure one of the two again"
        assert llem(*names, "--metric", METRIC) == (2, [], f"llem: r2 and r1: {message}\n")

    def test_alpha_and_metrics_come_from_the_study(
        self, folders: Callable[..., Any], llem: Callable[..., Any]
    ) -> None:
        runs = [session(run, number=number) for number, run in enumerate(RUNS)]
        for one in runs:
            one.measurement_protocol["gates"] = {"alpha": 0.005, "delta": 0.02, "metrics": [METRIC]}
        status, lines, _ = llem(*folders(*runs))
        assert status == 0
        delta = session_effect(runs, METRIC, alpha=0.005, metrics=1).delta
        assert lines[1].split()[-1] == f"{math.ceil(1000 * delta) / 10:.3g}%"
        assert any("in 0.5% of comparisons" in line for line in lines)

    def test_too_few_sessions_give_no_delta(self, folders: Callable[..., Any], llem: Callable[..., Any]) -> None:
        names = folders(session({"a": [1.0]}), session({"a": [1.5]}, number=2))
        status, lines, error = llem(*names, "--metric", METRIC)
        assert status == 1
        assert (
            error
            == f"llem: {METRIC}: too few sessions, or sessions that differ too much, for a delta below 100%\n"
        )
        assert "gates:" not in lines
        assert "> 1000%" in lines[1]

    def test_metric_without_sessions_is_status_1(
        self, folders: Callable[..., Any], llem: Callable[..., Any]
    ) -> None:
        assert llem(*folders(session(RUNS[0]), session(RUNS[1], number=2)), "--metric", "seconds") == (
            1,
            [],
            "llem: seconds: no session has values\n",
        )

    @pytest.mark.parametrize(
        ("second", "message"),
        [
            ({"design": "1" * 16}, f"is of another study than r1: its design is {'1' * 16}, not {'0' * 16}"),
            ({"facts": {"testbed": {"gpu": "A100"}}}, "testbed differs from that of r1: gpu"),
            ({"number": 1}, "is the same session as r1"),
            ({"entry": {"replayed_from": "study_x"}}, "one is of another session: study_x"),
        ],
    )
    def test_sessions_that_do_not_match_are_refused(
        self, folders: Callable[..., Any], llem: Callable[..., Any], second: dict[str, Any], message: str
    ) -> None:
        first = session(RUNS[0], facts={"testbed": {"gpu": "H100"}})
        names = folders(first, session(RUNS[1], **{"number": 2} | second))
        assert llem(*names) == (2, [], f"llem: r2: {message}\n")

    def test_changed_system_under_test_is_warned_about(
        self, folders: Callable[..., Any], llem: Callable[..., Any]
    ) -> None:
        runs = (session(RUNS[at], number=at, facts={"sut": {"torch": f"2.{at}", "seed": 1}}) for at in (0, 1))
        status, _, error = llem(*folders(*runs), "--metric", METRIC)
        assert status == 0
        assert error.startswith("llem: r2: warning: differs from r1 in torch: ")

    def test_invalid_gates_of_a_result_are_refused_in_one_line(
        self, folders: Callable[..., Any], llem: Callable[..., Any]
    ) -> None:
        runs = [session(run, number=number) for number, run in enumerate(RUNS[:2])]
        runs[1].measurement_protocol["gates"] = {"alpha": 2}
        assert llem(*folders(*runs)) == (2, [], "llem: r2: gates.alpha: must be less than 0.5 (got 2)\n")

    def test_single_session_is_refused(self, folders: Callable[..., Any], llem: Callable[..., Any]) -> None:
        assert llem(*folders(session(RUNS[0]))) == (
            2,
            [],
            "llem: r1: is the only session: at least two are needed\n",
        )

    def test_result_without_points_is_refused(self, folders: Callable[..., Any], llem: Callable[..., Any]) -> None:
        empty = [session({}, number=number) for number in (1, 2)]
        assert llem(*folders(*empty)) == (2, [], "llem: r1: holds no points\n")

    def test_unreadable_results_are_refused(
        self, folders: Callable[..., Any], llem: Callable[..., Any], tmp_path: Path
    ) -> None:
        names = folders(session(RUNS[0]))
        assert llem(*names, "gone") == (2, [], "llem: gone: no such file or folder\n")
        (tmp_path / "empty").mkdir()
        status, _, error = llem(*names, "empty")
        assert (status, error.startswith("llem: empty"), error.count("\n")) == (2, True, 1)
        (tmp_path / "other.json").write_text(json.dumps({"schema_version": "9.0"}))
        status, _, error = llem(*names, "other.json")
        assert (status, error.startswith("llem: other.json: schema version 9.0 cannot")) == (2, True)

    @pytest.mark.parametrize(
        ("gates", "message"),
        [
            ({"alpha": "low"}, "gates.alpha: must be a number (got 'low')"),
            ({"metrics": 5}, "gates.metrics: must be a list (got 5)"),
            ({"metrics": ["new"]}, "gates.metrics: no metric of that name (got 'new'): give --metric"),
        ],
    )
    def test_unusable_gates_of_the_study_are_refused(
        self, folders: Callable[..., Any], llem: Callable[..., Any], gates: dict[str, Any], message: str
    ) -> None:
        newest = session(RUNS[1], number=2).model_copy(update={"measurement_protocol": {"gates": gates}})
        assert llem(*folders(session(RUNS[0]), newest)) == (2, [], f"llem: r2: {message}\n")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "the following arguments are required: DIR"),
            (["r1", "--metric", "sceonds"], "there is no metric 'sceonds' (did you mean 'seconds'?)"),
            (
                ["r1", "--metric", "mean_power_w"],
                "mean_power_w cannot be gated: neither higher nor lower values are better",
            ),
        ],
    )
    def test_invalid_arguments_are_refused(
        self, capsys: pytest.CaptureFixture[str], arguments: list[Any], message: str
    ) -> None:
        with pytest.raises(SystemExit) as stopped:
            cli.main(["aa", *arguments])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
