"""Find a model by its name, identify what was found, and read its files without loading it."""

from __future__ import annotations

import hashlib
import json
import os.path
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        download: Whether to download. If false, the hub is not asked: any name that a hub model may have counts as
            found, or with ``HF_HUB_OFFLINE`` any model in the cache.

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
            return hub.not_cached_message()
        if constants.HF_HUB_OFFLINE or not download:
            return None
        hf_hub_download(name, "config.json", revision=revision)
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=DOWNLOADED))
        if not any(folder.glob("*.safetensors")):
            snapshot_download(name, revision=revision, allow_patterns=OTHER_WEIGHTS)
    except Exception as error:
        return hub.refusal(error, revision)
    return None


#: Names of the context length in configurations of transformers. Models without one, such as recurrent ones and
#: those with ALiBi, have no limit.
_LENGTH_KEYS = ("max_position_embeddings", "n_positions")

#: Scalings of rotary embeddings whose factor multiplies the stated length. For others the length includes it.
_SCALED = ("linear", "dynamic", "yarn")

#: Model types whose stated length includes the factor of every scaling.
_INCLUDED = ("gemma3", "gemma3_text")


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return the maximum number of tokens of prompt and answer together; None if the configuration has no limit.

    Args:
        config: Content of ``config.json``. For a model of several parts, the language model's part.
    """
    stated = next((config[name] for name in _LENGTH_KEYS if type(config.get(name)) is int), 0)
    if stated <= 0:
        return None
    if config.get("model_type") in _INCLUDED:
        return stated
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    length = stated
    for one in (rope, *rope.values()):  # some models have one entry for each type of layer
        if isinstance(one, dict) and (one.get("rope_type") or one.get("type")) in _SCALED:
            original = one.get("original_max_position_embeddings") or stated
            length = max(length, int(original * (one.get("factor") or 1)))
    return length


def too_long_message(model: str, prompt: int, output: int, limit: int) -> str:
    """Return the error message for a prompt that exceeds the model's context.

    Args:
        model: The model's name in the study.
        prompt: Tokens of the prompt.
        output: Tokens to generate.
        limit: The model's :func:`context_length`.
    """
    return (
        f"model {model!r} takes {limit:,} tokens, and a prompt of {prompt:,} with max_output_tokens {output:,} is "
        f"{prompt + output:,}: lower max_input_tokens or max_output_tokens, or name a model with a longer context"
    )


#: Beginning of the pointer file that git leaves in place of a large file that git-lfs has not fetched.
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"

#: Maximum size of a safetensors header in bytes: the limit of the library safetensors.
_MAX_HEADER = 100_000_000

#: Files of weights in the order in which transformers looks for them. The first that exists is loaded.
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class NotSafetensorsError(ValueError):
    """A file that is not a whole safetensors file. The message follows the file's name: "is truncated …"."""


def read_header(file: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: ``dtype``, ``shape`` and ``data_offsets`` of each tensor, by name.

    Raises:
        NotSafetensorsError: The file has another format, or is truncated.
        OSError: The file cannot be read.
    """
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        if size >= 8 and length > _MAX_HEADER:
            raise NotSafetensorsError("is not a safetensors file")
        if size < 8 + length:
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


def model_damage(name: str, source: ModelSource) -> str | None:
    """Return why a model cannot be loaded; None if no damage is visible in its files.

    Args:
        name: The model's name in the study.
        source: Where it was found.
    """
    folder = source.folder
    damage = file_damage(folder) if folder is not None and folder.is_dir() else None
    return None if damage is None else f"model {name!r} cannot be loaded: {damage}"


def file_damage(folder: Path) -> str | None:
    """Return what is wrong with a model file in *folder*, and what to do; None if no damage is visible.

    Missing files are not looked for.
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
    """Yield the files that transformers loads from *folder*."""
    yield from (file for file in sorted(folder.glob("*.json")) if file.is_file())
    yield from (file for file in sorted(folder.glob("*.model")) if file.is_file())
    weights = next((file for name in _WEIGHT_FILES if (file := folder / name).is_file()), None)
    if weights is None:
        return
    if weights.suffix != ".json":
        yield weights
        return
    try:
        names = {str(name) for name in json.loads(weights.read_text(encoding="utf-8"))["weight_map"].values()}
    except (ValueError, LookupError, AttributeError, TypeError):  # transformers reports what is wrong
        return
    yield from (file for name in sorted(names) if (file := folder / name).is_file())
