"""A third-party meter, installed as a package: a whole study with it, and meters that fail."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_llem import StudyResult
from pytest_llem.energy.account import Meters
from tests.conftest import Results, RunPytest, WriteStudy
from tests.support.marks import slow
from tests.support.pages import blocks, files, page
from tests.support.warned import texts
from tests.support.wattmeter.wattmeter import GAIN_ERROR, WATTS

FOLDER = Path(__file__).parent / "support" / "wattmeter"

STUDY: dict[str, Any] = {
    "energy": {"backend": "wattmeter"},
    "baseline": {"enabled": False},
    "measurement": {"min_window_seconds": 0.3},
    "sweep": {"n": [2]},
    "noop": {"seconds": 0.1},
    "execution": {"n_cycles": 1, "experiment_gap_seconds": 0},
}


@pytest.fixture
def run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, write_study: WriteStudy, results: Results
) -> Callable[..., Any]:
    """Run a study with the wattmeter, and return pytest's result and the meter's calls."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER), prepend=os.pathsep)
    monkeypatch.setenv("WATTMETER_LOG", str(pytester.path / "asked"))

    def call(*options: str, **changes: Any) -> Any:
        write_study(**{**STUDY, **changes})
        start = pytester.runpytest_subprocess if options else pytester.runpytest_inprocess
        done = start("study.yaml", "-p", "llem", "--llem-start-method=forkserver", *options)
        return done, (pytester.path / "asked").read_text().split()

    return call


@pytest.fixture
def experiments(results: Results) -> Callable[..., Any]:
    """Return the results of all experiments, in run order."""
    return results.experiments


def test_result_has_the_meters_values_and_provenance(
    run: Callable[..., Any], experiments: Callable[..., Any], results: Results
) -> None:
    done, asked = run()
    done.assert_outcomes(passed=1)
    assert asked == ["open", *["begin", "end"] * 2, "close"], "for the load and for the window"
    [result] = experiments()
    metrics = result.metrics
    assert metrics["mean_power_w"].value == pytest.approx(WATTS)
    assert result.window.window_energy_j == pytest.approx(WATTS * result.window.energy_seconds)
    assert metrics["energy_j"].value == pytest.approx(result.window.window_energy_j / result.window.passes)
    assert metrics["energy_per_output_token_j"].value == pytest.approx(metrics["energy_j"].value / 6)
    for name in ("energy_j", "energy_per_output_token_j", "edp_js", "mean_power_w", "load_energy_j"):
        found = metrics[name]
        assert (found.method, found.source, found.boundary) == ("sampled", "wattmeter_power", "wall"), name
        assert found.uncertainty > 0
    for name in ("gpu_energy_j", "cpu_energy_j", "dram_energy_j"):
        assert (metrics[name].value, metrics[name].method) == (None, "unavailable"), name
    [device] = result.devices
    assert (device.device, device.boundary, device.method) == ("socket-1", "wall", "sampled")
    assert device.gain_error == GAIN_ERROR
    assert result.harness_cpu_seconds >= 0.125, "its own is in it"
    assert not [line for line in texts(result.warnings) if "wattmeter" in line]
    assert StudyResult.load(results.directory).summary.method == "sampled"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("-n", "2")], ids=["serial", "xdist"])
def test_the_idle_machine_is_measured_in_the_first_cycle_of_a_point(
    run: Callable[..., Any],
    experiments: Callable[..., Any],
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    results: Results,
    workers: tuple[str, ...],
) -> None:
    done, asked = run(*workers, baseline={"duration_seconds": 5}, execution={**STUDY["execution"], "n_cycles": 3})
    done.assert_outcomes(passed=3)
    baselines = [one.idle_power for one in experiments()]
    assert [one.idle_power_w for one in baselines] == pytest.approx([WATTS] * 3)
    assert len({one.measured_at for one in baselines}) == 1
    first, *others = sorted(one.age_seconds for one in baselines)
    assert first == 0
    assert all(age > 5 for age in others)
    assert asked.count("begin") == 3 * 3 + 5
    assert {one.devices[0] for one in baselines} == {"socket-1"}
    for result in experiments():
        active = result.metrics["active_energy_j"]
        low, high = active.interval95
        assert low < 0 < high, "at the wall, this engine takes nothing"
        assert active.boundary == "wall"
    assert {one.idle_power_no_context_w for one in baselines} == {None}
    assert baselines[0].no_context_reason == "meter 'wattmeter' is used only in experiments"


