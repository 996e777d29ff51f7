"""Measure a function: the engine behind ``backend: package.module:function``."""

from __future__ import annotations

import ast
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, ClassVar

from pydantic import ConfigDict

from pytest_llem import registry
from pytest_llem.engines.options import check_options
from pytest_llem.engines.protocol import BatchEngine, EngineContext, PreflightError, RequestRecord
from pytest_llem.engines.signature import Signature
from pytest_llem.results.environment import package_version
from pytest_llem.results.experiment import EngineRecord
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import EngineOptions
from pytest_llem.study.problems import shown

#: Token ids of synthetic prompts. No vocabulary is known: nearly every model has these, few of them special.
SYNTHETIC_IDS = range(32, 256)

TEXT_TOKENS_UNKNOWN = "the function returns text, whose tokens are not known"
_RETURNED_WHOLE = "the function returns outputs whole: pieces that it yields have times"

#: Packages whose versions are recorded if the function has imported them.
_LIBRARIES = ("torch", "transformers", "vllm", "llama_cpp", "onnxruntime")


class _UnknownOptions(EngineOptions):
    """Options of a function that is not imported yet. They are checked when it is."""

    model_config = ConfigDict(extra="allow")


def load_engine(name: str, *, defer: bool = False) -> Any:
    """Return what a study names as its engine: a class, a function as a class, or an object that is neither.

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
    """Return whether a module's source defines *name* as a function. Only its parent packages are imported."""
    module, _, attribute = name.partition(":")
    try:
        spec = find_spec(module) if attribute else None
        get_source = getattr(spec.loader if spec else None, "get_source", None)
        tree = ast.parse((get_source and get_source(module)) or "")
    except Exception:  # reported when the module is imported
        return False
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return any(isinstance(node, functions) and node.name == attribute for node in tree.body)


@dataclass
class _Output:
    """One output, and when it came.

    Attributes:
        sent: Time of the call, from ``time.monotonic``, in s, as the other times.
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
        self._arguments: dict[str, Any] = {}

    def load(self) -> None:
        config = self._config
        if self.signature is None:
            try:
                engine = load_engine(self.name)
            except (LookupError, ImportError) as error:
                raise PreflightError(f"engine {self.name!r} cannot be used: {error}") from error
            if getattr(engine, "signature", None) is None:
                raise PreflightError(
                    f"engine {self.name!r} is a function in the module's source, but not in the module "
                    f"(got {shown(engine)})"
                )
            check_options(engine, config)
            self.signature, self.options = engine.signature, engine.options
        assert self.signature is not None
        options = self.signature.options.from_config(config)
        fields = {name: getattr(config, name) for name in self.signature.study_fields}
        if "decoder" in fields:
            fields["decoder"] = config.decoder.model_dump(mode="json")
        if fields.get("model", "") is None:  # the study has no model: the function's default applies
            del fields["model"]
        self._arguments = fields | options.arguments
        used = [f"GPU-{_torch().cuda.get_device_properties(index).uuid}" for index in _used_gpus()]
        self.gpus = used or self.gpus

    def describe(self) -> EngineRecord:
        gpus = _used_gpus()
        loaded = [name for name in _LIBRARIES if name in sys.modules]
        return EngineRecord(
            name=self.name,
            versions={name: found for name in loaded if (found := package_version(name))},
            device="cuda" if self.gpus else "cpu",
            device_names=[_torch().cuda.get_device_name(index) for index in gpus],
            # Within a key of their own: a parameter may have the name of a setting of another engine.
            settings={"arguments": json.loads(json.dumps(self._arguments, default=str))},
        )

    def vocabulary(self) -> Sequence[int]:
        return SYNTHETIC_IDS

    def prepare(self, prompts: Sequence[Any]) -> Sequence[Sequence[Any]]:
        assert self.signature is not None, "load first"
        return [prompts] if self.signature.takes_all else [[prompt] for prompt in prompts]

    def generate(self, batch: Sequence[Any]) -> list[_Output]:
        assert self.signature is not None, "load first"
        # Copies: a function that appends to its prompt, or takes values from decoder, would change its next call.
        prompts = [prompt if isinstance(prompt, str) else list(prompt) for prompt in batch]
        arguments = deepcopy(self._arguments)
        sent = time.monotonic()
        if not self.signature.takes_all:
            return [self._received(self.signature.function(prompts[0], **arguments), sent)]
        answer = self.signature.function(prompts, **arguments)
        if isinstance(answer, str | bytes | Mapping | Set) or not isinstance(answer, Iterable):
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
            ids = _plain(output)
            if not isinstance(ids, Sequence) or isinstance(ids, bytes) or any(isinstance(one, str) for one in ids):
                raise self._wrong(ids)
            found.tokens = list(map(_plain, ids))
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
        if any(one.tokens and not one.times for one in generated):
            self.latency_unknown_reason = _RETURNED_WHOLE
        if any(one.is_text for one in generated):
            self.tokens_unknown_reason = TEXT_TOKENS_UNKNOWN
        return [self._record(prompt, output) for prompt, output in zip(batch, generated, strict=True)]

    def _record(self, prompt: Any, output: _Output) -> RequestRecord:
        input_tokens = None if self.takes_texts else len(prompt)
        first = output.times[0] if output.times else None
        if not output.is_text:
            ids, times = output.tokens, output.times
            return RequestRecord(input_tokens, ids, output.sent, times, first, last_token=output.ended)
        # A pair of surrogates may have come in two pieces; a lone one cannot be stored.
        text = "".join(output.tokens).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
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


def _plain(value: Any) -> Any:
    """Return an array or tensor, of any library, as a number or a list."""
    return value.tolist() if hasattr(value, "tolist") else value


def _torch() -> Any:
    return sys.modules["torch"]


def _used_gpus() -> list[int]:
    """Return PyTorch's numbers of the GPUs that this process uses through it. PyTorch is not imported."""
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    if cuda is None or not cuda.is_initialized():
        return []
    return [index for index in range(cuda.device_count()) if cuda.memory_reserved(index)]
