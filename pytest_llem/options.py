"""Command-line options, their ini twins, and what they come to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_llem.study.loading import StudyConfig

#: The studies of this session, by the node id of their file.
STUDIES: pytest.StashKey[dict[str, StudyConfig]] = pytest.StashKey()


#: Endings of a file that may be a study.
YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Settings:
    """What the user asked for.

    Attributes:
        results_dir: Where each study gets its folder.
        run_id: Ends the folder's name in place of the time, or None.
        model_path: Folders that hold models by name.
        files: Patterns of the files that count as studies when pytest walks a directory.
    """

    results_dir: Path
    run_id: str | None
    model_path: tuple[Path, ...]
    files: tuple[str, ...]

    @classmethod
    def from_config(cls, config: pytest.Config) -> Settings:
        """Read the options, the command line before the ini file.

        Raises:
            pytest.UsageError: The run id is no file name, or the results directory has no place.
        """
        run_id = config.getoption("llem_run_id")
        if run_id is not None and (not run_id or run_id in {".", ".."} or set(run_id) & set("/\\\0")):
            raise pytest.UsageError(f"--llem-run-id: must be a name without path separators (got {run_id!r})")
        results = config.getoption("llem_results_dir") or config.getini("llem_results_dir")
        try:
            results_dir = config.rootpath / Path(results).expanduser()
        except RuntimeError as error:  # ~nobody
            raise pytest.UsageError(f"--llem-results-dir: {error} (got {results!r})") from None
        return cls(
            results_dir=results_dir,
            run_id=run_id,
            model_path=tuple(config.getini("llem_model_path")),
            files=tuple(config.getini("llem_files")),
        )


def add_options(parser: pytest.Parser) -> None:
    """Declare everything under one heading of ``pytest --help``."""
    group = parser.getgroup("llem", "energy studies of LLM inference")
    group.addoption(
        "--llem-results-dir",
        metavar="DIR",
        help="where the results folders go, relative to rootdir (default: ini llem_results_dir, else results)",
    )
    group.addoption(
        "--llem-run-id",
        metavar="ID",
        help="name the results folder STUDY_ID, with a number behind it where that is taken (default: the time)",
    )
    parser.addini(
        "llem_results_dir", "where each study's results folder goes, relative to rootdir", default="results"
    )
    parser.addini(
        "llem_model_path",
        "folders that hold models by name, looked in before the Hugging Face hub",
        type="paths",
        default=[],
    )
    parser.addini(
        "llem_files",
        "file names taken as studies when pytest walks a directory; a YAML named on the command line always is",
        type="args",
        default=["*.study.yaml", "*.study.yml"],
    )
