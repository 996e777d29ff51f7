"""What a study's test items do: run one experiment in a process of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_llem._plugin.node_ids import PAYLOAD_ATTRIBUTE, file_of, is_reference
from pytest_llem._plugin.options import Settings
from pytest_llem._plugin.shared_state import REPEATED, STOPPED
from pytest_llem._plugin.stash import SHARED_STATE, STUDIES
from pytest_llem.collection.items import run_of
from pytest_llem.execution.idle_power import keep_idle_power, known_idle_power, no_context_fields
from pytest_llem.execution.live_line import say
from pytest_llem.execution.output import add_section, output_forwarder
from pytest_llem.execution.replay import forget, replayed
from pytest_llem.execution.servers import servers_of
from pytest_llem.execution.session_resources import controller, hub_unreachable_for, import_path
from pytest_llem.isolation.launcher import ExperimentProcess, Job, run_isolated
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.measurement.progress import Progress
from pytest_llem.planning.deadline import deadline_seconds
from pytest_llem.planning.preflight import Preflight
from pytest_llem.results.contention import ContendedRun, contended_run
from pytest_llem.results.experiment import GapRecord, Identity
from pytest_llem.results.models import ErrorRecord
from pytest_llem.study.design import Experiment, StudyConfig
from pytest_llem.study.execution import ExecutionConfig

if TYPE_CHECKING:
    from pytest_llem.execution.live_progress import LiveProgress

#: What an item's experiment came to: plain data that rides on the report to the recorder.
PAYLOAD = pytest.StashKey[dict[str, Any]]()

#: The preflight of each run, by its key.
_PREFLIGHTS = pytest.StashKey[dict[str, Preflight]]()


@dataclass
class DeviceLease:
    """What an item has while its devices are leased to it.

    Attributes:
        devices: Their names; none where they cannot be leased.
        refusal: Then, why.
        gap: The idle time before the item's first run, up to then.
        next_gap: Has the devices ready for a further run, and returns the idle time before it.
        process: The item's process, where that has been started ahead and not been used yet.
        drain: Takes over a process that has left its result, and has yet to exit. None to wait for that.
        progress: Shows how far the experiment is; None where no terminal does.
    """

    devices: Collection[str] = ()
    refusal: str | None = None
    gap: GapRecord | None = None
    next_gap: Callable[[], GapRecord | None] = lambda: None
    process: ExperimentProcess | None = None
    drain: Callable[[ExperimentProcess], None] | None = None
    progress: LiveProgress | None = None

    def take_gap(self) -> GapRecord | None:
        """Return the idle time before this run: a plugin may run the item again, inside the item's protocol."""
        gap, self.gap = self.gap, None
        return gap or self.next_gap()

    def take_process(self) -> ExperimentProcess | None:
        """Return the process that was started ahead, for the first run of the item."""
        process, self.process = self.process, None
        return process


#: An item's lease, while it has one.
LEASE = pytest.StashKey[DeviceLease]()

#: The user property of an experiment that was not run: the results directory that its result is from.
REPLAYED_PROPERTY = "llem_replayed_from"

#: Figures that go into the report's user properties, and so into JUnit XML.
#: Their names there are made once: reports stay to the end of the session.
PROPERTIES = {
    name: f"llem_{name}"
    for name in ("energy_per_output_token_j", "output_tokens_per_second", "ttft_p50_ms", "seconds", "energy_j")
}


def run_item(planned: Experiment, item: pytest.Item) -> str | None:
    """Run *planned*, keep its outcome for the report, and return why it failed, if it did, in words."""
    error = _outcome_of(planned, item)
    return None if error is None else explain(error, item.config.option.tbstyle)


def _outcome_of(planned: Experiment, item: pytest.Item) -> ErrorRecord | None:
    """Run *planned*, keep its outcome for the report, and return why it failed, if it did."""
    run = run_of(item)
    study = item.config.stash[STUDIES][run]
    stored = replayed(item, planned)
    forget(item)
    if stored is not None:
        return _keep(item, planned, stored.outcome, stored.source, stored.mismatch)
    if (reason := stopped(item)) is not None:
        pytest.skip(reason)
    preflight = preflight_of(item.config, run, study)
    lease = item.stash.get(LEASE, DeviceLease())
    refusal = preflight.reason(planned.point) or lease.refusal
    if refusal is not None:
        outcome = Outcome(error=ErrorRecord(kind="preflight", type="PreflightError", message=refusal))
    else:
        config = planned.point.config
        size = preflight.footprint(config)
        item.config.stash[SHARED_STATE].register_worker()
        timeout = deadline_seconds(config, study.execution, size, preflight.host_of(config))
        outcome = _run_until_uncontended(item, study, planned, lease, timeout)
        if outcome.result is not None:
            python = study.interpreter(config.backend)
            keep_idle_power(item.config.stash[SHARED_STATE], planned.point.config_hash, python, outcome.result)
    add_section(item, outcome.output, failed=outcome.error is not None)
    return _keep(item, planned, outcome)


