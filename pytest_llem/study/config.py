"""What an experiment is told to do: the fields of a study file, validated."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pytest_llem.study.dataset import MOST, SYNTHETIC, DatasetConfig, LengthConfig, WorkloadShape, overrides
from pytest_llem.study.engines import DEFAULT_BACKEND, ENGINES, LoRAConfig, PyTorchConfig, VLLMConfig
from pytest_llem.study.section import Section, finite

Precision = Literal["fp32", "fp16", "bf16"]
LengthMode = Literal["fixed", "natural"]
DatasetOrder = Literal["interleaved", "grouped", "shuffled"]
PromptFormat = Literal["raw", "chat"]
Preset = Literal["deterministic", "standard", "creative", "factual"]

#: Leaves the choice of the meter to what the machine has.
AUTO = "auto"

#: Meters of LLenergyMeasure 2.0 that stand for "the best there is".
FORMER_METERS = ("zeus", "codecarbon")

#: What a preset of the decoder stands for; a field that is given wins. As in LLenergyMeasure 2.0.
PRESETS: dict[str, dict[str, Any]] = {
    "deterministic": {"temperature": 0.0, "do_sample": False},
    "standard": {"temperature": 1.0, "do_sample": True, "top_p": 0.95, "top_k": 50},
    "creative": {"temperature": 0.8, "do_sample": True, "top_p": 0.9, "repetition_penalty": 1.1},
    "factual": {"temperature": 0.3, "do_sample": True, "top_k": 10},
}


class DecoderConfig(Section):
    """How the next token is chosen, whatever the engine.

    Attributes:
        preset: A name for several of these: ``deterministic``, ``standard``, ``creative`` or ``factual``. What
            is given beside it wins. Default null: none.
        temperature: Divides the logits; 0 takes the likeliest token. Default 1.0.
        do_sample: Sample, or take the likeliest token. Default true.
        top_k: Sample among this many likeliest tokens, 0 for all. Default 50.
        top_p: Sample among the likeliest tokens that hold this probability. Default 1.0.
        min_p: Leave out tokens less likely than this share of the likeliest one's probability. Default null:
            none.
        repetition_penalty: Above 1 discourages repeated tokens. Default 1.0.
        min_new_tokens: No sequence ends before this many tokens. Default null: it may end at once. With
            ``measurement.length_mode: fixed`` none ends early anyway.
    """

    # What it stands for is what is run, hashed and written down.
    preset: Preset | None = Field(None, exclude=True)
    temperature: float = Field(1.0, ge=0)
    do_sample: bool = True
    top_k: int = Field(50, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)
    min_new_tokens: int | None = Field(None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _expand_preset(cls, data: Any) -> Any:
        preset = data.get("preset") if isinstance(data, dict) else None
        return {**PRESETS[preset], **data} if isinstance(preset, str) and preset in PRESETS else data

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, whatever else is given."""
        return not self.do_sample or self.temperature == 0


class WarmupConfig(Section):
    """What runs before the measured window.

    Attributes:
        enabled: Warm up at all. Default true.
        n_warmup: Runs of the longest and of the median batch. Default 5.
        convergence_detection: Then go on until latencies settle. Default true.
        cv_threshold: They have settled when the last ``window_size`` have a coefficient of variation
            below this. Default 0.05.
        window_size: See above. Default 5.
        min_prompts: Runs before latencies may be called settled. Default 5.
        max_prompts: Give up after this many runs in search of it, and say so. Default 20.
        thermal_floor_seconds: Keep the load on for at least this long, in seconds. Default 0.
    """

    enabled: bool = True
    n_warmup: int = Field(5, ge=1)
    convergence_detection: bool = True
    cv_threshold: float = Field(0.05, gt=0)
    window_size: int = Field(5, ge=2)
    min_prompts: int = Field(5, ge=1)
    max_prompts: int = Field(20, ge=1)
    thermal_floor_seconds: float = Field(0.0, ge=0)


#: Idle power is measured in so many parts, one right after the other, whose scatter tells how good it is.
BASELINE_PARTS = 5


class BaselineConfig(Section):
    """Power of the idle machine with the model loaded, which ``active_energy_j`` leaves out.

    Attributes:
        enabled: Measure it, where there is a meter that measures. Default true.
        duration_seconds: For how long, in seconds; after each window a fifth of that again. Default 30.
    """

    enabled: bool = True
    duration_seconds: float = Field(30.0, ge=5, le=120)

    @property
    def part_seconds(self) -> float:
        """Length of each of the parts that it is measured in, and of the measurement after the window, in s."""
        return self.duration_seconds / BASELINE_PARTS


