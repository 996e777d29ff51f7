"""``--llem-resume``: experiments that an earlier run has completed are not run again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pytest_llem.board import REPLAYED
from pytest_llem.isolation.launcher import Outcome
from pytest_llem.options import BOARD, Settings
from pytest_llem.planning.present import here
from pytest_llem.planning.resume import Replay, Resume, ResumeError
from pytest_llem.results.manifest import stored_files, stored_result
from pytest_llem.results.models import ManifestEntry
from pytest_llem.study.design import Experiment, StudyConfig

_REPLAYS = pytest.StashKey[dict[str, Replay]]()


def replays_of(config: pytest.Config, studies: Mapping[str, StudyConfig]) -> dict[str, Replay]:
    """Return what is replayed of each study, by the node id of its file; nothing unless that was asked for.

    It is looked up once in a session: the results directories that it makes are newer than any.

    Raises:
        pytest.UsageError: An earlier run cannot be taken up.
    """
    settings = Settings.from_config(config)
    if not settings.resume:
        return {}
    if _REPLAYS not in config.stash:
        resume = Resume(settings.resume_from, settings.resume_anyway, here)
        try:
            found = {
                file: resume.of(study, settings.results_dir_of(study, config.rootpath))
                for file, study in studies.items()
            }
        except ResumeError as error:
            raise pytest.UsageError(str(error)) from error
        replays = {file: replay for file, replay in found.items() if replay is not None}
        if settings.resume_from and not replays:
            raise pytest.UsageError(
                f"--llem-resume-from: {settings.resume_from} is of none of the collected studies"
            )
        config.stash[_REPLAYS] = replays
    return config.stash[_REPLAYS]


def announce(config: pytest.Config, replays: Mapping[str, Replay]) -> None:
    """Tell the processes that run experiments which of them they need not run."""
    for file, replay in replays.items():
        notice = {
            name: {"directory": str(stored.directory), "entry": stored.entry.model_dump(mode="json")}
            for name, stored in replay.results.items()
        }
        config.stash[BOARD].post(file, REPLAYED, notice)


def is_replayed(item: pytest.Item, experiment: Experiment) -> bool:
    """Whether the *experiment* of *item* has a result from an earlier run."""
    return experiment.id in _notice(item)


def replayed(item: pytest.Item, experiment: Experiment) -> tuple[Outcome, str] | None:
    """Return the stored outcome of *item*'s experiment and the name of the directory it is from.

    Returns:
        None where it is to be run: also where the result is not there any more.
    """
    if (stored := _notice(item).get(experiment.id)) is None:
        return None
    directory, entry = Path(stored["directory"]), ManifestEntry.model_validate(stored["entry"])
    result = stored_result(directory, entry)
    return None if result is None else (Outcome(result, stored_files(directory, entry)), directory.name)


def _notice(item: pytest.Item) -> dict[str, Any]:
    assert item.parent is not None
    return item.config.stash[BOARD].read(item.parent.nodeid, REPLAYED) or {}
