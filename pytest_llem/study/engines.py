"""Define the engine sections of a study file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from pytest_llem.study.section import NullableSection, Section, single_error

#: Engines whose sections are part of the grammar, installed or not.
ENGINES = ("pytorch", "vllm", "tensorrt")

DEFAULT_BACKEND = "pytorch"

DeviceMap = Annotated[
    str | dict[str, int | str], single_error("must be a name or a mapping of modules to devices")
]

MaxMemory = Annotated[dict[str, int | str], single_error("must be a mapping of devices to sizes")]


class PyTorchConfig(NullableSection):
    """Options of the engine ``pytorch``, which uses transformers."""

    batch_size: int = Field(1, ge=1, le=1_000_000)
    """Prompts in one ``generate`` call, at most ``n``. Default 1."""
    attn_implementation: str | None = Field(None, min_length=1)
    """Transformers' name of the attention (``eager``, ``sdpa``, ``flash_attention_2``, …). Default null:
    transformers chooses.
    """
    torch_compile: bool = False
    """Compile the model's forward pass with ``torch.compile``, during the warm-up. Default false."""
    torch_compile_mode: str | None = Field(None, min_length=1)
    """Mode of ``torch.compile`` (``default``, ``reduce-overhead``, ``max-autotune``, …). Default null:
    ``default``. Needs ``torch_compile``.
    """
    torch_compile_backend: str | None = Field(None, min_length=1)
    """Backend of ``torch.compile``. Default null: ``inductor``. Needs ``torch_compile``."""
    load_in_4bit: bool = False
    """Quantise the weights to 4 bits with bitsandbytes. Default false."""
    load_in_8bit: bool = False
    """Quantise the weights to 8 bits with bitsandbytes. Default false."""
    bnb_4bit_compute_dtype: Literal["float16", "bfloat16", "float32"] | None = None
    """Data type of bitsandbytes' arithmetic, ``float16``, ``bfloat16`` or ``float32``. Default null: float32.
    Needs ``load_in_4bit``.
    """
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None
    """``nf4`` or ``fp4``. Default null: fp4, bitsandbytes' default. Needs ``load_in_4bit``."""
    bnb_4bit_use_double_quant: bool | None = None
    """Quantise the quantisation constants too. Default null: no. Needs ``load_in_4bit``."""
    use_cache: bool = True
    """Keep the keys and values of past tokens (KV cache). Default true."""
    cache_implementation: str | None = Field(None, min_length=1)
    """Transformers' name of the cache (``dynamic``, ``static``, …). Default null: transformers chooses."""
    num_beams: int = Field(1, ge=1, le=10_000)
    """Beams of a beam search; 1 is none. Default 1."""
    early_stopping: bool = False
    """End a beam search as soon as ``num_beams`` candidates are done. Default false."""
    length_penalty: float = 1.0
    """Exponent of the length that a beam's score is divided by. Default 1.0."""
    no_repeat_ngram_size: int = Field(0, ge=0)
    """Length of token sequences that may not occur twice; 0 for no such limit. Default 0."""
    prompt_lookup_num_tokens: int | None = Field(None, ge=1)
    """Tokens to draft from the prompt in each step (speculative decoding). Default null: none."""
    device_map: DeviceMap | None = None
    """Placement of the model's parts, as in accelerate (``auto``, ``balanced``, a device, or a mapping). Default
    null: the whole model on the first device.
    """
    max_memory: MaxMemory | None = None
    """Maximum memory by device (``{"0": 10GiB, cpu: 50GiB}``), for ``device_map``. Default null: no limit."""
    revision: str | None = Field(None, min_length=1)
    """Branch, tag or commit of the model on the hub. Default null: its main branch."""
    trust_remote_code: bool = False
    """Run the model's own code from the hub. Default false."""
    deterministic: bool = True
    """Generate the same tokens for the same prompts and seed on one device: GPUs decode without cuDNN's attention,
    whose results vary. False lets PyTorch choose. Default true.
    """
    num_processes: int = Field(1, ge=1)
    """Processes that share the model. Default 1; only 1 is supported."""

    def check_batch_size(self, n: int) -> None:
        """Raise if a pass has fewer prompts than ``batch_size``.

        Args:
            n: Number of prompts in a pass.

        Raises:
            ValueError: ``batch_size`` is more than *n*.
        """
        if self.batch_size > n:
            raise ValueError(f"batch_size {self.batch_size} is more than n {n}: no batch of a pass is that large")

    @model_validator(mode="after")
    def _goes_together(self) -> PyTorchConfig:
        if self.cache_implementation and not self.use_cache:
            raise ValueError(f"cache_implementation {self.cache_implementation!r} needs use_cache: true")
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other")
        if not self.torch_compile:
            for name in ("torch_compile_mode", "torch_compile_backend"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs torch_compile: true")
        if not self.load_in_4bit:
            for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} needs load_in_4bit: true")
        if self.max_memory and not self.device_map:
            raise ValueError("max_memory needs a device_map")
        if self.prompt_lookup_num_tokens and self.num_beams > 1:
            raise ValueError("prompt_lookup_num_tokens and num_beams exclude each other")
        if self.prompt_lookup_num_tokens and self.batch_size > 1:
            raise ValueError("prompt_lookup_num_tokens needs batch_size: 1")
        return self


class VLLMConfig(Section):
    """Options of the engine ``vllm``, under vLLM's own names. Other keys are passed to the engine unchecked."""

    model_config = ConfigDict(extra="allow")

    engine: dict[str, Any] | None = None
    """Arguments of ``vllm.LLM``. Default null: none."""
    sampling: dict[str, Any] | None = None
    """Further arguments of ``vllm.SamplingParams``. Default null: none."""
    beam_search: dict[str, Any] | None = None
    """Arguments of ``vllm.BeamSearchParams``. Default null: no beam search."""


class LoRAConfig(Section):
    """An adapter on top of the model, from the Hugging Face hub or a folder."""

    adapter_id: str | None = Field(None, min_length=1)
    """Its name on the Hugging Face hub. Default null."""
    adapter_path: str | None = Field(None, min_length=1)
    """Its folder. Default null. Exactly one of ``adapter_id`` and ``adapter_path`` is required."""
    revision: str | None = Field(None, min_length=1)
    """Branch, tag or commit on the hub. Default null: its main branch."""
    merge_weights: bool = False
    """Merge it into the model when loading. Default false."""

    @model_validator(mode="after")
    def _one_source(self) -> LoRAConfig:
        if (self.adapter_id is None) == (self.adapter_path is None):
            raise ValueError("needs either adapter_id or adapter_path")
        return self
