"""Import engines, before an experiment or to check that they can be imported.

This runs in the engine's interpreter and in a process of its own, because an engine may import anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from pytest_llem.engines.function import is_function, load_engine
from pytest_llem.engines.options import abilities, check_options, needs_of_class, option_problems
from pytest_llem.engines.protocol import BatchEngine, Engine, EngineContext, PreflightError
from pytest_llem.engines.shipped import SHIPPED
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import EngineOptions

#: Methods that an engine's class must have.
METHODS = sorted(
    name
    for protocol in (Engine, BatchEngine)
    for name, part in vars(protocol).items()
    if callable(part) and not name.startswith("_")
)


def missing_methods(engine: object) -> str | None:
    """Return the methods that an engine's class does not have, as a message; None if it has all."""
    abstract = getattr(engine, "__abstractmethods__", ())
    missing = [name for name in METHODS if name in abstract or not hasattr(engine, name)]
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"missing methods: {', '.join(missing[:3])}{more}" if missing else None


def create_engine(config: ExperimentConfig, context: EngineContext) -> Engine:
    """Import the engine of an experiment, and return it.

    Raises:
        PreflightError: It cannot be imported, or cannot do what the experiment asks for.
    """
    name = config.backend
    try:
        make = load_engine(name, defer=True)
    except (LookupError, ImportError) as error:
        raise PreflightError(f"engine {name!r} cannot be used: {error}") from error
    if name not in SHIPPED and (missing := missing_methods(make)) is not None:
        raise PreflightError(f"engine {name!r} cannot be used: {missing}")
    check_options(make, config)
    if config.measurement.prefill_split and not hasattr(make, "generate_first"):
        reason = f"engine {name!r} cannot stop after the first token (it has no generate_first)"
        raise PreflightError(f"{reason}: leave measurement.prefill_split out")
    try:
        engine: Engine = make(config, context)
    except ImportError as error:
        raise PreflightError(f"engine {name!r} cannot be used: {error}") from error
    return engine


def answer(questions: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Import engines, and return what the study has to know of each: by name, the fields of an ``EngineAnswer``.

    Args:
        questions: For each engine, the experiments to ask about: the fields (``config``), which of these the
            study sets (``given``), and the number of the model's weights (``parameters``).
    """
    return {name: _answer(name, asked) for name, asked in questions.items()}


def _answer(name: str, asked: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    try:
        engine = load_engine(name)
        if name not in SHIPPED and (problem := missing_methods(engine)) is not None:
            return {"problem": problem}
        options: Any = getattr(engine, "options", None)
        is_class = isinstance(options, type) and issubclass(options, EngineOptions)
        return {
            "options": options.model_json_schema() if is_class else None,
            "supports": sorted(abilities(engine)),
            "takes_any": options is None or (is_class and _takes_any(options)),
            "reads_passthrough_kwargs": bool(getattr(engine, "reads_passthrough_kwargs", False)),
            "configs": [_config_answer(engine, one) for one in asked],
        }
    except (LookupError, ImportError) as error:
        return {"problem": str(error)}
    except BaseException as error:  # a third-party module may raise anything, such as pytest's Skipped
        return {"problem": f"importing it raises {type(error).__name__}: {error}"}


def default_gpus(name: str, engine: Any) -> int | None:
    """Return the number of GPUs that an experiment leases with an engine's default options; None for all.

    Args:
        name: Name of the engine in a study.
        engine: The engine's class.
    """
    return needs_of_class(engine, ExperimentConfig(model="none", backend=name), None).gpus


def _config_answer(engine: Any, question: Mapping[str, Any]) -> dict[str, Any]:
    config = ExperimentConfig.model_validate(question["config"])
    if problems := option_problems(engine, config, question.get("given")):
        return {"problems": [(one.path, one.message) for one in problems]}
    stated = asdict(needs_of_class(engine, config, question["parameters"]))
    del stated["supports"]
    return {"needs": stated}


def _takes_any(options: type[EngineOptions]) -> bool:
    """Return whether options take any value and state no needs, so that only their names can be wrong."""
    own, base = options.__pydantic_decorators__, EngineOptions.__pydantic_decorators__
    validators = own.field_validators or own.validators or own.root_validators
    if (
        options.needs is not EngineOptions.needs
        or validators
        or own.model_validators.keys() != base.model_validators.keys()
    ):
        return False
    return all(field.annotation is Any and not field.metadata for field in options.model_fields.values())


def preload(config: ExperimentConfig, model_path: tuple[Path, ...]) -> None:
    """Import an experiment's engine, and call its ``preload`` if it is a :class:`SupportsPreload`.

    A function's module is not imported: it may load a model on a device that is not leased yet.

    Args:
        config: The experiment.
        model_path: Folders that contain models by name.

    Raises:
        Exception: The engine cannot be imported.
    """
    import_module("pytest_llem.measurement.orchestrator")  # which imports this module
    if is_function(config.backend):
        return
    engine = load_engine(config.backend)
    if hasattr(engine, "preload"):
        engine.preload(config, EngineContext(model_path))
