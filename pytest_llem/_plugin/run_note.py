"""A plugin that ``run_study`` loads into its pytest process, to hear where the results are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

#: The environment variable that names the file to write the results directory to.
VARIABLE = "PYTEST_LLEM_RUN_NOTE"


@pytest.hookimpl(tryfirst=True)  # what others do with the result may fail the session
def pytest_llem_study_finished(directory: Path) -> None:
    Path(os.environ[VARIABLE]).write_text(str(directory), encoding="utf-8")
