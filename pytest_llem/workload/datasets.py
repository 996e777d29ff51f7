"""Read prompts from a text or JSON-lines file, or from a dataset of the Hugging Face hub.

The hub's files are downloaded to its cache and read from there. So a downloaded dataset is available offline, and
its commit is known. ``datasets`` itself would, offline, use whichever commit it read last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pytest_llem.engines import hub
from pytest_llem.engines.library_errors import one_line
from pytest_llem.engines.protocol import PreflightError
from pytest_llem.engines.shipped import DATASETS, THIS_ENVIRONMENT, Packages
from pytest_llem.study.dataset import ALIASES, FILE_TYPES, SYNTHETIC, HubDataset

#: Half of a surrogate pair. JSON can escape it, but it is not valid text.
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Prompt:
    """A text prompt.

    Attributes:
        text: The prompt; the first turn of a conversation.
        source: Name of the collection that the prompt is from, by which ``dataset_order`` groups or alternates
            prompts: the dataset's field ``source``; None if there is none.
        later: What the user says in the later turns of a conversation.
    """

    text: str
    source: str | None = None
    later: tuple[str, ...] = ()

    @property
    def turns(self) -> tuple[str, ...]:
        """What the user says in each turn."""
        return (self.text, *self.later)


def file_problem(dataset: str, directory: Path) -> str | None:
    """Return why a file of prompts cannot be read; None if it can be. The file is opened but not read.

    Args:
        dataset: Path of the file.
        directory: Folder to which the path is relative.
    """
    if Path(dataset).suffix not in FILE_TYPES:
        names = ", ".join(map(repr, (SYNTHETIC, *ALIASES)))
        expected = f"{names}, a .txt or .jsonl file, or owner/name of the Hugging Face hub"
        return f"dataset {dataset!r}: expected {expected}"
    try:
        path = directory / Path(dataset).expanduser()
        if path.exists() and not path.is_file():  # opening a pipe, for example, would block
            return f"dataset {dataset!r} is not a file"
        with path.open("rb"):
            return None
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: ~user of no such user
        return f"dataset {dataset!r} cannot be read: {error}"


def read_file(dataset: str, directory: Path) -> list[Prompt]:
    """Return the prompts in a file: its lines, or the JSON objects in its lines. Blank ones are left out.

    Args:
        dataset: Path of the file.
        directory: Folder to which the path is relative.

    Raises:
        PreflightError: The file cannot be read, or a line has another format.
    """
    if problem := file_problem(dataset, directory):
        raise PreflightError(problem)
    path = directory / Path(dataset).expanduser()
    try:
        if path.suffix == ".jsonl":
            return list(_objects(path))
        return [Prompt(line) for _, line in _numbered_lines(path)]
    except OSError as error:
        raise PreflightError(f"dataset {dataset!r} cannot be read: {error}") from error


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Yield the lines of *path* that are not blank, with their numbers.

    Only ``\n`` and ``\r\n`` end a line: a prompt may hold any other separator that Unicode has.
    """
    content = path.read_bytes()
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        raise PreflightError(f"{path}:{number}: is not UTF-8 ({error.reason}): save the file as UTF-8") from error
    if "\0" in text:  # English text in UTF-16 without a byte-order mark is valid UTF-8
        number = text.count("\n", 0, text.index("\0")) + 1
        raise PreflightError(f"{path}:{number}: holds a NUL character, as UTF-16 does: save the file as UTF-8")
    for number, line in enumerate(text.split("\n"), 1):
        # An editor's byte-order mark; further ones where files were concatenated.
        prompt = line.removeprefix("\ufeff")
        if prompt.strip():
            yield number, prompt.removesuffix("\r")


def _objects(path: Path) -> Iterator[Prompt]:
    for number, line in _numbered_lines(path):
        try:
            entry = json.loads(line)
            text, *later = _turns(entry)
        except (ValueError, AttributeError, TypeError, KeyError):
            raise PreflightError(
                f"{path}:{number}: expected a JSON object with a string under 'prompt' or 'text', or with "
                "ShareGPT's turns ('from', 'value') under 'conversations'"
            ) from None
        if surrogate := _SURROGATE.search("".join((text, *later))):
            raise PreflightError(
                f"{path}:{number}: the prompt holds the lone surrogate \\u{ord(surrogate[0]):x}, which no "
                "tokenizer takes: remove it, or write the character's pair in full"
            )
        source = entry.get("source")
        if not isinstance(source, str | None):
            raise PreflightError(f"{path}:{number}: expected a string under 'source'")
        if text.strip():
            yield Prompt(text, source, tuple(later))


def _turns(entry: Any) -> list[str]:
    """Return what the user says in each turn of an object: one prompt, or a conversation in ShareGPT's form.

    Raises:
        ValueError: It has no such text.
    """
    if isinstance(talk := entry.get("conversations"), list):
        found = [turn["value"] for turn in talk if turn["from"] in ("human", "user")]
    else:
        found = [entry[key] for key in ("prompt", "text") if isinstance(entry.get(key), str)][:1]
    if not found or not all(isinstance(one, str) for one in found):
        raise ValueError
    return found


