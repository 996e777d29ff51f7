"""Preflight: reasons why an experiment cannot run, reported with the plan before anything starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from pytest_llem.hardware import gpus
from pytest_llem.hardware.gpus import Gpu
from pytest_llem.machine.device_request import DeviceRequest
from pytest_llem.planning import host
from pytest_llem.planning.host import GpuCapacity, Host
from pytest_llem.planning.preflight import Preflight
from pytest_llem.planning.runner_environment import how_to_install
from pytest_llem.study.engine_options import Needs
from pytest_llem.study.loading import load_study
from tests.conftest import Results, WriteStudy
from tests.support.environments import EVERYTHING, Environment

CPU = Host(memory_bytes=16 * 2**30)
OLD_GPU = Host(2**36, (GpuCapacity("Old GPU", 8 * 2**30, (7, 0)),))

MODEL = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def reasons(folder: Path, text: str, host: Host = CPU, model_path: tuple[Path, ...] = ()) -> list[str | None]:
    """Return preflight's reason for each point of a study."""
    file = folder / "study.yaml"
    file.write_text(text)
    study = load_study(file)
    preflight = Preflight(study, model_path, [folder], host)
    return [preflight.refusal(point) for point in study.points]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: builtin:tiny-llama", None),
        ("model: m\nbackend: tensorrt", "engine 'tensorrt' is not installed here (there are: "),
        ("model: m\nbackend: vllm", "engine 'vllm' needs vllm: pip install 'pytest-llem[vllm]'"),
        ("model: m\nbackend: nowhere.to_be:Found", "engine 'nowhere.to_be:Found': module 'nowhere' not found "),
        (
            "model: builtin:tiny-llama\nrunners: {pytorch: docker}",
            "runner 'docker' of engine 'pytorch': containers are not supported: name the Python ",
        ),
        ("model: builtin:tiny-llama\nrunners: {pytorch: local, vllm: docker}", None),
        ("model: builtin:other", "model 'builtin:other' not found: the only builtin is builtin:tiny-llama"),
        ("model: no/where", "model 'no/where' not found: no folder no/where; llem_model_path is not set; not in "),
        ("model: builtin:tiny-llama\ndataset: no.jsonl", "dataset 'no.jsonl'"),
        ("model: builtin:tiny-llama\ndataset: aienergyscore", "dataset 'AIEnergyScore/text_generation'"),
        ("model: builtin:tiny-llama\nlora: {adapter_id: a/b}", "lora"),
        ("model: builtin:tiny-llama\nmeasurement: {prefill_split: true}", None),
        ("model: builtin:tiny-llama\npytorch: {num_processes: 2}", "pytorch.num_processes"),
        ("model: builtin:tiny-llama\npytorch: {load_in_4bit: true}", "pytorch.load_in_4bit"),
        ("model: builtin:tiny-llama\nexecution: {skip_preflight: true}\npytorch: {num_processes: 2}", None),
        (
            "model: builtin:tiny-llama\nexecution: {skip_preflight: true}\nrunners: {pytorch: docker}",
            "runner 'docker'",  # without the container, results would differ
        ),
        (
            "model: builtin:tiny-llama\nrunners: {pytorch: 'docker:me/engine'}",
            "runner 'docker:me/engine' of engine 'pytorch': containers are not supported",
        ),
        (
            "model: builtin:tiny-llama\nrunners: {pytorch: no/python}",
            "runner 'no/python' of engine 'pytorch' does not exist: name a Python interpreter (in runners:",
        ),
        (
            "model: builtin:tiny-llama\nrunners: {pytorch: '~nobody-of-that-name/python'}",
            "runner '~nobody-of-that-name/python' of engine 'pytorch' does not exist",
        ),
        ("model: builtin:tiny-llama\nexecution: {skip_preflight: true}\nrunners: {pytorch: no/python}", None),
    ],
)
def test_preflight_reports_why_an_experiment_cannot_run(tmp_path: Path, text: str, reason: str | None) -> None:
    [found] = reasons(tmp_path, text)
    assert found is reason is None or (found or "").startswith(reason or "(nothing)")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with a package that this one does not have, in a folder with a space in its name."""
    assert find_spec("bitsandbytes") is None
    environment = Environment(tmp_path_factory.mktemp("an env") / "env", *EVERYTHING)
    environment.add("bitsandbytes", "0.1", bitsandbytes="")
    return environment


class TestAnotherInterpreter:
    """Checks of another interpreter; tests/test_runners.py tests how it is queried."""

    def test_packages_are_checked_in_the_runners_environment(self, tmp_path: Path, elsewhere: Environment) -> None:
        text = "model: builtin:tiny-llama\nsweep: {pytorch.load_in_4bit: [false, true]}"
        [plain, quantized] = reasons(tmp_path, text)
        assert plain is None
        assert quantized == "pytorch.load_in_4bit needs bitsandbytes: pip install bitsandbytes"
        with_runner = f"{text}\nrunners: {{pytorch: '{elsewhere.python}'}}"
        assert reasons(tmp_path, with_runner) == [None, None]

    @pytest.mark.parametrize("written", ["absolute", "relative", "home"])
    def test_missing_package_is_reported_with_a_working_pip_command(
        self, tmp_path: Path, elsewhere: Environment, monkeypatch: pytest.MonkeyPatch, written: str
    ) -> None:
        (tmp_path / "studies").mkdir()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(elsewhere.folder.parent))
        runner, command = {
            "absolute": (str(elsewhere.python), f"'{elsewhere.python}'"),
            "relative": (
                os.path.relpath(elsewhere.python, tmp_path / "studies"),
                f"'{os.path.relpath(elsewhere.python)}'",
            ),
            "home": ("~/env/bin/python", "~/env/bin/python"),
        }[written]
        text = (
            "model: builtin:tiny-llama\npytorch: {attn_implementation: flash_attention_3}\n"
            f"runners: {{pytorch: '{runner}'}}"
        )
        [message] = reasons(tmp_path / "studies", text)
        assert message == (
            "pytorch.attn_implementation 'flash_attention_3' needs flash-attn-3 or kernels: "
            f"{command} -m pip install flash-attn-3"
        )
        python = message.partition("kernels: ")[2].partition(" -m pip")[0]
        done = subprocess.run(["sh", "-c", f"{python} -c 'print(7)'"], capture_output=True, check=True)
        assert done.stdout == b"7\n"

    def test_a_runner_is_relative_to_the_study(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "python").symlink_to(sys.executable)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(
            "pytest_llem.planning.study_engines.check_runner_environment",
            lambda there, engine, pip: f"needs: {pip}",
        )
        assert reasons(tmp_path, "model: m\nrunners: {pytorch: python}") == [
            "runner 'python' of engine 'pytorch' needs: ./python -m pip"
        ]

    def test_a_runner_with_another_version_of_pytest_llem_is_refused(self, tmp_path: Path) -> None:
        environment = Environment(tmp_path / "env", *EVERYTHING)
        environment.add("pytest-llem", "0.0.7")
        text = "model: m\nbackend: [pytorch, vllm]\nrunners: {pytorch: env/bin/python, vllm: env/bin/python}"
        ours = version("pytest-llem")
        command = f"{os.path.relpath(environment.python)} -m pip install pytest-llem=={ours}"
        assert reasons(tmp_path, text) == [
            f"runner 'env/bin/python' of engine '{name}' has pytest-llem 0.0.7, and {ours} runs here: {command}"
            for name in ("pytorch", "vllm")
        ]

    def test_engine_missing_in_the_runner_is_reported(self, tmp_path: Path, elsewhere: Environment) -> None:
        text = (
            f"model: m\nbackend: [tensorrt, mine]\n"
            f"runners: {{tensorrt: '{elsewhere.python}', mine: '{elsewhere.python}'}}"
        )
        message = "has no engine of that name (there are: noop, pytorch, server, vllm): "
        assert reasons(tmp_path, text) == [
            f"runner '{elsewhere.python}' of engine '{name}' {message}{how_to_install(name)}"
            for name in ("tensorrt", "mine")
        ]

    def test_class_is_searched_in_the_runner_and_next_to_the_study(
        self, tmp_path: Path, elsewhere: Environment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "mine.py").write_text("raise AssertionError('imported')")
        (tmp_path / "only_here").mkdir()
        (tmp_path / "only_here" / "hidden.py").touch()
        monkeypatch.syspath_prepend(tmp_path / "only_here")
        names = ["mine:Engine", "bitsandbytes:Engine", "hidden:Engine"]
        text = f"model: m\nsweep: {{backend: {json.dumps(names)}}}"
        in_module = "there is no 'Engine' in"
        hidden = tmp_path / "only_here" / "hidden.py"
        assert reasons(tmp_path, text)[2] == f"engine 'hidden:Engine' cannot be used: {in_module} {hidden}"
        with_runner = f"{text}\nrunners: {json.dumps(dict.fromkeys(names, str(elsewhere.python)))}"
        where = f"cannot be used with {elsewhere.python}"
        assert reasons(tmp_path, with_runner) == [
            f"engine 'mine:Engine' {where}: mine raises AssertionError: imported",
            f"engine 'bitsandbytes:Engine' {where}: {in_module} {elsewhere.site_packages}/bitsandbytes.py",
            "engine 'hidden:Engine': module 'hidden' not found (add its folder to the ini option pythonpath)",
        ]

    def test_gpus_are_those_that_the_runners_torch_supports(
        self, tmp_path: Path, elsewhere: Environment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The torch of the runner counts, not the one of this environment."""
        environment = Environment(tmp_path / "env", *EVERYTHING)
        environment.add("torch", "2.99.0+cu130")
        found = tuple(Gpu("GPU-0", gpu.name, gpu.memory_bytes, gpu.capability) for gpu in OLD_GPU.gpus)
        monkeypatch.setattr(gpus, "visible_gpus", lambda: gpus.VisibleGpus(found))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        host.host_for.cache_clear()
        text = "model: builtin:tiny-llama"
        try:
            for torch, expected in (("2.99.0+cu130", OLD_GPU.gpus), ("2.99.0+cpu", ())):
                monkeypatch.setattr(host, "package_version", lambda name, torch=torch: torch)
                (tmp_path / "study.yaml").write_text(text)
                study = load_study(tmp_path / "study.yaml")
                assert Preflight(study, (), []).host_of(study.points[0].config).gpus == expected
                (tmp_path / "study.yaml").write_text(f"{text}\nrunners: {{pytorch: env/bin/python}}")
                study = load_study(tmp_path / "study.yaml")
                assert Preflight(study, (), []).host_of(study.points[0].config).gpus == OLD_GPU.gpus
        finally:
            host.host_for.cache_clear()


