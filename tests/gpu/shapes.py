"""Write models of Llama's shapes with random weights.

    python -m tests.gpu.shapes 1b FOLDER [--no-weights]

Speed is that of the shape; power depends on the values, and theirs are not a trained model's. Without weights,
vLLM makes random ones: ``load_format: dummy``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

#: Values from the configurations of meta-llama/Llama-3.2-1B, Llama-3.1-8B and Llama-3.1-70B.
SHAPES = {
    "1b": {
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
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {**_ROPE, "factor": 8.0},
    },
}

VOCABULARY = 128_256
BOS, EOS = 128_000, 128_001


def make(shape: str, folder: Path, *, weights: bool = True) -> None:
    """Write a model and its tokenizer to *folder*, which appears only when it is complete."""
    config = LlamaConfig(
        **SHAPES[shape],
        vocab_size=VOCABULARY,
        max_position_embeddings=131_072,
        rms_norm_eps=1e-5,
        bos_token_id=BOS,
        eos_token_id=EOS,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if weights:
        _random(config).save_pretrained(partial)
    else:
        config.save_pretrained(partial)
    _tokenizer().save_pretrained(partial)
    path = partial / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "random_weights": True}, indent=2))
    partial.rename(folder)


def _random(config: LlamaConfig) -> LlamaForCausalLM:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return LlamaForCausalLM(config)


def _tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with as many words as the model has tokens."""
    words = {f"t{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": f"t{BOS}", "eos_token": f"t{EOS}", "pad_token": f"t{EOS}"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), weights="--no-weights" not in sys.argv)
