"""Find why a command cannot run, without running it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

from pytest_llem.engines.packages import Packages
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.substitution import command_values


def unmet_requirements(config: ExperimentConfig, packages: Packages) -> list[str]:
    """Return why *config* cannot run: one sentence for each problem, with what to do."""
    return list(_unmet(config))


def _unmet(config: ExperimentConfig) -> Iterator[str]:
    assert config.command is not None
    [program] = command_values(config, python="python").fill(config.command.run[:1])
    if "/" not in program and shutil.which(program) is None:
        yield f"command.run: program {program!r} not found in PATH: install it, or give its path"
    if config.passthrough_kwargs:
        yield "passthrough_kwargs: a command has none: write the arguments in command.run"