def test_unprintable_characters_are_escaped(tmp_path: Path) -> None:
    [found] = reasons(tmp_path, 'model: "a\\nb\\e[31m"')
    assert found
    assert found.isprintable()
    assert "a\\nb\\x1b[31m" in found


def test_named_pipe_as_dataset_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.txt")
    assert reasons(tmp_path, "model: builtin:tiny-llama\ndataset: p.txt") == ["dataset 'p.txt' is not a file"]


def test_user_defined_engine_is_not_imported_in_this_process(tmp_path: Path) -> None:
    (tmp_path / "my_engine.py").write_text("raise AssertionError('imported')")
    assert reasons(tmp_path, "model: m\nbackend: my_engine:Engine") == [
        "engine 'my_engine:Engine' cannot be used: my_engine raises AssertionError: imported"
    ]
    assert "my_engine" not in sys.modules


def test_several_reasons_are_reported_at_once(tmp_path: Path) -> None:
    [found] = reasons(tmp_path, "model: no/where\nlora: {adapter_id: a/b}\ndataset: no.txt")
    assert found
    assert [word in found for word in ("lora", "no.txt", "no/where")] == [True] * 3


def test_precision_that_the_gpu_does_not_support_is_reported(tmp_path: Path) -> None:
    study = "model: builtin:tiny-llama\nsweep: {precision: [bf16, fp16]}"
    assert reasons(tmp_path, study, OLD_GPU) == [
        "Old GPU does not support bf16: use precision: fp16 or fp32",
        None,
    ]
    assert reasons(tmp_path, study) == [None, None]


