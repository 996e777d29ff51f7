"""Find reasons why an experiment cannot run, before it is started."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache, cached_property
from importlib.machinery import PathFinder
from pathlib import Path

from pytest_llem.engines import hub
from pytest_llem.engines.models import (
    BUILTIN,
    context_length,
    damaged_model,
    resolve_model,
    too_long,
)
from pytest_llem.engines.options import LORA, given_fields, option_problems
from pytest_llem.engines.protocol import ModelNotFoundError
from pytest_llem.engines.requirements import THIS_ENVIRONMENT, Packages
from pytest_llem.engines.shipped import KNOWN_WHOLLY, SHIPPED, shipped_needs
from pytest_llem.engines.tiny_llama import NAME, SHAPE
from pytest_llem.isolation.engine_probe import ConfigQuestion, EngineAnswer, probe_engines
from pytest_llem.isolation.interpreter import Interpreter, ask
from pytest_llem.machine.allocation import DeviceRequest, exactly, request_devices
from pytest_llem.machine.attached_server import gpus_of_server
from pytest_llem.machine.devices import CPU
from pytest_llem.planning.deadline import deadline_seconds, max_load_seconds
from pytest_llem.planning.estimate import RUNTIME_BYTES, memory_bytes, seconds, weight_bytes
from pytest_llem.planning.footprint import Footprint, from_config, read_footprint, text_config
from pytest_llem.planning.host import Host, host_for, this_host
from pytest_llem.planning.runner_environment import check_runner_environment, how_to_install, missing_here
from pytest_llem.registry import ENGINE_GROUP, installed
from pytest_llem.results.code_state import find_by_hook
from pytest_llem.serving.schedule import trace_problem
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Point, StudyConfig
from pytest_llem.study.document import Document, KeyPath, load_document
from pytest_llem.study.engines import COMMAND, Needs
from pytest_llem.study.execution import ExecutionConfig
from pytest_llem.study.problems import StudyError, printable
from pytest_llem.study.runners import is_class, is_container
from pytest_llem.study.server import SERVER
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
        self._engines: dict[Path | None, dict[str, EngineAnswer]] = {}
        self._requests: dict[tuple[Path | None, int | None, bool], DeviceRequest] = {}

    def reason(self, point: Point) -> str | None:
        """Return why *point* cannot run, and what to do, in one line; None if no reason is known."""
        if point.config_hash not in self._reasons:
            self._reasons[point.config_hash] = printable("; ".join(self._reasons_of(point.config))) or None
        return self._reasons[point.config_hash]

    def footprint(self, config: ExperimentConfig) -> Footprint | None:
        """Return the size of an experiment's model; None if unknown."""
        if config.model is None or config.backend == SERVER:  # what a server takes is not known
            return None
        return _footprint(config.model, _revision(config), self._model_path)

    def needs(self, config: ExperimentConfig) -> Needs:
        """Return what an experiment's engine states that it needs; nothing if it cannot be asked."""
        question = self._question(config)
        try:
            stated = shipped_needs(config, question.parameters)
        except ValueError:  # which is a reason why the experiment cannot run
            return Needs()
        if stated is not None:
            return stated
        answer = self._answer(config)
        return Needs() if answer is None else answer.needs(question)

    def _question(self, config: ExperimentConfig) -> ConfigQuestion:
        footprint = self.footprint(config)
        return ConfigQuestion(config, footprint.parameters if footprint else None)

    def _answer(self, config: ExperimentConfig) -> EngineAnswer | None:
        """Return what the engine of an experiment answers, without importing it here; None if it does not."""
        backend, python = config.backend, self._study.interpreter(config.backend)
        if self._study.execution.skip_preflight or self._unusable(backend) is not None:
            return None
        if backend not in (known := self._engines.setdefault(python, {})):
            names = {point.config.backend for point in self._study.points if point.skip is None} - KNOWN_WHOLLY
            same = [name for name in names if self._study.interpreter(name) == python]
            usable = [name for name in same if self._unusable(name) is None]
            asked = sorted({*usable, backend})
            known |= dict.fromkeys(asked, EngineAnswer()) | self._answers(python, asked)
        return known[backend]

    def _answers(self, python: Path | None, backends: Sequence[str]) -> dict[str, EngineAnswer]:
        """Return what engines answer about the study's configurations in the interpreter that will run them."""
        configs = [point.config for point in self._study.points if point.skip is None]
        questions = {
            name: [self._question(one) for one in configs if one.backend == name and name not in KNOWN_WHOLLY]
            for name in backends
        }
        return probe_engines(python, questions, self._import_path)

    def deadline_seconds(self, config: ExperimentConfig) -> float:
        """Return the maximum time from the start of an experiment's process, in s, without downloads."""
        execution, needs = self._study.execution, self.needs(config)
        return deadline_seconds(config, execution, needs, self.footprint(config), self.host_of(config))

    def max_load_seconds(self, config: ExperimentConfig) -> float | None:
        """Return the maximum time in which the engine loads its model, in s; None if only the deadline limits"""
        return max_load_seconds(config, self._study.execution, self.needs(config), self.footprint(config))

    def request(self, config: ExperimentConfig) -> DeviceRequest:
        """Return the devices that an experiment may be given. Experiments with equal needs query NVML once."""
        if config.server is not None and config.server.is_attached:
            return exactly(*gpus_of_server(config.server) or (CPU,))
        needs, python = self.needs(config), self._study.interpreter(config.backend)
        key = python, needs.gpus, needs.uses_torch
        if key not in self._requests:
            self._requests[key] = request_devices(needs, python)
        return self._requests[key]

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
            for name, answer in self._answers(python, names).items():
                if name in names and answer.problem is not None:
                    yield printable(f"engine {name!r} cannot be used{where}: {answer.problem}")

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
        if config.lora is not None:
            yield LORA
        if (shipped := SHIPPED.get(config.backend)) is not None:
            unmet = list(shipped.unmet_requirements(config, packages))
            yield from unmet
        if shipped is None or (shipped.checks_options and not unmet):
            yield from self._engine_problems(config)
        if config.backend == SERVER:
            problems = option_problems(shipped, config, given_fields(config))
            yield from (f"{self._place(one.path)}: {one.message}" for one in problems)
            if config.load is not None and (problem := trace_problem(config.load, self._study.path.parent)):
                yield problem
        needs = self.needs(config)
        if (
            config.measurement.prefill_split
            and needs.supports is not None
            and "prefill_only" not in needs.supports
        ):
            reason = f"engine {config.backend!r} cannot stop after the first token (it has no generate_first)"
            yield f"{reason}: leave measurement.prefill_split out"
        if needs.gpus and (problem := self.request(config).problem):
            yield f"engine {config.backend!r} {problem}"
        if not needs.resolves_model:
            return
        if config.model is None:
            yield f"engine {config.backend!r} needs a model: give model in the study"
            return
        if missing := _missing_model(config.model, needs.model_revision, self._model_path):
            yield missing
            return
        yield from self._context_problems(config, needs)
        yield from self._hardware_problems(config, needs)

    def _engine_problems(self, config: ExperimentConfig) -> Iterator[str]:
        """Yield why an engine cannot be used, or each of its options that is wrong, with its place."""
        answer = self._answer(config)
        if answer is None:
            return
        if answer.problem is not None:
            python = self._study.interpreter(config.backend)
            where = "" if python is None else f" with {python}"
            yield f"engine {config.backend!r} cannot be used{where}: {answer.problem}"
        else:
            for key_path, message in answer.problems(self._question(config)):
                yield f"{self._place(key_path)}: {message}"

    def _place(self, key_path: KeyPath) -> str:
        """Return the place of a configuration's key, ``file:line:column: key``; without a file, the key."""
        name = ".".join(map(str, key_path))
        if self._document is None:
            return name
        marks = self._document.marks
        axis, section = ".".join(map(str, key_path[:2])), str(key_path[0])
        below = [(), ("sweep",), *(("experiments", at) for at in range(len(self._study.points)))]
        written: list[KeyPath] = [("sweep", axis), *((*one, *key_path) for one in below)]
        # A problem of the whole section: at one of its axes, or at the section.
        written += [one for one in marks if one[:1] == ("sweep",) and str(one[-1]).startswith(f"{section}.")]
        found = next((marks[one] for one in (*written, (section,), ("backend",)) if one in marks), None)
        return name if found is None else f"{self._study.path.name}:{found[0]}:{found[1]}: {name}"

    @cached_property
    def _document(self) -> Document | None:
        try:
            document = load_document(self._study.path)
        except StudyError:  # a configuration without a file
            return None
        return document if isinstance(document.data, dict) else None

    def _interpreter(self, backend: str) -> Interpreter | str | None:
        """Return the contents of an engine's interpreter, or why it cannot be used; None for this interpreter."""
        if backend not in self._interpreters:
            self._interpreters[backend] = self._read_interpreter(backend)
        return self._interpreters[backend]

    def _read_interpreter(self, backend: str) -> Interpreter | str | None:
        python = self._study.interpreter(backend)
        if python is None or self._study.execution.skip_preflight:
            return None
        found = ask(python, [_module(backend)] if is_class(backend) else [])
        if isinstance(found, str):
            return found
        return (
            check_runner_environment(
                found, None if is_class(backend) or backend == COMMAND else backend, self._pip(backend)
            )
            or found
        )

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
        if name == COMMAND:
            return None
        if is_class(name):
            module = _module(name)
            path = self._import_path if interpreter else [*sys.path, *self._import_path]
            loaded = module in (interpreter.modules if interpreter else sys.modules)
            if loaded or PathFinder.find_spec(module, path) or (interpreter is None and find_by_hook(module)):
                return None
            return f"engine {name!r}: module {module!r} not found (add its folder to the ini option pythonpath)"
        engines = installed(ENGINE_GROUP)
        if interpreter:
            return None
        if name in engines:
            missing = missing_here(name)
            return None if missing is None else f"engine {name!r} {missing}"
        return (
            f"engine {name!r} is not installed here (there are: {', '.join(engines)}): {how_to_install(name)}, "
            "or name in runners a Python interpreter that has it"
        )

    def host_of(self, config: ExperimentConfig) -> Host:
        """Return the machine as an experiment sees it: without GPUs if it runs with a CPU-only torch."""
        interpreter = None if self._given_host else self._interpreter(config.backend)
        return host_for(interpreter.packages.get("torch")) if isinstance(interpreter, Interpreter) else self.host

    def _context_problems(self, config: ExperimentConfig, needs: Needs) -> Iterator[str]:
        """Yield an error if even the shortest prompt exceeds the model's context; the engine checks the others."""
        shape = config.workload
        shortest = 1 if config.has_texts else shape.lengths.min if shape.lengths else shape.input_len
        limit = _context_length(config.model_name, needs.model_revision, self._model_path)
        if limit is not None and shortest is not None and shortest + shape.output_len > limit:
            yield too_long(config.model_name, shortest, shape.output_len, limit)

    def _hardware_problems(self, config: ExperimentConfig, needs: Needs) -> Iterator[str]:
        """Yield an error for a precision that the GPUs do not support, and for a model larger than the memory."""
        host = self.host_of(config)
        if config.precision == "bf16" and host.gpus and all(gpu.capability < _BF16 for gpu in host.gpus):
            yield f"{host.gpus[0].name} does not support bf16: use precision: fp16 or fp32"
        footprint = self.footprint(config)
        if footprint is None or needs.gpus is None:
            return
        weights, memory = weight_bytes(config, needs, footprint), host.device_memory_bytes(needs.gpus)
        if host.memory_is_limited and not host.gpus:
            # The kernel kills a process that exceeds the limit, so here the whole estimate counts. Otherwise only
            # the weights and the runtime do, because the rest of the estimate is rough.
            if (needed := memory_bytes(config, needs, footprint)) > memory:
                yield (
                    f"model {config.model!r} needs about {gib(needed)} in {config.precision} with its batches, "
                    f"and the memory limit here is {gib(memory)}: raise the limit of the container or of its "
                    "control group"
                )
        elif weights + RUNTIME_BYTES > memory:
            where = host.gpus[0].name if host.gpus else "this machine"
            if host.gpus and needs.gpus > 1:
                where, has = f"{needs.gpus} × {where}", "have"
            else:
                has = "has"
            yield (
                f"model {config.model!r} needs {gib(weights)} in {config.precision} "
                f"and {where} {has} {gib(memory)} of memory"
            )

    def needs_hub(self, config: ExperimentConfig) -> bool:
        """Return whether an experiment's model or dataset is from the Hugging Face hub, cached or not."""
        if config.has_texts and hub_dataset(str(config.dataset), self._study.path.parent) is not None:
            return True
        needs = self.needs(config)
        return needs.resolves_model and _is_on_hub(config.model, needs.model_revision, self._model_path)

    def memory_bytes(self, config: ExperimentConfig) -> float | None:
        """Return the estimated memory of an experiment, in bytes; None if the model's size is unknown."""
        footprint = self.footprint(config)
        return None if footprint is None else memory_bytes(config, self.needs(config), footprint)


