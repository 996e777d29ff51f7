"""Report the results directory to ``run_study``, which loads this plugin into its pytest process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

#: The environment variable that names the file to write the results directory to.
VARIABLE = "PYTEST_LLEM_RUN_NOTE"


@pytest.hookimpl(tryfirst=True)  # before implementations that may raise
def pytest_llem_study_finished(directory: Path) -> None:
    Path(os.environ[VARIABLE]).write_text(str(directory), encoding="utf-8")