def test_engine_without_gpus_is_checked_against_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(MODEL))
    monkeypatch.setattr(Preflight, "needs", lambda preflight, config: Needs(gpus=0, resolves_model=True))
    host = replace(OLD_GPU, memory_bytes=200 * 2**30)
    assert reasons(tmp_path, "model: big\nsweep: {precision: [bf16, fp32]}", host, model_path=(tmp_path,)) == [
        None,
        "model 'big' needs 263 GiB in fp32 and this machine has 200 GiB of memory",
    ]


@pytest.mark.parametrize(
    ("count", "reason"),
    [
        (1, "model 'big' needs 131 GiB in bf16 and small has 120 GiB of memory"),
        (2, None),
        (3, "model 'big' needs 131 GiB in bf16 and 3 × slow have 30 GiB of memory"),
    ],
)
def test_model_is_compared_with_the_gpus_that_are_leased(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, reason: str | None
) -> None:
    """The first kind of which there are enough is leased, even if another has more memory."""
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(MODEL))
    monkeypatch.setattr(Preflight, "needs", lambda preflight, config: Needs(gpus=count, resolves_model=True))
    monkeypatch.setattr(Preflight, "request", lambda preflight, config: DeviceRequest())
    kinds = [("small", 120, 1), ("large", 200, 2), ("slow", 10, 3)]
    gpus = [GpuCapacity(name, size * 2**30, (9, 0)) for name, size, number in kinds for _ in range(number)]
    host = Host(2**36, tuple(gpus))
    assert reasons(tmp_path, "model: big", host, model_path=(tmp_path,)) == [reason]