class UnknownHostPreflight(Preflight):
    """Refuses and predicts nothing: the experiments run on hosts of which this process knows nothing."""

    def reason(self, point: Point) -> str | None:
        return None

    def footprint(self, config: ExperimentConfig) -> Footprint | None:
        return None

    def _answer(self, config: ExperimentConfig) -> EngineAnswer | None:
        return None


def hub_unreachable() -> str | None:
    """Return why the Hugging Face hub cannot be reached; None if it answers or offline mode is set."""
    return hub.unreachable()


def rough_seconds(
    config: ExperimentConfig, execution: ExecutionConfig, model_path: tuple[Path, ...]
) -> float | None:
    """Return the estimated time of an experiment on this machine, in s; None if its model's size is unknown."""
    if config.backend == SERVER or (footprint := _footprint(config.model, _revision(config), model_path)) is None:
        return None
    needs = shipped_needs(config, footprint.parameters) or Needs()
    return seconds(config, execution, needs, footprint, this_host())


def _module(engine_class: str) -> str:
    """Return the top-level package of ``package.module:Class``."""
    return engine_class.partition(":")[0].partition(".")[0]


def gib(size: float) -> str:
    """Return a size in bytes as text in GiB."""
    return f"{size / 2**30:.1f} GiB" if size < 10 * 2**30 else f"{size / 2**30:,.0f} GiB"


def _revision(config: ExperimentConfig) -> str | None:
    stated = shipped_needs(config)
    return stated.model_revision if stated else None


@cache
def _missing_model(name: str, revision: str | None, model_path: tuple[Path, ...]) -> str | None:
    try:
        source = resolve_model(name, model_path, revision, download=False)
        return damaged_model(name, source)
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
        return resolve_model(name, model_path, revision, download=False).folder
    except ModelNotFoundError:
        return None
