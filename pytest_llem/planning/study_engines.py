"""Check that a study's engines are installed in their interpreters, and ask them about its configurations."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from pytest_llem.engines.shipped import KNOWN_WHOLLY, THIS_ENVIRONMENT, Packages
from pytest_llem.isolation.engine_probe import ConfigQuestion, EngineAnswer, probe_engines
from pytest_llem.isolation.interpreter import Interpreter, ask
from pytest_llem.planning.model_files import footprint_of
from pytest_llem.planning.runner_environment import check_runner_environment, how_to_install, missing_here
from pytest_llem.registry import ENGINE_GROUP, installed
from pytest_llem.results.code_state import find_by_hook
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import StudyConfig
from pytest_llem.study.engines import COMMAND
from pytest_llem.study.problems import printable
from pytest_llem.study.runners import is_class, is_container


class StudyEngines:
    """The engines of one study. Interpreters and engines are asked in other processes; answers are kept.

    Args:
        study: The study.
        model_path: Folders that hold models by name.
        import_path: Folders searched for user-defined engines, in addition to the interpreter's own path.
    """

    def __init__(self, study: StudyConfig, model_path: tuple[Path, ...], import_path: Sequence[Path]) -> None:
        self._study = study
        self._model_path = model_path
        self._import_path = [str(folder) for folder in import_path]
        self._interpreters: dict[str, Interpreter | str | None] = {}
        self._engines: dict[Path | None, dict[str, EngineAnswer]] = {}

    def problems(self, backends: Iterable[str]) -> Iterator[str]:
        """Yield an error line for each engine that cannot run or be imported.

        Engines are imported in a separate process, with the interpreter that runs their experiments.
        """
        importable: dict[Path | None, list[str]] = {}
        for backend in backends:
            if (problem := self.unusable_reason(backend)) is not None:
                yield problem
            elif not self._study.execution.skip_preflight:
                importable.setdefault(self._study.interpreter(backend), []).append(backend)
        for python, names in importable.items():
            for name, answer in self._answers(python, names).items():
                if name in names and answer.problem is not None:
                    yield printable(self.unusable_message(name, answer.problem))

    def unusable_message(self, backend: str, problem: str) -> str:
        """Return the error message of an engine with a *problem*."""
        python = self._study.interpreter(backend)
        where = "" if python is None else f" with {python}"
        return f"engine {backend!r} cannot be used{where}: {problem}"

    def unusable_reason(self, backend: str) -> str | None:
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

    def answer(self, config: ExperimentConfig) -> EngineAnswer | None:
        """Return an engine's answer about its configurations, without importing it here; None if there is none."""
        backend, python = config.backend, self._study.interpreter(config.backend)
        if self._study.execution.skip_preflight or self.unusable_reason(backend) is not None:
            return None
        if backend not in (known := self._engines.setdefault(python, {})):
            names = {point.config.backend for point in self._study.points if point.skip is None} - KNOWN_WHOLLY
            same = [name for name in names if self._study.interpreter(name) == python]
            usable = [name for name in same if self.unusable_reason(name) is None]
            asked = sorted({*usable, backend})
            known |= dict.fromkeys(asked, EngineAnswer()) | self._answers(python, asked)
        return known[backend]

    def _answers(self, python: Path | None, backends: Sequence[str]) -> dict[str, EngineAnswer]:
        """Return what engines answer about the study's configurations in the interpreter that will run them."""
        configs = [point.config for point in self._study.points if point.skip is None]
        questions = {}
        for name in backends:
            asked = [] if name in KNOWN_WHOLLY else [one for one in configs if one.backend == name]
            questions[name] = [question_about(one, self._model_path) for one in asked]
        return probe_engines(python, questions, self._import_path)

    def interpreter(self, backend: str) -> Interpreter | None:
        """Return what an engine's interpreter has installed; None for this interpreter or an unusable one."""
        found = self._interpreter(backend)
        return None if isinstance(found, str) else found

    def _interpreter(self, backend: str) -> Interpreter | str | None:
        """Return what an engine's interpreter has installed, or why it is unusable; None for this interpreter."""
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
        engine = None if is_class(backend) or backend == COMMAND else backend
        return check_runner_environment(found, engine, self._pip(backend)) or found

    def packages(self, backend: str) -> Packages:
        """Return the packages of a usable engine's environment."""
        other = self.interpreter(backend)
        return Packages(other.modules.__contains__, self._pip(backend)) if other else THIS_ENVIRONMENT

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
        if interpreter:
            return None
        engines = installed(ENGINE_GROUP)
        if name in engines:
            missing = missing_here(name)
            return None if missing is None else f"engine {name!r} {missing}"
        return (
            f"engine {name!r} is not installed here (there are: {', '.join(engines)}): {how_to_install(name)}, "
            "or name in runners a Python interpreter that has it"
        )


def question_about(config: ExperimentConfig, model_path: tuple[Path, ...]) -> ConfigQuestion:
    """Return the question to an engine about a configuration."""
    footprint = footprint_of(config, model_path)
    return ConfigQuestion(config, footprint.parameters if footprint else None)


def _module(engine_class: str) -> str:
    """Return the top-level package of ``package.module:Class``."""
    return engine_class.partition(":")[0].partition(".")[0]
