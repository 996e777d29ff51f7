"""Values that all experiments of a session share: import path, controller, whether the Hugging Face hub answers.

This module does not import pytest, because :mod:`~pytest_llem.execution.isolated` must not.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llem._plugin.shared_state import SharedState
from pytest_llem.engines import hub
from pytest_llem.planning.preflight import Preflight
from pytest_llem.study.config import ExperimentConfig

if TYPE_CHECKING:
    import pytest


def import_path(config: pytest.Config) -> list[Path]:
    """Return the folders in which a user's own engine is looked for."""
    return [config.rootpath, *python_path(config)]


def python_path(config: pytest.Config) -> list[Path]:
    """Return the folders of pytest's ini key ``pythonpath``."""
    try:
        found: list[Path] = config.getini("pythonpath")
    except ValueError:  # pytest's plugin for this key is disabled
        return []
    return found


def controller(config: pytest.Config) -> int | None:
    """Return the process id of xdist's controller; None unless this is a worker on the same machine."""
    found: int | None = getattr(config, "workerinput", {}).get("llem_controller")
    return found


def worker_id(config: pytest.Config) -> str | None:
    """Return the id of the xdist worker that this process is, such as ``gw0``; None if it is not one."""
    found: str | None = getattr(config, "workerinput", {}).get("workerid")
    return found


def session_name(config: pytest.Config) -> str | None:
    """Return the unique name of a session of several processes; None for a session of one process."""
    found: str | None = getattr(config, "workerinput", {}).get("llem_session")
    return found


#: Key and topic of the hub's answer in the shared state. No run has this key.
_HUB, _ANSWER = "hub", "answer"


def hub_unreachable_reason(
    shared_state: SharedState, preflight: Preflight, config: ExperimentConfig
) -> str | None:
    """Return why an experiment must not ask the hub: the hub did not answer when it was asked in this session.

    A hub that cannot be reached then costs its timeout once in a session, not once in each experiment.

    Returns:
        None if the hub answered, or if the experiment does not need it.
    """
    if not preflight.needs_hub(config):
        return None
    known = shared_state.read(_HUB, _ANSWER)
    if known is None:
        known = {"unreachable": hub.unreachable_reason()}
        with suppress(OSError):  # the next experiment then asks again
            shared_state.put(_HUB, _ANSWER, known)
    reason: str | None = known["unreachable"]
    return reason
