"""Load and validate a study file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pytest_llem.study.budgets import apply_budgets, read_budgets
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Excluded, Experiment, Point, StudyConfig
from pytest_llem.study.document import Document, KeyPath, dotted, load_document
from pytest_llem.study.execution import ExecutionConfig, Overrides
from pytest_llem.study.gates import read_gates
from pytest_llem.study.grid import STUDY_KEYS, Draft, Grid, read_grid
from pytest_llem.study.identity import ConfigHasher, point_id, short_names, study_design_hash
from pytest_llem.study.problems import REQUIRED, Problem, StudyError, shown
from pytest_llem.study.rules import apply_rules, read_rules
from pytest_llem.study.runners import known_backends, read_runners
from pytest_llem.study.section_errors import section_problems
from pytest_llem.study.unreachable_gates import unreachable_gates
from pytest_llem.study.validation import first_config, validate

__all__ = ["Experiment", "Point", "StudyConfig", "TooManyExperimentsError", "is_study", "load_study"]

#: Maximum number of experiments, even with --llem-yes.
MAX_EXPERIMENTS = 100_000

#: Maximum length of a study's name: that of a file name in most file systems, minus the timestamp that follows it.
MAX_NAME_BYTES = 200

_NO_OVERRIDES = Overrides()

#: Study keys that are ignored in a base without a note.
_UNREMARKABLE = ("name", "version")


def is_study(path: str | Path) -> bool:
    """Return whether *path* has a ``sweep`` or an ``experiments`` key.

    Raises:
        StudyError: *path* is not readable YAML.
    """
    data = load_document(Path(path)).data
    return isinstance(data, dict) and not {"sweep", "experiments"}.isdisjoint(data)


class TooManyExperimentsError(StudyError):
    """A study has more experiments than the limit.

    Attributes:
        total: Number of experiments.
        first: Configuration of the first experiment; None if it is invalid.
        execution: The study's execution settings.
    """

    def __init__(
        self, problem: Problem, total: int, first: ExperimentConfig | None, execution: ExecutionConfig
    ) -> None:
        super().__init__([problem])
        self.total = total
        self.first = first
        self.execution = execution


def load_study(path: str | Path, overrides: Overrides = _NO_OVERRIDES) -> StudyConfig:
    """Return the study in a file, which may also be a single experiment.

    Example:
        study = load_study("studies/llama.yaml")
        print([experiment.id for experiment in study.experiments])

    Args:
        path: The file.
        overrides: Options that override the file.

    Raises:
        StudyError: The file is invalid; the error has all problems that were found, with line and column.
        TooManyExperimentsError: The study has more experiments than *overrides* allow. They are counted before any
            is made.
    """
    path = Path(path)
    document = load_document(path)
    if not isinstance(document.data, dict):
        raise StudyError([document.problem((), f"a study must be a mapping {document.given((), document.data)}")])
    document, problems, notes = with_base(document)
    partly_unread = bool(problems)

    name, wrong = _read_name(document)
    problems += wrong
    execution, wrong = _read_execution(document, overrides)
    problems += wrong
    rules, wrong = read_rules(document)
    problems += wrong
    written, wrong = read_budgets(document)
    problems += wrong
    gates, wrong, gate_notes = read_gates(document)
    problems += wrong
    notes += gate_notes
    if overrides.interleave is not None:
        gates = gates.model_copy(update={"interleave": overrides.interleave})
    shared = shared_fields(document)
    backends = known_backends(document, shared)
    runners, wrong = read_runners(document, backends)
    problems += wrong
    grid = read_grid(document, shared, backends)
    problems += grid.problems
    if too_many := _too_many(grid, execution, overrides):
        raise StudyError([*problems, *too_many.problems]) if problems else too_many

    checked = validate(grid)
    # A missing field may be in a part of the file that could not be read.
    partly_unread = partly_unread or bool(grid.problems)
    problems += [one for one in checked.problems if not (partly_unread and one.message == REQUIRED)]
    if not problems and (overrides.strict or not checked.valid):
        problems = [
            document.problem(draft.at, _refusal(draft, reason, any_valid=bool(checked.valid)))
            for draft, reason in checked.excluded
        ]
    if problems:
        raise StudyError(problems)
    names = short_names(dict.fromkeys(axis for _, axes, _ in checked.valid for axis in axes))
    hasher = ConfigHasher()
    points = [Point(point_id(axes, names), axes, config, hasher.hash(config)) for _, axes, config in checked.valid]
    places = [at for at, _, _ in checked.valid]
    problems = _output_dir_problems(document, points) or _duplicates(document, places, points)
    points, wrong, rule_notes = apply_rules(document, rules, points)
    problems += wrong
    budgets, wrong, budget_notes = apply_budgets(document, written, places, points)
    problems += wrong
    if problems:
        raise StudyError(problems)
    for index, metric in enumerate(gates.metrics or ()):
        budget_notes += unreachable_gates(document, ("gates", "metrics", index), metric, points)
    sweep_line, _ = document.marks.get(("sweep",), document.marks.get(("experiments",), (1, 1)))
    return StudyConfig(
        path=path,
        line=sweep_line,
        name=name,
        text=document.text,
        base_text=document.base.text if document.base else None,
        points=tuple(points),
        excluded=tuple(Excluded(draft.axes, draft.config, reason) for draft, reason in checked.excluded),
        execution=execution,
        runners=runners,
        design_hash=study_design_hash(point.config_hash for point in points),
        notes=(*notes, *checked.notes, *rule_notes, *budget_notes),
        budgets=tuple(budgets),
        gates=gates,
        gates_line=document.marks.get(("gates",), (sweep_line, 1))[0],
    )


def _read_name(document: Document) -> tuple[str, list[Problem]]:
    """Return the study's name, which also names its results directory, and problems with it."""
    path = document.path
    name = document.data.get("name", path.name.removesuffix(path.suffix).removesuffix(".study") or path.stem)
    if not isinstance(name, str):
        message: str | None = f"must be a string {document.given(('name',), name)}"
    else:
        message = name_problem(name)
    return (name, []) if message is None else ("", [document.problem(("name",), message)])


