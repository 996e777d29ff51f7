"""The engine pytorch: token counts, latencies, and options that reach transformers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from _pytest.logging import LogCaptureFixture

from pytest_llem import run_experiment
from pytest_llem.catalogue import CATALOGUE, PERCENTILES, PREFILL_METRICS
from pytest_llem.engines.protocol import PreflightError
from pytest_llem.engines.pytorch import loading
from pytest_llem.engines.pytorch.engine import Generated, PyTorchEngine, _dotted
from pytest_llem.engines.tiny_llama import tiny_llama
from pytest_llem.measurement.load_metrics import SERVING_METRICS
from pytest_llem.study.config import DecoderConfig
from pytest_llem.study.engines import PyTorchConfig
from tests.support.marks import slow
from tests.support.measured import output_ids
from tests.support.narrow import not_none
from tests.support.tiny import GREEDY, NATURAL, PROMPTS, TINY, engine, generate, outputs
from tests.support.warned import texts

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tiny() -> PyTorchEngine:
    return engine(pytorch={"batch_size": 2})


def test_batches_are_padded_on_the_left(tiny: PyTorchEngine) -> None:
    first, second = tiny.prepare([[5, 6, 7], [8], [9, 10]])
    assert first.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert first.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert first.lengths == (3, 1)
    assert second.input_ids.tolist() == [[9, 10]]
    assert [tiny.positions(batch) for batch in (first, second)] == [6, 2]


def test_padding_changes_no_token() -> None:
    alone = outputs(engine(**GREEDY, pytorch={"batch_size": 1}), [[5, 6, 7, 8], [9]])
    assert alone == outputs(engine(**GREEDY, pytorch={"batch_size": 2}), [[5, 6, 7, 8], [9]])


def test_fixed_length_gives_every_sequence_its_full_length(tiny: PyTorchEngine) -> None:
    requests = generate(tiny, [[5, 6, 7], [8], [9, 10]])
    assert [len(output_ids(one)) for one in requests] == [6, 6, 6]
    assert [one.input_tokens for one in requests] == [3, 1, 2]
    for one in requests:
        assert len(one.itl_s) == 5
        assert not_none(one.ttft_s) > 0
        assert one.e2e_s == pytest.approx(not_none(one.ttft_s) + sum(not_none(one.itl_s)))


def test_sequence_ends_at_its_end_token(tiny: PyTorchEngine) -> None:
    natural = engine(n=4, measurement=NATURAL, pytorch={"batch_size": 4})
    end = natural.describe().settings["generation"]["eos_token_id"]
    (batch,) = natural.prepare([[5, 6], [7], [8], [9]])
    new = [[11, end, 0, 0], [end, 0, 0, 0], [11, 12, 13, 14], [11, 12, 13, end]]
    requests = natural.requests(batch, Generated(torch.tensor(new), 10.0, [11.0, 11.5, 12.5, 14.5]))
    assert [output_ids(one) for one in requests] == [[11, end], [end], [11, 12, 13, 14], [11, 12, 13, end]]
    assert [one.ttft_s for one in requests] == [1.0] * 4
    assert [one.itl_s for one in requests] == [[0.5], [], [0.5, 1.0, 2.0], [0.5, 1.0, 2.0]]
    assert [one.e2e_s for one in requests] == [1.5, 1.0, 4.5, 4.5]


def test_equal_seeds_give_equal_tokens(tiny: PyTorchEngine) -> None:
    prompts = [[5, 6, 7], [8]]
    assert [output_ids(one) for one in generate(tiny, prompts)] == [
        output_ids(one) for one in generate(tiny, prompts)
    ]


@pytest.mark.parametrize(
    ("changes", "setting", "value"),
    [
        ({"precision": "fp16"}, "dtype", "float16"),
        ({"precision": "fp32"}, "dtype", "float32"),
        ({"pytorch": {"attn_implementation": "eager"}}, "attn_implementation", "eager"),
    ],
)
def test_settings_reach_the_model(changes: dict[str, Any], setting: str, value: str) -> None:
    assert engine(**changes).describe().settings[setting] == value


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"decoder": {"do_sample": False}}, {"do_sample": False}),
        ({"decoder": {"temperature": 0.5}}, {"temperature": 0.5}),
        ({"decoder": {"top_k": 7}}, {"top_k": 7}),
        ({"decoder": {"top_p": 0.5}}, {"top_p": 0.5}),
        ({"decoder": {"min_p": 0.1}}, {"min_p": 0.1}),
        ({"decoder": {"repetition_penalty": 1.3}}, {"repetition_penalty": 1.3}),
        ({"decoder": {"preset": "factual"}}, {"temperature": 0.3, "top_k": 10, "do_sample": True}),
        ({"decoder": {"min_new_tokens": 4}, "measurement": NATURAL}, {"min_new_tokens": 4, "eos_token_id": 2}),
        ({"decoder": {"min_new_tokens": 4}}, {"min_new_tokens": None, "eos_token_id": None}),
        ({"pytorch": {"no_repeat_ngram_size": 2}}, {"no_repeat_ngram_size": 2}),
        ({"pytorch": {"num_beams": 2}}, {"num_beams": 2, "early_stopping": False, "length_penalty": 1.0}),
        ({"pytorch": {"num_beams": 2, "early_stopping": True}}, {"early_stopping": True}),
        ({"pytorch": {"num_beams": 2, "length_penalty": 0.5}}, {"length_penalty": 0.5}),
        ({"pytorch": {"prompt_lookup_num_tokens": 3}}, {"prompt_lookup_num_tokens": 3}),
        (
            {"passthrough_kwargs": {"typical_p": 0.5, "suppress_tokens": [7]}},
            {"typical_p": 0.5, "suppress_tokens": [7]},
        ),
        ({"pytorch": {"use_cache": False}}, {"use_cache": False}),
        ({"pytorch": {"cache_implementation": "static"}}, {"cache_implementation": "static"}),
        ({"dataset": {"output_len": 2}}, {"max_new_tokens": 2}),
    ],
)
def test_generation_options_reach_generate(
    changes: dict[str, Any], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = engine(**changes)
    seen = {}
    real = made._model.generate
    monkeypatch.setattr(made._model, "generate", lambda **given: seen.update(given) or real(**given))
    requests = generate(made, [[5, 6, 7]])
    used = seen["generation_config"].to_dict()
    assert {name: used[name] for name in expected} == expected
    assert json.loads(made.describe().model_dump_json())["settings"]["generation"]
    if not expected.get("eos_token_id"):
        assert len(output_ids(requests[0])) == expected.get("max_new_tokens", 6)


def test_greedy_does_not_depend_on_the_seed() -> None:
    greedy = engine(decoder={"do_sample": False})
    (one,) = generate(greedy, [[5, 6, 7]])
    greedy.seed(1)
    (batch,) = greedy.prepare([[5, 6, 7]])
    assert greedy.requests(batch, greedy.generate(batch))[0].output_ids == output_ids(one)


def test_temperature_0_is_greedy() -> None:
    cold = engine(decoder={"temperature": 0}, precision="fp32")
    assert outputs(cold) == outputs(engine(**GREEDY))
    sampling = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    assert {name: getattr(cold._generation, name) for name in sampling} == sampling


def test_settings_without_effect_are_not_passed(
    caplog: LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would log that they are ignored."""
    monkeypatch.setattr(transformers.utils.logging.get_logger("transformers"), "propagate", True)
    made = engine(
        decoder={"temperature": 0, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
        pytorch={"early_stopping": True, "length_penalty": 2.0},
    )
    outputs(made)
    assert [record.message for record in caplog.records if record.name.startswith("transformers")] == []
    assert made._generation.early_stopping is made._generation.length_penalty is None


@pytest.mark.parametrize(
    "options",
    [
        {"attn_implementation": "sdpa"},
        slow({"attn_implementation": "eager"}),
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        slow({"use_cache": False}),
    ],
)
def test_options_for_speed_change_no_token(options: dict[str, Any]) -> None:
    made = engine(**GREEDY, pytorch={**options, "batch_size": 3})
    assert outputs(made) == outputs(engine(**GREEDY, pytorch={"batch_size": 3}))
    settings = made.describe().settings
    written = {**settings["generation"], "attn_implementation": settings["attn_implementation"]}
    assert {name: written[name] for name in options} == options


@pytest.mark.parametrize("changes", [{}, {"decoder": {"do_sample": False}}], ids=["sampled", "greedy"])
def test_generation_config_of_the_model_is_ignored(changes: dict[str, Any], tmp_path: Path) -> None:
    """generate fills unset arguments from the model's own configuration, which must not have an effect."""
    shutil.copytree(tiny_llama(), tmp_path / "made")
    path = tmp_path / "made" / "generation_config.json"
    own = json.loads(path.read_text()) if path.exists() else {}
    further = {"do_sample": True, "min_p": 0.999, "suppress_tokens": list(range(3, 130))}
    path.write_text(json.dumps({**own, **further}))
    made = engine(model=str(tmp_path / "made"), **changes)
    assert outputs(made) == outputs(engine(**changes))


def test_no_repeat_ngram_size_prevents_repeated_pairs() -> None:
    plain = outputs(engine(**GREEDY, max_output_tokens=40), PROMPTS[:1])[0]
    apart = outputs(engine(**GREEDY, max_output_tokens=40, pytorch={"no_repeat_ngram_size": 2}), PROMPTS[:1])[0]
    assert len({*pairwise(plain)}) < 39, "the model does repeat itself"
    assert len({*pairwise(apart)}) == 39


def test_revision_reaches_every_from_pretrained(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for auto in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):

        def from_pretrained(location: Any, real: Any = auto.from_pretrained, **given: Any) -> Any:
            seen.append((given.pop("revision"), given.pop("trust_remote_code")))
            return real(location, **given)

        monkeypatch.setattr(auto, "from_pretrained", from_pretrained)
    engine(pytorch={"revision": "v1", "trust_remote_code": True})
    assert seen == [("v1", True), ("v1", True)]


#: Fields that are tested in another file.
ELSEWHERE = {
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), "test_pytorch_loading.py"),
    **dict.fromkeys(
        ("bnb_4bit_compute_dtype", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"), "test_pytorch_loading.py"
    ),
    **dict.fromkeys(("device_map", "max_memory"), "test_pytorch_loading.py"),
    "num_processes": "test_pytorch_refusals.py",
}


