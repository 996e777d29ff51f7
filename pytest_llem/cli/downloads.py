"""Run ``llem fetch``: download the models and datasets of studies before a run without network."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from pytest_llem import registry
from pytest_llem._plugin.options import Settings, read_config
from pytest_llem.cli.command import DONE, FAILED, write
from pytest_llem.engines.function import load_engine
from pytest_llem.engines.library_errors import one_line
from pytest_llem.engines.models import OTHER_WEIGHTS, cached_snapshot, local_file, resolve_model
from pytest_llem.engines.options import check_options
from pytest_llem.engines.protocol import Engine, EngineContext, PreflightError
from pytest_llem.engines.shipped import shipped_needs
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.dataset import HubDataset
from pytest_llem.study.design import StudyConfig
from pytest_llem.study.engines import COMMAND
from pytest_llem.study.loading import load_study
from pytest_llem.study.problems import StudyError, printable
from pytest_llem.study.server import SERVER
from pytest_llem.workload.datasets import cached_dataset, fetch_dataset
from pytest_llem.workload.prompts import hub_dataset


@dataclass(frozen=True)
class Need:
    """A model or dataset that experiments need.

    Attributes:
        name: Name of the model or dataset, as in the study; empty for an experiment without a model.
        revision: Revision on the hub, or None.
        engine: Name of the engine that fetches the model itself, or None if it is fetched by name.
        configs: Configurations of the experiments to pass to that engine.
        dataset: The dataset on the hub, or None for a model.
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
            return f"{self.name} (by engine {self.engine})" if self.name else f"engine {self.engine}"
        return f"{self.name} (revision {self.revision})" if self.revision else self.name


def fetch(paths: Sequence[Path], model_path: Sequence[Path]) -> int:
    """Download the models and datasets of the studies at *paths*, and print one line for each.

    The others are still fetched if a study is invalid or a model or dataset is not available.

    Args:
        paths: Study files.
        model_path: Folders with models by name, searched before those of the ini option ``llem_model_path``.

    Returns:
        The exit status: 0, or 1 if anything is not available or invalid.
    """
    pytest_config = read_config(paths)
    if pytest_config is None:  # pytest has printed the error
        return FAILED
    settings = Settings.from_config(pytest_config)
    sys.path.append(str(pytest_config.rootpath))  # experiments import engines from there, too
    studies = list(_read(paths, settings))
    complete = len(studies) == len(paths)
    folders = tuple(model_path) + settings.model_path
    for need in needs(studies):
        try:
            line = f"{_fetch(need, folders)}: {need}"
        except PreflightError as error:
            complete = False
            # The line already names what is not found.
            reason = re.sub(r"^(model|dataset) .*? not found: ", "", one_line(error), count=1)
            line = f"not available: {need}: {reason}"
        write(f"{printable(line)}\n")
    return DONE if complete else FAILED


def needs(studies: Iterable[StudyConfig]) -> list[Need]:
    """Return the models and datasets of *studies*, each once, without those of skipped points and commands."""
    by_name: dict[Need, None] = {}
    datasets: dict[Need, None] = {}
    by_engine: dict[tuple[str, str], dict[str, ExperimentConfig]] = {}
    for study in studies:
        for point in study.points:
            config = point.config
            if point.skip is not None or config.backend == COMMAND:  # a command finds its model and dataset itself
                continue
            if config.has_texts and (found := hub_dataset(str(config.dataset), study.path.parent)):
                whole = HubDataset(found.name, found.revision)  # whichever part is read
                datasets[Need(found.name, found.revision, dataset=whole)] = None
            if config.backend == SERVER:  # a run starts the server, which finds the model by its name
                if config.model is not None:
                    by_name[Need(config.model)] = None
                continue
            shipped = shipped_needs(config)
            if shipped is not None and shipped.resolves_model and config.model is not None:
                by_name[Need(config.model, shipped.model_revision)] = None
            elif (
                config.model is not None
                and config.backend in study.runners
                and config.backend not in registry.installed(registry.ENGINE_GROUP)
            ):
                by_name[Need(config.model)] = None  # its engine is installed only in the runner's environment
            else:
                configs = by_engine.setdefault((config.backend, config.model or ""), {})
                configs.setdefault(json.dumps(config.engine_section, sort_keys=True), config)
    return [
        *by_name,
        *(
            Need(model, engine=engine, configs=tuple(found.values()))
            for (engine, model), found in by_engine.items()
        ),
        *datasets,
    ]


