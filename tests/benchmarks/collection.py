"""Compare collecting a study of N points with plain pytest collecting N parametrized tests.

    python tests/benchmarks/collection.py [--axes 2 3 4] [--rounds 5]

A study's points are the combinations of axes of ten values each. Every measurement is a pytest process without
other plugins; within a round the two kinds are interleaved. Prints the medians of processor time (steadier than
wall time on a busy machine, and nothing waits) and of peak memory, and the median of the rounds' ratios. Then
prints the cost of the installed plugin in an ordinary run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

TEST = """\
import pytest

@pytest.mark.parametrize("point", range({points}))
def test_point(point):
    pass
"""

STUDY = """\
model: builtin:tiny-llama
sweep:
{axes}
execution: {{n_cycles: 1}}
"""

PLUGIN = ("-p", "pytest_llem.plugin")

AXES = ("pytorch.batch_size", "max_input_tokens", "max_output_tokens", "decoder.top_k")
VALUES = "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]"


def run(arguments: Sequence[str], directory: Path) -> tuple[float, float]:
    """Run pytest and return its processor time in seconds and its peak memory in MB."""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=directory,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"pytest {' '.join(arguments)} ended with {process.returncode}:\n{said.decode()[-2000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def collection(axes: int, rounds: int) -> None:
    """Print the comparison for a study with *axes* axes, with and without ``-k``."""
    points = 10**axes
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "test_plain.py").write_text(TEST.format(points=points))
        swept = "\n".join(f"  {axis}: {VALUES}" for axis in AXES[:axes])
        (directory / "study.yaml").write_text(STUDY.format(axes=swept))
        plain = ["test_plain.py", "--collect-only", "-qq"]
        study = ["study.yaml", *PLUGIN, "--llem-yes", "--collect-only", "-qq"]
        compare(
            f"{points:>6} points",
            lambda: run(plain, directory),
            lambda: run(study, directory),
            rounds,
        )
        compare(
            f"{points:>6} points, -k",
            lambda: run([*plain, "-k", "7 and not 70"], directory),
            lambda: run([*study, "-k", "batch_size=7 and not max_input_tokens=10"], directory),
            rounds,
        )


def compare(
    name: str, plain: Callable[[], tuple[float, float]], ours: Callable[[], tuple[float, float]], rounds: int
) -> None:
    """Print both medians and the median ratio of time and memory."""
    pairs = [(plain(), ours()) for _ in range(rounds)]
    cells = []
    for index, unit in ((0, "s"), (1, "MB")):
        base = statistics.median(one[index] for one, _ in pairs)
        mine = statistics.median(other[index] for _, other in pairs)
        ratio = statistics.median(other[index] / one[index] for one, other in pairs)
        cells.append(f"plain {base:8.2f} {unit:<2}  study {mine:8.2f} {unit:<2}  ratio {ratio:5.2f}")
    print(f"{name:<20} {'   '.join(cells)}", flush=True)


def unused(rounds: int) -> None:
    """Print the cost of the plugin in an ordinary run, in ms."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "test_one.py").write_text("def test_one():\n    pass\n")
        difference = []
        for _ in range(rounds):
            without = run(["test_one.py", "-q"], directory)[0]
            with_it = run(["test_one.py", "-q", *PLUGIN], directory)[0]
            difference.append((with_it - without) * 1000)
    low, _, high = statistics.quantiles(difference, n=4)
    print(f"unused, of {rounds} pairs: median {statistics.median(difference):+.1f} ms ({low:+.1f} to {high:+.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", type=int, nargs="+", choices=(1, 2, 3, 4), default=[2, 3, 4])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    for axes in options.axes:
        collection(axes, options.rounds)
    unused(options.rounds * 6)


if __name__ == "__main__":
    main()