def name_problem(name: str) -> str | None:
    """Return an error message if *name* cannot be the name of a study and of its files; else None."""
    if not name or name in {".", ".."} or set(name) & set("/\\") or not name.isprintable():
        return f"must be a name without path separators or control characters (got {shown(name)})"
    if len(name.encode()) > MAX_NAME_BYTES:
        return f"must be at most {MAX_NAME_BYTES} bytes long (got {shown(name)})"
    return None


def _read_execution(document: Document, overrides: Overrides) -> tuple[ExecutionConfig, list[Problem]]:
    given = document.data.get("execution")
    try:
        execution = ExecutionConfig.model_validate({} if given is None else given)
    except ValidationError as error:
        return ExecutionConfig(n_cycles=1), section_problems(document, ("execution",), ExecutionConfig, error)
    is_single = {"sweep", "experiments"}.isdisjoint(document.data)
    changes: dict[str, Any] = {"n_cycles": overrides.n_cycles or execution.n_cycles or (1 if is_single else 3)}
    if overrides.cycle_order:
        changes["cycle_order"] = overrides.cycle_order
    if overrides.start_method:
        changes["start_method"] = overrides.start_method
    if overrides.no_gaps:
        changes |= {"experiment_gap_seconds": 0.0, "cycle_gap_seconds": 0.0}
    if overrides.timeout_seconds is not None:
        changes["experiment_timeout_seconds"] = overrides.timeout_seconds
    return execution.model_copy(update=changes), []


def _too_many(grid: Grid, execution: ExecutionConfig, overrides: Overrides) -> TooManyExperimentsError | None:
    cycles, points = execution.cycle_limit, grid.size
    total = points * cycles
    limit = MAX_EXPERIMENTS if overrides.max_experiments is None else overrides.max_experiments
    if total <= min(limit, MAX_EXPERIMENTS):
        return None
    document = grid.document
    at: KeyPath = ("execution", "n_cycles")
    if points > limit or at not in document.marks:
        at = grid.at or ("experiments",)
    message = f"makes {_counted(total, 'experiment')} ({_counted(points, 'point')} × {_counted(cycles, 'cycle')})"
    if total > MAX_EXPERIMENTS:
        message += f", more than the maximum of {MAX_EXPERIMENTS:,}"
    else:
        message += f", more than llem_max_experiments ({limit:,}); --llem-yes runs them all"
    return TooManyExperimentsError(document.problem(at, message), total, first_config(grid), execution)


