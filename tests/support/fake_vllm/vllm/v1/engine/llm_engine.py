from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from vllm.engine.arg_utils import EngineArgs
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.stats import PrefixCacheStats, RequestStateStats, SchedulerStats

_LOG = logging.getLogger("vllm.v1.engine")

#: Bytes of the KV cache.
CACHE_BYTES = 1 << 20


class EngineCoreClient:
    """The process that schedules requests, and its pipes."""

    def __init__(self, vllm_config: SimpleNamespace) -> None:
        hf_config = vllm_config.model_config.hf_config
        config = {
            "max_num_seqs": vllm_config.scheduler_config.max_num_seqs,
            "workers": vllm_config.parallel_config.tensor_parallel_size,
            "prefix_caching": vllm_config.cache_config.enable_prefix_caching,
            "tokens_per_step": 1 + (vllm_config.speculative_config or {}).get("num_speculative_tokens", 0),
            "eos": hf_config.eos_token_id,
            "fault": getattr(hf_config, "fake_fault", None),
            "notes": getattr(hf_config, "fake_notes", None),
        }
        command = [sys.executable, "-S", str(Path(__file__).parents[2] / "core.py"), json.dumps(config)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.receive()  # it is ready

    def send(self, **message: Any) -> None:
        assert self.process.stdin is not None
        try:
            print(json.dumps(message), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise EngineDeadError from None

    def receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise EngineDeadError
        message: dict[str, Any] = json.loads(line)
        return message

    def shutdown(self, timeout: float | None = None) -> None:
        self.process.terminate()
        self.process.communicate()


class LLMEngine:
    def __init__(
        self, vllm_config: SimpleNamespace, log_stats: bool, stat_loggers: Sequence[Callable[..., StatLoggerBase]]
    ) -> None:
        if not vllm_config.model_config.has_weights:
            raise ValueError("Cannot find any model weights")
        if vllm_config.model_config.enforce_eager:
            _LOG.warning("Enforce eager set, disabling torch.compile, CUDAGraphs, and JIT kernel warmup.")
        self.vllm_config, self.log_stats = vllm_config, log_stats
        self._worker = _worker(vllm_config.parallel_config.worker_extension_cls)
        _log_start(getattr(vllm_config.model_config.hf_config, "fake_fault", None))
        self.engine_core = EngineCoreClient(vllm_config)
        self._loggers = [one(vllm_config, 0) for one in stat_loggers]
        for one in self._loggers:
            one.log_engine_initialized()
        self._requests: dict[str, tuple[list[int], SamplingParams, RequestStateStats]] = {}

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineArgs,
        usage_context: UsageContext = UsageContext.ENGINE_CONTEXT,
        stat_loggers: Sequence[Callable[..., StatLoggerBase]] | None = None,
        enable_multiprocessing: bool = False,
    ) -> LLMEngine:
        config = engine_args.create_engine_config(usage_context)
        return cls(config, not engine_args.disable_log_stats, stat_loggers or [])

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    def add_request(
        self,
        request_id: str,
        prompt: dict[str, list[int]],
        params: SamplingParams,
        arrival_time: float | None = None,
    ) -> str:
        if "type" not in prompt:
            _LOG.warning("Passing raw prompts to InputProcessor is deprecated")
        ids = prompt["prompt_token_ids"]
        if len(ids) >= self.vllm_config.model_config.max_model_len:
            raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length")
        stats = RequestStateStats(arrival_time=time.time() if arrival_time is None else arrival_time)
        self._requests[request_id] = ids, params, stats
        names = ("max_tokens", "min_tokens", "ignore_eos", "seed")
        self.engine_core.send(
            kind="add", id=request_id, prompt=ids, **{name: getattr(params, name) for name in names}
        )
        return request_id

    def step(self) -> list[RequestOutput]:
        message = self.engine_core.receive()
        found = []
        for one in message["outputs"]:
            ids, params, stats = self._requests[one["id"]]
            assert params.output_kind is RequestOutputKind.DELTA, "tokens would come again"
            stats.queued_ts, stats.scheduled_ts = one["queued_ts"], one["scheduled_ts"]
            output = CompletionOutput(0, "", one["tokens"], finish_reason=one["finish_reason"])
            finished = one["finish_reason"] is not None
            if finished:
                del self._requests[one["id"]]
            known = stats if self.log_stats else None
            found.append(RequestOutput(one["id"], None, ids, [output], finished, known))
        stats_of_cache = PrefixCacheStats(queries=message["queries"], hits=message["hits"])
        for logger in self._loggers:
            logger.record(SchedulerStats(kv_cache_usage=message["usage"], prefix_cache_stats=stats_of_cache), None)
        return found

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.engine_core.send(kind="reset")
        return True

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Call a method of each worker. In vLLM, each is a process of its own."""
        assert isinstance(method, str)
        workers = self.vllm_config.parallel_config.tensor_parallel_size
        return [getattr(self._worker, method)(*args, **(kwargs or {})) for _ in range(workers)]


def _log_start(fault: str | None) -> None:
    """Log what workers log. In vLLM they are processes of their own."""
    _LOG.info("Starting to load model %s...", "one")
    if fault == "load":
        try:
            raise ValueError("max seq len 256 is larger than the KV cache")
        except ValueError:
            _LOG.exception("WorkerProc failed to start.")
        raise RuntimeError("Engine core initialization failed. See root cause above.")
    _LOG.info("Model loading took %s GiB memory and %.6f seconds", 1, 2.0)
    _LOG.info("Dynamo bytecode transform time: %.2f s", 3.0)
    _LOG.info("Starting to load model %s...", "another worker's")
    _LOG.info("Graph capturing finished in %.0f secs, took %.2f GiB", 4, 5.0)


def _worker(extension: str) -> Any:
    """Return a worker with the methods of an extension."""
    module, _, name = extension.rpartition(".")
    worker = getattr(import_module(module), name)()
    model = torch.nn.Linear(16, 4, bias=False)  # 256 bytes
    cache = torch.zeros(CACHE_BYTES // 2, dtype=torch.int8)
    # A layer's cache is a tensor or several, and layers may share one.
    worker.model_runner = SimpleNamespace(
        get_model=lambda: model, kv_caches=[cache, [cache, torch.zeros(CACHE_BYTES // 2, dtype=torch.int8)]]
    )
    return worker
