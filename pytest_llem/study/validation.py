"""Validate the points of a study."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ValidationError

from pytest_llem.registry import METER_GROUP, installed
from pytest_llem.study.config import AUTO, FORMER_METERS, ExperimentConfig
from pytest_llem.study.dataset import DATASET_FIELDS, DatasetConfig
from pytest_llem.study.document import Document, KeyPath, dotted
from pytest_llem.study.effects import in_effect, smaller_batches, without_effect
from pytest_llem.study.engines import COMMAND, DEFAULT_BACKEND
from pytest_llem.study.execution import ExecutionConfig
from pytest_llem.study.grid import STUDY_KEYS, Draft, Grid
from pytest_llem.study.identity import ConfigHasher
from pytest_llem.study.problems import Problem, did_you_mean, shown
from pytest_llem.study.section import flatten, section_of
from pytest_llem.study.section_errors import error_details, located_sentence
from pytest_llem.study.substitution import PlaceholderError, unreached

#: Number of problems after which validation stops.
MAX_PROBLEMS = 1000

#: Sections of an experiment. A ``dataset`` may also be a text.
_SECTIONS = {
    name: section
    for name, field in ExperimentConfig.model_fields.items()
    if name != "dataset" and (section := section_of(field)) is not None
}

#: Sections to search for a key that is given at the wrong level.
_SECTIONS_TO_SEARCH: dict[str, type[BaseModel]] = {
    **_SECTIONS,
    "execution": ExecutionConfig,
    "dataset": DatasetConfig,
}


@dataclass
class CheckedPoints:
    """The points of a study after validation.

    Attributes:
        valid: Position in the file, axes and configuration of each valid point.
        excluded: Combinations that are invalid or repeat another, with the reason.
        problems: Errors in the file.
        notes: Notes that are not errors.
    """

    valid: list[tuple[KeyPath, dict[str, Any], ExperimentConfig]] = field(default_factory=list)
    excluded: list[tuple[Draft, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[Problem] = field(default_factory=list)


def validate(grid: Grid) -> CheckedPoints:
    """Validate every point of *grid*."""
    checked = CheckedPoints()
    document, meters = grid.document, installed(METER_GROUP)
    known = {*ExperimentConfig.model_fields, *grid.backends}
    sections = _Sections()
    notes: set[Problem] = set()
    ineffective: dict[int, tuple[Draft, str]] = {}
    for draft in grid.drafts():
        wrong_keys = _key_problems(document, draft, grid.backends, known)
        checked.problems += wrong_keys.values()
        checked.problems += _overridden(document, draft)
        if len(checked.problems) >= MAX_PROBLEMS:
            break
        left_out = {*wrong_keys}
        if "backend" in wrong_keys:  # the section of an unknown engine cannot be validated
            left_out.add(draft.config["backend"])
        try:
            config = ExperimentConfig.model_validate(sections.validated(draft.config, left_out))
        except ValidationError as error:
            found, reasons = located_problems(document, draft, error)
            checked.problems += found
            checked.excluded.append((draft, "; ".join(reasons)))
            continue
        # A point without axes is named by its model, or else by its engine.
        named = {"backend": config.backend} if config.model is None else {"model": config.model}
        checked.valid.append((draft.at, draft.axes or named, config))
        if wrong_meter := _meter_problem(document, draft, config, meters):
            checked.problems.append(wrong_meter)
        checked.problems += _command_problems(document, draft, config)
        if former := _former_meter(draft):
            message = f"{former!r} is read as {AUTO!r}: the best meter available"
            notes.add(_problem(document, draft, ("energy", "backend"), message))
        unused = list(without_effect(config))
        if reasons := [f"{dotted(at)} {message}" for at, message in unused if dotted(at) in draft.axes]:
            ineffective[len(checked.valid) - 1] = (draft, "; ".join(reasons))
        for location, message in (*unused, *smaller_batches(config)):
            notes.add(_problem(document, draft, location, message))
    _exclude_repetitions(checked, ineffective)
    checked.notes += sorted(notes, key=lambda note: (note.path, note.line, note.column))
    return checked


def _exclude_repetitions(checked: CheckedPoints, ineffective: Mapping[int, tuple[Draft, str]]) -> None:
    """Exclude points that differ from another point only in an axis without effect.

    Otherwise an experiment would be compared with itself under another name.

    Args:
        checked: The points of the study; modified.
        ineffective: Points with such an axis by their index in ``checked.valid``, and why the axis has no effect.
    """
    if not ineffective:
        return
    hasher = ConfigHasher()
    first: dict[str, Mapping[str, Any]] = {}
    for index, (_, axes, config) in enumerate(checked.valid):
        if index not in ineffective:
            first.setdefault(hasher.hash(in_effect(config)), axes)
    repeated: set[int] = set()
    for index, (draft, reason) in ineffective.items():
        _, axes, config = checked.valid[index]
        same = first.setdefault(hasher.hash(in_effect(config)), axes)
        if same is not axes:
            named = ", ".join(f"{axis}={shown(value)}" for axis, value in same.items())
            checked.excluded.append((draft, f"{reason}; the same point without it is {named}"))
            repeated.add(index)
    checked.valid = [one for index, one in enumerate(checked.valid) if index not in repeated]


def _overridden(document: Document, draft: Draft) -> Iterator[Problem]:
    """Yield a problem for each axis that the dataset overrides: its points would have wrong names."""
    dataset = draft.config.get("dataset")
    if not isinstance(dataset, Mapping):
        return
    for name, field_name in DATASET_FIELDS.items():
        if field_name in draft.axes and dataset.get(name) is not None:
            message = f"cannot be an axis: dataset.{name} is given and overrides it"
            yield _problem(document, draft, (field_name,), message, of_key=True)


def first_config(grid: Grid) -> ExperimentConfig | None:
    """Return the first point's configuration; None if it is invalid."""
    draft = next(grid.drafts(), None)
    try:
        return ExperimentConfig.model_validate(draft.config) if draft else None
    except ValidationError:
        return None


