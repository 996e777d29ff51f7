"""Read hub datasets as an experiment does, in processes forked from one that has imported ``datasets``.

The library reads Hugging Face's environment variables on import.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import datasets  # noqa: F401  (which takes long, and is imported here before anything is forked)

from pytest_llem import ExperimentConfig
from pytest_llem.engines.protocol import PreflightError
from pytest_llem.workload.prompts import read_texts
from tests.support.narrow import not_none

#: A list of prompts, revision and number of downloads; or why the dataset cannot be read.
Answer = Any


def read(wanted: list[tuple[str, int, str]]) -> list[Answer]:
    """Return the content of each wanted dataset, given by name, ``n`` and order."""
    answers: list[Answer] = []
    for name, n, order in wanted:
        config = ExperimentConfig.model_validate({"model": "m", "dataset": name, "n": n, "dataset_order": order})
        fetched: list[str] = []
        try:
            found = not_none(read_texts(config, Path("/nowhere"), partial(fetched.append, name)))
            answers.append([found.prompts, found.revision, len(fetched)])
        except PreflightError as error:
            answers.append(str(error))
    assert "torch" not in sys.modules
    return answers
