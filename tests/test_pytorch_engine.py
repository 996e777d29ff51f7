"""The engine pytorch: exact counts, real latencies, options that reach transformers."""

from __future__ import annotations

import pytest

from pytest_llem import run_experiment
from pytest_llem.backends.protocol import EngineContext, PreflightError
from pytest_llem.backends.pytorch import Generated, PyTorchEngine
from pytest_llem.results.metrics import CATALOGUE
from pytest_llem.study.config import ExperimentConfig

torch = pytest.importorskip("torch")

TINY = {
    "model": "builtin:tiny-llama",
    "n": 3,
    "max_input_tokens": 8,
    "max_output_tokens": 6,
    "warmup": {"enabled": False},
    "measurement": {"min_window_seconds": 0},
}


def engine(**changes):
    made = PyTorchEngine(ExperimentConfig.model_validate({**TINY, **changes}), EngineContext())
    made.fetch()
    made.load()
    return made


def generate(made, prompts):
    made.seed(0)
    return [request for batch in made.prepare(prompts) for request in made.requests(batch, made.generate(batch))]


@pytest.fixture(scope="module")
def tiny():
    return engine(pytorch={"batch_size": 2})


def test_batches_are_padded_on_the_left(tiny):
    first, second = tiny.prepare([[5, 6, 7], [8], [9, 10]])
    assert first.input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert first.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert first.lengths == (3, 1)
    assert second.input_ids.tolist() == [[9, 10]]
    assert [tiny.positions(batch) for batch in (first, second)] == [6, 2]


def test_padding_changes_nothing():
    greedy = {"decoder": {"do_sample": False}, "precision": "fp32"}
    alone = generate(engine(**greedy, pytorch={"batch_size": 1}), [[5, 6, 7, 8], [9]])
    together = generate(engine(**greedy, pytorch={"batch_size": 2}), [[5, 6, 7, 8], [9]])
    assert [one.output_ids for one in alone] == [one.output_ids for one in together]


def test_fixed_length_gives_every_sequence_its_full_length(tiny):
    requests = generate(tiny, [[5, 6, 7], [8], [9, 10]])
    assert [len(one.output_ids) for one in requests] == [6, 6, 6]
    assert [one.input_tokens for one in requests] == [3, 1, 2]
    for one in requests:
        assert len(one.itl_s) == 5
        assert one.ttft_s > 0
        assert one.e2e_s == pytest.approx(one.ttft_s + sum(one.itl_s))


def test_a_sequence_ends_with_its_own_end_token(tiny):
    natural = engine(measurement={"length_mode": "natural", "min_window_seconds": 0}, pytorch={"batch_size": 4})
    end = natural.describe().settings["generation"]["eos_token_id"]
    (batch,) = natural.prepare([[5, 6], [7], [8], [9]])
    new = [[11, end, 0, 0], [end, 0, 0, 0], [11, 12, 13, 14], [11, 12, 13, end]]
    sequences = torch.cat([batch.input_ids, torch.tensor(new)], dim=1)
    requests = natural.requests(batch, Generated(sequences, 10.0, [11.0, 11.5, 12.5, 14.5]))
    assert [one.output_ids for one in requests] == [[11, end], [end], [11, 12, 13, 14], [11, 12, 13, end]]
    assert [one.ttft_s for one in requests] == [1.0] * 4
    assert [one.itl_s for one in requests] == [[0.5], [], [0.5, 1.0, 2.0], [0.5, 1.0, 2.0]]
    assert [one.e2e_s for one in requests] == [1.5, 1.0, 4.5, 4.5]


def test_the_same_seed_gives_the_same_tokens(tiny):
    prompts = [[5, 6, 7], [8]]
    assert [one.output_ids for one in generate(tiny, prompts)] == [
        one.output_ids for one in generate(tiny, prompts)
    ]


@pytest.mark.parametrize(
    ("changes", "setting", "value"),
    [
        ({"precision": "fp16"}, "dtype", "float16"),
        ({"precision": "fp32"}, "dtype", "float32"),
        ({"pytorch": {"attn_implementation": "eager"}}, "attn_implementation", "eager"),
    ],
)
def test_settings_reach_the_model(changes, setting, value):
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
        ({"pytorch": {"use_cache": False}}, {"use_cache": False}),
        ({"pytorch": {"cache_implementation": "static"}}, {"cache_implementation": "static"}),
        ({"dataset": {"output_len": 2}}, {"max_new_tokens": 2}),
    ],
)
def test_generation_options_reach_generate(changes, expected, monkeypatch):
    made = engine(**changes)
    seen = {}
    real = made._model.generate
    monkeypatch.setattr(made._model, "generate", lambda **given: seen.update(given) or real(**given))
    requests = generate(made, [[5, 6, 7]])
    used = seen["generation_config"].to_dict()
    assert {name: used[name] for name in expected} == expected
    assert len(requests[0].output_ids) == expected.get("max_new_tokens", 6)


def test_greedy_is_not_sampled():
    greedy = engine(decoder={"do_sample": False})
    one = generate(greedy, [[5, 6, 7]])
    greedy.seed(1)
    (batch,) = greedy.prepare([[5, 6, 7]])
    assert greedy.requests(batch, greedy.generate(batch))[0].output_ids == one[0].output_ids


def test_a_missing_attention_kernel_is_named():
    with pytest.raises(PreflightError, match=r"(?i)flash.?att"):
        engine(pytorch={"attn_implementation": "flash_attention_2"})


def test_special_tokens_are_no_synthetic_prompt(tiny):
    assert set(tiny.vocabulary()).isdisjoint({0, 1, 2})
    assert len(tiny.vocabulary()) == 256
    assert tiny.decode(tiny.encode("naïve\n")) == "naïve\n"


def test_model_memory_is_that_of_its_weights(tiny):
    assert tiny.model_memory_bytes() == pytest.approx(2 * tiny.describe().settings["parameters"], rel=0.01)


def test_run_experiment_runs_here():
    result = run_experiment({**TINY, "pytorch": {"batch_size": 2}})
    assert result.tokens.input_tokens == 24
    assert result.tokens.output_tokens == 18
    assert set(result.metrics) == set(CATALOGUE)
    missing = {name for name, metric in result.metrics.items() if metric.value is None}
    assert missing <= {"gpu_energy_j", "dram_energy_j"}
    assert all(result.metrics[name].reason for name in missing)
    metrics = {name: metric.value for name, metric in result.metrics.items()}
    assert metrics["output_tokens_per_second"] == pytest.approx(18 / metrics["seconds"])
    assert metrics["energy_per_output_token_j"] == pytest.approx(metrics["energy_j"] / 18)
    assert metrics["energy_per_request_j"] == pytest.approx(metrics["energy_j"] / 3)
    assert metrics["wh_per_1000_requests"] == pytest.approx(metrics["energy_j"] / 3 / 3.6)
    assert metrics["tokens_per_joule"] == pytest.approx(18 / metrics["energy_j"])
    assert metrics["edp_js"] == pytest.approx(metrics["energy_j"] * metrics["seconds"])
    assert metrics["peak_memory_mb"] > metrics["model_memory_mb"] > 0
    assert result.engine.random_weights
    assert any("random weights" in warning for warning in result.warnings)
    assert (
        run_experiment({**TINY, "pytorch": {"batch_size": 2}}).tokens.output_digest == result.tokens.output_digest
    )
