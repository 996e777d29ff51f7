"""Two experiments that measure alternately: their order, their results, and the faults of either side."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pytest_llem import StudyResult
from pytest_llem.energy.account import Account, Total, join_accounts
from pytest_llem.energy.protocol import Conditions, DeviceReading
from pytest_llem.gates.matching import in_pairs, share_of_processes
from pytest_llem.isolation.forkserver_client import ForkServers
from pytest_llem.isolation.interleaved import Side, run_interleaved
from pytest_llem.isolation.launcher import Job
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.measurement.turns import MIN_TURNS, progress
from pytest_llem.planning.host import GpuCapacity, Host
from pytest_llem.planning.plan import whole_cycles_reason
from pytest_llem.planning.preflight import Preflight
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.manifest_records import ErrorRecord
from pytest_llem.results.points import CycleTurns, PointResult
from pytest_llem.study.loading import load_study
from tests.conftest import Results, RunPytest, WriteStudy
from tests.support.environments import NOOP_ENGINE, ROOT, SITE_PACKAGES, Environment
from tests.support.narrow import not_none
from tests.support.processes import gone, wait_until

MakeJob = Callable[..., Job]
Pair = Callable[[Job, Job], tuple[Outcome, Outcome]]

#: An engine with a fault in its n-th call of generate, or once all is measured.
ENGINE = """
    import os, signal, threading, time
    from pathlib import Path
    from typing import Any
    from noop_engine import FAULTS, NoopEngine, NoopOptions

    def spin():
        while True:
            pass

    class Options(NoopOptions):
        at: Any = None
        fault_at: Any = None
        kills: Any = None
        spins: Any = None
        wrong: Any = None

    class Engine(NoopEngine):
        options = Options
        calls = 0

        def load(self):
            super().load()
            if self.given.get("spins"):
                threading.Thread(target=spin, daemon=True).start()

        def generate(self, batch):
            self.calls += 1
            if self.calls == self.given.get("at"):
                FAULTS[self.given["fault_at"]]()
            if (folder := self.given.get("kills")) and self.calls == 3:
                other = next(int(file.stem) for file in Path(folder).iterdir() if file.stem != str(os.getpid()))
                os.kill(other, signal.SIGKILL)
                time.sleep(60)
            return super().generate(batch)

        def requests(self, batch, generated):
            if self.given.get("wrong"):
                raise ValueError("no record of it")
            return super().requests(batch, generated)
"""


@pytest.fixture(scope="module")
def forkservers() -> Iterator[ForkServers]:
    forkservers = ForkServers()
    yield forkservers
    forkservers.end()


@pytest.fixture(scope="module")
def against(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The option that compares with another environment, which has the engine ``noop``."""
    environment = Environment(tmp_path_factory.mktemp("main") / "env", ROOT, NOOP_ENGINE, *SITE_PACKAGES)
    return f"--llem-against={environment.python}"


@pytest.fixture
def engine(job: MakeJob, tmp_path: Path) -> MakeJob:
    """Return a function that makes a job of :data:`ENGINE` with options."""
    (tmp_path / "turning.py").write_text(textwrap.dedent(ENGINE))

    def make(min_window_seconds: float = 0.0, turn: float = 0.0, **options: Any) -> Job:
        made = job()
        config = {key: value for key, value in made.config.items() if key != "noop"}
        config |= {"backend": "turning:Engine", "turning:Engine": options, "baseline": {"enabled": False}}
        config["measurement"] = {**config["measurement"], "min_window_seconds": min_window_seconds}
        turns = {"pair": "a pair", "min_seconds": turn}
        return replace(made, config=config, python_path=[str(tmp_path)], turns=turns, harness=[os.getpid()])

    return make


@pytest.fixture
def pair(forkservers: ForkServers) -> Pair:
    """Return a function that runs two jobs alternately."""

    def run(first: Job, second: Job) -> tuple[Outcome, Outcome]:
        sides = [Side(name, one, 180, forkservers) for name, one in (("candidate", first), ("reference", second))]
        return run_interleaved(sides[0], sides[1])

    return run


def _result(outcome: Outcome) -> ExperimentResult:
    assert outcome.error is None, outcome.error
    return ExperimentResult.model_validate_json(not_none(outcome.result))


def _error(outcome: Outcome) -> ErrorRecord:
    assert outcome.result is None
    return not_none(outcome.error)


