"""Replace experiments by ones that take no time and have metrics that a test sets, in this process."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.execution import experiment
from pytest_llem.isolation.launcher import Job
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.results.environment import processor

RESULTS = Path(__file__).parent.parent / "golden" / "1.0" / "experiments"

_ENERGY = {"method": "measured", "boundary": "gpu_board", "covers_engine": True}
_COUNT = itertools.count()


def experiments(
    monkeypatch: pytest.MonkeyPatch, metrics_of: Callable[[Job], Mapping[str, float | None]], **energy: str
) -> None:
    """Make every experiment return a made-up result at once.

    Args:
        monkeypatch: Restores the real ones.
        metrics_of: Returns metrics of a job; others are those of a stored result.
        energy: Method and boundary of energies; by default measured, of the GPU's board.
    """
    stored = json.loads(min(RESULTS.glob("*.json")).read_text())

    def figure(name: str, value: float | None) -> dict[str, Any]:
        provenance = {**_ENERGY, **energy} if "_j" in name else {}
        reason = "the test has none" if value is None else None
        return {"value": value, "unit": CATALOGUE[name].unit, "reason": reason, **provenance}

    def done(job: Job, **_: Any) -> Outcome:
        figures = {name: figure(name, value) for name, value in metrics_of(job).items()}
        here = {fact: processor()[fact] for fact in ("cpu_model", "cpus_allowed")}
        environment = {**stored["environment"], **here, "count": next(_COUNT)}
        facts = {"identity": job.identity, "effective_config": job.config, "environment": environment}
        result = {**stored, **facts, "metrics": {**stored["metrics"], **figures}}
        return Outcome(json.dumps(result), {"requests.csv": "x"})

    monkeypatch.setattr(experiment, "run_isolated", done)
