"""Restrict an experiment's devices, as ``execution.devices`` says: cycles of a point share devices, or spread."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import pytest

from pytest_llem._plugin.node_ids import file_of
from pytest_llem._plugin.shared_state import ASSIGNED, BOUND, PLACED, REPLAYED, SharedState, topic_of
from pytest_llem._plugin.stash import SHARED_STATE
from pytest_llem.collection.items import experiment_of, run_of, study_of_item
from pytest_llem.execution.jobs import preflight_of_item
from pytest_llem.machine.device_request import DeviceRequest
from pytest_llem.results.manifest import stored_result
from pytest_llem.results.manifest_records import ManifestEntry
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Experiment, StudyConfig
from pytest_llem.study.server import SERVER
from pytest_llem.study.server_command import server_hash


def binding_key(config: ExperimentConfig, config_hash: str) -> str:
    """Return the key of what is on the same devices in all cycles: a point, or the server of several points."""
    return config_hash if config.backend != SERVER else f"server {server_hash(config)}"


def keeps_devices(study: StudyConfig) -> bool:
    """Return whether the cycles of each point have to be on the same devices."""
    return study.execution.devices == "same" and study.n_cycles > 1


def narrowed(
    request: DeviceRequest, study: StudyConfig, experiment: Experiment, bound: Collection[str] | None
) -> DeviceRequest:
    """Return *request* restricted to the devices that ``execution.devices`` allows for an experiment.

    Args:
        request: The devices that an experiment of its point may have.
        study: Its study.
        experiment: The experiment.
        bound: Devices of other cycles of its point; None if none has run.
    """
    if study.n_cycles == 1 or request.count == len(request.pool):
        return request
    if study.execution.devices == "spread":
        point = experiment.point
        key = binding_key(point.config, point.config_hash)
        first = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)  # points begin on different devices
        return request.among(request.sets[(first + experiment.cycle) % len(request.sets)])
    return request if bound is None else request.among(bound)


class Bindings:
    """The devices that the cycles of each point have in common, in all processes of a session.

    Args:
        shared_state: The session's shared state.
    """

    def __init__(self, shared_state: SharedState) -> None:
        self._shared_state = shared_state
        self._replayed: dict[tuple[str, str], list[str] | None] = {}

    def devices(self, run: str, study: StudyConfig, experiment: Experiment) -> list[str] | None:
        """Return the devices on which another cycle of an experiment's point (or server) ran; None if none did.

        That cycle may have been in an earlier run, which this run resumes.

        Args:
            run: Key of the experiment's run.
            study: Its study.
            experiment: The experiment.
        """
        if not keeps_devices(study):
            return None
        key = binding_key(experiment.point.config, experiment.point.config_hash)
        found: list[str] | None = self._shared_state.read(file_of(run), topic_of(BOUND, key))
        return found if found is not None else self._of_replayed(run, study, experiment)

    def bind(
        self,
        run: str,
        study: StudyConfig,
        experiment: Experiment,
        request: DeviceRequest,
        devices: Collection[str],
    ) -> bool:
        """Record the devices of an experiment, and return whether it may have them.

        It may not have them if another cycle of its point got other devices of the request in the meantime.
        """
        if not keeps_devices(study):
            return True
        key = binding_key(experiment.point.config, experiment.point.config_hash)
        with suppress(OSError):  # the shared state cannot be written: the cycles may then be on several devices
            first = self._shared_state.put_first(file_of(run), topic_of(BOUND, key), sorted(devices))
            return set(first) == set(devices) or not set(first) <= set(request.pool)
        return True

    def _of_replayed(self, run: str, study: StudyConfig, experiment: Experiment) -> list[str] | None:
        """Return the GPUs of a replayed result of an experiment's point; None if there is none."""
        published = self._shared_state.read(run, REPLAYED)
        if not published:
            return None
        key = run, experiment.point.config_hash
        if key not in self._replayed:
            names = (one.id for one in study.experiments if one.point is experiment.point)
            self._replayed[key] = next((found for name in names if (found := _gpus(published.get(name)))), None)
        return self._replayed[key]


_BINDINGS = pytest.StashKey[Bindings]()


def bindings_of(config: pytest.Config) -> Bindings:
    """Return the bindings of a pytest session."""
    if _BINDINGS not in config.stash:
        config.stash[_BINDINGS] = Bindings(config.stash[SHARED_STATE])
    return config.stash[_BINDINGS]


def request_of(item: pytest.Item) -> DeviceRequest:
    """Return the devices that *item*'s experiment may be given now."""
    run, experiment = run_of(item), experiment_of(item)
    study = study_of_item(item)
    request = preflight_of_item(item).request(experiment.point.config)
    return narrowed(request, study, experiment, bindings_of(item.config).devices(run, study, experiment))


def accept(item: pytest.Item, devices: Collection[str]) -> bool:
    """Record the devices that *item*'s experiment got, and return whether it may have them."""
    run, experiment = run_of(item), experiment_of(item)
    study = study_of_item(item)
    request = preflight_of_item(item).request(experiment.point.config)
    return bindings_of(item.config).bind(run, study, experiment, request, devices)


def assign(shared_state: SharedState, run: str, experiment: str, devices: Collection[str]) -> None:
    """Record the devices that the controller has chosen for an experiment, by its id."""
    with suppress(OSError):  # the worker then takes any
        shared_state.put(run, topic_of(ASSIGNED, experiment), list(devices))


def take_assigned(item: pytest.Item) -> list[str]:
    """Return and remove the devices that the controller has chosen for *item*'s experiment; empty if none."""
    topic = topic_of(ASSIGNED, experiment_of(item).id)
    return item.config.stash[SHARED_STATE].take(run_of(item), topic) or []


def report_placed(item: pytest.Item, devices: Collection[str]) -> None:
    """Report to the controller which other devices *item*'s experiment got than those chosen for it."""
    with suppress(OSError):  # the controller's choices are then less good
        topic = topic_of(PLACED, experiment_of(item).id)
        item.config.stash[SHARED_STATE].put(run_of(item), topic, list(devices))


def take_placed(shared_state: SharedState, run: str, experiment: str) -> list[str] | None:
    """Return and remove the devices that an experiment got instead of the chosen ones; None if there are none."""
    found: list[str] | None = shared_state.take(run, topic_of(PLACED, experiment))
    return found


def _gpus(stored: dict[str, object] | None) -> list[str]:
    """Return the UUIDs of the GPUs of a *stored* result, as published for replay; empty if unknown."""
    if stored is None:
        return []
    text = stored_result(Path(str(stored["directory"])), ManifestEntry.model_validate(stored["entry"]))
    gpus = json.loads(text)["environment"].get("gpus") if text is not None else None
    return [gpu["uuid"] for gpu in gpus or []]
