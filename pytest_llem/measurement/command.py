"""Measure a command of the user's: run it, meter the devices meanwhile, and read the file that it writes."""

from __future__ import annotations

import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_llem.energy.account import Account, Meters, join_accounts
from pytest_llem.engines.protocol import EngineCrashError, PreflightError
from pytest_llem.hardware.environment import environment
from pytest_llem.importers.formats import read_runs
from pytest_llem.importers.steady import Rates, rates_between, timed_requests
from pytest_llem.measurement import accounting, records
from pytest_llem.measurement.accounting import Served, energy_metrics
from pytest_llem.measurement.imported_runs import ImportedRuns
from pytest_llem.measurement.observers import WindowObservers
from pytest_llem.measurement.pass_window import PassWindow
from pytest_llem.measurement.progress import Progress
from pytest_llem.measurement.quality_warnings import energy_warnings, find_warnings
from pytest_llem.measurement.records import Measured
from pytest_llem.results import code_state
from pytest_llem.results.carbon import emissions
from pytest_llem.results.environment import package_version
from pytest_llem.results.experiment import EngineRecord, ExperimentResult, Identity, InputsRecord
from pytest_llem.results.metrics import Metric
from pytest_llem.results.quality_warnings import QualityWarning
from pytest_llem.results.statistics import total_of
from pytest_llem.study.config import AUTO, ExperimentConfig
from pytest_llem.study.engines import CommandConfig
from pytest_llem.study.substitution import PlaceholderError, command_values, unreached
from pytest_llem.times import now

if TYPE_CHECKING:  # which imports this module
    from pytest_llem.measurement.orchestrator import ExperimentOrchestrator

#: Length of the slices that the time of a command is divided into, in s. Energy is that of the slices within the
#: steady state.
SLICE_SECONDS = 1.0

#: Tools that run the model in their own process, without a server.
SELF_CONTAINED = ("llama-bench",)

#: ``server_start`` of a server that ran before the command: all cycles have the same.
SERVER_BEFORE = "before the command"


#: Metrics of energy that need the number of requests.
_PER_REQUEST = ("energy_per_request_j", "wh_per_1000_requests")


