"""The engine vllm, with an imitation of vLLM's API; tests/test_vllm_real.py runs the real one."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest

from pytest_llem.engines.protocol import EngineContext, PreflightError, RequestRecord
from pytest_llem.engines.shipped import (
    ENGINE_FIELDS,
    SAMPLING_FIELDS,
    SHIPPED,
    Packages,
    shipped_needs,
    unmet_by_vllm,
)
from pytest_llem.isolation import engine_probe
from pytest_llem.isolation.engine_probe import ConfigQuestion, probe_engines
from pytest_llem.isolation.forkserver_client import ForkServers
from pytest_llem.isolation.launcher import Job, run_isolated
from pytest_llem.isolation.outcome import Outcome
from pytest_llem.machine import device_request
from pytest_llem.machine.device_request import request_devices
from pytest_llem.measurement.orchestrator import ExperimentOrchestrator
from pytest_llem.measurement.records import Measured
from pytest_llem.measurement.requests import Requests
from pytest_llem.planning.preflight import Preflight
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.loading import load_study
from tests.support import nvml
from tests.support.in_process import InProcess
from tests.support.marks import slow
from tests.support.processes import gone, wait_until
from tests.support.warned import texts

pytest.importorskip("torch")

FAKE = Path(__file__).parent / "support" / "fake_vllm"

FIELDS: dict[str, Any] = {
    "model": "builtin:tiny-llama",
    "backend": "vllm",
    "precision": "fp32",
    "n": 3,
    "max_input_tokens": 8,
    "max_output_tokens": 6,
    "warmup": {"enabled": False},
    "measurement": {"min_window_seconds": 0},
    "baseline": {"enabled": False},
    "energy": {"backend": "estimate"},
}
NATURAL = {"measurement": {"min_window_seconds": 0, "length_mode": "natural"}}
PROMPTS = [[5, 6, 7], [9, 9, 9, 9], [40, 41, 43], [50, 51, 54], [60, 61, 60]]


def of_vllm(name: str) -> bool:
    """Return whether a module is vLLM's, or imports it."""
    return name.split(".")[0] == "vllm" or name.startswith("pytest_llem.engines.vllm.")


@pytest.fixture(scope="module", autouse=True)
def fake_vllm() -> Iterator[None]:
    """Install the imitation for this process and its children, for the tests of this module only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FAKE)
        inherited = os.environ.get("PYTHONPATH")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(FAKE), inherited])))
        yield
    for name in [name for name in sys.modules if of_vllm(name)]:
        del sys.modules[name]


def config(engine: dict[str, Any] | None = None, sampling: dict[str, Any] | None = None, **more: Any) -> Any:
    given = {"engine": engine, "sampling": sampling}
    return ExperimentConfig.model_validate({**FIELDS, "vllm": given, **more})


Make = Callable[..., Any]


@pytest.fixture
def load() -> Iterator[Make]:
    """Return a function that loads the engine for an experiment."""
    from pytest_llem.engines.vllm.engine import VLLMEngine

    made: list[VLLMEngine] = []

    def start(one: ExperimentConfig) -> VLLMEngine:
        made.append(VLLMEngine(one, EngineContext()))
        made[-1].fetch()
        made[-1].load()
        return made[-1]

    yield start
    for one in made:
        one.close()


def generate(made: Any, prompts: list[list[int]] = PROMPTS, first: bool = False) -> list[RequestRecord]:
    [batch] = made.prepare(prompts)
    return list(made.requests(batch, (made.generate_first if first else made.generate)(batch)))


def measure(one: ExperimentConfig) -> Measured:
    return ExperimentOrchestrator(one).run()


# ---- arguments ----


@pytest.fixture
def arguments(load: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, Any, dict[str, Any]]]:
    """Return a function that returns an experiment's EngineArgs, its SamplingParams, and the settings."""
    from vllm.v1.engine import llm_engine

    engine_class = llm_engine.LLMEngine
    seen: list[Any] = []
    original = engine_class.from_engine_args

    def from_engine_args(engine_args: Any, **more: Any) -> Any:
        seen.append(engine_args)
        return original(engine_args, **more)

    monkeypatch.setattr(engine_class, "from_engine_args", from_engine_args)

    def run(one: ExperimentConfig) -> tuple[Any, Any, dict[str, Any]]:
        made = load(one)
        [batch] = made.prepare(PROMPTS[:2])
        return seen[-1], batch.sampling, made.describe().settings

    return run


