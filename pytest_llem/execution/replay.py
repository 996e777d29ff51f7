"""``--llem-resume``: replay the results of experiments that an earlier run has completed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pytest_llem._plugin.options import WORKTREE, Settings
from pytest_llem._plugin.shared_state import REPLAYED
from pytest_llem._plugin.stash import REMOTE, SHARED_STATE
from pytest_llem.collection.items import run_of
from pytest_llem.execution.session_facts import import_path
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.planning.inputs import CurrentInputs
from pytest_llem.planning.resume import CurrentEnvironment, Replay, Resume, ResumeError
from pytest_llem.study.design import Experiment, StudyConfig

_REPLAYS = pytest.StashKey[dict[str, Replay]]()


def replays_of(config: pytest.Config, studies: Mapping[str, StudyConfig]) -> dict[str, Replay]:
    """Return the results to replay in each study, by run key; none without ``--llem-resume``.

    The lookup runs once in a session, before the session makes results directories of its own.

    Raises:
        pytest.UsageError: An earlier run cannot be resumed.
    """
    settings = Settings.from_config(config)
    if not settings.resume:
        return {}
    if _REPLAYS not in config.stash:
        shard = str(settings.shard) if settings.shard else None
        resume = Resume(settings.resume_from, shard, settings.resume_mismatch, partial(_environment, config))
        try:
            found = {
                run: resume.find(study, settings.results_dir_of(study, config.rootpath))
                for run, study in studies.items()
            }
        except ResumeError as error:
            raise pytest.UsageError(str(error)) from error
        replays = {run: replay for run, replay in found.items() if replay is not None}
        if settings.resume_from and not replays:
            raise pytest.UsageError(
                f"--llem-resume-from: {settings.resume_from} holds no results of the collected studies"
            )
        config.stash[_REPLAYS] = replays
    return config.stash[_REPLAYS]


def _environment(config: pytest.Config, study: StudyConfig) -> CurrentEnvironment:
    inputs = current_inputs(config, study)
    if config.stash.get(REMOTE, False):
        return CurrentEnvironment.of_other_hosts(inputs)
    return CurrentEnvironment.of_this_machine(study, inputs)


def current_inputs(config: pytest.Config, study: StudyConfig, *, reference: bool = False) -> CurrentInputs:
    """Return the code, the models and the datasets that experiments of *study* would use now.

    Args:
        config: The pytest configuration.
        study: The study.
        reference: Whether the experiments run in the reference's interpreter, which uses its installed engines.
    """
    return CurrentInputs(
        study,
        Settings.from_config(config).model_path,
        import_path_of(config, reference=reference),
        knows_packages=not config.stash.get(REMOTE, False),
    )


def import_path_of(config: pytest.Config, *, reference: bool) -> list[Path]:
    """Return the folders in which a user's own engine is looked for, after the interpreter's own path.

    A reference in another environment gets none: it uses the engine installed there, and would otherwise import
    the candidate's. A reference at a git revision gets the folders' counterparts in its worktree.
    """
    if not reference:
        return import_path(config)
    worktree = config.stash.get(WORKTREE, None)
    return [] if worktree is None else [worktree.counterpart(folder) for folder in import_path(config)]


def publish_replays(config: pytest.Config, replays: Mapping[str, Replay]) -> dict[str, list[str]]:
    """Publish the results to replay to all processes that run experiments.

    Returns:
        Names of the results directories from which each study is resumed, by run key.
    """
    for run, replay in replays.items():
        published = {
            name: {
                "directory": str(stored.directory),
                "entry": stored.entry.model_dump(mode="json"),
                "mismatch": stored.mismatch,
            }
            for name, stored in replay.results.items()
        }
        config.stash[SHARED_STATE].put(run, REPLAYED, published)
    return {run: replay.sources for run, replay in replays.items()}


@dataclass(frozen=True)
class Replayed:
    """The outcome of an experiment in an earlier run.

    Attributes:
        outcome: The outcome.
        source: Name of its results directory.
        mismatch: What has changed since it was measured; None if nothing has.
    """

    outcome: Outcome
    source: str
    mismatch: str | None


_REPLAYED = pytest.StashKey[Replayed | None]()


def replayed(item: pytest.Item, experiment: Experiment) -> Replayed | None:
    """Return the earlier outcome of *item*'s experiment; None if the experiment has to be run.

    The answer is looked up once, so that the lease, which precedes the run, and the run agree.
    """
    if _REPLAYED not in item.stash:
        item.stash[_REPLAYED] = _replayed(item, experiment)
    return item.stash[_REPLAYED]


def forget_replayed(item: pytest.Item) -> None:
    """Drop the earlier outcome from *item*, because items stay in memory to the end of the session."""
    if _REPLAYED in item.stash:
        del item.stash[_REPLAYED]


def _replayed(item: pytest.Item, experiment: Experiment) -> Replayed | None:
    published: dict[str, Any] = item.config.stash[SHARED_STATE].read(run_of(item), REPLAYED) or {}
    if (stored := published.get(experiment.id)) is None:
        return None
    found = item.config.stash[SHARED_STATE].stored_result(stored["directory"], stored["entry"])
    if found is None:  # the file was removed meanwhile
        return None
    return Replayed(Outcome(*found), Path(stored["directory"]).name, stored["mismatch"])
