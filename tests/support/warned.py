"""Extract the texts of quality warnings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pytest_llem.results.quality_warnings import QualityWarning, StudyWarning


def texts(warnings: Iterable[QualityWarning | dict[str, Any]]) -> list[str]:
    """Return the text of each of *warnings*, given as objects or as JSON data."""
    return [one.text if isinstance(one, QualityWarning) else one["text"] for one in warnings]


def study_warning(text: str) -> StudyWarning:
    return StudyWarning(code="drift", severity="warning", text=text)