def test_engine_arguments_of_the_study_arrive_in_vllm(arguments: Any) -> None:
    given = {
        "max_num_seqs": 7,
        "max_model_len": 128,
        "enforce_eager": True,
        "block_size": 32,
        "load_format": "dummy",
    }
    args, _, settings = arguments(config(given))
    assert {name: getattr(args, name) for name in given} == given
    assert {name: settings[name] for name in given if name != "load_format"} == {
        name: value for name, value in given.items() if name != "load_format"
    }
    assert (args.enable_prefix_caching, args.disable_log_stats) == (False, False)
    assert (settings["enable_prefix_caching"], settings["prefix_cache_hit_rate"]) == (False, None)


def test_defaults_of_the_scheduler_are_those_of_vllm_llm(arguments: Any) -> None:
    """vLLM's defaults for an engine that ``vllm.LLM`` does not make are smaller: 128 and 2048."""
    _, _, settings = arguments(config())
    assert (settings["max_num_seqs"], settings["max_num_batched_tokens"]) == (256, 4096)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16")])
def test_precision_is_the_dtype_of_vllm(arguments: Any, precision: str, dtype: str) -> None:
    args, _, settings = arguments(config(precision=precision))
    assert args.dtype == settings["dtype"] == dtype


def test_decoder_settings_arrive_in_vllm(arguments: Any) -> None:
    decoder = {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.2}
    _, [first, second], settings = arguments(
        config(sampling={"presence_penalty": 0.5}, decoder=decoder, random_seed=5)
    )
    expected = {**decoder, "presence_penalty": 0.5, "max_tokens": 6, "detokenize": False, "n": 1}
    assert {name: getattr(first, name) for name in expected} == expected
    assert {name: settings["sampling"][name] for name in decoder} == decoder
    assert (first.seed, second.seed) == (5, 6), "each request has its own, the same in every pass"


def test_keys_of_a_mapping_are_numbers_again_in_vllm(arguments: Any) -> None:
    """The experiment's process gets its configuration as JSON."""
    one = config(sampling={"logit_bias": {5: -1.5}})
    _, [first, _], _ = arguments(ExperimentConfig.model_validate(one.model_dump(mode="json")))
    assert first.logit_bias == {5: -1.5}


def test_greedy_decoding_has_temperature_zero_and_no_seed(arguments: Any) -> None:
    _, [one, _], settings = arguments(config(decoder={"do_sample": False}))
    assert (one.temperature, one.seed) == (0.0, None)
    assert settings["sampling"]["temperature"] == 0.0


@pytest.mark.parametrize(
    ("changes", "ignore_eos", "min_tokens", "skips_tokenizer"),
    [
        ({}, True, 0, True),
        (NATURAL, False, 0, False),  # the end token is the tokenizer’s
        ({**NATURAL, "decoder": {"min_new_tokens": 4}}, False, 4, False),
    ],
)
def test_length_mode_decides_whether_the_end_token_ends_answers(
    arguments: Any, changes: dict[str, Any], ignore_eos: bool, min_tokens: int, skips_tokenizer: bool
) -> None:
    args, [one, _], settings = arguments(config(**changes))
    assert (one.ignore_eos, one.min_tokens, one.max_tokens) == (ignore_eos, min_tokens, 6)
    assert settings["sampling"]["ignore_eos"] is ignore_eos
    assert args.skip_tokenizer_init is skips_tokenizer


