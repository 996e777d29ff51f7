"""Fixtures and marker for ordinary tests: isolated_experiment, energy_meter, energy_budget."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import OTHER_PLUGINS
from tests.support import nvml
from tests.support.marks import slow
from tests.support.nvml import Script
from tests.support.powercap import Powercap
from tests.support.processes import gone, wait_until

GPU = "GPU-aaaaaaaa-0000-0000-0000-000000000001"
WATTS = 200.0

#: Its energy counter is updated every 5 ms, so that a test of 0.1 s is long enough to be judged.
TICK_MS = 5.0

CONFIG = """
CONFIG = {
    "model": "none", "backend": "noop", "n": 2, "max_input_tokens": 4, "max_output_tokens": 3,
    "warmup": {"enabled": False}, "measurement": {"min_window_seconds": 0},
    "energy": {"backend": "estimate"}, "baseline": {"enabled": False},
}
"""


Run = Callable[..., pytest.RunResult]


@pytest.fixture
def write(pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Return a function that writes tests, on a machine without meters, and returns pytest's arguments."""
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("COLUMNS", "300")  # so that pytest does not shorten its lines

    def write_tests(source: str, *options: str, config: bool = False) -> list[str]:
        pytester.makepyfile(test_it=(CONFIG if config else "") + source)
        return ["test_it.py", "--strict-markers", "-W", "error", "-p", "llem", *options]

    return write_tests


@pytest.fixture
def run(pytester: pytest.Pytester, write: Callable[..., list[str]]) -> Run:
    """Return a function that runs tests in this process and returns pytest's result."""
    return lambda *source, **how: pytester.runpytest_inprocess(*write(*source, **how))


@pytest.fixture
def run_subprocess(pytester: pytest.Pytester, write: Callable[..., list[str]]) -> Run:
    """Like ``run``, in a new process, which can load the scripted NVML and has no unneeded imports."""
    return lambda *source, **how: pytester.runpytest_subprocess(*write(*source, **how))


@pytest.fixture
def scripted_gpus(tmp_path: Path, nvml_library: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Script]:
    """Return a function that makes NVML in child processes report scripted GPUs."""

    def install(*given: nvml.ScriptedGpu) -> Script:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        script = nvml.Script(tmp_path / "nvml.script", list(given))
        return nvml.install(monkeypatch, nvml_library, script)

    return install


@pytest.fixture
def scripted_gpu(scripted_gpus: Callable[..., Script]) -> Script:
    """Make NVML in child processes report one GPU, which draws 200 W."""
    return scripted_gpus(nvml.ScriptedGpu(GPU, [(0, WATTS)], {"tick_ms": TICK_MS}))


def properties(pytester: pytest.Pytester) -> dict[str, dict[str, str]]:
    """Return the properties of each test case in ``junit.xml``."""
    return {
        case.attrib["name"]: {one.attrib["name"]: one.attrib["value"] for one in case.iter("property")}
        for case in ET.parse(pytester.path / "junit.xml").iter("testcase")
    }


