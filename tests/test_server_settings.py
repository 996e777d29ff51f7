"""Settings of a study that do not reach its server: they are errors where they are set, and null in results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_llem.engines.protocol import EngineContext
from pytest_llem.planning.preflight import Preflight
from pytest_llem.results.serving import ServerRecord
from pytest_llem.serving.engine import ServerEngine
from pytest_llem.study.engine_options import Needs
from pytest_llem.study.loading import load_study
from pytest_llem.study.problems import StudyError
from pytest_llem.study.server_command import server_command
from tests.conftest import Results, RunPytest
from tests.support.load_studies import patient, result_of, write_load_study

PORT = "{port}"


def reason(folder: Path, **study: Any) -> str:
    """Return why the study's experiment cannot run, after the study's path."""
    (folder / "prompts.txt").write_text("one prompt\nanother prompt\n")
    loaded = load_study(write_load_study(folder, **study))
    found = Preflight(loaded, (), []).refusal(loaded.points[0])
    assert found is not None
    return found.replace(f"{folder}/study.yaml", "study.yaml")


@pytest.mark.parametrize(
    ("study", "expected"),
    [
        ({"precision": "fp16"}, "28:1: precision: does not reach the server: its command has no {precision}"),
        (
            {"model": "m"},
            "1: model: does not reach the server: its command has no {model}: leave model out, or add",
        ),
        ({"server": {"command": ["x", "{model}", PORT]}}, "server: the command takes {model}: give model in the"),
        ({"decoder": {"top_k": 5}}, "29:3: decoder.top_k: not every server takes it: give server.preset if yours"),
        ({"decoder": {"preset": "creative"}}, "decoder.repetition_penalty: not every server takes it"),
        ({"passthrough_kwargs": {"seed": 1}}, "28:1: passthrough_kwargs: engine 'server' does not read them"),
        ({"warmup": {"max_prompts": 9}}, "warmup.max_prompts: the ramp-up goes on until the load is steady"),
        ({"measurement": {"prefill_split": True}}, "leave measurement.prefill_split out"),
        (
            {"server": {"args": {"seats": 2}}},
            "server: args: 'seats' does not reach the server: its command has no {seats}: leave seats out",
        ),
        (
            {"model": "m", "server": {"preset": "vllm", "command": None, "args": {"dtype": "half"}}},
            "server: args: 'dtype' is in the command of preset 'vllm' already, with model and precision of the",
        ),
        ({"server": {"command": ["x", "{prt}", PORT]}}, "command[1]: unknown placeholder '{prt}' (did you mean"),
        (
            {"server": {"command": ["x", "{model_name}", PORT]}},
            "'{model_name}' has no value: server.model_name",
        ),
        ({"server": {"command": ["x"]}}, "server: command: needs the placeholder {port}: each server gets a port"),
        ({"load": {"trace": "no.txt"}}, "/no.txt' cannot be read: No such file or directory"),
        (
            {"server": {"api": "chat"}},
            "api 'chat' sends texts, and synthetic prompts are token ids: use a",
        ),
        (
            {"server": {"api": "chat", "command": ["x", "{model}", PORT]}},
            "use a dataset of texts; the command takes {model}: give model in the study",
        ),
    ],
)
def test_setting_without_effect_on_a_server_is_an_error(tmp_path: Path, study: Any, expected: str) -> None:
    assert expected in reason(tmp_path, **study)


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ({}, "load: needs exactly one of concurrency, rate and trace"),
        ({"concurrency": 1, "rate": 2}, "load: needs exactly one of concurrency, rate and trace"),
        ({"concurrency": "auto"}, "concurrency 'auto' searches for the largest load within the SLO, and needs an"),
        ({"concurrency": 1, "arrival": "constant"}, "load: arrival 'constant' needs a rate"),
        ({"concurrency": 1, "max_in_flight": 9}, "max_in_flight needs a rate or a trace: with concurrency, that"),
        ({"rate": 2, "search": {"high": 8}}, "load: search needs concurrency or rate: auto"),
        (
            {"concurrency": "auto", "slo": {"ttft_ms": 9}, "search": {"low": 1.5}},
            "load: search.low and search.high must be whole numbers of requests for concurrency: auto",
        ),
    ],
)
def test_contradictory_load_is_an_error(tmp_path: Path, load: Any, expected: str) -> None:
    with pytest.raises(StudyError, match=re.escape(expected)):
        load_study(write_load_study(tmp_path, load=load))


@pytest.mark.parametrize(
    ("study", "expected"),
    [
        ({}, "4:1: max_input_tokens: a server gets texts whole"),
        (
            {"max_input_tokens": None},
            "vocab_size: has no effect: only synthetic prompts are drawn from",
        ),
        ({"dataset_order": "shuffled"}, "dataset_order: a server gets the texts in their order"),
        ({"prompt_format": "chat"}, "a server applies its own chat template: use server.api: chat"),
    ],
)
def test_setting_without_effect_on_texts_is_an_error(tmp_path: Path, study: Any, expected: str) -> None:
    assert expected in reason(tmp_path, dataset="prompts.txt", **study)


@pytest.mark.parametrize(
    ("study", "expected"),
    [
        ({"precision": "fp16"}, "precision: does not reach a server that already runs"),
        ({"server": {"args": {"seats": 2}}}, "args needs a server that is started, and with url it runs already"),
        ({"server": {"env": {"A": "1"}}}, "env needs a server that is started, and with url it runs already"),
        ({"server": {"stop": {"grace_seconds": 1}}}, "stop needs a server that is started, and with url it runs"),
        ({"server": {"gpus": 2}}, "gpus as a number need a server that is started: with url, list their UUIDs"),
    ],
)
def test_setting_of_the_start_of_a_running_server_is_an_error(tmp_path: Path, study: Any, expected: str) -> None:
    attached = {"command": None, "url": "http://127.0.0.1:9", **study.pop("server", {})}
    try:
        found = reason(tmp_path, server=attached, **study)
    except StudyError as error:
        found = str(error)
    assert expected in found


def test_axis_that_does_not_reach_the_server_is_an_error(tmp_path: Path) -> None:
    assert "precision: does not reach" in reason(tmp_path, sweep={"precision": ["bf16", "fp16"]})


def test_preset_sends_what_every_server_of_its_kind_takes(tmp_path: Path) -> None:
    server = {"preset": "vllm"}
    study = load_study(write_load_study(tmp_path, server=server, decoder={"top_k": 5, "repetition_penalty": 1.1}))
    assert Preflight(study, (), []).refusal(study.points[0]) is None


def preset_needs(folder: Path, preset: str, args: dict[str, Any]) -> Needs:
    server = {"preset": preset, "command": None, "args": args}
    config = load_study(write_load_study(folder, model="m", server=server)).points[0].config
    assert config.server is not None
    return config.server.needs(config, None)


@pytest.mark.parametrize(
    ("preset", "args", "gpus"),
    [
        ("vllm", {"tensor_parallel_size": 2, "data_parallel_size": 3}, 6),
        ("vllm", {"tensor-parallel-size": 2, "pipeline-parallel-size": "2"}, 4),
        ("sglang", {"tp": 2, "pp_size": 2, "dp": 2}, 8),
        ("sglang", {"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "data_parallel_size": 2}, 8),
        ("sglang", {"tp-size": 4, "dp-size": 2}, 8),
        ("sglang", {"tp-size": 4, "dp-size": 2, "enable-dp-attention": True}, 4),
        ("llama.cpp", {"parallel": 4}, 1),
    ],
)
def test_parallel_sizes_of_presets_are_the_number_of_gpus(
    tmp_path: Path, preset: str, args: dict[str, Any], gpus: int
) -> None:
    assert preset_needs(tmp_path, preset, args).gpus == gpus


@pytest.mark.parametrize(
    ("preset", "args", "share"),
    [
        ("vllm", {"gpu-memory-utilization": 0.5}, 0.5),
        ("vllm", {"kv-cache-memory-bytes": 1}, None),
        ("vllm", {"kv_cache_memory_bytes": None, "gpu_memory_utilization": None}, 0.9),
        ("sglang", {"mem-fraction-static": 0.5}, 0.5),
    ],
)
def test_memory_share_is_read_from_options_with_dashes(
    tmp_path: Path, preset: str, args: dict[str, Any], share: float | None
) -> None:
    assert preset_needs(tmp_path, preset, args).memory_share == share


def test_null_leaves_an_option_of_a_preset_out(tmp_path: Path) -> None:
    server = {"preset": "vllm", "command": None, "args": {"quantization": None, "max_num_seqs": 4}}
    config = load_study(write_load_study(tmp_path, model="m", server=server)).points[0].config
    command = server_command(config, port=1, python="python", model="m")
    assert command[-2:] == ["--max-num-seqs", "4"]
    assert "--quantization" not in command


def test_random_weights_are_read_from_options_with_dashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ServerEngine, "_ask", lambda self, path: None)
    server = {"preset": "vllm", "command": None, "args": {"load-format": "dummy"}}
    config = load_study(write_load_study(tmp_path, server=server)).points[0].config
    context = EngineContext(server=ServerRecord(id="1", url="http://127.0.0.1:9"))
    engine: Any = ServerEngine
    assert engine(config, context).describe().random_weights


def test_settings_that_do_not_reach_the_server_are_null(
    run_pytest: RunPytest, results: Results, pytester: pytest.Pytester
) -> None:
    write_load_study(pytester.path)
    patient(run_pytest, pytester.path)().assert_outcomes(passed=1)
    config = result_of(results, results.manifest["experiments"][0])["effective_config"]
    assert (config["model"], config["precision"], config["prompt_format"]) == (None, None, None)
    assert config["random_seed"] == 42
    assert {name for name, value in config["decoder"].items() if value is not None} == {
        *("temperature", "do_sample", "top_p")
    }
    assert config["warmup"].pop("enabled") is False
    assert config["warmup"].pop("n_warmup") == 5
    assert set(config["warmup"].values()) == {None}


@pytest.mark.parametrize("listed", [False, True], ids=["sweep", "experiments"])
def test_name_of_a_server_stands_for_its_fields_in_ids(tmp_path: Path, listed: bool) -> None:
    servers = [{"name": name, "command": [name, PORT], "vocab_size": 1000} for name in ("fast", "slow")]
    several = {"experiments": [{"server": one} for one in servers]} if listed else {"sweep": {"server": servers}}
    path = write_load_study(tmp_path, **several)
    study = yaml.safe_load(path.read_text())
    del study["server"]
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    found = {point.axes["server"]: point for point in load_study(path).points}
    assert {name: point.config.server.command for name, point in found.items() if point.config.server} == {
        "fast": ["fast", PORT],
        "slow": ["slow", PORT],
    }
    assert [point.id for point in found.values()] == ["server=fast", "server=slow"]