def test_every_argument_is_forwarded_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    from pytest_llem.engines.vllm import arguments
    from pytest_llem.engines.vllm.arguments import engine_arguments, sampling_arguments

    monkeypatch.setattr(arguments, "_value", lambda hint, value: value)
    engine = {one.name for one in fields(EngineArgs)} - ENGINE_FIELDS.keys()
    sampling = {name for name in SamplingParams.__struct_fields__ if name[0] != "_"} - SAMPLING_FIELDS.keys()
    one = config(dict.fromkeys(engine, "given"), dict.fromkeys(sampling, "given"))
    found = engine_arguments(one, "model", has_tokenizer=True)
    assert {name for name, value in found.items() if value == "given"} == engine
    assert found.keys() - engine <= ENGINE_FIELDS.keys(), "what the engine sets is refused in a study"
    found = sampling_arguments(one)
    assert {name for name, value in found.items() if value == "given"} == sampling
    assert found.keys() - sampling <= SAMPLING_FIELDS.keys()


def test_default_of_every_argument_is_accepted() -> None:
    """Also of one whose type is not importable at run time, and of those whose type does not allow null."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    from pytest_llem.engines.vllm.engine import VLLMEngine

    defaults = {one.name: one.default for one in fields(EngineArgs) if one.default is not MISSING}
    engine = {name: value for name, value in defaults.items() if name not in ENGINE_FIELDS}
    sampling = {name: getattr(SamplingParams(), name) for name in ("stop", "logprobs", "frequency_penalty")}
    assert "profiler_config" in engine
    assert list(VLLMEngine.check_options(config(engine, sampling))) == []
    by_name = {"attention_backend": "FLASH_ATTN", "compilation_config": {"mode": 0}, "hf_overrides": {"a": 1}}
    assert list(VLLMEngine.check_options(config(by_name))) == [], "vLLM makes enums and objects of them"


@pytest.mark.parametrize(
    ("section", "given", "message"),
    [
        ("engine", {"max_num_seq": 4}, "vLLM has no such argument (did you mean 'max_num_seqs'?)"),
        ("engine", {"max_num_seqs": "many"}, "unable to parse string as an integer (got 'many')"),
        ("engine", {"kv_cache_dtype": "int3"}, "(got 'int3')"),
        ("engine", {"enforce_eager": [1]}, "(got [1])"),
        ("sampling", {"presence_penalti": 0.1}, "vLLM has no such argument (did you mean 'presence_penalty'?)"),
        ("sampling", {"logit_bias": {"a": "b"}}, "(got {'a': 'b'})"),
        ("engine", {"max_model_len": 1.5}, "got a number with a fractional part (got 1.5)"),
        ("sampling", {"stop": [1]}, "(got [1])"),
        ("sampling", {"_all_stop_token_ids": []}, "vLLM has no such argument"),
    ],
)
def test_wrong_argument_is_refused_with_its_key(section: str, given: dict[str, Any], message: str) -> None:
    from pytest_llem.engines.vllm.engine import VLLMEngine

    [(path, found)] = VLLMEngine.check_options(config(**{section: given}))
    assert path == ("vllm", section, *given)
    assert message in found


@pytest.mark.parametrize(
    ("section", "name"),
    [*(("engine", name) for name in ENGINE_FIELDS), *(("sampling", name) for name in SAMPLING_FIELDS)],
)
def test_argument_that_a_study_field_sets_is_refused(section: str, name: str) -> None:
    reasons = ENGINE_FIELDS if section == "engine" else SAMPLING_FIELDS
    [found] = unmet_by_vllm(config(**{section: {name: 1}}), Packages(lambda module: True))
    assert found == f"vllm.{section}.{name} cannot be given: {reasons[name]}"


@pytest.mark.parametrize(("name", "value"), [("stop", ["."]), ("stop_token_ids", [5])])
def test_argument_that_ends_answers_needs_natural_lengths(name: str, value: list[Any]) -> None:
    from pytest_llem.engines.vllm.engine import VLLMEngine

    [(path, message)] = VLLMEngine.check_options(config(sampling={name: value}))
    assert path == ("vllm", "sampling", name)
    assert message == "it may end answers before max_output_tokens: set measurement.length_mode to natural"
    assert list(VLLMEngine.check_options(config(sampling={name: value}, **NATURAL))) == []


def test_subclass_takes_vllms_options_under_its_own_section() -> None:
    from pytest_llem.engines.vllm.engine import VLLMEngine

    class Own(VLLMEngine):
        """A subclass without options of its own."""

    def of_own(engine: dict[str, Any]) -> ExperimentConfig:
        return ExperimentConfig.model_validate({**FIELDS, "backend": "own:Own", "own:Own": {"engine": engine}})

    made = Own(of_own({"load_format": "dummy"}), EngineContext())
    assert made._options.engine == {"load_format": "dummy"}
    [(path, message)] = Own.check_options(of_own({"load_formt": "dummy"}))
    assert (path, message) == (
        ("own:Own", "engine", "load_formt"),
        "vLLM has no such argument (did you mean 'load_format'?)",
    )
    with pytest.raises(PreflightError, match=r"^own:Own\.engine\.seed cannot be given: use random_seed"):
        Own(of_own({"seed": 1}), EngineContext())
    with pytest.raises(PreflightError, match=r"^own:Own\.beam_search is not supported"):
        Own(ExperimentConfig(**FIELDS | {"backend": "own:Own", "own:Own": {"beam_search": {}}}), EngineContext())


def test_beam_search_is_refused() -> None:
    one = config(vllm={"beam_search": {"beam_width": 2}})
    assert list(unmet_by_vllm(one, Packages(lambda module: True))) == [
        "vllm.beam_search is not supported: leave it out"
    ]


def test_without_vllm_preflight_says_how_to_install_it() -> None:
    found = list(unmet_by_vllm(config(), Packages(lambda module: False, "env/bin/python -m pip")))
    assert found == ["engine 'vllm' needs vLLM: env/bin/python -m pip install vllm"]


@pytest.mark.parametrize(
    ("section", "given", "message"),
    [
        (
            "engine",
            {"max_num_seqs": 64, "max_num_batched_tokens": 8},
            "max_num_batched_tokens (8) must be greater",
        ),
        ("engine", {"max_model_len": 10**6}, "max_model_len (1000000) is greater than the derived max_model_len"),
        ("sampling", {"presence_penalty": 3.0}, "presence_penalty must be in [-2, 2], got 3.0."),
    ],
)
def test_refusal_of_vllm_itself_is_a_preflight_error(
    load: Make, section: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(PreflightError) as error:
        load(config(**{section: given})).prepare(PROMPTS)
    assert str(error.value).startswith("vLLM cannot do what the experiment asks for: ")
    assert message in str(error.value)


def test_shipped_engine_states_what_its_class_has() -> None:
    from pytest_llem.engines.options import abilities
    from pytest_llem.engines.vllm.engine import VLLMEngine

    assert SHIPPED["vllm"].supports == abilities(VLLMEngine)
    assert SHIPPED["vllm"].options is VLLMEngine.options


def test_wrong_argument_has_its_place_in_the_study_and_vllm_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "s.yaml").write_text(
        "model: none\nbackend: vllm\nvllm:\n  engine:\n    max_num_seq: 4\n  sampling: {top_k: 3}\n"
    )
    study = load_study(tmp_path / "s.yaml")
    [point] = study.points
    assert Preflight(study, (), []).refusal(point).split("; ")[0] == (  # type: ignore[union-attr]
        "vllm.sampling.top_k cannot be given: use decoder.top_k"
    )
    (tmp_path / "s.yaml").write_text("model: none\nbackend: vllm\nvllm:\n  engine:\n    max_num_seq: 4\n")
    study = load_study(tmp_path / "s.yaml")
    [point] = study.points
    reason = Preflight(study, (), []).refusal(point) or ""
    assert reason.split("; ")[0] == (
        "s.yaml:5:5: vllm.engine.max_num_seq: vLLM has no such argument (did you mean 'max_num_seqs'?)"
    )
    monkeypatch.setattr(engine_probe, "_ask", lambda *_: pytest.fail("vLLM is imported again"))
    assert probe_engines(None, {"vllm": [ConfigQuestion(point.config)]}, [str(tmp_path)])["vllm"].configs
    key = engine_probe._cache_keys(None, ["vllm"], [str(tmp_path)])["vllm"]
    assert "vllm=0.20.2" in key, "an upgrade of vLLM asks again"


# ---- start ----


def test_start_of_vllm_is_reported_in_phases() -> None:
    from pytest_llem.engines.vllm.engine import VLLMEngine

    phases: list[str] = []
    made = VLLMEngine(config(), EngineContext(report_phase=phases.append))
    made.fetch()
    made.load()
    made.close()
    assert phases == ["starting vLLM", "loading weights", "profiling memory", "compiling", "warming up vLLM"]


def test_log_record_that_cannot_be_formatted_does_not_stop_vllm(capsys: pytest.CaptureFixture[str]) -> None:
    from pytest_llem.engines.vllm.start import StartRecords

    StartRecords().handle(logging.LogRecord("vllm", logging.INFO, "", 1, "%d tokens", ("many",), None))
    assert "--- Logging error ---" in capsys.readouterr().err


def test_warning_about_a_setting_of_the_study_is_left_out() -> None:
    warned = texts(measure(config({"enforce_eager": True})).result.warnings)
    assert not [text for text in warned if text.startswith("vllm")]


# ---- what is generated ----


def test_fixed_lengths_ignore_the_end_token(load: Make) -> None:
    assert [one.output_tokens for one in generate(load(config()))] == [6] * 5


def test_natural_lengths_end_at_the_end_token(load: Make) -> None:
    made = load(config(**NATURAL))
    found = [list(one.output_ids or ()) for one in generate(made)]
    assert [len(one) for one in found] == [2 + sum(prompt) % 3 for prompt in PROMPTS]
    eos = made._engine.vllm_config.model_config.hf_config.eos_token_id
    assert all(one[-1] == eos and eos not in one[:-1] for one in found)


def test_random_weights_of_load_format_dummy_are_marked(load: Make) -> None:
    assert load(config({"load_format": "dummy"})).describe().random_weights


def test_trained_weights_are_not_marked_as_random(load: Make, smollm2: Path) -> None:
    from pytest_llem.engines.vllm.engine import VLLMEngine

    for load_format, is_random in (("auto", False), ("dummy", True)):
        one = config({"load_format": load_format}, model="HuggingFaceTB/SmolLM2-135M-Instruct")
        made = VLLMEngine(one, EngineContext(model_path=(smollm2,)))
        made.fetch()
        made.load()
        try:
            assert made.describe().random_weights is is_random
        finally:
            made.close()


def test_requests_of_a_pass_are_drained_when_it_ends(load: Make) -> None:
    made = load(config({"max_num_seqs": 2}))
    [batch] = made.prepare(PROMPTS)
    for _ in range(2):
        answers = made.generate(batch)
        assert not made._engine.has_unfinished_requests()
        assert [len(one.ids) for one in answers] == [6] * 5


def test_one_token_is_generated_for_the_prefill_split(load: Make) -> None:
    made = load(config(**NATURAL, decoder={"min_new_tokens": 4}))
    assert [one.output_tokens for one in generate(made, first=True)] == [1] * 5


# ---- times ----


def test_ttft_counts_from_submission_and_queue_time_is_apart(load: Make) -> None:
    """Two requests run at a time, six tokens each: the fifth waits for two others."""
    records = generate(load(config({"max_num_seqs": 2})))
    for one in records:
        assert one.sent is not None
        assert one.admitted is not None
        assert one.first_token is not None
        assert one.sent <= one.admitted <= one.first_token
        assert len(one.itl_s) == 5
    queues = [one.queue_s or 0.0 for one in records]
    assert queues[4] > 10 * 0.002, "twelve steps of 2 ms"
    assert queues[4] < (records[4].ttft_s or 0.0)
    assert queues[0] < queues[2] < queues[4]


def test_latencies_of_a_result_include_the_queue() -> None:
    metrics = measure(config({"max_num_seqs": 1})).result.metrics
    assert metrics["queue_p99_ms"].value is not None
    assert metrics["ttft_p99_ms"].value is not None
    assert metrics["itl_p50_ms"].value is not None
    assert metrics["ttft_p99_ms"].value > metrics["queue_p99_ms"].value > 10 * 2.0
    assert metrics["itl_p50_ms"].value < metrics["ttft_p99_ms"].value


def test_tokens_that_come_together_have_no_itl_but_tpot() -> None:
    metrics = measure(config({"speculative_config": {"num_speculative_tokens": 2}})).result.metrics
    assert metrics["itl_p50_ms"].value is None
    assert metrics["itl_p50_ms"].reason == (
        "several tokens of a request arrived together, so that the time between them is unknown: see tpot"
    )
    assert metrics["tpot_p50_ms"].value is not None
    assert metrics["ttft_p50_ms"].value is not None


def test_single_tokens_of_other_requests_give_no_itl() -> None:
    joint, single = ([5.5, 5.5, 5.75], [5.5, 5.75, 6.0])
    requests = Requests([[RequestRecord(2, [1, 2, 3], 5.0, times) for times in (joint, single)]])
    assert [one.itl_s for one in requests.all()] == [[], [0.25, 0.25]]
    assert "arrived together" in (requests.latency_metrics()["itl_p50_ms"].reason or "")


def test_tokens_are_counted_from_the_outputs() -> None:
    found = measure(config(**NATURAL))
    assert found.requests is not None
    requests = found.requests.passes[0]
    tokens = sum(one.output_tokens or 0 for one in requests)
    assert tokens < 18
    assert found.result.tokens is not None
    assert found.result.tokens.output_tokens == tokens


# ---- caches and memory ----


def test_prefix_cache_is_cleared_at_each_pass(load: Make) -> None:
    made = load(config({"enable_prefix_caching": True}))
    twice = [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    made.reset_peak_memory()
    for _ in range(3):
        made.seed(0)
        generate(made, twice)
    made.cache_memory()
    rate = made.describe().settings["prefix_cache_hit_rate"]
    assert rate == pytest.approx(2 / 10), "the repeated prompt's 3 tokens but the last, of 10, in each pass"


def test_prefix_cache_that_vllm_does_not_clear_is_an_error(load: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = load(config({"enable_prefix_caching": True}))
    monkeypatch.setattr(made._engine, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="vLLM could not clear its prefix cache before a pass"):
        made.seed(0)


def test_prefix_cache_hit_rate_is_the_windows_only() -> None:
    """Neither warm-up nor the window of the prompts alone counts. All prompts are different."""
    measurement = {"min_window_seconds": 0, "prefill_split": True}
    warmup = {"n_warmup": 2, "convergence_detection": False}
    found = measure(config({"enable_prefix_caching": True}, measurement=measurement, warmup=warmup)).result
    assert found.engine.settings["prefix_cache_hit_rate"] == 0.0
    assert found.engine.settings["enable_prefix_caching"] is True


def test_memory_of_the_kv_cache_is_allocated_and_used(load: Make) -> None:
    made = load(config())
    made.reset_peak_memory()
    generate(made)
    found = made.cache_memory()
    assert found.allocated_bytes == 1 << 20, "a tensor that layers share counts once"
    tokens = sum(map(len, PROMPTS)) + 5 * 5
    assert 0 < found.used_bytes <= round(tokens / 1000 * (1 << 20))
    assert made.model_memory_bytes() == 256


def test_weights_that_vllm_moved_into_its_kernels_have_no_size(load: Make) -> None:
    """On a CPU, vLLM packs the weights of linear layers, and leaves empty ones."""
    made = load(config())
    model = made._engine._worker.model_runner.get_model()
    model.weight = type(model.weight)(model.weight[:0])
    assert made.model_memory_bytes() is None


def test_setting_that_vllm_changed_is_reported() -> None:
    given = {"max_num_seqs": 64, "kv_cache_dtype": "fp8", "block_size": 32, "gpu_memory_utilization": 0.5}
    found = measure(config({**given, "hf_overrides": {"fake_max_num_seqs": 2}})).result
    adjusted = [one for one in found.adjusted if one.setting.startswith("vllm.")]
    assert [(one.setting, one.given, one.effective) for one in adjusted] == [
        ("vllm.engine.max_num_seqs", 64, 2),
        ("vllm.engine.kv_cache_dtype", "fp8", "auto"),
    ]
    assert found.engine.settings["max_num_seqs"] == 2
    section = "pytest_llem.engines.vllm.engine:VLLMEngine"
    of_own = {**FIELDS, "backend": section, section: {"engine": {"kv_cache_dtype": "fp8"}}}
    [setting] = measure(ExperimentConfig.model_validate(of_own)).result.adjusted
    assert setting.setting == f"{section}.engine.kv_cache_dtype"
    chosen = measure(config({"kv_cache_dtype": "auto", "quantization": None})).result
    assert not [one for one in chosen.adjusted if one.setting.startswith("vllm.")]


def test_answer_that_does_not_fit_the_given_context_is_refused(load: Make) -> None:
    made = load(config({"max_model_len": 12}))
    made.prepare([[1] * 6])
    with pytest.raises(PreflightError, match=r"max_model_len 12 is less than a prompt of 7 tokens .* raise it"):
        made.prepare([[1] * 7])


def test_answer_that_does_not_fit_the_models_context_is_refused(load: Make) -> None:
    made = load(config())
    limit = made._engine.vllm_config.model_config.max_model_len
    with pytest.raises(PreflightError, match=f"{limit:,}"):
        made.prepare([[1] * (limit - 5)])


# ---- devices ----


def test_gpus_are_known_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from pytest_llem.engines.vllm.engine import VLLMEngine

    monkeypatch.setenv("FAKE_VLLM_GPUS", "GPU-a GPU-b GPU-c")
    assert VLLMEngine(config(), EngineContext()).gpus == ["GPU-a"]
    assert VLLMEngine(config({"tensor_parallel_size": 2}), EngineContext()).gpus == ["GPU-a", "GPU-b"]
    monkeypatch.delenv("FAKE_VLLM_GPUS")
    assert VLLMEngine(config(), EngineContext()).gpus == []


def _leased(one: dict[str, Any]) -> list[str]:
    device_request.package_versions = lambda python: {"torch": "2.13.0+cu130"}  # type: ignore[attr-defined]  # in a forked process
    needs = shipped_needs(ExperimentConfig.model_validate(one))
    assert needs is not None
    request = request_devices(needs, None)
    return list(request.choose(request.pool))


@pytest.mark.parametrize(
    ("engine", "count"),
    [
        ({"tensor_parallel_size": 2}, 2),
        ({"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 4),
    ],
)
def test_parallel_sizes_lease_that_many_gpus(
    nvml_library: Path, tmp_path: Path, engine: dict[str, Any], count: int
) -> None:
    uuids = [f"GPU-{letter * 8}" for letter in "abcd"]
    gpus = [nvml.ScriptedGpu(uuid, [(0.0, 50.0)], {"name": "H100"}) for uuid in uuids]
    script = nvml.Script(tmp_path / "script", gpus)
    script.write()
    env = nvml.environment(nvml_library, script)
    env.pop("CUDA_VISIBLE_DEVICES", None)
    assert nvml.run(env, _leased, config(engine).model_dump(mode="json")) == uuids[:count]


# ---- faults ----


@pytest.fixture(scope="module")
def warm_servers() -> Iterator[ForkServers]:
    servers = ForkServers()
    yield servers
    servers.end()


@pytest.fixture
def run(warm_servers: ForkServers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Return a function that runs an experiment in a forked process. vLLM notes its processes in ``notes``."""

    def start(fault: str | None, timeout: float = 120, **changes: Any) -> Outcome:
        one = config({"hf_overrides": {"fake_fault": fault, "fake_notes": str(tmp_path / "notes")}}, **changes)
        job = Job({"experiment_id": "one", "config_hash": "0" * 16}, one.model_dump(mode="json"), directory=".")
        return run_isolated(job, forkservers=warm_servers, timeout=timeout)

    return start