def _read(paths: Sequence[Path], settings: Settings) -> Iterator[StudyConfig]:
    """Yield the valid studies, and print the errors of the others."""
    # No experiment runs, so the limit on their number does not apply.
    overrides = replace(settings.overrides, max_experiments=None)
    for path in paths:
        try:
            yield load_study(path, overrides)
        except StudyError as error:
            for problem in error.problems:
                print(printable(str(problem.shown_from(Path.cwd()))), file=sys.stderr)


def _fetch(need: Need, model_path: tuple[Path, ...]) -> str:
    """Fetch a model or dataset, and return what was done, such as ``fetched`` or ``already here``.

    Raises:
        PreflightError: It is not available.
    """
    try:
        if need.dataset is not None:
            return _fetch_hub_dataset(need.dataset)
        if need.engine is not None:
            return _fetch_by_engine(need.engine, need.configs, EngineContext(model_path))
        return _fetch_by_name(need.name, need.revision, model_path)
    except (Exception, SystemExit) as error:  # an engine's code, a full disk: the next download may succeed
        raise PreflightError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    name = "" if isinstance(error, PreflightError) else f"{type(error).__name__}: "
    return name + one_line(error)


def _fetch_by_engine(name: str, configs: Sequence[ExperimentConfig], context: EngineContext) -> str:
    try:
        engine = load_engine(name, defer=True)
    except (LookupError, ImportError) as error:
        raise PreflightError(f"engine {name!r} cannot be loaded: {one_line(error)}") from error
    reasons = []
    for config in configs:
        try:
            check_options(engine, config)
            engine(config, context).fetch()
        except (Exception, SystemExit) as error:  # another configuration may need other files
            reasons.append(_reason(error))
    if reasons:
        which = f"{len(reasons)} of {len(configs)} configurations: " if len(reasons) < len(configs) else ""
        raise PreflightError(which + "; ".join(dict.fromkeys(reasons)))
    # A function, for example, finds its model when it is called.
    return "left to the engine" if getattr(engine, "fetch", None) is Engine.fetch else "fetched"


def _fetch_hub_dataset(dataset: HubDataset) -> str:
    before = _files_in(cached_dataset(dataset))
    return "already here" if _files_in(fetch_dataset(dataset)) == before else "fetched"


def _fetch_by_name(name: str, revision: str | None, model_path: tuple[Path, ...]) -> str:
    if local_file(name, model_path) is not None:
        return "already here"
    source = resolve_model(name, model_path, revision, download=False)
    if source.kind in ("local", "model_path"):
        return "already here"
    if source.kind == "builtin":
        exists = Path(source.location).is_dir()
        resolve_model(name, model_path, revision)
        return "already here" if exists else "fetched"
    before = _cached_files(name, revision)
    resolve_model(name, model_path, revision)
    after = _cached_files(name, revision)
    if missing := _missing_weights(after):
        raise PreflightError(missing)
    return "already here" if after == before else "fetched"


def _cached_files(name: str, revision: str | None) -> frozenset[Path]:
    """Return the cached files of a hub model."""
    return _files_in(cached_snapshot(name, revision))


def _files_in(folder: Path | None) -> frozenset[Path]:
    # is_file() is false for a link whose target was deleted.
    return frozenset(file for file in folder.rglob("*") if file.is_file()) if folder else frozenset()


def _missing_weights(files: Iterable[Path]) -> str | None:
    """Return which weights are missing among a model's *files*, or None. The hub does not report it offline."""
    by_name = {file.name: file for file in files}
    indices = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
    index = next((by_name[name] for name in indices if name in by_name), None)
    if index is None:
        found = any(fnmatch(name, pattern) for name in by_name for pattern in ("*.safetensors", *OTHER_WEIGHTS))
        return None if found else "it has weights neither in *.safetensors files nor in pytorch_model*.bin"
    shards = {*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
    absent = sorted(shards - {*by_name})
    return f"{absent[0]} is missing ({len(absent)} of {len(shards)} files with weights)" if absent else None
