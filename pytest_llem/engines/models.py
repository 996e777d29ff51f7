"""Find a model by its name, and identify what was found."""

from __future__ import annotations

import hashlib
import json
import os.path
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytest_llem.engines import hub
from pytest_llem.engines.protocol import ModelNotFoundError
from pytest_llem.engines.tiny_llama import BUILTIN_NAME, model_folder, tiny_llama

BUILTIN = "builtin:"

#: Files of a hub model that are downloaded: weights in the format that transformers prefers, and all small files.
DOWNLOADED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py"]

#: The weights of a hub model that has none in that format.
OTHER_WEIGHTS = ["pytorch_model*.bin"]

#: Suffixes of files that hold weights.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


@dataclass(frozen=True)
class ModelSource:
    """Where a model was found.

    Attributes:
        location: Argument for ``from_pretrained``: a folder or a hub id.
        kind: ``local``, ``builtin``, ``model_path`` or ``hub``.
        revision: Requested revision of a hub model; None for the main branch.
    """

    location: str
    kind: str
    revision: str | None = None

    @property
    def random_weights(self) -> bool:
        """Whether the weights are random: those of the builtin model are, and ``config.json`` may declare it."""
        if self.kind == "builtin":
            return True
        try:
            config = json.loads((self.folder / "config.json").read_bytes()) if self.folder else {}
        except (OSError, ValueError):
            return False  # the engine reads that file too, and refuses it
        return isinstance(config, dict) and config.get("random_weights") is True

    @property
    def folder(self) -> Path | None:
        """The model's folder, which may be missing; None for a hub model that is not in the cache."""
        return cached_snapshot(self.location, self.revision) if self.kind == "hub" else Path(self.location)

    @property
    def commit(self) -> str | None:
        """The commit of a hub model, which is the name of its folder in the cache; None for other models."""
        return self.folder.name if self.kind == "hub" and self.folder is not None else None

    def fingerprint(self) -> str | None:
        """Return a SHA-256 that distinguishes models; None without a folder, or if its files cannot be read.

        It covers ``config.json`` and the name and size of each file of weights, but not their content: reading
        100 GB would take minutes. So other weights of the same size have the same fingerprint. Unlike that of
        :func:`folder_state`, it is the same on every machine.
        """
        if (folder := self.folder) is None:
            return None
        digest = hashlib.sha256()
        try:
            digest.update((folder / "config.json").read_bytes())
            for file in sorted(file for file in folder.iterdir() if file.suffix in WEIGHT_SUFFIXES):
                digest.update(f"\n{file.name} {file.stat().st_size}".encode())
        except OSError:
            return None
        return digest.hexdigest()

    def provenance(self) -> dict[str, str | None]:
        """Return the fields of an ``EngineRecord`` that say which model ran."""
        return {
            "model_source": self.kind,
            "model_revision": self.commit,
            "model_fingerprint": self.fingerprint(),
        }


def resolve_model(
    name: str, model_path: Sequence[Path], revision: str | None = None, *, download: bool = True
) -> ModelSource:
    """Find a model: a builtin, a local folder, a folder under *model_path*, or a hub model, in this order.

    A hub model is downloaded, its configuration first, so that a wrong name fails at once.

    Args:
        name: The model's name in the study.
        model_path: Folders that hold models by name.
        revision: Revision of a hub model; None for the main branch.
        download: Whether to download. If false, the hub is not asked, and any name that a hub model may have
            counts as found.

    Raises:
        ModelNotFoundError: The model was not found. The message lists the places that were searched.
    """
    if name.startswith(BUILTIN):
        if name != BUILTIN_NAME:
            raise ModelNotFoundError(f"model {name!r} not found: the only builtin is {BUILTIN_NAME}")
        try:
            folder = tiny_llama() if download else model_folder()
        except OSError as error:
            raise ModelNotFoundError(f"model {name!r} cannot be made: {error}") from error
        except ImportError as error:
            needs = "it needs torch and transformers: pip install 'pytest-llem[pytorch]'"
            raise ModelNotFoundError(f"model {name!r} cannot be made: {needs} ({error})") from error
        return ModelSource(str(folder), "builtin")
    if (local := _local(name, model_path)) is not None:
        return local
    searched = [f"no folder {_expanded(name)}"]
    searched.append(
        "none of that name under llem_model_path (" + ", ".join(map(str, model_path)) + ")"
        if model_path
        else "llem_model_path is not set"
    )
    if refusal := _fetch_from_hub(name, revision, download=download):
        raise ModelNotFoundError(f"model {name!r} not found: {'; '.join([*searched, refusal])}")
    return ModelSource(name, "hub", revision=revision)


def _local(name: str, model_path: Sequence[Path]) -> ModelSource | None:
    """Return the model of that name in a local folder; None if there is none."""
    places = [("local", _expanded(name)), *(("model_path", directory / name) for directory in model_path)]
    for kind, place in places:
        if os.path.isdir(place):  # noqa: PTH112  # Path.is_dir raises for a name that is too long for a file
            return ModelSource(str(place), kind)
    return None


def local_file(name: str, model_path: Sequence[Path]) -> Path | None:
    """Return the file of that name, such as a GGUF file that a server loads; None if there is none."""
    places = (_expanded(name), *(directory / name for directory in model_path))
    return next((place for place in places if place.is_file()), None)


def _expanded(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError:  # ~nobody
        return Path(name)


def cached_snapshot(name: str, revision: str | None = None) -> Path | None:
    """Return the folder of a hub model in the local cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(file).parent if isinstance(file, str) else None


def folder_state(name: str, model_path: Sequence[Path]) -> str | None:
    """Return a digest that changes if a model's local folder changes; None for other models.

    It covers the name, size and modification time of each file. No file is read.
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


def _fetch_from_hub(name: str, revision: str | None, *, download: bool) -> str | None:
    """Download a hub model, unless *download* is false or the hub is offline.

    Returns:
        Why the model is not found on the hub or in its cache; None if it is found.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download

    try:
        cached = cached_snapshot(name, revision)
        if constants.HF_HUB_OFFLINE and not cached:
            return hub.not_cached()
        if constants.HF_HUB_OFFLINE or not download:
            return None
        hf_hub_download(name, "config.json", revision=revision)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, revision=revision, allow_patterns=OTHER_WEIGHTS)
    except Exception as error:
        return hub.refusal(error, revision)
    return None
