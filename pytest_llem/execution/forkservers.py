"""Keep the forkservers of a session. They end with the session, or when another study runs."""

from __future__ import annotations

import pytest

from pytest_llem.isolation.forkservers import ForkServers
from pytest_llem.study.execution import ExecutionConfig

_FORKSERVERS = pytest.StashKey[ForkServers]()


def forkservers_of(config: pytest.Config, study: str, execution: ExecutionConfig) -> ForkServers | None:
    """Return the forkservers of a study; None if its experiments are spawned.

    Args:
        config: The session's pytest configuration.
        study: A name that no other study of the session has.
        execution: The study's execution settings.
    """
    if _FORKSERVERS not in config.stash:
        if execution.start_method == "spawn":
            return None
        config.stash[_FORKSERVERS] = ForkServers()
        config.add_cleanup(config.stash[_FORKSERVERS].end)
    forkservers = config.stash[_FORKSERVERS].of(study)
    return forkservers if execution.start_method == "forkserver" else None
