"""Read the base file of a study."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_llem.study.document import Document, load_document
from pytest_llem.study.grid import STUDY_KEYS
from pytest_llem.study.problems import Problem, StudyError, shown

#: Study keys that are ignored in a base without a note.
_UNREMARKABLE = ("name", "version")


def with_base(document: Document) -> tuple[Document, list[Problem], list[Problem]]:
    """Return *document* with its base, the problems with the base, and notes on it.

    Raises:
        StudyError: The base is not valid YAML.
    """
    given = document.data.get("base")
    if given is None:
        return document, [], []
    if not isinstance(given, str) or not given:
        problem = document.problem(("base",), f"must be the path of a file {document.given(('base',), given)}")
        return document, [problem], []
    path = document.path.parent / given
    try:
        fault = _fault(path, document.path)
    except (OSError, ValueError) as error:  # a name that is too long or invalid
        fault = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    if fault:
        return document, [document.problem(("base",), f"{fault} (got {shown(given)})")], []
    base = load_document(path)
    if not isinstance(base.data, dict):
        raise StudyError([base.problem((), f"a base must be a mapping {base.given((), base.data)}")])
    ignored = [key for key in STUDY_KEYS if key in base.data and key not in _UNREMARKABLE]
    notes = [base.problem((key,), "is ignored in a base: only the study itself can set it") for key in ignored]
    inner = base.data.get("base")
    if isinstance(inner, str) and _leads_to(path.parent / inner, document.path, path):
        problem = document.problem(("base",), f"is circular: the base of {given} is {inner}")
        return document, [problem], []
    return replace(document, base=base), [], notes


def shared_fields(document: Document) -> dict[str, Any]:
    """Return the top-level experiment fields of a study file, which override those of its base."""
    inherited = document.base.data if document.base else {}
    return {key: one for key, one in {**inherited, **document.data}.items() if key not in STUDY_KEYS}


def _fault(path: Path, study: Path) -> str | None:
    if not path.exists():
        return "there is no such file, relative to this one"
    if not path.is_file():
        return "is not a file"
    return "is this file itself" if path.samefile(study) else None


def _leads_to(path: Path, *files: Path) -> bool:
    try:
        return any(path.samefile(file) for file in files)
    except (OSError, ValueError):  # an invalid or missing file
        return False