@pytest.mark.parametrize("section", [PyTorchConfig, DecoderConfig])
def test_every_option_has_a_test(section: type[Any]) -> None:
    """Every option, also a new one, must be tested to reach the engine or to be refused."""
    for name in section.model_fields:
        file = Path(__file__).parent / ELSEWHERE.get(name, Path(__file__).name)
        assert re.search(rf'"{name}": ', file.read_text()), name


@pytest.mark.parametrize(("number", "text"), [(91002, "9.10.2"), (8902, "8.9.2"), (None, None)])
def test_cudnn_version_has_dots(number: int | None, text: str | None) -> None:
    assert _dotted(number) == text


def test_effective_settings_are_recorded(tiny: PyTorchEngine) -> None:
    record = tiny.describe()
    assert record.model_fingerprint
    assert record.model_revision is None
    assert record.settings["num_threads"] == torch.get_num_threads()
    assert record.settings["deterministic_algorithms"] is False
    assert set(record.versions) >= {"torch", "transformers", "tokenizers"}


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"deterministic": True}, [False, True]),  # off when the first token has come, and then as it was
        ({"deterministic": True, "num_beams": 2}, [False, True]),
        ({"deterministic": False}, [True]),
    ],
)
def test_deterministic_decoding_disables_cudnn_attention(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], calls: list[bool]
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)  # as on a GPU
    made = engine(pytorch=options)
    seen: list[bool] = []
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", seen.append)
    (batch,) = made.prepare([[5, 6, 7]])
    made.generate(batch)
    assert seen == calls


