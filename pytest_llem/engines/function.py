"""Measure a function: the engine behind ``backend: package.module:function``."""

from __future__ import annotations

import ast
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar, Literal, Self, get_args, get_origin

from pydantic import ConfigDict, Field, PlainValidator, TypeAdapter, WithJsonSchema, create_model
from pydantic_core import PydanticUndefined

from pytest_llem import registry
from pytest_llem.engines.options import check_options
from pytest_llem.engines.protocol import BatchEngine, EngineContext, PreflightError, RequestRecord
from pytest_llem.results.environment import package_version
from pytest_llem.results.experiment import EngineRecord
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engines import EngineOptions, Needs
from pytest_llem.study.problems import shown

#: Fields of a study that a function gets if it has a parameter of that name.
STUDY_FIELDS = ("model", "precision", "decoder", "max_output_tokens", "random_seed")

#: Token ids of synthetic prompts. No vocabulary is known: nearly every model has these, few of them special.
SYNTHETIC_IDS = range(32, 256)

TEXT_TOKENS_UNKNOWN = "the function returns text, whose tokens are not known"
_RETURNED_WHOLE = "the function returns outputs whole: pieces that it yields have times"

#: Packages whose versions are recorded if the function has imported them.
_LIBRARIES = ("torch", "transformers", "vllm", "llama_cpp", "onnxruntime")


class NotAnEngineFunctionError(LookupError):
    """Raised if a function cannot be measured because of its signature. The message says what to change."""


@dataclass(frozen=True)
class Signature:
    """What a function's signature says.

    Attributes:
        name: ``package.module:function``.
        function: The function.
        takes_all: Whether it is called once with all prompts (``prompts``), and not once for each (``prompt``).
        prompts: ``texts`` or ``ids``, by the annotation of its first parameter; None if that does not say.
        study_fields: Names in :data:`STUDY_FIELDS` of its parameters, and whether each has no default.
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
        by_name = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        if first is None or first.kind not in by_name or first.name not in ("prompt", "prompts"):
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
    """Return a class with a field for each of *parameters*, whose alias is its name: any name is possible."""
    fields: dict[str, Any] = {}
    for place, one in enumerate(parameters):
        is_required = one.default is one.empty
        default = PydanticUndefined if is_required else one.default
        fields[f"option_{place}"] = (_checked(one.annotation), Field(default, alias=one.name))
    base: type[FunctionOptions] = _OpenOptions if takes_any_name else FunctionOptions
    return create_model("FunctionOptions", __base__=base, **fields)


def _checked(annotation: Any) -> Any:
    """Return *annotation*, or Any if it does not say which values of a study are right."""
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
        size = self.arguments.get("batch_size", _default(type(self), "batch_size"))
        return Needs(
            sequences=size if isinstance(size, int) and size > 0 else None, unused=_unused(signature, config)
        )


class _OpenOptions(FunctionOptions):
    model_config = ConfigDict(extra="allow")


class _UnknownOptions(EngineOptions):
    """Options of a function that is not imported yet. They are checked when it is."""

    model_config = ConfigDict(extra="allow")


def _default(options: type[FunctionOptions], name: str) -> Any:
    return next((one.get_default() for one in options.model_fields.values() if one.alias == name), None)


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


def load_engine(name: str, *, defer: bool = False) -> Any:
    """Return the engine that a study names: a class, which may wrap a function, or another object.

    Args:
        name: The name of an entry point, or ``package.module:Class`` or ``package.module:function``.
        defer: If the source shows that *name* is a function, return an engine that imports it in ``load``. A
            module may load its model when it is imported.

    Raises:
        LookupError: *name* does not exist, or is a function that cannot be measured.
        ImportError: The module cannot be imported.
    """
    if defer and is_function(name):
        return type("FunctionEngine", (FunctionEngine,), {"name": name})
    found = registry.load(registry.ENGINE_GROUP, name)
    if isinstance(found, type) or not callable(found):
        return found
    signature = Signature.of(found, name)
    signature.options.signature = signature
    attributes = {"name": name, "signature": signature, "options": signature.options}
    return type("FunctionEngine", (FunctionEngine,), attributes)


def is_function(name: str) -> bool:
    """Return whether a module's source defines *name* as a function. Only packages around it are imported."""
    module, _, attribute = name.partition(":")
    try:
        spec = find_spec(module) if attribute else None
        get_source = getattr(spec.loader if spec else None, "get_source", None)
        tree = ast.parse((get_source and get_source(module)) or "")
    except (ImportError, ValueError, SyntaxError):  # reported when the module is imported
        return False
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return any(isinstance(node, functions) and node.name == attribute for node in tree.body)


@dataclass
class _Output:
    """One output, and when it came.

    Attributes:
        sent: Time of the call.
        tokens: Token ids, or pieces of text.
        is_text: Whether the output is a text; None if it is empty.
        times: When each piece came, if the output came in pieces.
        ended: When the output was complete.
    """

    sent: float
    tokens: list[Any] = field(default_factory=list)
    is_text: bool | None = None
    times: list[float] = field(default_factory=list)
    ended: float = 0.0


