"""Define and validate the fields of an experiment in a study file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from pytest_llem.study.dataset import MAX_COUNT, SYNTHETIC, DatasetConfig, LengthConfig, WorkloadShape, overrides
from pytest_llem.study.engines import (
    COMMAND,
    DEFAULT_BACKEND,
    ENGINES,
    CommandConfig,
    PyTorchConfig,
    VLLMConfig,
)
from pytest_llem.study.load import LoadConfig
from pytest_llem.study.section import Section, check_finite
from pytest_llem.study.server import SERVER, ServerConfig

Precision = Literal["fp32", "fp16", "bf16"]
#: Names of these data types in PyTorch, vLLM and SGLang.
DATA_TYPES: dict[Precision, str] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

LengthMode = Literal["fixed", "natural"]
DatasetOrder = Literal["interleaved", "grouped", "shuffled"]
PromptFormat = Literal["raw", "chat"]
Preset = Literal["deterministic", "standard", "creative", "factual"]

#: Chooses the best meter that the machine has.
AUTO = "auto"

#: Meters of LLenergyMeasure 2.0 that are read as ``auto``.
FORMER_METERS = ("zeus", "codecarbon")

#: Fields of each decoder preset, as in LLenergyMeasure 2.0; fields that are given override them.
PRESETS: dict[str, dict[str, Any]] = {
    "deterministic": {"temperature": 0.0, "do_sample": False},
    "standard": {"temperature": 1.0, "do_sample": True, "top_p": 0.95, "top_k": 50},
    "creative": {"temperature": 0.8, "do_sample": True, "top_p": 0.9, "repetition_penalty": 1.1},
    "factual": {"temperature": 0.3, "do_sample": True, "top_k": 10},
}


class DecoderConfig(Section):
    """Choice of the next token, for every engine."""

    # Excluded because the expanded fields are what is run, hashed and recorded.
    preset: Preset | None = Field(None, exclude=True)
    """Values for several of these fields: ``deterministic``, ``standard``, ``creative`` or ``factual``. Fields
    that are given override it. Default null: none.
    """
    temperature: float = Field(1.0, ge=0)
    """Divides the logits; 0 takes the likeliest token. Default 1.0."""
    do_sample: bool = True
    """Sample instead of taking the likeliest token. Default true."""
    top_k: int = Field(50, ge=0)
    """Sample among this many likeliest tokens, 0 for all. Default 50."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample among the likeliest tokens whose probabilities add up to this. Default 1.0."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Exclude tokens less likely than this share of the likeliest token's probability. Default null: none."""
    repetition_penalty: float = Field(1.0, gt=0)
    """Above 1 discourages repeated tokens. Default 1.0."""
    min_new_tokens: int | None = Field(None, ge=1)
    """Minimum number of tokens of a sequence. Default null: a sequence may end at once. Has no effect with
    ``measurement.length_mode: fixed``.
    """

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: Any) -> Any:
        preset = data.get("preset") if isinstance(data, dict) else None
        return {**PRESETS[preset], **data} if isinstance(preset, str) and preset in PRESETS else data

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return not self.do_sample or self.temperature == 0


class WarmupConfig(Section):
    """Warm-up before the measured window."""

    enabled: bool = True
    """Warm up. Default true."""
    n_warmup: int = Field(5, ge=1)
    """Runs of the longest batch, and as many of the median batch. Default 5."""
    convergence_detection: bool = True
    """After these runs, continue until latencies are steady. Default true."""
    cv_threshold: float = Field(0.05, gt=0)
    """Latencies are steady if the last ``window_size`` have a coefficient of variation below this. Default 0.05.
    """
    window_size: int = Field(5, ge=2)
    """Number of latencies in that check. Default 5."""
    min_prompts: int = Field(5, ge=1)
    """Minimum number of runs of the median batch before latencies can count as steady. Default 5."""
    max_prompts: int = Field(20, ge=1)
    """Maximum number of runs until latencies are steady, those of the longest batch included; the result warns if
    they are not. The first ``2 · n_warmup`` runs take place in any case. Default 20.
    """
    thermal_floor_seconds: float = Field(0.0, ge=0)
    """Minimum duration of the warm-up, in seconds. Default 0."""

    @model_validator(mode="after")
    def _can_converge(self) -> WarmupConfig:
        # The defaults are not refused: studies for LLenergyMeasure with few runs warm up without settling.
        fields = type(self).model_fields
        given = [(getattr(self, name), name) for name in ("window_size", "min_prompts")]
        needed, name = max((one for one in given if one[0] != fields[one[1]].default), default=(0, ""))
        latencies = max(self.n_warmup, self.max_prompts - self.n_warmup)
        if self.enabled and self.convergence_detection and needed > latencies:
            raise ValueError(
                f"{name} {needed} cannot be reached: max_prompts {self.max_prompts} allows {latencies} runs of "
                f"the median batch, beside {self.n_warmup} of the longest: "
                f"raise max_prompts to {self.n_warmup + needed}, or lower {name}"
            )
        return self


