"""What all experiments of a session share: import path, controller, and whether the hub answers.

Importing it does not import pytest.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_llem._plugin.shared_state import SharedState
from pytest_llem.planning.preflight import Preflight, hub_unreachable
from pytest_llem.study.config import ExperimentConfig

if TYPE_CHECKING:
    import pytest


def import_path(config: pytest.Config) -> list[Path]:
    """Return where an engine of the user's own is looked for, whatever the interpreter."""
    try:
        own = config.getini("pythonpath")
    except ValueError:  # its plugin is switched off
        own = []
    return [config.rootpath, *own]


def controller(config: pytest.Config) -> int | None:
    """Return the process of xdist's controller, where this is a worker on the same machine."""
    found: int | None = getattr(config, "workerinput", {}).get("llem_controller")
    return found


#: Where it is noted on the board: not under a study.
_HUB, _ANSWER = "hub", "answer"


def hub_unreachable_for(board: SharedState, preflight: Preflight, config: ExperimentConfig) -> str | None:
    """Return why an experiment is not to ask the hub, as it gave no answer to the session's first that would have.

    None where it answered, or where the experiment does not need it. So a hub that cannot be reached costs its
    timeout once, and not once in each experiment's process.
    """
    if not preflight.asks_hub(config):
        return None
    known = board.read(_HUB, _ANSWER)
    if known is None:
        known = {"unreachable": hub_unreachable()}
        with suppress(OSError):  # then the next one asks again
            board.put(_HUB, _ANSWER, known)
    reason: str | None = known["unreachable"]
    return reason
