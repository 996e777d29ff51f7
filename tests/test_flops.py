"""FLOPs and bytes of a decoder, compared with torch's own count and with the tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llem.engines.protocol import EngineContext, ShapeUnknownError
from pytest_llem.engines.pytorch.engine import PyTorchEngine
from pytest_llem.measurement.roofline import steps
from tests.support.marks import slow
from tests.support.tiny import GREEDY, NATURAL, config, decoder, engine, generate

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers.modeling_outputs import CausalLMOutputWithPast  # noqa: E402

from pytest_llem.engines.pytorch.shape import model_shape  # noqa: E402
from tests.support.measured import output_ids  # noqa: E402

#: Name of the cache in a model's output and arguments: another one before transformers 5.24.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"

#: torch counts the FLOPs of attention only if it is computed by matrix products.
EAGER = {"attn_implementation": "eager", "batch_size": 8}


def counted(run: Any, *arguments: Any) -> Any:
    """Return the FLOPs that torch counts for a call, and the call's result."""
    with FlopCounterMode(display=False) as counter:
        given = run(*arguments)
    return counter.get_total_flops(), given


def computed_flops(made: Any, requests: Any) -> Any:
    lengths = [(one.input_tokens, len(output_ids(one))) for one in requests]
    return [step.flops for step in steps(made.shape(), lengths)]


def both(made: Any, prompts: Any) -> Any:
    """Return torch's FLOPs and those computed here, of prefill and of the whole pass."""
    (batch,) = made.prepare(prompts)
    made.seed(0)
    prefill, _ = counted(made.generate_first, batch)
    whole, generated = counted(made.generate, batch)
    computed = computed_flops(made, made.requests(batch, generated))
    return (prefill, computed[0]), (whole, sum(computed))


@pytest.mark.parametrize("tokens", [1, slow(9)])
def test_flops_of_the_tiny_model_equal_torchs_count(tokens: int) -> None:
    made = engine(**GREEDY, n=8, pytorch=EAGER, max_output_tokens=tokens)
    for torchs, computed in both(made, [[5 + n % 200 for n in range(100)]] * 3):
        assert computed == pytest.approx(torchs, rel=0.01)


@pytest.mark.slow
def test_flops_of_smollm2_equal_torchs_count(smollm2: Path) -> None:
    """Prompts of 150 tokens: attention is 2 % of their FLOPs."""
    fields = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "max_output_tokens": 3,
        **GREEDY,
        "n": 8,
        "pytorch": EAGER,
    }
    made = PyTorchEngine(config(**fields), EngineContext((smollm2,)))
    made.fetch()
    made.load()
    for torchs, computed in both(made, [list(range(1000, 1150))] * 2):
        assert computed == pytest.approx(torchs, rel=0.01)
    # Count each tensor once: head and embedding share one of 49152 · 576 values, which is read as the head.
    shape, model = made.shape(), made._model
    tensors = {one.data_ptr(): one for one in model.state_dict().values()}
    assert shape.weight_bytes == sum(one.nbytes for one in tensors.values()) == 4 * 134_515_008
    with torch.no_grad():
        cache = model(input_ids=torch.arange(7)[None] + 1000, use_cache=True)[CACHE]
    kept = sum(one.nbytes for layer in cache.layers for one in (layer.keys, layer.values))
    assert 7 * shape.kv_values_per_token * shape.kv_bytes_per_value == kept
    # A pass reads the weights in each of 3 steps, and in all but the first the context of both prompts.
    read = sum(step.bytes for step in steps(shape, [(150, 3)] * 2))
    assert read == 3 * shape.weight_bytes + 2 * (151 + 152) * kept / 7


def test_padding_and_tokens_after_the_end_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's count row by row, without padding, equals the FLOPs of the batch."""
    made = engine(**GREEDY, n=8, measurement=NATURAL, pytorch=EAGER)
    forward = made._model.forward

    @functools.wraps(forward)  # generate inspects the signature
    def ending(*args: Any, **kwargs: Any) -> Any:
        given = forward(*args, **kwargs)
        given.logits[..., 2] += torch.where(given.logits.argmax(-1) % 2 == 0, 30.0, -30.0)
        return given

    monkeypatch.setattr(made._model, "forward", ending)
    prompts = [[5, 6, 7, 5, 6, 7, 5, 6], [9, 9, 9], [40, 41], [77]]
    together = generate(made, prompts)
    assert len({len(output_ids(one)) for one in together}) > 1, "they end at different steps"
    alone = [counted(made.generate, made.prepare([prompt])[0])[0] for prompt in prompts]
    assert sum(computed_flops(made, together)) == pytest.approx(sum(alone), rel=0.01)


# ---- architectures ----

DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied llama": {"tie_word_embeddings": True},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "phi3": {},
    "gemma2": {"head_dim": 8, "sliding_window": 64},
    "mistral": {"sliding_window": 16},
}


def made_of(name: Any) -> Any:
    """Return the model of an entry of DENSE."""
    return decoder(name.removeprefix("tied "), **DENSE[name])


@pytest.mark.parametrize("name", DENSE)
def test_shapes_of_architectures_count_as_torch_does(name: str) -> None:
    model = made_of(name)
    ids = torch.arange(10, 22)[None]
    with torch.no_grad():
        torchs, output = counted(lambda: model(input_ids=ids, logits_to_keep=1, use_cache=True))
        step, _ = counted(lambda: model(input_ids=ids[:, :1], **{CACHE: output[CACHE]}))
    prefill, decode = (step.flops for step in steps(model_shape(model), [(12, 2)]))
    assert [prefill, decode] == pytest.approx([torchs, step], rel=0.01)


