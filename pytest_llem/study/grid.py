"""From the keys of a study file to one draft configuration per point."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_llem.study.document import Document, KeyPath
from pytest_llem.study.problems import Problem, StudyError

DEFAULT_BACKEND = "pytorch"

#: Keys that belong to the study as a whole and not to an experiment. ``version`` is accepted and ignored.
STUDY_KEYS = ("name", "version", "sweep", "experiments", "execution")


@dataclass(frozen=True)
class Draft:
    """A point before validation.

    Attributes:
        config: The keys of an ExperimentConfig.
        axes: What distinguishes it from its siblings: value by dotted key.
        origins: Where in the file each axis value stands.
    """

    config: dict[str, Any]
    axes: dict[str, Any]
    origins: dict[str, KeyPath]


@dataclass(frozen=True)
class _Axis:
    """One line of the sweep; ``backend`` is set where it belongs to one engine's grid only."""

    name: str
    values: Sequence[Any]
    at: KeyPath
    backend: str | None = None
    indexed: bool = field(default=True)

    def origin(self, index: int) -> KeyPath:
        return (*self.at, index) if self.indexed else self.at


def expand_grid(document: Document, shared: Mapping[str, Any], backends: Sequence[str]) -> Iterator[Draft]:
    """Yield the sweep's points in file order (last axis fastest), then the explicit experiments.

    Backend-scoped axes give independent grids: each engine is crossed with the universal axes and its own.

    Args:
        document: The study file.
        shared: Its top-level experiment fields.
        backends: Names of the installed engines, which make an axis such as ``pytorch.batch_size`` scoped.

    Raises:
        StudyError: A sweep or an experiments list of the wrong shape.
    """
    data = document.data
    if "sweep" in data or "experiments" not in data:
        yield from _sweep(_read_axes(document, shared, backends), shared, backends)
    if "experiments" in data:
        yield from _explicit(document, shared, swept="sweep" in data)


def _read_axes(document: Document, shared: Mapping[str, Any], backends: Sequence[str]) -> list[_Axis]:
    sweep = document.data.get("sweep", {})
    if not isinstance(sweep, dict) or ("sweep" in document.data and not sweep):
        raise StudyError([document.problem(("sweep",), f"must be a mapping of axes (got {sweep!r})")])
    axes: list[_Axis] = []
    problems: list[Problem] = []
    for name in ("backend", "model"):
        if isinstance(shared.get(name), list):
            axes.append(_Axis(name, shared[name], (name,)))
    for name, given in sweep.items():
        scope = name.partition(".")[0]
        values = given if isinstance(given, list) else [given]
        axes.append(
            _Axis(
                name,
                values,
                ("sweep", name),
                backend=scope if "." in name and scope in backends else None,
                indexed=isinstance(given, list),
            )
        )
    for axis in axes:
        if not axis.values:
            problems.append(document.problem(axis.at, "an axis needs at least one value"))
    for name in ("backend", "model"):
        if sum(axis.name == name for axis in axes) > 1:
            problems.append(document.problem(("sweep", name), "is given as a list and swept too"))
    if problems:
        raise StudyError(problems)

    scopes = list(dict.fromkeys(axis.backend for axis in axes if axis.backend))
    if "backend" not in shared and scopes and not any(axis.name == "backend" for axis in axes):
        axes.insert(0, _Axis("backend", scopes, ("sweep",), indexed=False))
    return axes


def _sweep(axes: Sequence[_Axis], shared: Mapping[str, Any], backends: Sequence[str]) -> Iterator[Draft]:
    universal = [axis for axis in axes if axis.backend is None]
    lone = shared.get("backend", DEFAULT_BACKEND)
    named = [str(name) for axis in universal if axis.name == "backend" for name in axis.values] or [str(lone)]
    lone_backend = len(named) == 1
    for head in _combinations(universal):
        backend = str(head["backend"][0]) if "backend" in head else named[0]
        # An engine's own section is shared by its own points alone.
        foreign = {*named} & {*backends} - {backend}
        start = {key: value for key, value in shared.items() if key not in foreign}
        own = [axis for axis in axes if axis.backend is not None and (axis.backend == backend or lone_backend)]
        for tail in _combinations(own):
            chosen = head | tail
            config = start
            for name, (value, _) in chosen.items():
                config = _with(config, name.split("."), value)
            yield Draft(
                config,
                # A lone engine named by its axes is no axis.
                {name: value for name, (value, _) in chosen.items() if name != "backend" or not lone_backend},
                {name: origin for name, (_, origin) in chosen.items()},
            )


def _combinations(axes: Sequence[_Axis]) -> Iterator[dict[str, tuple[Any, KeyPath]]]:
    choices = ([(axis, index) for index in range(len(axis.values))] for axis in axes)
    for combination in itertools.product(*choices):
        yield {axis.name: (axis.values[index], axis.origin(index)) for axis, index in combination}


def _with(config: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """Return *config* with *value* at *path*, sharing nothing that is changed."""
    head, *rest = path
    if not rest:
        return {**config, head: value}
    inner = config.get(head)
    return {**config, head: _with(inner if isinstance(inner, Mapping) else {}, rest, value)}


def _explicit(document: Document, shared: Mapping[str, Any], *, swept: bool) -> list[Draft]:
    entries = document.data["experiments"]
    if not isinstance(entries, list) or not entries:
        raise StudyError([document.problem(("experiments",), "must be a list of experiments with at least one")])
    wrong = [
        document.problem(("experiments", index), f"must be a mapping (got {entry!r})")
        for index, entry in enumerate(entries)
        if not isinstance(entry, dict)
    ]
    if wrong:
        raise StudyError(wrong)
    flat = [dict(_flatten(entry)) for entry in entries]
    return [
        Draft(
            {**shared, **entry},
            {
                name: value
                for name, value in fields.items()
                if swept or any(name not in other or other[name] != value for other in flat)
            },
            {name: ("experiments", index, *name.split(".")) for name in fields},
        )
        for index, (entry, fields) in enumerate(zip(entries, flat, strict=True))
    ]


def _flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
