"""Read the options of the engine ``pytorch`` and of its subclasses."""

from __future__ import annotations

from typing import Any

from pytest_llem.engines.options import check_options
from pytest_llem.study.config import ExperimentConfig


def with_pytorch_options(engine: Any, config: ExperimentConfig) -> ExperimentConfig:
    """Return *config* with the options of its engine under ``pytorch``, also for a subclass of that engine.

    Args:
        engine: The class ``PyTorchEngine`` or a subclass.
        config: The experiment.

    Raises:
        PreflightError: An option of a subclass is unknown, or its value is wrong.
    """
    if config.pytorch is not None:
        return config
    check_options(engine, config)
    return config.model_copy(update={"pytorch": engine.options.from_config(config)})
