"""The engine ``vllm``: run a model with vLLM, offline."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import vllm
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.metrics.loggers import StatLoggerBase

from pytest_llem.engines.library_errors import one_line
from pytest_llem.engines.models import ModelSource, context_length, model_damage, resolve_model, too_long_message
from pytest_llem.engines.options import in_section
from pytest_llem.engines.protocol import (
    BatchEngine,
    CacheMemory,
    EngineContext,
    EngineCrashError,
    PreflightError,
    RequestRecord,
)
from pytest_llem.engines.shipped import unmet_by_vllm
from pytest_llem.engines.tokenizer import PromptTokenizer, text_config
from pytest_llem.engines.vllm.arguments import argument_problems, engine_arguments, sampling_arguments
from pytest_llem.engines.vllm.start import StartMonitor
from pytest_llem.results.environment import package_version
from pytest_llem.results.experiment import AdjustedSetting, EngineRecord
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engines import VLLMConfig

#: Time that vLLM's processes may take to end, in s. Killed after vLLM's own 5 s, they leave files in /dev/shm.
END_SECONDS = 30.0


@dataclass
class Answer:
    """The answer to one request, as it grows.

    Attributes:
        sent: Time at which the request was submitted, in s, from ``time.monotonic``.
        ids: Generated token ids.
        times: Time at which each of them arrived.
        admitted: Time at which vLLM scheduled the request.
        error: Why the request failed.
    """

    sent: float
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    admitted: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Batch:
    """The prompts of a pass. vLLM schedules them itself.

    Attributes:
        prompts: Token ids of each prompt.
        sampling: Sampling parameters of each prompt.
        first: The same, with one new token.
    """

    prompts: Sequence[list[int]]
    sampling: Sequence[SamplingParams]
    first: Sequence[SamplingParams]


class _CacheUse(StatLoggerBase):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Observes the KV cache. vLLM calls it after every step."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.reset()

    def reset(self) -> None:
        self.peak_share, self.queries, self.hits = 0.0, 0, 0

    def record(self, scheduler_stats: Any = None, iteration_stats: Any = None, **more: Any) -> None:
        if scheduler_stats is not None:
            self.peak_share = max(self.peak_share, scheduler_stats.kv_cache_usage)
            self.queries += scheduler_stats.prefix_cache_stats.queries
            self.hits += scheduler_stats.prefix_cache_stats.hits

    def log_engine_initialized(self) -> None:
        """Do nothing: the result has the settings."""


class VLLMEngine(BatchEngine):
    """The engine ``vllm``: one model, all prompts of a pass submitted at once.

    The experiment's process submits the requests and receives their tokens; vLLM's own processes run the model.
    """

    options = VLLMConfig

    @classmethod
    def check_options(cls, config: ExperimentConfig) -> Iterable[tuple[tuple[str, ...], str]]:
        return argument_problems(in_section(cls, config, "vllm"))

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        config = in_section(type(self), config, "vllm")
        if unmet := list(unmet_by_vllm(config)):
            raise PreflightError("; ".join(unmet))
        self._config, self._context = config, context
        self._options = config.vllm or VLLMConfig()
        for name, value in (
            ("TOKENIZERS_PARALLELISM", "false"),
            ("VLLM_NO_USAGE_STATS", "1"),  # a measurement sends nothing to anybody
            ("VLLM_LOG_STATS_INTERVAL", "3600"),
        ):
            os.environ.setdefault(name, value)
        visible = range(self._options.gpus() if current_platform.is_cuda() else 0)
        self.gpus: Sequence[str] = [current_platform.get_device_uuid(at) for at in visible]  # opens no GPU
        self._engine_options = self._options.engine or {}
        self.expected_warnings = [*self._expected_warnings()]
        self._ids = count()
        self._source: ModelSource
        self._prompts: PromptTokenizer
        self._engine: Any = None
        self._cache: list[_CacheUse] = []
        self._hit_rate: float | None = None
        self._peak_is_known = False

    def _expected_warnings(self) -> Iterator[str]:
        if self._engine_options.get("enforce_eager"):
            yield from ("Enforce eager set", "Inductor compilation was disabled by user settings")
        if self._config.measurement.length_mode == "fixed":  # no end token ends answers
            yield "Using None for EOS token id"

    def fetch(self) -> None:
        name = self._config.model_name
        self._source = resolve_model(name, self._context.model_path, self._engine_options.get("revision"))
        if not self._random_weights and (damage := model_damage(name, self._source)):
            raise PreflightError(damage)

    @property
    def _random_weights(self) -> bool:
        return self._engine_options.get("load_format") == "dummy"

    def load(self) -> None:
        config = self._config
        named = ("revision", "trust_remote_code")
        hub_arguments: dict[str, Any] = {
            name: self._engine_options[name] for name in named if name in self._engine_options
        }
        self._prompts = PromptTokenizer(self._source, config, hub_arguments)
        with _refusals_as_preflight():
            has_tokenizer = self._prompts.tokenizer is not None
            arguments = EngineArgs(**engine_arguments(config, self._source.location, has_tokenizer=has_tokenizer))
            self._engine = self._start(arguments)
        gpus = self._call("llem_gpu")
        self.gpus = [gpu for gpu in gpus if gpu is not None]

    def _start(self, arguments: EngineArgs) -> LLMEngine:
        with StartMonitor(self._context.report_phase) as start:
            try:
                # As ``vllm.LLM``: the context decides the defaults of max_num_seqs and max_num_batched_tokens.
                return LLMEngine.from_engine_args(
                    arguments, usage_context=UsageContext.LLM_CLASS, stat_loggers=[self._observe_cache]
                )
            except RuntimeError as error:  # a process of vLLM has ended, and this one does not know why
                failure = error
        if start.error is None:
            raise failure
        raise EngineCrashError(f"a process of vLLM failed to start: {start.error}") from failure

    def _observe_cache(self, vllm_config: Any, engine_index: int = 0) -> _CacheUse:
        self._cache.append(_CacheUse(vllm_config, engine_index))
        return self._cache[-1]

    def _call(self, method: str) -> list[Any]:
        """Return what a method of the worker extension returns in each worker."""
        with _dead_processes_as_crash():
            return list(self._engine.collective_rpc(method))

    def describe(self) -> EngineRecord:
        found, source = self._engine.vllm_config, self._source
        model, cache, scheduler = found.model_config, found.cache_config, found.scheduler_config
        sampling = sampling_arguments(self._config)
        versions = {name: package_version(name) for name in ("torch", "transformers", "tokenizers")}
        versions["vllm"] = vllm.__version__
        if torch.version.cuda:
            versions["cuda"] = torch.version.cuda
        settings = {
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization,
            "max_model_len": model.max_model_len,
            "enforce_eager": model.enforce_eager,
            "architecture": next(iter(model.architectures or []), None),
            "max_num_seqs": scheduler.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "enable_chunked_prefill": scheduler.enable_chunked_prefill,
            "enable_prefix_caching": cache.enable_prefix_caching,
            "prefix_cache_hit_rate": self._hit_rate,
            "kv_cache_dtype": str(cache.cache_dtype),
            "block_size": cache.block_size,
            "gpu_memory_utilization": cache.gpu_memory_utilization if self.gpus else None,
            "tensor_parallel_size": found.parallel_config.tensor_parallel_size,
            "pipeline_parallel_size": found.parallel_config.pipeline_parallel_size,
            "sampling": {name: given for name, given in sampling.items() if name != "output_kind"},  # no JSON
        }
        return EngineRecord(
            name="vllm",
            versions={name: version for name, version in versions.items() if version},
            device="cuda" if self.gpus else "cpu",
            device_names=[current_platform.get_device_name(at) for at in range(len(self.gpus))],
            settings=settings,
            adjusted=list(self._adjusted(settings)),
            **source.provenance(),
            random_weights=source.random_weights or self._random_weights,
        )

    def _adjusted(self, settings: dict[str, Any]) -> Iterator[AdjustedSetting]:
        """Yield the arguments that vLLM replaced, mostly with no more than a warning in its log."""
        for name, given in self._engine_options.items():
            effective = settings.get(name)
            # None, "auto" and -1 let vLLM choose.
            if given not in (None, "auto", -1) and effective not in (None, given):
                yield AdjustedSetting(
                    setting=f"{self._config.backend}.engine.{name}",
                    given=given,
                    effective=effective,
                    reason="vLLM changed it",
                )

    def encode(self, text: str) -> list[int]:
        return self._prompts.encode(text)

    def vocabulary(self) -> Sequence[int]:
        return self._prompts.vocabulary(self._engine.vllm_config.model_config.hf_config)

    def prepare(self, prompts: Sequence[Sequence[int]]) -> list[Batch]:
        self._check_context(prompts)
        each = [sampling_arguments(self._config, index) for index in range(len(prompts))]
        one_token = {"max_tokens": 1, "min_tokens": 0}
        with _refusals_as_preflight():
            sampling = [SamplingParams(**one) for one in each]
            first = [SamplingParams(**one | one_token) for one in each]
        return [Batch([list(prompt) for prompt in prompts], sampling, first)]

    def _check_context(self, prompts: Sequence[Sequence[int]]) -> None:
        """Check that the longest prompt and its answer fit: vLLM would end the answer early.

        Raises:
            PreflightError: They do not fit.
        """
        model = self._engine.vllm_config.model_config
        own = context_length(text_config(model.hf_config).to_dict())
        longest, output = max(map(len, prompts)), self._config.workload.output_len
        if longest + output <= model.max_model_len:
            return
        if own is None or model.max_model_len < own:
            raise PreflightError(
                f"{self._config.backend}.engine.max_model_len {model.max_model_len:,} is less than a prompt of "
                f"{longest:,} tokens with max_output_tokens {output:,}: raise it"
            )
        raise PreflightError(too_long_message(self._config.model_name, longest, output, own))

    def positions(self, batch: Batch) -> int:
        return sum(map(len, batch.prompts))  # vLLM pads nothing

    def seed(self, seed: int) -> None:
        """Forget cached prompts, which every pass repeats. Each request has a seed of its own.

        Raises:
            RuntimeError: vLLM has not forgotten them, so that this pass would be faster than the first.
        """
        if self._engine.vllm_config.cache_config.enable_prefix_caching:
            with _dead_processes_as_crash():
                if not self._engine.reset_prefix_cache():
                    raise RuntimeError("vLLM could not clear its prefix cache before a pass: its output says why")

    def generate(self, batch: Batch) -> list[Answer]:
        with _dead_processes_as_crash():
            return self._run(batch.prompts, batch.sampling)

    def generate_first(self, batch: Batch) -> list[Answer]:
        with _dead_processes_as_crash():
            return self._run(batch.prompts, batch.first)

    def _run(self, prompts: Sequence[list[int]], sampling: Sequence[SamplingParams]) -> list[Answer]:
        """Submit all requests, and receive their tokens until none is left: a window ends with an empty queue."""
        engine, answers = self._engine, {}
        for prompt, params in zip(prompts, sampling, strict=True):
            name = str(next(self._ids))
            answers[name] = Answer(time.monotonic())
            engine.add_request(name, {"type": "token", "prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.monotonic()
            for output in outputs:
                answer, new = answers[output.request_id], output.outputs[0]
                answer.ids += new.token_ids
                answer.times += [now] * len(new.token_ids)
                if output.finished:
                    answer.admitted = getattr(output.metrics, "scheduled_ts", None) or None
                    if new.finish_reason not in ("stop", "length"):
                        answer.error = f"vLLM ended the request with the reason {new.finish_reason!r}"
        return list(answers.values())

    def synchronize(self) -> None:
        """Do nothing: ``generate`` returns when vLLM has finished every request."""

    def requests(self, batch: Batch, generated: Sequence[Answer]) -> list[RequestRecord]:
        return [
            RequestRecord(
                len(prompt),
                answer.ids,
                answer.sent,
                answer.times,
                admitted=answer.admitted,
                error=answer.error,
            )
            for prompt, answer in zip(batch.prompts, generated, strict=True)
        ]

    def model_memory_bytes(self) -> int | None:
        parts = self._call("llem_weight_bytes")
        return None if None in parts else sum(parts)

    def reset_peak_memory(self) -> None:
        for one in self._cache:
            one.reset()
        self._peak_is_known = all(self._call("llem_reset_peak_memory"))

    def peak_memory_bytes(self) -> int | None:
        peaks = self._call("llem_peak_memory_bytes") if self._peak_is_known else [None]
        return None if None in peaks else sum(peaks)

    def cache_memory(self) -> CacheMemory:
        queries = sum(one.queries for one in self._cache)  # read now: later requests are not the window's
        self._hit_rate = sum(one.hits for one in self._cache) / queries if queries else None
        allocated = sum(self._call("llem_cache_bytes"))
        return CacheMemory(allocated, round(max(one.peak_share for one in self._cache) * allocated))

    def close(self) -> None:
        if self._engine is not None:
            with suppress(Exception):  # a process of vLLM may have died
                self._engine.engine_core.shutdown(timeout=END_SECONDS)
            self._engine = None


@contextmanager
def _dead_processes_as_crash() -> Iterator[None]:
    """Turn vLLM's error about a dead process into an EngineCrashError.

    Raises:
        EngineCrashError: A process of vLLM has ended.
    """
    try:
        yield
    except EngineDeadError as error:
        raise EngineCrashError("vLLM's EngineCore has ended: its output says why") from error


@contextmanager
def _refusals_as_preflight() -> Iterator[None]:
    """Turn vLLM's refusal of arguments into a PreflightError of one line."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:  # pydantic's are ValueErrors
        raise PreflightError(f"vLLM cannot do what the experiment asks for: {one_line(error)}") from error
