"""Short labels of points on the page, made of the axes that vary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pytest_llem.reporting.html.formatting import neutral
from pytest_llem.reporting.text import short_texts
from pytest_llem.results.loads import has_loads, load_of, varying_axes
from pytest_llem.results.points import PointResult
from pytest_llem.study.identity import value_text

#: How many values of an axis can have a colour each (numbers, along a scale; other values), or a panel each.
MAX_NUMBERS, MAX_COLORS, MAX_PANELS = 24, 8, 12

#: Characters of a mark's label in a plot.
_MAX_MARK = 24


@dataclass(frozen=True)
class Axis:
    """An axis that varies between points.

    Attributes:
        key: Its dotted key.
        name: Its short name.
        texts: Short texts of its values, which differ from each other, by the whole texts. Numbers are sorted,
            others in the study's order.
        is_number: Whether all its values are numbers.
    """

    key: str
    name: str
    texts: dict[str, str]
    is_number: bool

    @property
    def has_colors(self) -> bool:
        """Whether each value can have a colour."""
        return 1 < len(self.texts) <= (MAX_NUMBERS if self.is_number else MAX_COLORS)

    def text(self, point: PointResult) -> str | None:
        """Return the short text of a point's value; None if the point does not have the axis."""
        return self.texts[axis_text(point.axes[self.key])] if self.key in point.axes else None


def axes_of(points: Sequence[PointResult]) -> list[Axis]:
    """Return the axes that vary between *points*."""
    found = []
    for key, name in varying_axes(points).items():
        values = {axis_text(point.axes[key]): point.axes[key] for point in points if key in point.axes}
        is_number = all(isinstance(one, int | float) and not isinstance(one, bool) for one in values.values())
        texts = sorted(values, key=lambda text: values[text]) if is_number else list(values)
        found.append(Axis(key, name, short_texts(texts), is_number))
    return found


def axis_text(value: Any) -> str:
    """Return an axis value as the study has it. (Point ids escape unsafe characters instead.)"""
    return value if isinstance(value, str) else value_text(value)


def labels_of(points: Sequence[PointResult]) -> list[str]:
    """Return the labels of *points*: their numbers, and the values of the axes that vary."""
    axes = axes_of(points)
    return [
        f"#{number} "
        + (", ".join(f"{axis.name}={text}" for axis in axes if (text := axis.text(point)) is not None) or point.id)
        for number, point in enumerate(points, start=1)
    ]


def marks_of(points: Sequence[PointResult]) -> list[str]:
    """Return a short text beside each point's mark in a plot: its load on a server, its values, or its number."""
    title, ticks = ticks_of(points)
    loads = [load_of(point) for point in points] if has_loads(points) else []
    if loads and len({*loads}) == len(loads):
        return [f"#{n}" if load is None else f"{load:g}" for n, load in enumerate(loads, start=1)]
    is_short = title != "point" and max(map(len, ticks)) <= _MAX_MARK
    return ticks if is_short else [f"#{number}" for number in range(1, len(points) + 1)]


def ticks_of(points: Sequence[PointResult]) -> tuple[str, list[str]]:
    """Return the title of an axis of points, and a short text for each point."""
    axes = axes_of(points)
    texts = [[axis.text(point) for axis in axes] for point in points]
    if len(points) > 16 or any(None in one for one in texts) or not axes:
        return "point", [f"#{index + 1}" for index in range(len(points))]
    return " · ".join(axis.name for axis in axes), [" · ".join(filter(None, one)) for one in texts]


def axes_data(points: Sequence[PointResult]) -> list[dict[str, Any]]:
    """Return the axes by which the page's script can colour marks and make panels."""
    return [
        {
            "name": neutral(axis.name),
            "values": [neutral(text) for text in axis.texts.values()],
            "isNumber": axis.is_number,
            "of": [
                None if (text := axis.text(point)) is None else list(axis.texts.values()).index(text)
                for point in points
            ],
        }
        for axis in axes_of(points)
    ]
