"""The live line in a terminal while a study runs, and what remains of it."""

from __future__ import annotations

import os
import pty
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest

from pytest_llem.execution.live_progress import LiveProgress, StudyPosition, clock_text
from pytest_llem.execution.terminal_output import Line
from pytest_llem.hardware.gpu_state import GpuState
from pytest_llem.machine.cool_down import CoolDown
from pytest_llem.measurement.progress import GpuStatus, Progress
from pytest_llem.results.experiment import ExperimentResult, GapRecord
from tests.conftest import Results, WriteStudy
from tests.support import nvml
from tests.support.marks import slow
from tests.support.terminal import Screen, watch

#: Matches only the live line.
LIVE = re.compile(r"llem: \d+/\d+  ")


#: Runs pytest in a terminal; returns its status, the screen, and each text of the live line.
Run = Callable[..., tuple[int, list[str], list[str]]]


@pytest.fixture
def run(pytester: pytest.Pytester) -> Run:
    """Run pytest in a terminal."""

    def call(
        *arguments: str,
        rows: int = 24,
        columns: int = 80,
        on_change: Callable[[Screen], None] = lambda screen: None,
    ) -> tuple[int, list[str], list[str]]:
        screen = Screen(columns, rows)
        seen: list[str] = []

        def look(screen: Screen) -> None:
            seen.extend(line for line in screen.lines() if LIVE.match(line) and line not in seen[-1:])
            on_change(screen)

        status = watch([sys.executable, "-m", "pytest", "-p", "llem", *arguments], screen, look)
        return status, screen.lines(), seen

    return call


#: Two experiments, with a gap that is long enough to observe its countdown.
STUDY = {"sweep": {"n": [1, 2]}, "execution": {"n_cycles": 1, "experiment_gap_seconds": 1.5}}

#: One experiment, long enough to observe its start.
ONE_EXPERIMENT = {"sweep": {"n": [1]}, "execution": {"n_cycles": 1}}

#: An experiment with all phases, each long enough to be observed.
PHASES = {
    "sweep": {"precision": ["bf16", "fp32"]},
    "noop": {"seconds": 0.6, "fetch": 1.2},
    "n": 1,
    "warmup": {"n_warmup": 1, "max_prompts": 4, "window_size": 2, "min_prompts": 2, "cv_threshold": 1e-12},
    "measurement": {"min_window_seconds": 2.5},
    "execution": {
        "n_cycles": 1,
        "experiment_gap_seconds": 1.5,
        "cycle_order": "sequential",
        "contended_retries": 0,
    },
}


def _phases(seen: list[str]) -> list[str]:
    """Return the phases that the lines show, without numbers, in order and each once."""
    found = [re.split(r"  +", line)[2] for line in seen]
    return list(dict.fromkeys(re.sub(r"[ ,]*\d.*", "", one) for one in found))


@pytest.mark.parametrize("rows", [slow(40), 5], ids=["high", "low"])  # a low one has the line at its lower edge
def test_live_line_counts_down_below_pytests_line_and_is_erased(
    pytester: pytest.Pytester, write_study: WriteStudy, run: Run, rows: int
) -> None:
    write_study(**STUDY)
    pytester.makepyfile(test_plain="def test_one(): pass\ndef test_two(): pass")
    status, lines, seen = run("test_plain.py", "study.yaml", rows=rows)
    assert status == 0
    for left in (2, 1):
        assert [line for line in seen if re.match(rf"llem: 2/2  n=\d  idle, {left} s left  0:0", line)]
    assert not [line for line in lines if LIVE.match(line)], "the live line is erased"
    assert [line for line in lines if line.startswith("test_plain.py ..")]
    assert [line for line in lines if re.fullmatch(r"study\.yaml \.\. +\[100%\]", line)], "dots and name are whole"
    assert len([line for line in lines if "study.yaml" in line and "[" in line]) == 1
    assert not [line for line in lines if line.startswith("llem: ") and "tok/s," in line], "no line is left either"


