"""Ask the interpreter that will run engines about them: their options, and what each configuration needs.

An engine may import anything, so it is imported in a process of its own. As that may take long, answers are kept
in the user's cache until the code of the engine or of pytest-llem changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, Field

from pytest_llem.engines.options import given_fields
from pytest_llem.engines.shipped import KNOWN_WHOLLY
from pytest_llem.engines.tiny_llama import cache_folder
from pytest_llem.isolation.interpreter import STATUS, ask_code_state, run_supervised
from pytest_llem.registry import ENGINE_GROUP
from pytest_llem.results import code_state
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import Needs
from pytest_llem.study.problems import did_you_mean

#: Time limit for importing engines, in s. Some import much, and from a slow network drive.
IMPORT_SECONDS = 600.0

#: When the cache has this many answers about configurations of one engine, new ones replace them.
MAX_ANSWERS = 10_000

_MARKER = "pytest-llem's answer is written"

#: Run in the interpreter to import engines with the same ``sys.path`` as an experiment's process.
_SCRIPT = """
import json, sys
with open(sys.argv[2]) as file:
    question = json.load(file)
if question["sys_path"] is not None:
    sys.path[:] = question["sys_path"]
sys.path += [folder for folder in question["path"] if folder not in sys.path]
try:
    from pytest_llem.measurement.engine_imports import answer
except ImportError:  # an earlier commit of the same version, as a reference may have
    answer = lambda engines: {name: {} for name in engines}
with open(sys.argv[3], "w") as file:
    json.dump(answer(question["engines"]), file)
