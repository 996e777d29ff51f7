"""Expand a study file's sweep and experiments into one draft configuration per point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pytest_llem.study.document import MAX_DEPTH, Document, KeyPath
from pytest_llem.study.engines import DEFAULT_BACKEND
from pytest_llem.study.identity import value_text
from pytest_llem.study.problems import Problem, shown
from pytest_llem.study.section import flatten
from pytest_llem.study.server import SERVER

#: Keys of the study that are not fields of an experiment. ``version`` is accepted and ignored.
STUDY_KEYS = (
    *("name", "version", "base", "sweep", "experiments", "runners", "execution"),
    *("budgets", "gates", "skip", "xfail"),
)

#: Fields that become an axis if the study gives a list, slowest first.
LISTABLE = ("backend", "model")


#: Key path of a value in the configuration, and its position in the file.
Place = tuple[KeyPath, KeyPath]


@dataclass(frozen=True, slots=True)
class Draft:
    """A point before validation.

    Attributes:
        config: Unvalidated fields of an ExperimentConfig.
        axes: Value by dotted axis, for the axes in which points differ.
        places: Place of each value that is not shared by all points.
        at: Position in the file of the sweep, or of the entry of ``experiments``; empty without either.
    """

    config: dict[str, Any]
    axes: dict[str, Any]
    places: Sequence[Place]
    at: KeyPath


@dataclass(frozen=True)
class _Axis:
    """One axis of the sweep.

    Attributes:
        name: Dotted name.
        values: Its values.
        at: Position of the axis in the file.
        backend: Engine to whose grid the axis belongs; None for all engines.
        indexed: Whether the file gives a list of values, not a single one.
    """

    name: str
    values: Sequence[Any]
    at: KeyPath
    backend: str | None = None
    indexed: bool = True

    def position_of(self, index: int) -> KeyPath:
        """Return the position in the file of the value at *index*."""
        return (*self.at, index) if self.indexed else self.at

    @cached_property
    def path(self) -> tuple[str, ...]:
        """Key path of the axis in a configuration. An engine's name is one part even if it contains dots."""
        if self.backend is None:
            return tuple(self.name.split("."))
        _, *inner = self.name[len(self.backend) :].split(".")
        return (self.backend, *inner)


#: An axis, one of its values, and the value's place.
_Choice = tuple[_Axis, Any, Place]


@dataclass(frozen=True)
class Grid:
    """The points of a study: its sweep in file order (last axis fastest), then its explicit experiments.

    Each engine has a grid of its own: the product of the universal axes and the axes scoped to the engine.

    Attributes:
        document: The study file.
        shared: Its top-level experiment fields, including those of its base.
        backends: Names of engines.
        axes: Axes of the sweep.
        entries: The explicit experiments, by their index in ``experiments``.
        at: Position of the sweep; empty if there is none.
        problems: Problems with the structure of sweep and experiments. Parts with problems are left out of the
            points, so that the rest can be checked.
    """

    document: Document
    shared: Mapping[str, Any]
    backends: Sequence[str]
    axes: Sequence[_Axis]
    entries: Mapping[int, Mapping[str, Any]]
    at: KeyPath
    problems: Sequence[Problem]

    @property
    def size(self) -> int:
        """Number of points, computed without making them."""
        total = len(self.entries)
        if self._has_swept_points:
            sizes = [(axis.backend, len(axis.values)) for axis in self.axes if axis.name != "backend"]
            universal = math.prod(size for backend, size in sizes if backend is None)
            total += universal * sum(
                math.prod(size for backend, size in sizes if backend == name) for name in self._swept_backends
            )
        return total

    @property
    def _has_swept_points(self) -> bool:
        data = self.document.data
        return bool(self._swept_backends) and ("sweep" in data or "experiments" not in data)

    @cached_property
    def _swept_backends(self) -> list[str]:
        """The engines of the sweep."""
        return _backends_of(self.axes, self.shared)

    @cached_property
    def _shared_by(self) -> dict[str, dict[str, Any]]:
        """The shared fields by engine, each without the sections of the other engines."""
        used = {*(self._swept_backends if self._has_swept_points else ())}
        used |= {_backend({**self.shared, **entry}) for entry in self.entries.values()}
        sections = used & {*self.backends}
        fields = {
            key: value for key, value in self.shared.items() if key not in LISTABLE or not isinstance(value, list)
        }
        return {
            backend: {key: value for key, value in fields.items() if key == backend or key not in sections}
            for backend in used
        }

    def drafts(self) -> Iterator[Draft]:
        """Yield the points."""
        if self._has_swept_points:
            yield from self._swept_drafts()
        yield from self._explicit_drafts()

    def _swept_drafts(self) -> Iterator[Draft]:
        universal = _choices(axis for axis in self.axes if axis.backend is None)
        backends, shared_by = self._swept_backends, self._shared_by
        own = {name: _choices(axis for axis in self.axes if axis.backend == name) for name in backends}
        # Points with the same values in a section get the same section, which is then validated once.
        sections: dict[tuple[Any, ...], dict[str, Any]] = {}
        for head in itertools.product(*universal):
            backend = next((str(value) for axis, value, _ in head if axis.name == "backend"), backends[0])
            for tail in itertools.product(*own[backend]):
                config = dict(shared_by[backend])
                axes: dict[str, Any] = {}
                nested: dict[str, list[_Choice]] = {}
                for choice in (chosen := (*head, *tail)):
                    axis, value, _ = choice
                    if axis.name != "backend" or len(backends) > 1:  # the only backend is not an axis
                        axes |= _label(axis.name, value)
                    if len(axis.path) == 1:
                        config[axis.path[0]] = value
                    else:
                        nested.setdefault(axis.path[0], []).append(choice)
                for name, choices in nested.items():
                    key = (backend, name, *map(id, choices))
                    if key not in sections:
                        sections[key] = _section(config.get(name), choices)
                    config[name] = sections[key]
                yield Draft(config, axes, [place for _, _, place in chosen], self.at)

    def _explicit_drafts(self) -> Iterator[Draft]:
        flat = {index: dict(_labels(entry)) for index, entry in self.entries.items()}
        common: set[str] = set()
        # Fields with the same value in every point do not distinguish points.
        if not self._has_swept_points and flat:
            first, *others = flat.values()
            common = {name for name in first if all(name in one and one[name] == first[name] for one in others)}
        for index, entry in self.entries.items():
            at: KeyPath = ("experiments", index)
            yield Draft(
                {**self._shared_by[_backend({**self.shared, **entry})], **entry},
                {name: value for name, value in flat[index].items() if name not in common},
                [((key,), (*at, key)) for key in entry],
                at,
            )