@pytest.mark.slow
def test_phases_progress_and_time_left_are_shown(write_study: WriteStudy, run: Run) -> None:
    write_study(**PHASES)
    status, lines, seen = run("study.yaml", columns=200)
    assert status == 0
    reports = _phases(seen)
    wanted = ["starting", "fetching the model", "warming up", "measuring", "idle"]
    assert [one for one in reports if one in wanted] == wanted
    assert [line for line in seen if re.search(r"  warming up [2-4]/4  ", line)]
    assert [line for line in seen if re.search(r"  measuring [12]/2 s  ", line)], "of the window's seconds"
    assert [line for line in seen if line.startswith("llem: 1/2  precision=bf16  ")]
    first, second = ([line for line in seen if line.startswith(f"llem: {number}/2")] for number in (1, 2))
    assert not [line for line in first if "left" in line or " -" in line], "the duration is unknown yet"
    assert [line for line in second if ", about 0:0" in line], "as long as the first one took"
    assert [line for line in lines if re.fullmatch(r"study\.yaml \.\. +\[100%\]", line)]


@pytest.mark.slow
def test_verbose_shows_the_live_line_below_each_test(write_study: WriteStudy, run: Run) -> None:
    write_study(**STUDY)
    status, lines, seen = run("study.yaml", "-v", columns=120)
    assert status == 0
    assert seen
    assert not [line for line in lines if LIVE.match(line)]
    passed = [line for line in lines if "PASSED" in line]
    assert [line.partition("::")[0] for line in passed] == ["study.yaml"] * 2
    assert [line[-6:] for line in passed] == ["[ 50%]", "[100%]"]
    after = [lines[lines.index(line) + 1] for line in passed]
    assert [re.match(r"llem: \d/2 n=\d: [\d,]+ tok/s, ", line) is not None for line in after] == [True] * 2


@pytest.mark.slow
def test_live_line_is_cut_in_a_narrow_terminal(
    pytester: pytest.Pytester, write_study: WriteStudy, run: Run
) -> None:
    write_study(**{**STUDY, "execution": {"n_cycles": 1, "experiment_gap_seconds": 0.5}})
    _, _, seen = run("study.yaml", "--no-header", "--no-summary", columns=18)
    assert "llem: 2/2  idle, …" in [*seen, *(line.ljust(17) for line in seen)] or "llem: 2/2  idle,…" in seen
    assert max(map(len, seen)) <= 17


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["-q"], slow(["-n", "1"])], ids=["quiet", "xdist"])
def test_quiet_and_xdist_have_no_live_line(
    pytester: pytest.Pytester, write_study: WriteStudy, run: Run, arguments: list[str]
) -> None:
    write_study(**{**STUDY, "execution": {"n_cycles": 1, "experiment_gap_seconds": 0.5}})
    status, lines, seen = run("study.yaml", *arguments)
    assert (status, seen) == (0, [])
    plain = [line for line in lines if re.match(r"\. llem: \d/2 n=\d: ", line)]
    assert len(plain) == (0 if "-q" in arguments else 2)


@pytest.mark.slow
@pytest.mark.parametrize("term", ["dumb", slow("")])
def test_dumb_terminal_gets_plain_lines(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    term: str,
) -> None:
    pytester.makeconftest(
        f"import os\nos.environ['TERM'] = {term!r}" if term else "import os\ndel os.environ['TERM']"
    )
    write_study(**ONE_EXPERIMENT)
    status, lines, seen = run("study.yaml")
    assert (status, seen) == (0, [])
    assert len([line for line in lines if re.match(r"\. llem: 1/1 n=1: ", line)]) == 1