class FunctionEngine(BatchEngine):
    """A function as an engine. Its module is imported in ``load``, unless ``signature`` is given."""

    name: ClassVar[str]
    signature: Signature | None = None
    options: type[EngineOptions] = _UnknownOptions
    batch_sizes_known = False

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        self._config = config
        self.takes_texts = config.has_texts
        self.gpus: Sequence[str] = context.gpus
        self._given: dict[str, Any] = {}

    def load(self) -> None:
        config = self._config
        if self.signature is None:
            try:
                engine = load_engine(self.name)
            except (LookupError, ImportError) as error:
                raise PreflightError(f"engine {self.name!r} cannot be used: {error}") from error
            if getattr(engine, "signature", None) is None:
                raise PreflightError(
                    f"engine {self.name!r} is a function by its source only (got {shown(engine)})"
                )
            check_options(engine, config)
            self.signature, self.options = engine.signature, engine.options
        assert self.signature is not None
        options = self.signature.options.from_config(config)
        fields = {name: getattr(config, name) for name in self.signature.study_fields}
        if "decoder" in fields:
            fields["decoder"] = config.decoder.model_dump(mode="json")
        if fields.get("model", "") is None:  # the function has a default
            del fields["model"]
        self._given = fields | options.arguments
        self._function = partial(self.signature.function, **self._given)
        self.gpus = self._torch_gpus() or self.gpus

    def describe(self) -> EngineRecord:
        gpus = _used_gpus()
        loaded = [name for name in _LIBRARIES if name in sys.modules]
        return EngineRecord(
            name=self.name,
            versions={name: found for name in loaded if (found := package_version(name))},
            device="cuda" if self.gpus else "cpu",
            device_names=[_torch().cuda.get_device_name(index) for index in gpus],
            # Within a key of their own: a parameter may have the name of a setting of another engine.
            settings={"arguments": json.loads(json.dumps(self._given, default=str))},
        )

    def vocabulary(self) -> Sequence[int]:
        return SYNTHETIC_IDS

    def prepare(self, prompts: Sequence[Any]) -> Sequence[Sequence[Any]]:
        assert self.signature is not None, "load first"
        return [prompts] if self.signature.takes_all else [[prompt] for prompt in prompts]

    def generate(self, batch: Sequence[Any]) -> list[_Output]:
        assert self.signature is not None, "load first"
        sent = time.monotonic()
        if not self.signature.takes_all:
            return [self._received(self._function(batch[0]), sent)]
        answer = self._function(list(batch))
        if isinstance(answer, str) or not isinstance(answer, Iterable):
            raise self._error(f"must return a sequence with an output for each prompt (got {shown(answer)})")
        outputs = [self._received(one, sent) for one in answer]
        if len(outputs) != len(batch):
            raise self._error(
                f"must return an output for each prompt (got {len(outputs)} for {len(batch)} prompts)"
            )
        return outputs

    def _received(self, output: Any, sent: float) -> _Output:
        """Return *output* with the time when it came; for an iterator, with the time of each piece."""
        found = _Output(sent)
        if isinstance(output, str):
            found.tokens = [output]
        elif isinstance(output, Iterator):
            for piece in output:
                found.tokens.append(_plain(piece))  # waits for a token that is still on the device
                found.times.append(time.monotonic())
        else:
            output = _plain(output)
            if not isinstance(output, Sequence) or any(isinstance(one, str) for one in output):
                raise self._wrong(output)
            found.tokens = list(map(_plain, output))
        found.ended = found.times[-1] if found.times else time.monotonic()
        kinds = {type(one) for one in found.tokens}
        if not kinds <= {str} and not kinds <= {int}:
            raise self._wrong(found.tokens)
        if kinds:
            found.is_text = kinds == {str}
        return found

    def _wrong(self, output: Any) -> PreflightError:
        return self._error(
            "must return a text, a list of token ids, or an iterator of either, for each prompt "
            f"(got {shown(output)})"
        )

    def _error(self, message: str) -> PreflightError:
        return PreflightError(f"function {self.name!r} {message}")

    def requests(self, batch: Sequence[Any], generated: Sequence[_Output]) -> list[RequestRecord]:
        if not all(one.times for one in generated):
            self.no_latency = _RETURNED_WHOLE
        if any(one.is_text for one in generated):
            self.no_tokens = TEXT_TOKENS_UNKNOWN
        return [self._record(prompt, output) for prompt, output in zip(batch, generated, strict=True)]

    def _record(self, prompt: Any, output: _Output) -> RequestRecord:
        input_tokens = None if self.takes_texts else len(prompt)
        first = output.times[0] if output.times else None
        if not output.is_text:
            ids, times = output.tokens, output.times
            return RequestRecord(input_tokens, ids, output.sent, times, first, last_token=output.ended)
        text = "".join(output.tokens)
        error = None if text else "the function returned an empty text"
        return RequestRecord(
            input_tokens,
            sent=output.sent,
            first_token=first,
            last_token=output.ended,
            output_text=text,
            error=error,
        )

    def synchronize(self) -> None:
        for index in _used_gpus():
            _torch().cuda.synchronize(index)

    def reset_peak_memory(self) -> None:
        for index in _used_gpus():
            _torch().cuda.reset_peak_memory_stats(index)

    def peak_memory_bytes(self) -> int | None:
        return sum(_torch().cuda.max_memory_allocated(index) for index in _used_gpus()) or None

    def _torch_gpus(self) -> list[str]:
        return [f"GPU-{_torch().cuda.get_device_properties(index).uuid}" for index in _used_gpus()]


def _plain(value: Any) -> Any:
    """Return an array or tensor, of any library, as a number or a list."""
    return value.tolist() if hasattr(value, "tolist") else value


def _torch() -> Any:
    return sys.modules["torch"]


def _used_gpus() -> list[int]:
    """Return PyTorch's numbers of the GPUs that this process uses through it. It is not imported."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return []
    return [index for index in range(cuda.device_count()) if cuda.memory_reserved(index)]
