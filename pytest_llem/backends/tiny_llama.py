"""``builtin:tiny-llama``: a Llama-architecture model that needs no download.

Its weights are random, so it shows that everything works and says nothing about any real model's output. Speed
and memory are those of its shape.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAME = "tiny-llama"

#: Changed whenever the files below would come out different.
VERSION = 1

SEED = 20_240_607
_STD = 0.02

_SPECIALS = ("<pad>", "<bos>", "<eos>")

#: As transformers names it.
SHAPE = {
    "vocab_size": 256 + len(_SPECIALS),
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def cache_directory() -> Path:
    """Return the user's cache folder of this package (``$XDG_CACHE_HOME`` or ``~/.cache``)."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "pytest-llem"


def model_folder() -> Path:
    """Return where the model's folder is, or will be."""
    return cache_directory() / f"{NAME}-v{VERSION}"


def tiny_llama() -> Path:
    """Return the model's folder; generate it first where it is not there yet.

    Safe to call from several processes at once: the folder appears whole, and the first one wins.

    Raises:
        OSError: The cache cannot be written.
    """
    folder = model_folder()
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{NAME}-"))
    try:
        _generate(temporary)
        temporary.chmod(0o755)
        temporary.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _generate(folder: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_tokenizer()
    config = LlamaConfig(
        **SHAPE,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    # Uniform and not normal: torch's normal on a CPU goes through vectorised logarithms that differ in the last
    # bit between processors, its uniform is exact everywhere.
    generator = torch.Generator().manual_seed(SEED)
    weights = {}
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 1:
            weights[name] = torch.ones(parameter.shape)
        else:
            uniform = torch.rand(parameter.shape, generator=generator)
            weights[name] = (uniform - 0.5) * (_STD * 12**0.5)
    model = model.to_empty(device="cpu")
    model.load_state_dict(weights)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a byte and three special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*_SPECIALS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
