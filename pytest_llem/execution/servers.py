"""The forkservers of a session: ended with it, or when another study runs."""

from __future__ import annotations

import pytest

from pytest_llem.isolation.server import Servers
from pytest_llem.study.execution import ExecutionConfig

_SERVERS = pytest.StashKey[Servers]()


def servers_of(config: pytest.Config, study: str, execution: ExecutionConfig) -> Servers | None:
    """Return what a study's experiments are forked from, None where they are spawned.

    Args:
        config: Of the session.
        study: What no other study of the session is called.
        execution: How it is run.
    """
    if _SERVERS not in config.stash:
        if execution.start_method == "spawn":
            return None
        config.stash[_SERVERS] = Servers()
        config.add_cleanup(config.stash[_SERVERS].end)
    servers = config.stash[_SERVERS].of(study)
    return servers if execution.start_method == "forkserver" else None
