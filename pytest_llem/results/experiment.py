"""The result of an experiment."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from pytest_llem.results.contention import Contention
from pytest_llem.results.document import Record, RecordFile
from pytest_llem.results.metrics import Metric
from pytest_llem.results.quality_warnings import QualityWarning
from pytest_llem.results.serving import LoadRecord, ServerRecord
from pytest_llem.study.problems import shown

GapReason = Literal["fixed", "target", "timeout", "skipped"]


class Identity(Record):
    """Identity of the experiment that a result belongs to."""

    experiment_id: str
    """Id of the experiment, unique in its study."""
    config_hash: str
    """Hash of the resolved configuration."""
    study_design_hash: str | None = None
    """Hash of the study's design, null for an experiment without a study."""
    axes: dict[str, Any] = Field(default_factory=dict)
    """Values of the point's axes, by dotted key."""
    cycle: int = 1
    """Number of the cycle, from 1."""


class AdjustedSetting(Record):
    """A setting whose effective value differs from the value in the study."""

    setting: str
    """Dotted key of the setting in the study."""
    given: Any
    """Value in the study."""
    effective: Any = None
    """Value that ran; null if the setting has no effect."""
    reason: str
    """Why the values differ."""

    def __str__(self) -> str:
        ran = "has no effect" if self.effective is None else f"ran as {shown(self.effective)}"
        return f"setting {self.setting} {shown(self.given)} {ran}: {self.reason}"


class EngineRecord(Record):
    """The engine and model of an experiment, as the engine reports them."""

    name: str
    """Name of the engine."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of the engine's packages, and of CUDA and cuDNN if it uses them."""
    device: str
    """``cpu`` or ``cuda``; ``unknown`` for an imported file."""
    device_names: list[str] = Field(default_factory=list)
    """Name of each device."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """The engine's effective settings, as it reports them after loading."""
    adjusted: list[AdjustedSetting] = Field(default_factory=list)
    """Settings that differ from the study, as far as the engine knows."""
    model_source: str | None = None
    """``builtin``, ``local``, ``model_path`` or ``hub``."""
    model_revision: str | None = None
    """Commit on the hub; null if unknown."""
    model_fingerprint: str | None = None
    """SHA-256 over the ``config.json`` of the model's folder and the names and sizes of its weight files, which
    distinguishes local folders. Null without a folder, or if it cannot be read.
    """
    random_weights: bool = False
    """Whether the weights are random instead of trained."""


class TokenRecord(Record):
    """Token accounting of one pass."""

    prompts: int | None
    """Number of prompts; of an import, of answered requests, null if its files do not say."""
    input_tokens: int | None
    """Input tokens without padding; null if the engine does not report them."""
    output_tokens: int | None
    """Output tokens up to and including each sequence's end; null if the engine does not report them."""
    truncated_prompts: int = 0
    """Number of prompts cut to ``max_input_tokens``."""
    padding_waste: float | None = None
    """Share of the input positions that hold padding, 0 to 1; null if unknown."""
    output_digest: str | None = None
    """SHA-256 of the first pass's output token ids, or texts; null if both are unknown, and of a server."""
    deterministic: bool | None = None
    """Whether every pass, with the same seed, gave the same outputs; null for one pass, or if some are unknown."""
    dataset_hash: str | None = None
    """SHA-256 of the prompts in their order, each as a line of ASCII JSON: the texts before truncation and chat
    template, or synthetic token ids. Null if they are unknown, or synthetic and sent to a server.
    """
    dataset_revision: str | None = None
    """Commit of the prompts' dataset on the hub, null if they are not from the hub."""
    requests: int | None = None
    """Requests in the window's recorded passes; of a server, those due in the window. Null if an imported file has
    none, and in results of schema 1.3 and older.
    """
    failed_requests: int | None = None
    """Those of ``requests`` that failed or returned no token."""
    batches: dict[int, int] | None = None
    """Number of batches in a pass, by the number of their prompts. Null if unknown, as for a function as
    engine, and in results of schema 1.3 and older.
    """


class WarmupRecord(Record):
    """The warm-up before the window."""

    runs: int
    """Number of batches; of requests, for a server."""
    seconds: float
    """Duration in s."""
    converged: bool | None = None
    """Whether the last latencies were steady; null if that was not checked."""
    cv: float | None = None
    """Coefficient of variation of the last latencies; null if there are too few."""


