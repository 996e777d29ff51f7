"""Make results directories for report pages: of a real run, enlarged, or with a text in every string."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from pytest_llem.results.manifest_records import Manifest, ManifestEntry
from pytest_llem.results.points import PointResult
from pytest_llem.results.study_result import StudyResult, StudySummary, build_study_result
from pytest_llem.times import now
from tests.conftest import FORKSERVER, NOOP_ENGINE, NOOP_STUDY, OTHER_PLUGINS
from tests.support import nvml

GPU = "GPU-report"

#: Keys whose values a reader of a StudyResult validates.
_CHECKED = {"status", "kind", "outcome", "verdict", "gate", "schema_version", "result_file", "result_sha256"}
_CHECKED |= {"config_hash", "method", "severity", "unit"}


def run(directory: Path, library: Path, *arguments: str) -> Path:
    """Run a small study, one of whose points fails, on a scripted GPU, and return its results directory."""
    steps = [(0.4 * step, 240.0 + (37 * step) % 90) for step in range(32)]
    gpu = nvml.ScriptedGpu(GPU, steps, {"tick_ms": 20, "power_limit_w": 700, "memory_mb": 80_000})
    script = nvml.Script(directory / "script", [gpu])
    script.write()
    study = {
        **NOOP_STUDY,
        "name": "boards",
        "n": 6,
        "energy": {"backend": "nvml"},
        "measurement": {"min_window_seconds": 0.5},
        "baseline": {"enabled": False},
        "noop": {"gpu": GPU, "seconds": 0.05, "first_seconds": 0.02},
        "sweep": {"precision": ["bf16", "fp32"], "noop.size": [1, 3]},
        "experiments": [{"precision": "fp16", "noop": {"gpu": GPU, "fault": "raise"}}],
        "execution": {"n_cycles": 2, "experiment_gap_seconds": 0},
        "budgets": {"energy_per_output_token_j": 3, "seconds": 0.001},
    }
    (directory / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    paths = os.pathsep.join(filter(None, [str(NOOP_ENGINE), os.environ.get("PYTHONPATH")]))
    options = [FORKSERVER, *(word for name in OTHER_PLUGINS for word in ("-p", f"no:{name}"))]
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", "--rootdir", str(directory), *options]
    # Separate device locks, and no annotations for the CI in which the tests run.
    own = {"PYTHONPATH": paths, "PYTEST_ADDOPTS": "", "TMPDIR": str(directory)}
    environment = nvml.environment(library, script) | own
    environment.pop("GITHUB_ACTIONS", None)
    done = subprocess.run(
        [*command, "--llem-run-id", "one", *arguments],
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return directory / "results" / "boards_one"


def grown(real: Path, directory: Path, points: int, cycles: int) -> StudyResult:
    """Write a study of many points, copied from a real one with random variation, and return its result."""
    source = min(real.glob("experiments/*.power.csv"))
    stem = source.with_name(source.name.removesuffix(".power.csv"))
    given = json.loads(stem.with_name(f"{stem.name}.json").read_text())
    files = {
        suffix: stem.with_name(f"{stem.name}.{suffix}").read_bytes() for suffix in ("requests.csv", "power.csv")
    }
    chance = random.Random(7)
    (directory / "experiments").mkdir(parents=True)
    sizes = [2**n for n in range(-(-points // 8))]
    grid = [
        {"precision": precision, "max_output_tokens": length, "noop.size": size}
        for precision, length, size in itertools.product(("bf16", "fp32"), (16, 64, 256, 1024), sizes)
    ][:points]
    entries = [
        _experiment(directory, given, files, index, axes, cycle, chance)
        for cycle in range(1, cycles + 1)
        for index, axes in enumerate(grid)
    ]
    about = {"pytest_llem_version": "0.1.0", "study_design_hash": "0" * 16}
    manifest = Manifest(
        **about,
        study_name="grown",
        status="completed",
        started_at=now(),
        total_experiments=len(entries),
        environment=given["environment"],
        experiments=entries,
    )
    design = StudyResult(
        **about,
        name="grown",
        status="completed",
        started_at=now(),
        summary=StudySummary(total=0, completed=0, failed=0, wall_seconds=0),
        points=[
            PointResult(
                id="-".join(f"{axis.rpartition('.')[2]}={value}" for axis, value in axes.items()),
                axes=axes,
                config=given["effective_config"],
                config_hash=f"{index:016x}",
                metrics={},
            )
            for index, axes in enumerate(grid)
        ],
    )
    result = build_study_result(design, manifest, directory)
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    (directory / "study_result.json").write_text(result.model_dump_json())
    shutil.copy(real / "study.yaml", directory)
    return result


def _experiment(
    directory: Path,
    given: dict[str, Any],
    files: dict[str, bytes],
    index: int,
    axes: dict[str, Any],
    cycle: int,
    chance: random.Random,
) -> ManifestEntry:
    """Write the result of one cycle of a point, and the files beside it."""
    factor = axes["noop.size"] ** 0.3 * chance.lognormvariate(0, 0.05)
    metrics = {
        name: {**one, "value": one["value"] and one["value"] * factor * chance.lognormvariate(0, 0.02)}
        for name, one in given["metrics"].items()
    }
    identity = {"experiment_id": f"{index}-cycle={cycle}", "config_hash": f"{index:016x}", "cycle": cycle}
    text = json.dumps({**given, "identity": identity, "metrics": metrics}).encode()
    stem = f"experiments/{index:016x}-c{cycle}"
    (directory / f"{stem}.json").write_bytes(text)
    for suffix, content in files.items():
        (directory / f"{stem}.{suffix}").write_bytes(content)
    return ManifestEntry(
        experiment_id=identity["experiment_id"],
        config_hash=identity["config_hash"],
        config_summary=str(index),
        cycle=cycle,
        status="completed",
        result_file=f"{stem}.json",
        result_sha256=hashlib.sha256(text).hexdigest(),
        started_at=f"2026-11-25T{cycle:02}:{index // 60:02}:{index % 60:02}.000Z",
        completed_at=now(),
        attempt=1,
    )


def infected(real: Path, directory: Path, text: str) -> Path:
    """Copy a results directory with *text* in every string that others can choose, and return the copy."""
    shutil.copytree(real, directory)
    for file in directory.glob("experiments/*.json"):
        given = json.loads(file.read_text())
        gap = {**_with(given["gap"], text), "reason": given["gap"]["reason"]}
        file.write_text(json.dumps({**_with(given, text), "gap": gap}))
    for file in directory.glob("experiments/*.power.csv"):
        quoted = '"' + (GPU + text).replace('"', '""') + '"'
        file.write_text(file.read_text().replace(GPU, quoted))
    result = _with(json.loads((directory / "study_result.json").read_text()), text)
    for entry in result["experiments"]:
        if entry["result_file"]:
            content = (directory / entry["result_file"]).read_bytes()
            entry["result_sha256"] = hashlib.sha256(content).hexdigest()
    result["warnings"].append({"code": f"code{text}", "severity": "note", "text": f"warned{text}"})
    result["environment"]["git"] = {"commit": f"commit{text}", f"key{text}": text}
    result["excluded"] = [{"axes": {f"axis{text}": text}, "reason": f"left out{text}"}]
    lines = {name: [f"{name}{text}"] for name in ("testbed", "warnings", "sut", "new_points", "missing_points")}
    result["comparison"] = {"reference": f"main{text}", "alpha": 0.01, "family": 1, **lines}
    (directory / "study_result.json").write_text(json.dumps(result))
    study = directory / "study.yaml"
    study.write_text(f"# {text}\n{study.read_text()}")
    (directory / "study.base.yaml").write_text(f"# {text}\n")
    return directory


def _with(data: Any, text: str, key: str = "") -> Any:
    """Return plain data with *text* appended to all strings, except those that a reader validates."""
    if isinstance(data, dict):
        return {name: _with(one, text, name) for name, one in data.items()}
    if isinstance(data, list):
        return [_with(one, text, key) for one in data]
    plain = not isinstance(data, str) or key in _CHECKED or key.endswith("_at")
    return data if plain else f"{data}{text}"