class _Sections:
    """Validate each section only once, even if many points share it."""

    def __init__(self) -> None:
        fields = ExperimentConfig.model_fields
        defaults = {name: fields[name].get_default(call_default_factory=True) for name in _SECTIONS}
        self._defaults = {name: section for name, section in defaults.items() if section is not None}
        # The data is kept with its section, because the id of a deleted object can be reused.
        self._known: dict[tuple[str, int], tuple[Mapping[str, Any], BaseModel | None]] = {}

    def validated(self, config: Mapping[str, Any], left_out: Collection[str]) -> dict[str, Any]:
        """Return *config* without the keys *left_out*, and with validated sections in place of their data.

        Invalid data is left as it is.
        """
        given = {**self._defaults, **config}
        for name in left_out:
            given.pop(name, None)
        for name in _SECTIONS:
            data = given.get(name)
            if isinstance(data, dict):
                given[name] = self._section(name, data) or data
        return given

    def _section(self, name: str, data: dict[str, Any]) -> BaseModel | None:
        known = self._known.get((name, id(data)))
        if known is None:
            try:
                section = _SECTIONS[name].model_validate(data)
            except ValidationError:  # reported when the whole configuration is validated
                section = None
            known = self._known[name, id(data)] = (data, section)
        return known[1]


def _key_problems(
    document: Document, draft: Draft, backends: Sequence[str], known: set[str]
) -> dict[str, Problem]:
    """Return problems by key: unknown keys, sections of other engines, an unknown engine."""
    backend = draft.config.get("backend", DEFAULT_BACKEND)
    problems = {}
    for key, value in draft.config.items():
        if key in known and key not in backends:
            continue
        if key == backend and isinstance(value, Mapping):
            continue
        at = _file_position(draft, (key,))
        if value is not None and key in backends and isinstance(backend, str) and key != backend:
            message = f"is a section of another engine (the backend is {shown(backend)})"
        elif key in backends and value is not None and not isinstance(value, Mapping):
            message = f"must be a mapping {document.given(at, value)}"
        elif key not in known and key != backend:
            message = _unknown_key_message(key, value, str(backend), backends, is_shared=at == (key,))
        else:
            continue
        problems[key] = _problem(document, draft, (key,), message, of_key=True)
    if isinstance(backend, str) and backend not in backends:
        hint = did_you_mean(backend, tuple(backends))
        message = f"no engine of that name{hint} (got {shown(backend)}; there are: {', '.join(backends)})"
        problems["backend"] = _problem(document, draft, ("backend",), message)
    return problems


def _former_meter(draft: Draft) -> str | None:
    energy = draft.config.get("energy")
    backend = energy.get("backend") if isinstance(energy, Mapping) else None
    return str(backend) if backend in FORMER_METERS else None


