"""Import engines, before an experiment or to check that they can be imported.

This runs in the engine's interpreter and in a process of its own, because an engine may import anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from pytest_llem import registry
from pytest_llem.engines.protocol import BatchEngine, Engine, EngineContext
from pytest_llem.study.config import ExperimentConfig

#: Methods that an engine's class must have.
METHODS = sorted(
    name
    for protocol in (Engine, BatchEngine)
    for name, part in vars(protocol).items()
    if callable(part) and not name.startswith("_")
)


def import_problems(engines: Iterable[str]) -> dict[str, str]:
    """Import engines, and return the problem of each one that cannot be used, by its name.

    Args:
        engines: Names of entry points, or ``package.module:Class``.
    """
    return {name: problem for name in engines if (problem := _problem(name)) is not None}


def missing_methods(engine: object) -> str | None:
    """Return the methods that an engine's class does not have, as a message; None if it has all."""
    abstract = getattr(engine, "__abstractmethods__", ())
    missing = [name for name in METHODS if name in abstract or not hasattr(engine, name)]
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"missing methods: {', '.join(missing[:3])}{more}" if missing else None


def _problem(name: str) -> str | None:
    try:
        return missing_methods(registry.load(registry.ENGINE_GROUP, name))
    except (LookupError, ImportError) as error:
        return str(error)
    except (Exception, SystemExit) as error:  # a third-party module may raise anything
        return f"importing it raises {type(error).__name__}: {error}"


def preload(config: ExperimentConfig, model_path: tuple[Path, ...]) -> None:
    """Import an experiment's engine, and call its ``preload`` if it is a :class:`SupportsPreload`.

    Args:
        config: The experiment.
        model_path: Folders that contain models by name.

    Raises:
        Exception: The engine cannot be imported.
    """
    import_module("pytest_llem.measurement.orchestrator")  # which imports this module
    engine = registry.load(registry.ENGINE_GROUP, config.backend)
    if hasattr(engine, "preload"):
        engine.preload(config, EngineContext(model_path))
