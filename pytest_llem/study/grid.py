"""From the keys of a study file to one draft configuration per point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pytest_llem.study.document import MAX_DEPTH, Document, KeyPath
from pytest_llem.study.engines import DEFAULT_BACKEND
from pytest_llem.study.identity import value_text
from pytest_llem.study.problems import Problem, shown

#: Keys that belong to the study as a whole and not to an experiment. ``version`` is accepted and ignored.
STUDY_KEYS = (
    *("name", "version", "base", "sweep", "experiments", "runners", "execution"),
    *("budgets", "gates", "skip", "xfail"),
)

#: Fields that are an axis where the study gives a list, slowest first.
LIST_AXES = ("backend", "model")


#: Where a value goes in a configuration, and where it stands in the file.
Place = tuple[KeyPath, KeyPath]


@dataclass(frozen=True, slots=True)
class Draft:
    """A point before validation.

    Attributes:
        config: The keys of an ExperimentConfig.
        axes: What distinguishes it from its siblings: value by dotted key.
        places: Of each value that is not shared.
        at: Where in the file the point stands; empty where it is all that the file holds.
    """

    config: dict[str, Any]
    axes: dict[str, Any]
    places: Sequence[Place]
    at: KeyPath


@dataclass(frozen=True)
class _Axis:
    """One line of the sweep; ``backend`` is set where it belongs to one engine's grid only."""

    name: str
    values: Sequence[Any]
    at: KeyPath
    backend: str | None = None
    indexed: bool = True

    def origin(self, index: int) -> KeyPath:
        return (*self.at, index) if self.indexed else self.at

    @cached_property
    def path(self) -> tuple[str, ...]:
        """Where its values go in a configuration. The name of an engine is one part, dots or not."""
        if self.backend is None:
            return tuple(self.name.split("."))
        _, *inner = self.name[len(self.backend) :].split(".")
        return (self.backend, *inner)


#: One value of an axis, and its place.
_Choice = tuple[_Axis, Any, Place]


@dataclass(frozen=True)
class Grid:
    """The points of a study: its sweep in file order (last axis fastest), and after it the explicit experiments.

    Backend-scoped axes give independent grids: each engine is crossed with the universal axes and its own.

    Attributes:
        document: The study file.
        shared: Its top-level experiment fields, those of its base included.
        backends: Names of engines.
        axes: Of the sweep.
        entries: The explicit experiments, by their place in the list.
        at: Where the sweep stands; empty where the file holds one experiment.
        problems: What is wrong with the shape of sweep and experiments. It is left out of the points, so that
            the rest can be looked at all the same.
    """

    document: Document
    shared: Mapping[str, Any]
    backends: Sequence[str]
    axes: Sequence[_Axis]
    entries: Mapping[int, Mapping[str, Any]]
    at: KeyPath
    problems: list[Problem] = field(default_factory=list)

    @property
    def size(self) -> int:
        """How many points there are, before any is made."""
        total = len(self.entries)
        if self._swept:
            sizes = [(axis.backend, len(axis.values)) for axis in self.axes if axis.name != "backend"]
            universal = math.prod(size for backend, size in sizes if backend is None)
            total += universal * sum(
                math.prod(size for backend, size in sizes if backend == name) for name in self._named
            )
        return total

    @property
    def _swept(self) -> bool:
        data = self.document.data
        return bool(self._named) and ("sweep" in data or "experiments" not in data)

    @cached_property
    def _named(self) -> list[str]:
        """The engines of the sweep."""
        return _named(self.axes, self.shared)

    @cached_property
    def _shared_by(self) -> dict[str, dict[str, Any]]:
        """The shared fields by engine: the section of an engine is shared by its own points alone."""
        used = {*(self._named if self._swept else ())}
        used |= {_backend({**self.shared, **entry}) for entry in self.entries.values()}
        sections = used & {*self.backends}
        fields = {
            key: value for key, value in self.shared.items() if key not in LIST_AXES or not isinstance(value, list)
        }
        return {
            backend: {key: value for key, value in fields.items() if key == backend or key not in sections}
            for backend in used
        }

    def drafts(self) -> Iterator[Draft]:
        """Yield the points."""
        if self._swept:
            yield from self._gridded()
        yield from self._explicit()

    def _gridded(self) -> Iterator[Draft]:
        universal = _choices(axis for axis in self.axes if axis.backend is None)
        own = {name: _choices(axis for axis in self.axes if axis.backend == name) for name in self._named}
        several, shared_by = len(self._named) > 1, self._shared_by
        # Points with the same values in a section get the same section, which is then validated once.
        sections: dict[tuple[Any, ...], dict[str, Any]] = {}
        for head in itertools.product(*universal):
            backend = next((str(value) for axis, value, _ in head if axis.name == "backend"), self._named[0])
            for tail in itertools.product(*own[backend]):
                config = dict(shared_by[backend])
                axes: dict[str, Any] = {}
                nested: dict[str, list[_Choice]] = {}
                for choice in (chosen := (*head, *tail)):
                    axis, value, _ = choice
                    if several or axis.name != "backend":  # a lone engine named by its axes is no axis
                        axes[axis.name] = value
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

    def _explicit(self) -> Iterator[Draft]:
        flat = {index: dict(flatten(entry)) for index, entry in self.entries.items()}
        alike: set[str] = set()
        if not self._swept and flat:  # fields that every point has alike tell nothing apart
            first, *others = flat.values()
            alike = {name for name in first if all(name in one and one[name] == first[name] for one in others)}
        for index, entry in self.entries.items():
            at: KeyPath = ("experiments", index)
            yield Draft(
                {**self._shared_by[_backend({**self.shared, **entry})], **entry},
                {name: value for name, value in flat[index].items() if name not in alike},
                [((key,), (*at, key)) for key in entry],
                at,
            )


