"""Read the files of a model without loading it, and find damaged ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pytest_llem.engines.models import ModelSource

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
