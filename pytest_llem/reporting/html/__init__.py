"""A study's results as a page: one file that needs nothing else, and asks for nothing.

Jinja and plotly are imported by its modules once a page is written, and by nothing before.
"""

from __future__ import annotations

from pathlib import Path

from pytest_llem.results.models import StudyResult


def write_report(directory: Path, file: Path, result: StudyResult | None = None) -> None:
    """Write the page of the results in *directory* to *file*, whose folder is made where there is none.

    Args:
        directory: A study's results directory, of a run that goes on or was killed too.
        file: Where the page goes; replaced whole.
        result: What the study came to, where that is known; else it is read.

    Raises:
        ValueError: *directory* holds no results, or *file* is there and no page.
        OSError: They cannot be read, or *file* cannot be written.
    """
    from pytest_llem._plugin import overwriting
    from pytest_llem.reporting.html.data import read_contents
    from pytest_llem.reporting.html.page import render
    from pytest_llem.results.manifest import write_atomically

    if (problem := overwriting.check_overwrite(file, overwriting.PAGE)) is not None:
        raise ValueError(problem)
    contents = read_contents(directory, result or StudyResult.load(directory))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, render(contents))
