"""Select the points that the ``where`` of a rule or budget matches."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from pydantic import BaseModel

from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Point
from pytest_llem.study.document import Document, KeyPath, dotted
from pytest_llem.study.identity import same_value, short_names
from pytest_llem.study.problems import Problem, did_you_mean
from pytest_llem.study.section import flatten


class PointSelector:
    """Select points of a study by their axes and fields.

    Args:
        document: The study file.
        points: All points of the study.
    """

    def __init__(self, document: Document, points: Sequence[Point]) -> None:
        self._document = document
        self._points = points
        axes = list(dict.fromkeys(axis for point in points for axis in point.axes))
        self._full = {short: axis for axis, short in short_names(axes).items()} | {axis: axis for axis in axes}

    def find(self, at: KeyPath, where: Mapping[str, Any]) -> tuple[list[int], list[Problem]]:
        """Return the indices of the points that match *where*, and problems with it.

        Args:
            at: Position of *where* in the file.
            where: Value by axis or field, or a list of alternative values; all entries have to match.
        """
        flat = dict(flatten(where))  # fields of a section may be dotted or nested
        if unknown := [name for name in flat if name not in self._full and not _is_field(name)]:
            return [], [self._unknown(at, name, where) for name in unknown]
        wanted = {self._full.get(name, name): value for name, value in flat.items()}
        return [index for index, point in enumerate(self._points) if _matches(point, wanted)], []

    def _unknown(self, at: KeyPath, name: str, where: Collection[str]) -> Problem:
        hint = did_you_mean(name, (*self._full, *ExperimentConfig.model_fields))
        place = name if name in where else name.partition(".")[0]
        problem = self._document.problem((*at, place), f"is neither an axis nor a field{hint}")
        return replace(problem, where=dotted((*at, name)))


def _is_field(name: str) -> bool:
    """Return whether *name* is the dotted path of a field that has a value and is not a section."""
    model: Any = ExperimentConfig
    for part in name.split("."):
        if not (isinstance(model, type) and issubclass(model, BaseModel)):
            return model is dict
        if part not in model.model_fields:
            return False
        annotation = model.model_fields[part].annotation
        kinds = [getattr(one, "__origin__", one) for one in (annotation, *get_args(annotation))]
        model = next((one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel | dict)), None)
    return model is None or name == "dataset"


def _matches(point: Point, wanted: Mapping[str, Any]) -> bool:
    for name, value in wanted.items():
        actual = point.axes[name] if name in point.axes else _value(point.config, name)
        either = [value, *(value if isinstance(value, list) else ())]
        if not any(same_value(actual, one) for one in either):
            return False
    return True


def _value(config: ExperimentConfig, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
    return value