class IdlePowerRecord(Record):
    """Idle power: with the model loaded, before warm-up, and without model and CUDA context."""

    idle_power_w: float | None = None
    """Idle power with the model loaded, after one batch or request, in W; null if it was not measured."""
    uncertainty_w: float | None = None
    """Standard uncertainty (k = 1) of ``idle_power_w`` in W, from the scatter of ``parts_w`` and from reading the
    meter.
    """
    seconds: float | None = None
    """Time that the meter covers, in s; null if nothing was measured."""
    method: str = "unavailable"
    """How ``idle_power_w`` was obtained."""
    source: str | None = None
    """What ``idle_power_w`` was read from."""
    boundary: str | None = None
    """What ``idle_power_w`` covers; the boundary of ``energy_j``."""
    devices: list[str] = Field(default_factory=list)
    """Devices within ``boundary``."""
    measured_at: str | None = None
    """Time of the measurement."""
    age_seconds: float | None = None
    """Time from the measurement to its use by this experiment, in s: 0 if this experiment measured it, more if an
    earlier cycle of its point did.
    """
    reason: str | None = None
    """Why ``idle_power_w`` is null."""
    parts_w: list[float] = Field(default_factory=list)
    """Power in each part of the measurement, in W, in order."""
    invalid: str | None = None
    """Reason code if ``idle_power_w`` or ``after_w`` cannot be right, as in a metric."""
    after_w: float | None = None
    """Idle power measured again after this experiment's windows, in W; null if it is not known."""
    after_seconds: float | None = None
    """Time that the meter covers for ``after_w``, in s."""
    drift_w: float | None = None
    """Standard uncertainty (k = 1) in W from changes of idle power between its measurement and the end of the
    windows, estimated from ``after_w`` and from the differences between consecutive ``parts_w``. Null if
    ``after_w`` is null.
    """
    idle_power_no_context_w: dict[str, float] | None = None
    """Power of each device that the experiment might use, in W by device, before the run's first experiment on
    it, when the run has no model and no CUDA context there. Null if it was not measured. It is not subtracted: a
    CUDA context alone draws power.
    """
    no_context_method: str | None = None
    """How ``idle_power_no_context_w`` was obtained."""
    no_context_source: str | None = None
    """What ``idle_power_no_context_w`` was read from."""
    no_context_age_seconds: float | None = None
    """Time from its measurement to the start of this experiment, in s; the longest if there are several."""
    no_context_reason: str | None = None
    """Why ``idle_power_no_context_w`` is null, or a device is missing in it."""


class WindowRecord(Record):
    """The measured window as a whole; metrics are per pass."""

    passes: int | None
    """Number of whole passes in the window; null for the window of a server under load, which has none."""
    recorded_passes: int | None = None
    """Number of passes whose outputs were kept, spread evenly over the window: latencies, output tokens and failed
    requests are taken from these. Null for a server, an import, and in results of schema 1.3 and older.
    """
    window_seconds: float
    """Duration in s, with the devices synchronised at both ends."""
    window_energy_j: float | None = None
    """Energy over the boundary of ``energy_j``, in J."""
    energy_seconds: float | None = None
    """Time that the meter covers, in s; longer than the window if the meter waits for a tick."""
    tick_seconds: float | None = None
    """Time between ticks of the meter's counter, or between samples of power, in s."""
    quantisation_error: float | None = None
    """Tick / window; for a window of n turns, times √n, as each turn has edges of its own."""
    tail_seconds: float | None = None
    """Meter's time beyond the measured window, in s."""
    read_skew_seconds: float | None = None
    """Largest difference between the devices' windows at their starts or ends, in s."""
    pass_seconds_cv: float | None = None
    """Coefficient of variation of the passes' times; null for a single pass."""
    drift: float | None = None
    """Relative change of the mean time of a pass from the window's first half to its second, above 0 if it grew;
    null for fewer than 4 passes.
    """
    began_at: str | None = None
    """Start in UTC by the system's clock, as ISO 8601 with microseconds, to join another meter's records. Null if
    an imported file does not say, and in results of schema 1.3 and older.
    """
    ended_at: str | None = None
    """End in UTC, ``began_at`` plus the time that passed, which includes turns of the other side of a comparison.
    Null for an import.
    """
    restarts: int | None = None
    """Number of restarts because something was compiled in the window; null in results of schema 1.3 and older."""
    compiled: str | None = None
    """What was compiled in this window, so that no gate judges it; null if nothing was."""


class TurnRecord(Record):
    """One turn of an interleaved measurement."""

    began_at: str
    """Start in UTC by the system's clock, as ISO 8601 with microseconds."""
    seconds: float
    """Duration in s."""
    passes: int | None
    """Number of whole passes in the turn; null for a server."""
    metrics: dict[str, float]
    """Value of each metric of the window over this turn alone, in the metric's unit; those without one are left
    out.
    """