class EnergyConfig(Section):
    """Which meter reads the energy.

    Attributes:
        backend: ``auto`` (the GPU's counter where the engine runs on one, else RAPL, else an estimate),
            the name of one meter (``nvml``, ``rapl``, ``estimate`` or an installed one), or null for none.
            Default ``auto``; so are LLenergyMeasure's ``zeus`` and ``codecarbon``. A meter that is named says what
            the energy is to cover: gates judge it also where that is not the engine's devices.
        allow_estimated: An estimate will do: it is not warned of, and a gate on energy may pass or fail by it.
            Part of no hash. Default false.
    """

    backend: str | None = AUTO
    allow_estimated: bool = False

    @field_validator("backend")
    @classmethod
    def _former_meter(cls, backend: str | None) -> str | None:
        return AUTO if backend in FORMER_METERS else backend


class MeasurementConfig(Section):
    """The measured window.

    Attributes:
        min_window_seconds: The window holds as many whole passes over the prompts as fill this. Default 10.
        length_mode: ``fixed``: every sequence gets exactly ``max_output_tokens``; ``natural``: a sequence ends
            at its end-of-sequence token. Default ``fixed``.
        prefill_split: Measure time and energy of the prompts apart from those of the answers: after the window, in
            a second one of at least the same time, each prompt gets one new token only. Default false.
    """

    min_window_seconds: float = Field(10.0, ge=0)
    length_mode: LengthMode = "fixed"
    prefill_split: bool = False


