"""Determine how many experiments can run at a time, which is the number of xdist's workers with ``-n auto``."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping

import pytest

from pytest_llem._plugin.options import Settings
from pytest_llem._plugin.stash import REMOTE
from pytest_llem.execution.scheduling import are_all_studies, distributes_one_at_a_time
from pytest_llem.execution.session_facts import import_path
from pytest_llem.machine.device_locks import CPU, DeviceError, free_devices
from pytest_llem.machine.device_request import DeviceRequest
from pytest_llem.planning.plan import Plan
from pytest_llem.planning.preflight import Preflight
from pytest_llem.study.loading import load_study
from pytest_llem.study.problems import StudyError


def auto_workers(config: pytest.Config) -> int | None:
    """Return the number of workers with ``-n auto``: one for each set of devices that is free now, at least one.

    Returns:
        None to leave it to xdist, if any argument is not a study or the user has set another number.
    """
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") or config.option.numprocesses != "auto":
        return None
    if not are_all_studies(config):
        return None
    settings = Settings.from_config(config)
    requests: list[DeviceRequest] = []
    for argument in config.args:
        try:
            study = load_study(config.invocation_params.dir / argument.partition("::")[0], settings.overrides)
        except (StudyError, OSError):  # reported when a worker collects it
            continue
        preflight = Preflight(study, settings.model_path, import_path(config))
        requests += [preflight.request(point.config) for point in study.points if point.skip is None]
    unique = set(requests)
    try:
        free = free_devices({device for one in unique for device in one.pool})
    except DeviceError:  # reported by the experiments
        return 1
    return max(1, _at_a_time(unique, free))


def _at_a_time(requests: Iterable[DeviceRequest], free: set[str]) -> int:
    """Return how many experiments can run at a time on *free* devices."""
    numbers = (len(free.intersection(one.pool)) // one.count for one in requests if one.count)
    return max(numbers, default=0)


def parallelism(config: pytest.Config, plans: Mapping[str, Plan]) -> tuple[int, str | None]:
    """Return how many experiments of *plans* run at a time, and the plan's line about xdist's workers.

    Args:
        config: The configuration of xdist's controller, or of a run without xdist.
        plans: The plans by run key.

    Returns:
        1 and None in a run without xdist, or if one of xdist's own schedulers distributes the experiments.
    """
    if getattr(config.option, "dist", "no") == "no" or not distributes_one_at_a_time(config):
        return 1, None
    workers = len(config.option.tx)
    if config.stash.get(REMOTE, False):  # the devices of this host say nothing about theirs
        return workers, f"workers: {workers}, on other hosts"
    found = {plan.preflight.request(point.config) for plan in plans.values() for point in plan.points}
    requests = [one for one in found if one.count]
    possible = _at_a_time(requests, {device for one in requests for device in one.pool})
    at_a_time = max(1, min(workers, possible))
    text = f"workers: {workers}"
    if workers > at_a_time:
        text += f", of which {at_a_time} can measure at a time"
    return at_a_time, f"{text} ({_devices(requests)})" if requests else None


def _devices(requests: Collection[DeviceRequest]) -> str:
    """Return which devices the experiments take."""
    if all(one.pool == (CPU,) for one in requests):
        return "experiments run on the CPU, one at a time"
    counts = sorted({one.count for one in requests})
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    gpus = max((len(one.pool) for one in requests), default=0)
    return f"an experiment takes {number} of {gpus} GPU{'s' * (gpus > 1)}"
