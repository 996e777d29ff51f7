"""Warnings about the quality of results, and their severities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

from pydantic import Field

from pytest_llem.results.document import Record

#: ``error``: a value is missing or must not be used; ``warning``: a value may be wrong; ``note``: background.
Severity = Literal["error", "warning", "note"]


class Kind(NamedTuple):
    """What warnings of one code have in common."""

    severity: Severity
    meaning: str
    advice: str


#: Every code, the worst first.
WARNINGS: dict[str, Kind] = {
    "requests_failed": Kind(
        "error",
        "Requests failed or returned no token; latencies and rates are of the others.",
        "Look at the column error of requests.csv, and measure again.",
    ),
    "counter_disagrees": Kind(
        "error",
        "Energy counter and sampled power differ by more than 3 %; above 5 % the energy is invalid.",
        "Measure again. If it happens again, update the driver, or compare the counter with a wattmeter.",
    ),
    "impossibly_fast": Kind(
        "error",
        "The engine reports more work than the device can do in that time.",
        "Correct the engine: it has to return what it generated, and to wait for the device in synchronize.",
    ),
    "compiled": Kind(
        "error",
        "Something was compiled within the window; no gate judges it.",
        "Raise warmup.n_warmup, or switch the engine's compilation off.",
    ),
    "repeats_faster": Kind(
        "error",
        "Passes that repeat prompts are faster: the engine may answer from a cache; no gate judges it.",
        "Switch the engine's cache of prompts or answers off, or clear it in seed.",
    ),
    "traced": Kind(
        "error",
        "A tracer, profiler or coverage slowed Python down within the window; no gate judges it.",
        "Run without coverage, debugger or profiler in subprocesses.",
    ),
    "no_energy": Kind(
        "error",
        "No meter could measure energy; the text says why.",
        "Run llem doctor, which says what is missing and what to do.",
    ),
    "engine_not_covered": Kind(
        "error",
        "The energy does not cover the device that the engine ran on.",
        "Run llem doctor. If the other devices' energy is meant, name the meter in energy.backend.",
    ),
    "setting_adjusted": Kind(
        "warning",
        "A setting ran with another value than the study gives, or has no effect.",
        "Give the value that ran, or change what the text names.",
    ),
    "tokens_disagree": Kind(
        "warning",
        "The server's own counter of output tokens differs from what the client received.",
        "Stop other clients of the server, and measure again.",
    ),
    "server_drift": Kind(
        "warning",
        "The first load on a server, measured again as the last one, differs by more than 5 %, or failed.",
        "Doubt differences of that size between loads; measure longer windows, and more cycles.",
    ),
    "contended": Kind(
        "warning",
        "Other programs used the experiment's CPUs or GPUs within the window, or its CPU quota was used up.",
        "Stop other programs, and measure again.",
    ),
    "code_edited": Kind(
        "warning",
        "A module was edited while the study ran.",
        "Measure again, and do not edit code while a study runs.",
    ),
    "cycles_differ": Kind(
        "warning",
        "The cycles of a point differ in a testbed fact, such as the power limit.",
        "Keep the fact the same for all cycles, and measure again.",
    ),
    "inputs_differ": Kind(
        "warning",
        "A dataset or a model was edited while the study ran.",
        "Measure again, and do not edit datasets or models while a study runs.",
    ),
    "runs_of_one_server": Kind(
        "warning",
        "Several runs measured one start of the server; they are one cycle, and give no verdict.",
        "Start the server again for each run, and import the files with --cycle-per file.",
    ),
    "whole_run_rates": Kind(
        "warning",
        "Rates are over the whole run of a load generator, with ramp-up and the time when requests run out.",
        "Let the tool save the times of requests (vllm bench serve --save-detailed), or run it for longer.",
    ),
    "whole_run_energy": Kind(
        "warning",
        "Energy is over a whole command, with its start and its end, and not over the steady state.",
        "Let the tool save the times of requests, and run it for longer.",
    ),
    "records_cut": Kind(
        "warning",
        "A load generator's records have only the first requests of its run.",
        "Import the complete file.",
    ),
    "throttled": Kind(
        "warning",
        "The GPU reduced its clocks within the window, for power, heat or another reason.",
        "Improve cooling, or lock clocks at a value that the power limit allows: llem doctor recommends one.",
    ),
    "few_ticks": Kind(
        "warning",
        "The window has fewer than 20 ticks of the energy counter or samples of power; no gate judges its energy.",
        "Raise measurement.min_window_seconds.",
    ),
    "faster_than_roofline": Kind(
        "warning",
        "The window is shorter than the device's peak FLOP/s and bandwidth allow: these, or the computed FLOPs "
        "and bytes, are wrong.",
        "Do not use mfu, mbu and roofline_slowdown of this result, and file an issue.",
    ),
    "idle_power_changed": Kind(
        "warning",
        "Idle power differed before and after the windows, so active energy is uncertain.",
        "Let the machine settle: raise execution.experiment_gap_seconds or baseline.duration_seconds.",
    ),
    "warmup_not_converged": Kind(
        "warning",
        "Latencies were not steady at the end of the warm-up.",
        "Raise warmup.max_prompts, or use a quieter machine.",
    ),
    "drift": Kind(
        "warning",
        "Passes were slower or faster in the second half of the window than in the first.",
        "Raise warmup.thermal_floor_seconds (the shortest warm-up), lock clocks, or use a quieter machine.",
    ),
    "host_bound": Kind(
        "warning",
        "The GPU waited for the CPU during most of the window.",
        "Raise the batch size or compile the model, unless this is what you want to measure.",
    ),
    "temperature": Kind(
        "warning",
        "The temperature of a device changed within the window.",
        "Raise warmup.thermal_floor_seconds (the shortest warm-up), so that the window begins warm.",
    ),
    "gap_timeout": Kind(
        "warning",
        "The GPU had not cooled down, or was busy, when the gap before the experiment ended.",
        "Improve cooling, or give execution.experiment_gap_seconds a longer time.",
    ),
    "memory_not_released": Kind(
        "warning",
        "GPU memory of the previous experiment was not released in time.",
        "Stop other programs on the GPU. If the memory stays, nvidia-smi shows which process holds it.",
    ),
    "outputs_differ": Kind(
        "warning",
        "Passes with the same seed gave different output tokens.",
        "Leave pytorch.deterministic at true, or accept that tokens differ between passes.",
    ),
    "outputs_on_gpu": Kind(
        "warning",
        "The engine keeps outputs on the GPU, which adds to peak memory.",
        "Move outputs to the CPU in generate.",
    ),
    "passes_not_recorded": Kind(
        "warning",
        "The window has too many passes to keep all outputs; latencies are of a sample of passes.",
        "Nothing, or shorten measurement.min_window_seconds.",
    ),
    "counter_unused": Kind(
        "warning",
        "The GPU has an energy counter that could not be used; its power was sampled.",
        "Run llem doctor, and update the driver.",
    ),
    "counter_unchecked": Kind(
        "warning",
        "The energy counter could not be compared with sampled power.",
        "Nothing, if you trust the counter; the text says why.",
    ),
    "tick_unknown": Kind(
        "warning",
        "The period of the energy counter could not be determined.",
        "Raise measurement.min_window_seconds, so that the period does not matter.",
    ),
    "library_warning": Kind(
        "warning",
        "A library warned while the experiment ran; the text is its own.",
        "Read the text. Libraries warn about deprecations as well as about wrong results.",
    ),
    "unclassified": Kind(
        "warning",
        "A warning of a result of schema 1.3 or older, which had no codes.",
        "Read the text.",
    ),
    "server_attached": Kind(
        "note",
        "The server ran already: it is not a fresh process, and what it did before may matter.",
        "Let the study start the server, by server.preset or server.command.",
    ),
    "memory_of_others": Kind(
        "note",
        "Other processes hold memory of the GPU.",
        "Stop other programs on the GPU if the memory or their work matters.",
    ),
    "meter_refused": Kind(
        "note",
        "A meter that was tried is not available here.",
        "Run llem doctor if you need this meter.",
    ),
    "energy_estimated": Kind(
        "note",
        "The energy is estimated, not measured.",
        "Measure on a machine with a counter, or set energy.allow_estimated to accept it.",
    ),
    "prompts_cut": Kind(
        "note",
        "Prompts were cut to max_input_tokens.",
        "Raise max_input_tokens if whole prompts are meant.",
    ),
    "random_weights": Kind(
        "note",
        "The weights are random: speed is real, power depends on their values.",
        "Use trained weights if you publish energy.",
    ),
}
_RANKS = {code: rank for rank, code in enumerate(WARNINGS)}


class QualityWarning(Record):
    """A warning about the result of an experiment.

    Example:
        >>> QualityWarning.of("drift", "drift: passes took 10% longer in the second half of the window").severity
        'warning'
    """

    code: str
    """Kind of warning, one of :data:`WARNINGS`; ``unclassified`` in results of schema 1.3 and older, which held
    only the text.
    """
    severity: Severity
    """Severity of the code."""
    text: str
    """Text for the user."""

    @classmethod
    def of(cls, code: str, text: str) -> QualityWarning:
        """Return a warning with the severity of *code*."""
        return cls(code=code, severity=WARNINGS[code].severity, text=text)

    @property
    def rank(self) -> int:
        """Order by severity: 0 is the worst."""
        return _RANKS.get(self.code, _RANKS["unclassified"])

    def __str__(self) -> str:
        return self.text


class StudyWarning(QualityWarning):
    """A warning about experiments of a study."""

    experiments: list[str] = Field(default_factory=list)
    """Ids of the experiments that it concerns; empty if it concerns all."""

    def __str__(self) -> str:
        if not self.experiments:
            return self.text
        first, *more = self.experiments
        return f"{self.text} ({first} and {len(more)} more)" if more else f"{self.text} ({first})"


_Warning = TypeVar("_Warning", bound=QualityWarning)


def worst(warnings: Sequence[_Warning], count: int) -> list[_Warning]:
    """Return the worst *count* of *warnings*, in their order.

    A second warning with the same code is returned only after one of each code: forty experiments that were
    throttled for different times must not hide a warm-up that did not converge.
    """
    seen: Counter[str] = Counter()
    ranks = []
    for place, warning in enumerate(warnings):
        kind = warning.text if warning.code == "unclassified" else warning.code
        ranks.append((seen[kind], warning.rank, place))
        seen[kind] += 1
    return [warnings[place] for place in sorted(place for _, _, place in sorted(ranks)[:count])]
