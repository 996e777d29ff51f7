"""Find reasons why an experiment cannot run, before it is started."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

from pytest_llem.engines import hub
from pytest_llem.engines.models import (
    BUILTIN,
    cached_snapshot,
    context_length,
    damaged_model,
    resolve_model,
    too_long,
)
from pytest_llem.engines.protocol import ModelNotFoundError
from pytest_llem.engines.pytorch.requirements import LORA, THIS_ENVIRONMENT, Packages, unmet_requirements
from pytest_llem.engines.tiny_llama import NAME, SHAPE
from pytest_llem.isolation.interpreter import Interpreter, ask, import_problems
from pytest_llem.planning.estimate import RUNTIME_BYTES, memory_bytes, seconds, weight_bytes
from pytest_llem.planning.footprint import Footprint, from_config, read_footprint, text_config
from pytest_llem.planning.host import Host, host_for, this_host
from pytest_llem.planning.runner_environment import check_runner_environment, how_to_add, missing_here
from pytest_llem.registry import ENGINE_GROUP, installed
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Point, StudyConfig
from pytest_llem.study.execution import ExecutionConfig
from pytest_llem.study.problems import printable
from pytest_llem.study.runners import is_class, is_container
from pytest_llem.workload.prompts import dataset_problem, hub_dataset

#: CUDA compute capability from which GPUs support bfloat16.
_BF16 = (8, 0)


class Preflight:
    """Check the points of one study, each once, without importing torch or opening a device.

    Args:
        study: The study.
        model_path: Folders that hold models by name.
        import_path: Folders searched for user-defined engines, in addition to the interpreter's own path.
        host: Machine on which the experiments run; None for this machine.
    """

    def __init__(
        self,
        study: StudyConfig,
        model_path: tuple[Path, ...],
        import_path: Sequence[Path],
        host: Host | None = None,
    ) -> None:
        self._study = study
        self._model_path = model_path
        self._import_path = [str(folder) for folder in import_path]
        self._given_host = host
        self.host = host or this_host()
        self._reasons: dict[str, str | None] = {}
        self._interpreters: dict[str, Interpreter | str | None] = {}

    def reason(self, point: Point) -> str | None:
        """Return why *point* cannot run, and what to do, in one line; None if no reason is known."""
        if point.config_hash not in self._reasons:
            self._reasons[point.config_hash] = printable("; ".join(self._reasons_of(point.config))) or None
        return self._reasons[point.config_hash]

    def footprint(self, config: ExperimentConfig) -> Footprint | None:
        """Return the size of an experiment's model; None if unknown."""
        return _footprint(config.model, _revision(config), self._model_path)

    def unusable_engines(self, backends: Iterable[str]) -> Iterator[str]:
        """Yield an error line for each engine that cannot run or be imported.

        Engines are imported in a separate process, with the interpreter that runs their experiments.
        """
        importable: dict[Path | None, list[str]] = {}
        for backend in backends:
            if (problem := self._unusable(backend)) is not None:
                yield problem
            elif not self._study.execution.skip_preflight:
                importable.setdefault(self._study.interpreter(backend), []).append(backend)
        for python, names in importable.items():
            where = "" if python is None else f" with {python}"
            for name, problem in import_problems(python, names, self._import_path).items():
                yield printable(f"engine {name!r} cannot be used{where}: {problem}")

    def _unusable(self, backend: str) -> str | None:
        """Return why no experiment of an engine can run; None if no reason is known without importing it."""
        runner = self._study.runners.get(backend)
        if runner is not None and is_container(runner):  # refused: without the container, results would differ
            return (
                f"runner {runner!r} of engine {backend!r}: containers are not supported: "
                "name the Python interpreter of an environment that has the engine, or leave it out"
            )
        if self._study.execution.skip_preflight:
            return None
        interpreter = self._interpreter(backend)
        if isinstance(interpreter, str):
            return f"runner {runner!r} of engine {backend!r} {interpreter}"
        return self._missing_engine(backend, interpreter)

    def _reasons_of(self, config: ExperimentConfig) -> Iterator[str]:
        if (unusable := self._unusable(config.backend)) is not None:
            yield unusable
            return
        if self._study.execution.skip_preflight:
            return
        there = self._interpreter(config.backend)
        assert not isinstance(there, str)
        packages = Packages(there.modules.__contains__, self._pip(config.backend)) if there else THIS_ENVIRONMENT
        if problem := dataset_problem(config, self._study.path.parent, packages):
            yield problem
        if config.backend != "pytorch":
            if config.lora is not None:
                yield LORA
            return
        yield from unmet_requirements(config, packages)
        if missing := _missing_model(config.model, _revision(config), self._model_path):
            yield missing
            return
        yield from self._beyond_context(config)
        yield from self._beyond_hardware(config)

    def _interpreter(self, backend: str) -> Interpreter | str | None:
        """Return the contents of an engine's interpreter, or why it cannot be used; None for this interpreter."""
        if backend not in self._interpreters:
            self._interpreters[backend] = self._ask(backend)
        return self._interpreters[backend]

    def _ask(self, backend: str) -> Interpreter | str | None:
        python = self._study.interpreter(backend)
        if python is None or self._study.execution.skip_preflight:
            return None
        found = ask(python, [_module(backend)] if is_class(backend) else [])
        if isinstance(found, str):
            return found
        return check_runner_environment(found, None if is_class(backend) else backend, self._pip(backend)) or found

    def _pip(self, backend: str) -> str:
        """Return the pip command of an engine's environment, as typed in the current folder."""
        runner, python = self._study.runners[backend], self._study.interpreter(backend)
        assert python is not None
        if runner.startswith("~"):  # not expanded, so that results do not contain the user's home folder
            home, slash, rest = runner.partition("/")
            return f"{home}{slash}{shlex.quote(rest)} -m pip"
        command = str(python) if Path(runner).is_absolute() else os.path.relpath(python)
        return f"{shlex.quote(command if os.sep in command else f'./{command}')} -m pip"

    def _missing_engine(self, name: str, interpreter: Interpreter | None) -> str | None:
        if is_class(name):
            module = _module(name)
            path = self._import_path if interpreter else [*sys.path, *self._import_path]
            loaded = module in (interpreter.modules if interpreter else sys.modules)
            if loaded or PathFinder.find_spec(module, path):
                return None
            return f"engine {name!r}: module {module!r} not found (add its folder to the ini option pythonpath)"
        engines = installed(ENGINE_GROUP)
        if interpreter:
            return None
        if name in engines:
            missing = missing_here(name)
            return None if missing is None else f"engine {name!r} {missing}"
        return (
            f"engine {name!r} is not installed here (there are: {', '.join(engines)}): {how_to_add(name)}, "
            "or name in runners a Python interpreter that has it"
        )

    def host_of(self, config: ExperimentConfig) -> Host:
        """Return the machine as an experiment sees it: without GPUs if it runs with a CPU-only torch."""
        interpreter = None if self._given_host else self._interpreter(config.backend)
        return host_for(interpreter.packages.get("torch")) if isinstance(interpreter, Interpreter) else self.host

    def _beyond_context(self, config: ExperimentConfig) -> Iterator[str]:
        """Yield an error if even the shortest prompt exceeds the model's context; the engine checks the others."""
        shape = config.workload
        shortest = 1 if config.has_texts else shape.lengths.min if shape.lengths else shape.input_len
        limit = _context_length(config.model, _revision(config), self._model_path)
        if limit is not None and shortest is not None and shortest + shape.output_len > limit:
            yield too_long(config.model, shortest, shape.output_len, limit)

    def _beyond_hardware(self, config: ExperimentConfig) -> Iterator[str]:
        """Yield an error for a precision that the GPUs do not support, and for a model larger than the memory."""
        host = self.host_of(config)
        if config.precision == "bf16" and host.gpus and all(gpu.capability < _BF16 for gpu in host.gpus):
            yield f"{host.gpus[0].name} does not support bf16: use precision: fp16 or fp32"
        footprint = self.footprint(config)
        spread = config.pytorch is not None and config.pytorch.device_map is not None
        if footprint is None or spread:
            return
        weights, memory = weight_bytes(config, footprint), host.device_memory_bytes
        if host.memory_is_limited and not host.gpus:
            # The kernel kills a process that exceeds the limit, so here the whole estimate counts. Otherwise only
            # the weights and the runtime do, because the rest of the estimate is rough.
            if (needed := memory_bytes(config, footprint)) > memory:
                yield (
                    f"model {config.model!r} needs about {gib(needed)} in {config.precision} with its batches, "
                    f"and the memory limit here is {gib(memory)}: raise the limit of the container or of its "
                    "control group"
                )
        elif weights + RUNTIME_BYTES > memory:
            where = host.gpus[0].name if host.gpus else "this machine"
            yield (
                f"model {config.model!r} needs {gib(weights)} in {config.precision} "
                f"and {where} has {gib(memory)} of memory"
            )

    def asks_hub(self, config: ExperimentConfig) -> bool:
        """Return whether an experiment's model or dataset is from the Hugging Face hub, cached or not."""
        if config.has_texts and hub_dataset(str(config.dataset), self._study.path.parent) is not None:
            return True
        return config.backend == "pytorch" and _is_on_hub(config.model, _revision(config), self._model_path)

    def memory_bytes(self, config: ExperimentConfig) -> float | None:
        """Return the estimated memory of an experiment, in bytes; None if the model's size is unknown."""
        footprint = self.footprint(config)
        return None if footprint is None else memory_bytes(config, footprint)