def noted(tmp_path: Path) -> dict[str, int]:
    """Return the process ids of vLLM's processes."""
    lines = (tmp_path / "notes").read_text().splitlines() if (tmp_path / "notes").exists() else []
    return {name: int(pid) for name, _, pid in (line.partition(" ") for line in lines)}


@pytest.mark.parametrize(
    ("fault", "timeout", "kind", "message"),
    [
        ("die", 120, "crash", "vLLM's EngineCore has ended: its output says why"),
        slow("hang", 10, "timeout", "not finished after 10 s"),
    ],
)
def test_failed_engine_core_is_an_error_and_leaves_no_process(
    run: Callable[..., Outcome], tmp_path: Path, fault: str, timeout: float, kind: str, message: str
) -> None:
    error = run(fault, timeout).error
    assert error is not None
    assert (error.kind, error.phase) == (kind, "measuring")
    assert message in error.message
    assert noted(tmp_path).keys() == {"EngineCore", "Worker"}
    assert all(map(gone, noted(tmp_path).values()))


def test_error_of_a_worker_that_fails_to_start_is_reported(run: Callable[..., Outcome]) -> None:
    error = run("load").error
    assert error is not None
    assert (error.kind, error.phase) == ("crash", "loading weights")
    assert error.message == (
        "a process of vLLM failed to start: ValueError: max seq len 256 is larger than the KV cache"
    )