class CommandFailedError(Exception):
    """Raised if a command's exit status is not 0, or if it does not write the runs of one configuration."""


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
class CommandOrchestrator:
    """Runs the command of one experiment, in this process.

    Attributes:
        experiment: The experiment, of the backend ``command``, and how to run it.
        identity: Its identity in a study.
    """

    experiment: ExperimentOrchestrator
    identity: Identity

    @property
    def config(self) -> ExperimentConfig:
        """The experiment's configuration."""
        return self.experiment.config

    @property
    def options(self) -> CommandConfig:
        """The options of the command."""
        assert self.config.command is not None
        return self.config.command

    @property
    def gpus(self) -> list[str]:
        """UUIDs of the leased GPUs."""
        return [name for name in self.experiment.devices if name.startswith("GPU-")]

    def run(self) -> Measured:
        """Run the command, and return the outcome.

        Raises:
            PreflightError: The command cannot be run here, or a meter that the study names cannot be used.
            EngineCrashError: A signal ended the command.
            CommandFailedError: It ended with another exit status than 0, or did not write the runs of one
                configuration.
            ImportFileError: Its file cannot be read.
        """
        started_at = now()
        wanted = self.config.energy.backend
        meters = Meters.open(wanted, self.gpus, self.experiment.telemetry_fd)
        slice_meters = Meters.open(wanted, self.gpus)
        observers = WindowObservers(self.gpus, self.experiment.harness)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "result.json")
            self.experiment.on_progress(Progress("measuring"))
            try:
                if wanted not in (None, AUTO) and not meters.meters:
                    raise PreflightError(f"meter {wanted!r} cannot be used: {meters.refusals[wanted]}")
                observers.begin()
                meters.begin()
                began, began_at = time.monotonic(), time.time()
                slices = self._run_command(out, slice_meters)
                window = PassWindow(time.monotonic() - began, meters.end(), began, began_at)
                observers.end(window.account)
            finally:
                slice_meters.close()
                meters.close()
            self.experiment.on_progress(Progress("computing the metrics"))
            runs = self._read(out)
            result = self._result(runs, window, slices, observers, meters.refusals, started_at)
            files = {"requests.csv": runs.to_csv(), "power.csv": window.power_csv()}
            return Measured(result, runs.requests, {name: one for name, one in files.items() if one is not None})

    def _run_command(self, out: Path, meters: Meters) -> list[CommandSlice]:
        """Run the command until it ends, and return the slices of that time.

        Args:
            out: The file that it has to write.
            meters: Open meters, which read each slice.
        """
        given = self.options.run
        try:
            arguments = command_values(self.config, out=str(out), python=sys.executable).fill(given)
        except PlaceholderError as error:
            raise PreflightError(f"command.run[{error.index}]: {error}") from error
        writes_itself = any("{out}" in argument for argument in given)
        printed = out.with_name("stdout")
        with printed.open("wb") as stdout:
            try:
                process = subprocess.Popen(
                    arguments,
                    cwd=self.experiment.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=None if writes_itself else stdout,
                )
            except OSError as error:
                message = f"command.run: {arguments[0]!r} cannot be run: {error.strerror}"
                raise PreflightError(message) from error
            slices = []
            try:
                while process.returncode is None:
                    meters.begin()
                    began = time.monotonic()
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(SLICE_SECONDS)
                    slices.append(CommandSlice(began, time.monotonic(), meters.end()))
            finally:
                process.kill()  # does nothing once it has ended
        program, status = shlex.quote(arguments[0]), process.returncode
        if status < 0:
            raise EngineCrashError(f"{program} was ended by signal {-status}")
        if status:
            raise CommandFailedError(f"{program} ended with exit status {status}: see its output")
        if not writes_itself:
            printed.rename(out)
        elif not out.exists():
            raise CommandFailedError(f"{program} did not write {{out}}")
        return slices

    def _read(self, out: Path) -> ImportedRuns:
        """Return what the command measured."""
        runs = read_runs([out], self.options.format)
        if any(run.settings != runs[0].settings for run in runs):
            raise CommandFailedError(
                f"the file has {len(runs)} runs of several configurations, and an experiment has one: "
                "make an axis of them"
            )
        is_fresh = self.options.fresh_server or runs[0].format in SELF_CONTAINED
        return ImportedRuns([replace(run, server_start=None if is_fresh else SERVER_BEFORE) for run in runs])

    def _result(
        self,
        runs: ImportedRuns,
        window: PassWindow,
        slices: Sequence[CommandSlice],
        observers: WindowObservers,
        refusals: Mapping[str, str],
        started_at: str,
    ) -> ExperimentResult:
        run, is_fresh = runs.first, runs.first.server_start is None
        record = EngineRecord(
            name=run.tool,
            versions={} if run.version is None else {run.tool: run.version},
            device="cuda" if self.gpus else "cpu",
            settings=dict(run.settings),
        )
        energy, is_steady = _energy_metrics(runs, window, slices)
        metrics = {**runs.metrics(), **energy, "gco2e_g": emissions(self.experiment.carbon, energy["energy_j"])}
        if is_fresh:  # else it is not known where the server runs
            metrics = accounting.with_covers_engine(metrics, record, self.gpus)
        # A server that ran before the command is not of this experiment: its work would count as contention.
        contention = observers.contention(window.seconds) if is_fresh else None
        result = ExperimentResult(
            pytest_llem_version=package_version("pytest-llem") or "unknown",
            identity=self.identity,
            effective_config=self._effective_config(runs.completed),
            metrics=accounting.mark_not_judged(
                metrics, None if runs.requests is None else runs.requests.not_judged
            ),
            devices=records.device_energies(window.account),
            window=records.window_record(window),
            tokens=runs.tokens(),
            engine=record,
            environment=environment(self.gpus, self.experiment.root),
            harness_cpu_seconds=observers.harness_cpu_seconds,
            contention=contention,
            inputs=InputsRecord(**code_state.imported(), model_folder=None),
            imported=runs.record(),
            started_at=started_at,
            completed_at=now(),
        )
        allow_estimated = self.config.energy.allow_estimated
        warnings = [
            *runs.warnings(),
            *energy_warnings(window.account, refusals, allow_estimated=allow_estimated),
        ]
        if not is_steady and energy["energy_j"].value is not None:
            text = (
                "energy is over the whole command, with its start and its end: no part of it is known to be steady"
            )
            warnings.append(QualityWarning.of("whole_run_energy", text))
        result.warnings = find_warnings(result, warnings)
        return result

    def _effective_config(self, completed: int | None) -> dict[str, Any]:
        """Return the configuration as it ran; ``n`` is the number of answered requests, if known."""
        fields = records.effective_config(self.config, unreached(self.config, self.options.run))
        del fields["n"]
        return fields if completed is None else {**fields, "n": completed}


def _energy_metrics(
    runs: ImportedRuns, window: PassWindow, slices: Sequence[CommandSlice]
) -> tuple[dict[str, Metric], bool]:
    """Return the energy metrics, and whether they are over the steady state and not over the whole command.

    A pass is as many requests as the run had, each with the energy of one in the steady state.
    """
    run = {name: one.value for name, one in runs.metrics().items()}
    inputs, completed = run["input_tokens"], runs.completed
    steady = [*_steady_slices(runs, slices)]
    if not steady or not completed:
        served = Served(1.0, completed or 0.0, inputs, run["output_tokens"])
        found = energy_metrics(window.account, window.seconds, served)
        if completed is None:
            update = {"reason": f"not in {runs.first.source}: the number of requests"}
            found |= {name: found[name].model_copy(update=update) for name in _PER_REQUEST}
        return found, False
    requests = sum(rates.requests for _, rates in steady)
    passes = requests / completed
    tokens = total_of(rates.output_tokens for _, rates in steady)
    served = Served(passes, requests, None if inputs is None else inputs * passes, tokens)
    account = join_accounts([one.account for one, _ in steady])
    return energy_metrics(account, sum(rates.seconds for _, rates in steady), served), True


def _steady_slices(runs: ImportedRuns, slices: Sequence[CommandSlice]) -> Iterator[tuple[CommandSlice, Rates]]:
    """Yield the slices within the steady state, each with what was generated in it."""
    spans = runs.steady
    if isinstance(spans, str) or runs.first.clock == "other" or any(run.cut for run in runs.runs):
        return
    for run, span in zip(runs.runs, spans, strict=True):
        offset = time.time() - time.monotonic() if run.clock == "unix" else 0.0
        served = timed_requests(run)
        for one in slices:
            began, ended = one.began + offset, one.ended + offset
            if span.began <= began < ended <= span.ended:
                yield one, rates_between(served, began, ended)
