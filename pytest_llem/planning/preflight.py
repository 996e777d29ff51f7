"""What keeps an experiment from running here, found out before it is started."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

from pytest_llem.backends.models import cached_snapshot, resolve_model
from pytest_llem.backends.protocol import ModelNotFoundError
from pytest_llem.backends.requirements import LORA, PREFILL_SPLIT, unmet
from pytest_llem.backends.tiny_llama import NAME, SHAPE
from pytest_llem.measurement.prompts import dataset_problem
from pytest_llem.planning.estimate import RUNTIME_BYTES, memory_bytes, seconds, weight_bytes
from pytest_llem.planning.footprint import Footprint, from_config, read_footprint
from pytest_llem.planning.host import Host, this_host
from pytest_llem.registry import BACKENDS, installed
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Point, StudyConfig
from pytest_llem.study.execution import ExecutionConfig
from pytest_llem.study.problems import printable
from pytest_llem.study.runners import is_class

#: bfloat16 came with this compute capability.
_BF16 = (8, 0)


class Preflight:
    """Looks at the points of one study, each once. Nothing heavy is imported and no device is opened.

    Args:
        study: Whose points.
        model_path: Folders that hold models by name.
        import_path: Where an engine of the user's own may be, beside ``sys.path``.
        host: Where they are to run; this machine.
    """

    def __init__(
        self, study: StudyConfig, model_path: tuple[Path, ...], import_path: Path, host: Host | None = None
    ) -> None:
        self._study = study
        self._model_path = model_path
        self._import_path = import_path
        self.host = host or this_host()
        self._reasons: dict[str, str | None] = {}

    def reason(self, point: Point) -> str | None:
        """Return why *point* cannot run here, in a line that says what to do, or None where nothing is known."""
        if point.config_hash not in self._reasons:
            self._reasons[point.config_hash] = printable("; ".join(self._reasons_of(point.config))) or None
        return self._reasons[point.config_hash]

    def footprint(self, config: ExperimentConfig) -> Footprint | None:
        """Return the size of an experiment's model; None where it is not known."""
        return _footprint(config.model, _revision(config), self._model_path)

    def _reasons_of(self, config: ExperimentConfig) -> Iterator[str]:
        runner = self._study.runners.get(config.backend)
        if runner is not None:  # running it here instead would measure something else
            yield f"runner {runner!r} of engine {config.backend!r} is not supported yet, only 'local' is"
            return
        if self._study.execution.skip_preflight:
            return
        if missing := self._missing_engine(config.backend):
            yield missing
            return
        if problem := dataset_problem(config, self._study.path.parent):
            yield problem
        if config.backend != "pytorch":
            if config.measurement.prefill_split:
                yield PREFILL_SPLIT
            if config.lora is not None:
                yield LORA
            return
        yield from unmet(config)
        if missing := _missing_model(config.model, _revision(config), self._model_path):
            yield missing
            return
        yield from self._lacking(config)

    def _missing_engine(self, name: str) -> str | None:
        if is_class(name):
            module = name.partition(":")[0].partition(".")[0]
            if module in sys.modules or PathFinder.find_spec(module, [*sys.path, str(self._import_path)]):
                return None
            return f"engine {name!r}: no module {module!r} is to be found (ini option pythonpath says where)"
        engines = installed(BACKENDS)
        if name in engines:
            return None
        return f"engine {name!r} is not installed here (there are: {', '.join(engines)})"

    def _lacking(self, config: ExperimentConfig) -> Iterator[str]:
        gpus = self.host.gpus
        if config.precision == "bf16" and gpus and all(gpu.capability < _BF16 for gpu in gpus):
            yield f"{gpus[0].name} computes no bf16: use precision: fp16 or fp32"
        footprint = self.footprint(config)
        spread = config.pytorch is not None and config.pytorch.device_map is not None
        if footprint is None or spread:
            return
        weights, memory = weight_bytes(config, footprint), self.host.device_memory_bytes
        if weights + RUNTIME_BYTES > memory:
            where = gpus[0].name if gpus else "this machine"
            yield (
                f"model {config.model!r} needs {gib(weights)} in {config.precision} "
                f"and {where} has {gib(memory)} of memory"
            )

    def memory_bytes(self, config: ExperimentConfig) -> float | None:
        """Return a rough estimate of an experiment's memory, in bytes; None where the model's size is unknown."""
        footprint = self.footprint(config)
        return None if footprint is None else memory_bytes(config, footprint)


def rough_seconds(
    config: ExperimentConfig, execution: ExecutionConfig, model_path: tuple[Path, ...]
) -> float | None:
    """Return how long an experiment may take here, in seconds; None where its model's size is unknown."""
    footprint = _footprint(config.model, _revision(config), model_path)
    return None if footprint is None else seconds(config, execution, footprint, this_host())


def gib(size: float) -> str:
    """Return a size in bytes in GiB, as a person says it."""
    return f"{size / 2**30:.1f} GiB" if size < 10 * 2**30 else f"{size / 2**30:,.0f} GiB"


def _revision(config: ExperimentConfig) -> str | None:
    return config.pytorch.revision if config.pytorch else None


@cache
def _missing_model(name: str, revision: str | None, model_path: tuple[Path, ...]) -> str | None:
    try:
        resolve_model(name, model_path, revision, download=False)
    except ModelNotFoundError as error:
        return str(error)
    return None


@cache
def _footprint(name: str, revision: str | None, model_path: tuple[Path, ...]) -> Footprint | None:
    try:
        source = resolve_model(name, model_path, revision, download=False)
    except ModelNotFoundError:
        return None
    if source.kind == "builtin" and name.endswith(NAME):
        return from_config(SHAPE)
    folder = cached_snapshot(name, revision) if source.kind == "hub" else Path(source.location)
    return read_footprint(folder) if folder else None
