"""Run a study's test item: one experiment in a process of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from pytest_llem._plugin.node_ids import PAYLOAD_ATTRIBUTE
from pytest_llem._plugin.shared_state import REPEATED
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.collection.items import experiment_of, run_of, study_of_item
from pytest_llem.execution.device_lease import LEASE, DeviceLease
from pytest_llem.execution.idle_power import keep_idle_power
from pytest_llem.execution.interleaving import partner_of, run_alternately, take_from_partner
from pytest_llem.execution.jobs import (
    complete_job,
    early_job,
    forkservers_of_item,
    idle_power_key,
    preflight_of_item,
)
from pytest_llem.execution.model_servers import ModelServers, needs_server
from pytest_llem.execution.replay import Replayed, forget_replayed, replayed
from pytest_llem.execution.session_facts import session_name, worker_id
from pytest_llem.execution.stopping import not_started_reason
from pytest_llem.execution.terminal_output import add_section, output_forwarder, print_line
from pytest_llem.isolation.launcher import ExperimentProcess, Job, run_isolated
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.machine.device_request import Allocation
from pytest_llem.machine.neighbours import with_neighbours
from pytest_llem.measurement.progress import Progress
from pytest_llem.results.contention import ContendedRun, contended_run
from pytest_llem.results.manifest_records import ErrorRecord
from pytest_llem.study.design import Experiment

#: The outcome of an item's experiment: plain data that the report carries to the recorder.
PAYLOAD = pytest.StashKey[dict[str, Any]]()

#: Name of the user property that gives the results directory of a replayed result.
REPLAYED_PROPERTY = "llem_replayed_from"

#: Metrics that go into the report's user properties, which JUnit XML shows, and their names there. The names are
#: shared strings, as pytest keeps every report to the end of the session.
PROPERTIES = {
    name: f"llem_{name}"
    for name in (
        *("energy_per_output_token_j", "output_tokens_per_second", "ttft_p50_ms", "seconds", "energy_j"),
        *("energy_per_good_token_j", "goodput_rps", "slo_attainment"),  # of a server under load
    )
}


def run_item(experiment: Experiment, item: pytest.Item) -> str | None:
    """Run *experiment*, keep its outcome for the report, and return its error message; None if it passed.

    Raises:
        pytest.skip.Exception: The experiment is not started any more.
    """
    error = _outcome_of(experiment, item)
    return None if error is None else explain(error, item.config.option.tbstyle)


def _outcome_of(experiment: Experiment, item: pytest.Item) -> ErrorRecord | None:
    """Run or replay *experiment*, keep its outcome for the report, and return its error; None if it passed."""
    study = study_of_item(item)
    stored = replayed(item, experiment)
    forget_replayed(item)
    if stored is not None:
        return _keep(item, experiment, stored.outcome, stored)
    if (taken := take_from_partner(item)) is not None:
        add_section(item, taken.output, failed=taken.error is not None)
        return _keep(item, experiment, taken)
    if (reason := not_started_reason(item)) is not None:
        pytest.skip(reason)
    preflight = preflight_of_item(item)
    lease = item.stash.get(LEASE, DeviceLease())
    refusal = preflight.refusal(experiment.point) or lease.refusal
    if refusal is not None:
        outcome = Outcome.refused(refusal)
    else:
        config = experiment.point.config
        item.config.stash[SHARED_STATE].register_worker()
        timeout = preflight.deadline_seconds(config)
        if (partner := partner_of(item)) is not None:
            outcome = run_alternately(item, partner, lease, timeout)
        else:
            outcome = _run_until_uncontended(item, lease, timeout)
            outcome = with_neighbours(outcome, lease.allocation.devices, session_name(item.config))
        if outcome.result is not None:
            key = idle_power_key(study, experiment.point, lease.allocation)
            keep_idle_power(item.config.stash[SHARED_STATE], *key, outcome.data)
    add_section(item, outcome.output, failed=outcome.error is not None)
    return _keep(item, experiment, outcome)


def start_early(item: pytest.Item, allocation: Allocation) -> ExperimentProcess:
    """Return a process for *item*, not started yet, which the item uses if its job is still the same."""
    return ExperimentProcess(early_job(item, allocation), forkservers_of_item(item), early=True)


def _run_until_uncontended(item: pytest.Item, lease: DeviceLease, timeout: float) -> Outcome:
    """Run *item*'s experiment, and repeat it while contended, as often as allowed. The last outcome counts."""
    contended_runs: list[ContendedRun] = []
    output = ""
    while True:
        job = replace(
            complete_job(item, lease.allocation, lease.take_gap()),
            contended_runs=[one.model_dump(mode="json") for one in contended_runs],
        )
        outcome = _run(item, job, lease, timeout)
        output += outcome.output
        contended = contended_run(outcome.data)
        if contended is None or not _may_repeat(item):
            return replace(outcome, output=output) if contended_runs else outcome
        contended_runs.append(contended)
        name, why = experiment_of(item).id, "; ".join(contended.reasons)
        print_line(item.config, f"{name} is contended and is measured again: {why}")


