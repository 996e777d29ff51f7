"""Run a study's test item: one experiment in a process of its own."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llem._plugin.node_ids import (
    EXPERIMENT,
    PAYLOAD_ATTRIBUTE,
    REFERENCE,
    file_of,
    is_reference,
    run_key,
)
from pytest_llem._plugin.options import WORKTREE, Settings
from pytest_llem._plugin.shared_state import DECIDED, IN_TURNS, REPEATED, STOPPED
from pytest_llem._plugin.stash import SHARED_STATE, STUDIES
from pytest_llem.collection.items import experiment_of, is_experiment, is_skipped, run_of
from pytest_llem.execution import time_budget
from pytest_llem.execution.idle_power import keep_idle_power, known_idle_power, no_context_fields
from pytest_llem.execution.live_line import print_line
from pytest_llem.execution.output import add_section, output_forwarder
from pytest_llem.execution.replay import forget_replayed, import_path_of, replayed
from pytest_llem.execution.servers import servers_of
from pytest_llem.execution.session_resources import controller, hub_unreachable_for
from pytest_llem.isolation.interleaved import Side, run_interleaved
from pytest_llem.isolation.launcher import ExperimentProcess, Job, run_isolated
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.measurement.progress import Progress
from pytest_llem.measurement.turns import MIN_TURNS
from pytest_llem.planning.forecast import expected
from pytest_llem.planning.interleaving import cycles_reason
from pytest_llem.planning.preflight import Preflight
from pytest_llem.results.contention import ContendedRun, contended_run
from pytest_llem.results.experiment import GapRecord, Identity
from pytest_llem.results.models import ErrorRecord
from pytest_llem.study.design import Experiment, StudyConfig
from pytest_llem.study.execution import ExecutionConfig

if TYPE_CHECKING:
    from pytest_llem.execution.live_progress import LiveProgress

#: The outcome of an item's experiment: plain data that the report carries to the recorder.
PAYLOAD = pytest.StashKey[dict[str, Any]]()

#: The items of experiments by the key of their run and their id.
_ITEMS = pytest.StashKey[dict[tuple[str, str], pytest.Item]]()

#: The preflight of each run, by its key.
_PREFLIGHTS = pytest.StashKey[dict[str, Preflight]]()


@dataclass
class DeviceLease:
    """Exclusive use of devices by one item.

    Attributes:
        devices: Device names; empty if they could not be leased.
        refusal: Why they could not be leased; None if they were.
        gap: Idle time before the item's first run; None once that run has taken it.
        next_gap: Gets the devices ready for another run, and returns the idle time before it.
        process: The item's process if it was started early and is not used yet.
        drain: Takes over a process that has left its result and has not exited yet; None to wait for its exit.
        progress: Shows the live progress; None without a terminal.
    """

    devices: Collection[str] = ()
    refusal: str | None = None
    gap: GapRecord | None = None
    next_gap: Callable[[], GapRecord | None] = lambda: None
    process: ExperimentProcess | None = None
    drain: Callable[[ExperimentProcess], None] | None = None
    progress: LiveProgress | None = None

    def take_gap(self) -> GapRecord | None:
        """Return the idle time before this run. A plugin may run the item several times under one lease."""
        gap, self.gap = self.gap, None
        return gap or self.next_gap()

    def take_process(self) -> ExperimentProcess | None:
        """Return the process that was started early; None after the item's first run."""
        process, self.process = self.process, None
        return process


#: An item's lease while it runs.
LEASE = pytest.StashKey[DeviceLease]()

#: The user property of a replayed experiment: the results directory of its result.
REPLAYED_PROPERTY = "llem_replayed_from"

#: Metrics that go into the report's user properties, which JUnit XML shows, and their names there. The names are
#: shared strings, as pytest keeps every report to the end of the session.
PROPERTIES = {
    name: f"llem_{name}"
    for name in ("energy_per_output_token_j", "output_tokens_per_second", "ttft_p50_ms", "seconds", "energy_j")
}


def run_item(experiment: Experiment, item: pytest.Item) -> str | None:
    """Run *experiment*, keep its outcome for the report, and return its error message; None if it passed."""
    error = _outcome_of(experiment, item)
    return None if error is None else explain(error, item.config.option.tbstyle)


