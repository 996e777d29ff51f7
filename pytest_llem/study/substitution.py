"""Fill the placeholders in the arguments of a command with the values of an experiment."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engines import COMMAND, CommandConfig
from pytest_llem.study.problems import did_you_mean, shown
from pytest_llem.study.section import flatten

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
