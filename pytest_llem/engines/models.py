"""Where a model comes from."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_llem.engines import hub
from pytest_llem.engines.protocol import ModelNotFoundError
from pytest_llem.engines.tiny_llama import NAME, model_folder, tiny_llama

BUILTIN = "builtin:"

#: What is downloaded of a hub model: weights in the format transformers prefers, and all that is small.
DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]

#: Suffixes of files that hold weights.
WEIGHTS = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


@dataclass(frozen=True)
class ModelSource:
    """A model that was found.

    Attributes:
        location: What to hand to ``from_pretrained``: a folder, or a hub id.
        kind: ``local``, ``builtin``, ``model_path`` or ``hub``.
        random_weights: The weights are no trained model's.
    """

    location: str
    kind: str
    random_weights: bool = False


def resolve_model(
    name: str, model_path: Sequence[Path], revision: str | None = None, *, download: bool = True
) -> ModelSource:
    """Find *name*: an existing local folder, a builtin, a folder of that name under *model_path*, the hub.

    A hub model is downloaded here. Its configuration comes first, so that a name that leads nowhere is known
    before anything else is done. Without *download* the hub is not asked, and what it may have counts as found.

    Raises:
        ModelNotFoundError: It is nowhere to be had; the message says where it was looked for.
    """
    if name.startswith(BUILTIN):
        if name != BUILTIN + NAME:
            raise ModelNotFoundError(f"model {name!r} not found: the only builtin is {BUILTIN}{NAME}")
        try:
            folder = tiny_llama() if download else model_folder()
        except OSError as error:
            raise ModelNotFoundError(f"model {name!r} cannot be made: {error}") from error
        return ModelSource(str(folder), "builtin", random_weights=True)
    if (here := _local(name, model_path)) is not None:
        return here
    searched = [f"no folder {_expanded(name)}"]
    searched.append(
        "none of that name under llem_model_path (" + ", ".join(map(str, model_path)) + ")"
        if model_path
        else "llem_model_path is not set"
    )
    refusal = _hub_refusal(name, revision, download=download)
    if refusal:
        raise ModelNotFoundError(f"model {name!r} not found: {'; '.join([*searched, refusal])}")
    return ModelSource(name, "hub")


def _local(name: str, model_path: Sequence[Path]) -> ModelSource | None:
    """Return the model of that name in a folder of this machine; None where there is none."""
    places = [("local", _expanded(name)), *(("model_path", directory / name) for directory in model_path)]
    return next((ModelSource(str(place), kind) for kind, place in places if _is_folder(place)), None)


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~nobody
        return Path(name)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name that is too long, or that no system takes
        return False


def cached_snapshot(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a hub model in the local cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent if isinstance(file, str) else None


def damaged_model(name: str, source: ModelSource, revision: str | None = None) -> str | None:
    """Return why a model that was found cannot be loaded; None where no file can be seen to be damaged.

    Args:
        name: As the study has it.
        source: Where it was found.
        revision: Of the hub's; None for its main branch.
    """
    folder = cached_snapshot(source.location, revision) if source.kind == "hub" else Path(source.location)
    damage = damaged_file(folder) if folder is not None and folder.is_dir() else None
    return None if damage is None else f"model {name!r} cannot be loaded: {damage}"


def hub_revision(source: ModelSource, revision: str | None) -> str | None:
    """Return the commit of a model from the hub, None for any other. The cache names its folders so."""
    folder = cached_snapshot(source.location, revision) if source.kind == "hub" else None
    return folder.name if folder else None


def fingerprint(source: ModelSource, revision: str | None) -> str | None:
    """Return a SHA-256 by which to tell models in folders apart; None where *source* has no folder.

    It is over ``config.json`` and over the name and size of each file with weights: weights of the same shape with
    other values are not told apart. Reading 100 GB of them would take minutes.
    """
    folder = cached_snapshot(source.location, revision) if source.kind == "hub" else Path(source.location)
    if folder is None:
        return None
    digest = hashlib.sha256()
    try:
        digest.update((folder / "config.json").read_bytes())
        for file in sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS):
            digest.update(f"\n{file.name} {file.stat().st_size}".encode())
    except OSError:
        return None
    return digest.hexdigest()


def folder_state(name: str, model_path: Sequence[Path]) -> str | None:
    """Return a digest by which to tell whether a model's local folder has changed; None for any other model.

    It is over the name, size and time of modification of each file. Nothing is read.
    """
    source = None if name.startswith(BUILTIN) else _local(name, model_path)
    if source is None:
        return None
    folder = Path(source.location)
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        found = file.stat()
        digest.update(f"{file.relative_to(folder)} {found.st_size} {found.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _hub_refusal(name: str, revision: str | None, *, download: bool) -> str | None:
    """Return why the Hugging Face hub does not have *name*, or None if it, or its cache, does."""
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    try:
        cached = cached_snapshot(name, revision)
        if constants.HF_HUB_OFFLINE and not cached:
            return hub.not_cached()
        if constants.HF_HUB_OFFLINE or not download:
            return None
        hf_hub_download(name, "config.json", revision=revision)
        snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED)
    except Exception as error:
        return hub.refusal(error, revision)
    return None


#: What configurations of transformers call it. Models without one (ALiBi, recurrent ones) have no limit.
_NAMES = ("max_position_embeddings", "n_positions")

#: Ways to scale rotary embeddings whose factor comes on top of what is stated; for others it is part of it.
_STRETCHED = ("linear", "dynamic", "yarn")


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the most tokens of prompt and answer together; None where its configuration states no limit.

    Args:
        config: As in ``config.json``, of the part that is the language model where a model has several.
    """
    stated = next((config[name] for name in _NAMES if type(config.get(name)) is int), 0)
    if stated <= 0:
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    length = stated
    for one in (rope, *rope.values()):  # of a layer's type each, in some
        if isinstance(one, dict) and (one.get("rope_type") or one.get("type")) in _STRETCHED:
            original = one.get("original_max_position_embeddings") or stated
            length = max(length, int(original * (one.get("factor") or 1)))
    return length


