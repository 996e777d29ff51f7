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


#: Every code, the worst first.
WARNINGS: dict[str, Kind] = {
    "requests_failed": Kind(
        "error", "Requests failed or returned no token; latencies and rates are of the others."
    ),
    "counter_disagrees": Kind(
        "error",
        "Energy counter and sampled power differ by more than 3 %; above 5 % the energy is invalid.",
    ),
    "impossibly_fast": Kind("error", "The engine reports more work than the device can do in that time."),
    "compiled": Kind("error", "Something was compiled within the window; no gate judges it."),
    "repeats_faster": Kind(
        "error",
        "Passes that repeat prompts are faster: the engine may answer from a cache; no gate judges it.",
    ),
    "traced": Kind(
        "error", "A tracer, profiler or coverage slowed Python down within the window; no gate judges it."
    ),
    "no_energy": Kind("error", "No meter could measure energy; the text says why."),
    "engine_not_covered": Kind("error", "The energy does not cover the device that the engine ran on."),
    "setting_adjusted": Kind(
        "warning", "A setting ran with another value than the study gives, or has no effect."
    ),
    "contended": Kind("warning", "Other processes used the CPUs or GPUs of the experiment within the window."),
    "code_edited": Kind("warning", "A module was edited while the study ran."),
    "cycles_differ": Kind("warning", "The cycles of a point differ in a testbed fact, such as the power limit."),
    "inputs_differ": Kind("warning", "A dataset or a model was edited while the study ran."),
    "throttled": Kind(
        "warning", "The GPU reduced its clocks within the window, for power, heat or another reason."
    ),
    "few_ticks": Kind(
        "warning", "The window holds fewer than 20 ticks of the energy counter; no gate judges its energy."
    ),
    "faster_than_roofline": Kind(
        "warning",
        "The window is shorter than the peaks of the device allow: the peaks or the counted work are wrong.",
    ),
    "idle_power_changed": Kind(
        "warning", "Idle power before and after the windows differs; active energy is uncertain."
    ),
    "warmup_not_converged": Kind("warning", "Warm-up reached its limit before latencies settled."),
    "drift": Kind("warning", "Passes took longer, or shorter, in the second half of the window."),
    "host_bound": Kind("warning", "The GPU waited for the CPU during most of the window."),
    "temperature": Kind("warning", "The temperature of a device changed within the window."),
    "gap_timeout": Kind("warning", "The GPU had not cooled down when the gap before the experiment ended."),
    "memory_not_released": Kind("warning", "GPU memory of the previous experiment was not released in time."),
    "outputs_differ": Kind("warning", "Passes with the same seed gave different output tokens."),
    "outputs_on_gpu": Kind("warning", "The engine keeps outputs on the GPU, which adds to peak memory."),
    "passes_not_recorded": Kind(
        "warning", "The window has too many passes to keep all outputs; latencies are of a sample of passes."
    ),
    "counter_unused": Kind(
        "warning", "The GPU has an energy counter that could not be used; its power was sampled."
    ),
    "counter_unchecked": Kind("warning", "The energy counter could not be compared with sampled power."),
    "tick_unknown": Kind("warning", "The period of the energy counter could not be determined."),
    "library_warning": Kind("warning", "A library warned while the experiment ran; the text is its own."),
    "unclassified": Kind("warning", "A warning of a result of schema 1.3 or older, which had no codes."),
    "memory_of_others": Kind("note", "Other processes hold memory of the GPU."),
    "meter_refused": Kind("note", "A meter that was tried is not available here."),
    "energy_estimated": Kind("note", "The energy is estimated by a model, not measured."),
    "prompts_cut": Kind("note", "Prompts were cut to max_input_tokens."),
    "random_weights": Kind("note", "The weights are random: speed is real, power depends on their values."),
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


_Kind = TypeVar("_Kind", bound=QualityWarning)


def worst(warnings: Sequence[_Kind], count: int) -> list[_Kind]:
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