def _counted(number: int, noun: str) -> str:
    """Return a number with its noun; huge numbers, which Python would refuse to print, as a power of 10."""
    text = f"{number:,}" if number < 10**15 else f"about 10^{math.log10(number):.0f}"
    return f"{text} {noun}{'' if number == 1 else 's'}"


def _refusal(draft: Draft, reason: str, *, any_valid: bool) -> str:
    if not any_valid:
        return f"no valid combination: {reason}"
    name = point_id(draft.axes, {axis: axis for axis in draft.axes})
    return f"{name} is excluded, an error with --llem-strict: {reason}"


def _output_dir_problems(document: Document, points: Sequence[Point]) -> list[Problem]:
    given = points[0].config.output_dir
    if len({point.config.output_dir for point in points}) == 1:
        if given is None or _is_folder_path(given):
            return []
        message = f"must be the path of a folder {document.given(('output_dir',), given)}"
        return [document.problem(("output_dir",), message)]
    experiments = document.data.get("experiments")
    listed = [("experiments", index, "output_dir") for index in range(len(experiments or ()))]
    at = next((one for one in (("sweep", "output_dir"), *listed) if one in document.marks), ("output_dir",))
    return [document.problem(at, "must be the same for all experiments: a study has one results directory")]


def _is_folder_path(path: str) -> bool:
    try:
        Path(path).expanduser()
    except RuntimeError:  # ~nobody
        return False
    return path.isprintable()


def _duplicates(document: Document, places: Sequence[KeyPath], points: Sequence[Point]) -> list[Problem]:
    problems: list[Problem] = []
    by_hash: dict[str, tuple[str, KeyPath]] = {}
    by_id: set[str] = set()
    for at, point in zip(places, points, strict=True):
        same, earlier = by_hash.get(point.config_hash, (None, at))
        if same is not None:
            message = f"{point.id} is the same experiment as {same}"
            if at != earlier and len(at) == len(earlier):
                message = f"is the same experiment as {dotted(earlier)}"
            elif same == point.id:
                message = f"{point.id} is given twice"
            problems.append(document.problem(at, message))
        elif point.id in by_id:  # such as null and "null"
            problems.append(document.problem(at, f"two experiments share the id {point.id}"))
        by_hash.setdefault(point.config_hash, (point.id, at))
        by_id.add(point.id)
    return problems


def with_base(document: Document) -> tuple[Document, list[Problem], list[Problem]]:
    """Return *document* with its base, the problems with the base, and notes on it.

    Raises:
        StudyError: The base is not valid YAML, or not a mapping.
    """
    given = document.data.get("base")
    if given is None:
        return document, [], []
    if not isinstance(given, str) or not given:
        problem = document.problem(("base",), f"must be the path of a file {document.given(('base',), given)}")
        return document, [problem], []
    path = document.path.parent / given
    try:
        message = _base_problem(path, document.path)
    except (OSError, ValueError) as error:  # a name that is too long or invalid
        message = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if message:
        return document, [document.problem(("base",), f"{message} (got {shown(given)})")], []
    base = load_document(path)
    if not isinstance(base.data, dict):
        raise StudyError([base.problem((), f"a base must be a mapping {base.given((), base.data)}")])
    ignored = [key for key in STUDY_KEYS if key in base.data and key not in _UNREMARKABLE]
    notes = [base.problem((key,), "is ignored in a base: only the study itself can set it") for key in ignored]
    inner = base.data.get("base")
    if isinstance(inner, str) and _is_one_of(path.parent / inner, document.path, path):
        problem = document.problem(("base",), f"is circular: the base of {given} is {inner}")
        return document, [problem], []
    return replace(document, base=base), [], notes


def shared_fields(document: Document) -> dict[str, Any]:
    """Return the top-level experiment fields of a study file, which override those of its base."""
    inherited = document.base.data if document.base else {}
    return {key: one for key, one in {**inherited, **document.data}.items() if key not in STUDY_KEYS}


def _base_problem(path: Path, study: Path) -> str | None:
    """Return an error message if *path* cannot be the base of the file *study*, else None."""
    if not path.exists():
        return "there is no such file, relative to this one"
    if not path.is_file():
        return "is not a file"
    return "is this file itself" if path.samefile(study) else None


def _is_one_of(path: Path, *files: Path) -> bool:
    try:
        return any(path.samefile(file) for file in files)
    except (OSError, ValueError):  # an invalid or missing file
        return False