class InterleavingRecord(Record):
    """Turns of an experiment that was measured alternately with another one, while both were alive."""

    pair: str
    """Id of the two experiments: only turns of the same pair are compared."""
    min_turn_seconds: float
    """Minimum duration of a turn, in s."""
    waiting_cpus: float | None = None
    """CPUs that this experiment used on average while the other one measured, the median over its turns; null if
    not known.
    """
    stopped: bool = False
    """Whether a signal stopped its process while it waited, because waiting used a CPU."""
    turns: list[TurnRecord]
    """The turns, in order. The turn with the same index in the other experiment is next to it in time."""


class StartRecord(Record):
    """The start of an experiment's process. Null if it had no process of its own."""

    method: str
    """``spawn`` or ``forkserver``."""
    began_at: str
    """Start of the process's imports."""
    ready_at: str
    """End of the process's imports."""
    early: bool = False
    """Whether the process was started while the experiment waited for its devices."""


class GapRecord(Record):
    """The gap before an experiment, and the waits before and after the gap. Null if they were not recorded."""

    seconds: float
    """Duration of the gap, in s."""
    reason: GapReason
    """What ended the gap: the time that was set (``fixed``), GPUs as cool and idle as before the first experiment
    (``target``), or the time limit for that (``timeout``). ``skipped``: there was no gap.
    """
    note: str | None = None
    """Why there was no gap."""
    waited_seconds: float | None = None
    """Time waited before the gap for devices that another process used, in s; 0 if they were free."""
    waited_for: str | None = None
    """What used the devices: device, process, study, experiment."""
    memory_waited_seconds: float | None = None
    """Time waited after the gap, in s, until every GPU's memory in use was down to the amount before the previous
    experiment.
    """
    memory_left_mb: dict[str, float] | None = None
    """Memory in use above that amount after the wait, in MB by UUID: not released by the previous experiment, or
    used by another process.
    """


class Neighbour(Record):
    """An experiment that ran on other devices of the machine at the same time."""

    study: str
    """Name of its study."""
    experiment: str
    """Id of the experiment."""
    devices: list[str]
    """Devices that it had: UUIDs of GPUs, or ``cpu``."""
    same_run: bool
    """Whether it was part of the same run."""
    seconds: float
    """Time that both ran, in s."""


class InputsRecord(Record):
    """State of the code and the model that a result depends on. A resumed run compares it."""

    modules: dict[str, str | None]
    """Digest of the file of each module that the experiment's process imported, by the module's name; null if it
    is unknown. Without the standard library and installed packages.
    """
    distributions: dict[str, str | None]
    """Version of each installed package that the process imported, with a digest of its files if it was not
    installed from an index.
    """
    model_folder: str | None = None
    """Digest of the names, sizes and modification times of the files in the model's folder; null if the model is
    not in a local folder.
    """


class ImportedFile(Record):
    """A file of another tool that a result was read from."""

    name: str
    """Name of the file, without its folder."""
    sha256: str
    """SHA-256 of its content."""


class ImportRecord(Record):
    """The load generator that measured a result, and its files."""

    tool: str
    """Name of the tool, such as ``vllm bench serve``."""
    version: str | None = None
    """Version of the tool; null if its files do not say."""
    files: list[ImportedFile] = Field(default_factory=list)
    """Files that the result was read from."""
    rates: Literal["steady state", "whole run"]
    """What the rates are over: the steady state, from the times of requests, or the whole run, with ramp-up and
    the time when requests run out.
    """
    note: str | None = None
    """Why the rates are over the whole run; null if they are not."""
    runs: int = 1
    """Number of runs of one start of the server that were joined to this result. They are no repetitions."""
    server_start: str | None = None
    """Identity of the start of the server; null if it is not known."""
    reported: dict[str, float] = Field(default_factory=dict)
    """The tool's own figures of the metrics that it defines likewise, in the catalogue's units; of several runs,
    their means.
    """


class DeviceConditions(Record):
    """Temperatures, clocks and throttling of a device over the window. What it does not report is null."""

    start_temperature_c: float | None = None
    """Temperature at the start of the window, in °C."""
    end_temperature_c: float | None = None
    """Temperature at the end of the window, in °C."""
    peak_temperature_c: float | None = None
    """Highest sampled temperature, in °C."""
    mean_sm_clock_mhz: float | None = None
    """Mean SM clock, in MHz."""
    mean_memory_clock_mhz: float | None = None
    """Mean memory clock, in MHz."""
    throttled_seconds: dict[str, float] | None = None
    """Time for which clocks were lowered, in s by reason. Reasons may overlap."""