class TestEnergyMeter:
    def test_a_counter_is_read_at_both_ends_of_the_block(self, run_subprocess: Run, scripted_gpu: Script) -> None:
        run_subprocess(
            f"""
import time, sys
import pytest

def test_it(energy_meter):
    began = time.monotonic()
    with energy_meter() as m:
        assert m.energy_j is None and m.reason == "the block has not ended yet"
        time.sleep(0.3)
        assert 0.3 <= m.seconds
    whole = time.monotonic() - began
    assert 0.3 <= m.seconds <= whole
    tick = {TICK_MS / 1000}
    assert {WATTS} * (0.3 - tick) <= m.energy_j <= {WATTS} * (whole + tick)
    assert (m.method, m.source, m.boundary) == ("measured", "nvml_total_energy", "gpu_board")
    assert m.reason is None
    assert 0 < m.uncertainty_j < {WATTS} * tick
    (device,) = m.devices
    assert (device.device, device.energy_j) == ("{GPU}", m.energy_j)
    assert m.ticks == pytest.approx(m.energy_j / {WATTS} / tick, rel=0.5)  # busy machines miss some
    assert "torch" not in sys.modules
"""
        ).assert_outcomes(passed=1)
        assert scripted_gpu.users() == 0, "NVML is shut down"

    def test_only_gpus_visible_to_cuda_are_read(
        self, run_subprocess: Run, scripted_gpus: Callable[..., Script], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        other = "GPU-bbbbbbbb-0000-0000-0000-000000000002"
        scripted_gpus(*(nvml.ScriptedGpu(uuid, [(0, WATTS)], {"tick_ms": TICK_MS}) for uuid in (GPU, other)))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", other)
        run_subprocess(
            f"""
import time
def test_it(energy_meter):
    with energy_meter() as m:
        time.sleep(0.05)
    (device,) = m.devices
    assert device.device == "{other}"
    assert m.energy_j == device.energy_j
"""
        ).assert_outcomes(passed=1)

    def test_all_gpus_are_read_if_all_are_visible_to_cuda(
        self, run_subprocess: Run, scripted_gpus: Callable[..., Script]
    ) -> None:
        other = "GPU-bbbbbbbb-0000-0000-0000-000000000002"
        scripted_gpus(*(nvml.ScriptedGpu(uuid, [(0, WATTS)], {"tick_ms": TICK_MS}) for uuid in (GPU, other)))
        run_subprocess(
            f"""
import time
def test_it(energy_meter):
    with energy_meter() as m:
        time.sleep(0.05)
    assert [one.device for one in m.devices] == ["{GPU}", "{other}"]
    assert m.energy_j == sum(one.energy_j for one in m.devices)
"""
        ).assert_outcomes(passed=1)

    def test_energy_without_a_meter_is_a_marked_estimate(self, run: Run) -> None:
        run(
            """
import time
def test_it(energy_meter):
    with energy_meter() as m:
        end = time.process_time() + 0.02
        while time.process_time() < end: pass
    assert m.energy_j >= 0.02 * 3.5
    assert (m.method, m.source, m.boundary) == ("estimated", "cpu_time_model", "cpu_package")
    assert m.uncertainty_j is None and m.ticks is None
"""
        ).assert_outcomes(passed=1)

    def test_chosen_meter_reads_energy_or_gives_a_reason(self, run: Run, tmp_path: Path) -> None:
        Powercap(tmp_path).zone("intel-rapl:0", "package-0")
        run(
            """
import os
from pathlib import Path
import pytest

COUNTER = Path(os.environ["LLEM_POWERCAP_ROOT"], "intel-rapl:0", "energy_uj")

def test_rapl(energy_meter):
    with energy_meter(backend="rapl") as m:
        COUNTER.write_text(str(int(COUNTER.read_text()) + 12_500_000))
    assert (m.energy_j, m.method, m.source) == (12.5, "measured", "rapl_package")

def test_nvml_without_a_gpu(energy_meter):
    with energy_meter(backend="nvml") as m:
        pass
    assert (m.energy_j, m.method) == (None, "unavailable")
    assert m.reason.startswith("nvml: what is measured runs on no NVIDIA GPU")
    assert m.seconds >= 0 and m.devices == ()

def test_a_name_that_nobody_has(energy_meter):
    with pytest.raises(ValueError, match="meter 'wattmetre' is not installed"):
        with energy_meter(backend="wattmetre"):
            raise AssertionError
"""
        ).assert_outcomes(passed=3)

    @pytest.mark.slow
    def test_blocks_may_be_nested_threaded_and_left_by_an_exception(
        self, run_subprocess: Run, scripted_gpu: Script
    ) -> None:
        run_subprocess(
            f"""
import threading, time
import pytest

def test_nested(energy_meter):
    with energy_meter() as outer:
        with energy_meter() as inner:
            time.sleep(0.05)
    assert outer.energy_j > inner.energy_j > {WATTS} * 0.05
    assert outer.seconds > inner.seconds

def test_threads(energy_meter):
    found = []
    def measure(seconds):
        with energy_meter() as m:
            time.sleep(seconds)
        found.append((m.energy_j, m.seconds))
    threads = [threading.Thread(target=measure, args=(s,)) for s in (0.1, 0.4)]
    for one in threads: one.start()
    for one in threads: one.join()
    (short, _), (long, _) = sorted(found, key=lambda one: one[1])
    assert {WATTS} * 0.1 <= short < long

@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, StopIteration])
def test_raises(energy_meter, kind):
    with pytest.raises(kind, match="mine"):
        with energy_meter() as m:
            raise kind("mine")
    assert m.energy_j > 0 and m.reason is None
    was = m.seconds
    assert m.seconds == was
"""
        ).assert_outcomes(passed=5)
        assert scripted_gpu.users() == 0, "the meters are closed"

    def test_gpu_is_synchronised_at_both_ends_of_the_block(self, run: Run) -> None:
        """With a fake torch, so that no GPU is needed."""
        done = run(
            """
import sys, types
import pytest

CALLS = []

def torch(**changes):
    parts = {
        "is_initialized": lambda: True, "device_count": lambda: 3, "current_device": lambda: 1,
        "memory_reserved": lambda index: (7, 0, 0)[index], "synchronize": CALLS.append,
        "get_device_properties": lambda index: types.SimpleNamespace(uuid=index),
    }
    module = types.ModuleType("torch")
    module.cuda = types.SimpleNamespace(**{**parts, **changes})
    return module

@pytest.fixture(autouse=True)
def forget(): CALLS.clear()

def test_gpus_in_use(energy_meter, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", torch())
    with energy_meter():
        assert CALLS == [0, 1]
    assert CALLS == [0, 1] * 2

def test_no_gpu_in_use(energy_meter, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", torch(is_initialized=lambda: False))
    with energy_meter(): pass
    assert CALLS == []

def fails(index):
    CALLS.append(index)
    if len(CALLS) > 2: raise RuntimeError("device-side assert")

def test_earlier_gpu_error_is_raised(energy_meter, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", torch(synchronize=fails))
    with pytest.raises(RuntimeError, match="device-side assert"):
        with energy_meter() as m: pass
    assert m.reason.startswith("nvml: "), "the block is measured although NVML does not know these GPUs"

def test_but_not_in_the_place_of_what_the_block_raised(energy_meter, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", torch(synchronize=fails))
    with pytest.raises(KeyError):
        with energy_meter(): raise KeyError
"""
        )
        done.assert_outcomes(passed=4)


BUDGETS = """
import time
import pytest

@pytest.mark.energy_budget(joules=1000, seconds=60)
def test_within():
    time.sleep(0.4)

@pytest.mark.energy_budget(joules=10)
def test_beyond():
    time.sleep(0.4)

@pytest.mark.energy_budget(seconds=0.01)
def test_late():
    time.sleep(0.4)

@pytest.mark.energy_budget(joules=10, seconds=0.01)
def test_both():
    time.sleep(0.4)

def test_other():
    time.sleep(0.02)
"""


class TestEnergyBudget:
    def test_test_over_its_budget_fails_with_a_one_line_message(
        self, run_subprocess: Run, scripted_gpu: Script, pytester: pytest.Pytester
    ) -> None:
        done = run_subprocess(BUDGETS, "-rA", "--junitxml=junit.xml")
        done.assert_outcomes(passed=2, failed=3)
        joules = r"used \d{2,3}(\.\d)? J \(measured, nvml_total_energy\), more than its budget of 10 J"
        seconds = r"took \d\.\d+ s, more than its budget of 0\.01 s"
        done.stdout.re_match_lines_random(
            [
                f"FAILED test_it.py::test_beyond - Failed: {joules}$",
                f"FAILED test_it.py::test_late - Failed: {seconds}$",
                f"FAILED test_it.py::test_both - Failed: {joules}; {seconds}$",
                f"{joules}$",
            ]
        )
        assert "Traceback" not in done.stdout.str()
        found = properties(pytester)
        assert found["test_other"] == {}
        for name in ("test_within", "test_beyond", "test_late", "test_both"):
            figures = found[name]
            assert set(figures) == {
                f"llem_{name}" for name in ("energy_j", "energy_method", "energy_boundary", "seconds")
            }
            assert (figures["llem_energy_method"], figures["llem_energy_boundary"]) == ("measured", "gpu_board")
            assert float(figures["llem_energy_j"]) >= WATTS * 0.4
            assert float(figures["llem_seconds"]) >= 0.4
        assert scripted_gpu.users() == 0

    @pytest.mark.slow
    def test_budgets_are_judged_in_xdist_workers(
        self, run_subprocess: Run, scripted_gpu: Script, pytester: pytest.Pytester
    ) -> None:
        done = run_subprocess(BUDGETS, "-n", "1", "--junitxml=junit.xml")
        done.assert_outcomes(passed=2, failed=3)
        assert float(properties(pytester)["test_within"]["llem_energy_j"]) >= WATTS * 0.4

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("joules=1e6", "its energy budget of 1000000.0 J cannot be judged: the energy is estimated "
             r"\(cpu_time_model\), not measured; allow_estimated=True accepts estimates"),
            ("joules=1e6, allow_estimated=True", None),
            ("joules=1e-12, allow_estimated=True",
             r"used \S+ J \(estimated, cpu_time_model\), more than its budget of 1e-12 J"),
            ("seconds=60", None),
        ],
    )  # fmt: skip
    def test_estimate_is_judged_only_with_allow_estimated(
        self, run: Run, pytester: pytest.Pytester, arguments: str, message: str | None
    ) -> None:
        done = run(
            f"import pytest\n@pytest.mark.energy_budget({arguments})\ndef test_it(): sum(range(100_000))",
            "--junitxml=junit.xml",
        )
        done.assert_outcomes(passed=int(message is None), failed=int(message is not None))
        if message:
            done.stdout.re_match_lines_random([f"{message}$"])
        assert properties(pytester)["test_it"]["llem_energy_method"] == "estimated"

    def test_budget_is_not_met_by_energy_that_cannot_be_read(
        self, run_subprocess: Run, scripted_gpus: Callable[..., Script], pytester: pytest.Pytester
    ) -> None:
        scripted_gpus(nvml.ScriptedGpu(GPU, [(0, WATTS)], {"mig": 1}))
        done = run_subprocess(
            """
import pytest
@pytest.mark.parametrize("allow", [
    pytest.param(one, marks=pytest.mark.energy_budget(joules=1e6, allow_estimated=one)) for one in (False, True)
])
def test_it(allow): pass
""",
            "--junitxml=junit.xml",
        )
        done.assert_outcomes(failed=2)
        pattern = (
            r"its energy budget of 1000000.0 J cannot be judged: no energy could be read \(nvml: .*MIG is on, .*"
        )
        assert len([line for line in done.outlines if re.match(pattern, line)]) == 2
        for figures in properties(pytester).values():
            assert set(figures) == {"llem_energy_method", "llem_seconds"}, "missing energy is not 0 J"
            assert figures["llem_energy_method"] == "unavailable"

    def test_a_window_of_too_few_ticks_is_not_judged(
        self, run_subprocess: Run, scripted_gpus: Callable[..., Script]
    ) -> None:
        scripted_gpus(nvml.ScriptedGpu(GPU, [(0, WATTS)], {"tick_ms": 200}))
        source = """
import time, pytest
@pytest.mark.energy_budget(joules=1e6)
def test_short(): time.sleep(0.3)
"""
        done = run_subprocess(source)
        done.assert_outcomes(failed=1)
        done.stdout.re_match_lines_random(
            [
                r"its .* cannot be judged: the energy has \d+ ticks of the energy counter, fewer than 20: "
                r"have the test work for \d\.\d\d s or more"
            ]
        )

    def test_wrong_arguments_are_an_error_of_that_test(self, run: Run) -> None:
        wrong = {
            "": "energy_budget: needs joules, seconds or both",
            "joules=None": "energy_budget: needs joules, seconds or both",
            "10": "energy_budget: takes keywords only: joules, seconds, allow_estimated (got 10)",
            "joule=3": "energy_budget: unknown argument 'joule' (did you mean 'joules'?)",
            "watts=3": "energy_budget: unknown argument 'watts' (there are: joules, seconds, allow_estimated)",
            "joules=-1": "energy_budget: joules must be a number greater than 0 (got -1)",
            "seconds=0": "energy_budget: seconds must be a number greater than 0 (got 0)",
            "joules=True": "energy_budget: joules must be a number greater than 0 (got true)",
            "joules='3 J'": "energy_budget: joules must be a number greater than 0 (got '3 J')",
            "joules=float('nan')": "energy_budget: joules must be a number greater than 0 (got nan)",
            "joules=float('inf')": "energy_budget: joules must be a number greater than 0 (got inf)",
            "joules=1, allow_estimated=1": "energy_budget: allow_estimated must be true or false (got 1)",
        }
        tests = "".join(
            f"@pytest.mark.energy_budget({arguments})\ndef test_{number}(): raise SystemError('it ran')\n"
            for number, arguments in enumerate(wrong)
        )
        done = run(f"import pytest\n{tests}def test_right(): pass\n")
        done.assert_outcomes(passed=1, errors=len(wrong))
        for number, message in enumerate(wrong.values()):
            assert f"ERROR test_it.py::test_{number} - Failed: {message}" in done.stdout.str()
        assert "it ran" not in done.stdout.str()

    def test_budget_works_with_skip_xfail_classes_and_unittest(self, run: Run) -> None:
        done = run(
            """
import unittest
import pytest

tight = pytest.mark.energy_budget(seconds=1e-9)

@tight
@pytest.mark.xfail(reason="too slow", strict=True)
def test_xfail(): pass

@tight
@pytest.mark.skip(reason="not now")
def test_skip(): pass

@tight
def test_skips(): pytest.skip("not here")

@tight
def test_fails(): assert 1 == 2, "mine"

@pytest.fixture
def broken(): raise ValueError("no fixture")

@tight
def test_error(broken): pass

@pytest.mark.parametrize("n", [
    pytest.param(1, marks=tight), pytest.param(2, marks=pytest.mark.energy_budget(seconds=60)), 3,
])
def test_parametrized(n): pass

@pytest.mark.energy_budget(seconds=60)
class TestClass:
    def test_inherits(self): pass

    @tight  # the closest marker applies
    def test_own(self): pass

@tight
class TestUnittest(unittest.TestCase):
    def test_late(self): pass
    def test_wrong(self): self.assertEqual(1, 2)
    def test_skipped(self): self.skipTest("no")
""",
            "-rA",
        )
        outcomes = done.parseoutcomes()
        assert outcomes == {"xfailed": 1, "skipped": 3, "failed": 5, "errors": 1, "passed": 3}
        output = done.stdout.str()
        for name, message in (
            ("test_fails", "AssertionError: mine"),
            ("test_parametrized[1]", "Failed: took"),
            ("TestClass::test_own", "Failed: took"),
            ("TestUnittest::test_late", "Failed: took"),
            ("TestUnittest::test_wrong", "AssertionError: 1 != 2"),
        ):
            assert f"FAILED test_it.py::{name} - {message}" in output
        assert "ERROR test_it.py::test_error - ValueError: no fixture" in output

    def test_rerun_test_reports_its_last_figures(
        self, run: Run, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        others = [f"-p no:{name}" for name in OTHER_PLUGINS if name != "rerunfailures"]
        monkeypatch.setenv("PYTEST_ADDOPTS", " ".join(others))
        done = run(
            """
import pytest
runs = []
@pytest.mark.energy_budget(seconds=60)
def test_it():
    runs.append(1)
    assert len(runs) > 1
""",
            *("--reruns", "1", "--junitxml=junit.xml"),
        )
        assert done.parseoutcomes() == {"passed": 1, "rerun": 1}
        for case in ET.parse(pytester.path / "junit.xml").iter("testcase"):
            names = [one.get("name") for one in case.iter("property")]
            assert len(names) == len(set(names))

    def test_pytest_lists_the_marker_and_fixtures(self, run: Run) -> None:
        run("def test_it(): pass", "--markers").stdout.fnmatch_lines(["@pytest.mark.energy_budget(*"])
        fixtures = run("def test_it(): pass", "--fixtures").stdout.str()
        assert "energy_meter [session scope]" in fixtures
        assert "isolated_experiment [session scope]" in fixtures
        assert "no docstring available" not in fixtures.partition("llem")[2].partition("-----")[0]


@pytest.mark.usefixtures("noop_engine")
class TestIsolatedExperiment:
    def test_experiment_runs_in_a_process_of_its_own(self, run_subprocess: Run, pytester: pytest.Pytester) -> None:
        (pytester.path / "notes").mkdir()
        done = run_subprocess(
            """
import json, os, sys
from pathlib import Path
import pytest
from pytest_llem import ExperimentConfig, ExperimentResult, IsolatedExperiment

@pytest.fixture(scope="module")
def result(isolated_experiment: IsolatedExperiment) -> ExperimentResult:
    return isolated_experiment({**CONFIG, "noop": {"report": str(Path("notes").absolute())}})

def test_result(result):
    assert result.tokens.output_tokens == 6
    assert result.metrics["energy_j"].method == "estimated"
    assert result.effective_config["backend"] == "noop"
    assert result.identity.study_design_hash is None
    assert result.gap.waited_seconds == 0
    (note,) = [json.loads(one.read_text()) for one in Path("notes").iterdir()]
    assert note["pid"] != os.getpid() and "pytest" not in note["modules"]
    assert "torch" not in sys.modules

def test_a_config_is_taken_too(isolated_experiment, result):
    again = isolated_experiment(ExperimentConfig.model_validate(CONFIG))
    assert again.identity.config_hash != result.identity.config_hash
    assert again.metrics["gco2e_g"].value is not None
""",
            *("-o", "llem_carbon_intensity=400"),
            config=True,
        )
        done.assert_outcomes(passed=2)

    def test_paths_are_relative_to_rootdir_and_own_engines_found(
        self, run: Run, pytester: pytest.Pytester
    ) -> None:
        (pytester.path / "prompts.txt").write_text("one\ntwo\n")
        (pytester.path / "own.py").write_text("from noop_engine import NoopEngine\nclass Own(NoopEngine): pass\n")
        done = run(
            """
import os
def test_dataset(isolated_experiment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = isolated_experiment({**CONFIG, "dataset": "prompts.txt", "max_input_tokens": 2})
    assert result.tokens.input_tokens == 4 and result.tokens.truncated_prompts == 2

def test_engine(isolated_experiment):
    result = isolated_experiment({**CONFIG, "backend": "own:Own"})
    assert result.engine.name == "noop"
""",
            config=True,
        )
        done.assert_outcomes(passed=2)

    @pytest.mark.parametrize(
        ("changes", "kind", "line"),
        [
            ('{"noop": {"fault": "say and raise"}}', "exception",
             "exception while measuring: ValueError: the engine says no"),
            ('{"noop": {"fault": "kill"}}', "crash",
             "crash while measuring: the process was ended by SIGKILL"),
            ('{"backend": "nothing"}', "preflight",
             "preflight: engine 'nothing' is not installed here (there are: *"),
            ('{"backend": "pytorch", "model": "no/such"}', "preflight", "preflight: model 'no/such'*"),
        ],
    )  # fmt: skip
    def test_failed_experiment_raises_with_the_reason(self, run: Run, changes: str, kind: str, line: str) -> None:
        done = run(
            f"""
from pytest_llem import ExperimentError

def test_it(isolated_experiment):
    try:
        isolated_experiment(CONFIG | {changes})
    except ExperimentError as caught:
        assert caught.error.kind == "{kind}"
        assert ("a word from the engine" in caught.output) == {"say" in changes}
        raise
""",
            config=True,
        )
        done.assert_outcomes(failed=1)
        done.stdout.fnmatch_lines(
            [
                f"E *pytest_llem.ExperimentError: {line}",
                f"FAILED test_it.py::test_it - pytest_llem.ExperimentError: {line}",
            ]
        )
        output = done.stdout.str()
        if "say" in changes:
            done.stdout.fnmatch_lines(["*in _say_and_raise", "*Captured stdout call*", "a word from the engine"])
        assert "self._failure" not in output, "the plugin's own frames are hidden"
        assert ("Traceback (most recent call last)" in output) == ("say" in changes)

    def test_a_wrong_config_raises_validation_error(self, run: Run) -> None:
        done = run(
            """
import pytest
from pydantic import ValidationError

def test_it(isolated_experiment):
    with pytest.raises(ValidationError, match="max_output_tokens"):
        isolated_experiment({**CONFIG, "max_output_tokens": 0})
    with pytest.raises(ValidationError, match="greater than 0"):
        isolated_experiment(CONFIG, timeout=-1)
""",
            config=True,
        )
        done.assert_outcomes(passed=1)

    @pytest.mark.parametrize(("option", "argument"), [slow(["--llem-timeout=2"], ""), ([], ", timeout=2")])
    @pytest.mark.slow
    def test_a_hanging_experiment_is_ended_at_its_timeout(
        self, run: Run, pytester: pytest.Pytester, option: list[Any], argument: str
    ) -> None:
        (pytester.path / "notes").mkdir()
        done = run(
            f"""
from pathlib import Path
def test_it(isolated_experiment):
    options = {{"fault": "hang", "report": str(Path("notes").absolute())}}
    isolated_experiment({{**CONFIG, "noop": options}}{argument})
""",
            *option,
            config=True,
        )
        done.assert_outcomes(failed=1)
        done.stdout.fnmatch_lines(["E *ExperimentError: timeout while measuring: not finished after 2 s (*"])
        (note,) = (pytester.path / "notes").iterdir()
        assert gone(int(note.stem))

    @pytest.mark.slow
    def test_xdist_workers_do_not_measure_at_the_same_time(
        self, run_subprocess: Run, pytester: pytest.Pytester
    ) -> None:
        done = run_subprocess(
            """
from pathlib import Path
import pytest

@pytest.mark.parametrize("n", [1, 2])
def test_it(isolated_experiment, n):
    options = {"seconds": 0.3, "span": str(Path("spans").absolute())}
    result = isolated_experiment({**CONFIG, "noop": options})
    with Path("waited").open("a") as file:
        print(result.gap.waited_seconds, result.gap.waited_for, file=file)
""",
            *("-n", "2"),
            config=True,
        )
        done.assert_outcomes(passed=2)
        spans = [line.split() for line in (pytester.path / "spans").read_text().splitlines()]
        assert [what for _, what, _ in spans] == ["begins", "ends"] * 2
        assert spans[0][2] == spans[1][2] != spans[2][2]
        waited = sorted((pytester.path / "waited").read_text().splitlines())
        assert waited[0] == "0.0 None"
        assert re.match(
            r"\d\.\d+ cpu: pid \d+ \(gw\d\) runs study isolated_experiment, experiment test_it.py::test_it\[",
            waited[1],
        )

    @pytest.mark.slow
    def test_ctrl_c_ends_the_experiment(self, pytester: pytest.Pytester) -> None:
        (pytester.path / "notes").mkdir()
        pytester.makepyfile(
            test_it=CONFIG
            + """
from pathlib import Path
def test_it(isolated_experiment):
    options = {"fault": "hang", "report": str(Path("notes").absolute())}
    isolated_experiment({**CONFIG, "noop": options})
"""
        )
        command = [sys.executable, "-m", "pytest", "-p", "llem", "test_it.py"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=pytester.path)
        wait_until(lambda: any((pytester.path / "notes").glob("*.json")))
        os.kill(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == pytest.ExitCode.INTERRUPTED, output
        assert "KeyboardInterrupt" in output
        (note,) = (pytester.path / "notes").iterdir()
        assert gone(int(note.stem))

    def test_output_goes_to_the_terminal_with_s(self, run: Run) -> None:
        source = """
def test_it(isolated_experiment):
    isolated_experiment({**CONFIG, "noop": {"fault": "say"}})
"""
        assert run(source, "-s", config=True).stdout.str().count("a word from the engine") == 2, "once a batch"
        captured = run(source, "-rP", config=True).stdout
        captured.fnmatch_lines(["*Captured stdout call*", "a word from the engine*"])
        assert captured.str().partition("Captured stdout call")[0].count("a word from the engine") == 0

    @pytest.mark.slow
    def test_a_meter_around_an_experiment_measures_it(self, run_subprocess: Run, scripted_gpu: Script) -> None:
        done = run_subprocess(
            f"""
import pytest

@pytest.mark.energy_budget(joules=1e6)
def test_it(isolated_experiment, energy_meter):
    with energy_meter() as m:
        result = isolated_experiment({{**CONFIG, "noop": {{"gpu": "{GPU}", "seconds": 0.2, "size": 2}},
            "energy": {{"backend": "nvml"}}}})
    assert result.metrics["energy_j"].method == m.method == "measured"
    assert m.energy_j > result.metrics["energy_j"].value > {WATTS} * 0.2
""",
            config=True,
        )
        done.assert_outcomes(passed=1)


def test_public_names_annotate_without_importing_pytest(pytester: pytest.Pytester) -> None:
    """Annotations need only ``import pytest_llem``, which does not import pytest."""
    pytester.makepyfile(
        annotated="""
import sys
from pytest_llem import EnergyMeter, EnergyReading, ExperimentError, IsolatedExperiment

def use(energy_meter: EnergyMeter, isolated_experiment: IsolatedExperiment) -> float | None:
    with energy_meter() as m:
        reading: EnergyReading = m
    return reading.energy_j

assert "pytest" not in sys.modules
"""
    )
    subprocess.run([sys.executable, "annotated.py"], check=True, cwd=pytester.path)


def test_tests_without_the_marker_load_no_meter(pytester: pytest.Pytester) -> None:
    """A test without the marker must not be slowed down by a meter."""
    pytester.makepyfile(
        """
import sys
def test_it():
    assert not [name for name in sys.modules if name.startswith(("pytest_llem.energy", "pytest_llem.collection"))]
"""
    )
    done = pytester.runpytest_subprocess("-p", "llem", "--junitxml=junit.xml")
    done.assert_outcomes(passed=1)
    assert list(properties(pytester).values()) == [{}]