def _outcome_of(experiment: Experiment, item: pytest.Item) -> ErrorRecord | None:
    """Run or replay *experiment*, keep its outcome for the report, and return its error; None if it passed."""
    run = run_of(item)
    study = item.config.stash[STUDIES][run]
    stored = replayed(item, experiment)
    forget_replayed(item)
    if stored is not None:
        return _keep(item, experiment, stored.outcome, stored.source, stored.mismatch)
    if (taken := _take_from_partner(item, experiment)) is not None:
        add_section(item, taken.output, failed=taken.error is not None)
        return _keep(item, experiment, taken)
    if (reason := stopped(item)) is not None:
        pytest.skip(reason)
    preflight = preflight_of(item.config, run, study)
    lease = item.stash.get(LEASE, DeviceLease())
    refusal = preflight.reason(experiment.point) or lease.refusal
    if refusal is not None:
        outcome = Outcome(error=ErrorRecord(kind="preflight", type="PreflightError", message=refusal))
    else:
        config = experiment.point.config
        item.config.stash[SHARED_STATE].register_worker()
        timeout = preflight.deadline_seconds(config)
        if (partner := _partner_of(item, experiment)) is not None:
            outcome = _run_in_turns(item, partner, experiment, lease, timeout)
        else:
            outcome = _run_until_uncontended(item, study, experiment, lease, timeout)
        if outcome.result is not None:
            python = study.interpreter(config.backend)
            keep_idle_power(item.config.stash[SHARED_STATE], experiment.point.config_hash, python, outcome.data)
    add_section(item, outcome.output, failed=outcome.error is not None)
    return _keep(item, experiment, outcome)


def start_early(item: pytest.Item, experiment: Experiment) -> ExperimentProcess:
    """Return a process for *experiment* that is not started yet. *item* uses it if its job is still the same."""
    run = run_of(item)
    study = item.config.stash[STUDIES][run]
    servers = servers_of(item.config, file_of(run), study.execution)
    return ExperimentProcess(_early_job(study, experiment, item), servers, early=True)


def _run_until_uncontended(
    item: pytest.Item, study: StudyConfig, experiment: Experiment, lease: DeviceLease, timeout: float
) -> Outcome:
    """Run *experiment*, and repeat it while it is contended, as often as the study allows. The last run counts."""
    repeats: list[ContendedRun] = []
    output = ""
    while True:
        job = replace(
            _job(study, experiment, item, lease, lease.take_gap()),
            repeats=[one.model_dump(mode="json") for one in repeats],
        )
        outcome = _run(item, job, study.execution, lease, timeout)
        output += outcome.output
        contended = contended_run(outcome.data)
        if contended is None or not _may_repeat(item, study, experiment):
            return replace(outcome, output=output) if repeats else outcome
        repeats.append(contended)
        print_line(
            item.config, f"{experiment.id} is contended and is measured again: {'; '.join(contended.reasons)}"
        )


def _run_in_turns(
    item: pytest.Item, partner: pytest.Item, experiment: Experiment, lease: DeviceLease, timeout: float
) -> Outcome:
    """Run *experiment* and that of *partner*, which is the other side of a comparison, alternately.

    The partner's outcome is put where its item finds it. A contended pair is not repeated: what else ran affected
    both sides alike.
    """
    gates = item.config.stash[STUDIES][run_of(item)].gates
    config, live_progress = experiment.point.config, lease.progress
    max_seconds = config.measurement.min_window_seconds / MIN_TURNS
    turns = {"pair": uuid.uuid4().hex[:16], "min_seconds": min(gates.min_turn_seconds, max_seconds)}
    timeout += _preflight(partner).deadline_seconds(config)
    gap, erase = lease.take_gap(), live_progress.erase if live_progress is not None else lambda: None

    def side(one: pytest.Item) -> Side:
        run = run_of(one)
        study = one.config.stash[STUDIES][run]
        return Side(
            REFERENCE if is_reference(run) else "candidate",
            replace(_job(study, experiment, one, lease, gap), turns=turns),
            timeout,
            servers_of(one.config, file_of(run), study.execution),
            lease.take_process() if one is item else None,
            output_forwarder(one.config, erase),
        )

    try:
        outcome, other = run_interleaved(side(item), side(partner), watcher=live_progress)
    finally:
        erase()  # pytest continues its own line
    if live_progress is not None:
        live_progress.completed = outcome.error is None
    item.config.stash[SHARED_STATE].put(run_of(partner), _turns_topic(experiment), other.to_plain())
    return outcome


def _partner_of(item: pytest.Item, experiment: Experiment) -> pytest.Item | None:
    """Return the item of the other side of a comparison, if it is measured alternately with *item*, else None."""
    run, settings = run_of(item), Settings.from_config(item.config)
    if settings.against is None or item.config.stash[STUDIES][run].gates.interleave == "cycle":
        return None
    known = item.config.stash.setdefault(_ITEMS, {})
    if not known:
        known |= {(run_of(one), experiment_of(one).id): one for one in item.session.items if is_experiment(one)}
    function = EXPERIMENT if is_reference(run) else REFERENCE
    partner = known.get((run_key(file_of(run), function), experiment.id))
    if partner is None or is_skipped(partner) or stopped(partner) is not None:
        return None
    sides = _preflight(item), _preflight(partner)
    if sides[1].reason(experiment.point) is not None or cycles_reason(experiment.point.config, *sides) is not None:
        return None
    return partner


