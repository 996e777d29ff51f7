"""Measure a command of the user's: run it, meter the devices meanwhile, and read the file that it writes."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.energy.account import Account, Meters, join_accounts
from pytest_llem.engines.protocol import EngineCrashError, PreflightError
from pytest_llem.importers.formats import read_runs
from pytest_llem.importers.steady import Rates, rates_between
from pytest_llem.measurement import accounting
from pytest_llem.measurement.coverage import with_coverage
from pytest_llem.measurement.environment import environment
from pytest_llem.measurement.imported import ImportedRuns
from pytest_llem.measurement.observers import WindowObservers
from pytest_llem.measurement.passes import PassWindow
from pytest_llem.measurement.power_csv import to_csv
from pytest_llem.measurement.progress import Progress
from pytest_llem.measurement.quality_warnings import find_warnings
from pytest_llem.results import code_state
from pytest_llem.results.carbon import Carbon, emissions
from pytest_llem.results.environment import package_version
from pytest_llem.results.experiment import EngineRecord, ExperimentResult, Identity, InputsRecord
from pytest_llem.results.metrics import Metric, metric
from pytest_llem.results.quality_warnings import QualityWarning
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.substitution import PlaceholderError, command_values, unreached
from pytest_llem.times import now

#: Length of the windows that the time of a command is divided into, in s: those within the steady state count.
SLICE_SECONDS = 1.0

#: Tools that measure in their own process, and no server.
SELF_CONTAINED = ("llama-bench",)

#: Identity of the start of a server that was there before the command.
BEFORE = "before the command"

_NO_PASS = "a run of a load generator has no passes"


class CommandFailedError(Exception):
    """Raised if a command ends with an exit status other than 0, or writes no file. The message says which."""


@dataclass(frozen=True)
class CommandSlice:
    """A part of the time of a command.

    Attributes:
        began: Start on the monotonic clock, in s.
        ended: End on the monotonic clock, in s.
        account: The meters' readings.
    """

    began: float
    ended: float
    account: Account


@dataclass(frozen=True)
class MeasuredCommand:
    """The outcome of a command.

    Attributes:
        result: The result to save.
        requests: Requests of the run as CSV; None if the file has none.
        window: The time of the whole command.
    """

    result: ExperimentResult
    requests: str | None
    window: PassWindow

    def files(self) -> dict[str, str]:
        """Return the files to save with the result: their contents by file name suffix."""
        files = {} if self.requests is None else {"requests.csv": self.requests}
        if samples := self.window.account.samples:
            files["power.csv"] = to_csv(samples, self.window.began)
        return files


@dataclass(frozen=True)
class CommandDevices:
    """The devices of a command, as far as observers have to know them.

    Attributes:
        gpus: UUIDs of the GPUs that are leased for it.
    """

    gpus: Sequence[str]

    def reset_peak_memory(self) -> None:
        """Do nothing: the memory of a command is not recorded."""


def measure_command(
    config: ExperimentConfig,
    identity: Identity,
    *,
    directory: Path,
    root: Path | None,
    carbon: Carbon | None,
    harness: Sequence[int],
    on_progress: Callable[[Progress], None],
    telemetry_fd: int | None,
    devices: Sequence[str],
) -> MeasuredCommand:
    """Run the command of *config* and return the outcome. The arguments are those of an orchestrator.

    Raises:
        PreflightError: The command cannot be run here.
        EngineCrashError: A signal ended the command.
        CommandFailedError: It ended with another exit status than 0, or wrote no file.
        ImportFileError: Its file cannot be read.
    """
    assert config.command is not None
    started_at = now()
    gpus = [name for name in devices if name.startswith("GPU-")]
    wanted = config.energy.backend
    meters = Meters.open(wanted, gpus, telemetry_fd)
    parts = Meters.open(wanted, gpus)
    observers = WindowObservers(CommandDevices(gpus), harness)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        on_progress(Progress("measuring"))
        try:
            observers.begin()
            meters.begin()
            began, began_at = time.monotonic(), time.time()
            slices = _run(config, directory, out, parts)
            ended = time.monotonic()
            window = PassWindow(ended - began, meters.end(), began, began_at)
            observers.end(window)
        finally:
            parts.close()
            meters.close()
        on_progress(Progress("accounting"))
        runs = _read(config, out)
        return _outcome(config, identity, runs, window, slices, observers, gpus, root, carbon, started_at, meters)


def _run(config: ExperimentConfig, directory: Path, out: Path, meters: Meters) -> list[CommandSlice]:
    """Run the command until it ends, and return the slices of that time."""
    assert config.command is not None
    try:
        arguments = command_values(config, out=str(out), python=sys.executable).fill(config.command.run)
    except PlaceholderError as error:
        raise PreflightError(f"command.run[{error.index}]: {error}") from error
    slices = []
    writes_itself = any("{out}" in argument for argument in config.command.run)
    with out.with_name("stdout").open("wb") as stdout:
        try:
            process = subprocess.Popen(
                arguments,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=None if writes_itself else stdout,
            )
        except OSError as error:
            raise PreflightError(f"command.run: {arguments[0]!r} cannot be run: {error.strerror}") from error
        status = None
        while status is None:
            meters.begin()
            began = time.monotonic()
            with suppress(subprocess.TimeoutExpired):
                status = process.wait(SLICE_SECONDS)
            ended = time.monotonic()
            slices.append(CommandSlice(began, ended, meters.end()))
    if status < 0:
        raise EngineCrashError(f"{shlex.quote(arguments[0])} was ended by signal {-status}")
    if status:
        raise CommandFailedError(f"{shlex.quote(arguments[0])} ended with exit status {status}: see its output")
    if not writes_itself:
        out.with_name("stdout").rename(out)
    elif not out.exists():
        raise CommandFailedError(f"{shlex.quote(arguments[0])} did not write {{out}}")
    return slices


def _read(config: ExperimentConfig, out: Path) -> ImportedRuns:
    """Return what the command measured.

    Raises:
        CommandFailedError: The file has runs of several configurations.
    """
    assert config.command is not None
    runs = read_runs([out], config.command.format)
    if any(run.settings != runs[0].settings for run in runs):
        raise CommandFailedError(
            f"the file has {len(runs)} runs of several configurations, and an experiment has one: make it an axis"
        )
    owned = config.command.fresh_server or runs[0].tool in SELF_CONTAINED
    return ImportedRuns([replace(run, server_start=None if owned else BEFORE) for run in runs])


def _outcome(
    config: ExperimentConfig,
    identity: Identity,
    runs: ImportedRuns,
    window: PassWindow,
    slices: Sequence[CommandSlice],
    observers: WindowObservers,
    gpus: Sequence[str],
    root: Path | None,
    carbon: Carbon | None,
    started_at: str,
    meters: Meters,
) -> MeasuredCommand:
    assert config.command is not None
    owned = runs.first.server_start is None
    run = runs.first
    record = EngineRecord(
        name=run.format,
        versions={} if run.version is None else {run.format: run.version},
        device="cuda" if gpus else "cpu",
        settings=dict(run.settings),
    )
    energy, is_steady = _energy_metrics(runs, window, slices)
    metrics = {**runs.metrics(), **energy, "gco2e_g": emissions(carbon, energy["energy_j"])}
    if owned:  # it is not known where another server runs
        metrics = with_coverage(metrics, record, gpus)
    # The processes of a server that was there before are not of this experiment.
    contention = observers.contention(window.seconds) if owned else None
    warnings = [
        *runs.warnings(),
        *find_warnings(
            window,
            None,
            record,
            meters.refusals,
            allow_estimated=config.energy.allow_estimated,
            covers_engine=metrics["energy_j"].covers_engine,
            contention=contention,
        ),
    ]
    if not is_steady and energy["energy_j"].value is not None:
        text = "energy is over the whole command, with its start and its end: no part of it is known to be steady"
        warnings.append(QualityWarning.of("whole_run_energy", text))
    effective = accounting.effective_config(config, unreached(config, config.command.run))
    del effective["n"]
    if runs.completed is not None:
        effective["n"] = runs.completed
    result = ExperimentResult(
        pytest_llem_version=package_version("pytest-llem") or "unknown",
        identity=identity,
        effective_config=effective,
        metrics=accounting.not_judged(metrics, None if runs.requests is None else runs.requests.not_judged),
        devices=accounting.device_energies(window.account),
        window=accounting.window_record(window),
        tokens=runs.tokens(),
        engine=record,
        environment=environment(gpus, root),
        harness_cpu_seconds=observers.harness_cpu_seconds,
        contention=contention,
        inputs=InputsRecord(**code_state.imported(), model_folder=None),
        imported=runs.record(),
        started_at=started_at,
        completed_at=now(),
        warnings=sorted(warnings, key=lambda one: one.rank),
    )
    return MeasuredCommand(result, runs.to_csv(), window)


def _energy_metrics(
    runs: ImportedRuns, window: PassWindow, slices: Sequence[CommandSlice]
) -> tuple[dict[str, Metric], bool]:
    """Return the energy metrics, and whether they are over the steady state and not over the whole command.

    A pass is as many requests as the run had, each with the energy of one in the steady state.
    """
    steady = [*_steady_slices(runs, slices)]
    if steady:
        account = join_accounts([one.account for one, _ in steady])
        requests = sum(rates.requests for _, rates in steady)
        tokens = (
            None
            if any(rates.output_tokens is None for _, rates in steady)
            else sum(rates.output_tokens or 0.0 for _, rates in steady)
        )
    else:
        account = window.account
        metrics = runs.metrics()
        tokens = metrics["output_tokens"].value
        requests = runs.completed or 0.0
    total, seconds = account.total, account.seconds or window.seconds
    missing = f"not in {runs.first.source}: the number of"
    completed = runs.completed or 1

    def share(name: str, number: float | None, what: str, scale: float = 1.0) -> Metric:
        if number:
            return accounting.energy(name, total, scale / number)
        return metric(name, None, method="unavailable", reason=f"{missing} {what}")

    per_pass = completed / requests if requests else 1.0
    found = {
        "energy_j": accounting.energy("energy_j", total, per_pass),
        "energy_per_request_j": share("energy_per_request_j", requests, "requests"),
        "wh_per_1000_requests": share("wh_per_1000_requests", requests, "requests", 1000 / accounting.J_PER_WH),
        "energy_per_output_token_j": share("energy_per_output_token_j", tokens, "output tokens"),
        "mean_power_w": accounting.energy("mean_power_w", total, 1 / seconds),
        "edp_js": metric("edp_js", None, method="unavailable", reason=_NO_PASS),
    }
    per_token = found["energy_per_output_token_j"]
    found["tokens_per_joule"] = per_token.model_copy(
        update={
            "value": 1 / per_token.value if per_token.value else None,
            "unit": CATALOGUE["tokens_per_joule"].unit,
            "uncertainty": None,
            "reason": per_token.reason or (None if per_token.value else "energy_j is 0"),
        }
    )
    for name, boundary in (("gpu", "gpu_board"), ("cpu", "cpu_package"), ("dram", "dram")):
        key = f"{name}_energy_j"
        found[key] = accounting.energy(key, account.over(boundary), per_pass)
    return {name: one for name, one in found.items() if name in CATALOGUE}, bool(steady)


def _steady_slices(runs: ImportedRuns, slices: Sequence[CommandSlice]) -> Iterator[tuple[CommandSlice, Rates]]:
    """Yield the slices within the steady state, each with what was generated in it."""
    spans = runs.steady
    if isinstance(spans, str) or runs.first.clock == "other" or any(run.cut for run in runs.runs):
        return
    for run, span in zip(runs.runs, spans, strict=True):
        ahead = time.time() - time.monotonic() if run.clock == "unix" else 0.0
        served = [one for one in run.requests if one.is_served and None not in (one.sent, one.last_token)]
        for one in slices:
            began, ended = one.began + ahead, one.ended + ahead
            if span.began <= began < ended <= span.ended:
                yield one, rates_between(served, began, ended)
