"""What studies need, models and datasets, brought to this machine ahead of a run that will have no network."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_llem import registry
from pytest_llem._plugin.options import Settings, read_config
from pytest_llem.cli.command import DONE, FAILED
from pytest_llem.engines.models import cached_snapshot, resolve_model
from pytest_llem.engines.protocol import EngineContext, PreflightError
from pytest_llem.engines.pytorch.options import check_options
from pytest_llem.engines.pytorch.refusals import one_line
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.dataset import HubDataset
from pytest_llem.study.design import StudyConfig
from pytest_llem.study.loading import load_study
from pytest_llem.study.problems import StudyError, printable
from pytest_llem.workload.hub_dataset import cached_dataset, fetch_dataset
from pytest_llem.workload.prompts import hub_dataset


@dataclass(frozen=True)
class Need:
    """A model, or a dataset, that experiments need.

    Attributes:
        name: Of the model, as the study has it.
        revision: Of a hub model that is looked for by name, or None.
        engine: Who brings it where that is not ours to do, or None.
        configs: The experiments to ask that engine for.
        dataset: The hub's dataset that it is, or None where it is a model.
    """

    name: str
    revision: str | None = None
    engine: str | None = None
    configs: Sequence[ExperimentConfig] = ()
    dataset: HubDataset | None = None

    def __str__(self) -> str:
        if self.dataset is not None:
            return f"dataset {self.name}" + (f" (revision {self.revision})" if self.revision else "")
        if self.engine is not None:
            return f"{self.name} (by engine {self.engine})"
        return f"{self.name} (revision {self.revision})" if self.revision else self.name


def fetch(paths: Sequence[Path], model_path: Sequence[Path]) -> int:
    """Bring what the studies at *paths* need here, tell of each in a line, and return the exit status.

    A study that is wrong, or a model or dataset that cannot be had, does not keep the others from being fetched.

    Args:
        paths: Study files.
        model_path: Folders that hold models by name, before those of the ini option ``llem_model_path``.

    Returns:
        0, or 1 where anything is missing.
    """
    pytest_config = read_config(paths)
    if pytest_config is None:  # pytest has said why
        return FAILED
    settings = Settings.from_config(pytest_config)
    sys.path.append(str(pytest_config.rootpath))  # where an experiment looks for an engine, too
    studies = list(_read(paths, settings))
    complete = len(studies) == len(paths)
    folders = tuple(model_path) + settings.model_path
    for need in needs(studies):
        try:
            told = f"{_bring(need, folders)}: {need}"
        except PreflightError as error:
            complete = False
            reason = re.sub(r"^(model|dataset) .*? not found: ", "", one_line(error), count=1)
            told = f"not to be had: {need}: {reason}"
        print(printable(told), flush=True)
    return DONE if complete else FAILED


def needs(studies: Iterable[StudyConfig]) -> list[Need]:
    """Return what the experiments of *studies* need, each once; those that are skipped need nothing."""
    by_name: dict[Need, None] = {}
    datasets: dict[Need, None] = {}
    by_engine: dict[tuple[str, str], dict[str, ExperimentConfig]] = {}
    for study in studies:
        for point in study.points:
            config = point.config
            if point.skip is not None:
                continue
            if config.has_texts and (found := hub_dataset(str(config.dataset), study.path.parent)):
                whole = HubDataset(found.name, found.revision)  # all of it is brought, whatever is read of it
                datasets[Need(found.name, found.revision, dataset=whole)] = None
            if config.backend == "pytorch":
                by_name[Need(config.model, config.pytorch.revision if config.pytorch else None)] = None
            elif config.backend in study.runners and config.backend not in registry.installed(
                registry.ENGINE_GROUP
            ):
                by_name[Need(config.model)] = None  # nobody here to ask, and files are files
            else:
                asked = by_engine.setdefault((config.backend, config.model), {})
                asked.setdefault(json.dumps(config.engine_section, sort_keys=True), config)
    return [
        *by_name,
        *(
            Need(model, engine=engine, configs=tuple(configs.values()))
            for (engine, model), configs in by_engine.items()
        ),
        *datasets,
    ]


def _read(paths: Sequence[Path], settings: Settings) -> Iterator[StudyConfig]:
    """Yield the studies that are right, and tell of what is wrong with the others."""
    # Nothing runs here, so that their size is no matter.
    overrides = replace(settings.overrides, max_experiments=None)
    for path in paths:
        try:
            yield load_study(path, overrides)
        except StudyError as error:
            for problem in error.problems:
                print(printable(str(problem.shown_from(Path.cwd()))), file=sys.stderr)


def _bring(need: Need, model_path: tuple[Path, ...]) -> str:
    """Bring a model or a dataset here, and return what became of it, in words.

    Raises:
        PreflightError: It cannot be had.
    """
    try:
        if need.dataset is not None:
            return _dataset(need.dataset)
        if need.engine is not None:
            return _by_engine(need.engine, need.configs, EngineContext(model_path))
        return _by_name(need.name, need.revision, model_path)
    except PreflightError:
        raise
    except (Exception, SystemExit) as error:  # anybody's code, a disk that is full: the next one may do
        raise PreflightError(f"{type(error).__name__}: {one_line(error)}") from error


def _by_engine(name: str, configs: Sequence[ExperimentConfig], context: EngineContext) -> str:
    try:
        engine = registry.load(registry.ENGINE_GROUP, name)
    except (LookupError, ImportError) as error:
        raise PreflightError(f"engine {name!r} cannot be used: {one_line(error)}") from error
    for config in configs:
        check_options(engine, config)
        engine(config, context).fetch()
    return "fetched"


def _dataset(dataset: HubDataset) -> str:
    before = _inside(cached_dataset(dataset))
    return "already here" if _inside(fetch_dataset(dataset)) == before else "fetched"


def _by_name(name: str, revision: str | None, model_path: tuple[Path, ...]) -> str:
    source = resolve_model(name, model_path, revision, download=False)
    if source.kind in ("local", "model_path"):
        return "already here"
    if source.kind == "builtin":
        made = Path(source.location).is_dir()
        resolve_model(name, model_path, revision)
        return "already here" if made else "fetched"
    before = _files(name, revision)
    resolve_model(name, model_path, revision)
    after = _files(name, revision)
    if missing := _missing_weights(after):
        raise PreflightError(missing)
    return "already here" if after == before else "fetched"


def _files(name: str, revision: str | None) -> frozenset[Path]:
    """Return the files of a hub model that are in the cache."""
    return _inside(cached_snapshot(name, revision))


def _inside(folder: Path | None) -> frozenset[Path]:
    # What a link leads to may have been cleared away.
    return frozenset(file for file in folder.rglob("*") if file.is_file()) if folder else frozenset()


def _missing_weights(files: Iterable[Path]) -> str | None:
    """Return what is missing among *files* of a model, or None: without a network the hub was not asked."""
    by_name = {file.name: file for file in files}
    index = by_name.get("model.safetensors.index.json")
    if index is None:
        found = any(name.endswith(".safetensors") for name in by_name)
        return None if found else "its weights are not there as *.safetensors, which alone are downloaded"
    shards = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    absent = sorted(shards - {*by_name})
    return f"{absent[0]} is missing ({len(absent)} of {len(shards)} files with weights)" if absent else None
