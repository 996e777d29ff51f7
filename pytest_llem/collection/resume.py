"""``--llem-resume``: experiments that an earlier run has completed are not run again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pytest_llem.board import REPLAYED
from pytest_llem.collection.items import run_of
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.options import Settings
from pytest_llem.planning.present import here
from pytest_llem.planning.resume import Replay, Resume, ResumeError
from pytest_llem.results.manifest import stored_files, stored_result
from pytest_llem.results.models import ManifestEntry
from pytest_llem.stash import BOARD
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


@dataclass(frozen=True)
class Replayed:
    """What an earlier run has found: the outcome, and the name of the results directory that it is from."""

    outcome: Outcome
    source: str


_REPLAYED = pytest.StashKey[Replayed | None]()


def replayed(item: pytest.Item, experiment: Experiment) -> Replayed | None:
    """Return what stands for *item*'s experiment; None where it is to be run.

    Looked up once: who runs it is to have its devices, which those do not get who need not.
    """
    if _REPLAYED not in item.stash:
        item.stash[_REPLAYED] = _replayed(item, experiment)
    return item.stash[_REPLAYED]


def forget(item: pytest.Item) -> None:
    """Drop what stands for *item*'s experiment once it is on its report: items stay to the end of the session."""
    if _REPLAYED in item.stash:
        del item.stash[_REPLAYED]


def _replayed(item: pytest.Item, experiment: Experiment) -> Replayed | None:
    notice: dict[str, Any] = item.config.stash[BOARD].read(run_of(item), REPLAYED) or {}
    if (stored := notice.get(experiment.id)) is None:
        return None
    directory, entry = Path(stored["directory"]), ManifestEntry.model_validate(stored["entry"])
    result = stored_result(directory, entry)  # it may be gone by now
    return Replayed(Outcome(result, stored_files(directory, entry)), directory.name) if result else None
