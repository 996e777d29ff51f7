"""What a person in front of a terminal sees of the idle times, and what is left of it."""

from __future__ import annotations

import os
import re
import signal
import sys

import pytest

from pytest_llem.hardware.gauges import GpuState
from pytest_llem.isolation.gaps import Gaps
from tests.support.terminal import Screen, watch

OURS = "llem: idle"


@pytest.fixture
def run(pytester):
    """Run pytest in a terminal; return its status, the screen, and each of our lines as it was first seen."""

    def call(*arguments, rows=24, columns=80, on_change=lambda screen: None):
        screen, seen = Screen(columns, rows), []

        def look(screen):
            seen.extend(line for line in screen.lines() if line.startswith(OURS) and line not in seen[-1:])
            on_change(screen)

        status = watch([sys.executable, "-m", "pytest", "-p", "llem", *arguments], screen, look)
        return status, screen.lines(), seen

    return call


STUDY = {"sweep": {"n": [1, 2, 3]}, "execution": {"n_cycles": 1, "experiment_gap_seconds": 2.5}}


@pytest.mark.parametrize("rows", [40, 5], ids=["high", "low"])  # a low one has the line at its lower edge
def test_it_counts_down_below_pytests_line_and_is_gone(pytester, write_study, run, rows):
    write_study(**STUDY)
    pytester.makepyfile(test_plain="def test_one(): pass\ndef test_two(): pass")
    status, lines, seen = run("test_plain.py", "study.yaml", rows=rows)
    assert status == 0
    assert seen[0] == "llem: idle, 3 s left"
    assert "llem: idle, 2 s left" in seen
    assert len(seen) <= 2 * 3, "once a second, and two gaps"
    assert not [line for line in lines if OURS in line], "it is gone"
    assert [line for line in lines if line.startswith("test_plain.py ..")]
    assert [line for line in lines if re.fullmatch(r"study\.yaml \.\.\. +\[100%\]", line)], (
        "dots and name are whole"
    )
    assert len([line for line in lines if "study.yaml" in line and "[" in line]) == 1


def test_with_v_too(pytester, write_study, run):
    write_study(**STUDY)
    status, lines, seen = run("study.yaml", "-v", columns=120)
    assert status == 0
    assert seen
    assert not [line for line in lines if OURS in line]
    passed = [line for line in lines if "PASSED" in line]
    assert [line.partition("::")[0] for line in passed] == ["study.yaml"] * 3
    assert [line[-6:] for line in passed] == ["[ 33%]", "[ 66%]", "[100%]"]


def test_in_a_narrow_terminal_it_is_cut(pytester, write_study, run):
    write_study(**{**STUDY, "execution": {"n_cycles": 1, "experiment_gap_seconds": 0.5}})
    _, _, seen = run("study.yaml", "--no-header", "--no-summary", columns=18)
    assert set(seen) == {"llem: idle, 1 s l"}


@pytest.mark.parametrize("arguments", [["-q"], ["-n", "1"]], ids=["quiet", "xdist"])
def test_where_nobody_wants_it_there_is_none(pytester, write_study, run, arguments):
    write_study(**{**STUDY, "execution": {"n_cycles": 1, "experiment_gap_seconds": 0.5}})
    status, _, seen = run("study.yaml", *arguments)
    assert (status, seen) == (0, [])


def test_without_a_terminal_there_is_none(pytester, write_study):
    write_study(**{**STUDY, "execution": {"n_cycles": 1, "experiment_gap_seconds": 0.5}})
    done = pytester.runpytest_subprocess("study.yaml", "-p", "llem")
    assert OURS not in done.stdout.str()
    assert "\x1b" not in done.stdout.str()


def test_ctrl_c_takes_it_away(pytester, write_study, run):
    write_study(**{**STUDY, "execution": {"n_cycles": 1, "experiment_gap_seconds": 3600}})
    pytester.makeconftest(
        "import os, pathlib\ndef pytest_configure(): pathlib.Path('pid').write_text(str(os.getpid()))"
    )
    interrupted = []

    def interrupt(screen):
        if not interrupted and [line for line in screen.lines() if line == "llem: idle, 3600 s left"]:
            interrupted.append(True)
            os.kill(int((pytester.path / "pid").read_text()), signal.SIGINT)

    status, lines, _ = run("study.yaml", on_change=interrupt)
    assert status == pytest.ExitCode.INTERRUPTED
    assert not [line for line in lines if OURS in line]


# ---- what is told ----


def _told(gap, *states, at_least=0.0):
    """Return what is told of a gap on a host whose GPU is like this, second by second; None: it is away."""
    now, told = [0.0], []

    def sleep(seconds):
        now[0] += seconds

    class Gauges:
        def __enter__(self):
            return lambda: {"GPU-1": seen} if (seen := states[min(int(now[0]), len(states) - 1)]) else {}

        def __exit__(self, *error):
            pass

    gaps = Gaps(gauges=Gauges, sleep=sleep, clock=lambda: now[0])
    gaps.note_first()
    now[0] = 1.0
    record = gaps.wait(gap, at_least, told.append)
    return record, list(dict.fromkeys(told))


def test_a_fixed_gap_tells_the_seconds_that_are_left():
    record, told = _told(2.5, None)
    assert told == ["idle, 3 s left", "idle, 2 s left", "idle, 1 s left"]
    assert record.seconds == 2.5


def test_an_automatic_gap_tells_what_it_waits_for():
    first = GpuState(39.0, 70.0)
    _, told = _told("auto", first, GpuState(52.0, 300.0), GpuState(41.0, 80.0), None, first)
    assert told == [
        "cooling down, 0 s (GPU 0: 52 °C, waiting for 41 °C; at most 120 s more)",
        "cooling down, 1 s (GPU 0: 80 W, waiting for 73 W; at most 119 s more)",
        "cooling down, 2 s (GPU 0: not to be read, waiting for 41 °C; at most 118 s more)",
        "cooling down, 3 s (as cool as at first; at least 2 s more)",
        "cooling down, 4 s (as cool as at first; at least 1 s more)",
    ]


def test_an_automatic_gap_that_is_drawn_out_tells_that():
    first = GpuState(39.0, 70.0)
    _, told = _told("auto", first, at_least=8.0)
    assert told[-3:] == ["idle, 3 s left", "idle, 2 s left", "idle, 1 s left"]