def hub_unreachable() -> str | None:
    """Return why the Hugging Face hub cannot be reached; None if it answers or offline mode is set."""
    return hub.unreachable()


def rough_seconds(
    config: ExperimentConfig, execution: ExecutionConfig, model_path: tuple[Path, ...]
) -> float | None:
    """Return the estimated time of an experiment on this machine, in s; None if its model's size is unknown."""
    footprint = _footprint(config.model, _revision(config), model_path)
    return None if footprint is None else seconds(config, execution, footprint, this_host())


def _module(engine_class: str) -> str:
    """Return the top-level package of ``package.module:Class``."""
    return engine_class.partition(":")[0].partition(".")[0]


def gib(size: float) -> str:
    """Return a size in bytes as text in GiB."""
    return f"{size / 2**30:.1f} GiB" if size < 10 * 2**30 else f"{size / 2**30:,.0f} GiB"


def _revision(config: ExperimentConfig) -> str | None:
    return config.pytorch.revision if config.pytorch else None


@cache
def _missing_model(name: str, revision: str | None, model_path: tuple[Path, ...]) -> str | None:
    try:
        source = resolve_model(name, model_path, revision, download=False)
        return damaged_model(name, source, revision)
    except ModelNotFoundError as error:
        return str(error)


@cache
def _is_on_hub(name: str, revision: str | None, model_path: tuple[Path, ...]) -> bool:
    with suppress(ModelNotFoundError):
        return resolve_model(name, model_path, revision, download=False).kind == "hub"
    return False


@cache
def _footprint(name: str, revision: str | None, model_path: tuple[Path, ...]) -> Footprint | None:
    if name == BUILTIN + NAME:
        return from_config(SHAPE)
    folder = _folder(name, revision, model_path)
    return read_footprint(folder) if folder else None


@cache
def _context_length(name: str, revision: str | None, model_path: tuple[Path, ...]) -> int | None:
    if name == BUILTIN + NAME:
        return context_length(SHAPE)
    folder = _folder(name, revision, model_path)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8")) if folder else {}
        return context_length(text_config(config))
    except (OSError, ValueError, TypeError, AttributeError):  # loading the model reports an invalid configuration
        return None


def _folder(name: str, revision: str | None, model_path: tuple[Path, ...]) -> Path | None:
    """Return the folder of a model; None if the model is not on this machine."""
    try:
        source = resolve_model(name, model_path, revision, download=False)
    except ModelNotFoundError:
        return None
    return cached_snapshot(name, revision) if source.kind == "hub" else Path(source.location)
