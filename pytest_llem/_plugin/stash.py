"""What is kept of a session, on pytest's ``Config``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_llem._plugin.shared_state import SharedState
    from pytest_llem.study.design import Experiment, StudyConfig

#: The studies of this session, by the node id of their file.
STUDIES: pytest.StashKey[dict[str, StudyConfig]] = pytest.StashKey()

#: What the recorder tells the processes that run experiments.
SHARED_STATE: pytest.StashKey[SharedState] = pytest.StashKey()

#: What the items of experiments call, in a process that runs them. It returns why one failed, or skips the item.
RUN_EXPERIMENT: pytest.StashKey[Callable[[Experiment, pytest.Item], str | None]] = pytest.StashKey()

#: The axes that the session's -k expression names.
SELECTED_AXES: pytest.StashKey[list[str]] = pytest.StashKey()
