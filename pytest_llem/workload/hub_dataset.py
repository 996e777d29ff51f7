"""Read prompts from a dataset of the Hugging Face hub.

The files are downloaded to the hub's cache and read from there. So a downloaded dataset is available offline, and
its commit is known. ``datasets`` itself would, offline, use whichever commit it read last.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_llem.engines import hub
from pytest_llem.engines.library_errors import one_line
from pytest_llem.engines.protocol import PreflightError
from pytest_llem.engines.requirements import DATASETS, THIS_ENVIRONMENT, Packages
from pytest_llem.study.dataset import HubDataset
from pytest_llem.workload.files import Prompt

#: Files that are downloaded: those from which ``datasets`` reads texts, and no code.
DOWNLOADED = [
    *("README.md", ".huggingface.yaml", "*.parquet", "*.arrow"),
    *(f"*.{kind}" for kind in ("json", "jsonl", "ndjson", "csv", "tsv", "txt")),
    *("*.gz", "*.zst"),
]

#: Columns that may hold the prompts. The first one that exists is used.
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
    return f"dataset {dataset.name!r} not found: no file of that name; {hub.not_cached()}"


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
