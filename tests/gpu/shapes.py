"""Write models of known shapes with random weights.

    python -m tests.gpu.shapes 1b FOLDER [--no-weights]

Speed is that of the shape; power depends on the values, and theirs are not a trained model's. Without weights,
vLLM makes random ones: ``load_format: dummy``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

#: Values of Llama 3 that do not depend on its size.
_LLAMA = {
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}

#: Values from the configurations of meta-llama/Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B, and Qwen/Qwen3-14B.
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": {**_ROPE, "factor": 32.0},
    },
    "8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {**_ROPE, "factor": 8.0},
    },
    "70b": {
        **_LLAMA,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {**_ROPE, "factor": 8.0},
    },
    "14b": {
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    },
}


def make(shape: str, folder: Path, *, weights: bool = True) -> None:
    """Write a model and its tokenizer to *folder*, which appears only when it is complete."""
    kind, architecture = (Qwen3Config, "Qwen3ForCausalLM") if shape == "14b" else (LlamaConfig, "LlamaForCausalLM")
    config = kind(**SHAPES[shape], dtype="bfloat16", architectures=[architecture])
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if weights:
        _random(config).save_pretrained(partial)
    else:
        config.save_pretrained(partial)
    _tokenizer(config).save_pretrained(partial)
    path = partial / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "random_weights": True}, indent=2))
    partial.rename(folder)


def _random(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(config)


def _tokenizer(config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """Return a tokenizer with as many words as the model has tokens."""
    words = {f"t{index}": index for index in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    bos, eos = f"t{config.bos_token_id}", f"t{config.eos_token_id}"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), weights="--no-weights" not in sys.argv)