def _meter_problem(
    document: Document, draft: Draft, config: ExperimentConfig, meters: Sequence[str]
) -> Problem | None:
    """Return a problem if the meter is not installed, else None."""
    name, location = config.energy.backend, ("energy", "backend")
    if name in (None, AUTO, *meters):
        return None
    message = f"no meter of that name is installed (got {shown(name)}; there are: {', '.join((AUTO, *meters))})"
    return _problem(document, draft, location, message)


def _command_problems(document: Document, draft: Draft, config: ExperimentConfig) -> Iterator[Problem]:
    """Yield a problem for a placeholder that cannot be filled, or for each field that does not reach a command."""
    if config.command is None:
        return
    try:
        missing = unreached(config, config.command.run)
    except PlaceholderError as error:
        location: KeyPath = (COMMAND, "run", error.index)
        yield _problem(document, draft, location, str(error))
        return
    for name, _ in flatten(draft.config):
        if (message := missing.get(name)) is not None:
            location = tuple(name.split("."))
            yield _problem(document, draft, location, message, of_key=True)


def _unknown_key_message(key: str, value: Any, backend: str, backends: Sequence[str], *, is_shared: bool) -> str:
    if key in STUDY_KEYS:
        return "belongs to the study and not to an experiment"
    if "." in key:
        return "unknown key: only sweep has dotted keys"
    for name, section in _SECTIONS_TO_SEARCH.items():
        if key in section.model_fields and (name == backend or name not in backends):
            return f"unknown key (did you mean '{name}.{key}'?)"
    known = (*ExperimentConfig.model_fields, *backends, *(STUDY_KEYS if is_shared else ()))
    hint = did_you_mean(key, known)
    if not hint and isinstance(value, Mapping):
        hint = f", nor the name of an engine (there are: {', '.join(backends)})"
    if not hint and ":" in backend and key.isidentifier():  # its options are not known before it is imported
        hint = f" (did you mean '{backend}.{key}'?)"
    return f"unknown key{hint}"


def located_problems(document: Document, draft: Draft, error: ValidationError) -> tuple[list[Problem], list[str]]:
    """Return a draft's located problems, and the reasons why it is not a valid combination.

    A value that is invalid by itself is an error in the file. Valid values that are incompatible only exclude
    their combination, unless all combinations are excluded.
    """
    problems: list[Problem] = []
    reasons: list[str] = []
    for location, detail in error_details(error):
        if detail["type"] == "value_error":  # raised by a validator of a whole section
            reason = str(detail["ctx"]["error"])
            swept = not location or any(key_path[:1] == location[:1] for key_path, _ in draft.places)
            if draft.at and swept:
                reasons.append(f"{dotted(location)}: {reason}" if location else reason)
            else:  # the values are shared by all points
                problems.append(_problem(document, draft, location, reason))
        elif axis := _axis_within(draft, location):
            message = f"{dotted(location)!r} is not a mapping"
            problems.append(_problem(document, draft, axis, message, of_key=True))
        else:
            at = _file_position(draft, location)
            sentence = located_sentence(document, at, location, detail, ExperimentConfig)
            is_key = detail["type"] == "extra_forbidden"
            problems.append(_problem(document, draft, location, sentence, of_key=is_key))
    return problems, reasons


def _file_position(draft: Draft, location: KeyPath) -> KeyPath:
    """Return the position in the file of the configuration's key *location*."""
    for key_path, position in draft.places:
        if location[: len(key_path)] == key_path:
            return (*position, *location[len(key_path) :])
    axis = _axis_within(draft, location)
    return _file_position(draft, axis) if axis else location


def _axis_within(draft: Draft, location: KeyPath) -> KeyPath | None:
    """Return an axis that sets a field of the section at *location*, or None."""
    return next((path for path, _ in draft.places if location == path[: len(location)] != path), None)


def _problem(
    document: Document, draft: Draft, location: KeyPath, message: str, *, of_key: bool = False
) -> Problem:
    """Return a problem of the configuration's key *location*, placed where the file gives its value.

    Args:
        document: The study file.
        draft: The point.
        location: Key path in the point's configuration.
        message: What is wrong.
        of_key: Whether the key is wrong, and not this value: the problem is then that of its axis, reported once.
    """
    at = _file_position(draft, location)
    if of_key and at and isinstance(at[-1], int):
        at = at[:-1]
    return replace(document.problem(at, message), where=dotted(location))