# ---- beams, speculation, compilation: against transformers itself ----


def directly(prompts: Any, batch_size: int = 1, **arguments: Any) -> Any:
    """Return the output of a plain ``generate`` of the same model for prompts of equal length."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama(), dtype=torch.float32)
    model.generation_config.eos_token_id = None
    found = []
    for start in range(0, len(prompts), batch_size):
        ids = torch.tensor(prompts[start : start + batch_size])
        mask = torch.ones_like(ids)
        given = model.generate(ids, attention_mask=mask, pad_token_id=0, max_new_tokens=6, **arguments)
        found += given[:, ids.shape[1] :].tolist()
    return found


@pytest.mark.parametrize("batch_size", [1, 2])
def test_beams_match_plain_generate(batch_size: int) -> None:
    prompts = [prompt[:3] for prompt in PROMPTS]
    beams = {"num_beams": 3, "length_penalty": 0.7, "early_stopping": True}
    made = engine(**GREEDY, pytorch={**beams, "batch_size": batch_size})
    found = outputs(made, prompts)
    assert found == directly(prompts, batch_size, do_sample=False, **beams)
    assert found != outputs(engine(**GREEDY), prompts), "and not what no beams give"
    assert [len(one) for one in found] == [6, 6, 6]


def test_beams_with_prompts_of_many_lengths_run() -> None:
    alone = outputs(engine(**GREEDY, pytorch={"num_beams": 2}))
    together = outputs(engine(**GREEDY, pytorch={"num_beams": 2, "batch_size": 3}))
    assert alone == together


def test_beam_that_ends_early_counts_up_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """About every fourth row ends early, as the model is biased towards its end token. The rest is padding."""
    made = engine(**GREEDY, measurement=NATURAL, pytorch={"num_beams": 2, "batch_size": 3})
    forward = made._model.forward

    def ending(*args: Any, **kwargs: Any) -> Any:
        given = forward(*args, **kwargs)
        # A row whose best token is even wants to end; the bonus is the same for its beams.
        given.logits[..., 2] += torch.where(given.logits.argmax(-1) % 2 == 0, 30.0, -30.0)
        return given

    monkeypatch.setattr(made._model, "forward", ending)
    batch = made.prepare(PROMPTS)[0]
    generated = made.generate(batch)
    requests = made.requests(batch, generated)
    rows = generated.output_ids.tolist()
    lengths = [len(output_ids(one)) for one in requests]
    assert min(lengths) < max(lengths), "some row ended before another"
    for request, row in zip(requests, rows, strict=True):
        assert output_ids(request) == row[: len(output_ids(request))]
        assert 2 not in output_ids(request)[:-1]
        assert output_ids(request)[-1] == 2 or len(output_ids(request)) == 6


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 3}])
def test_tokens_returned_in_groups_have_no_latencies(options: dict[str, int]) -> None:
    result = run_experiment({**TINY, "pytorch": options})
    assert result.tokens.output_tokens == 18
    for name in ("ttft_p50_ms", "itl_p99_ms", "e2e_p50_ms"):
        metric = result.metrics[name]
        assert metric.value is None
        assert ("beam" if "num_beams" in options else "speculative") in not_none(metric.reason)
    assert not_none(result.metrics["output_tokens_per_second"].value) > 0


def test_prompt_lookup_changes_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(**GREEDY, pytorch={"prompt_lookup_num_tokens": 3})
    steps = 0
    forward = made._model.forward

    def counting(**given: Any) -> Any:
        nonlocal steps
        steps += 1
        return forward(**given)

    monkeypatch.setattr(made._model, "forward", counting)
    assert outputs(made) == outputs(engine(**GREEDY))
    assert steps < 18, "some step brought more than one token"


def test_passthrough_speculation_has_no_latencies() -> None:
    made = engine(**GREEDY, passthrough_kwargs={"assistant_early_exit": 2})
    (one,) = generate(made, PROMPTS[:1])
    assert (one.ttft_s, list(one.itl_s), one.e2e_s) == (None, [], None)
    assert output_ids(one) == outputs(engine(**GREEDY))[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_compiled_forward_gives_the_same_tokens() -> None:
    made = engine(**GREEDY, pytorch={"torch_compile": True, "torch_compile_backend": "eager"})
    torch._dynamo.utils.counters.clear()
    assert outputs(made, PROMPTS[:1]) == outputs(engine(**GREEDY), PROMPTS[:1])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "it was compiled"
    settings = made.describe().settings
    assert settings["torch_compile"] == {"mode": "default", "backend": "eager"}
    assert settings["generation"]["disable_compile"] is True
    assert engine(**GREEDY).describe().settings["torch_compile"] is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_gives_the_same_first_token(tmp_path: Path) -> None:
    """One graph, of one layer: each takes seconds. The test above compiles more, with another backend."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_llama(), tmp_path / "tiny")
    file, weights = tmp_path / "tiny" / "config.json", tmp_path / "tiny" / "model.safetensors"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 1}))
    kept = {name: one for name, one in load_file(weights).items() if not re.search(r"layers\.[1-9]", name)}
    save_file(kept, weights, {"format": "pt"})
    fields = {**GREEDY, "model": str(tmp_path / "tiny"), "max_output_tokens": 1}
    made = engine(**fields, pytorch={"torch_compile": True})
    assert outputs(made, PROMPTS[:1]) == outputs(engine(**fields), PROMPTS[:1])
    assert made.describe().settings["torch_compile"] == {"mode": "default", "backend": "inductor"}