print("\\n" + sys.argv[1], flush=True)
"""


class ConfigQuestion(NamedTuple):
    """A configuration that an engine is asked about.

    Attributes:
        config: The experiment.
        parameters: Number of its model's weights; None if unknown.
    """

    config: ExperimentConfig
    parameters: int | None = None

    def as_data(self) -> dict[str, Any]:
        """Return the question as plain data."""
        return {
            "config": self.config.model_dump(mode="json"),
            "given": given_fields(self.config),
            "parameters": self.parameters,
        }


class ConfigAnswer(BaseModel):
    """What an engine answers about one configuration.

    Attributes:
        problems: Path of each option that the engine cannot use, in the configuration, and what is wrong.
        needs: Fields of Needs.
    """

    problems: list[tuple[tuple[str | int, ...], str]] = Field(default_factory=list)
    needs: dict[str, Any] = Field(default_factory=dict)


class EngineAnswer(BaseModel):
    """What an interpreter answers about one engine.

    Attributes:
        problem: Why the engine cannot be used; None if it can.
        options: JSON Schema of its options; None if it has none.
        supports: Optional abilities of its class; None if unknown.
        takes_any: Whether it states no needs, and its options take any value. Then only their names can be wrong.
        reads_passthrough_kwargs: Whether it reads ``passthrough_kwargs``.
        configs: Answers about configurations, by a digest of the question.
    """

    problem: str | None = None
    options: dict[str, Any] | None = None
    supports: list[str] | None = None
    takes_any: bool = False
    reads_passthrough_kwargs: bool = False
    configs: dict[str, ConfigAnswer] = Field(default_factory=dict)

    def problems(self, question: ConfigQuestion) -> list[tuple[tuple[str | int, ...], str]]:
        """Return the options that the engine cannot use: path in the configuration, and what is wrong."""
        if not self.takes_any:
            return self.configs[_digest(question)].problems if _digest(question) in self.configs else []
        config = question.config
        known = tuple((self.options or {}).get("properties", {}))
        given = [name for name, value in config.engine_section.items() if value is not None]
        found: list[tuple[tuple[str | int, ...], str]] = [
            ((config.backend, name), f"the engine has no such option{_hint(name, known)}")
            for name in given
            if name not in known
        ]
        if config.passthrough_kwargs and not self.reads_passthrough_kwargs:
            message = f"engine {config.backend!r} does not read them: leave them out"
            found.append((("passthrough_kwargs",), message))
        return found

    def needs(self, question: ConfigQuestion) -> Needs:
        """Return what the engine states that a configuration needs."""
        answer = self.configs.get(_digest(question)) if not self.takes_any else None
        supports = None if self.supports is None else frozenset(self.supports)
        stated = answer.needs if answer else {}
        # A reference may have another commit of pytest-llem, whose Needs have other fields.
        known = {name: value for name, value in stated.items() if name in Needs.__dataclass_fields__}
        return Needs(**{**known, "supports": supports})

    def knows(self, questions: Sequence[ConfigQuestion]) -> bool:
        """Return whether all *questions* are already answered."""
        return self.takes_any or all(_digest(one) in self.configs for one in questions)


def probe_engines(
    python: Path | None, questions: Mapping[str, Sequence[ConfigQuestion]], path: Sequence[str]
) -> dict[str, EngineAnswer]:
    """Return what engines answer in the interpreter that will run them.

    An engine has no entry if the imports take longer than :data:`IMPORT_SECONDS`: its problems appear when an
    experiment runs. No process is left.

    Args:
        python: The interpreter, which has pytest-llem; None for this one.
        questions: The configurations to ask about, by the engine's name: an entry point, or
            ``package.module:Class``.
        path: Folders that are searched after the interpreter's own.
    """
    keys = _cache_keys(python, [name for name in questions if name not in KNOWN_WHOLLY], path)
    answers = {name: found for name, key in keys.items() if (found := _read(python, name, key)) is not None}
    unknown = {
        name: asked for name, asked in questions.items() if name not in answers or not answers[name].knows(asked)
    }
    fresh = _ask(python, unknown, path) if unknown else {}
    for name, answer in fresh.items():
        if name in answers and len(answers[name].configs) < MAX_ANSWERS:
            answer.configs = answers[name].configs | answer.configs
        answers[name] = answer
        if answer.problem is None and name in keys:  # a problem may be solved by installing something
            _write(python, name, keys[name], answer)
    return answers


def _ask(
    python: Path | None, questions: Mapping[str, Sequence[ConfigQuestion]], path: Sequence[str]
) -> dict[str, EngineAnswer]:
    sys_path = None if python else [os.fspath(one) for one in sys.path if isinstance(one, str | os.PathLike)]
    engines = {name: [one.as_data() for one in asked] for name, asked in questions.items()}
    program = str(python or sys.executable)
    with tempfile.TemporaryDirectory(prefix="llem-") as folder:
        question, answer = Path(folder, "question.json"), Path(folder, "answer.json")
        question.write_text(json.dumps({"engines": engines, "sys_path": sys_path, "path": list(path)}))
        try:
            command = [program, "-c", _SCRIPT, _MARKER, str(question), str(answer)]
            _, ending = run_supervised(command, IMPORT_SECONDS, _MARKER)
        except OSError as error:
            problem = f"{program} cannot be run: {error.strerror or error}"
            return {name: EngineAnswer(problem=problem) for name in engines}
        with suppress(OSError, ValueError):
            found = json.loads(answer.read_text())
            return {name: _answer(found[name], asked) for name, asked in questions.items()}
    if not ending.startswith(STATUS):
        return {}
    if len(questions) > 1:  # find out which one ends Python
        each = [_ask(python, {name: asked}, path) for name, asked in questions.items()]
        return {name: found for one in each for name, found in one.items()}
    return {name: EngineAnswer(problem=f"importing it ends Python ({ending})") for name in engines}


def _answer(found: dict[str, Any], asked: Sequence[ConfigQuestion]) -> EngineAnswer:
    digests = map(_digest, asked)
    return EngineAnswer.model_validate(
        {**found, "configs": dict(zip(digests, found.get("configs", ()), strict=False))}
    )


def _hint(name: str, known: tuple[str, ...]) -> str:
    if not known:
        return " (it has none: an engine names the class of its options as options)"
    return did_you_mean(name, known) or f" (there are: {', '.join(sorted(known))})"


def _digest(question: ConfigQuestion) -> str:
    return hashlib.sha256(json.dumps(question.as_data(), sort_keys=True).encode()).hexdigest()[:16]


def _cache_keys(python: Path | None, names: Sequence[str], path: Sequence[str]) -> dict[str, str]:
    """Return what identifies the code of each engine and of pytest-llem. An engine that is not found has none."""
    if not names:
        return {}
    found = _sources(python, names, path)
    return {name: f"{_own_code()} {code}" for name, code in found.items() if code is not None}


@cache
def _own_code() -> str:
    return str(code_state.source("pytest_llem", ENGINE_GROUP, sys.path))


def _sources(python: Path | None, names: Sequence[str], path: Sequence[str]) -> dict[str, str | None]:
    if python is None:
        return code_state.sources(names, ENGINE_GROUP, [*sys.path, *path])
    question = {"engines": list(names), "group": ENGINE_GROUP, "path": list(path)}
    found: dict[str, str | None] = ask_code_state(python, question) or {}
    return found


def _file(python: Path | None, name: str) -> Path:
    """Return the cache file of an engine in an interpreter.

    Raises:
        OSError: There is no folder for it.
    """
    version = "" if python else sys.version
    digest = hashlib.sha256(f"{python or sys.executable}\n{version}\n{name}".encode()).hexdigest()[:16]
    return cache_folder("engines") / f"{digest}.json"


def _read(python: Path | None, name: str, key: str) -> EngineAnswer | None:
    """Return the cached answer of an engine; None if there is none, or the code has changed, or it is damaged."""
    try:
        found = json.loads(_file(python, name).read_text())
        return EngineAnswer.model_validate(found["answer"]) if found["code"] == key else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(python: Path | None, name: str, key: str, answer: EngineAnswer) -> None:
    """Keep an answer. Without a cache, the engine is imported again in the next run."""
    with suppress(OSError):
        file = _file(python, name)
        temporary = file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps({"engine": name, "code": key, "answer": answer.model_dump(mode="json")}))
        temporary.replace(file)
