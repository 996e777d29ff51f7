"""One configuration, from loading the model to the result."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pytest_llem import registry
from pytest_llem.backends.protocol import Engine, EngineContext, PreflightError
from pytest_llem.energy.account import Account, Meters, Total
from pytest_llem.measurement.environment import environment
from pytest_llem.measurement.prompts import Workload, build_workload
from pytest_llem.measurement.requests import Requests
from pytest_llem.measurement.warmup import warm_up
from pytest_llem.measurement.window import Window, measure
from pytest_llem.results.environment import package_version
from pytest_llem.results.manifest import now
from pytest_llem.results.metrics import Metric, metric
from pytest_llem.results.models import (
    DeviceEnergy,
    EngineRecord,
    ExperimentResult,
    Identity,
    TokenRecord,
    WarmupRecord,
    WindowRecord,
)
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.identity import config_hash

J_PER_WH = 3600.0

#: A window of fewer ticks than this is too coarse for the counter that measured it.
FEWEST_TICKS = 20


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
        on_phase: Called with each phase as it begins.
    """

    config: ExperimentConfig
    identity: Identity | None = None
    context: EngineContext = field(default_factory=EngineContext)
    directory: Path = field(default_factory=Path)
    on_phase: Callable[[str], None] = lambda phase: None

    def run(self) -> Measured:
        """Load, warm up, measure, and account for it.

        Raises:
            PreflightError: Something it needs is not there.
        """
        config = self.config
        started_at = now()
        engine = self._engine()
        self.on_phase("fetching the model")
        engine.fetch()
        meters = Meters.open(config.energy.backend, engine.gpus)
        try:
            self.on_phase("loading")
            meters.begin()
            began = time.perf_counter()
            engine.load()
            engine.synchronize()
            load_seconds = time.perf_counter() - began
            load = meters.end()

            self.on_phase("preparing")
            workload = build_workload(config, engine, self.directory)
            batches = engine.prepare(workload.prompts)
            engine.seed(config.random_seed)
            warmup = warm_up(engine, batches, config.warmup, lambda run: self.on_phase(f"warming up, run {run}"))

            self.on_phase("measuring")
            engine.reset_peak_memory()
            window = measure(
                engine,
                batches,
                meters,
                min_seconds=config.measurement.min_window_seconds,
                seed=config.random_seed,
            )
            peak_memory = engine.peak_memory_bytes()

            self.on_phase("accounting")
            requests = Requests(
                [
                    [
                        request
                        for batch, generated in zip(batches, one, strict=True)
                        for request in engine.requests(batch, generated)
                    ]
                    for one in window.passes
                ],
                engine.no_latency,
            )
            record = engine.describe()
            tokens = _tokens(workload, requests, sum(map(engine.positions, batches)))
            metrics = {
                **_energy_metrics(window, requests),
                **_speed_metrics(window, requests),
                **requests.latency_metrics(),
                "model_memory_mb": _megabytes("model_memory_mb", engine.model_memory_bytes()),
                "peak_memory_mb": _megabytes("peak_memory_mb", peak_memory),
                "load_seconds": metric("load_seconds", load_seconds),
                "load_energy_j": _energy("load_energy_j", load.total),
            }
            result = ExperimentResult(
                pytest_llem_version=package_version("pytest-llem") or "unknown",
                identity=self.identity or _lone_identity(config),
                effective_config=config.model_dump(mode="json"),
                metrics=metrics,
                devices=_devices(window.account),
                window=_window(window),
                warmup=warmup,
                tokens=tokens,
                engine=record,
                environment=environment(engine.gpus),
                started_at=started_at,
                completed_at=now(),
                warnings=_warnings(window, warmup, record, meters),
            )
        finally:
            meters.close()
            engine.close()
        return Measured(result, requests)

    def _engine(self) -> Engine:
        name = self.config.backend
        try:
            engine: Engine = registry.load(registry.BACKENDS, name)(self.config, self.context)
        except (LookupError, ImportError) as error:
            raise PreflightError(f"engine {name!r} cannot be used: {error}") from error
        return engine


def _lone_identity(config: ExperimentConfig) -> Identity:
    digest = config_hash(config)
    return Identity(experiment_id=digest, config_hash=digest)


