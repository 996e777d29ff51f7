"""Distribute experiments to xdist's workers: the load points of one server go to one worker."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from xdist.scheduler.loadscope import LoadScopeScheduling

from pytest_llem._plugin.declarations import YAML_SUFFIXES
from pytest_llem._plugin.node_ids import EXPERIMENTS, match_id, parse, run_key
from pytest_llem.study.server import SERVER

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.workermanage import WorkerController

    from pytest_llem.study.design import StudyConfig


#: A study's line that names the backend of servers.
_SERVER_BACKEND = re.compile(rf"backend:.*\b{SERVER}\b")

#: Number of items that a worker has to know in order to run one.
_MIN_PENDING = 2


def make_scheduler(
    config: pytest.Config, log: Producer, studies: Callable[[], Mapping[str, StudyConfig]]
) -> StudyScheduling | None:
    """Return the scheduler of a session whose arguments are studies of servers; None to leave the choice to xdist.

    Args:
        config: The controller's configuration.
        log: xdist's log.
        studies: Returns the studies by the key of their run, once workers have collected.
    """
    files = [config.invocation_params.dir / argument.partition("::")[0] for argument in config.args]
    if config.option.dist != "load" or not all(file.suffix in YAML_SUFFIXES for file in files):
        return None
    return StudyScheduling(config, log, studies) if any(map(_may_have_servers, files)) else None


def _may_have_servers(study: Path) -> bool:
    """Return whether a study names the backend of servers. The controller reads no study before its workers."""
    with suppress(OSError):
        return _SERVER_BACKEND.search(study.read_text(encoding="utf-8", errors="replace")) is not None
    return False


class StudyScheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
    """Sends the experiments that share a server to one worker together, and every other item alone.

    xdist's own groups (``--dist loadgroup``) change the ids of items, and its default sends items in chunks, so
    that each worker would start the same server.
    """

    def __init__(
        self, config: pytest.Config, log: Producer, studies: Callable[[], Mapping[str, StudyConfig]]
    ) -> None:
        super().__init__(config, log)
        self._studies = studies

    def _reschedule(self, node: WorkerController) -> None:
        """Give *node* more work. A worker runs an item once it knows the next one, or that there is none.

        xdist's own method may leave a worker that replaces another one with a single item, which it never runs.
        """
        super()._reschedule(node)
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) < _MIN_PENDING:
            super()._reschedule(node)  # which shuts it down if no work is left

    def _split_scope(self, nodeid: str) -> str:
        node = parse(nodeid)
        study = None if node is None else self._studies().get(run_key(node.file, EXPERIMENTS[0]))
        if node is None or study is None or node.function not in EXPERIMENTS:
            return nodeid
        by_id = {one.id: one for one in study.experiments}
        name = match_id(node.name, by_id)
        if name is None or by_id[name].point.config.backend != SERVER:
            return nodeid
        return f"{node.file} {study.server_group(by_id[name])}"