def test_mode_and_backend_are_passed_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(torch, "compile", lambda forward, **given: seen.update(given) or forward)
    engine(
        pytorch={
            "torch_compile": True,
            "torch_compile_mode": "max-autotune",
            "torch_compile_backend": "cudagraphs",
        }
    )
    assert seen == {"mode": "max-autotune", "backend": "cudagraphs"}


# ---- chat ----

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture
def chatty(tmp_path: Path) -> Callable[..., Any]:
    """Return a copy of the tiny model with a chat template."""

    def make(template: Any) -> Any:
        folder = tmp_path / "chatty"
        folder.mkdir()
        for file in tiny_llama().iterdir():
            (folder / file.name).symlink_to(file)
        (folder / "chat_template.jinja").write_text(template)
        return str(folder)

    return make


def test_chat_applies_the_models_template(chatty: Callable[..., Any], tmp_path: Path, tiny: PyTorchEngine) -> None:
    made = engine(model=chatty(TEMPLATE), prompt_format="chat", dataset="prompts.txt")
    assert made.encode("hi") == tiny._prompts.tokenizer("<user>hi<a>", add_special_tokens=False)["input_ids"]
    assert tiny.encode("hi") == tiny._prompts.tokenizer("hi")["input_ids"]


@pytest.mark.slow
def test_truncated_chat_prompt_counts_as_truncated(
    chatty: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a\nbc\nd\n")
    fields = {**TINY, "model": chatty(TEMPLATE), "dataset": "prompts.txt", "max_input_tokens": 10}
    chat = run_experiment({**fields, "prompt_format": "chat"})
    assert (chat.tokens.truncated_prompts, chat.tokens.input_tokens) == (1, 10 + 10 + 10)
    raw = run_experiment(fields)
    assert (raw.tokens.truncated_prompts, raw.tokens.input_tokens) == (0, 2 + 3 + 2)


def test_model_without_chat_template_is_refused_before_loading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loading, "load_model", lambda *given: pytest.fail("loaded"))
    with pytest.raises(PreflightError, match=r"^model 'builtin:tiny-llama' has no chat template: "):
        engine(prompt_format="chat", dataset="prompts.txt")


