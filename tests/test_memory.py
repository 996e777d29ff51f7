"""pytest's process keeps nothing of an experiment once its result is saved."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.conftest import NOOP_STUDY
from tests.support import instant

#: Bytes in each result, in its requests file, and in its output. Kept from 300 experiments, each is 72 MB.
PAYLOAD = 240_000

MEASURE = """
import gc, json, os

seen = []

def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def pytest_runtest_logfinish(nodeid):
    seen.append(None)
    if len(seen) in (100, 400):
        gc.collect()
        seen[-1] = _resident()

def pytest_unconfigure():
    with open("resident.json", "w") as file:
        json.dump([one for one in seen if one], file)
"""


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["serial", "xdist"])
def test_memory_is_flat_over_400_experiments(
    pytester: pytest.Pytester, noop_engine: None, options: tuple[str, ...]
) -> None:
    sweep = {"n": list(range(1, 41)), "noop.size": list(range(1, 11))}
    study = {**NOOP_STUDY, "sweep": sweep, "execution": {"n_cycles": 1, "cycle_order": "sequential"}}
    (pytester.path / "study.yaml").write_text(yaml.safe_dump(study))
    measure = "" if options else MEASURE
    pytester.makeconftest(instant.conftest(PAYLOAD) + measure)
    if options:  # in the controller only
        (pytester.path / "measure.py").write_text(MEASURE)
        options += ("-p", "measure")
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "--llem-yes", "-q", *options)
    run.assert_outcomes(passed=400)
    early, late = json.loads((pytester.path / "resident.json").read_text())
    assert late - early < 40e6, f"{(late - early) / 1e6:.0f} MB more"
