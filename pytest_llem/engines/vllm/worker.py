"""Measure memory within vLLM's workers, the processes that hold the model."""

from __future__ import annotations

import logging
from typing import Any

import torch

from pytest_llem.engines.process_memory import peak_rss_bytes, reset_peak_rss
from pytest_llem.engines.vllm.start import StartRecords

# vLLM imports this module in each worker before the worker opens its device and loads the model.
logging.getLogger("vllm").addHandler(StartRecords())


class WorkerExtension:
    """Methods that vLLM adds to its worker class, and calls by their names through ``collective_rpc``."""

    model_runner: Any

    def llem_gpu(self) -> str | None:
        """Return the UUID of the worker's GPU; None on a CPU."""
        if not torch.cuda.is_available():
            return None
        return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"

    def llem_weight_bytes(self) -> int | None:
        """Return the size of the weights and buffers of this worker's part of the model, in bytes.

        On a CPU, vLLM may move weights into memory of its kernels, and leave empty ones. The size is then unknown.
        """
        model = self.model_runner.get_model()
        if not all(one.numel() for one in model.parameters()):
            return None
        return sum(int(one.nbytes) for one in (*model.parameters(), *model.buffers()))

    def llem_cache_bytes(self) -> int:
        """Return the size of this worker's KV cache, in bytes."""
        tensors = _tensors(self.model_runner.kv_caches)
        return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())

    def llem_reset_peak_memory(self) -> bool:
        """Start to record the peak memory use, and return whether that is possible."""
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            return True
        return reset_peak_rss()

    def llem_peak_memory_bytes(self) -> int | None:
        """Return the peak memory use since :meth:`llem_reset_peak_memory`, in bytes; None if unknown."""
        return int(torch.cuda.max_memory_allocated()) if torch.cuda.is_available() else peak_rss_bytes()


def _tensors(caches: Any) -> list[torch.Tensor]:
    """Return the tensors in nested lists: a layer's cache is a tensor, or several."""
    if isinstance(caches, torch.Tensor):
        return [caches]
    return [tensor for one in caches for tensor in _tensors(one)]