def _may_repeat(item: pytest.Item) -> bool:
    """Return whether the study allows one more repetition of the point of *item*'s experiment, and count it."""
    shared_state, name = item.config.stash[SHARED_STATE], experiment_of(item).point.config_hash
    topics = (f"{REPEATED}-{name}-{number}" for number in range(study_of_item(item).execution.contended_retries))
    return any(shared_state.claim(run_of(item), topic) for topic in topics)


def _run(item: pytest.Item, job: Job, lease: DeviceLease, timeout: float) -> Outcome:
    """Run *job* and show its progress."""
    if not needs_server(item):
        return _run_process(item, job, lease, timeout)
    servers = ModelServers.of(item.config)
    server = servers.get(item, lease)
    if isinstance(server, Outcome):
        return server
    drift, checks_drift = None, study_of_item(item).execution.check_drift
    if lease.ends_server and checks_drift and (first := server.first_before(item)) is not None:
        config, drift = first  # the last experiment on a server also measures the first load again
        timeout += preflight_of_item(item).deadline_seconds(config)
    job = server.job(job, drift)
    outcome = server.conclude(item, _run_process(item, job, lease, timeout))
    if outcome.error is not None:
        servers.stop(server.key)
    return outcome


def _run_process(item: pytest.Item, job: Job, lease: DeviceLease, timeout: float) -> Outcome:
    live_progress = lease.progress
    erase = live_progress.erase if live_progress is not None else lambda: None
    if live_progress is not None:
        live_progress.see(Progress("starting"))
    try:
        outcome = run_isolated(
            job,
            forkservers=forkservers_of_item(item),
            started=lease.take_process(),
            timeout=timeout,
            watcher=live_progress,
            on_output=output_forwarder(item.config, erase),
            on_result=lease.hand_over_process,
        )
    finally:
        erase()  # pytest continues its own line
    if live_progress is not None:
        live_progress.completed = outcome.error is None
    return outcome


def _keep(
    item: pytest.Item, experiment: Experiment, outcome: Outcome, stored: Replayed | None = None
) -> ErrorRecord | None:
    """Keep *outcome* on *item* for the report, and return its error.

    Args:
        item: The experiment's item.
        experiment: The experiment.
        outcome: Its outcome.
        stored: Where a replayed outcome is from; None if the experiment was run.
    """
    files = outcome.files
    if outcome.error is not None and outcome.output.strip():
        files = {**files, "output.txt": outcome.output}
    # Plain data, which an xdist worker can send to the controller.
    item.stash[PAYLOAD] = {
        "run": run_of(item),
        "experiment_id": experiment.id,
        "result": outcome.result,
        "files": files,
        "error": outcome.error.model_dump(mode="json") if outcome.error else None,
        "worker": worker_id(item.config),
        "replayed_from": stored.source if stored else None,
        "replay_mismatch": stored.mismatch if stored else None,
    }
    properties = _properties(outcome.data)
    if stored is not None:
        properties.append((REPLAYED_PROPERTY, stored.source))
    others = [one for one in item.user_properties if not one[0].startswith("llem_")]  # a rerun replaces them
    item.user_properties[:] = others + properties
    return outcome.error


def explain(error: ErrorRecord, style: str = "auto") -> str:
    """Return the failure message of an experiment.

    Args:
        error: The experiment's error.
        style: Value of pytest's ``--tb``; ``line`` and ``no`` leave the traceback out.
    """
    phase = f" while {error.phase}" if error.phase and error.kind != "preflight" else ""
    parts = [f"{error.kind}{phase}", error.type if error.kind in ("exception", "oom") else "", error.message]
    text = ": ".join(part for part in parts if part)
    if error.type == "Timeout":
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
    values = ((shown, metrics[name]["value"]) for name, shown in PROPERTIES.items() if name in metrics)
    return [
        *((name, value) for name, value in values if value is not None),
        ("llem_energy_method", metrics["energy_j"]["method"]),
    ]
