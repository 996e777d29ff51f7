"""Fill the placeholders in commands with the values of an experiment, and build the command of a server."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_llem.study.config import DATA_TYPES, ExperimentConfig
from pytest_llem.study.engines import COMMAND, CommandConfig
from pytest_llem.study.problems import did_you_mean, shown
from pytest_llem.study.section import flatten
from pytest_llem.study.server import ServerConfig

#: An escaped brace, a placeholder, or a single brace, which is an error.
_PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")

_ESCAPE = "write {{ and }} for braces"


class PlaceholderError(ValueError):
    """An argument of a command cannot be filled.

    Attributes:
        index: Position of the argument in the command, from 0.
    """

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


class Substitution:
    """The values that the placeholders of a command stand for.

    A placeholder is ``{name}``. The name is that of a field of the experiment: dotted (``{decoder.temperature}``),
    without the command's section (``{rate}`` for ``command.rate``), or only its last part, if no other field has
    that (``{temperature}``). ``{{`` and ``}}`` stand for braces.

    Example:
        >>> config = ExperimentConfig(model="m", backend="command", command={"rate": 4})
        >>> Substitution(config, "command", out="/tmp/a.json").fill(["--rate={rate}", "{out}"])
        ['--rate=4', '/tmp/a.json']

    Args:
        config: The experiment.
        section: Name of the command's section.
        others: Further values by name. They take precedence over fields.
    """

    def __init__(self, config: ExperimentConfig, section: str, **others: str) -> None:
        self._fields = dict(flatten(config.model_dump(mode="json")))
        self._section = section
        self._others = others
        last = {name: name.rpartition(".")[2] for name in self._fields}
        count = Counter(last.values())
        self._short = {part: name for name, part in last.items() if count[part] == 1}

    def fill(self, arguments: Sequence[str]) -> list[str]:
        """Return *arguments* with the values in place of the placeholders.

        Text stands for itself, and every other value is written as JSON.

        Raises:
            PlaceholderError: A placeholder is unknown or has no value, or a brace is not part of one.
        """
        return [self._filled(index, argument) for index, argument in enumerate(arguments)]

    def fields_in(self, arguments: Sequence[str]) -> set[str]:
        """Return the dotted names of the experiment's fields that placeholders of *arguments* stand for.

        Raises:
            PlaceholderError: As for :meth:`fill`.
        """
        self.fill(arguments)
        named = {part[1] for argument in arguments for part in _PART.finditer(argument)} - {None, *self._others}
        return {field for name in named if (field := self._field(name)) is not None}

    def _filled(self, index: int, argument: str) -> str:
        def value(part: re.Match[str]) -> str:
            if part[0] in ("{{", "}}"):
                return part[0][0]
            if part[1] is None:
                raise PlaceholderError(index, f"a single {part[0]!r} (got {shown(argument)}): {_ESCAPE}")
            return self._value(index, part[1])

        return _PART.sub(value, argument)

    def _value(self, index: int, name: str) -> str:
        if name in self._others:
            return self._others[name]
        field = self._field(name)
        if field is None:
            known = tuple(dict.fromkeys([*self._others, *self._own(), *self._fields, *self._short]))
            hint = did_you_mean(name, known) or f": it has to be a field of the experiment; {_ESCAPE}"
            raise PlaceholderError(index, f"unknown placeholder {shown(f'{{{name}}}')}{hint}")
        value = self._fields[field]
        if value is None:
            raise PlaceholderError(index, f"placeholder {shown(f'{{{name}}}')} has no value: {field} is null")
        return value if isinstance(value, str) else json.dumps(value)

    def _field(self, name: str) -> str | None:
        """Return the dotted name of the field that *name* stands for; None if there is none."""
        own = f"{self._section}.{name}"
        return next((one for one in (name, own, self._short.get(name)) if one in self._fields), None)

    def _own(self) -> list[str]:
        """Return the names of the fields in the command's section, without the section."""
        prefix = f"{self._section}."
        return [name.removeprefix(prefix) for name in self._fields if name.startswith(prefix)]


#: Sections and fields that need no placeholder, because pytest-llem itself applies them.
_NEED_NO_PLACEHOLDER = ("backend", "energy", "output_dir")


def command_values(config: ExperimentConfig, *, out: str = "", python: str = "") -> Substitution:
    """Return the values of the placeholders in ``command.run``.

    Args:
        config: The experiment.
        out: Path of the file that the command has to write.
        python: The interpreter of the experiment.
    """
    return Substitution(config, COMMAND, out=out, python=python)


def unreached(config: ExperimentConfig, arguments: Sequence[str]) -> dict[str, str]:
    """Return the fields of an experiment that no placeholder of a command's *arguments* names, and what to do.

    Raises:
        PlaceholderError: A placeholder cannot be filled.
    """
    named = command_values(config).fields_in(arguments)
    options = {f"{COMMAND}.{name}" for name in CommandConfig.model_fields}
    found = {}
    for name, _ in flatten(config.model_dump(mode="json")):
        if name.partition(".")[0] not in _NEED_NO_PLACEHOLDER and name not in named | options:
            short = name.removeprefix(f"{COMMAND}.")
            found[name] = f"does not reach the command: write {{{short}}} in command.run, or leave it out"
    return found