def test_no_live_line_without_a_terminal(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(**ONE_EXPERIMENT)
    done = pytester.runpytest_inprocess("study.yaml", "-p", "llem")
    assert not [line for line in done.outlines if LIVE.match(line)]
    assert "\x1b" not in done.stdout.str()


@pytest.mark.parametrize("option", ["-s", slow("--capture=tee-sys")])
@pytest.mark.slow
def test_output_of_the_experiment_stays_intact(write_study: WriteStudy, run: Run, option: str) -> None:
    write_study(**ONE_EXPERIMENT, noop={"fault": "say", "seconds": 0.4}, measurement={"min_window_seconds": 1.5})
    status, lines, seen = run("study.yaml", option)
    assert status == 0
    assert seen
    assert not [line for line in lines if LIVE.match(line)]
    shown = [line for line in lines if "a word from the engine ☃" in line]
    assert {line.removeprefix("study.yaml ") for line in shown} == (
        {"a word from the engine ☃"} if option == "-s" else set()
    )


@pytest.mark.slow
def test_no_color_is_respected(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("PY_COLORS")  # pytester's
    written: list[str] = []
    show = Screen.write

    def write(screen: Screen, text: str) -> None:
        written.append(text)
        show(screen, text)

    monkeypatch.setattr(Screen, "write", write)
    write_study(**ONE_EXPERIMENT)
    run("study.yaml")
    assert "\x1b[36mstarting" in "".join(written)
    written.clear()
    run("study.yaml", "--color=no")
    assert "starting" in "".join(written)
    assert "\x1b[36m" not in "".join(written)


@pytest.mark.slow
def test_power_and_temperature_come_from_the_sampler(
    pytester: pytest.Pytester,
    write_study: WriteStudy,
    run: Run,
    results: Results,
    monkeypatch: pytest.MonkeyPatch,
    nvml_library: Path,
) -> None:
    """pytest's own process makes no NVML call while a window is open."""
    uuid = "GPU-aaaaaaaa-0000-0000-0000-000000000001"
    gpu = nvml.ScriptedGpu(
        uuid, [(0.0, 312.4)], {"memory_mb": 80_000, "tick_ms": 20, "temperature": "0 61", "power_limit_w": 700}
    )
    script = nvml.Script(pytester.path / "script", [gpu])
    script.write()
    for name in ("LD_LIBRARY_PATH", "LLEM_SCRIPTED_NVML"):
        monkeypatch.setenv(name, nvml.environment(nvml_library, script)[name])
    pytester.makeconftest(
        "import os, pathlib\ndef pytest_configure(): pathlib.Path('pid').write_text(str(os.getpid()))"
    )
    write_study(
        **{
            **PHASES,
            "sweep": {"precision": ["bf16"]},
            "noop": {"seconds": 0.5, "gpu": uuid, "report": str(pytester.path)},
            "energy": {"backend": "nvml"},
            "baseline": {"duration_seconds": 5},
            "measurement": {"min_window_seconds": 2.5},
            "warmup": {"enabled": False},
        }
    )
    status, lines, seen = run("study.yaml", "--llem-no-gaps", columns=100)
    assert status == 0, "\n".join(lines)
    assert [line for line in seen if re.search(r"  measuring [12]/2 s  312 W 61 °C  ", line)]
    assert [line for line in seen if re.search(r"  measuring the idle machine [1-4]/5 s  312 W 61 °C", line)]
    file = results.directory / results.manifest["experiments"][0]["result_file"]
    result = ExperimentResult.model_validate_json(file.read_text())
    assert result.metrics["energy_j"].method == "measured"
    looks = script.looks(0.0, time.monotonic())
    counted = [call.at for call in looks if call.pid == looks[-1].pid]  # the others are of the bare machine
    own = int((pytester.path / "pid").read_text())
    meanwhile = [call for call in script.calls() if call.pid == own and counted[0] < call.at < counted[-1]]
    assert meanwhile == []


@pytest.mark.parametrize(
    ("study", "shown"),
    [
        ({**STUDY, "execution": {"n_cycles": 1, "experiment_gap_seconds": 3600}}, "  idle, 3600 s left"),
        slow(
            {**ONE_EXPERIMENT, "noop": {"seconds": 60}, "measurement": {"min_window_seconds": 2}},
            "  measuring 1/2 s",
        ),
    ],
    ids=["gap", "window"],
)
def test_ctrl_c_erases_the_live_line(
    pytester: pytest.Pytester, write_study: WriteStudy, run: Run, study: dict[str, Any], shown: str
) -> None:
    write_study(**study)
    pytester.makeconftest(
        "import os, pathlib\ndef pytest_configure(): pathlib.Path('pid').write_text(str(os.getpid()))"
    )
    interrupted: list[bool] = []

    def interrupt(screen: Screen) -> None:
        if not interrupted and [line for line in screen.lines() if shown in line]:
            interrupted.append(True)
            os.kill(int((pytester.path / "pid").read_text()), signal.SIGINT)

    status, lines, _ = run("study.yaml", on_change=interrupt)
    assert status == pytest.ExitCode.INTERRUPTED
    assert not [line for line in lines if LIVE.match(line)]


# ---- writing the live line ----


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a terminal: one to read what it shows, one to write to."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    yield ours, os.dup(theirs)
    for fd in (ours, theirs):
        os.close(fd)


def test_live_line_is_updated_at_most_twice_a_second(
    terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    shown: list[float] = []

    def compose(width: int) -> str:
        shown.append(now[0])
        return "x"

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    line = Line(terminal[1])
    for _ in range(32):
        line.show(compose)
        now[0] += 0.0625
    assert len(shown) == 4
    assert min(later - earlier for earlier, later in pairwise(shown)) >= 0.5
    line.erase()
    line.show(compose)
    assert len(shown) == 5, "after it was taken away it comes back at once"
    line.close()


def test_stopped_terminal_does_not_block(terminal: tuple[int, int]) -> None:
    line = Line(terminal[1])

    def fill() -> None:  # nobody reads
        for _ in range(200):
            line._is_shown = False
            line.show(lambda width: "x" * 1000)
        line.close()

    filling = threading.Thread(target=fill, daemon=True)
    filling.start()
    filling.join(60)
    assert not filling.is_alive(), "it waits"


# ---- text of the live line ----

PLACE = StudyPosition(
    number=3,
    count=120,
    name="precision=bf16-pytorch.cache_implementation=static-batch_size=8-cycle=2",
    short="bf16, static, 8, cycle 2",
    expected_s=21.0,
    study_began=-3700.0,
    study_left_s=1200.0,
)


class Recorded(Line):
    """A line of a given width that keeps the last text."""

    def __init__(self, width: int) -> None:
        super().__init__(-1)
        self.columns, self.text = width, ""

    @property
    def width(self) -> int:
        return self.columns

    def show(self, compose: Callable[[int], str]) -> None:
        self.text = compose(self.width)


def _text(
    width: int, *seen: Progress | GpuStatus, at: float = 12.0, place: StudyPosition = PLACE, colours: bool = False
) -> str:
    now = [0.0]
    line = Recorded(width)
    live_progress = LiveProgress(line, place, clock=lambda: now[0], colours=colours)
    for one in seen:
        now[0] = at - 4
        live_progress.see(one)
    now[0] = at
    live_progress.refresh()
    return line.text


WINDOW = Progress("measuring", total=10.0, unit="s"), GpuStatus(312.4, 61.0)


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (
            199,
            "llem: 3/120  precision=bf16-pytorch.cache_implementation=static-batch_size=8-cycle=2  "
            "measuring 4/10 s  312 W 61 °C  0:12, about 0:09 left  study 1:01:52, about 20:09 left",
        ),
        (
            100,
            "llem: 3/120  bf16, static, 8, cycl…  measuring 4/10 s  312 W 61 °C  0:12 -0:09  study 1:01:52 -20:09",
        ),
        (79, "llem: 3/120  bf16, static,…  measuring 4/10 s  0:12 -0:09  study 1:01:52 -20:09"),
        (70, "llem: 3/120  measuring 4/10 s  0:12 -0:09  study 1:01:52 -20:09"),
        (60, "llem: 3/120  measuring 4/10 s  0:12 -0:09"),
        (40, "llem: 3/120  measuring 4/10 s"),
        (20, "llem: 3/120  measur…"),
    ],
)
def test_parts_that_do_not_fit_are_left_out(width: int, text: str) -> None:
    shown = _text(width, *WINDOW)
    assert len(shown) <= width
    assert shown == text


@pytest.mark.parametrize(
    ("progress", "text"),
    [
        (Progress("loading"), "loading 4 s"),
        (Progress("warming up", 3, 10, "runs"), "warming up 3/10"),
        (Progress("warming up", 11, None, "runs"), "warming up 11"),
        (Progress("measuring", total=3.0, unit="s"), "measuring 4 s"),  # to the end of the pass
        (Progress("measuring", total=0.0, unit="s"), "measuring 4 s"),
        (Progress("a\x1b[2Jphase"), "a\\x1b[2Jphase 4 s"),
    ],
)
def test_phase_progress_is_shown(progress: Progress, text: str) -> None:
    assert f"  {text}  0:12" in _text(199, progress)


def test_unknown_times_are_left_out() -> None:
    place = StudyPosition(1, 4, "n=1", "1", None, 0.0, None)
    assert _text(79, Progress("loading"), place=place) == "llem: 1/4  n=1  loading 4 s  0:12  study 0:12"
    assert "W" not in _text(199, Progress("measuring"), GpuStatus(None, 50.0))
    assert "°C" not in _text(199, Progress("measuring"), GpuStatus(70.0))


def test_old_gpu_status_is_not_shown() -> None:
    now, line = [0.0], Recorded(199)
    live_progress = LiveProgress(line, PLACE, clock=lambda: now[0])
    live_progress.see(GpuStatus(300.0, 60.0))
    live_progress.refresh()
    assert "300 W" in line.text
    now[0] = 60.0
    live_progress.refresh()
    assert "300 W" not in line.text, "the status is a minute old"


def test_colours_are_used_if_the_terminal_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[36mmeasuring" in _text(199, *WINDOW, colours=True)
    assert "\x1b" not in _text(199, *WINDOW)


def test_clock_text_is_minutes_and_seconds() -> None:
    assert [clock_text(seconds) for seconds in (0, 9.9, 61, 3723)] == ["0:00", "0:09", "1:01", "1:02:03"]


# ---- idle time before an experiment ----


def _reports(
    gap: float | Literal["auto"], *states: GpuState | None, at_least: float = 0.0
) -> tuple[GapRecord, list[str]]:
    """Return the gap's record and its reports, with the GPU's state in each second; None if it is not visible."""
    now = [0.0]
    reports: list[str] = []

    def sleep(seconds: float) -> None:
        now[0] += seconds

    class Sensors:
        def __enter__(self) -> Any:
            return lambda: {"GPU-1": seen} if (seen := states[min(int(now[0]), len(states) - 1)]) else {}

        def __exit__(self, *error: Any) -> None:
            pass

    cool_down = CoolDown(sensors=Sensors, sleep=sleep, clock=lambda: now[0])
    cool_down.record_target()
    now[0] = 1.0
    record = cool_down.wait(gap, at_least, reports.append)
    return record, list(dict.fromkeys(reports))


def test_fixed_gap_reports_the_remaining_seconds() -> None:
    record, reports = _reports(2.5, None)
    assert reports == ["idle, 3 s left", "idle, 2 s left", "idle, 1 s left"]
    assert record.seconds == 2.5


def test_automatic_gap_reports_what_it_waits_for() -> None:
    first = GpuState(39.0, 70.0)
    _, reports = _reports("auto", first, GpuState(52.0, 300.0), GpuState(41.0, 80.0), None, first)
    assert reports == [
        "cooling down, 0 s (one GPU: 52 °C, waiting for 41 °C; at most 120 s more)",
        "cooling down, 1 s (one GPU: 80 W, waiting for 73 W; at most 119 s more)",
        "cooling down, 2 s (one GPU: not readable, waiting for 41 °C; at most 118 s more)",
        "cooling down, 3 s (cool and idle again; at least 2 s more)",
        "cooling down, 4 s (cool and idle again; at least 1 s more)",
    ]


def test_automatic_gap_extended_to_the_minimum_reports_it() -> None:
    first = GpuState(39.0, 70.0)
    _, reports = _reports("auto", first, at_least=8.0)
    assert reports[-3:] == ["idle, 3 s left", "idle, 2 s left", "idle, 1 s left"]


@pytest.mark.parametrize("capture", ["fd", "sys", "no"])
def test_line_within_a_call_is_not_captured(pytester: pytest.Pytester, capture: str) -> None:
    pytester.makepyfile(
        """
        from pytest_llem.execution.terminal_output import print_line

        def test_it(request):
            print("of the test")
            print_line(request.config, "contended")
            print("of the test, too")
        """
    )
    run = pytester.runpytest_subprocess(f"--capture={capture}")
    run.assert_outcomes(passed=1)
    run.stdout.fnmatch_lines(["llem: contended"])
    assert ("of the test" in run.stdout.str()) == (capture == "no")


def test_long_line_of_an_experiment_is_broken_between_words(run: Run, write_study: Callable[..., Path]) -> None:
    write_study(**ONE_EXPERIMENT)
    _, shown, _ = run("study.yaml", "-v", columns=40, rows=60)
    first = next(place for place, one in enumerate(shown) if one.startswith("llem: 1/1 "))
    assert shown[first + 1].startswith("  ")
    assert re.search(r"tok/s, \S+ J/output token \(estimated\), ", " ".join(" ".join(shown[first:]).split()))


def test_long_line_within_a_call_is_broken_between_words(pytester: pytest.Pytester, run: Run) -> None:
    pytester.makepyfile(
        """
        from pytest_llem.execution.terminal_output import print_line

        def test_it(request):
            print_line(request.config, "the cycle is contended and is measured again")
        """
    )
    _, shown, _ = run("-p", "no:randomly", columns=40)
    first = shown.index("llem: the cycle is contended and is")
    assert shown[first + 1] == "  measured again"


# ---- a server under load ----

LOAD = Progress("measuring", 4, 10, "s", in_flight=16, tokens_per_second=880.0)


@pytest.mark.parametrize(
    ("width", "text"),
    [
        (79, "llem: 3/120  bf16, static, …  steady 4/10 s  16 in flight 880 tok/s  0:12 -0:09"),
        (68, "llem: 3/120  bf16, static, 8…  steady 4/10 s  16 in flight 880 tok/s"),
        (60, "llem: 3/120  steady 4/10 s  16 in flight 880 tok/s"),
    ],
)
def test_load_of_server_is_shown_before_times(width: int, text: str) -> None:
    assert _text(width, LOAD) == text


def test_ramp_up_of_server_shows_its_load() -> None:
    ramp = Progress("concurrency 16, ramping up", in_flight=3, tokens_per_second=6050.0)
    assert "  concurrency 16, ramping up 4 s  3 in flight 6,050 tok/s  " in _text(199, ramp)


def test_energy_per_token_so_far_is_mean_over_phase() -> None:
    now, line = [0.0], Recorded(199)
    live_progress = LiveProgress(line, PLACE, clock=lambda: now[0])
    live_progress.see(Progress("measuring", total=10, unit="s"))
    for seconds, watts, rate in ((1.0, 100.0, 1000.0), (3.0, 300.0, 500.0)):
        now[0] += seconds
        live_progress.see(GpuStatus(watts))
        live_progress.see(Progress("measuring", 1, 10, "s", in_flight=8, tokens_per_second=rate))
    live_progress.refresh()
    assert "8 in flight 500 tok/s ~0.4 J/tok" in line.text  # (100 + 900) J / (1,000 + 1,500) tokens
    now[0] += 60
    live_progress.see(Progress("measuring", 1, 10, "s", in_flight=8, tokens_per_second=500.0))
    live_progress.refresh()
    assert "J/tok" not in line.text, "the power is not known any more"


def test_long_lines_of_the_plan_are_broken_between_words(
    pytester: pytest.Pytester, run: Run, write_study: Callable[..., Path]
) -> None:
    write_study(**STUDY)
    [line] = [
        line
        for line in pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--co").outlines
        if line.startswith("llem: noop [")
    ]
    assert len(line) > 80, "it is whole without a terminal"
    _, shown, _ = run("study.yaml", "--co", columns=40, rows=60)
    first = next(place for place, one in enumerate(shown) if one.startswith("llem: noop ["))
    assert " ".join(" ".join(shown[first:]).split()).startswith(line)
    assert shown[first + 1].startswith("  "), "further lines are indented"
