from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from transformers import AutoConfig

from vllm.usage.usage_lib import UsageContext

if TYPE_CHECKING:  # as in vLLM: types of some arguments are not importable at run time
    from vllm.config import ProfilerConfig

#: Defaults of ``max_num_seqs`` and ``max_num_batched_tokens``, which depend on who makes the engine.
DEFAULTS = {UsageContext.ENGINE_CONTEXT: (128, 2048), UsageContext.LLM_CLASS: (256, 4096)}


class AttentionBackendEnum(Enum):
    FLASH_ATTN = "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend"


@dataclass
class CompilationConfig:
    mode: int = 3


@dataclass
class EngineArgs:
    model: str = "Qwen/Qwen3-0.6B"
    skip_tokenizer_init: bool = False
    trust_remote_code: bool = False
    load_format: str = "auto"
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] = "auto"
    kv_cache_dtype: Literal["auto", "bfloat16", "fp8"] = "auto"
    seed: int = 0
    max_model_len: int = None  # type: ignore[assignment]  # as in vLLM
    revision: str | None = None
    quantization: str | None = None
    enforce_eager: bool = False
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    block_size: int | None = None
    enable_prefix_caching: bool | None = None
    gpu_memory_utilization: float = 0.9
    max_num_batched_tokens: int | None = None
    max_num_seqs: int | None = None
    enable_chunked_prefill: bool | None = None
    disable_log_stats: bool = False
    speculative_config: dict[str, Any] | None = None
    attention_backend: AttentionBackendEnum | None = None
    compilation_config: CompilationConfig = field(default_factory=CompilationConfig)
    profiler_config: ProfilerConfig | None = None
    hf_overrides: dict[str, Any] | None = None
    worker_extension_cls: str = ""

    def create_engine_config(self, usage_context: UsageContext) -> SimpleNamespace:
        hf_config = AutoConfig.from_pretrained(self.model)
        for name, value in (self.hf_overrides or {}).items():
            setattr(hf_config, name, value)
        own = hf_config.max_position_embeddings
        length = self.max_model_len or own
        if length > own:
            raise ValueError(
                f"User-specified max_model_len ({length}) is greater than the derived max_model_len "
                f"(max_position_embeddings={own})."
            )
        # A model may allow fewer sequences at a time than it is asked for.
        default_sequences, default_tokens = DEFAULTS[usage_context]
        sequences = min(self.max_num_seqs or default_sequences, getattr(hf_config, "fake_max_num_seqs", 10**9))
        tokens = self.max_num_batched_tokens or default_tokens
        if tokens < sequences and self.max_num_batched_tokens and self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens ({tokens}) must be greater than or equal to max_num_seqs ({sequences})."
            )
        return SimpleNamespace(
            model_config=SimpleNamespace(
                dtype=f"torch.{self.dtype}",
                quantization=self.quantization,
                max_model_len=length,
                enforce_eager=self.enforce_eager,
                architectures=hf_config.architectures,
                hf_config=hf_config,
                has_weights=self.load_format == "dummy" or any(Path(self.model).glob("*.safetensors")),
            ),
            cache_config=SimpleNamespace(
                enable_prefix_caching=self.enable_prefix_caching is not False,
                cache_dtype="auto" if self.kv_cache_dtype == "fp8" else self.kv_cache_dtype,  # as on a CPU
                block_size=self.block_size or 16,
                gpu_memory_utilization=self.gpu_memory_utilization,
            ),
            scheduler_config=SimpleNamespace(
                max_num_seqs=sequences,
                max_num_batched_tokens=tokens,
                enable_chunked_prefill=self.enable_chunked_prefill is not False,
            ),
            parallel_config=SimpleNamespace(
                tensor_parallel_size=self.tensor_parallel_size,
                pipeline_parallel_size=self.pipeline_parallel_size,
                worker_extension_cls=self.worker_extension_cls,
            ),
            speculative_config=self.speculative_config,
        )