def read_grid(document: Document, shared: Mapping[str, Any], backends: Sequence[str]) -> Grid:
    """Return the points of a study file.

    Args:
        document: The study file.
        shared: Its top-level experiment fields.
        backends: Names of engines. An axis that begins with one, such as ``pytorch.batch_size``, is scoped to it.
    """
    swept, listed = "sweep" in document.data, "experiments" in document.data
    axes, problems = _read_axes(document, shared, backends) if swept or not listed else ([], [])
    entries, wrong = _read_entries(document, shared) if listed else ({}, [])
    return Grid(document, shared, backends, axes, entries, ("sweep",) if swept else (), [*problems, *wrong])


def _backend(config: Mapping[str, Any]) -> str:
    return str(config.get("backend", DEFAULT_BACKEND))


def _backends_of(axes: Sequence[_Axis], shared: Mapping[str, Any]) -> list[str]:
    """Return the engines of a sweep: those of its axis, or the study's only one."""
    given = next((axis.values for axis in axes if axis.name == "backend"), None)
    if given is not None:
        return [str(name) for name in given]
    return [] if isinstance(shared.get("backend"), list) else [_backend(shared)]


def _read_axes(
    document: Document, shared: Mapping[str, Any], backends: Sequence[str]
) -> tuple[list[_Axis], list[Problem]]:
    problems: list[Problem] = []
    sweep = document.data.get("sweep", {})
    if not isinstance(sweep, dict) or ("sweep" in document.data and not sweep):
        given = document.given(("sweep",), sweep)
        problems.append(document.problem(("sweep",), f"must be a mapping with at least one axis {given}"))
        sweep = {}
    axes = [_Axis(name, shared[name], (name,)) for name in LISTABLE if isinstance(shared.get(name), list)]
    problems += [document.problem(axis.at, "an axis needs at least one value") for axis in axes if not axis.values]
    for name, given in sweep.items():
        values = given if isinstance(given, list) else [given]
        if inner := _nested_axis(given):
            message = f"an axis in a section is written with dots: {name}.{inner}: [...]"
            problems.append(document.problem(("sweep", name), message))
            continue
        backend = max((one for one in backends if f"{name}.".startswith(f"{one}.")), key=len, default=None)
        axis = _Axis(name, values, ("sweep", name), backend, indexed=isinstance(given, list))
        if why := _axis_problem(axis, shared, sweep):
            problems.append(document.problem(axis.at, why))
        else:
            axes.append(axis)
    axes = [axis for axis in axes if axis.values]
    for axis in axes:
        problems += [
            document.problem(axis.position_of(index), "is given twice") for index in _repeated(axis.values)
        ]

    scopes = list(dict.fromkeys(axis.backend for axis in axes if axis.backend))
    if scopes and "backend" not in {**shared, **sweep}:
        axes.insert(0, _Axis("backend", scopes, ("sweep",), indexed=False))
    named = _backends_of(axes, shared)
    for axis in axes:
        # One of the two is a mistake, but which one is unknown, so neither is ignored.
        if axis.backend and axis.backend not in named:
            message = f"is an axis of {axis.backend!r}, but the backend is {' or '.join(map(shown, named))}"
            problems.append(document.problem(axis.at, message))
    return axes, problems