def test_failing_chat_template_is_reported_in_one_line(chatty: Callable[..., Any]) -> None:
    with pytest.raises(PreflightError, match=r"^the chat template of model .* does not take a prompt: no users"):
        engine(model=chatty("{{ raise_exception('no users') }}"), prompt_format="chat", dataset="prompts.txt")


def test_synthetic_prompts_have_no_special_tokens(tiny: PyTorchEngine) -> None:
    assert set(tiny.vocabulary()).isdisjoint({0, 1, 2})
    assert len(tiny.vocabulary()) == 256
    assert tiny.decode(tiny.encode("naïve\n")) == "naïve\n"


def test_model_memory_is_the_size_of_its_weights(tiny: PyTorchEngine) -> None:
    assert tiny.model_memory_bytes() == pytest.approx(2 * tiny.describe().settings["parameters"], rel=0.01)


def test_run_experiment_runs_in_this_process() -> None:
    result = run_experiment({**TINY, "pytorch": {"batch_size": 2}})
    assert result.tokens.input_tokens == 24
    assert result.tokens.output_tokens == 18
    assert set(result.metrics) == set(CATALOGUE)
    missing = {name for name, metric in result.metrics.items() if metric.value is None}
    conditions = {"peak_temperature_c", "throttled_seconds", "mfu", "mbu", "roofline_slowdown"}  # of GPUs
    not_asked = {"idle_power_w", "active_energy_j", "gco2e_g", *PREFILL_METRICS}
    serving = {*SERVING_METRICS}
    no_queue = {f"queue_p{p}_ms" for p in PERCENTILES} | {"cache_memory_mb", "used_cache_memory_mb"}
    assert missing - {"gpu_energy_j", "dram_energy_j"} - conditions == not_asked | no_queue | serving
    assert all(result.metrics[name].reason for name in missing)
    metrics: dict[str, Any] = {name: metric.value for name, metric in result.metrics.items()}
    assert metrics["output_tokens_per_second"] == pytest.approx(18 / metrics["seconds"])
    assert metrics["energy_per_output_token_j"] == pytest.approx(metrics["energy_j"] / 18)
    assert metrics["energy_per_request_j"] == pytest.approx(metrics["energy_j"] / 3)
    assert metrics["wh_per_1000_requests"] == pytest.approx(metrics["energy_j"] / 3 / 3.6)
    assert metrics["tokens_per_joule"] == pytest.approx(18 / metrics["energy_j"])
    assert metrics["edp_js"] == pytest.approx(metrics["energy_j"] * metrics["seconds"])
    assert metrics["peak_memory_mb"] > metrics["model_memory_mb"] > 0
    assert result.engine.random_weights
    assert any("random weights" in warning for warning in texts(result.warnings))
    assert (
        run_experiment({**TINY, "pytorch": {"batch_size": 2}}).tokens.output_digest == result.tokens.output_digest
    )


@pytest.mark.parametrize(("declared", "random"), [(True, True), (False, False), (None, False)])
def test_model_may_declare_random_weights(declared: bool | None, random: bool, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama(), tmp_path / "made")
    path = tmp_path / "made" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "random_weights": declared}))
    assert engine(model=str(tmp_path / "made")).describe().random_weights is random
