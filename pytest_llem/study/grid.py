"""From the keys of a study file to one draft configuration per point."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pytest_llem.study.document import MAX_DEPTH, Document, KeyPath
from pytest_llem.study.problems import Problem, shown

DEFAULT_BACKEND = "pytorch"

#: Keys that belong to the study as a whole and not to an experiment. ``version`` is accepted and ignored.
STUDY_KEYS = ("name", "version", "sweep", "experiments", "execution")

#: Fields that are an axis where the study gives a list, slowest first.
LIST_AXES = ("backend", "model")


@dataclass(frozen=True)
class Draft:
    """A point before validation.

    Attributes:
        config: The keys of an ExperimentConfig.
        axes: What distinguishes it from its siblings: value by dotted key.
        origins: Where in the file the values stand that are not shared, by their place in ``config``.
        at: Where in the file the point stands; empty where it is all that the file holds.
    """

    config: dict[str, Any]
    axes: dict[str, Any]
    origins: dict[KeyPath, KeyPath]
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


def expand_grid(
    document: Document, shared: Mapping[str, Any], backends: Sequence[str]
) -> tuple[Iterator[Draft], list[Problem]]:
    """Return the sweep's points in file order (last axis fastest) with the explicit experiments after them.

    Backend-scoped axes give independent grids: each engine is crossed with the universal axes and its own.

    Args:
        document: The study file.
        shared: Its top-level experiment fields.
        backends: Names of the installed engines, which make an axis such as ``pytorch.batch_size`` scoped.

    Returns:
        The drafts, and what is wrong with the shape of the sweep and of the experiments list. That is left
        out of the drafts, so that the rest can be looked at all the same.
    """
    swept, listed = "sweep" in document.data, "experiments" in document.data
    axes, problems = _read_axes(document, shared, backends) if swept or not listed else ([], [])
    entries, wrong = _read_entries(document, shared) if listed else ({}, [])
    named = _named(axes, shared) if swept or not listed else []
    used = {*named, *(_backend({**shared, **entry}) for entry in entries.values())}
    fields = {key: value for key, value in shared.items() if key not in LIST_AXES or not isinstance(value, list)}
    # An engine's own section is shared by its own points alone.
    shared_by = {
        backend: {key: value for key, value in fields.items() if key not in used & {*backends} - {backend}}
        for backend in used
    }
    gridded = _sweep(axes, named, shared_by, ("sweep",) if swept else ()) if named else ()
    return itertools.chain(gridded, _explicit(entries, shared, shared_by, swept=swept)), [*problems, *wrong]


def _backend(config: Mapping[str, Any]) -> str:
    return str(config.get("backend", DEFAULT_BACKEND))


def _named(axes: Sequence[_Axis], shared: Mapping[str, Any]) -> list[str]:
    """Return the engines of the sweep."""
    given = next((axis.values for axis in axes if axis.name == "backend"), None)
    return [_backend(shared)] if given is None else [str(name) for name in given]


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
        if fault := _axis_fault(name, values, shared, sweep):
            problems.append(document.problem(("sweep", name), fault))
            continue
        scope = name.partition(".")[0]
        backend = scope if scope in backends else None
        axes.append(_Axis(name, values, ("sweep", name), backend, indexed=isinstance(given, list)))
    axes = [axis for axis in axes if axis.values]

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


def _axis_fault(
    name: str, values: Sequence[Any], shared: Mapping[str, Any], sweep: Mapping[str, Any]
) -> str | None:
    """Return what keeps one line of the sweep from being an axis."""
    if not values:
        return "an axis needs at least one value"
    if name in LIST_AXES and isinstance(shared.get(name), list):
        return "is given as a list and swept too"
    outer = name.split(".")[:-1]
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


def _sweep(
    axes: Sequence[_Axis], named: Sequence[str], shared_by: Mapping[str, Mapping[str, Any]], at: KeyPath
) -> Iterator[Draft]:
    universal = [axis for axis in axes if axis.backend is None]
    for head in _combinations(universal):
        backend = str(head["backend"][0]) if "backend" in head else named[0]
        own = [axis for axis in axes if axis.backend == backend]
        for tail in _combinations(own):
            chosen = head | tail
            config = dict(shared_by[backend])
            for name, (value, _) in chosen.items():
                config = _with(config, name.split("."), value)
            yield Draft(
                config,
                # A lone engine named by its axes is no axis.
                {name: value for name, (value, _) in chosen.items() if name != "backend" or len(named) > 1},
                {tuple(name.split(".")): origin for name, (_, origin) in chosen.items()},
                at,
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
            entries[index] = entry
    return entries, problems


def _explicit(
    entries: Mapping[int, Mapping[str, Any]],
    shared: Mapping[str, Any],
    shared_by: Mapping[str, Mapping[str, Any]],
    *,
    swept: bool,
) -> Iterator[Draft]:
    flat = {index: dict(_flatten(entry)) for index, entry in entries.items()}
    alike: set[str] = set()
    if not swept and flat:  # fields that every point has alike tell nothing apart
        first, *others = flat.values()
        alike = {name for name in first if all(name in other and other[name] == first[name] for other in others)}
    for index, entry in entries.items():
        at: KeyPath = ("experiments", index)
        yield Draft(
            {**shared_by[_backend({**shared, **entry})], **entry},
            {name: value for name, value in flat[index].items() if name not in alike},
            {(key,): (*at, key) for key in entry},
            at,
        )


def _flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
