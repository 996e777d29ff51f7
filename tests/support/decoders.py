"""Make tiny models of many architectures with random weights, without files."""

from __future__ import annotations

from typing import Any

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


def decoder(kind: str, **changes: Any) -> Any:
    """Return a model of transformers' model type *kind*, ready to run. *changes* override its configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, "attn_implementation": "eager", **changes})
    return AutoModelForCausalLM.from_config(config).eval()
