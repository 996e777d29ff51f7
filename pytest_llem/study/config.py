"""What an experiment is told to do: the fields of a study file, validated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Precision = Literal["fp32", "fp16", "bf16"]
LengthMode = Literal["fixed", "natural"]
CycleOrder = Literal["sequential", "interleaved", "shuffled"]


#: Leaves the choice of the meter to what the machine has.
AUTO = "auto"


class Section(BaseModel):
    """A frozen part of a study file: unknown keys are errors, nothing is coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DatasetConfig(Section):
    """Synthetic prompts, spelt out. What is given here wins over the experiment's own fields.

    Attributes:
        n: Number of prompts; default: the experiment's ``n``.
        input_len: Tokens in each prompt; default: ``max_input_tokens``.
        output_len: Tokens to generate for each; default: ``max_output_tokens``.
        seed: Seed of the token ids; default: ``random_seed``.
    """

    n: int | None = Field(None, ge=1)
    input_len: int | None = Field(None, ge=1)
    output_len: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=0)


@dataclass(frozen=True)
class WorkloadShape:
    """Number of prompts, tokens in and out of each at most, and the seed of synthetic ones."""

    n: int
    input_len: int
    output_len: int
    seed: int


class DecoderConfig(Section):
    """How the next token is chosen, whatever the engine.

    Attributes:
        temperature: Divides the logits, > 0. Default 1.0.
        do_sample: Sample (default), or take the likeliest token.
        top_k: Sample among this many likeliest tokens, 0 for all. Default 50.
        top_p: Sample among the likeliest tokens that hold this probability. Default 1.0.
        min_p: Leave out tokens less likely than this share of the likeliest one's probability.
        repetition_penalty: Above 1 discourages repeated tokens. Default 1.0.
    """

    temperature: float = Field(1.0, gt=0)
    do_sample: bool = True
    top_k: int = Field(50, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0)


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


class EnergyConfig(Section):
    """Which meter reads the energy.

    Attributes:
        backend: ``auto`` (the GPU's counter where the engine runs on one, else RAPL, else an estimate),
            the name of one meter (``nvml``, ``rapl``, ``estimate`` or an installed one), or null for none.
    """

    backend: str | None = AUTO


class MeasurementConfig(Section):
    """The measured window.

    Attributes:
        min_window_seconds: The window holds as many whole passes over the prompts as fill this. Default 10.
        length_mode: ``fixed``: every sequence gets exactly ``max_output_tokens`` (default);
            ``natural``: a sequence ends at its end-of-sequence token.
    """

    min_window_seconds: float = Field(10.0, ge=0)
    length_mode: LengthMode = "fixed"


class PyTorchConfig(Section):
    """The engine of PyTorch and transformers.

    Attributes:
        batch_size: Prompts in one ``generate`` call. Default 1.
        attn_implementation: As transformers names it (``eager``, ``sdpa``, ``flash_attention_2``, …);
            null leaves it to transformers.
        use_cache: Keep keys and values of past tokens. Default true.
        cache_implementation: transformers' name of the cache (``dynamic``, ``static``, …); null leaves it to
            transformers.
        revision: Branch, tag or commit of the model on the hub.
        trust_remote_code: Run the model's own code from the hub. Default false.
    """

    batch_size: int = Field(1, ge=1)
    attn_implementation: str | None = None
    use_cache: bool = True
    cache_implementation: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _cache_is_used(self) -> PyTorchConfig:
        if self.cache_implementation and not self.use_cache:
            raise ValueError(f"cache_implementation {self.cache_implementation!r} needs use_cache: true")
        return self


