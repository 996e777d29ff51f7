"""The files that a model is loaded from, as far as their first bytes and their sizes say: torch is not needed."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