@pytest.mark.parametrize("method", ["begin", slow("end")])
def test_meter_that_fails_while_measuring_loses_only_its_values(
    run: Callable[..., Any], experiments: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setenv("WATTMETER_FAILS", method)
    done, asked = run()
    done.assert_outcomes(passed=1)
    assert asked[-1] == "close"
    [result] = experiments()
    energy = result.metrics["energy_j"]
    assert (energy.value, energy.method) == (None, "unavailable")
    assert energy.reason == f"wattmeter: ConnectionError: {method}: no answer from /dev/ttyUSB0"
    assert result.metrics["output_tokens_per_second"].value > 0
    assert texts(result.warnings) == [
        f"no energy: wattmeter: ConnectionError: {method}: no answer from /dev/ttyUSB0"
    ]


def test_value_that_is_not_a_number_loses_only_the_meters_values(
    run: Callable[..., Any], experiments: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATTMETER_SHOWS", "nan")
    done, _ = run()
    done.assert_outcomes(passed=1)
    [result] = experiments()
    energy = result.metrics["energy_j"]
    assert (energy.value, energy.method) == (None, "unavailable")
    assert energy.reason == "wattmeter: ValueError: energy_j must be a finite number (got nan)"
    assert result.metrics["output_tokens_per_second"].value > 0


def test_meter_that_reports_zero_does_not_divide_by_zero(
    run: Callable[..., Any], experiments: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meter reports 0 J, and tokens_per_joule is not available."""
    monkeypatch.setenv("WATTMETER_SHOWS", "0")
    done, _ = run()
    done.assert_outcomes(passed=1)
    metrics = experiments()[0].metrics
    assert (metrics["energy_j"].value, metrics["energy_per_output_token_j"].value) == (0, 0)
    found = metrics["tokens_per_joule"]
    assert (found.value, found.method, found.reason) == (None, "unavailable", "energy_j is 0")


def test_meter_that_fails_to_close_loses_nothing(
    run: Callable[..., Any], experiments: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATTMETER_FAILS", "close")
    done, _ = run()
    done.assert_outcomes(passed=1)
    assert experiments()[0].metrics["mean_power_w"].value == pytest.approx(WATTS)


def test_meter_that_does_not_open_fails_before_loading(
    run: Callable[..., Any], results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATTMETER_FAILS", "open")
    done, asked = run()
    done.assert_outcomes(failed=1)
    assert asked == ["open"]
    done.stdout.fnmatch_lines(["*meter 'wattmeter' cannot be used: ConnectionError: open: no answer from *"])
    assert results.manifest["experiments"][0]["error"]["kind"] == "preflight"


@pytest.fixture
def counter(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the meter of docs/how-to/own-meter.md, and return the file of the counter that it reads, at 40 J."""
    text = page("how-to/own-meter.md")
    (pytester.path / "my_meter.py").write_text(files(text)["my_meter.py"])
    project = tomllib.loads(blocks(text, "toml")[0])["project"]
    [(name, target)] = project["entry-points"]["pytest_llem.meters"].items()
    installed = pytester.mkdir("my_meter-0.1.dist-info")
    (installed / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1\n")
    (installed / "entry_points.txt").write_text(f"[pytest_llem.meters]\n{name} = {target}\n")
    monkeypatch.syspath_prepend(pytester.path)
    monkeypatch.setenv("PYTHONPATH", str(pytester.path), prepend=os.pathsep)
    file = pytester.path / "energy1_input"
    file.write_text("40000000")
    monkeypatch.setenv("HWMON_ENERGY", str(file))
    return file


def test_example_meter_reads_the_rise_of_its_counter(counter: Path) -> None:
    meters = Meters.open("hwmon", [])
    meters.begin()
    counter.write_text("42500000")
    total = meters.end().total
    meters.close()
    assert (total.energy_j, total.method, total.boundary) == (2.5, "measured", "wall_socket")


@pytest.mark.parametrize("after", ["40000000", "39999999", "", None])
def test_example_meter_reports_a_counter_that_does_not_rise(counter: Path, after: str | None) -> None:
    meters = Meters.open("hwmon", [])
    meters.begin()
    counter.unlink() if after is None else counter.write_text(after)
    total = meters.end().total
    meters.close()
    assert (total.energy_j, total.method) == (None, "unavailable")
    assert total.reason == f"socket-1: the counter went from 40000000 to {after or None} µJ"


def test_example_meter_without_its_counter_is_refused(counter: Path) -> None:
    counter.unlink()
    assert Meters.open("hwmon", []).refusals == {
        "hwmon": f"{counter} cannot be read: set HWMON_ENERGY to a counter"
    }


def test_example_meter_works_in_a_study(
    counter: Path, write_study: WriteStudy, run_pytest: RunPytest, results: Results
) -> None:
    fields = files(page("how-to/own-meter.md"))["metered.yaml"]
    write_study(**{**STUDY, "energy": yaml.safe_load(fields)["energy"]})
    run = run_pytest()
    run.assert_outcomes(passed=1)
    run.stdout.fnmatch_lines(["warning: no energy: socket-1: the counter went from 40000000 to 40000000 µJ"])
    [entry] = results.manifest["experiments"]
    assert results.read(entry["result_file"])["metrics"]["energy_j"]["value"] is None