def was_measured_with_partner(item: pytest.Item) -> bool:
    """Return whether *item*'s experiment has been measured already, alternately with its reference."""
    topic = _turns_topic(experiment_of(item))
    return item.config.stash[SHARED_STATE].read(run_of(item), topic) is not None


def _take_from_partner(item: pytest.Item, experiment: Experiment) -> Outcome | None:
    """Return the outcome that was measured alternately by the item of the other side; None if there is none."""
    content = item.config.stash[SHARED_STATE].take(run_of(item), _turns_topic(experiment))
    return None if content is None else Outcome.from_plain(content)


def _turns_topic(experiment: Experiment) -> str:
    return f"{IN_TURNS}-{hashlib.sha256(experiment.id.encode()).hexdigest()[:16]}"


def _preflight(item: pytest.Item) -> Preflight:
    run = run_of(item)
    return preflight_of(item.config, run, item.config.stash[STUDIES][run])


def _may_repeat(item: pytest.Item, study: StudyConfig, experiment: Experiment) -> bool:
    """Return whether the study allows one more repetition of *experiment*'s point, and count it."""
    shared_state, name = item.config.stash[SHARED_STATE], experiment.point.config_hash
    topics = (f"{REPEATED}-{name}-{number}" for number in range(study.execution.contended_retries))
    return any(shared_state.claim(run_of(item), topic) for topic in topics)


def _run(item: pytest.Item, job: Job, execution: ExecutionConfig, lease: DeviceLease, timeout: float) -> Outcome:
    """Run *job* and show its progress."""
    live_progress = lease.progress
    erase = live_progress.erase if live_progress is not None else lambda: None
    if live_progress is not None:
        live_progress.see(Progress("starting"))
    try:
        outcome = run_isolated(
            job,
            servers=servers_of(item.config, file_of(run_of(item)), execution),
            started=lease.take_process(),
            timeout=timeout,
            watcher=live_progress,
            on_output=output_forwarder(item.config, erase),
            on_result=lease.drain,
        )
    finally:
        erase()  # pytest continues its own line
    if live_progress is not None:
        live_progress.completed = outcome.error is None
    return outcome


def _keep(
    item: pytest.Item,
    experiment: Experiment,
    outcome: Outcome,
    source: str | None = None,
    mismatch: str | None = None,
) -> ErrorRecord | None:
    """Keep *outcome* on *item* for the report, and return its error.

    Args:
        item: The experiment's item.
        experiment: The experiment.
        outcome: Its outcome.
        source: Results directory of a replayed outcome; None if the experiment was run.
        mismatch: What has changed since a replayed outcome was measured; None if nothing has.
    """
    payload = _payload(run_of(item), experiment, outcome, item.config)
    item.stash[PAYLOAD] = payload | {"replayed_from": source, "replay_mismatch": mismatch}
    properties = _properties(outcome.data)
    if source is not None:
        properties.append((REPLAYED_PROPERTY, source))
    others = [one for one in item.user_properties if not one[0].startswith("llem_")]  # a rerun replaces them
    item.user_properties[:] = others + properties
    return outcome.error


def stopped(item: pytest.Item) -> str | None:
    """Return why *item*'s experiment does not start any more; None if it may.

    Its study was stopped, its point is decided, or the time budget is used up.
    """
    run, experiment, shared_state = run_of(item), experiment_of(item), item.config.stash[SHARED_STATE]
    reason: str | None = shared_state.read(run, STOPPED)
    if reason is not None:
        return reason
    decided = shared_state.read(file_of(run), f"{DECIDED}-{experiment.point.config_hash}")
    if decided is not None and experiment.cycle > decided[0]:
        return str(decided[1])
    if Settings.from_config(item.config).time_budget is None:
        return None
    expected_s = expected(experiment.point, item.config.stash[STUDIES][run], _preflight(item))
    return time_budget.exceeded(item.config, 0.0 if expected_s is None else expected_s.each)


def preflight_of(config: pytest.Config, run: str, study: StudyConfig) -> Preflight:
    """Return the preflight of a run of *study*; *run* is the run's key."""
    known = config.stash.setdefault(_PREFLIGHTS, {})
    if run not in known:
        known[run] = Preflight(
            study, Settings.from_config(config).model_path, import_path_of(config, reference=is_reference(run))
        )
    return known[run]


