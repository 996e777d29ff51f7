"""Measure the time that users wait before the first measurement.

    python tests/benchmarks/startup.py [--rounds N]

Prints what the installed plugin adds to ``pytest --version`` and to an ordinary suite, in ms of wall time and of
processor time, as medians of differences within a round, with alternating order; the time of ``llem --help``; and,
for the quickstart study, the time from the command to the first measured token, by its parts.

The plugin is installed as its users install it: from a wheel, into a folder of its own, compiled. Beside it there
is only pytest, as other plugins cost more than the difference to be measured.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

#: Bytecode is written once, as by default. Otherwise the plugin would be compiled at every start, and pytest would
#: not.
COMPILED = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}

#: Without other plugins.
ALONE = {**COMPILED, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "HF_HUB_OFFLINE": "1"}
PLUGIN = ("-p", "pytest_llem.plugin")

#: What a plain pytest consists of.
PYTEST = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")

SUITE = """\
import pytest

@pytest.mark.parametrize("one", range(100))
def test_it(one):
    pass
"""


def timed(command: Sequence[str], directory: Path, env: Mapping[str, str] = ALONE) -> tuple[float, float]:
    """Return wall time and processor time of *command*, in ms."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return 1000 * wall, 1000 * processor


def install(directory: Path) -> None:
    """Make a folder with plain pytest, and one with only the plugin."""
    plain, plugin = directory / "plain", directory / "plugin"
    plain.mkdir()
    for name in PYTEST:
        distribution = importlib.metadata.distribution(name)
        for part in {Path(str(file)).parts[0] for file in distribution.files or ()} - {".."}:
            (plain / part).symlink_to(str(distribution.locate_file(part)))
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(plugin), str(ROOT)]
    subprocess.run(command, check=True, env=COMPILED)


def added(name: str, arguments: Sequence[str], directory: Path, rounds: int) -> None:
    """Print what the plugin adds to a pytest command in *directory*, which *install* has filled."""
    command = [sys.executable, "-S", "-m", "pytest", *arguments]
    plain, plugin = directory / "plain", directory / "plugin"
    ways = [COMPILED | {"PYTHONPATH": os.pathsep.join(map(str, path))} for path in ([plain], [plain, plugin])]
    differences: list[tuple[float, float]] = []
    base: list[tuple[float, float]] = []
    for env in ways:
        timed(command, directory, env)  # pytest compiles plugins itself
    for number in range(rounds):
        took = {at: timed(command, directory, ways[at]) for at in ((0, 1) if number % 2 else (1, 0))}
        base.append(took[0])
        differences.append((took[1][0] - took[0][0], took[1][1] - took[0][1]))
    for at, what in enumerate(("wall time", "processor time")):
        low, middle, high = statistics.quantiles((one[at] for one in differences), n=4)
        without = statistics.median(one[at] for one in base)
        spread = f"half of them {low:+.1f} to {high:+.1f}"
        print(f"{name}, {what}: {without:.0f} ms, with the plugin {middle:+.1f} ms ({spread})")


def help_of_llem(rounds: int) -> None:
    """Print the time of ``llem --help``, and of starting Python."""
    python, ours = [], []
    for _ in range(rounds):
        python.append(timed([sys.executable, "-c", ""], ROOT)[0])
        ours.append(timed([str(BIN / "llem"), "--help"], ROOT)[0])
    middle, least, empty = statistics.median(ours), min(ours), statistics.median(python)
    print(f"llem --help: median {middle:.0f} ms, min {least:.0f} ms; an empty Python: median {empty:.0f} ms")


def first_token(rounds: int, start_method: str) -> None:
    """Print the parts of the time from the command to the first measured token, as medians."""
    parts: dict[str, list[float]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            began = time.time()
            study = str(ROOT / "studies" / "quickstart.yaml")
            first = ["-k", "cycle=1 and batch_size=8 and precision=bf16"]
            options = ["--llem-results-dir", folder, "--llem-start-method", start_method, "--rootdir", folder]
            timed([sys.executable, "-m", "pytest", study, *PLUGIN, *first, *options], ROOT)
            [file] = Path(folder).glob("*/experiments/*.json")
            result = json.loads(file.read_text())
            manifest = json.loads(next(Path(folder).glob("*/manifest.json")).read_text())
        [entry] = [one for one in manifest["experiments"] if one["status"] == "completed"]
        item, experiment = (datetime.fromisoformat(one["started_at"]).timestamp() for one in (entry, result))
        metrics = result["metrics"]
        found = {
            "pytest starts, collects, plans": item - began,
            "the experiment's process starts": experiment - item,
        }
        known = {
            "loading the model": metrics["load_seconds"]["value"],
            "warming up": result["warmup"]["seconds"],
            "first token of the window": metrics["ttft_p50_ms"]["value"] / 1000,
        }
        for name, seconds in (found | known).items():
            parts.setdefault(name, []).append(seconds)
    print(f"from the command to the first measured token, {start_method}:")
    for name, seconds in parts.items():
        print(f"  {name}: {statistics.median(seconds):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="four at least")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        (directory / "test_it.py").write_text(SUITE)
        install(directory)
        added("pytest --version", ["--version"], directory, options.rounds)
        added("a suite of 100 tests", ["test_it.py", "-q", "-p", "no:cacheprovider"], directory, options.rounds)
    help_of_llem(options.rounds)
    for method in ("spawn", "forkserver"):
        first_token(max(1, options.rounds // 4), method)


if __name__ == "__main__":
    main()
