"""What a reader of figures has to know beside them, and how bad each kind of it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeVar

from pydantic import Field

from pytest_llem.results.document import Record

#: ``error``: a figure is missing, or is not to be used; ``warning``: it may be off; ``note``: what it stands for.
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
    """A warning about the figures of an experiment.

    Attributes:
        code: Its kind, one of :data:`SEVERITIES`; ``unclassified`` in results before schema 1.4, which held
            sentences.
        severity: How bad it is.
        text: What a person reads.

    Example:
        >>> QualityWarning.of("drift", "drift: passes took 10% longer in the second half of the window").severity
        'warning'
    """

    code: str
    severity: Severity
    text: str

    @classmethod
    def of(cls, code: str, text: str) -> QualityWarning:
        return cls(code=code, severity=SEVERITIES[code], text=text)

    @property
    def rank(self) -> int:
        """Its place among others: 0 is the worst."""
        return _RANKS.get(self.code, _RANKS["unclassified"])

    def __str__(self) -> str:
        return self.text


class StudyWarning(QualityWarning):
    """A warning about experiments of a study.

    Attributes:
        experiments: The ids of those that it concerns; empty where it concerns all.
    """

    experiments: list[str] = Field(default_factory=list)

    def __str__(self) -> str:
        if not self.experiments:
            return self.text
        first, *more = self.experiments
        return f"{self.text} ({first} and {len(more)} more)" if more else f"{self.text} ({first})"


_Kind = TypeVar("_Kind", bound=QualityWarning)


def worst(warnings: Sequence[_Kind], most: int) -> list[_Kind]:
    """Return *most* of *warnings*, in their order: the worst, and a second one of a code only where there are no
    more codes. Forty experiments that were each throttled for another time must not hide a warm-up that did not
    settle.
    """
    seen: Counter[str] = Counter()
    ranks = []
    for place, warning in enumerate(warnings):
        alike = warning.text if warning.code == "unclassified" else warning.code
        ranks.append((seen[alike], warning.rank, place))
        seen[alike] += 1
    return [warnings[place] for place in sorted(place for _, _, place in sorted(ranks)[:most])]