class DeviceEnergy(Record):
    """One device's share of the window's energy."""

    device: str
    """Identity of the device: a GPU's UUID, ``package-0``, …"""
    boundary: str
    """What ``energy_j`` covers."""
    energy_j: float | None
    """Energy over the whole window, in J; null if it could not be read."""
    method: str
    """How ``energy_j`` was obtained."""
    source: str | None = None
    """What ``energy_j`` was read from."""
    reason: str | None = None
    """Why ``energy_j`` is null."""
    seconds: float | None = None
    """Time that ``energy_j`` covers, in s: each counter has its own ticks."""
    uncertainty_j: float | None = None
    """Standard uncertainty (k = 1) of reading the counter at both ends, in J."""
    gain_error: float | None = None
    """Constant relative error that the counter may have against a wall meter."""
    integral_j: float | None = None
    """Integral of sampled power, in J, if both counter and power can be read."""
    integral_uncertainty_j: float | None = None
    """Standard uncertainty of ``integral_j`` from sampling, in J."""
    integral_reason: str | None = None
    """Why ``integral_j`` is null, if ``energy_j`` was read from a counter."""
    counter_reason: str | None = None
    """Why power was sampled though the device has an energy counter."""
    conditions: DeviceConditions | None = None
    """Temperatures, clocks and throttling of the device."""


class ExperimentResult(RecordFile):
    """The result of one point in one cycle.

    Example:
        Energy per output token in J, or the reason why it is not available::

            result = pytest_llem.run_experiment({"model": "builtin:tiny-llama"})
            metric = result.metrics["energy_per_output_token_j"]
            print(metric.reason if metric.value is None else metric.value)
    """

    pytest_llem_version: str
    """Version of pytest-llem that measured."""
    identity: Identity
    """Identity of the experiment."""
    effective_config: dict[str, Any]
    """Configuration that ran, with all defaults filled in. A field that does not reach the engine is null."""
    metrics: dict[str, Metric]
    """Every metric of the catalogue, by name. A metric that is not available has a null value and its reason.
    Totals are per pass.
    """
    devices: list[DeviceEnergy] = Field(default_factory=list)
    """Energy of each device over the window."""
    window: WindowRecord
    """The measured window."""
    prefill_window: WindowRecord | None = None
    """Window of the same passes with one new token per prompt; null unless ``measurement.prefill_split`` is set.
    """
    interleaving: InterleavingRecord | None = None
    """Turns of the window; null if it was not interleaved with another experiment pass by pass."""
    idle_power: IdlePowerRecord | None = None
    """Idle power; null if a load generator measured."""
    warmup: WarmupRecord | None = None
    """Warm-up before the window; null if it was switched off, or a load generator measured."""
    gap: GapRecord | None = None
    """Gap before the experiment; null if the experiment was not part of a study."""
    contention: Contention | None = None
    """Whether anything else used the CPUs or GPUs in the window; null for an import, for a load generator whose
    server ran already, and in results of schema 1.3 and older.
    """
    concurrent: list[Neighbour] | None = None
    """Experiments that ran on other devices of the machine at the same time; null if that is not known. They share
    CPUs, memory bandwidth, power and cooling.
    """
    server: ServerRecord | None = None
    """The server that was measured; null if the engine is not ``server``."""
    load: LoadRecord | None = None
    """The load on the server; null if the engine is not ``server``."""
    start: StartRecord | None = None
    """Start of the experiment's process; null if it had no process of its own."""
    tokens: TokenRecord
    """Prompts and tokens of one pass."""
    engine: EngineRecord
    """Engine and model."""
    adjusted: list[AdjustedSetting] = Field(default_factory=list)
    """Settings whose effective value differs from the study."""
    environment: dict[str, Any] = Field(default_factory=dict)
    """Machine and packages: ``os``, ``kernel``, ``packages``, ``variables``, ``git`` and others. Null inside
    means unknown.
    """
    harness_cpu_seconds: float | None = None
    """CPU time in s that measuring took during the window outside of the engine: the meters' own processes, the
    supervisor and pytest's process.
    """
    inputs: InputsRecord | None = None
    """State of code and model, which a resumed run compares; null for an import, and in results of schema 1.3 and
    older.
    """
    imported: ImportRecord | None = None
    """The load generator that measured, and its files; null if pytest-llem measured alone."""
    started_at: str
    """Start of the experiment, UTC, as ISO 8601."""
    completed_at: str
    """End of the experiment, UTC, as ISO 8601."""
    warnings: list[QualityWarning] = Field(default_factory=list)
    """What may be wrong with the values, the worst first."""
