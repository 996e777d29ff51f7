"""Write a study's results as a self-contained HTML report that loads nothing over the network.

Jinja and plotly are imported only when a report is written.
"""

from __future__ import annotations

from pathlib import Path

from pytest_llem.results.study_result import StudyResult


def write_report(directory: Path, file: Path, result: StudyResult | None = None) -> None:
    """Write the HTML report of the results in *directory* to *file*, and create the parent folder if needed.

    Args:
        directory: A study's results directory. The run may still be going on, or may have been killed.
        file: Where the report is written. An earlier report is replaced atomically.
        result: The study's result if the caller has it; None to read it from *directory*.

    Raises:
        ValueError: *directory* holds no results, or *file* exists and is not a report.
        OSError: The results cannot be read, or *file* cannot be written.
    """
    from pytest_llem._plugin import overwriting
    from pytest_llem.reporting.html.contents import read_contents
    from pytest_llem.reporting.html.page import render
    from pytest_llem.results.manifest import write_atomically

    if (problem := overwriting.check_page(file)) is not None:
        raise ValueError(problem)
    contents = read_contents(directory, result or StudyResult.load(directory))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, render(contents))
