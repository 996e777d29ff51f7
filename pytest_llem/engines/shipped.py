"""What is known of the engines of this package without importing their libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from pytest_llem.engines import command
from pytest_llem.engines.packages import DATASETS, Packages
from pytest_llem.engines.pytorch import requirements as pytorch
from pytest_llem.engines.vllm import requirements as vllm
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engines import (
    COMMAND,
    CommandConfig,
    EngineOptions,
    Needs,
    PyTorchConfig,
    VLLMConfig,
)
from pytest_llem.study.server import ServerConfig


@dataclass(frozen=True)
class ShippedEngine:
    """An engine of this package.

    Attributes:
        options: Class of its options.
        supports: Abilities of its class, as :func:`pytest_llem.engines.options.abilities` returns them.
        unmet_requirements: Returns why an experiment cannot run in an environment, one sentence for each reason.
        optional_modules: Modules that only some of its experiments need.
        checks_options: Whether only the library that it runs can check its options.
    """

    options: type[EngineOptions]
    supports: frozenset[str]
    unmet_requirements: Callable[[ExperimentConfig, Packages], list[str]]
    optional_modules: tuple[str, ...] = ()
    checks_options: bool = False


def _unmet_by_server(config: ExperimentConfig, packages: Packages) -> list[str]:
    """Return why no load can be put on a server."""
    if packages.has("aiohttp"):
        return []
    return [f"backend 'server' needs aiohttp: {packages.pip} install 'pytest-llem[server]'"]


SHIPPED = {
    "pytorch": ShippedEngine(
        options=PyTorchConfig,
        supports=frozenset({"model_shape", "prefill_only", "preload"}),
        unmet_requirements=pytorch.unmet_requirements,
        optional_modules=pytorch.OPTIONAL,
    ),
    "vllm": ShippedEngine(
        options=VLLMConfig,
        supports=frozenset({"cache_memory", "prefill_only"}),
        unmet_requirements=vllm.unmet_requirements,
        optional_modules=("vllm",),
        checks_options=True,
    ),
    "server": ShippedEngine(
        options=ServerConfig,
        supports=frozenset(),
        unmet_requirements=_unmet_by_server,
        optional_modules=("aiohttp",),
    ),
    COMMAND: ShippedEngine(
        options=CommandConfig,
        supports=frozenset(),
        unmet_requirements=command.unmet_requirements,
    ),
}

#: Engines about which everything is known without importing them.
KNOWN_WHOLLY = {name for name, engine in SHIPPED.items() if not engine.checks_options}

#: Modules that only some experiments need.
OPTIONAL_MODULES = (DATASETS, *(module for engine in SHIPPED.values() for module in engine.optional_modules))


def shipped_needs(config: ExperimentConfig, parameters: int | None = None) -> Needs | None:
    """Return what an experiment of an engine of this package needs; None for another engine.

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
