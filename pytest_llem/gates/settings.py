"""Check the settings of gates in a saved result, which another version may have written, or somebody edited."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.document import dotted
from pytest_llem.study.gates import GatesConfig, metric_problem
from pytest_llem.study.problems import error_sentence
from pytest_llem.study.section_errors import error_details


def gates_of(result: StudyResult, name: object, given: Mapping[str, Any] | None = None) -> GatesConfig:
    """Return the settings of gates of a result's study.

    Args:
        result: The result.
        name: Name of the result in messages.
        given: Settings by options of a command, in place of those of the study; None if the command has no such
            options.

    Raises:
        ValueError: A setting is out of range, or another version wrote one that this version does not have.
    """
    found = {**(result.measurement_protocol.get("gates") or {}), **(given or {})}
    try:
        settings = GatesConfig.model_validate(found)
    except ValidationError as error:
        location, detail = next(error_details(error))
        where = f"--{location[0]}" if location[0] in (given or {}) else f"{name}: gates.{dotted(location)}"
        raise ValueError(f"{where}: {error_sentence(detail)} (got {detail['input']!r})") from error
    for metric in settings.metrics or ():
        if message := metric_problem(metric):
            hint = "" if given is None else ": give --metric"
            raise ValueError(f"{name}: gates.metrics: {message} (got {metric!r}){hint}")
    return settings
