"""The engine pytorch with the tiny model, in this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pytest_llem.engines.protocol import EngineContext, RequestRecord
from pytest_llem.engines.pytorch.engine import PyTorchEngine
from pytest_llem.study.config import ExperimentConfig
from tests.support.measured import output_ids

#: An experiment that takes a moment.
TINY = {
    "model": "builtin:tiny-llama",
    "n": 3,
    "max_input_tokens": 8,
    "max_output_tokens": 6,
    "warmup": {"enabled": False},
    "measurement": {"min_window_seconds": 0},
    "baseline": {"enabled": False},
}
NATURAL = {"length_mode": "natural", "min_window_seconds": 0}
GREEDY = {"decoder": {"do_sample": False}, "precision": "fp32"}
PROMPTS = [[5, 6, 7, 5, 6, 7, 5, 6], [9, 9, 9, 9], [40, 41, 42]]

#: Common sizes, by the names of most configurations.
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def config(**changes: Any) -> ExperimentConfig:
    """Return the experiment, with changes."""
    return ExperimentConfig.model_validate({**TINY, **changes})


def engine(**changes: Any) -> PyTorchEngine:
    """Return the loaded engine for the experiment with changes."""
    made = PyTorchEngine(config(**changes), EngineContext())
    made.fetch()
    made.load()
    return made


def generate(made: PyTorchEngine, prompts: Sequence[Sequence[int]]) -> list[RequestRecord]:
    """Return the requests for *prompts*."""
    made.seed(0)
    return [request for batch in made.prepare(prompts) for request in made.requests(batch, made.generate(batch))]


def outputs(made: PyTorchEngine, prompts: Sequence[Sequence[int]] = PROMPTS) -> list[list[int]]:
    """Return the generated tokens of each of *prompts*."""
    return [output_ids(one) for one in generate(made, prompts)]


def decoder(kind: str, **changes: Any) -> Any:
    """Return a model of transformers' model type *kind*, ready to run. *changes* override its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, "attn_implementation": "eager", **changes})
    return AutoModelForCausalLM.from_config(config).eval()
