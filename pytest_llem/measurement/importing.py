"""Import engines, ahead of an experiment or to see whether it works.

This runs in the interpreter that is to run the engine, in a process of its own: an engine may import anything.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from pytest_llem import registry
from pytest_llem.engines.protocol import Engine, EngineContext
from pytest_llem.study.config import ExperimentConfig

#: What a class needs to be an engine.
PARTS = sorted(name for name, part in vars(Engine).items() if callable(part) and not name.startswith("_"))


def import_problems(engines: Iterable[str]) -> dict[str, str]:
    """Import engines, and return why one cannot be used, by its name; nothing of those that can.

    Args:
        engines: Names of entry points, or ``package.module:Class``.
    """
    return {name: problem for name in engines if (problem := _problem(name)) is not None}


def missing_parts(engine: object) -> str | None:
    """Return which methods an engine's class is missing, in words; None where it has all."""
    missing = [part for part in PARTS if not hasattr(engine, part)]
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"it lacks {', '.join(missing[:3])}{more}" if missing else None


def _problem(name: str) -> str | None:
    try:
        return missing_parts(registry.load(registry.ENGINE_GROUP, name))
    except (LookupError, ImportError) as error:
        return str(error)
    except (Exception, SystemExit) as error:  # anyone's code, of an entry point
        return f"importing it raises {type(error).__name__}: {error}"


def preload(config: ExperimentConfig, model_path: tuple[Path, ...]) -> None:
    """Import an experiment's engine, and what that has imported ahead if it is a :class:`SupportsPreload`.

    Args:
        config: The experiment.
        model_path: Folders that hold models by name.

    Raises:
        Exception: It cannot be imported, in whatever way that shows.
    """
    import_module("pytest_llem.measurement.orchestrator")  # which imports this module
    engine = registry.load(registry.ENGINE_GROUP, config.backend)
    if hasattr(engine, "preload"):
        engine.preload(config, EngineContext(model_path))