#: Files that are downloaded: those from which ``datasets`` reads texts, and no code.
DOWNLOADED = [
    *("README.md", ".huggingface.yaml", "*.parquet", "*.arrow"),
    *(f"*.{kind}" for kind in ("json", "jsonl", "ndjson", "csv", "tsv", "txt")),
    *("*.gz", "*.zst"),
]

#: Columns that may hold the prompts. The first one that holds strings is used.
COLUMNS = ("prompt", "text", "question", "instruction", "query", "input", "content")


def hub_problem(dataset: HubDataset, packages: Packages = THIS_ENVIRONMENT) -> str | None:
    """Return why a dataset of the hub cannot be read; None if no reason is known. The hub is not asked.

    Args:
        dataset: The dataset.
        packages: The environment in which it will be read.
    """
    from huggingface_hub import constants

    if not packages.has(DATASETS):
        needs = f"is looked for on the Hugging Face hub, and that needs {DATASETS}"
        return f"dataset {dataset.name!r} {needs}: {packages.pip} install {DATASETS}"
    if constants.HF_HUB_OFFLINE and cached_dataset(dataset) is None:
        return _not_cached(dataset)
    return None


def _not_cached(dataset: HubDataset) -> str:
    return f"dataset {dataset.name!r} not found: no file of that name; {hub.not_cached_message()}"


def cached_dataset(dataset: HubDataset) -> Path | None:
    """Return the folder of a dataset in the hub's cache, named by its commit; None if it is not in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            dataset.name,
            repo_type="dataset",
            revision=dataset.revision,
            allow_patterns=DOWNLOADED,  # raises if one of these files is not in the cache
            local_files_only=True,
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return Path(found)


def fetch_dataset(dataset: HubDataset) -> Path:
    """Download a dataset's files and return their folder, named by its commit.

    Raises:
        PreflightError: The dataset was not found or cannot be downloaded.
    """
    from huggingface_hub import constants, snapshot_download

    if constants.HF_HUB_OFFLINE:
        if (folder := cached_dataset(dataset)) is None:
            raise PreflightError(_not_cached(dataset))
        return folder
    try:
        found = snapshot_download(
            dataset.name, repo_type="dataset", revision=dataset.revision, allow_patterns=DOWNLOADED
        )
    except Exception as error:
        why = hub.refusal(error, dataset.revision, "dataset")
        raise PreflightError(f"dataset {dataset.name!r} not found: no file of that name; {why}") from error
    return Path(found)


def read_dataset(dataset: HubDataset, folder: Path) -> list[Prompt]:
    """Return the prompts of a dataset whose files are in *folder*. Rows without text are left out.

    Raises:
        PreflightError: ``datasets`` is not installed or cannot read the files, or there is no column of texts.
    """
    rows = _rows(dataset, folder)
    columns = rows.column_names
    texts = [name for name in columns if getattr(rows.features[name], "dtype", None) in ("string", "large_string")]
    wanted = (dataset.column,) if dataset.column else COLUMNS
    column = next((name for name in wanted if name in texts), None)
    if column is None:
        there = f"it has {_listed(columns)}" + (
            f"; strings in {_listed(texts)}" if texts else "; none has strings"
        )
        how = "" if dataset.column or not texts else f": name one, as {replace(dataset, column=texts[0])}"
        raise PreflightError(f"dataset {dataset.name!r} has no column {_either(wanted)} of strings ({there}){how}")
    source_column = "source" if "source" in texts and column != "source" else None
    values = rows.select_columns([column, *([source_column] if source_column else [])])[:]
    sources = values[source_column] if source_column else [None] * len(values[column])
    pairs = zip(values[column], sources, strict=True)
    return [Prompt(text, source) for text, source in pairs if text is not None and text.strip()]


def _rows(dataset: HubDataset, folder: Path) -> Any:
    """Return the requested split, a ``datasets.Dataset``."""
    try:
        from datasets import disable_progress_bars, load_dataset
    except ImportError as error:
        raise PreflightError(f"dataset {dataset.name!r} needs {DATASETS}: {one_line(error)}") from error
    disable_progress_bars()
    try:
        found = load_dataset(str(folder), dataset.subset, split=dataset.split)
    except Exception as error:  # malformed files raise errors of any type, depending on the format's library
        why = one_line(error).replace(str(folder), dataset.name).replace(folder.name, dataset.name)
        raise PreflightError(f"dataset {dataset.name!r} cannot be read: {type(error).__name__}: {why}") from error
    if dataset.split is not None:
        return found
    splits = list(found)
    if "train" not in splits and len(splits) > 1:
        how = f"name one, as {replace(dataset, split=splits[0])}"
        raise PreflightError(f"dataset {dataset.name!r} has the splits {_listed(splits)}: {how}")
    return found["train" if "train" in splits else splits[0]]


def _listed(names: list[str]) -> str:
    return ", ".join(map(repr, names))


def _either(names: tuple[str, ...]) -> str:
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}" if others else last
