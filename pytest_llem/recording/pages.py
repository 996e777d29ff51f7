"""The HTML pages of a session's studies: their files, and their writing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pytest_llem.results.study_result import StudyResult


def page_files(file: Path, names: Sequence[str]) -> list[Path]:
    """Return the files of the studies' pages: *file* for one study; files beside it with the names of several.

    Args:
        file: The value of ``--llem-html``.
        names: Names of the studies, which need not be unique.
    """
    if len(names) == 1:
        return [file]
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        number = f"-{seen[name]}" if seen[name] > 1 else ""
        found.append(file.with_name(f"{file.stem}-{name}{number}{file.suffix}"))
    return found


def write_page(directory: Path, file: Path, result: StudyResult) -> str | None:
    """Write the page of *result*, whose files are in *directory*, and return an error message or None.

    Any exception is reported, since the results are saved already.
    """
    from pytest_llem.reporting.html import write_report

    try:
        write_report(directory, file, result)
    except Exception as error:
        return (
            f"--llem-html: {file}: {error if isinstance(error, OSError) else f'{type(error).__name__}: {error}'}"
        )
    return None
