"""Run the experiments of two items, which are the sides of a comparison, alternately.

The item that comes first runs both, and puts the other one's outcome into the state that the session's processes
share. The other item takes it from there.
"""

from __future__ import annotations

import uuid
from dataclasses import replace

import pytest

from pytest_llem._plugin.node_ids import REFERENCE, is_reference, other_side
from pytest_llem._plugin.options import Settings
from pytest_llem._plugin.shared_state import INTERLEAVED, topic_of
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.collection.items import experiment_of, is_experiment, is_skipped, run_of, study_of_item
from pytest_llem.execution.device_lease import DeviceLease
from pytest_llem.execution.jobs import complete_job, forkservers_of_item, preflight_of_item
from pytest_llem.execution.model_servers import ModelServers, needs_server
from pytest_llem.execution.session_facts import session_name
from pytest_llem.execution.stopping import not_started_reason
from pytest_llem.execution.terminal_output import output_forwarder
from pytest_llem.isolation.interleaved import Side, run_interleaved
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.machine.neighbours import with_neighbours
from pytest_llem.measurement.turns import MIN_TURNS
from pytest_llem.planning.plan import whole_cycles_reason
from pytest_llem.study.design import Experiment

#: The items of experiments by the key of their run and their id.
_ITEMS = pytest.StashKey[dict[tuple[str, str], pytest.Item]]()


def run_alternately(item: pytest.Item, partner: pytest.Item, lease: DeviceLease, timeout: float) -> Outcome:
    """Run the experiments of an item and its *partner* alternately, and return the item's outcome.

    The partner's outcome is put where its item finds it. A contended pair is not repeated: what else ran affected
    both sides alike.

    Args:
        item: The item that came first.
        partner: The item of the other side of the comparison.
        lease: The item's lease, which holds for both.
        timeout: Time limit of the item's own experiment, in s.
    """
    experiment, gates = experiment_of(item), study_of_item(item).gates
    config, live_progress = experiment.point.config, lease.progress
    max_turn_seconds = config.measurement.min_window_seconds / MIN_TURNS
    turns = {"pair": uuid.uuid4().hex[:16], "min_seconds": min(gates.min_turn_seconds, max_turn_seconds)}
    timeout += preflight_of_item(partner).deadline_seconds(config)
    gap, erase = lease.take_gap(), live_progress.erase if live_progress is not None else lambda: None

    servers = ModelServers.of(item.config)
    started = servers.get_all([one for one in (item, partner) if needs_server(one)], lease)
    if isinstance(started, Outcome):
        other = Outcome(error=started.error) if started.error else started
        item.config.stash[SHARED_STATE].put(run_of(partner), _topic(experiment), other.to_plain())
        return started
    server_of = dict(zip((item, partner), started, strict=False))

    def side(one: pytest.Item) -> Side:
        run, server = run_of(one), server_of.get(one)
        job = replace(complete_job(one, lease.allocation, gap), turns=turns)
        return Side(
            REFERENCE if is_reference(run) else "candidate",
            job if server is None else server.job(job),
            timeout,
            forkservers_of_item(one),
            lease.take_process() if one is item else None,
            output_forwarder(one.config, erase),
            server.record.pid if server is not None else None,
        )

    try:
        outcome, other = run_interleaved(side(item), side(partner), watcher=live_progress)
    finally:
        erase()  # pytest continues its own line
    if server_of:
        outcome = server_of[item].conclude(item, outcome)
        other = server_of[partner].conclude(partner, other)
        if outcome.error is not None or other.error is not None:
            servers.stop()
    if live_progress is not None:
        live_progress.completed = outcome.error is None
    devices, session = lease.allocation.devices, session_name(item.config)
    outcome, other = (with_neighbours(one, devices, session) for one in (outcome, other))
    item.config.stash[SHARED_STATE].put(run_of(partner), _topic(experiment), other.to_plain())
    return outcome


def partner_of(item: pytest.Item) -> pytest.Item | None:
    """Return the item of the other side of a comparison, if it is measured alternately with *item*, else None."""
    run, experiment, settings = run_of(item), experiment_of(item), Settings.from_config(item.config)
    if settings.against is None or study_of_item(item).gates.interleave == "cycle":
        return None
    known = item.config.stash.setdefault(_ITEMS, {})
    if not known:
        known |= {(run_of(one), experiment_of(one).id): one for one in item.session.items if is_experiment(one)}
    partner = known.get((other_side(run), experiment.id))
    if partner is None or is_skipped(partner) or not_started_reason(partner) is not None:
        return None
    own, others = preflight_of_item(item), preflight_of_item(partner)
    point = experiment.point
    if others.refusal(point) is not None or whole_cycles_reason(point.config, own, others) is not None:
        return None
    return partner


def was_measured_with_partner(item: pytest.Item) -> bool:
    """Return whether *item*'s experiment has been measured already, alternately with the other side's."""
    topic = _topic(experiment_of(item))
    return item.config.stash[SHARED_STATE].read(run_of(item), topic) is not None


def take_from_partner(item: pytest.Item) -> Outcome | None:
    """Return the outcome that was measured alternately by the item of the other side; None if there is none."""
    content = item.config.stash[SHARED_STATE].take(run_of(item), _topic(experiment_of(item)))
    return None if content is None else Outcome.from_plain(content)


def _topic(experiment: Experiment) -> str:
    return topic_of(INTERLEAVED, experiment.id)
