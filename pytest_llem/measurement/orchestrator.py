"""Run one experiment, from loading the model to the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from pytest_llem.catalogue import PREFILL_METRICS
from pytest_llem.energy.account import Account, Meters, Total
from pytest_llem.engines.models import folder_state
from pytest_llem.engines.options import needs_of_class
from pytest_llem.engines.protocol import (
    BatchEngine,
    CacheMemory,
    Engine,
    EngineContext,
    PreflightError,
    SupportsCacheMemory,
    SupportsExpectedWarnings,
    SupportsProcesses,
)
from pytest_llem.hardware.environment import environment
from pytest_llem.hardware.gpus import kinds_of
from pytest_llem.measurement import accounting, records
from pytest_llem.measurement.accounting import prefill_metrics
from pytest_llem.measurement.command import CommandOrchestrator
from pytest_llem.measurement.contention import with_prefill
from pytest_llem.measurement.driver import Driver
from pytest_llem.measurement.engine_imports import create_engine
from pytest_llem.measurement.engine_reports import adjusted_settings
from pytest_llem.measurement.idle_power import idle_power_metrics, measure_idle_power, measure_idle_power_after
from pytest_llem.measurement.library_warnings import library_warnings
from pytest_llem.measurement.observers import WindowObservers
from pytest_llem.measurement.pass_driver import PassDriver
from pytest_llem.measurement.progress import Progress
from pytest_llem.measurement.quality_warnings import (
    disturbance_warnings,
    energy_warnings,
    find_warnings,
    tracer_warning,
)
from pytest_llem.measurement.records import Measured
from pytest_llem.measurement.requests import Requests
from pytest_llem.measurement.roofline import work_metrics
from pytest_llem.measurement.turns import Turns
from pytest_llem.measurement.window import Window, compilations
from pytest_llem.results import code_state
from pytest_llem.results.carbon import Carbon, emissions
from pytest_llem.results.contention import Contention
from pytest_llem.results.environment import package_version
from pytest_llem.results.experiment import (
    EngineRecord,
    ExperimentResult,
    Identity,
    IdlePowerRecord,
    InputsRecord,
    InterleavingRecord,
    TurnRecord,
    WarmupRecord,
)
from pytest_llem.results.metrics import Metric
from pytest_llem.results.quality_warnings import QualityWarning
from pytest_llem.results.token_agreement import OUTPUTS
from pytest_llem.study.config import AUTO, ExperimentConfig
from pytest_llem.study.engine_options import Needs
from pytest_llem.study.engines import COMMAND
from pytest_llem.study.identity import config_hash
from pytest_llem.study.server import SERVER
from pytest_llem.times import now, utc
from pytest_llem.workload.prompts import Texts, build_workload, read_texts


@dataclass(frozen=True)
class _Loaded:
    """A loaded engine.

    Attributes:
        engine: The engine.
        driver: Runs passes over the prompts with it, or puts a load on a server.
        needs: What the engine's class declares for the experiment: its needs, and fields that do not reach it.
        seconds: Duration of loading, in s.
        energy: Energy of loading.
    """

    engine: Engine
    driver: Driver[Any]
    needs: Needs
    seconds: float
    energy: Total


@dataclass(frozen=True)
class _Observed:
    """What was measured of a loaded engine.

    Attributes:
        peak_memory: Peak memory use in the window, in bytes; None if unknown.
        tracer: Message about a debugger, profiler or coverage tool that is on; None if there is none.
    """

    warmup: WarmupRecord | None
    window: Window
    prefill: Window | None
    observers: WindowObservers
    contention: Contention
    idle_power: IdlePowerRecord
    peak_memory: int | None
    kv_cache: CacheMemory | None
    tracer: str | None


@dataclass
class ExperimentOrchestrator:
    """Runs one experiment in this process.

    Example:
        config = ExperimentConfig(model="HuggingFaceTB/SmolLM2-135M", n=8)
        result = ExperimentOrchestrator(config).run().result

    Attributes:
        config: The experiment to run.
        identity: Its identity in a study; None derives one from *config*.
        context: Information for the engine beside its configuration.
        directory: Folder that dataset paths are relative to.
        root: Directory whose git commit is recorded; None for the current directory.
        carbon: Carbon intensity of the electricity; None if not given.
        known_idle_power: Idle power that an earlier cycle of *config* measured.
        harness: Pids of the supervisor and the pytest processes: their CPU time is overhead of the measurement.
        on_progress: Called at the start of each phase and of each warm-up batch; within a window only for a
            server, about once a second.
        telemetry_fd: File descriptor of the pipe for the live telemetry of the meters; None if nothing reads it.
        devices: Leased devices: the engine may use no other GPUs. Empty for any.
        turns: Turns with another experiment; None to measure without interruption.
    """

    config: ExperimentConfig
    identity: Identity | None = None
    context: EngineContext = field(default_factory=EngineContext)
    directory: Path = field(default_factory=Path)
    root: Path | None = None
    carbon: Carbon | None = None
    known_idle_power: IdlePowerRecord | None = None
    harness: Sequence[int] = ()
    on_progress: Callable[[Progress], None] = lambda progress: None
    telemetry_fd: int | None = None
    devices: Sequence[str] = ()
    turns: Turns | None = None

    def run(self) -> Measured:
        """Load the model, warm up, measure, and return the outcome.

        For ``backend: command``, run the command instead.

        Raises:
            PreflightError: The experiment cannot run here.
        """
        if self.config.backend == COMMAND:
            return CommandOrchestrator(self, self._identity).run()
        with library_warnings() as library_texts:
            started_at = now()
            texts = read_texts(self.config, self.directory, lambda: self._report_phase("fetching the dataset"))
            gpus = tuple(name for name in self.devices if name.startswith("GPU-"))
            context = replace(self.context, gpus=gpus, report_phase=self._report_phase)
            engine = create_engine(self.config, context)
            try:
                self._report_phase("fetching the model")
                engine.fetch()
                return self._measure(engine, texts, started_at, library_texts)
            finally:
                engine.close()

    @cached_property
    def _identity(self) -> Identity:
        digest = config_hash(self.config)
        return self.identity or Identity(experiment_id=digest, config_hash=digest)

    def _measure(
        self, engine: Engine, texts: Texts | None, started_at: str, library_texts: Sequence[str]
    ) -> Measured:
        """Load *engine*, whose model has been fetched, and measure."""
        meters, compiled_before = self._meters(engine), compilations()
        try:
            self._report_phase("loading")
            metered = set(engine.gpus)
            seconds, account = _load(engine, meters)
            self._check_devices(engine)
            energy = account.total
            if metered != set(engine.gpus):  # the engine chose its GPUs while it loaded: meter only these now
                if metered.intersection(energy.devices):
                    energy = account.of_devices(engine.gpus)
                meters.close()
                meters = self._meters(engine)
            needs = needs_of_class(engine, self.config, None)
            self._report_phase("preparing")
            driver = self._driver(engine, texts, needs.sequences, compiled_before)
            loaded = _Loaded(engine, driver, needs, seconds, energy)
            observed = self._observe(loaded, meters)
            self._report_phase("computing the metrics")
            return self._complete(loaded, observed, meters, started_at, library_texts)
        finally:
            meters.close()

    def _observe(self, loaded: _Loaded, meters: Meters) -> _Observed:
        """Measure idle power, warm up, and measure the windows."""
        config, engine, driver = self.config, loaded.engine, loaded.driver
        idle_power = measure_idle_power(
            driver.run_once,
            meters,
            loaded.energy,
            config.baseline,
            known=self.known_idle_power,
            on_idle=lambda: self._report_phase("measuring the idle machine", config.baseline.duration_seconds),
        )
        warmup = driver.warm_up(
            lambda run, max_runs: self.on_progress(Progress("warming up", run, max_runs, "runs"))
        )
        min_seconds = config.measurement.min_window_seconds
        self._report_phase("measuring", min_seconds)
        observers = self._observers(engine, engine.reset_peak_memory)
        window = driver.measure(meters, observers, self.turns)
        contention = observers.contention(window.seconds)
        tracer = tracer_warning()
        peak_memory = engine.peak_memory_bytes()
        kv_cache = engine.cache_memory() if isinstance(engine, SupportsCacheMemory) else None
        prefill = None
        if config.measurement.prefill_split:
            assert isinstance(driver, PassDriver)
            self._report_phase("measuring the prompts alone", min_seconds)
            prefill_observers = self._observers(engine)
            prefill = driver.measure_prefill(meters, prefill_observers)
            contention = with_prefill(contention, prefill_observers.contention(prefill.seconds))
        idle_power = measure_idle_power_after(
            idle_power,
            meters,
            config.baseline,
            window,
            on_idle=lambda: self._report_phase("measuring the idle machine again", config.baseline.part_seconds),
        )
        return _Observed(warmup, window, prefill, observers, contention, idle_power, peak_memory, kv_cache, tracer)

    def _complete(
        self, loaded: _Loaded, observed: _Observed, meters: Meters, started_at: str, library_texts: Sequence[str]
    ) -> Measured:
        """Check what the engine reports, compute the metrics, and return the outcome."""
        config, engine, driver = self.config, loaded.engine, loaded.driver
        window, prefill = observed.window, observed.prefill
        requests = driver.requests(window)
        requests.check(config, has_limit="max_output_tokens" not in loaded.needs.unused)
        repeats_faster = driver.check(window, requests)
        record = engine.describe()
        driver.measure_drift(meters, self._observers(engine))
        metrics = self._metrics(loaded, observed, requests, record)
        result = ExperimentResult(
            pytest_llem_version=package_version("pytest-llem") or "unknown",
            identity=self._identity,
            effective_config=records.effective_config(config, loaded.needs.unused),
            metrics=accounting.mark_not_judged(
                metrics, requests.not_judged or window.compiled or repeats_faster or observed.tracer
            ),
            devices=records.device_energies(window.account),
            window=records.window_record(window),
            prefill_window=records.window_record(prefill) if prefill else None,
            interleaving=self._interleaving(driver, observed),
            idle_power=observed.idle_power,
            warmup=observed.warmup,
            tokens=driver.token_record(window, requests),
            engine=record,
            **driver.records(window),
            adjusted=adjusted_settings(config, self._identity.axes, record, requests, compilations()),
            environment=environment(engine.gpus, self.root),
            harness_cpu_seconds=observed.observers.harness_cpu_seconds,
            contention=observed.contention,
            inputs=InputsRecord(
                **code_state.imported(),
                model_folder=folder_state(config.model, self.context.model_path) if config.model else None,
            ),
            started_at=started_at,
            completed_at=now(),
        )
        result.warnings = find_warnings(
            result,
            [
                *requests.warnings(),
                *driver.warnings(window, requests),
                *energy_warnings(
                    window.account,
                    meters.refusals,
                    allow_estimated=config.energy.allow_estimated,
                    prefill=prefill.account if prefill else None,
                ),
                *disturbance_warnings(repeats_faster, observed.tracer),
                *_unexpected(library_texts, engine),
            ],
        )
        sent = driver.sent(window, requests)
        return Measured(result, sent, _files(sent, requests, window))

    def _interleaving(self, driver: Driver[Any], observed: _Observed) -> InterleavingRecord | None:
        """Return the record of the turns; None if the window was not interrupted."""
        if self.turns is None:
            return None
        return observed.observers.interleaving(
            self.turns, [_turn_record(driver, turn) for turn in observed.window.turns]
        )

    def _metrics(
        self, loaded: _Loaded, observed: _Observed, requests: Requests, record: EngineRecord
    ) -> dict[str, Metric]:
        """Return every metric of the catalogue."""
        engine, driver, window, prefill = loaded.engine, loaded.driver, observed.window, observed.prefill
        of_window = driver.metrics(window, requests)
        metrics = {
            **prefill_metrics(window, prefill, requests.input_tokens, observed.idle_power.drift_w),
            **of_window,
            "gco2e_g": emissions(self.carbon, of_window["energy_j"]),
            **idle_power_metrics(observed.idle_power, window),
            **accounting.condition_metrics(window.account),
            **work_metrics(engine, record, requests, window.seconds / window.count),
            "model_memory_mb": accounting.megabytes("model_memory_mb", engine.model_memory_bytes()),
            "peak_memory_mb": accounting.megabytes("peak_memory_mb", observed.peak_memory),
            **accounting.cache_metrics(observed.kv_cache),
            **driver.loading_metrics(loaded.seconds, loaded.energy),
        }
        metrics = accounting.with_covers_engine(metrics, record, engine.gpus)
        if prefill is not None and prefill.compiled is not None:
            of_prefill = {name: metrics[name] for name in PREFILL_METRICS}
            metrics |= accounting.mark_not_judged(of_prefill, prefill.compiled)
        return metrics

    def _driver(
        self, engine: Engine, texts: Texts | None, sequences: int | None, compiled_before: int
    ) -> Driver[Any]:
        """Return the driver: of whole passes over the prompts, or of a load on a server."""
        config = self.config
        if config.backend == SERVER:
            from pytest_llem.measurement.load_driver import LoadDriver  # which needs an HTTP client
            from pytest_llem.serving.engine import ServerEngine

            return LoadDriver(
                cast("ServerEngine", engine),
                config,
                texts,
                directory=self.directory,
                cycle=self._identity.cycle,
                on_progress=self.on_progress,
            )
        batch_engine = cast("BatchEngine", engine)
        workload = build_workload(config, batch_engine, texts)
        return PassDriver(batch_engine, config, workload, sequences, compiled_before)

    def _observers(self, engine: Engine, on_first_window: Callable[[], None] = lambda: None) -> WindowObservers:
        return WindowObservers(engine.gpus, self.harness, _processes(engine), on_first_window)

    def _check_devices(self, engine: Engine) -> None:
        """Check that the loaded engine uses leased GPUs only: others are not locked, nor metered from the start.

        Raises:
            PreflightError: It uses others, or GPUs of several kinds.
        """
        others = sorted(set(engine.gpus).difference(self.devices)) if self.devices else []
        if others:
            raise PreflightError(
                f"engine {self.config.backend!r} reports GPUs that are not leased for it: {', '.join(others)} "
                f"(leased: {', '.join(self.devices)}): it has to use the GPUs of CUDA_VISIBLE_DEVICES only"
            )
        if len(engine.gpus) > 1 and len(kinds := kinds_of(engine.gpus)) > 1:
            raise PreflightError(
                f"engine {self.config.backend!r} runs on GPUs of different kinds together: {', '.join(kinds)}: "
                "select those of one kind with CUDA_VISIBLE_DEVICES"
            )

    def _report_phase(self, phase: str, seconds: float | None = None) -> None:
        """Report that a phase begins, and its minimum duration in s if that is known."""
        self.on_progress(Progress(phase, total=seconds, unit=None if seconds is None else "s"))

    def _meters(self, engine: Engine) -> Meters:
        wanted = self.config.energy.backend
        meters = Meters.open(wanted, engine.gpus, self.telemetry_fd, _processes(engine))
        if wanted not in (None, AUTO) and not meters.meters:
            raise PreflightError(f"meter {wanted!r} cannot be used: {meters.refusals[wanted]}")
        return meters


def _turn_record(driver: Driver[Any], turn: Window) -> TurnRecord:
    metrics = driver.metrics(turn, driver.requests(turn))
    return TurnRecord(
        began_at=utc(turn.began_at, "microseconds"),
        seconds=turn.seconds,
        passes=turn.pass_fields["passes"],
        metrics={name: one.value for name, one in metrics.items() if one.value is not None},
    )


def _unexpected(warnings: Sequence[str], engine: Engine) -> Iterator[QualityWarning]:
    """Yield the warnings of libraries that the engine does not declare as expected."""
    expected = engine.expected_warnings if isinstance(engine, SupportsExpectedWarnings) else ()
    for text in warnings:
        if not any(part in text for part in expected):
            yield QualityWarning.of("library_warning", text)


def _files(sent: Requests, requests: Requests, window: Window) -> dict[str, str]:
    """Return the contents of the files beside a result, by file name suffix.

    Args:
        sent: The requests to save.
        requests: Those of the window: only outputs of these are kept.
        window: The window.
    """
    files = {"requests.csv": sent.to_csv(window.began), OUTPUTS: requests.outputs_to_csv()}
    power = window.power_csv()
    return files if power is None else files | {"power.csv": power}


def _processes(engine: Engine) -> Sequence[int]:
    """Return the pids of other processes that run the model. Their descendants count with them."""
    return engine.processes if isinstance(engine, SupportsProcesses) else ()


def _load(engine: Engine, meters: Meters) -> tuple[float, Account]:
    """Load the model, and return how long that took, in s, and its energy."""
    meters.begin()
    began = time.monotonic()
    engine.load()
    engine.synchronize()
    seconds = time.monotonic() - began
    return seconds, meters.end()