def start_early(item: pytest.Item, planned: Experiment) -> ExperimentProcess:
    """Return a process for *planned* that is yet to be started, and that *item* uses if it still fits then."""
    run = run_of(item)
    study = item.config.stash[STUDIES][run]
    servers = servers_of(item.config, file_of(run), study.execution)
    return ExperimentProcess(_early_job(study, planned, item), servers, early=True)


def _run_until_uncontended(
    item: pytest.Item, study: StudyConfig, planned: Experiment, lease: DeviceLease, timeout: float
) -> Outcome:
    """Run *planned*, and again where it was contended, as often as the study allows; the last run counts."""
    repeats: list[ContendedRun] = []
    output = ""
    while True:
        job = replace(_job(study, planned, item, lease), repeats=[one.model_dump(mode="json") for one in repeats])
        outcome = _run(item, job, study.execution, lease, timeout)
        output += outcome.output
        contended = contended_run(outcome.result)
        if contended is None or not _may_repeat(item, study, planned):
            return replace(outcome, output=output)
        repeats.append(contended)
        say(item.config, f"{planned.id} is contended, and measured again: {'; '.join(contended.reasons)}")


def _may_repeat(item: pytest.Item, study: StudyConfig, planned: Experiment) -> bool:
    """Whether the study allows one more repetition of *planned*'s point; it is counted."""
    board, name = item.config.stash[SHARED_STATE], planned.point.config_hash
    topics = (f"{REPEATED}-{name}-{number}" for number in range(study.execution.contended_retries))
    return any(board.claim(run_of(item), topic) for topic in topics)


def _run(item: pytest.Item, job: Job, execution: ExecutionConfig, lease: DeviceLease, timeout: float) -> Outcome:
    """Run *job*, with whoever looks on."""
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
        erase()  # pytest goes on with its own line
    if live_progress is not None:
        live_progress.completed = outcome.error is None
    return outcome


def _keep(
    item: pytest.Item,
    planned: Experiment,
    outcome: Outcome,
    source: str | None = None,
    mismatch: str | None = None,
) -> ErrorRecord | None:
    """Keep *outcome* on *item* for the report, and return its error.

    Args:
        item: Whose experiment it is.
        planned: That experiment.
        outcome: What came of it.
        source: The results directory that it is from, where it was not run.
        mismatch: Then, what has changed since it was measured.
    """
    payload = _payload(run_of(item), planned, outcome, item.config)
    item.stash[PAYLOAD] = payload | {"replayed_from": source, "replay_mismatch": mismatch}
    properties = _properties(outcome.result)
    if source is not None:
        properties.append((REPLAYED_PROPERTY, source))
    others = [one for one in item.user_properties if not one[0].startswith("llem_")]  # a rerun replaces ours
    item.user_properties[:] = others + properties
    return outcome.error


def stopped(item: pytest.Item) -> str | None:
    """Return why no more experiments of *item*'s study are run; None while they are."""
    reason: str | None = item.config.stash[SHARED_STATE].read(run_of(item), STOPPED)
    return reason


def preflight_of(config: pytest.Config, run: str, study: StudyConfig) -> Preflight:
    """Return the preflight of a run of *study*, by the run's key."""
    known = config.stash.setdefault(_PREFLIGHTS, {})
    if run not in known:
        known[run] = Preflight(study, Settings.from_config(config).model_path, _import_path(config, run))
    return known[run]


def _import_path(config: pytest.Config, run: str) -> list[Path]:
    """Return where an engine of the user's own is looked for.

    The reference has its own, installed there: with what lies here both sides would be the same.
    """
    return [] if is_reference(run) else import_path(config)


