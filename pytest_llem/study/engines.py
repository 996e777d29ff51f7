"""Define the engine sections of a study file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from pytest_llem.study.engine_options import EngineOptions, Needs
from pytest_llem.study.section import single_error

if TYPE_CHECKING:  # which imports this module
    from pytest_llem.study.config import ExperimentConfig

#: Engines whose sections are part of the grammar, installed or not.
ENGINES = ("pytorch", "vllm", "server", "tensorrt", "command")

#: Name of the engine that runs a command of the user.
COMMAND = "command"

DEFAULT_BACKEND = "pytorch"

DeviceMap = Annotated[
    str | dict[str, int | str], single_error("must be a name or a mapping of modules to devices")
]

MaxMemory = Annotated[dict[str, int | str], single_error("must be a mapping of devices to sizes")]

#: Bytes per weight in bitsandbytes' formats, quantisation constants and unquantised layers included.
BYTES_4BIT, BYTES_8BIT = 0.6, 1.1


class PyTorchConfig(EngineOptions):
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

    def needs(self, config: ExperimentConfig, parameters: int | None) -> Needs:
        self.check_batch_size(config.n)
        bytes_per_weight = BYTES_4BIT if self.load_in_4bit else BYTES_8BIT if self.load_in_8bit else None
        places = self.device_map.values() if isinstance(self.device_map, dict) else [self.device_map]
        return Needs(
            gpus=1 if self.device_map is None else None,
            sequences=self.batch_size * self.num_beams,
            compiles=self.torch_compile,
            weight_bytes=None if bytes_per_weight is None or parameters is None else parameters * bytes_per_weight,
            recomputes=not self.use_cache,
            offloads=any(str(place).startswith(("cpu", "disk")) for place in (*places, *(self.max_memory or {}))),
            uses_torch=True,
            resolves_model=True,
            model_revision=self.revision,
        )

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


#: Arguments of vLLM by which the model is split or copied.
VLLM_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def product_of_sizes(arguments: Mapping[str, Any], names: Iterable[str]) -> int:
    """Return the product of the sizes by which a model is split or copied: the number of its GPUs."""
    sizes = (str(arguments.get(name)) for name in names)
    return math.prod(int(size) for size in sizes if size.isdecimal())


#: Sequences that vLLM generates at a time, unless ``max_num_seqs`` is given; 1,024 on GPUs of 70 GiB or more.
VLLM_SEQUENCES = 256


class VLLMConfig(EngineOptions):
    """Options of the engine ``vllm``, under vLLM's own names. The vLLM that will run checks them."""

    engine: dict[str, Any] | None = None
    """Arguments of ``vllm.LLM``, such as ``max_num_seqs`` or ``tensor_parallel_size``. ``enable_prefix_caching``
    is false unless given. Default null: none.
    """
    sampling: dict[str, Any] | None = None
    """Further arguments of ``vllm.SamplingParams``, such as ``presence_penalty``. Default null: none."""
    beam_search: dict[str, Any] | None = None
    """Arguments of ``vllm.BeamSearchParams``. Not supported. Default null: no beam search."""

    def gpus(self) -> int:
        """Return the number of GPUs: the product of the sizes by which the model is split or copied."""
        return product_of_sizes(self.engine or {}, VLLM_SIZES)

    def needs(self, config: ExperimentConfig, parameters: int | None) -> Needs:
        given = self.engine or {}
        sequences = given.get("max_num_seqs")
        return Needs(
            gpus=self.gpus(),
            sequences=min(config.n, sequences if isinstance(sequences, int) else VLLM_SEQUENCES),
            compiles=not given.get("enforce_eager"),
            uses_torch=True,
            memory_share=vllm_memory_share(given),
            resolves_model=True,
            model_revision=given.get("revision"),
        )


def vllm_memory_share(engine: Mapping[str, Any]) -> float | None:
    """Return the share of a GPU's memory that vLLM reserves. Its own default is 0.9."""
    given = engine.get("gpu_memory_utilization", 0.9)
    has_size = engine.get("kv_cache_memory_bytes") is not None
    return None if has_size or not isinstance(given, int | float) else float(given)


#: Formats of result files, by their names in a study.
FileFormat = Literal["vllm", "aiperf", "guidellm", "sglang", "llama-bench", "own"]


class CommandConfig(EngineOptions):
    """A command of your own that measures, such as a load generator. The file that it writes is read
    as by ``llem import``.

    Every further key is a value for placeholders, so that it may be an axis: ``command.rate: 4`` for ``{rate}``.
    """

    model_config = ConfigDict(extra="allow")

    run: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)
    """The program and its arguments, without a shell. ``{model}`` and other fields of the experiment are filled
    in, ``{python}`` is the interpreter of the experiment, and ``{out}`` the path of the file or folder that the
    command has to write. Without ``{out}``, its standard output is the file. ``{{`` and ``}}`` are braces. A field
    of the experiment that no placeholder names is refused, since it would have no effect. Required.
    """
    format: FileFormat | None = None
    """Format of the file: ``vllm``, ``aiperf``, ``guidellm``, ``sglang``, ``llama-bench`` or ``own``. Default
    null: found out from its content.
    """
    fresh_server: bool = False
    """The command starts the server that it measures. Otherwise, except with the tool
    ``llama-bench``, all cycles measure one server: they are no repetitions, and no gate compares them. Default
    false.
    """
    gpus: int | None = Field(None, ge=0)
    """Number of GPUs to lease and to meter. Default null: every visible GPU."""

    def needs(self, config: ExperimentConfig, parameters: int | None) -> Needs:
        from pytest_llem.study.substitution import unreached  # which imports this module

        return Needs(gpus=self.gpus, compiles=False, unused=unreached(config, self.run))
