"""What keeps an experiment from running: found out before it starts, told with the plan, and failed at once."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from pytest_llem.planning.host import Gpu, Host
from pytest_llem.planning.preflight import Preflight
from pytest_llem.study.loading import load_study

CPU = Host(memory_bytes=16 * 2**30)
OLD_GPU = Host(2**36, (Gpu("Old GPU", 8 * 2**30, (7, 0)),))

MODEL = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def reasons(folder: Path, text: str, host: Host = CPU, model_path: tuple[Path, ...] = ()) -> list[str | None]:
    """Return what preflight says of each point of a study."""
    file = folder / "study.yaml"
    file.write_text(text)
    study = load_study(file)
    preflight = Preflight(study, model_path, folder, host)
    return [preflight.reason(point) for point in study.points]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model: builtin:tiny-llama", None),
        ("model: m\nbackend: vllm", "engine 'vllm' is not installed here (there are: "),
        ("model: m\nbackend: nowhere.to_be:Found", "engine 'nowhere.to_be:Found': no module 'nowhere' is to be "),
        (
            "model: builtin:tiny-llama\nrunners: {pytorch: docker}",
            "runner 'docker' of engine 'pytorch' is not supported yet, only 'local' is",
        ),
        ("model: builtin:tiny-llama\nrunners: {pytorch: local, vllm: docker}", None),
        ("model: builtin:other", "model 'builtin:other' not found: the only builtin is builtin:tiny-llama"),
        ("model: no/where", "model 'no/where' not found: no folder no/where; llem_model_path is not set; not in "),
        ("model: builtin:tiny-llama\ndataset: no.jsonl", "dataset 'no.jsonl'"),
        ("model: builtin:tiny-llama\ndataset: aienergyscore", "dataset 'aienergyscore'"),
        ("model: builtin:tiny-llama\nlora: {adapter_id: a/b}", "lora"),
        ("model: builtin:tiny-llama\nmeasurement: {prefill_split: true}", "measurement.prefill_split"),
        ("model: builtin:tiny-llama\npytorch: {num_processes: 2}", "pytorch.num_processes"),
        ("model: builtin:tiny-llama\npytorch: {load_in_4bit: true}", "pytorch.load_in_4bit"),
        ("model: builtin:tiny-llama\nexecution: {skip_preflight: true}\npytorch: {num_processes: 2}", None),
        (
            "model: builtin:tiny-llama\nexecution: {skip_preflight: true}\nrunners: {pytorch: docker}",
            "runner 'docker'",  # it would run here, and measure something else
        ),
    ],
)
def test_reasons(tmp_path, text, reason):
    [found] = reasons(tmp_path, text)
    assert found is reason is None or (found or "").startswith(reason or "(nothing)")


def test_what_no_terminal_should_get_is_spelt_out(tmp_path):
    [found] = reasons(tmp_path, 'model: "a\\nb\\e[31m"')
    assert found
    assert found.isprintable()
    assert "a\\nb\\x1b[31m" in found


def test_a_pipe_is_no_dataset_and_nobody_waits_for_it(tmp_path):
    os.mkfifo(tmp_path / "p.txt")
    assert reasons(tmp_path, "model: builtin:tiny-llama\ndataset: p.txt") == ["dataset 'p.txt' is no file"]


def test_an_engine_of_ones_own_is_looked_for_and_not_imported(tmp_path):
    (tmp_path / "my_engine.py").write_text("raise AssertionError('imported')")
    assert reasons(tmp_path, "model: m\nbackend: my_engine:Engine") == [None]


def test_several_reasons_are_told_at_once(tmp_path):
    [found] = reasons(tmp_path, "model: no/where\nlora: {adapter_id: a/b}\ndataset: no.txt")
    assert [word in found for word in ("lora", "no.txt", "no/where")] == [True] * 3


def test_a_precision_that_the_gpu_lacks(tmp_path):
    study = "model: builtin:tiny-llama\nsweep: {precision: [bf16, fp16]}"
    assert reasons(tmp_path, study, OLD_GPU) == [
        "Old GPU computes no bf16: use precision: fp16 or fp32",
        None,
    ]
    assert reasons(tmp_path, study) == [None, None]


def test_memory_that_the_device_lacks(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(MODEL))
    study = "model: big\nsweep: {precision: [bf16, fp32]}"
    found = reasons(tmp_path, study, model_path=(tmp_path,))
    assert found == [
        "model 'big' needs 131 GiB in bf16 and this machine has 16 GiB of memory",
        "model 'big' needs 263 GiB in fp32 and this machine has 16 GiB of memory",
    ]
    assert reasons(tmp_path, study, Host(2**38), model_path=(tmp_path,)) == [None, found[1].replace("16", "256")]


def test_it_is_announced_and_the_others_run(pytester, write_study, results):
    write_study(
        backend=None,
        experiments=[
            {"backend": "noop", "n": 2},
            {"backend": "vllm", "n": 3},
            {"backend": "vllm", "n": 4},
        ],
        sweep=None,
        execution={"n_cycles": 1},
    )
    result = pytester.runpytest_subprocess("study.yaml", "-p", "llem")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "llem: noop *",
            "  preflight, will fail: backend=vllm-n=3 and 1 more: engine 'vllm' is not installed here (*",
            "preflight: engine 'vllm' is not installed here (there are: *",
        ]
    )
    assert results.statuses() == {
        "backend=noop-n=2": "completed",
        "backend=vllm-n=3": "failed",
        "backend=vllm-n=4": "failed",
    }
    error = results.manifest["experiments"][-1]["error"] or results.manifest["experiments"][0]["error"]
    assert error["kind"] == "preflight"


@pytest.mark.parametrize("workers", [["-n", "2"]])
def test_workers_look_for_themselves(pytester, write_study, results, workers):
    write_study(runners={"noop": "docker"}, sweep={"n": [1, 2]}, execution={"n_cycles": 1})
    result = pytester.runpytest_subprocess("study.yaml", "-p", "llem", *workers)
    result.assert_outcomes(failed=2)
    assert {entry["error"]["kind"] for entry in results.manifest["experiments"]} == {"preflight"}


def test_what_is_not_started_is_not_waited_for(pytester, write_study, results):
    write_study(
        runners={"noop": "docker"},
        sweep={"n": [1, 2, 3]},
        execution={"n_cycles": 1, "experiment_gap_seconds": 600},
    )
    pytester.runpytest_subprocess("study.yaml", "-p", "llem", timeout=120).assert_outcomes(failed=3)


def test_only_what_is_selected_is_looked_at(pytester, write_study):
    write_study(backend=None, sweep={"backend": ["noop", "vllm"]}, execution={"n_cycles": 1})
    result = pytester.runpytest("study.yaml", "-p", "llem", "--collect-only", "-k", "backend=noop")
    result.stdout.no_fnmatch_line("*preflight*")
