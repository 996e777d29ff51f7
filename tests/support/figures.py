"""A conftest whose experiments take no time and have metrics that a test sets."""

from __future__ import annotations

from pathlib import Path

RESULTS = Path(__file__).parent.parent / "golden" / "1.0" / "experiments"

CONFTEST = """\
import json
import time
from pathlib import Path

import pytest

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.execution import experiment
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.results.environment import processor

RESULT = json.loads(min(Path({results!r}).glob("*.json")).read_text())
METHOD = {method!r}
HERE = {{fact: processor()[fact] for fact in ("cpu_model", "cpus_allowed")}}


def _figure(name, text, facts):
    value = eval(text, {{}}, facts)
    if value is None:
        return {{"value": None, "unit": CATALOGUE[name].unit, "reason": "the test has none"}}
    energy = {{"method": METHOD, "boundary": "gpu_board"}} if "_j" in name else {{}}
    return {{"value": value, "unit": CATALOGUE[name].unit, **energy}}


def _done(job, **_):
    facts = {{"cycle": job.identity["cycle"], "reference": job.python is not None, **job.identity["axes"]}}
    facts = {{name.rpartition(".")[2]: value for name, value in facts.items()}}
    figures = {{name: _figure(name, text, facts) for name, text in FIGURES.items()}}
    metrics = {{**RESULT["metrics"], **figures}}
    # Without a count, two runs would be the same measurement.
    environment = {{**RESULT["environment"], **HERE, "count": time.monotonic_ns()}}
    facts = {{"identity": job.identity, "effective_config": job.config, "metrics": metrics}}
    facts["environment"] = environment
    facts["inputs"] = {{"modules": {{}}, "distributions": {{}}}}  # no code: none of it can change
    return Outcome(json.dumps({{**RESULT, **facts}}), {{"requests.csv": "x"}})


FIGURES = json.loads(Path(__file__).with_name("figures.json").read_text())
run = _done


def pytest_configure(config):
    patch = pytest.MonkeyPatch()
    patch.setattr(experiment, "run_isolated", lambda job, **options: run(job, **options))
    config.add_cleanup(patch.undo)
"""


def conftest(method: str = "measured") -> str:
    """Return the conftest's text.

    ``figures.json`` beside it has, for each metric, a Python expression of the cycle, of whether it is the
    ``reference``, and of the point's axes by their last names. Text that is appended may redefine ``run``, which
    runs each experiment.

    Args:
        method: Method of energies.
    """
    return CONFTEST.format(results=str(RESULTS), method=method)