def read_grid(document: Document, shared: Mapping[str, Any], backends: Sequence[str]) -> Grid:
    """Return the points of a study file.

    Args:
        document: The study file.
        shared: Its top-level experiment fields.
        backends: Names of engines, which make an axis such as ``pytorch.batch_size`` scoped.
    """
    swept, listed = "sweep" in document.data, "experiments" in document.data
    axes, problems = _read_axes(document, shared, backends) if swept or not listed else ([], [])
    entries, wrong = _read_entries(document, shared) if listed else ({}, [])
    return Grid(document, shared, backends, axes, entries, ("sweep",) if swept else (), [*problems, *wrong])


def _backend(config: Mapping[str, Any]) -> str:
    return str(config.get("backend", DEFAULT_BACKEND))


def _named(axes: Sequence[_Axis], shared: Mapping[str, Any]) -> list[str]:
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
    axes = [_Axis(name, shared[name], (name,)) for name in LIST_AXES if isinstance(shared.get(name), list)]
    problems += [document.problem(axis.at, "an axis needs at least one value") for axis in axes if not axis.values]
    for name, given in sweep.items():
        values = given if isinstance(given, list) else [given]
        if inner := _nested_axis(given):
            told = f"an axis in a section is written with dots: {name}.{inner}: [...]"
            problems.append(document.problem(("sweep", name), told))
            continue
        backend = max((one for one in backends if f"{name}.".startswith(f"{one}.")), key=len, default=None)
        axis = _Axis(name, values, ("sweep", name), backend, indexed=isinstance(given, list))
        if fault := _axis_fault(axis, shared, sweep):
            problems.append(document.problem(axis.at, fault))
        else:
            axes.append(axis)
    axes = [axis for axis in axes if axis.values]
    for axis in axes:
        problems += [document.problem(axis.origin(index), "is there twice") for index in _repeated(axis.values)]

    scopes = list(dict.fromkeys(axis.backend for axis in axes if axis.backend))
    if scopes and "backend" not in {**shared, **sweep}:
        axes.insert(0, _Axis("backend", scopes, ("sweep",), indexed=False))
    named = _named(axes, shared)
    for axis in axes:
        # One of the two is a slip, and guessing which would hide it.
        if axis.backend and axis.backend not in named:
            fault = f"is an axis of {axis.backend!r}, but the backend is {' or '.join(map(shown, named))}"
            problems.append(document.problem(axis.at, fault))
    return axes, problems


def _nested_axis(section: Any) -> str | None:
    """Return the dotted name of the first list in *section*, which was meant to be an axis."""
    inside = flatten(section) if isinstance(section, dict) else ()
    return next((name for name, value in inside if isinstance(value, list)), None)


def _repeated(values: Sequence[Any]) -> Iterator[int]:
    """Yield the places of values that were there before."""
    seen = set()
    for index, value in enumerate(values):
        text = value_text([value])  # in a list, so that null is not "null"
        if text in seen:
            yield index
        seen.add(text)


def _axis_fault(axis: _Axis, shared: Mapping[str, Any], sweep: Mapping[str, Any]) -> str | None:
    """Return what keeps one line of the sweep from being an axis."""
    if not axis.values:
        return "an axis needs at least one value"
    if axis.name in LIST_AXES and isinstance(shared.get(axis.name), list):
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
            return f"{section!r} is no section (it is given as {shown(inner)})"
    return None


def _choices(axes: Iterable[_Axis]) -> list[list[_Choice]]:
    """Return the choices that each of *axes* gives."""
    return [
        [(axis, value, (axis.path, axis.origin(index))) for index, value in enumerate(axis.values)]
        for axis in axes
    ]


def _section(shared: Any, choices: Sequence[_Choice]) -> dict[str, Any]:
    """Return a section with the values chosen; what it has in common with others is left as it is."""
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
    """Return the explicit experiments by their place in the list."""
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
        lacking = [name for name in LIST_AXES if isinstance(shared.get(name), list) and name not in entry]
        problems += [document.problem(at, f"needs a {name} of its own: the study's is a list") for name in lacking]
        if not lacking:
            entries[index] = {key: one for key, one in entry.items() if key != "budgets"}
    return entries, problems


def flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values in *section*, however deep, each with its dotted name."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
