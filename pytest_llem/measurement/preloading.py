"""What an experiment imports, imported ahead: while nothing is measured yet, and no device is open."""

from __future__ import annotations

from pathlib import Path

from pytest_llem import registry
from pytest_llem.engines.protocol import EngineContext

# Not used here: so that it is there.
from pytest_llem.measurement import orchestrator as orchestrator
from pytest_llem.study.config import ExperimentConfig


def preload(config: ExperimentConfig, model_path: tuple[Path, ...]) -> None:
    """Import an experiment's engine, and what that has imported ahead if it is a :class:`SupportsPreload`.

    Args:
        config: The experiment.
        model_path: Folders that hold models by name.

    Raises:
        Exception: It cannot be imported, in whatever way that shows.
    """
    engine = registry.load(registry.BACKENDS, config.backend)
    if hasattr(engine, "preload"):
        engine.preload(config, EngineContext(model_path))