def too_long(model: str, prompt: int, output: int, limit: int) -> str:
    """Return why a prompt does not fit, and what to do.

    Args:
        model: Its name in the study.
        prompt: Tokens of the prompt.
        output: Tokens to generate.
        limit: The model's :func:`context_length`.
    """
    return (
        f"model {model!r} takes {limit:,} tokens, and a prompt of {prompt:,} with max_output_tokens {output:,} is "
        f"{prompt + output:,}: lower max_input_tokens or max_output_tokens, or name a model with a longer context"
    )


#: What git leaves in place of a large file that git-lfs has not fetched begins so.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

#: More than any header of a safetensors file takes.
_LARGEST_HEADER = 100_000_000

#: In the order in which transformers looks for them: the first that is there is loaded.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class NotSafetensorsError(ValueError):
    """A file that is not a whole safetensors file; the message says what is wrong with it."""


def read_header(file: Path) -> dict[str, Any]:
    """Return a safetensors file's header: ``dtype``, ``shape`` and ``data_offsets`` of each tensor, by its name.

    Raises:
        NotSafetensorsError: It is of another format, or cut off.
        OSError: It cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length > _LARGEST_HEADER:
            raise NotSafetensorsError("is not a safetensors file")
        if size < 8 + length or len(start) < 8:
            raise NotSafetensorsError(f"is truncated at {size:,} bytes, within its header")
        try:
            header = json.loads(content.read(length))
            tensors = {name: one for name, one in header.items() if name != "__metadata__"}
            end = 8 + length + max((one["data_offsets"][1] for one in tensors.values()), default=0)
        except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
            raise NotSafetensorsError("is not a safetensors file") from error
    if size < end:
        raise NotSafetensorsError(f"is truncated: it has {size:,} of {end:,} bytes")
    return tensors


def damaged_file(folder: Path) -> str | None:
    """Return what is wrong with a file in *folder* that the model is loaded from, and what to do about it.

    None where nothing can be seen to be wrong. Files that are missing are not looked for.
    """
    for file in _loaded_from(folder):
        try:
            with file.open("rb") as content:
                if content.read(len(_LFS_POINTER)) == _LFS_POINTER:
                    return f"{file} is a git-lfs pointer and not the file itself: run git lfs pull in {folder}"
            if file.suffix == ".safetensors":
                read_header(file)
        except NotSafetensorsError as error:
            return f"{file} {error}: download or copy it again"
        except OSError as error:
            return f"{file} cannot be read: {error.strerror}"
    return None


def _loaded_from(folder: Path) -> Iterator[Path]:
    yield from (file for file in sorted(folder.glob("*.json")) if file.is_file())
    yield from (file for file in sorted(folder.glob("*.model")) if file.is_file())
    weights = next((file for name in _WEIGHTS if (file := folder / name).is_file()), None)
    if weights is None:
        return
    if weights.suffix != ".json":
        yield weights
        return
    try:
        names = set(json.loads(weights.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, AttributeError, TypeError):  # transformers says what is wrong with it
        return
    yield from (file for name in sorted(names) if (file := folder / name).is_file())
