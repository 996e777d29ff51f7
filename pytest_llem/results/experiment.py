"""The result of an experiment."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pytest_llem.results.contention import Contention
from pytest_llem.results.document import Document, Record
from pytest_llem.results.metrics import Metric
from pytest_llem.results.quality_warnings import QualityWarning
from pytest_llem.study.problems import shown

GapReason = Literal["fixed", "target", "timeout", "skipped"]


class Identity(Record):
    """Which experiment a result belongs to.

    Attributes:
        experiment_id: Unique in its study.
        config_hash: Of the resolved configuration.
        study_design_hash: Of the study, null for a lone experiment.
        axes: What distinguishes the point from the study's others: value by dotted key.
        cycle: Which repetition, from 1.
    """

    experiment_id: str
    config_hash: str
    study_design_hash: str | None = None
    axes: dict[str, Any] = Field(default_factory=dict)
    cycle: int = 1


class AdjustedSetting(Record):
    """A setting that did not run as it was given.

    Attributes:
        setting: Its dotted name in the study.
        given: The value in the study.
        effective: What ran; null where the setting has no effect.
        reason: Why.
    """

    setting: str
    given: Any
    effective: Any = None
    reason: str

    def __str__(self) -> str:
        ran = "has no effect" if self.effective is None else f"ran as {shown(self.effective)}"
        return f"setting {self.setting} {shown(self.given)} {ran}: {self.reason}"


class EngineRecord(Record):
    """What ran.

    Attributes:
        name: The engine.
        versions: Of the engine's packages, and of CUDA and cuDNN where it uses them.
        device: ``cpu`` or ``cuda``.
        device_names: Of each device.
        settings: The engine's effective settings, as it reports them after loading.
        adjusted: Those that differ from what the study gives, as far as the engine knows.
        model_source: ``builtin``, ``local``, ``model_path`` or ``hub``.
        model_revision: Commit on the hub, where known.
        model_fingerprint: SHA-256 over the ``config.json`` of the model's folder and the names and sizes of its
            files with weights: what tells local folders apart. Null where there is no folder.
        random_weights: The weights are no trained model's.
    """

    name: str
    versions: dict[str, str] = Field(default_factory=dict)
    device: str
    device_names: list[str] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)
    adjusted: list[AdjustedSetting] = Field(default_factory=list)
    model_source: str | None = None
    model_revision: str | None = None
    model_fingerprint: str | None = None
    random_weights: bool = False


class TokenRecord(Record):
    """Token accounting of one pass.

    Attributes:
        prompts: Number of prompts.
        input_tokens: Without padding.
        output_tokens: Up to and including each sequence's end.
        truncated_prompts: Prompts cut to ``max_input_tokens``.
        padding_waste: Share of the input positions that hold padding, 0 to 1.
        output_digest: SHA-256 of the first pass's output token ids, null where they are unknown.
        deterministic: Every pass, seeded alike, gave the same output token ids; null where there was one pass.
        dataset_hash: SHA-256 of the prompts in their order, a line of ASCII JSON for each: of their texts before
            they are cut or put into a template, or of synthetic token ids.
        dataset_revision: Commit of the hub's dataset that they are from, null where they are from none.
        requests: Of the window, over its recorded passes; null in results before schema 1.4.
        failed_requests: Of these, those that failed or returned no token.
        batches: Batches of a pass as they ran: how many, by the number of their prompts. Null in results before
            schema 1.4.
    """

    prompts: int
    input_tokens: int
    output_tokens: int
    truncated_prompts: int = 0
    padding_waste: float = 0.0
    output_digest: str | None = None
    deterministic: bool | None = None
    dataset_hash: str | None = None
    dataset_revision: str | None = None
    requests: int | None = None
    failed_requests: int | None = None
    batches: dict[int, int] | None = None


class WarmupRecord(Record):
    """What ran before the window.

    Attributes:
        runs: Number of batches.
        seconds: How long it took.
        converged: Latencies settled; null where nobody looked.
        cv: Coefficient of variation of the last latencies.
    """

    runs: int
    seconds: float
    converged: bool | None = None
    cv: float | None = None


class IdlePowerRecord(Record):
    """Power of the idle machine: with the model loaded, before warm-up, and with nothing loaded at all.

    Attributes:
        idle_power_w: With the model loaded and one batch run, in W; null where it was not measured.
        uncertainty_w: Standard uncertainty (k = 1) of ``idle_power_w``: from the scatter of the parts that it
            was measured in, and of reading the meter.
        seconds: What the meter covers; null where nothing was measured.
        method: How it was obtained.
        source: What it was read from.
        boundary: What it covers; that of ``energy_j``.
        devices: Which devices that are.
        measured_at: When it was measured.
        age_seconds: How long before this experiment asked for it: 0 where it was measured in this one, and not in
            an earlier cycle of its point.
        reason: Why ``idle_power_w`` is null.
        parts_w: Power in each of the parts that it was measured in, in W, in order.
        invalid: Reason code where ``idle_power_w`` cannot be right, as in a metric.
        after_w: Idle power again, after the windows of this experiment, in W; null where it is not known.
        after_seconds: What the meter covers of that.
        drift_w: Standard uncertainty (k = 1) that idle power's own changes from its measurement to the end of the
            windows add, in W: by ``after_w``, and by the differences of one part and the next. Null where
            ``after_w`` is.
        idle_power_no_context_w: Power of each device that the experiment might use, in W by device, before the
            session's first experiment on it, with neither model nor context of the session. Null where it was
            not measured. It is not subtracted: a context alone draws power.
        no_context_method: How it was obtained.
        no_context_source: What it was read from.
        no_context_age_seconds: How long before this experiment was started; of several, the oldest.
        no_context_reason: Why it is null, or lacks a device.
    """

    idle_power_w: float | None = None
    uncertainty_w: float | None = None
    seconds: float | None = None
    method: str = "unavailable"
    source: str | None = None
    boundary: str | None = None
    devices: list[str] = Field(default_factory=list)
    measured_at: str | None = None
    age_seconds: float | None = None
    reason: str | None = None
    parts_w: list[float] = Field(default_factory=list)
    invalid: str | None = None
    after_w: float | None = None
    after_seconds: float | None = None
    drift_w: float | None = None
    idle_power_no_context_w: dict[str, float] | None = None
    no_context_method: str | None = None
    no_context_source: str | None = None
    no_context_age_seconds: float | None = None
    no_context_reason: str | None = None


class WindowRecord(Record):
    """The measured window as a whole; metrics are per pass.

    Attributes:
        passes: Whole passes in it.
        recorded_passes: Of these, those whose outputs were kept, spread evenly: latencies, output tokens and
            failed requests are theirs. Null in results before schema 1.4.
        window_seconds: Synchronised at both ends.
        window_energy_j: Over the boundary of ``energy_j``.
        energy_seconds: What the meter covers; longer where it waits for a tick.
        tick_seconds: Of the meter's counter, where it moves in ticks, or from one sample of power to the next.
        quantisation_error: tick / window.
        tail_seconds: By how much the meter's window is longer than the measured one.
        read_skew_seconds: How far apart the devices' windows begin or end at most.
        pass_seconds_cv: Coefficient of variation of the passes' times; null for a single pass.
        drift: Relative change of the mean time of a pass from the window's first half to its second, above 0 where
            it grew; null for fewer than 4 passes.
        began_at: When it began, in UTC by the system's clock, as ISO 8601 with microseconds: to join what another
            meter recorded. Null in results before schema 1.4.
        ended_at: ``window_seconds`` after that, whatever became of the system's clock meanwhile.
        restarts: How often it began anew because something was compiled in it; null in results before schema 1.4.
        compiled: What was compiled in this one, so that no gate judges it; null where nothing was.
    """

    passes: int
    recorded_passes: int | None = None
    window_seconds: float
    window_energy_j: float | None = None
    energy_seconds: float | None = None
    tick_seconds: float | None = None
    quantisation_error: float | None = None
    tail_seconds: float | None = None
    read_skew_seconds: float | None = None
    pass_seconds_cv: float | None = None
    drift: float | None = None
    began_at: str | None = None
    ended_at: str | None = None
    restarts: int | None = None
    compiled: str | None = None


class StartRecord(Record):
    """How an experiment's process came to be. Null: it had none of its own.

    Attributes:
        method: ``spawn`` or ``forkserver``.
        began_at: When it began to import what it needs.
        ready_at: When it had.
        early: It began while its turn was waited for, and not at its turn.
    """

    method: str
    began_at: str
    ready_at: str
    early: bool = False


class GapRecord(Record):
    """The idle time before an experiment, and what else it had to wait for. Null: it was not looked at.

    Attributes:
        seconds: How long it was.
        reason: What ended it: the time that was set (``fixed``), GPUs as cool and idle as before the first
            experiment (``target``), or the longest time that is waited for that (``timeout``). ``skipped``: there
            was none.
        note: Why there was none.
        waited_seconds: Before that, until nobody else had its devices; 0 where they were free.
        waited_for: Who had them: device, process, study, experiment.
        memory_waited_seconds: After it, until no GPU had more memory in use than before the experiment before.
        memory_left_mb: How much more, in MB by UUID, those still had that had not given it back by then, or that
            another process uses.
    """

    seconds: float
    reason: GapReason
    note: str | None = None
    waited_seconds: float | None = None
    waited_for: str | None = None
    memory_waited_seconds: float | None = None
    memory_left_mb: dict[str, float] | None = None


class InputsRecord(Record):
    """What the result follows from beside its configuration: a resumed run compares it with what is there.

    Attributes:
        modules: Digest of each module's file that the experiment's process imported, by the module's name; null
            where it is unknown. Without the standard library and packages that are installed.
        distributions: Version of each installed package that it imported, and for one that was not installed from
            an index a digest of its files.
        model_folder: Digest of the names, sizes and times of modification of the files in the model's folder; null
            where it is not in a local folder.
    """

    modules: dict[str, str | None]
    distributions: dict[str, str | None]
    model_folder: str | None = None


class DeviceConditions(Record):
    """What a device was like over the window. What it does not tell is null.

    Attributes:
        start_temperature_c: As the window began, in °C.
        end_temperature_c: As it ended.
        peak_temperature_c: The highest that was seen.
        mean_sm_clock_mhz: Of the processors, in MHz.
        mean_memory_clock_mhz: Of the memory.
        throttled_seconds: For each reason, for how long it held the clocks down. Reasons may overlap.
    """

    start_temperature_c: float | None = None
    end_temperature_c: float | None = None
    peak_temperature_c: float | None = None
    mean_sm_clock_mhz: float | None = None
    mean_memory_clock_mhz: float | None = None
    throttled_seconds: dict[str, float] | None = None


class DeviceEnergy(Record):
    """One device's share of the window's energy.

    Attributes:
        device: Its identity: a GPU's UUID, ``package-0``, …
        boundary: What the figure covers.
        energy_j: In J over the whole window; null where it could not be read.
        method: How it was obtained.
        source: What it was read from.
        reason: Why ``energy_j`` is null.
        seconds: What ``energy_j`` covers: each counter ticks by itself.
        uncertainty_j: Standard uncertainty (k = 1) of reading both edges, in J.
        gain_error: By what share the counter may be off a wall meter, throughout.
        integral_j: The same from sampled power, where both are to be had.
        integral_uncertainty_j: Its standard uncertainty, from the samples' distance, in J.
        integral_reason: Why ``integral_j`` is null, where it was tried.
        counter_reason: Why power was sampled though the device has an energy counter.
        conditions: What the device was like.
    """

    device: str
    boundary: str
    energy_j: float | None
    method: str
    source: str | None = None
    reason: str | None = None
    seconds: float | None = None
    uncertainty_j: float | None = None
    gain_error: float | None = None
    integral_j: float | None = None
    integral_uncertainty_j: float | None = None
    integral_reason: str | None = None
    counter_reason: str | None = None
    conditions: DeviceConditions | None = None


class ExperimentResult(Document):
    """One point measured in one cycle.

    ``metrics`` holds every name of :data:`pytest_llem.catalogue.CATALOGUE`; one that could not be had is
    null with its reason. Totals are per pass over the prompts. ``prefill_window`` is that of matched passes with
    one new token a prompt, null unless ``measurement.prefill_split`` asks for it. ``gap`` is null where no study
    was run. ``harness_cpu_seconds`` is the processor time that measuring took during the window, outside of the
    engine: the meters' own processes, the supervisor and the pytest process. ``adjusted`` are the settings that did
    not run as they were given. ``contention`` and ``inputs`` are null in results before schema 1.4.
    """

    pytest_llem_version: str
    identity: Identity
    effective_config: dict[str, Any]
    metrics: dict[str, Metric]
    devices: list[DeviceEnergy] = Field(default_factory=list)
    window: WindowRecord
    prefill_window: WindowRecord | None = None
    idle_power: IdlePowerRecord | None = None
    warmup: WarmupRecord | None = None
    gap: GapRecord | None = None
    contention: Contention | None = None
    start: StartRecord | None = None
    tokens: TokenRecord
    engine: EngineRecord
    adjusted: list[AdjustedSetting] = Field(default_factory=list)
    environment: dict[str, Any] = Field(default_factory=dict)
    harness_cpu_seconds: float | None = None
    inputs: InputsRecord | None = None
    started_at: str
    completed_at: str
    warnings: list[QualityWarning] = Field(default_factory=list)
