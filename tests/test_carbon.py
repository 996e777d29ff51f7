"""Emissions are computed from the carbon intensity in the ini file and from nothing else."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import run_experiment, run_study
from pytest_llem.results.carbon import Carbon, emissions
from pytest_llem.results.metrics import metric
from tests.conftest import FORKSERVER, NOOP_STUDY, Results, WriteStudy

EXPERIMENT = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
ENERGY = metric("energy_j", 7.2e6, method="measured", source="m", boundary="gpu_board", uncertainty=3.6e5)


def test_emissions_are_energy_times_pue_times_intensity() -> None:
    """2 kWh, a fifth on top for the site, at 400 g."""
    found = emissions(Carbon(400, 1.2), ENERGY)
    assert found.value == pytest.approx(960.0)
    assert found.unit == "g"
    assert found.uncertainty == pytest.approx(48.0)
    assert (found.method, found.boundary) == ("measured", "gpu_board")
    assert found.source == "m × 400 gCO2e/kWh, PUE 1.2"


def test_without_an_intensity_there_are_no_emissions() -> None:
    found = emissions(None, ENERGY)
    assert (found.value, found.reason) == (None, "no llem_carbon_intensity is given")


def test_without_energy_there_are_no_emissions() -> None:
    lost = metric("energy_j", None, method="unavailable", reason="GPU is lost")
    found = emissions(Carbon(400), lost)
    assert (found.value, found.method, found.reason) == (None, "unavailable", "GPU is lost")


@pytest.mark.parametrize(("intensity", "pue"), [(-1, 1), (math.nan, 1), (math.inf, 1), (1, 0.99), (1, math.nan)])
def test_impossible_intensity_and_pue_raise_value_error(intensity: float, pue: float) -> None:
    with pytest.raises(ValueError, match="must be a number"):
        Carbon(intensity, pue)


def test_run_experiment_takes_intensity_and_pue(noop_engine: None) -> None:
    result = run_experiment(EXPERIMENT, carbon_intensity=360, pue=2)
    figures = result.metrics
    energy = figures["energy_j"].value
    assert energy is not None
    assert figures["gco2e_g"].value == pytest.approx(energy * 2 * 1e-4)
    assert figures["gco2e_g"].method == figures["energy_j"].method
    for intensity in (360, None):
        with pytest.raises(ValueError, match=r"^PUE must be a number, at least 1 \(got 0\.5\)$"):
            run_experiment(EXPERIMENT, carbon_intensity=intensity, pue=0.5)


ONE = {"sweep": {"precision": ["bf16"]}, "execution": {"n_cycles": 1}}


def one_result(directory: Path) -> Any:
    """Return the one experiment's result in a results directory."""
    (file,) = directory.glob("experiments/*.json")
    return json.loads(file.read_text())


def test_the_ini_file_reaches_the_experiment_and_no_hash(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    write_study(**ONE)
    pytester.makeini("[pytest]\nllem_carbon_intensity = 3.6e6\nllem_pue = 1.5\n")
    pytester.runpytest_inprocess("study.yaml", "-p", "llem", FORKSERVER, "--llem-run-id", "with").assert_outcomes(
        passed=1
    )
    pytester.makeini("[pytest]\n")
    pytester.runpytest_inprocess(
        "study.yaml", "-p", "llem", FORKSERVER, "--llem-run-id", "without"
    ).assert_outcomes(passed=1)
    stated, silent = (one_result(results.root / f"noop_{name}") for name in ("with", "without"))
    grams = stated["metrics"]["gco2e_g"]
    assert grams["value"] == pytest.approx(1.5 * stated["metrics"]["energy_j"]["value"])
    assert grams["source"].endswith("× 3.6e+06 gCO2e/kWh, PUE 1.5")
    assert silent["metrics"]["gco2e_g"]["value"] is None
    assert silent["metrics"]["gco2e_g"]["reason"] == "no llem_carbon_intensity is given"
    for name in ("config_hash", "study_design_hash"):
        assert stated["identity"][name] == silent["identity"][name]


@pytest.mark.slow
def test_run_study_takes_intensity_and_pue(write_study: WriteStudy, pytester: pytest.Pytester) -> None:
    result = run_study(write_study(**ONE), results_dir="out", carbon_intensity=3.6e6, pue=2, quiet=True)
    (point,) = result.points
    energy = point.metrics["energy_j"].mean
    assert energy is not None
    assert point.metrics["gco2e_g"].mean == pytest.approx(2 * energy)
    assert point.metrics["gco2e_g"].method == "estimated"


@pytest.mark.parametrize(
    ("ini", "message"),
    [
        ("llem_carbon_intensity = much", "llem_carbon_intensity: must be a number of gCO2e per kWh (got 'much')"),
        ("llem_carbon_intensity = -3", "llem_carbon_intensity: must be a number of gCO2e per kWh (got '-3')"),
        ("llem_carbon_intensity = inf", "llem_carbon_intensity: must be a number of gCO2e per kWh (got 'inf')"),
        ("llem_pue = 0.9", "llem_pue: must be a number, at least 1 (got '0.9')"),
        ("llem_pue = nan", "llem_pue: must be a number, at least 1 (got 'nan')"),
    ],
)
def test_a_wrong_ini_option_is_a_usage_error_of_one_line(
    pytester: pytest.Pytester, write_study: WriteStudy, ini: str, message: str
) -> None:
    write_study(**ONE)
    pytester.makeini(f"[pytest]\n{ini}\n")
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", FORKSERVER)
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in run.errlines if line] == [f"ERROR: {message}"]