class ExperimentConfig(Section):
    """One fully resolved experiment.

    A section named after an engine that is installed beside ours is kept as it is and handed to that engine,
    which refuses what it does not know.

    Attributes:
        model: A local folder, ``builtin:tiny-llama``, or a name looked up under ``llem_model_path`` and on the
            Hugging Face hub. Required.
        backend: The engine: ``pytorch``, an installed one, or ``package.module:Class`` for one of your own,
            which is imported in the experiment's process only. Default ``pytorch``.
        n: Number of prompts in a pass. Default 100.
        dataset: ``synthetic`` (random token ids), the path of a ``.txt`` (a prompt a line) or ``.jsonl`` file
            (``prompt`` or ``text`` in each object), relative to the study, a dataset of the Hugging Face hub, or
            a mapping that spells synthetic prompts out. A hub's is ``owner/name``, and where it matters
            ``owner/name@revision/subset:split#column``. Unless they are named, the split is ``train`` or the only
            one, and the column the first of ``prompt``, ``text``, ``question``, ``instruction``, ``query``,
            ``input`` and ``content`` that holds strings. ``aienergyscore`` stands for AI Energy Score's 1,000
            prompts, ``AIEnergyScore/text_generation``. Default ``synthetic``.
        dataset_order: Order of a file's or a hub dataset's prompts: ``interleaved`` (in turn from each
            ``source`` that the objects of a ``.jsonl``, or a column of that name, tell, else as they stand),
            ``grouped`` (the same prompts, source by source) or ``shuffled`` (drawn with ``random_seed``).
            Default ``interleaved``.
        prompt_format: ``raw``, or ``chat`` for the model's chat template around each prompt that is a text.
            Default ``raw``.
        precision: Data type of the weights: ``fp32``, ``fp16`` or ``bf16``. Default ``bf16``.
        random_seed: Seeds the prompts and the sampling, and each pass anew. On a CPU the same experiment generates
            the same tokens; on a GPU it need not, as not all its kernels are deterministic, and ``tokens``
            of the result tells whether the passes did. Default 42.
        max_input_tokens: Longer prompts are cut to this; synthetic ones have exactly this, unless the dataset says
            how their lengths are distributed. Default 512.
        max_output_tokens: Tokens to generate for each prompt. Default 128.
        decoder: How the next token is chosen. Default: sampling.
        warmup: What runs before the measured window. Default: until latencies settle.
        baseline: Power of the idle machine. Default: measured for 30 s.
        energy: Which meter reads the energy. Default: the best there is.
        measurement: The measured window. Default: 10 s.
        pytorch: Options of the engine ``pytorch``. Default: its defaults.
        vllm: Options of the engine ``vllm``. Default null: its defaults.
        tensorrt: Options of the engine ``tensorrt``, under its own names. Default null: its defaults.
        lora: An adapter on top of the model. Default null: none. Not supported yet.
        passthrough_kwargs: Arguments for the engine that no field has. ``pytorch`` takes those of
            ``transformers.GenerationConfig``. Default null: none.
        output_dir: Where the study's results folder goes, relative to rootdir, unless ``--llem-results-dir``
            says otherwise. The same for the whole study; part of no hash. Default null: the ini option
            ``llem_results_dir``.
    """

    model_config = ConfigDict(extra="allow")

    model: str = Field(min_length=1)
    backend: str = Field(DEFAULT_BACKEND, min_length=1)
    n: int = Field(100, ge=1, le=MOST)
    dataset: Annotated[str, Field(min_length=1)] | DatasetConfig = SYNTHETIC
    dataset_order: DatasetOrder = "interleaved"
    prompt_format: PromptFormat = "raw"
    precision: Precision = "bf16"
    random_seed: int = Field(42, ge=0, lt=2**63)
    max_input_tokens: int = Field(512, ge=1, le=MOST)
    max_output_tokens: int = Field(128, ge=1, le=MOST)
    decoder: DecoderConfig = Field(default_factory=DecoderConfig)
    warmup: WarmupConfig = Field(default_factory=WarmupConfig)
    baseline: BaselineConfig = Field(default_factory=BaselineConfig)
    energy: EnergyConfig = Field(default_factory=EnergyConfig)
    measurement: MeasurementConfig = Field(default_factory=MeasurementConfig)
    pytorch: PyTorchConfig | None = None
    vllm: VLLMConfig | None = None
    tensorrt: dict[str, Any] | None = None
    lora: LoRAConfig | None = None
    passthrough_kwargs: dict[str, Any] | None = None
    output_dir: str | None = Field(None, min_length=1)

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        """The engine ``pytorch`` always has its section, so that its defaults are part of the configuration. What
        a dataset says of number and lengths is the experiment's, so that no other figure is shown.
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
        extra = self.model_extra or {}
        for name, section in (*((name, getattr(self, name)) for name in ENGINES), *extra.items()):
            if name == self.backend or section is None:
                continue
            if not isinstance(section, dict | BaseModel):
                raise ValueError(f"unknown key {name!r}")
            raise ValueError(f"section {name!r} does not belong to backend {self.backend!r}")
        if self.prompt_format == "chat" and not self.has_texts:
            raise ValueError("prompt_format 'chat' needs a dataset of texts, and synthetic prompts are token ids")
        if self.pytorch is not None:
            self.pytorch.check_batch_size(self.n)
        shortest = self.decoder.min_new_tokens
        if shortest is not None and shortest > self.max_output_tokens:
            raise ValueError(
                f"decoder.min_new_tokens {shortest} is more than max_output_tokens {self.max_output_tokens}"
            )
        finite(self.passthrough_kwargs, "passthrough_kwargs")
        if self.backend != "pytorch":  # whose fields are all known, and looked at
            finite(self.engine_section, self.backend)
        if self.passthrough_kwargs and (taken := {*self.passthrough_kwargs} & {*type(self).model_fields}):
            raise ValueError(f"passthrough_kwargs may not hold {min(taken)!r}, which is a field of its own")
        return self

    @property
    def has_texts(self) -> bool:
        """Whether the prompts are texts of a file or of a hub's dataset, and not token ids of ours."""
        return isinstance(self.dataset, str) and self.dataset != SYNTHETIC

    @property
    def engine_section(self) -> dict[str, Any]:
        """What the study says to the engine, by the engine's own names."""
        known = self.backend in ENGINES
        section = getattr(self, self.backend) if known else (self.model_extra or {}).get(self.backend)
        return section.model_dump() if isinstance(section, BaseModel) else dict(section or {})

    @property
    def workload(self) -> WorkloadShape:
        """Number and lengths of the prompts, with every default filled in."""
        dataset = self.dataset if isinstance(self.dataset, DatasetConfig) else DatasetConfig()
        return WorkloadShape(
            n=self.n,
            input_len=self.max_input_tokens,
            output_len=self.max_output_tokens,
            seed=self.random_seed if dataset.seed is None else dataset.seed,
            lengths=dataset.input_len if isinstance(dataset.input_len, LengthConfig) else None,
        )
