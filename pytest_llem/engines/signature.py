"""Read the signature of a function that is measured as an engine: its prompts, study fields and options."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import ConfigDict, Field, PlainValidator, TypeAdapter, WithJsonSchema, create_model
from pydantic_core import PydanticUndefined

from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import EngineOptions, Needs

#: Fields of a study that a function gets if it has a parameter of that name.
STUDY_FIELDS = ("model", "precision", "decoder", "max_output_tokens", "random_seed")


class NotAnEngineFunctionError(LookupError):
    """Raised if a function cannot be measured because of its signature. The message says what to change."""


@dataclass(frozen=True)
class Signature:
    """The prompts, study fields and options that a function's signature declares.

    Attributes:
        name: ``package.module:function``.
        function: The function.
        takes_all: Whether it is called once with all prompts (``prompts``), and not once for each (``prompt``).
        prompts: ``texts`` or ``ids``, by the annotation of its first parameter; None if that does not say.
        study_fields: Its parameters that are in :data:`STUDY_FIELDS`, and whether each is required.
        options: Its other parameters, as a class of options.
    """

    name: str
    function: Callable[..., Any]
    takes_all: bool
    prompts: Literal["texts", "ids"] | None
    study_fields: dict[str, bool]
    options: type[FunctionOptions]

    @classmethod
    def of(cls, function: Callable[..., Any], name: str) -> Self:
        """Return the signature of *function*.

        Raises:
            NotAnEngineFunctionError: It cannot be measured.
        """
        called = type(function).__call__ if not inspect.isroutine(function) else function
        if any(inspect.iscoroutinefunction(one) or inspect.isasyncgenfunction(one) for one in (function, called)):
            raise NotAnEngineFunctionError("an async function is not supported: name one that calls asyncio.run")
        try:
            first, *others = _parameters(function)
        except ValueError:  # no parameters, or a builtin function without a signature
            first, others = None, []
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if first is None or first.kind not in positional or first.name not in ("prompt", "prompts"):
            got = "it has none" if first is None else f"got {first.name!r}"
            raise NotAnEngineFunctionError(
                "the first parameter of a function must be named prompt, to get one prompt in each call, or "
                f"prompts, to get all of a pass in one ({got})"
            )
        kinds = inspect.Parameter
        for one in others:
            if one.kind == kinds.POSITIONAL_ONLY and one.default is one.empty:
                raise NotAnEngineFunctionError(f"parameter {one.name!r} must be one that can be given by name")
        named = [one for one in others if one.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
        takes_all = first.name == "prompts"
        return cls(
            name,
            function,
            takes_all,
            _kind_of_prompts(first.annotation, takes_all=takes_all),
            {one.name: one.default is one.empty for one in named if one.name in STUDY_FIELDS},
            _options(
                [one for one in named if one.name not in STUDY_FIELDS],
                takes_any_name=any(one.kind == kinds.VAR_KEYWORD for one in others),
            ),
        )


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        signature = inspect.signature(function, eval_str=True)
    except (NameError, TypeError, AttributeError, SyntaxError):  # an annotation that exists for type checkers only
        signature = inspect.signature(function)
    return list(signature.parameters.values())


def _kind_of_prompts(annotation: Any, *, takes_all: bool) -> Literal["texts", "ids"] | None:
    one = next(iter(get_args(annotation)), None) if takes_all else annotation
    if one is str:
        return "texts"
    return "ids" if get_origin(one) is not None and int in get_args(one) else None


def _options(parameters: Sequence[inspect.Parameter], *, takes_any_name: bool) -> type[FunctionOptions]:
    """Return a class with a field for each of *parameters*. Names are aliases: pydantic refuses some names."""
    fields: dict[str, Any] = {}
    for place, one in enumerate(parameters):
        is_required = one.default is one.empty
        default = PydanticUndefined if is_required else one.default
        fields[f"option_{place}"] = (_checked_type(one.annotation), Field(default, alias=one.name))
    base: type[FunctionOptions] = _OpenOptions if takes_any_name else FunctionOptions
    return create_model("FunctionOptions", __base__=base, **fields)


def _checked_type(annotation: Any) -> Any:
    """Return a type that checks a study's value against *annotation*; Any if pydantic cannot check it."""
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return Any
    try:
        adapter = TypeAdapter(annotation)
        schema = adapter.json_schema()
    except Exception:  # pydantic has an error of its own for each kind of unknown type
        return Any

    def validate(value: Any) -> Any:
        # As JSON, a list is right for a tuple, and a string for an enumeration or a path.
        return adapter.validate_json(json.dumps(value), strict=True)

    return Annotated[Any, PlainValidator(validate), WithJsonSchema(schema)]


class FunctionOptions(EngineOptions):
    """Options of a function: its parameters."""

    signature: ClassVar[Signature]

    @property
    def arguments(self) -> dict[str, Any]:
        """The options that the study gives, by the parameter's name."""
        fields = type(self).model_fields
        given = {name for name in self.model_fields_set if name in fields}
        return {str(fields[name].alias): getattr(self, name) for name in given} | (self.model_extra or {})

    def needs(self, config: ExperimentConfig, parameters: int | None) -> Needs:
        signature = self.signature
        if signature.prompts == "texts" and not config.has_texts:
            raise ValueError("the function takes texts: give the study a dataset of texts, such as a .txt file")
        if signature.prompts == "ids" and config.has_texts:
            raise ValueError("the function takes token ids: leave dataset out, or annotate its prompts as str")
        if signature.study_fields.get("model") and config.model is None:
            raise ValueError("the function needs a model: give model in the study")
        defaults = (one.get_default() for one in type(self).model_fields.values() if one.alias == "batch_size")
        size = self.arguments.get("batch_size", next(defaults, None))
        return Needs(
            sequences=size if isinstance(size, int) and size > 0 else None, unused=_unused(signature, config)
        )


class _OpenOptions(FunctionOptions):
    model_config = ConfigDict(extra="allow")


def _unused(signature: Signature, config: ExperimentConfig) -> dict[str, str]:
    """Return the fields of a study that do not reach a function, and why."""
    missing = [name for name in STUDY_FIELDS if name not in signature.study_fields and name != "random_seed"]
    found = {name: f"the function has no parameter {name!r}: add one, or leave {name} out" for name in missing}
    if "max_output_tokens" in missing and config.measurement.length_mode == "fixed":
        found["measurement.length_mode"] = (
            "the function has no parameter 'max_output_tokens', so it decides on lengths: use natural"
        )
    if config.has_texts:
        found["max_input_tokens"] = "the function takes texts, whose tokens are not known: leave it out"
        found["prompt_format"] = "the function takes texts as they are: use a chat template in the function"
    return found