class TestTurns:
    def test_they_alternate_and_neighbours_belong_together(self, pair: Pair, engine: MakeJob) -> None:
        results = [*map(_result, pair(engine(0.4, 0.04, seconds=0.01), engine(0.4, 0.04, seconds=0.01)))]
        records = [not_none(result.interleaving) for result in results]
        assert [record.pair for record in records] == ["a pair"] * 2
        turns = [(turn.began_at, side) for side, record in enumerate(records) for turn in record.turns]
        order = [side for _, side in sorted(turns)]
        assert len(order) >= 2 * MIN_TURNS
        assert order == ([0, 1, 1, 0, 1, 0, 0, 1] * len(order))[: len(order)]
        for result, record in zip(results, records, strict=True):
            assert all(turn.seconds >= 0.04 for turn in record.turns)
            assert sum(turn.passes or 0 for turn in record.turns) == result.window.passes
            assert sum(turn.seconds for turn in record.turns) == pytest.approx(result.window.window_seconds)
            assert result.window.window_seconds >= 0.4
            energy = sum(turn.metrics["energy_j"] * (turn.passes or 0) for turn in record.turns)
            assert energy == pytest.approx(not_none(result.window.window_energy_j))

    def test_each_has_at_least_four_turns_of_one_pass(self, pair: Pair, engine: MakeJob) -> None:
        for outcome in pair(engine(), engine()):
            taken = not_none(_result(outcome).interleaving).turns
            assert [turn.passes for turn in taken] == [1] * MIN_TURNS

    def test_both_import_before_one_loads(self, pair: Pair, engine: MakeJob) -> None:
        one, other = map(_result, pair(engine(), engine()))
        assert max(not_none(side.start).ready_at for side in (one, other)) <= one.started_at <= other.started_at

    @pytest.mark.parametrize(
        ("done", "measured", "total"), [(0, 0.0, 4), (2, 1.0, 20), (4, 9.9, 5), (4, 10.0, 4), (7, 11.0, 7)]
    )
    def test_expected_number_follows_from_the_measured_time(self, done: int, measured: float, total: int) -> None:
        assert progress(done, measured, 10.0, None).total == total

    @pytest.mark.slow
    def test_process_that_spins_while_it_waits_is_stopped(self, pair: Pair, engine: MakeJob) -> None:
        quiet, spinning = (
            not_none(_result(one).interleaving)
            for one in pair(engine(3, 0.5, seconds=0.05), engine(3, 0.5, seconds=0.05, spins=True))
        )
        assert (quiet.stopped, spinning.stopped) == (False, True)


