"""Find the results of studies in folders, and read them one at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from pytest_llem.results.manifest import MANIFEST
from pytest_llem.results.study_result import RESULT, StudyResult


def read_results(paths: Iterable[Path]) -> Iterator[tuple[Path, StudyResult | str]]:
    """Yield each result in *paths*, or why it cannot be read.

    A path is a results directory, a saved result, or a folder that holds these at any depth. Hidden folders in it
    are skipped. Only one result is in memory at a time.

    Args:
        paths: Folders and files.

    Raises:
        ValueError: A path does not exist, or no result is in it; the message starts with the path.

    Example:
        >>> for path, result in read_results([Path("results")]):
        ...     print(path, result if isinstance(result, str) else result.status)
    """
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path}: no such file or folder")
        found = [*_result_paths(path)]
        if not found:
            raise ValueError(f"{path}: holds no results")
        for result_path in found:
            try:
                yield result_path, StudyResult.load(result_path)
            except ValueError as error:
                yield result_path, str(error)
            except OSError as error:
                yield result_path, f"{error.filename or result_path}: {error.strerror or error}"


def is_result(path: Path) -> bool:
    """Return whether *path* is a file or a results directory, and not a folder that holds these."""
    return not path.is_dir() or any((path / name).exists() for name in (MANIFEST, RESULT))


def _result_paths(path: Path) -> Iterator[Path]:
    """Yield the results directories and saved results in *path*, itself included."""
    if is_result(path):
        yield path
        return
    for child in sorted(path.iterdir()):
        if child.suffix == ".json" or (child.is_dir() and not child.name.startswith(".")):
            yield from _result_paths(child)
