"""Describe the engines of pytest-llem's own without importing their libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from pytest_llem.engines.requirements import (
    DATASETS,
    PYTORCH_OPTIONAL,
    Packages,
    unmet_by_command,
    unmet_by_pytorch,
    unmet_by_server,
    unmet_by_vllm,
)
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import EngineOptions, Needs
from pytest_llem.study.engines import COMMAND, CommandConfig, PyTorchConfig, VLLMConfig
from pytest_llem.study.server import ServerConfig


@dataclass(frozen=True)
class ShippedEngine:
    """An engine of pytest-llem's own.

    Attributes:
        options: Class of its options.
        supports: Abilities of its class, as :func:`pytest_llem.engines.options.abilities` returns them.
        unmet_requirements: Yields why an experiment cannot run in an environment, one sentence for each reason.
        optional_modules: Modules that only some of its experiments need.
        checks_options: Whether only the library that it runs can check its options.
    """

    options: type[EngineOptions]
    supports: frozenset[str]
    unmet_requirements: Callable[[ExperimentConfig, Packages], Iterable[str]]
    optional_modules: tuple[str, ...] = ()
    checks_options: bool = False


SHIPPED = {
    "pytorch": ShippedEngine(
        options=PyTorchConfig,
        supports=frozenset({"model_shape", "prefill_only", "preload"}),
        unmet_requirements=unmet_by_pytorch,
        optional_modules=PYTORCH_OPTIONAL,
    ),
    "vllm": ShippedEngine(
        options=VLLMConfig,
        supports=frozenset({"cache_memory", "prefill_only"}),
        unmet_requirements=unmet_by_vllm,
        optional_modules=("vllm",),
        checks_options=True,
    ),
    "server": ShippedEngine(
        options=ServerConfig,
        supports=frozenset(),
        unmet_requirements=unmet_by_server,
        optional_modules=("aiohttp",),
    ),
    COMMAND: ShippedEngine(
        options=CommandConfig,
        supports=frozenset(),
        unmet_requirements=unmet_by_command,
    ),
}

#: Engines whose options can be checked without importing their libraries.
KNOWN_WHOLLY = {name for name, engine in SHIPPED.items() if not engine.checks_options}

#: Modules that only some experiments need.
OPTIONAL_MODULES = (DATASETS, *(module for engine in SHIPPED.values() for module in engine.optional_modules))


def shipped_needs(config: ExperimentConfig, parameters: int | None = None) -> Needs | None:
    """Return what an experiment needs from its engine, if that is one of pytest-llem's own; else None.

    Args:
        config: The experiment.
        parameters: Number of the model's weights; None if unknown.
    """
    engine = SHIPPED.get(config.backend)
    if engine is None:
        return None
    section = getattr(config, config.backend)
    options = section if isinstance(section, engine.options) else engine.options.from_config(config)
    return replace(options.needs(config, parameters), supports=engine.supports)
