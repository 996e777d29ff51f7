"""Keep the forkservers of a session. They end with the session, or when another study runs."""

from __future__ import annotations

import pytest

from pytest_llem.isolation.server import Servers
from pytest_llem.study.execution import ExecutionConfig

_SERVERS = pytest.StashKey[Servers]()


def servers_of(config: pytest.Config, study: str, execution: ExecutionConfig) -> Servers | None:
    """Return the forkservers of a study; None if its experiments are spawned.

    Args:
        config: The session's pytest configuration.
        study: A name that no other study of the session has.
        execution: The study's execution settings.
    """
    if _SERVERS not in config.stash:
        if execution.start_method == "spawn":
            return None
        config.stash[_SERVERS] = Servers()
        config.add_cleanup(config.stash[_SERVERS].end)
    servers = config.stash[_SERVERS].of(study)
    return servers if execution.start_method == "forkserver" else None
