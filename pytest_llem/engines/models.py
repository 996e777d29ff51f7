"""Where a model comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_llem.engines import hub
from pytest_llem.engines.protocol import ModelNotFoundError
from pytest_llem.engines.tiny_llama import NAME, model_folder, tiny_llama
from pytest_llem.engines.weights import damaged_file

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
