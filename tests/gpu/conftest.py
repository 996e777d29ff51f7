from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import filelock
import pytest
import yaml

from pytest_llem import StudyResult, run_study
from pytest_llem.hardware.gpus import Gpu, visible_gpus
from tests.support.weights import cache


@pytest.fixture(scope="session", autouse=True)
def gpu() -> Gpu:
    """CUDA's device 0."""
    gpu = visible_gpus().first
    if gpu is None:
        pytest.skip("no NVIDIA GPU here")
    return gpu


@pytest.fixture
def found(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Record a value with its name in the JUnit report, and print it at once: a time limit may end the test."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    def note(what: str, value: object) -> None:
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        request.node.user_properties.append((what, shown))  # record_property warns of xunit2
        with capture.global_and_fixture_disabled():
            print(f"\n{request.node.name}: {what}: {shown}", end="", flush=True)

    return note


def _call(function: str, *arguments: Any) -> Any:
    from tests.gpu import loads  # not at the top: it imports torch

    return getattr(loads, function)(*arguments)


@pytest.fixture(scope="module")
def on_gpu(gpu: Gpu) -> Iterator[Callable[..., Any]]:
    """Call a function of ``loads`` by its name, in a process of its own: pytest's process never uses the GPU."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(_call, function, gpu.uuid, *arguments).result()


def _model(shape: str, *options: str) -> Path:
    folder = cache() / f"shape-{shape}-{'shape' if options else 'random'}"
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            made = [sys.executable, "-m", "tests.gpu.shapes", shape, str(folder), *options]
            subprocess.run(made, cwd=Path(__file__).parents[2], check=True)
    return folder


@pytest.fixture(scope="session")
def llama_1b() -> Path:
    """A folder with a model of the shape of Llama 3.2 1B, in bf16."""
    return _model("1b")


@pytest.fixture(scope="session")
def llama_8b() -> Path:
    """A folder with a model of the shape of Llama 3.1 8B, in bf16."""
    return _model("8b")


@pytest.fixture(scope="session")
def llama_1b_shape() -> Path:
    """The shape of Llama 3.2 1B without weights, for vLLM's ``load_format: dummy``."""
    return _model("1b", "--no-weights")


@pytest.fixture(scope="session")
def llama_8b_shape() -> Path:
    """That of Llama 3.1 8B."""
    return _model("8b", "--no-weights")


@pytest.fixture(scope="session")
def qwen_14b_shape() -> Path:
    """That of Qwen3 14B."""
    return _model("14b", "--no-weights")


@pytest.fixture(scope="session")
def llama_70b_shape() -> Path:
    """That of Llama 3.1 70B."""
    return _model("70b", "--no-weights")


@pytest.fixture
def study(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., StudyResult]:
    """Run a study, given by its fields, and return its result. *args* are options of pytest.

    Its processes start as ``--llem-start-method`` says, as those of ``isolated_experiment`` do.
    """
    monkeypatch.chdir(tmp_path)
    given = request.config.getoption("llem_start_method")
    start = [f"--llem-start-method={given}"] if given else []

    def run(name: str, *args: str, **fields: Any) -> StudyResult:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, **fields}, sort_keys=False))
        return run_study(path, pytest_args=[f"--rootdir={tmp_path}", *start, *args])

    return run


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch, _offline: None) -> None:
    """Do not limit the CPU threads: the host's CPUs determine how fast kernels are launched."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