def test_model_larger_than_the_memory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(MODEL))
    study = "model: big\nsweep: {precision: [bf16, fp32]}"
    found = reasons(tmp_path, study, model_path=(tmp_path,))
    assert found == [
        "model 'big' needs 131 GiB in bf16 and this machine has 16 GiB of memory",
        "model 'big' needs 263 GiB in fp32 and this machine has 16 GiB of memory",
    ]
    assert reasons(tmp_path, study, Host(2**38), model_path=(tmp_path,)) == [
        None,
        "model 'big' needs 263 GiB in fp32 and this machine has 256 GiB of memory",
    ]


def test_failing_preflight_is_in_the_plan_and_other_points_run(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    write_study(
        backend=None,
        experiments=[
            {"backend": "noop", "n": 2},
            {"backend": "tensorrt", "n": 3},
            {"backend": "tensorrt", "n": 4},
        ],
        sweep=None,
        execution={"n_cycles": 1},
    )
    result = pytester.runpytest("study.yaml", "-p", "llem")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "llem: noop *",
            "  preflight, will fail: backend=tensorrt-n=? and 1 more: engine 'tensorrt' is not installed here (*",
            "preflight: engine 'tensorrt' is not installed here (there are: *",
        ]
    )
    assert results.statuses() == {
        "backend=noop-n=2": "completed",
        "backend=tensorrt-n=3": "failed",
        "backend=tensorrt-n=4": "failed",
    }
    error = results.manifest["experiments"][-1]["error"] or results.manifest["experiments"][0]["error"]
    assert error["kind"] == "preflight"


@pytest.mark.slow
def test_xdist_workers_preflight_too(pytester: pytest.Pytester, write_study: WriteStudy, results: Results) -> None:
    write_study(runners={"noop": "docker"}, sweep={"n": [1, 2]}, execution={"n_cycles": 1})
    result = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "-n", "2")
    result.assert_outcomes(failed=2)
    assert {entry["error"]["kind"] for entry in results.manifest["experiments"]} == {"preflight"}


def test_no_gap_before_an_experiment_that_fails_preflight(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    write_study(
        runners={"noop": "docker"},
        sweep={"n": [1, 2, 3]},
        execution={"n_cycles": 1, "experiment_gap_seconds": 3600},
    )
    pytester.runpytest("study.yaml", "-p", "llem").assert_outcomes(failed=3)


def test_only_selected_experiments_are_checked(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(backend=None, sweep={"backend": ["noop", "tensorrt"]}, execution={"n_cycles": 1})
    result = pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", "-k", "backend=noop")
    result.stdout.no_fnmatch_line("*preflight*")