class ExperimentConfig(Section):
    """One fully resolved experiment.

    A section named after an engine that is installed beside ours is kept as it is and handed to that engine,
    which refuses what it does not know.

    Attributes:
        model: A local folder, ``builtin:tiny-llama``, or a name looked up under ``llem_model_path`` and on the
            Hugging Face hub. Required.
        backend: The engine: ``pytorch`` (default) or an installed one.
        n: Number of prompts in a pass. Default 100.
        dataset: ``synthetic`` (default: random token ids), the path of a ``.txt`` (a prompt a line) or
            ``.jsonl`` file (``prompt`` or ``text`` in each object), relative to the study, or a
            :class:`DatasetConfig`.
        precision: Data type of the weights. Default ``bf16``.
        random_seed: Seeds the prompts and the sampling. Default 42.
        max_input_tokens: Longer prompts are cut to this; synthetic ones have exactly this. Default 512.
        max_output_tokens: Tokens to generate for each prompt. Default 128.
    """

    model_config = ConfigDict(extra="allow")

    model: str = Field(min_length=1)
    backend: str = "pytorch"
    n: int = Field(100, ge=1)
    dataset: Annotated[str, Field(min_length=1)] | DatasetConfig = "synthetic"
    precision: Precision = "bf16"
    random_seed: int = Field(42, ge=0, lt=2**63)
    max_input_tokens: int = Field(512, ge=1)
    max_output_tokens: int = Field(128, ge=1)
    decoder: DecoderConfig = Field(default_factory=DecoderConfig)
    warmup: WarmupConfig = Field(default_factory=WarmupConfig)
    energy: EnergyConfig = Field(default_factory=EnergyConfig)
    measurement: MeasurementConfig = Field(default_factory=MeasurementConfig)
    pytorch: PyTorchConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _own_section(cls, data: Any) -> Any:
        """The chosen engine always has its section, so that its defaults are part of the configuration."""
        if isinstance(data, dict) and data.get("backend", "pytorch") == "pytorch" and data.get("pytorch") is None:
            return {**data, "pytorch": {}}
        return data

    @model_validator(mode="before")
    @classmethod
    def _dataset_wins(cls, data: Any) -> Any:
        """What the dataset says of number and lengths is the experiment's, so that no other figure is shown."""
        dataset = data.get("dataset") if isinstance(data, dict) else None
        if not isinstance(dataset, dict):
            return data
        names = {"n": "n", "input_len": "max_input_tokens", "output_len": "max_output_tokens"}
        given = {ours: dataset.get(its) for its, ours in names.items()}
        return {**data, **{ours: value for ours, value in given.items() if type(value) is int and value > 0}}

    @model_validator(mode="after")
    def _no_foreign_section(self) -> ExperimentConfig:
        sections: dict[str, Any] = {**(self.model_extra or {}), "pytorch": self.pytorch}
        for name, section in sections.items():
            if name == self.backend or section is None:
                continue
            if not isinstance(section, dict | PyTorchConfig):
                raise ValueError(f"unknown key {name!r}")
            raise ValueError(f"section {name!r} does not belong to backend {self.backend!r}")
        return self

    @property
    def engine_section(self) -> dict[str, Any]:
        """What the study says to the engine, by the engine's own names."""
        section = self.pytorch if self.backend == "pytorch" else (self.model_extra or {}).get(self.backend)
        return section.model_dump() if isinstance(section, BaseModel) else dict(section or {})

    @property
    def workload(self) -> WorkloadShape:
        """Number and lengths of the prompts, with every default filled in."""
        seed = self.dataset.seed if isinstance(self.dataset, DatasetConfig) else None
        return WorkloadShape(
            n=self.n,
            input_len=self.max_input_tokens,
            output_len=self.max_output_tokens,
            seed=self.random_seed if seed is None else seed,
        )


class ExecutionConfig(Section):
    """How the experiments of a study are run; none of it changes what is measured.

    Attributes:
        n_cycles: Repetitions of every point, each in a process of its own. Default: 3 for a study, 1 for a
            single experiment.
        cycle_order: ``sequential`` (A A B B), ``interleaved`` (A B A B) or ``shuffled`` (each cycle in an
            order of its own, the default).
        shuffle_seed: Default: taken from the study's design, so that a rerun shuffles alike.
        experiment_timeout_seconds: End an experiment that takes longer, in seconds; null for never (default).
    """

    n_cycles: int | None = Field(None, ge=1)
    cycle_order: CycleOrder = "shuffled"
    shuffle_seed: int | None = None
    experiment_timeout_seconds: float | None = Field(None, gt=0)