def _nested_axis(section: Any) -> str | None:
    """Return the dotted name of the first list in *section*, which was probably meant as an axis."""
    inside = flatten(section) if isinstance(section, dict) else ()
    return next((name for name, value in inside if isinstance(value, list)), None)


def _repeated(values: Sequence[Any]) -> Iterator[int]:
    """Yield the indices of values that occur earlier in the list."""
    seen = set()
    for index, value in enumerate(values):
        text = value_text([value])  # in a list, so that null and "null" differ
        if text in seen:
            yield index
        seen.add(text)


def _axis_problem(axis: _Axis, shared: Mapping[str, Any], sweep: Mapping[str, Any]) -> str | None:
    """Return an error message if an entry of the sweep is not a valid axis, else None."""
    if not axis.values:
        return "an axis needs at least one value"
    if axis.name in LISTABLE and isinstance(shared.get(axis.name), list):
        return "is given as a list and swept too"
    if "" in axis.path:
        return "a part of its name is empty"
    *outer, _ = axis.path
    if len(outer) >= MAX_DEPTH:
        return "nested too deeply"
    inner: Any = shared
    for depth, part in enumerate(outer, start=1):
        section = ".".join(outer[:depth])
        if section in sweep:
            return f"is part of {section!r}, which is an axis too"
        inner = inner.get(part) if isinstance(inner, Mapping) else None
        if inner is not None and not isinstance(inner, Mapping):
            return f"{section!r} is not a mapping (it is given as {shown(inner)})"
    return None


def _choices(axes: Iterable[_Axis]) -> list[list[_Choice]]:
    """Return the choices of each of *axes*."""
    return [
        [(axis, value, (axis.path, axis.position_of(index))) for index, value in enumerate(axis.values)]
        for axis in axes
    ]


def _section(shared: Any, choices: Sequence[_Choice]) -> dict[str, Any]:
    """Return a copy of the section *shared* with the chosen values; *shared* is not modified."""
    section = dict(shared) if isinstance(shared, Mapping) else {}
    copied: set[KeyPath] = set()
    for axis, value, _ in choices:
        inner = section
        _, *outer, last = axis.path
        for depth, part in enumerate(outer, start=1):
            at = tuple(outer[:depth])
            if at not in copied:
                inner[part] = dict(inner[part]) if isinstance(inner.get(part), Mapping) else {}
                copied.add(at)
            inner = inner[part]
        inner[last] = value
    return section


def _read_entries(
    document: Document, shared: Mapping[str, Any]
) -> tuple[dict[int, dict[str, Any]], list[Problem]]:
    """Return the explicit experiments by their index in ``experiments``, and problems."""
    given = document.data["experiments"]
    if not isinstance(given, list) or not given:
        message = f"must be a list with at least one experiment {document.given(('experiments',), given)}"
        return {}, [document.problem(("experiments",), message)]
    entries: dict[int, dict[str, Any]] = {}
    problems: list[Problem] = []
    for index, entry in enumerate(given):
        at: KeyPath = ("experiments", index)
        if not isinstance(entry, dict):
            problems.append(document.problem(at, f"must be a mapping {document.given(at, entry)}"))
            continue
        missing = [name for name in LISTABLE if isinstance(shared.get(name), list) and name not in entry]
        problems += [document.problem(at, f"needs its own {name}: the study's is a list") for name in missing]
        if not missing:
            entries[index] = {key: one for key, one in entry.items() if key != "budgets"}
    return entries, problems


def _label(axis: str, value: Any) -> dict[str, Any]:
    """Return an axis with its value. If that is a server with a name, the name stands for all its fields."""
    is_named = axis == SERVER and isinstance(value, Mapping) and "name" in value
    return {axis: value["name"] if is_named else value}


def _labels(entry: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the fields in which an explicit experiment may differ from others."""
    for key, value in entry.items():
        yield from flatten(_label(key, value))
