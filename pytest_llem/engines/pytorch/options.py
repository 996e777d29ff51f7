"""Check an engine's section of a study for options that the engine does not read."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pytest_llem.engines.protocol import PreflightError
from pytest_llem.engines.pytorch.requirements import LORA
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engines import PyTorchConfig
from pytest_llem.study.problems import did_you_mean, shown


def check_options(engine: Any, config: ExperimentConfig) -> None:
    """Refuse options in *config* that its engine does not read.

    Args:
        engine: The engine's class.
        config: The experiment.

    Raises:
        PreflightError: There are such options. The message names each with its location in the study.
    """
    read: Collection[str] = getattr(engine, "option_names", ())
    problems = [
        f"{config.backend}.{name}: the engine has no such option{_hint(name, read)}"
        for name, value in config.engine_section.items()
        if name not in read and value is not None  # null stands for the default
    ]
    if config.passthrough_kwargs and not getattr(engine, "reads_passthrough_kwargs", False):
        problems.append(f"passthrough_kwargs: engine {config.backend!r} does not read them: leave them out")
    if config.lora is not None and config.backend != "pytorch":  # unmet_requirements() reports it for pytorch
        problems.append(LORA)
    if problems:
        raise PreflightError("; ".join(problems))


def _hint(name: str, read: Collection[str]) -> str:
    if not read:
        return " (it has none: an engine lists its options in option_names)"
    return did_you_mean(name, tuple(sorted(read))) or f" (there are: {', '.join(sorted(read))})"


def with_pytorch_options(config: ExperimentConfig) -> ExperimentConfig:
    """Return *config* with the options of its engine under ``pytorch``, also for a subclass of that engine.

    Raises:
        PreflightError: A subclass's section has a value that is invalid for ``pytorch``.
    """
    if config.pytorch is not None:
        return config
    section = config.engine_section
    given = {name: value for name, value in section.items() if name in PyTorchConfig.model_fields}
    try:
        options = PyTorchConfig.model_validate(given)
        options.check_batch_size(config.n)
    except ValidationError as error:
        raise PreflightError("; ".join(_sentence(config.backend, one) for one in error.errors())) from error
    except ValueError as error:
        raise PreflightError(f"{config.backend}: {error}") from error
    return config.model_copy(update={"pytorch": options})


def _sentence(section: str, error: ErrorDetails) -> str:
    if error["type"] == "value_error":  # options that contradict each other
        return f"{section}: {error['ctx']['error']}"
    return f"{section}.{error['loc'][0]}: {error['msg']} (got {shown(error['input'])})"
