"""The outcome of an experiment, as its process returns it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pytest_llem.measurement.requests import Requests
from pytest_llem.results.experiment import ExperimentResult


@dataclass(frozen=True)
class Measured:
    """The outcome of an experiment.

    Attributes:
        result: The result to save.
        requests: The requests that were sent; None if a command's file has none.
        files: Contents of the files to save with the result, by file name suffix.
    """

    result: ExperimentResult
    requests: Requests | None
    files: Mapping[str, str]
