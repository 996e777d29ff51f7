"""The pages of a session: where each study's goes, and what becomes of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from pytest_llem.results.models import StudyResult


def page_files(file: Path, names: Sequence[str]) -> list[Path]:
    """Return where the pages of studies go: to *file* that of one; of several, beside it, with their names in it.

    Args:
        file: What the user said.
        names: Of the studies; two may be the same.
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
    """Write the page of *result*, whose files are in *directory*; return what kept it from being written, or None.

    The results are saved, so that whatever goes wrong here is told, and no more than that.
    """
    from pytest_llem.reporting.html import write_report

    try:
        write_report(directory, file, result)
    except Exception as error:
        return (
            f"--llem-html: {file}: {error if isinstance(error, OSError) else f'{type(error).__name__}: {error}'}"
        )
    return None