def _tokens(workload: Workload, requests: Requests, positions: int) -> TokenRecord:
    return TokenRecord(
        prompts=len(workload.prompts),
        input_tokens=requests.input_tokens,
        output_tokens=sum(len(request.output_ids) for request in requests.passes[0]),
        truncated_prompts=workload.truncated,
        padding_waste=1 - requests.input_tokens / positions,
        output_digest=requests.output_digest(),
    )


def _energy(name: str, total: Total, scale: float = 1.0) -> Metric:
    """Return *total* × *scale* as the metric *name*, with its provenance."""
    return metric(
        name,
        None if total.energy_j is None else total.energy_j * scale,
        method=total.method,
        source=total.source,
        boundary=total.boundary,
        reason=total.reason,
    )


def _energy_metrics(window: Window, requests: Requests) -> dict[str, Metric]:
    account, total = window.account, window.account.total
    passes, prompts = len(window.passes), len(requests.passes[0])
    output_tokens = requests.output_tokens
    metrics = {
        "energy_j": _energy("energy_j", total, 1 / passes),
        "energy_per_request_j": _energy("energy_per_request_j", total, 1 / passes / prompts),
        "wh_per_1000_requests": _energy("wh_per_1000_requests", total, 1000 / passes / prompts / J_PER_WH),
        "edp_js": _energy("edp_js", total, 1 / passes * window.seconds / passes),
        "mean_power_w": _energy("mean_power_w", total, 1 / (account.seconds or window.seconds)),
    }
    for name, boundary in (("gpu", "gpu_board"), ("cpu", "cpu_package"), ("dram", "dram")):
        key = f"{name}_energy_j"
        metrics[key] = _energy(key, account.over(boundary), 1 / passes)
    if output_tokens:
        metrics["energy_per_output_token_j"] = _energy(
            "energy_per_output_token_j", total, 1 / passes / output_tokens
        )
    else:
        metrics["energy_per_output_token_j"] = metric(
            "energy_per_output_token_j", None, method="unavailable", reason="nothing was generated"
        )
    per_joule = metrics["energy_j"].model_copy(update={"unit": "1/J"})
    if per_joule.value:
        per_joule = per_joule.model_copy(update={"value": output_tokens / per_joule.value})
    metrics["tokens_per_joule"] = per_joule
    return metrics


def _speed_metrics(window: Window, requests: Requests) -> dict[str, Metric]:
    seconds = window.seconds / len(window.passes)
    return {
        "seconds": metric("seconds", seconds),
        "output_tokens_per_second": metric("output_tokens_per_second", requests.output_tokens / seconds),
        "requests_per_second": metric("requests_per_second", len(requests.passes[0]) / seconds),
    }


def _megabytes(name: str, size: int | None) -> Metric:
    if size is None:
        return metric(name, None, reason="the engine cannot tell")
    return metric(name, size / 1e6)


def _devices(account: Account) -> list[DeviceEnergy]:
    return [DeviceEnergy.model_validate(vars(device)) for device in account.devices]


def _window(window: Window) -> WindowRecord:
    account = window.account
    tick = account.tick_seconds
    return WindowRecord(
        passes=len(window.passes),
        window_seconds=window.seconds,
        window_energy_j=account.total.energy_j,
        energy_seconds=account.seconds,
        tick_seconds=tick,
        quantisation_error=tick / account.seconds if tick and account.seconds else None,
    )


def _warnings(window: Window, warmup: WarmupRecord | None, engine: EngineRecord, meters: Meters) -> list[str]:
    account, total = window.account, window.account.total
    found: list[Any] = [f"meter {name}: {why}" for name, why in meters.refusals.items()]
    if total.method == "estimated":
        found.append("energy is estimated from CPU time, not measured")
    if engine.device != "cpu" and total.boundary and "gpu_board" not in total.boundary:
        found.append(f"the engine ran on {engine.device}, and the energy covers {total.boundary} only")
    if account.tick_seconds and account.seconds and account.seconds < FEWEST_TICKS * account.tick_seconds:
        found.append(
            f"the window holds {account.seconds / account.tick_seconds:.0f} ticks of the energy counter, "
            f"fewer than {FEWEST_TICKS}: raise measurement.min_window_seconds"
        )
    if warmup is not None and warmup.converged is False:
        cv = "unknown" if warmup.cv is None else f"{warmup.cv:.1%}"
        found.append(f"warm-up stopped after {warmup.runs} runs before latencies settled (CV {cv})")
    if engine.random_weights:
        found.append("random weights: speed is real, power depends on the values and may differ")
    return found