class TestFaults:
    @pytest.mark.parametrize(("fault", "kind"), [("raise", "exception"), ("segv", "crash"), ("memory", "oom")])
    @pytest.mark.parametrize("failing", [0, 1], ids=["candidate", "reference"])
    def test_fault_in_a_turn_ends_both(
        self, pair: Pair, engine: MakeJob, tmp_path: Path, fault: str, kind: str, failing: int
    ) -> None:
        (tmp_path / "notes").mkdir()
        options: list[dict[str, Any]] = [{}, {}]
        options[failing] = {"fault_at": fault, "at": 3}
        outcomes = pair(*(engine(report=str(tmp_path / "notes"), **one) for one in options))
        error = _error(outcomes[failing])
        assert (error.kind, error.phase) == (kind, "measuring alternately")
        other = _error(outcomes[1 - failing])
        assert other.kind == "partner"
        assert ("candidate", "reference")[failing] in other.message
        assert all(gone(int(file.stem)) for file in (tmp_path / "notes").iterdir())

    def test_hang_in_a_turn_ends_both_at_their_deadline(
        self, engine: MakeJob, forkservers: ForkServers, tmp_path: Path
    ) -> None:
        (tmp_path / "notes").mkdir()
        report = str(tmp_path / "notes")
        hanging = engine(report=report, fault_at="hang", at=2)
        outcomes = run_interleaved(
            Side("candidate", hanging, 3, forkservers), Side("reference", engine(report=report), 3, forkservers)
        )
        assert [_error(one).kind for one in outcomes] == ["timeout", "partner"]
        assert "generate" in not_none(_error(outcomes[0]).traceback)
        assert all(gone(int(file.stem)) for file in (tmp_path / "notes").iterdir())

    def test_death_while_waiting_is_the_waiting_sides(self, pair: Pair, engine: MakeJob, tmp_path: Path) -> None:
        (tmp_path / "notes").mkdir()
        report = str(tmp_path / "notes")
        outcomes = pair(engine(report=report, kills=report), engine(report=report))
        assert [_error(one).kind for one in outcomes] == ["partner", "crash"]
        assert _error(outcomes[1]).phase == "waiting for its turn"

    def test_stopped_server_runs_again_after_a_fault(self, engine: MakeJob, forkservers: ForkServers) -> None:
        faulty, spinning = engine(3, 0.5, seconds=0.05, fault_at="raise", at=15), engine(3, 0.5, spins=True)
        with subprocess.Popen(["sleep", "600"], start_new_session=True) as server:
            try:
                outcomes = run_interleaved(
                    Side("candidate", faulty, 180, forkservers),
                    Side("reference", spinning, 180, forkservers, server=server.pid),
                )
                assert psutil.Process(server.pid).status() != psutil.STATUS_STOPPED
            finally:
                server.kill()
        assert [_error(one).kind for one in outcomes] == ["exception", "partner"]

    def test_fault_before_the_turns_ends_both(self, pair: Pair, engine: MakeJob) -> None:
        outcomes = pair(engine(), engine(unknown=1))
        assert [_error(one).kind for one in outcomes] == ["partner", "preflight"]

    def test_fault_after_the_turns_leaves_the_others_result(self, pair: Pair, engine: MakeJob) -> None:
        for at in (0, 1):
            options: list[dict[str, Any]] = [{}, {}]
            options[at] = {"wrong": True}
            outcomes = pair(*(engine(**one) for one in options))
            assert "no record of it" in _error(outcomes[at]).message
            _result(outcomes[1 - at])

    def test_process_that_cannot_be_started_is_a_crash(self, engine: MakeJob, tmp_path: Path) -> None:
        missing = replace(engine(), python=str(tmp_path / "python"))
        outcomes = run_interleaved(Side("candidate", engine(), 30), Side("reference", missing, 30))
        assert [_error(one).kind for one in outcomes] == ["partner", "crash"]

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_end_of_pytest_ends_both(
        self,
        pytester: pytest.Pytester,
        write_study: WriteStudy,
        monkeypatch: pytest.MonkeyPatch,
        against: str,
        number: signal.Signals,
    ) -> None:
        for name in ("notes", "temporary"):
            pytester.mkdir(name)
        monkeypatch.setenv("TMPDIR", str(pytester.path / "temporary"))
        write_study(
            noop={"seconds": 0.05, "report": str(pytester.path / "notes")},
            sweep={"n": [1]},
            measurement={"min_window_seconds": 600},
            execution={"n_cycles": 1, "skip_preflight": True},
        )
        run = subprocess.Popen(
            [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", against], stdout=subprocess.DEVNULL
        )
        wait_until(lambda: len([*(pytester.path / "notes").iterdir()]) == 2)
        run.send_signal(number)
        run.wait(60)
        pids = [int(file.stem) for file in (pytester.path / "notes").iterdir()]
        wait_until(lambda: all(map(gone, pids)), 30)
        wait_until(lambda: not list((pytester.path / "temporary").glob("llem-*")), 30)


class TestStudy:
    def test_rerun_measures_the_pair_again(
        self,
        pytester: pytest.Pytester,
        run_pytest: RunPytest,
        write_study: WriteStudy,
        results: Results,
        against: str,
    ) -> None:
        """The first run of the pair fails on one side, so that the other one has no result either."""
        write_study(
            noop={"fail_once": str(pytester.path / "failed")},
            sweep={"n": [1]},
            execution={"n_cycles": 1, "skip_preflight": True},
        )
        run = run_pytest(against, "--reruns=1", "-p", "rerunfailures")
        run.assert_outcomes(passed=2, skipped=3)
        own, other = (StudyResult.load(folder) for folder in (results.directory, results.directory / "reference"))
        pairs = [one.points[0].turns[0].pair for one in (own, other)]
        assert pairs[0] == pairs[1]

    def test_point_whose_partner_is_not_selected_is_measured_alone(
        self,
        run_pytest: RunPytest,
        write_study: WriteStudy,
        results: Results,
        against: str,
    ) -> None:
        write_study(sweep={"n": [1]}, execution={"n_cycles": 1, "skip_preflight": True})
        run_pytest(against, "-k", "experiment").assert_outcomes(passed=1)
        assert StudyResult.load(results.directory).points[0].turns == []

    def test_a_pairs_time_is_on_the_line_of_its_first_side(
        self, run_pytest: RunPytest, write_study: WriteStudy, against: str
    ) -> None:
        """The time that is left, after the first side, is that of the other pair."""
        write_study(
            sweep={"n": [1]},
            measurement={"min_window_seconds": 1},
            execution={"n_cycles": 2, "skip_preflight": True},
        )
        run = run_pytest(against)
        lines = [line for line in run.outlines if re.search(r"llem: \d/4 ", line)]
        times = [re.search(r"[\d.]+ s(?=;|$)", line.partition("; about")[0]) for line in lines]
        assert [found is not None for found in times] == [True, False, True, False]
        assert ["left" in line for line in lines] == [True, True, False, False]

    def test_reference_alone_has_no_empty_table(
        self, run_pytest: RunPytest, write_study: WriteStudy, against: str
    ) -> None:
        write_study(sweep={"n": [1]}, execution={"n_cycles": 1, "skip_preflight": True})
        run = run_pytest(against, "-k", "reference")
        run.assert_outcomes(passed=1)
        run.stdout.fnmatch_lines(["*= llem: noop =*", "results: results/noop_*"], consecutive=True)

    def test_pair_that_is_partly_selected_offers_no_resume(
        self, run_pytest: RunPytest, write_study: WriteStudy, against: str
    ) -> None:
        """A comparison that is interleaved cannot be resumed."""
        write_study(sweep={"n": [1]}, execution={"skip_preflight": True}, gates={"metrics": ["seconds"]})
        run = run_pytest(against, "-k", "cycle=1 or regression")
        run.stdout.fnmatch_lines(["*cannot be judged: 1 of 3 cycles selected: select all of them"])


# ---- joined windows ----


def _reading(energy_j: float | None, **more: Any) -> DeviceReading:
    reason = "lost" if energy_j is None else None
    return DeviceReading("GPU-1", "gpu_board", energy_j, "measured", "nvml", reason=reason, **more)


def _account(*devices: DeviceReading, seconds: float = 2.0) -> Account:
    energies = [one.energy_j for one in devices]
    total = None if None in energies else sum(one for one in energies if one is not None)
    names = tuple(one.device for one in devices)
    reason = None if total is not None else "lost"
    return Account(
        devices,
        Total(total, "measured", "nvml", "+".join({one.boundary for one in devices}), reason, devices=names),
        seconds,
        tick_seconds=0.1,
    )


def test_energies_of_turns_are_summed_with_the_errors_of_all_edges() -> None:
    joined = join_accounts(
        [_account(_reading(10.0, uncertainty_j=3.0)), _account(_reading(20.0, uncertainty_j=4.0))]
    )
    assert (joined.total.energy_j, joined.total.uncertainty_j, joined.seconds) == (30.0, 5.0, 4.0)
    assert joined.ticks == pytest.approx(40 / 2**0.5), "two windows have twice as many edges"


@pytest.mark.parametrize(("seconds", "invalid"), [(1.2, None), (2.0, "counter_disagrees")])
def test_counter_of_turns_is_checked_if_they_have_enough_effective_ticks(
    seconds: float, invalid: str | None
) -> None:
    turns = [_account(_reading(10.0, integral_j=11.0), seconds=seconds) for _ in range(2)]
    assert join_accounts(turns).total.invalid == invalid


def test_device_that_was_not_metered_has_no_part_of_the_total() -> None:
    account = _account(_reading(10.0), replace(_reading(12.0), boundary="module"))
    assert account.of_devices({"GPU-1", "GPU-2"}).energy_j is None, "two readings of one GPU are not two GPUs"


def test_energy_missing_in_one_turn_is_missing_in_the_window() -> None:
    joined = join_accounts([_account(_reading(10.0)), _account(_reading(None))])
    assert (joined.total.energy_j, joined.total.reason) == (None, "lost")
    assert [device.energy_j for device in joined.devices] == [None]


def test_counter_that_fails_in_one_turn_makes_the_energy_sampled() -> None:
    sampled = replace(_reading(20.0), method="sampled", source="nvml_power_instant", counter_reason="it stopped")
    [joined] = join_accounts([_account(_reading(10.0)), _account(sampled)]).devices
    assert (joined.energy_j, joined.method, joined.source) == (30.0, "sampled", "nvml+nvml_power_instant")
    assert joined.counter_reason == "it stopped"


def test_meter_that_fails_in_one_turn_is_missing_in_the_window() -> None:
    lost = Account((), Total(None, "unavailable", reason="the meter is gone"), None)
    joined = join_accounts([_account(_reading(10.0)), lost])
    assert (joined.total.energy_j, joined.total.reason) == (None, "the meter is gone")


def test_devices_that_differ_between_turns_have_no_total() -> None:
    """A second GPU whose counter fails in one turn is sampled there, and has another boundary."""
    second = replace(_reading(10.0), device="other")
    joined = join_accounts(
        [_account(_reading(10.0), second), _account(_reading(10.0), replace(second, boundary="module"))]
    )
    assert joined.total.energy_j is None
    assert joined.total.reason == "other: not read in every window; other: not read in every window"


def test_conditions_of_turns_are_joined() -> None:
    parts = [
        Conditions(40.0, 60.0, 61.0, 1000.0, None, {"power": 0.5}),
        Conditions(50.0, 55.0, 70.0, 2000.0, 900.0, {"heat": 1.0}),
    ]
    readings = [
        _reading(1.0, seconds=seconds, conditions=one) for one, seconds in zip(parts, (1.0, 3.0), strict=True)
    ]
    joined = join_accounts([_account(one) for one in readings]).devices[0].conditions
    assert joined == Conditions(40.0, 55.0, 70.0, 1750.0, None, {"power": 0.5, "heat": 1.0})


# ---- cycles in pairs ----


def _point(**cycles: tuple[str, list[float]]) -> PointResult:
    found = [
        CycleTurns(cycle=int(name[1:]), pair=pair, metrics={"seconds": values})
        for name, (pair, values) in cycles.items()
    ]
    return PointResult(id="a", axes={}, config={}, config_hash="0", metrics={}, turns=found)


def test_ratio_of_a_cycle_is_that_of_its_neighbouring_turns() -> None:
    """The machine slows down by half: the reference's first turn and the candidate's last are the slow ones."""
    candidate = _point(c1=("a", [1.1, 2.2, 1.1, 2.2]))
    reference = _point(c1=("a", [1.0, 2.0, 1.0, 2.0]))
    values, others = in_pairs(candidate, reference, "seconds", {1: 1.3}, {1: 1.5})
    assert values[1] / others[1] == pytest.approx(1.1)


def test_cycle_of_which_one_side_was_measured_again_is_no_pair() -> None:
    candidate, reference = _point(c1=("a", [1.0]), c2=("b", [1.0])), _point(c1=("a", [1.0]), c2=("c", [1.0]))
    values, _ = in_pairs(candidate, reference, "seconds", {1: 1.0, 2: 1.0}, {1: 1.0, 2: 1.0})
    assert [*values] == [1]


def test_metric_without_turns_is_compared_by_cycle() -> None:
    point = _point(c1=("a", [1.0]))
    values, others = in_pairs(point, point, "model_memory_mb", {1: 3.0}, {1: 2.0})
    assert (values, others) == ({1: 3.0}, {1: 2.0})


# ---- two that cannot be loaded together ----


def _cycles_reason(tmp_path: Path, host: Host, **changes: Any) -> str | None:
    study = {"name": "s", "model": "builtin:tiny-llama", "sweep": {"n": [1]}, **changes}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    preflight = Preflight(load_study(tmp_path / "study.yaml"), (), [], host)
    return whole_cycles_reason(load_study(tmp_path / "study.yaml").points[0].config, preflight, preflight)


def test_two_that_do_not_fit_into_memory_alternate_by_cycle(tmp_path: Path) -> None:
    assert _cycles_reason(tmp_path, Host(2**33)) is None
    reason = not_none(_cycles_reason(tmp_path, Host(2**29)))
    assert reason.startswith("two of them need about ")
    assert reason.endswith(", and there are 0.5 GiB")


def test_engine_that_reserves_most_of_a_gpu_alternates_by_cycle(tmp_path: Path) -> None:
    host = Host(2**40, (GpuCapacity("H200", 2**37, (9, 0)),))
    reason = not_none(_cycles_reason(tmp_path, host, backend="vllm"))
    assert reason == (
        "each side reserves 90% of the GPU's memory, so that two do not fit: "
        "set vllm.engine.gpu_memory_utilization to at most 0.45"
    )
    for engine in ({"gpu_memory_utilization": 0.45}, {"kv_cache_memory_bytes": 10**9}):
        assert _cycles_reason(tmp_path, host, backend="vllm", vllm={"engine": engine}) is None


def test_share_of_processes_is_what_turns_do_not_explain() -> None:
    """The pairs differ by 10 %, and their turns by 1 %."""
    turns = [[1.0, 1.01, 0.99, 1.0], [1.1, 1.11, 1.09, 1.1], [0.9, 0.91, 0.89, 0.9]]
    candidate = _point(**{f"c{number}": (str(number), one) for number, one in enumerate(turns, 1)})
    reference = _point(**{f"c{number}": (str(number), [1.0] * 4) for number in (1, 2, 3)})
    assert not_none(share_of_processes(candidate, reference, "seconds", [1, 2, 3])) > 0.95
    assert share_of_processes(candidate, reference, "model_memory_mb", [1, 2, 3]) is None
    assert share_of_processes(candidate, reference, "seconds", [1]) is None