#: Number of consecutive parts of an idle power measurement; their scatter is its uncertainty.
BASELINE_PARTS = 5


class BaselineConfig(Section):
    """Idle power with the model loaded, which ``active_energy_j`` subtracts."""

    enabled: bool = True
    """Measure idle power, if a meter is available. Default true."""
    duration_seconds: float = Field(30.0, ge=5, le=120)
    """Time of the measurement, in seconds; a fifth of it is repeated after each window. Default 30."""

    @property
    def part_seconds(self) -> float:
        """Length of one part of the measurement, and of the measurement after the window, in s."""
        return self.duration_seconds / BASELINE_PARTS


class EnergyConfig(Section):
    """Choice of the energy meter."""

    backend: str | None = AUTO
    """``auto`` (the GPU's energy counter if the engine runs on a GPU, else RAPL, else an estimate), the name of
    one meter (``nvml``, ``rapl``, ``estimate`` or an installed one), or null for none. Default ``auto``;
    LLenergyMeasure's ``zeus`` and ``codecarbon`` are read as ``auto``. If a meter is named, gates judge its energy
    even if it does not cover the engine's devices.
    """
    allow_estimated: bool = False
    """Accept estimated energy without a warning, and let gates judge it. Part of no hash. Default false."""

    @field_validator("backend")
    @classmethod
    def _former_meter(cls, backend: str | None) -> str | None:
        return AUTO if backend in FORMER_METERS else backend


class MeasurementConfig(Section):
    """The measured window."""

    min_window_seconds: float = Field(10.0, ge=0)
    """Minimum length of the window, in seconds; it consists of whole passes over the prompts. Default 10."""
    length_mode: LengthMode = "fixed"
    """``fixed``: every sequence gets exactly ``max_output_tokens``; ``natural``: a sequence ends at its
    end-of-sequence token. Default ``fixed``.
    """
    prefill_split: bool = False
    """Measure time and energy of prefill separately, in a second window with the same minimum length and one new
    token per prompt. Default false.
    """


class LoRAConfig(Section):
    """An adapter on top of the model, from the Hugging Face hub or a folder."""

    adapter_id: str | None = Field(None, min_length=1)
    """Name of the adapter on the Hugging Face hub. Default null."""
    adapter_path: str | None = Field(None, min_length=1)
    """Folder of the adapter. Default null. Exactly one of ``adapter_id`` and ``adapter_path`` is required."""
    revision: str | None = Field(None, min_length=1)
    """Branch, tag or commit of the adapter on the hub. Default null: its main branch."""
    merge_weights: bool = False
    """Merge the adapter into the model when loading. Default false."""

    @model_validator(mode="after")
    def _one_source(self) -> LoRAConfig:
        if (self.adapter_id is None) == (self.adapter_path is None):
            raise ValueError("needs either adapter_id or adapter_path")
        return self


