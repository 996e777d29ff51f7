"""Generate ``builtin:tiny-llama``, a small model of the Llama architecture that needs no download.

Its weights are random. It shows that a study works; its output means nothing. Speed and memory use are those of a
model of this size.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NAME = "tiny-llama"
BUILTIN_NAME = f"builtin:{NAME}"

#: Increase this number if the generated files change.
VERSION = 1

SEED = 20_240_607
_STD = 0.02

_SPECIALS = ("<pad>", "<bos>", "<eos>")

#: Fields of transformers' LlamaConfig.
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


def model_folder() -> Path:
    """Return the model's folder in the cache, which may be missing."""
    return _cache_path(f"{NAME}-v{VERSION}")


def cache_folder(name: str) -> Path:
    """Return a folder in the cache, made if it is missing.

    Raises:
        OSError: Neither the cache nor a temporary folder can be written.
    """
    folder = _cache_path(name)
    if folder.parent == _temporary_cache():
        _make_private(folder.parent)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _cache_path(name: str) -> Path:
    """Return the path of a folder in the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``).

    If the cache cannot be written, as without a home directory or with a read-only one, the folder is in a
    temporary folder of this user.
    """
    own = _user_cache()
    if own is not None and (os.path.isdir(own / name) or _can_be_made(own / name)):  # noqa: PTH112  # see _can_be_made
        return own / name
    return _temporary_cache() / name


def cache_note() -> str | None:
    """Return a note that the model is kept in a temporary folder, and why; None if it is in the user's cache."""
    folder, own = model_folder(), _user_cache()
    if own is not None and folder.parent == own:
        return None
    what = f"{own} cannot be written" if own is not None else "there is no home directory"
    return f"{what}: {BUILTIN_NAME} is kept in {folder.parent} (XDG_CACHE_HOME names another folder)"


def _user_cache() -> Path | None:
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(root) if root else Path.home() / ".cache") / "pytest-llem"
    except RuntimeError:  # HOME is not set, and the user is not in the password database
        return None


def _temporary_cache() -> Path:
    return Path(tempfile.gettempdir(), f"pytest-llem-{os.geteuid()}")


def _make_private(folder: Path) -> None:
    """Make a folder that only this user can write. Another user may already have made a folder of that name.

    Raises:
        OSError: The folder cannot be made, or belongs to another user.
    """
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(errno.EACCES, "is not a folder of this user's alone: remove it", str(folder))


def _can_be_made(folder: Path) -> bool:
    """Return whether a missing folder can be made: its nearest existing parent has to be a writable folder."""
    # Path's methods raise for a path in a folder that this user cannot read. A dangling link counts as existing.
    above = next(one for one in folder.parents if os.path.lexists(one))
    return os.path.isdir(above) and os.access(above, os.W_OK | os.X_OK)  # noqa: PTH112


def tiny_llama() -> Path:
    """Return the model's folder, and generate it first if it does not exist.

    Safe to call from several processes at once: the folder appears complete, and the first process wins.

    Raises:
        OSError: Neither the cache nor a temporary folder can be written.
        ImportError: It does not exist, and torch or transformers is not installed.
    """
    folder = model_folder()
    if folder.parent == _temporary_cache():
        _make_private(folder.parent)
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
    # Uniform and not normal values: torch's normal on a CPU uses vectorised logarithms, whose last bit differs
    # between processors. Its uniform is the same everywhere.
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
    """Return a tokenizer with one token for each byte and three special tokens."""
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