@dataclass(frozen=True)
class ServerPreset:
    """What is known of a kind of server.

    Attributes:
        command: Its command, with placeholders.
        decoder: Name in requests by field of ``decoder``, for fields whose name differs there.
        env: Environment variables that the server gets unless ``server.env`` sets them.
        negates: Whether an option that is false is given as ``--no-…``.
    """

    command: Sequence[str]
    decoder: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    negates: bool = False


PRESETS: dict[str, ServerPreset] = {
    "vllm": ServerPreset(
        command=(
            *("{python}", "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", "{model}", "--dtype", "{dtype}", "--host", "127.0.0.1", "--port", "{port}"),
        ),
        decoder={"min_new_tokens": "min_tokens"},
        env={"VLLM_NO_USAGE_STATS": "1"},
        negates=True,
    ),
    "sglang": ServerPreset(
        command=(
            *("{python}", "-m", "sglang.launch_server", "--enable-metrics"),
            *("--model-path", "{model}", "--dtype", "{dtype}", "--host", "127.0.0.1", "--port", "{port}"),
        ),
        decoder={"min_new_tokens": "min_tokens"},
    ),
    "llama.cpp": ServerPreset(
        command=("llama-server", "--model", "{model}", "--metrics", "--host", "127.0.0.1", "--port", "{port}"),
        decoder={"repetition_penalty": "repeat_penalty"},
    ),
}


def fields_in_command(config: ExperimentConfig) -> set[str]:
    """Return the fields of the study that the command of an experiment's server takes, by dotted name.

    Raises:
        ValueError: A placeholder cannot be filled, ``{port}`` is missing, or one of ``args`` is wrong or unused.
    """
    server = config.server
    assert server is not None
    if server.is_attached:
        return set()
    parts = _template(server)
    if not any("{port}" in part for part in parts):
        raise ValueError("command: needs the placeholder {port}: each server gets a port of its own")
    substitution = _substitution(config, port="0", python="python", model=config.model or "")
    try:
        found = substitution.fields_in(parts)
    except PlaceholderError as error:
        raise ValueError(f"command[{error.index}]: {error}") from None
    by_placeholder = {"{model}": "model", "{dtype}": "precision"}
    found |= {name for placeholder, name in by_placeholder.items() if any(placeholder in part for part in parts)}
    if server.command is None:
        list(_options(server))  # to check them
        return found
    unused = [name for name in server.args or {} if f"server.args.{name}" not in found]
    if unused:
        problem = f"{unused[0]!r} does not reach the server: its command has no {{{unused[0]}}}"
        raise ValueError(f"args: {problem}: leave {unused[0]} out, or add that")
    return found


def server_command(config: ExperimentConfig, *, port: int, python: str, model: str | None) -> list[str]:
    """Return program and arguments of an experiment's server.

    Args:
        config: The experiment; its server is started by a command.
        port: The port that the server shall listen on.
        python: The Python interpreter of the server.
        model: Folder, file or name of the model; None if the study names none.
    """
    server = config.server
    assert server is not None
    command = _substitution(config, port=str(port), python=python, model=model or "").fill(_template(server))
    return command if server.command is not None else [*command, *_options(server)]


def _substitution(config: ExperimentConfig, **others: str) -> Substitution:
    return Substitution(config, "server", dtype=DATA_TYPES[config.precision], **others)


def server_hash(config: ExperimentConfig) -> str:
    """Return a digest that is equal for experiments that may share a server.

    They differ only in how they are measured: ``load``, ``measurement``, ``warmup`` and ``baseline``.
    """
    text = config.model_dump_json(exclude={"load", "measurement", "warmup", "baseline", "output_dir"})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def server_env(server: ServerConfig) -> dict[str, str]:
    """Return the environment variables of a server, beside those of pytest."""
    preset = PRESETS[server.preset].env if server.preset else {}
    return {**preset, **(server.env or {})}


def runs_python(server: ServerConfig) -> bool:
    """Return whether a server's command runs a Python interpreter that the study or an option chooses."""
    return not server.is_attached and any("{python}" in part for part in _template(server))


def _template(server: ServerConfig) -> Sequence[str]:
    if server.command is not None:
        return server.command
    assert server.preset is not None
    return PRESETS[server.preset].command


def _options(server: ServerConfig) -> Iterator[str]:
    """Yield the options in ``args`` as arguments of a preset's command.

    Raises:
        ValueError: An option cannot be switched off, or is in the command already.
    """
    assert server.preset is not None
    preset = PRESETS[server.preset]
    for name, value in (server.args or {}).items():
        option = f"--{name.replace('_', '-')}"
        if option in preset.command:  # the server would take the last one, and a result's label would be wrong
            raise ValueError(
                f"args: {name!r} is in the command of preset {server.preset!r} already, with model and precision "
                "of the study: leave it out"
            )
        if value is None:
            continue
        if value is True:
            yield option
        elif value is False and preset.negates:
            yield f"--no-{name.replace('_', '-')}"
        elif value is False:
            raise ValueError(f"args: {name!r} cannot be false for {server.preset}: leave it out")
        elif isinstance(value, list):
            yield option
            yield from map(_text, value)
        else:
            yield option
            yield _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