class ExperimentConfig(Section):
    """One fully resolved experiment.

    A section named after another installed engine is passed to that engine unchecked; the engine refuses unknown
    options.

    Example:
        ExperimentConfig(model="builtin:tiny-llama", n=8, max_output_tokens=16)
    """

    model_config = ConfigDict(extra="allow")

    model: Annotated[str | None, WithJsonSchema({"type": "string", "minLength": 1})] = Field(None, min_length=1)
    """A local folder, ``builtin:tiny-llama``, or a name looked up under ``llem_model_path`` and on the Hugging
    Face hub. Required, unless ``backend`` is ``server``, ``command``, or a class or function of your own that
    needs none. Default null.
    """
    backend: str = Field(DEFAULT_BACKEND, min_length=1)
    """The engine: ``pytorch``, ``vllm``, ``server``, ``command``, an installed one, or ``package.module:name`` for
    a class or a function of your own. Default ``pytorch``.
    """
    n: int = Field(100, ge=1, le=MAX_COUNT)
    """Number of prompts in a pass. Default 100."""
    dataset: Annotated[str, Field(min_length=1)] | DatasetConfig = SYNTHETIC
    """``synthetic`` (random token ids), the path of a ``.txt`` (a prompt a line) or ``.jsonl`` file (``prompt``,
    ``text`` or ``conversations`` in each object), relative to the study, a dataset of the Hugging Face hub, or a
    mapping that describes synthetic prompts. A hub dataset is ``owner/name`` or
    ``owner/name@revision/subset:split#column``. The default split is ``train`` or the only one. The default column
    is the first of ``prompt``, ``text``, ``question``, ``instruction``, ``query``, ``input`` and ``content`` that
    holds strings. ``aienergyscore`` is AI Energy Score's 1,000 prompts, ``AIEnergyScore/text_generation``. Default
    ``synthetic``.
    """
    dataset_order: DatasetOrder = "interleaved"
    """Order of the prompts of a file or hub dataset: ``interleaved`` (one prompt of each ``source`` in rotation,
    if the objects of a ``.jsonl`` file, or the dataset's columns, have one; otherwise the given order),
    ``grouped`` (the same prompts, source by source) or ``shuffled`` (drawn with ``random_seed``). Default
    ``interleaved``.
    """
    prompt_format: PromptFormat = "raw"
    """``raw``, or ``chat`` to wrap each text prompt in the model's chat template. Default ``raw``."""
    precision: Precision = "bf16"
    """Data type of the weights: ``fp32``, ``fp16`` or ``bf16``. Default ``bf16``."""
    random_seed: int = Field(42, ge=0, lt=2**63)
    """Seed of the prompts and of the sampling, set again for each pass. On a CPU the same experiment generates the
    same tokens. On a GPU it may not, because some kernels are not deterministic; ``tokens`` of the result records
    whether the passes agree. Default 42.
    """
    max_input_tokens: int = Field(512, ge=1, le=MAX_COUNT)
    """Maximum length of a prompt, in tokens; longer prompts are cut. Synthetic prompts have exactly this length
    unless the dataset gives a distribution of lengths. Default 512.
    """
    max_output_tokens: int = Field(128, ge=1, le=MAX_COUNT)
    """Tokens to generate for each prompt. Default 128."""
    decoder: DecoderConfig = Field(default_factory=DecoderConfig)
    """Choice of the next token. Default: sampling."""
    warmup: WarmupConfig = Field(default_factory=WarmupConfig)
    """Warm-up before the measured window. Default: until latencies are steady."""
    baseline: BaselineConfig = Field(default_factory=BaselineConfig)
    """Idle power. Default: measured for 30 s."""
    energy: EnergyConfig = Field(default_factory=EnergyConfig)
    """Choice of the energy meter. Default: the best available."""
    measurement: MeasurementConfig = Field(default_factory=MeasurementConfig)
    """The measured window. Default: 10 s."""
    pytorch: PyTorchConfig | None = None
    """Options of the engine ``pytorch``. Default: its defaults."""
    vllm: VLLMConfig | None = None
    """Options of the engine ``vllm``. Default null: its defaults."""
    server: ServerConfig | None = None
    """The server of the backend ``server``. Default null."""
    load: LoadConfig | None = None
    """The load on a server. Required with ``backend: server``. Default null."""
    tensorrt: dict[str, Any] | None = None
    """Options of the engine ``tensorrt``, under its own names. Default null: its defaults."""
    command: CommandConfig | None = None
    """Options of the engine ``command``, a command of your own that measures. Default null.
    """
    lora: LoRAConfig | None = None
    """An adapter on top of the model. Default null: none. Not supported yet."""
    passthrough_kwargs: dict[str, Any] | None = None
    """Further arguments of the engine. ``pytorch`` accepts those of ``transformers.GenerationConfig``. Default
    null: none.
    """
    output_dir: str | None = Field(None, min_length=1)
    """Parent of the study's results directory, relative to rootdir. Overridden by ``--llem-results-dir``. The same
    for the whole study; part of no hash. Default null: the ini option ``llem_results_dir``.
    """

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        """Add the section ``pytorch``, so that its defaults are part of the configuration, and copy the number and
        lengths of prompts from the dataset to the experiment's fields, so that both agree.
        """
        if not isinstance(data, dict):
            return data
        if data.get("backend", DEFAULT_BACKEND) == "pytorch" and data.get("pytorch") is None:
            data = {**data, "pytorch": {}}
        dataset = data.get("dataset")
        if isinstance(dataset, dict):
            data = {**data, **overrides(dataset)}
        return data

    @model_validator(mode="after")
    def _goes_together(self) -> ExperimentConfig:
        if self.backend == COMMAND and self.command is None:
            error = InitErrorDetails(type="missing", loc=(COMMAND, "run"), input=None)
            raise ValidationError.from_exception_data(type(self).__name__, [error])
        if self.model is None and ":" not in self.backend and self.backend not in (COMMAND, SERVER):
            kind = "string_type" if "model" in self.model_fields_set else "missing"
            error = InitErrorDetails(type=kind, loc=("model",), input=None)
            raise ValidationError.from_exception_data(type(self).__name__, [error])
        # An entry of ``experiments`` may remove a section of the whole study by null.
        extra = {name: section for name, section in (self.model_extra or {}).items() if section is not None}
        for name, section in extra.items():
            if name == self.backend and not isinstance(section, dict):
                raise ValueError(f"section {name!r} is not a mapping (got {section!r})")
            if name != self.backend and not isinstance(section, dict):
                raise ValueError(f"unknown key {name!r}")
        for name in (*ENGINES, *extra):
            if name != self.backend and (name in extra or getattr(self, name) is not None):
                raise ValueError(f"section {name!r} does not belong to backend {self.backend!r}")
        if (self.backend == SERVER) != (self.load is not None):
            raise ValueError(
                "backend 'server' needs a load: load.concurrency, load.rate or load.trace"
                if self.load is None
                else f"load needs backend 'server' (the backend is {self.backend!r})"
            )
        if self.prompt_format == "chat" and not self.has_texts:
            raise ValueError("prompt_format 'chat' needs a dataset of texts, and synthetic prompts are token ids")
        if self.pytorch is not None:
            self.pytorch.check_batch_size(self.n)
        shortest = self.decoder.min_new_tokens
        if shortest is not None and shortest > self.max_output_tokens:
            raise ValueError(
                f"decoder.min_new_tokens {shortest} is more than max_output_tokens {self.max_output_tokens}"
            )
        check_finite(self.passthrough_kwargs, "passthrough_kwargs")
        if self.backend != "pytorch":  # the section pytorch validates its fields itself
            check_finite(self.engine_section, self.backend)
        if self.passthrough_kwargs and (taken := {*self.passthrough_kwargs} & {*type(self).model_fields}):
            raise ValueError(f"passthrough_kwargs must not contain {min(taken)!r}: use the field of that name")
        return self

    @property
    def model_name(self) -> str:
        """The name of the model, where the engine has checked that there is one."""
        assert self.model is not None
        return self.model

    @property
    def has_texts(self) -> bool:
        """Whether the prompts are texts of a file or hub dataset, and not synthetic token ids."""
        return isinstance(self.dataset, str) and self.dataset != SYNTHETIC

    @property
    def engine_section(self) -> dict[str, Any]:
        """The engine's options in the study, by the engine's own names."""
        known = self.backend in ENGINES
        section = getattr(self, self.backend) if known else (self.model_extra or {}).get(self.backend)
        return section.model_dump() if isinstance(section, BaseModel) else dict(section or {})

    @property
    def workload(self) -> WorkloadShape:
        """Number and lengths of the prompts, with all defaults filled in."""
        dataset = self.dataset if isinstance(self.dataset, DatasetConfig) else DatasetConfig()
        return WorkloadShape(
            n=self.n,
            input_len=self.max_input_tokens,
            output_len=self.max_output_tokens,
            seed=self.random_seed if dataset.seed is None else dataset.seed,
            lengths=dataset.input_len if isinstance(dataset.input_len, LengthConfig) else None,
        )
