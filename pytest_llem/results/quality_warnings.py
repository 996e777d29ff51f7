"""Warnings about the quality of results, and their severities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeVar

from pydantic import Field

from pytest_llem.results.document import Record

#: ``error``: a value is missing or must not be used; ``warning``: a value may be wrong; ``note``: background.
Severity = Literal["error", "warning", "note"]

#: The severity of each code, the worst first.
SEVERITIES: dict[str, Severity] = {
    "requests_failed": "error",
    "counter_disagrees": "error",
    "impossibly_fast": "error",
    "compiled": "error",
    "repeats_faster": "error",
    "traced": "error",
    "no_energy": "error",
    "engine_not_covered": "error",
    "setting_adjusted": "warning",
    "contended": "warning",
    "code_edited": "warning",
    "cycles_differ": "warning",
    "inputs_differ": "warning",
    "throttled": "warning",
    "few_ticks": "warning",
    "faster_than_roofline": "warning",
    "idle_power_changed": "warning",
    "warmup_not_converged": "warning",
    "drift": "warning",
    "host_bound": "warning",
    "temperature": "warning",
    "gap_timeout": "warning",
    "memory_not_released": "warning",
    "outputs_differ": "warning",
    "outputs_on_gpu": "warning",
    "passes_not_recorded": "warning",
    "counter_unused": "warning",
    "counter_unchecked": "warning",
    "tick_unknown": "warning",
    "library_warning": "warning",
    "unclassified": "warning",
    "memory_of_others": "note",
    "meter_refused": "note",
    "energy_estimated": "note",
    "prompts_cut": "note",
    "random_weights": "note",
}
_RANKS = {code: rank for rank, code in enumerate(SEVERITIES)}


class QualityWarning(Record):
    """A warning about the result of an experiment.

    Example:
        >>> QualityWarning.of("drift", "drift: passes took 10% longer in the second half of the window").severity
        'warning'
    """

    code: str
    """Kind of warning, one of :data:`SEVERITIES`; ``unclassified`` in results of schema 1.3 and older, which held
    only the text.
    """
    severity: Severity
    """Severity of the code."""
    text: str
    """Text for the user."""

    @classmethod
    def of(cls, code: str, text: str) -> QualityWarning:
        """Return a warning with the severity of *code*."""
        return cls(code=code, severity=SEVERITIES[code], text=text)

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