@pytest.mark.parametrize("name", ["llama", "tied llama", "gpt2"])
def test_the_bytes_of_a_step_are_those_of_its_tensors(name: str) -> None:
    model = made_of(name)
    tensors = dict(model.named_parameters())  # a tensor with two names is in it once
    looked_up = {"gpt2": ["transformer.wpe.weight"], "llama": ["model.embed_tokens.weight"], "tied llama": []}
    read = [one for key, one in tensors.items() if key not in looked_up[name]]
    assert model_shape(model).weight_bytes == sum(one.numel() * one.element_size() for one in read)
    assert model_shape(model.half()).weight_bytes == sum(one.numel() * 2 for one in read)
    assert ("lm_head.weight" in tensors) == (name == "llama")


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_the_bytes_of_a_token_are_those_of_the_cache(name: str) -> None:
    model = made_of(name).to(torch.bfloat16)
    with torch.no_grad():
        cache = model(input_ids=torch.arange(7)[None] + 10, use_cache=True)[CACHE]
    kept = sum(one.nbytes for layer in cache.layers for one in (layer.keys, layer.values))
    shape = model_shape(model)
    assert 7 * shape.kv_values_per_token * shape.kv_bytes_per_value == kept
    assert shape.precision == "bf16"


class NewOutput(dict[str, Any]):
    """The output of transformers 5.24, which warns of the cache's older name."""

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self or key == "past_key_values" else default

    def __getitem__(self, key: str) -> Any:
        assert key != "past_key_values"
        return super().__getitem__(key)


def test_older_name_of_the_cache_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made_of("llama")
    forward = type(model).forward

    def run(self: Any, **given: Any) -> NewOutput:
        return NewOutput(cache=forward(self, **given)[CACHE])

    monkeypatch.setattr(type(model), "forward", run)
    assert model_shape(model).kv_values_per_token > 0


def test_narrowest_sliding_window_is_reported() -> None:
    assert model_shape(made_of("mistral")).sliding_window == 16
    assert model_shape(made_of("gemma2")).sliding_window == 64
    assert model_shape(made_of("llama")).sliding_window is None


def with_a_layer_of_two(model: Any) -> Any:
    model.model.layers[1] = model.model.layers[0]
    return model


def with_a_matrix(model: Any) -> Any:
    model.model.norm.weight = torch.nn.Parameter(torch.ones(32, 1))
    return model


def run_twice(model: Any) -> Any:
    layer = model.model.layers[0].mlp
    forward = type(layer).forward
    layer.forward = lambda states: forward(layer, forward(layer, states))
    return model


def spread(model: Any) -> Any:
    model.lm_head.to("meta")
    return model


def two_stacks(model: Any) -> Any:
    model.config.is_encoder_decoder = True
    return model


def mixed(model: Any) -> Any:
    model.model.layers[0].mlp.to(torch.float64)
    return model


def quantised(model: Any) -> Any:
    quantisation = SimpleNamespace(to_json_string=lambda use_diff: '{"quant_method": "gptq"}')
    model.config.quantization_config = quantisation
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: decoder("mixtral", num_local_experts=2), "a mixture of experts computes with a part"),
        (lambda: decoder("mamba", state_size=4), "MambaMixer is neither a linear layer nor an embedding"),
        (lambda: with_a_matrix(decoder("llama")), "LlamaRMSNorm is neither a linear layer nor an embedding"),
        (lambda: with_a_layer_of_two(decoder("llama")), "its attention is not the standard one of queries"),
        (lambda: run_twice(decoder("llama")), r"a token takes [\d,]+ FLOPs, but [\d,]+ by its linear layers"),
        (lambda: spread(decoder("llama")), "the model is spread over several devices, or offloaded"),
        (lambda: two_stacks(decoder("llama")), "the model is an encoder and a decoder"),
        (lambda: mixed(decoder("llama")), "a token cannot be run through the model: "),
        (lambda: quantised(decoder("llama")), "the weights are quantised"),
    ],
)
def test_model_that_is_not_a_plain_decoder_has_no_shape(model: Callable[..., Any], reason: str) -> None:
    with pytest.raises(ShapeUnknownError, match=f"^{reason}"):
        model_shape(model())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pytorch": {"num_beams": 2}}, "beam sample computes more than its answers show"),
        ({"pytorch": {"prompt_lookup_num_tokens": 3}}, "speculative decoding computes drafts"),
        ({"pytorch": {"use_cache": False}}, "without a cache every step computes its whole context again"),
        ({"passthrough_kwargs": {"guidance_scale": 1.5}}, "guidance runs every token through the model twice"),
    ],
)
def test_generation_with_extra_computation_has_no_shape(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ShapeUnknownError, match=f"^{reason}"):
        engine(**changes).shape()


def test_fp32_that_may_be_tf32_has_no_peak_of_fp32() -> None:
    made = engine(**GREEDY)
    assert made.shape().precision == "fp32"
    torch.set_float32_matmul_precision("high")
    try:
        assert made.shape().precision == "tf32"
    finally:
        torch.set_float32_matmul_precision("highest")
