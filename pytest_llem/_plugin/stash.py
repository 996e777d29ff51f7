"""Keys of the session's data in ``pytest.Config.stash``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_llem._plugin.shared_state import SharedState
    from pytest_llem.study.design import Experiment, StudyConfig

#: The collected studies by the key of their run.
STUDIES: pytest.StashKey[dict[str, StudyConfig]] = pytest.StashKey()

#: Values shared by the processes of the session.
SHARED_STATE: pytest.StashKey[SharedState] = pytest.StashKey()

#: Function that runs the experiment of an item. It returns an error message or None, or skips the item.
RUN_EXPERIMENT: pytest.StashKey[Callable[[Experiment, pytest.Item], str | None]] = pytest.StashKey()

#: Whether experiments run on other hosts, of which this process, the controller, knows nothing.
REMOTE: pytest.StashKey[bool] = pytest.StashKey()

#: Axes named in the session's -k expression.
SELECTED_AXES: pytest.StashKey[list[str]] = pytest.StashKey()

#: Whether a result file was collected, to be judged by budgets.
RESULTS: pytest.StashKey[bool] = pytest.StashKey()

#: YAML files that are not collected, as they are in a directory and do not match the ini option llem_files.
OTHER_YAML: pytest.StashKey[list[Path]] = pytest.StashKey()