@pytest.mark.parametrize("victim", ["experiment", "Worker"])
def test_killed_process_is_an_error_and_leaves_no_process(
    run: Callable[..., Outcome], tmp_path: Path, victim: str
) -> None:
    def kill() -> None:
        wait_until(lambda: "Worker" in noted(tmp_path))
        pid = noted(tmp_path)["Worker"]
        if victim == "experiment":
            pid = psutil.Process(noted(tmp_path)["EngineCore"]).ppid()
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    error = run("hang", 60).error
    thread.join()
    assert error is not None
    assert error.kind == "crash"
    assert all(map(gone, noted(tmp_path).values()))


def test_finished_experiment_leaves_no_process(run: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run(None)
    assert outcome.error is None
    assert outcome.result is not None
    assert ExperimentResult.model_validate_json(outcome.result).engine.name == "vllm"
    assert noted(tmp_path).keys() == {"EngineCore", "Worker"}
    assert all(map(gone, noted(tmp_path).values()))


def test_aborted_request_is_a_failed_request_and_the_others_count() -> None:
    result = measure(config({"hf_overrides": {"fake_fault": "abort"}})).result
    assert result.tokens is not None
    assert (result.tokens.requests, result.tokens.failed_requests) == (3, 1)
    assert any("vLLM ended the request with the reason 'abort'" in line for line in texts(result.warnings))


@pytest.mark.slow
def test_killed_pytest_leaves_no_process(tmp_path: Path) -> None:
    overrides = {"fake_fault": "hang", "fake_notes": str(tmp_path / "notes")}
    study = {**FIELDS, "vllm": {"engine": {"hf_overrides": overrides}}, "execution": {"n_cycles": 1}}
    (tmp_path / "study.yaml").write_text(json.dumps(study))
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: "Worker" in noted(tmp_path))
        experiment = psutil.Process(noted(tmp_path)["EngineCore"]).ppid()
        process.kill()
    wait_until(lambda: all(map(gone, [experiment, *noted(tmp_path).values()])), 10)


# ---- conformance ----


class TestConformance(InProcess):
    experiment: ClassVar[Mapping[str, Any]] = {
        "model": "builtin:tiny-llama",
        "backend": "vllm",
        "precision": "fp32",
        "vllm": {"engine": {"enforce_eager": True}},
    }
    has_processes = True
