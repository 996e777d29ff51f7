"""The files that the studies of a session read, besides models: all hosts that run them need the same."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from pytest_llem._plugin.declarations import YAML_SUFFIXES
from pytest_llem._plugin.options import Settings
from pytest_llem.execution.session_facts import import_path
from pytest_llem.gates.baselines import BaselineError, resolve
from pytest_llem.study.dataset import FILE_TYPES
from pytest_llem.study.design import StudyConfig
from pytest_llem.study.document import load_document
from pytest_llem.study.loading import load_study, with_base
from pytest_llem.study.problems import StudyError
from pytest_llem.workload.prompts import hub_dataset


def study_files(config: pytest.Config) -> list[Path]:
    """Return the study files that pytest's arguments name, or that are in folders which they name."""
    patterns, excluded = config.getini("llem_files"), config.getini("norecursedirs")
    found: dict[Path, None] = {}
    for argument in config.args:
        path = config.invocation_params.dir / argument.partition("::")[0]
        if path.suffix in YAML_SUFFIXES:
            found[path] = None
        for folder, folders, names in os.walk(path):
            folders[:] = [one for one in folders if not _matches(one, excluded)]
            found |= {Path(folder, name): None for name in sorted(names) if _matches(name, patterns)}
    return list(found)


def needed_files(config: pytest.Config, studies: Sequence[Path]) -> list[Path]:
    """Return the *studies*, and the existing files that they read: bases, datasets, traces, engines, baseline."""
    found: dict[Path, None] = {}
    for path in studies:
        found[path] = None
        with suppress(StudyError, OSError):  # which the workers report
            found |= dict.fromkeys(_files_of(config, path))
    found |= dict.fromkeys(_baseline_files(config))
    return [path for path in found if path.is_file()]


def _files_of(config: pytest.Config, path: Path) -> Iterator[Path]:
    document = load_document(path)
    if isinstance(document.data, dict) and (base := with_base(document)[0].base) is not None:
        yield base.path
    study = load_study(path, Settings.from_config(config).overrides)
    for dataset in {str(point.config.dataset) for point in study.points if point.config.has_texts}:
        if hub_dataset(dataset, path.parent) is None and Path(dataset).suffix in FILE_TYPES:
            yield path.parent / Path(dataset).expanduser()
    for load in (point.config.load for point in study.points):
        if load is not None and load.trace is not None:
            yield path.parent / load.trace
    yield from _engine_files(config, study)


def _engine_files(config: pytest.Config, study: StudyConfig) -> Iterator[Path]:
    """Yield the files of engines in the user's own modules. Installed packages are facts of each result."""
    folders = [str(folder) for folder in import_path(config)]
    for backend in {point.config.backend for point in study.points if ":" in point.config.backend}:
        spec = PathFinder.find_spec(backend.partition(":")[0].partition(".")[0], folders)
        if spec is None:
            continue
        for folder in spec.submodule_search_locations or ():
            yield from sorted(Path(folder).rglob("*.py"))
        if not spec.submodule_search_locations and spec.origin is not None:
            yield Path(spec.origin)


def _baseline_files(config: pytest.Config) -> list[Path]:
    settings = Settings.from_config(config)
    if settings.baseline is None:
        return []
    with suppress(BaselineError):  # which the workers report
        path = resolve(settings.baseline, settings.baseline_dir)
        return sorted(path.rglob("*.json")) if path.is_dir() else [path]
    return []


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
