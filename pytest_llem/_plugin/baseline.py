"""Read the baseline that a session compares with."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence

import pytest

from pytest_llem._plugin.options import Settings
from pytest_llem._plugin.stash import REMOTE
from pytest_llem.gates.baselines import BaselineError, is_name, load
from pytest_llem.hardware.gpus import visible_gpus
from pytest_llem.results.environment import processor
from pytest_llem.results.points import Testbed
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.design import StudyConfig

#: Keys of :func:`local_testbeds`.
_TESTBEDS: pytest.StashKey[Sequence[str]] = pytest.StashKey()


def baseline_of(config: pytest.Config, study: StudyConfig, testbeds: Sequence[str] = ()) -> StudyResult | None:
    """Return the baseline of a study that fits the testbed; None without ``--llem-baseline``.

    Args:
        config: pytest's configuration.
        study: The study.
        testbeds: Keys of the testbeds of its results, the likeliest first. Those of :func:`local_testbeds` come
            after them, unless workers on other hosts measured the results.

    Raises:
        BaselineError: The baseline does not exist, fits none of the testbeds, is too old, or cannot be read.
    """
    settings = Settings.from_config(config)
    if settings.baseline is None:
        return None
    if _TESTBEDS not in config.stash:
        config.stash[_TESTBEDS] = [one.key for one in local_testbeds()]
    elsewhere = bool(testbeds) and config.stash.get(REMOTE, False)
    try:
        return load(
            settings.baseline,
            settings.baseline_dir,
            study.name,
            testbeds=[*testbeds, *([] if elsewhere else config.stash[_TESTBEDS])],
            only_fitting=True,
            max_age=settings.baseline_max_age,
        )
    except BaselineError as error:
        if not error.renew or not is_name(settings.baseline) or settings.baseline.endswith(".json"):
            raise
        file = os.path.relpath(study.path, config.invocation_params.dir)
        command = shlex.join(["pytest", file, "-p", "llem", "--llem-save", settings.baseline])
        raise BaselineError(f"{error}; save it: {command}") from error


def local_testbeds() -> list[Testbed]:
    """Return the testbeds that results of this machine can have, the likeliest first.

    Which devices an engine uses is known only once it runs: all GPUs, those of one model, or none.
    """
    found = processor()
    cpu, cpus = found["cpu_model"], found["cpus_allowed"]
    limits: dict[str, set[str]] = {}
    for gpu in visible_gpus().all:
        if gpu.name is not None:
            limits.setdefault(gpu.name, set()).update(
                [] if gpu.power_limit_w is None else [f"{gpu.power_limit_w:g} W"]
            )
    groups: list[tuple[str, ...]] = [(name,) for name in sorted(limits)]
    if len(limits) > 1:
        groups.insert(0, tuple(sorted(limits)))
    with_gpus = [
        Testbed(names, tuple(sorted(set().union(*(limits[name] for name in names)))), cpu, cpus)
        for names in groups
    ]
    return [*with_gpus, Testbed((), (), cpu, cpus)]