def _job(study: StudyConfig, planned: Experiment, item: pytest.Item, lease: DeviceLease) -> Job:
    """Return what is to be done, to be told once the devices are the item's and idle."""
    point, board = planned.point, item.config.stash[SHARED_STATE]
    gap = lease.take_gap()
    return replace(
        _early_job(study, planned, item),
        gap=gap.model_dump(mode="json") if gap else None,
        idle_power=known_idle_power(board, point.config_hash, study.interpreter(point.config.backend)),
        no_context=no_context_fields(board, point.config, lease.devices),
        hub_unreachable=hub_unreachable_for(board, preflight_of(item.config, run_of(item), study), point.config),
    )


def _early_job(study: StudyConfig, planned: Experiment, item: pytest.Item) -> Job:
    """Return what is to be done, as far as that can be told before."""
    point = planned.point
    python = study.interpreter(point.config.backend)
    pytest_processes = [os.getpid(), *([pid] if (pid := controller(item.config)) else [])]
    run = run_of(item)
    settings = Settings.from_config(item.config)
    identity = Identity(
        experiment_id=planned.id,
        config_hash=point.config_hash,
        study_design_hash=study.design_hash,
        axes=point.axes,
        cycle=planned.cycle,
    )
    return Job(
        identity=identity.model_dump(mode="json"),
        config=point.config.model_dump(mode="json"),
        directory=str(study.path.parent),
        root=str(_working_tree(item.config, python if is_reference(run) else None)),
        model_path=[str(folder) for folder in settings.model_path],
        python_path=[str(folder) for folder in _import_path(item.config, run)],
        watch_pids=pytest_processes[1:],
        harness=pytest_processes,
        python=str(python) if python else None,
        carbon=None
        if settings.carbon_intensity is None
        else {"intensity": settings.carbon_intensity, "pue": settings.pue},
    )


def _working_tree(config: pytest.Config, reference: Path | None) -> Path:
    """Return where the commit that is measured is checked out: for the reference, around its interpreter.

    Nobody knows where that has its code from if it lies in the same tree: then it is nowhere.
    """
    if reference is None:
        return config.rootpath
    folder = reference.parent
    return Path("/") if folder.is_relative_to(config.rootpath) else folder


def _payload(run: str, planned: Experiment, outcome: Outcome, config: pytest.Config) -> dict[str, Any]:
    """Return *outcome* as what may cross from an xdist worker to the controller."""
    return {
        "run": run,
        "experiment_id": planned.id,
        "result": outcome.result,
        "files": outcome.files,
        "error": outcome.error.model_dump(mode="json") if outcome.error else None,
        "worker": getattr(config, "workerinput", {}).get("workerid"),
    }


def explain(error: ErrorRecord, style: str = "auto") -> str:
    """Return what a person is told about a failed experiment.

    Args:
        error: Why it failed.
        style: As pytest's ``--tb`` has it; ``line`` and ``no`` leave the traceback out.
    """
    phase = f" while {error.phase}" if error.phase and error.kind != "preflight" else ""
    parts = [f"{error.kind}{phase}", error.type if error.kind in ("exception", "oom") else "", error.message]
    text = ": ".join(part for part in parts if part)
    if error.kind == "timeout":
        text += " (--llem-timeout, or experiment_timeout_seconds in the study, gives it longer)"
    return f"{text}\n\n{error.traceback}" if error.traceback and style not in ("line", "no") else text


def attach_payload(item: pytest.Item, report: pytest.TestReport) -> None:
    """Put what came of *item*'s experiment on its report, as plain JSON."""
    if PAYLOAD in item.stash:
        setattr(report, PAYLOAD_ATTRIBUTE, item.stash[PAYLOAD])
        del item.stash[PAYLOAD]


def place_skip(item: pytest.Item, report: pytest.TestReport) -> None:
    """Say of an experiment that was skipped while it ran that it was so in its study, and not in this module."""
    if report.skipped and isinstance(report.longrepr, tuple) and report.longrepr[0] == __file__:
        path, line, _ = item.reportinfo()
        report.longrepr = str(path), (line or 0) + 1, report.longrepr[2]


def _properties(result: str | None) -> list[tuple[str, object]]:
    """Return a result's main figures as a report's user properties, which JUnit XML shows."""
    if result is None:
        return []
    metrics = json.loads(result)["metrics"]
    figures = ((shown, metrics[name]["value"]) for name, shown in PROPERTIES.items())
    return [
        *((name, value) for name, value in figures if value is not None),
        ("llem_energy_method", metrics["energy_j"]["method"]),
    ]
