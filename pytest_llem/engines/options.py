"""Check the options that a study gives an engine against those that the engine's class states."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pytest_llem.engines.protocol import PreflightError, SupportsOptionCheck
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import EngineOptions, Needs
from pytest_llem.study.problems import did_you_mean, error_sentence, shown

LORA = "lora is not supported yet: leave it out, or name a model with the adapter merged into it"

#: The method that shows that an engine's class has an optional ability, by the name of the ability.
ABILITIES = {
    "cache_memory": "cache_memory",
    "model_shape": "shape",
    "prefill_only": "generate_first",
    "preload": "preload",
}

_NO_OPTIONS = "the engine has no such option (it has none: an engine names the class of its options as options)"


@dataclass(frozen=True)
class OptionProblem:
    """An option that an engine cannot use.

    Attributes:
        path: Path of the key in an experiment's configuration.
        message: What is wrong, with the value that was given.
    """

    path: tuple[str | int, ...]
    message: str

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.path))}: {self.message}"


def option_problems(
    engine: Any, config: ExperimentConfig, given: Collection[str] | None = None
) -> list[OptionProblem]:
    """Return the options in *config* that an engine cannot use, and the fields that do not reach it.

    Args:
        engine: The engine's class.
        config: The experiment.
        given: Fields that the study sets, from :func:`given_fields`; None for those that differ from the
            default.
    """
    problems = _section_problems(getattr(engine, "options", None), config)
    if isinstance(engine, type) and issubclass(engine, SupportsOptionCheck) and not problems:
        problems += [OptionProblem(path, message) for path, message in engine.check_options(config)]
    if not problems:
        unused = needs_of_class(engine, config, None).unused
        found = _changed_fields(config) if given is None else given
        problems = [OptionProblem(tuple(name.split(".")), why) for name, why in unused.items() if name in found]
    if config.passthrough_kwargs and not getattr(engine, "reads_passthrough_kwargs", False):
        message = f"engine {config.backend!r} does not read them: leave them out"
        problems.append(OptionProblem(("passthrough_kwargs",), message))
    return problems


def check_options(engine: Any, config: ExperimentConfig) -> None:
    """Refuse options in *config* that its engine cannot use.

    Args:
        engine: The engine's class.
        config: The experiment.

    Raises:
        PreflightError: There are such options. The message names each with its key in the study.
    """
    problems = [*map(str, option_problems(engine, config))]
    if config.lora is not None:
        problems.append(LORA)
    if problems:
        raise PreflightError("; ".join(problems))


def in_section(engine: Any, config: ExperimentConfig, section: str) -> ExperimentConfig:
    """Return *config* with the options of an engine under *section*.

    A subclass of a shipped engine has its options under its own name, where the shipped engine does not read them.

    Args:
        engine: The engine's class.
        config: The experiment. Its options are valid.
        section: Name of the shipped engine's section.
    """
    if getattr(config, section) is not None:
        return config
    return config.model_copy(update={section: engine.options.from_config(config)})


def given_fields(config: ExperimentConfig) -> list[str]:
    """Return the fields that a study sets, sorted, with those of sections by their dotted names.

    A configuration that was read from JSON sets all of them.
    """
    return sorted(_fields(config, lambda section, name: name in section.model_fields_set))


def _changed_fields(config: ExperimentConfig) -> list[str]:
    def is_changed(section: BaseModel, name: str) -> bool:
        default = type(section).model_fields[name].get_default(call_default_factory=True)
        return bool(getattr(section, name) != default)

    return _fields(config, is_changed)


def _fields(section: BaseModel, is_given: Callable[[BaseModel, str], bool], prefix: str = "") -> list[str]:
    """Return the dotted names of given fields. A section is given if one of its fields is."""
    found: list[str] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            within = _fields(value, is_given, f"{prefix}{name}.")
            found += [f"{prefix}{name}", *within] if within else []
        elif is_given(section, name):
            found.append(f"{prefix}{name}")
    return found


def abilities(engine: Any) -> frozenset[str]:
    """Return the optional abilities of an engine's class: names in :data:`ABILITIES`."""
    return frozenset(name for name, method in ABILITIES.items() if hasattr(engine, method))


def needs_of_class(engine: Any, config: ExperimentConfig, parameters: int | None) -> Needs:
    """Return what *config* needs, without ``supports``, as the engine's class states. Options must be valid."""
    options = getattr(engine, "options", None)
    return Needs() if options is None else options.from_config(config).needs(config, parameters)


def _section_problems(options: Any, config: ExperimentConfig) -> list[OptionProblem]:
    section = config.backend
    if options is None:
        given = [name for name, value in config.engine_section.items() if value is not None]
        return [OptionProblem((section, name), _NO_OPTIONS) for name in given]
    if not (isinstance(options, type) and issubclass(options, EngineOptions)):
        message = f"options of the engine must be a subclass of pytest_llem.EngineOptions (got {shown(options)})"
        return [OptionProblem((section,), message)]
    try:
        options.from_config(config).needs(config, None)
    except ValidationError as error:
        details = error.errors(include_url=False)
        return [OptionProblem((section, *one["loc"]), _sentence(options, one)) for one in details]
    except ValueError as error:
        return [OptionProblem((section,), str(error))]
    return []


def _sentence(options: type[EngineOptions], error: ErrorDetails) -> str:
    if error["type"] == "value_error":  # options that contradict each other
        return str(error["ctx"]["error"])
    if error["type"] == "extra_forbidden":
        known = tuple(sorted(field.alias or name for name, field in options.model_fields.items()))
        if len(error["loc"]) > 1:  # a key within an option
            return "unknown key"
        hint = did_you_mean(str(error["loc"][0]), known)
        return f"the engine has no such option{hint}" + (
            "" if hint else f" (there are: {', '.join(known) or 'none'})"
        )
    if error["type"] == "missing":
        return error_sentence(error)
    return f"{error_sentence(error)} (got {shown(error['input'])})"