def _job(
    study: StudyConfig, experiment: Experiment, item: pytest.Item, lease: DeviceLease, gap: GapRecord | None
) -> Job:
    """Return the complete job. Call it once the devices are leased and idle."""
    point, shared_state = experiment.point, item.config.stash[SHARED_STATE]
    return replace(
        _early_job(study, experiment, item),
        gap=gap.model_dump(mode="json") if gap else None,
        idle_power=known_idle_power(shared_state, point.config_hash, study.interpreter(point.config.backend)),
        no_context=no_context_fields(shared_state, point.config, lease.devices),
        hub_unreachable=hub_unreachable_for(
            shared_state, preflight_of(item.config, run_of(item), study), point.config
        ),
    )


def _early_job(study: StudyConfig, experiment: Experiment, item: pytest.Item) -> Job:
    """Return the job as far as it is known before the devices are leased."""
    point = experiment.point
    python = study.interpreter(point.config.backend)
    pytest_processes = [os.getpid(), *([pid] if (pid := controller(item.config)) else [])]
    run = run_of(item)
    settings, worktree = Settings.from_config(item.config), item.config.stash.get(WORKTREE, None)
    allocation = preflight_of(item.config, run, study).allocation(point.config)
    identity = Identity(
        experiment_id=experiment.id,
        config_hash=point.config_hash,
        study_design_hash=study.design_hash,
        axes=point.axes,
        cycle=experiment.cycle,
    )
    return Job(
        identity=identity.model_dump(mode="json"),
        config=point.config.model_dump(mode="json"),
        directory=str(study.path.parent),
        root=str(_working_tree(item.config, python if is_reference(run) else None)),
        model_path=[str(folder) for folder in settings.model_path],
        python_path=[str(folder) for folder in import_path_of(item.config, reference=is_reference(run))],
        watch_pids=pytest_processes[1:],
        harness=pytest_processes,
        python=str(python) if python else None,
        carbon=None
        if settings.carbon_intensity is None
        else {"intensity": settings.carbon_intensity, "pue": settings.pue},
        devices=allocation.devices if allocation.environment else (),
        variables=allocation.environment,
        not_from=(str(worktree.repository), str(worktree.folder))
        if worktree is not None and is_reference(run)
        else None,
    )


def _working_tree(config: pytest.Config, reference: Path | None) -> Path:
    """Return the folder whose git commit is recorded: for the reference, the one around its interpreter.

    A reference interpreter inside the candidate's tree may have its code from anywhere, so the folder is ``/``,
    which is in no working tree.
    """
    if reference is None:
        return config.rootpath
    if (worktree := config.stash.get(WORKTREE, None)) is not None:
        return worktree.folder
    folder = reference.parent
    return Path("/") if folder.is_relative_to(config.rootpath) else folder


def _payload(run: str, experiment: Experiment, outcome: Outcome, config: pytest.Config) -> dict[str, Any]:
    """Return *outcome* as plain data, which an xdist worker can send to the controller."""
    return {
        "run": run,
        "experiment_id": experiment.id,
        "result": outcome.result,
        "files": outcome.files,
        "error": outcome.error.model_dump(mode="json") if outcome.error else None,
        "worker": getattr(config, "workerinput", {}).get("workerid"),
    }


def explain(error: ErrorRecord, style: str = "auto") -> str:
    """Return the failure message of an experiment.

    Args:
        error: The experiment's error.
        style: Value of pytest's ``--tb``; ``line`` and ``no`` leave the traceback out.
    """
    phase = f" while {error.phase}" if error.phase and error.kind != "preflight" else ""
    parts = [f"{error.kind}{phase}", error.type if error.kind in ("exception", "oom") else "", error.message]
    text = ": ".join(part for part in parts if part)
    if error.kind == "timeout":
        text += " (raise --llem-timeout, or experiment_timeout_seconds in the study)"
    return f"{text}\n\n{error.traceback}" if error.traceback and style not in ("line", "no") else text


def attach_payload(item: pytest.Item, report: pytest.TestReport) -> None:
    """Put the outcome of *item*'s experiment on its report, as plain JSON."""
    if PAYLOAD in item.stash:
        setattr(report, PAYLOAD_ATTRIBUTE, item.stash[PAYLOAD])
        del item.stash[PAYLOAD]


def place_skip(item: pytest.Item, report: pytest.TestReport) -> None:
    """Report the study file as the location of a skip that was raised in this module."""
    if report.skipped and isinstance(report.longrepr, tuple) and report.longrepr[0] == __file__:
        path, line, _ = item.reportinfo()
        report.longrepr = str(path), (line or 0) + 1, report.longrepr[2]


def _properties(result: Mapping[str, Any]) -> list[tuple[str, object]]:
    """Return a result's main metrics as user properties of a report, which JUnit XML shows."""
    if not result:
        return []
    metrics = result["metrics"]
    values = ((shown, metrics[name]["value"]) for name, shown in PROPERTIES.items())
    return [
        *((name, value) for name, value in values if value is not None),
        ("llem_energy_method", metrics["energy_j"]["method"]),
    ]
