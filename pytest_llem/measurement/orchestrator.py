"""One configuration, from loading the model to the result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pytest_llem import registry
from pytest_llem.backends.protocol import Engine, EngineContext, PreflightError
from pytest_llem.backends.requirements import PREFILL_SPLIT
from pytest_llem.energy.account import Meters, Total
from pytest_llem.measurement import accounting
from pytest_llem.measurement.baseline import baseline_metrics, measure_baseline
from pytest_llem.measurement.caveats import find_warnings
from pytest_llem.measurement.environment import environment
from pytest_llem.measurement.prompts import build_workload, read_texts
from pytest_llem.measurement.requests import Requests
from pytest_llem.measurement.warmup import warm_up
from pytest_llem.measurement.window import measure
from pytest_llem.results.environment import package_version
from pytest_llem.results.experiment import ExperimentResult, Identity
from pytest_llem.results.manifest import now
from pytest_llem.results.metrics import Metric, metric
from pytest_llem.study.config import AUTO, ExperimentConfig
from pytest_llem.study.identity import config_hash

#: What a class has to have to be an engine.
_PARTS = sorted(name for name, part in vars(Engine).items() if callable(part) and not name.startswith("_"))


@dataclass(frozen=True)
class Measured:
    """An experiment's outcome.

    Attributes:
        result: What is written down.
        requests: Per-request figures, which go into a file beside it.
    """

    result: ExperimentResult
    requests: Requests


@dataclass
class ExperimentOrchestrator:
    """Runs one experiment in this process.

    Attributes:
        config: What to run.
        identity: Which experiment it is; made up from *config* for a lone one.
        context: What the engine may know beside its configuration.
        directory: What a dataset's path is relative to.
        root: The git commit of this directory is told; None for the current one.
        on_phase: Called with each phase as it begins.
    """

    config: ExperimentConfig
    identity: Identity | None = None
    context: EngineContext = field(default_factory=EngineContext)
    directory: Path = field(default_factory=Path)
    root: Path | None = None
    on_phase: Callable[[str], None] = lambda phase: None

    def run(self) -> Measured:
        """Load, warm up, measure, and account for it.

        Raises:
            PreflightError: Something it needs is not there.
        """
        config, started_at = self.config, now()
        texts = read_texts(config, self.directory, lambda: self.on_phase("fetching the dataset"))
        engine = self._engine()
        self.on_phase("fetching the model")
        engine.fetch()
        meters = self._meters(engine)
        try:
            self.on_phase("loading")
            load_metrics, load_energy = _load(engine, meters)
            self.on_phase("preparing")
            workload = build_workload(config, engine, texts)
            batches = engine.prepare(workload.prompts)
            engine.seed(config.random_seed)
            baseline = measure_baseline(
                engine,
                batches[0],
                meters,
                load_energy,
                config.baseline,
                on_idle=lambda: self.on_phase("measuring the idle machine"),
            )
            warmup = warm_up(engine, batches, config.warmup, lambda run: self.on_phase(f"warming up, run {run}"))
            self.on_phase("measuring")
            engine.reset_peak_memory()
            min_seconds = config.measurement.min_window_seconds
            window = measure(engine, batches, meters, min_seconds=min_seconds, seed=config.random_seed)
            peak_memory = engine.peak_memory_bytes()
            self.on_phase("accounting")
            requests = Requests.of(engine, batches, window.passes)
            requests.check(config)
            record = engine.describe()
            result = ExperimentResult(
                pytest_llem_version=package_version("pytest-llem") or "unknown",
                identity=self.identity or _lone_identity(config),
                effective_config=config.model_dump(mode="json"),
                metrics={
                    **accounting.energy_metrics(window, requests),
                    **baseline_metrics(baseline, window),
                    **accounting.speed_metrics(window, requests),
                    **requests.latency_metrics(),
                    "model_memory_mb": accounting.megabytes("model_memory_mb", engine.model_memory_bytes()),
                    "peak_memory_mb": accounting.megabytes("peak_memory_mb", peak_memory),
                    **load_metrics,
                },
                devices=accounting.device_energies(window.account),
                window=accounting.window_record(window),
                baseline=baseline,
                warmup=warmup,
                tokens=accounting.token_record(workload, requests, sum(map(engine.positions, batches))),
                engine=record,
                environment=environment(engine.gpus, self.root),
                started_at=started_at,
                completed_at=now(),
                warnings=find_warnings(
                    window,
                    warmup,
                    record,
                    meters.refusals,
                    allow_estimated=config.energy.allow_estimated,
                    cut=(workload.truncated, config.n),
                    deterministic=requests.deterministic,
                ),
            )
        finally:
            meters.close()
            engine.close()
        return Measured(result, requests)

    def _meters(self, engine: Engine) -> Meters:
        wanted = self.config.energy.backend
        meters = Meters.open(wanted, engine.gpus)
        if wanted not in (None, AUTO) and not meters.meters:
            raise PreflightError(f"meter {wanted!r} cannot be used: {meters.refusals[wanted]}")
        return meters

    def _engine(self) -> Engine:
        if self.config.measurement.prefill_split:  # no engine's to support
            raise PreflightError(PREFILL_SPLIT)
        name = self.config.backend
        try:
            make = registry.load(registry.BACKENDS, name)
        except (LookupError, ImportError) as error:
            raise PreflightError(f"engine {name!r} cannot be used: {error}") from error
        if lacking := [part for part in _PARTS if not hasattr(make, part)]:
            more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
            raise PreflightError(f"engine {name!r} cannot be used: it lacks {', '.join(lacking[:3])}{more}")
        try:
            engine: Engine = make(self.config, self.context)
        except ImportError as error:
            raise PreflightError(f"engine {name!r} cannot be used: {error}") from error
        return engine


def _lone_identity(config: ExperimentConfig) -> Identity:
    digest = config_hash(config)
    return Identity(experiment_id=digest, config_hash=digest)


def _load(engine: Engine, meters: Meters) -> tuple[dict[str, Metric], Total]:
    """Load the model, and return what that took: as metrics, and as the meters saw it."""
    meters.begin()
    began = time.perf_counter()
    engine.load()
    engine.synchronize()
    seconds = time.perf_counter() - began
    total = meters.end().total
    metrics = {
        "load_seconds": metric("load_seconds", seconds),
        "load_energy_j": accounting.energy("load_energy_j", total),
    }
    return metrics, total
