"""A YAML file as plain data, with the place of every key."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pytest_llem.study.problems import Problem, StudyError

KeyPath = tuple[str | int, ...]

#: More nodes than any study needs; aliases count each time they are used, so that a file of nested
#: aliases ("billion laughs") ends here and not in memory.
MAX_NODES = 500_000


#: What a node may be: YAML's own types, less those that are no JSON.
_PLAIN = frozenset({"map", "seq", "str", "int", "float", "bool", "null", "merge", "timestamp"})


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with floats as YAML 1.2 writes them (``1e-4`` is a number)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class Document:
    """The content of a YAML file.

    Attributes:
        path: The file.
        data: Plain dicts, lists and scalars.
        marks: Line and column, from 1, by key path; a mapping's entry stands at its key.
    """

    path: Path
    data: Any
    marks: dict[KeyPath, tuple[int, int]] = field(repr=False)

    def problem(self, key_path: KeyPath, message: str) -> Problem:
        """Return a problem located at *key_path*, or at its nearest ancestor that is in the file."""
        at = key_path
        while at not in self.marks:
            at = at[:-1]
        line, column = self.marks[at]
        return Problem(self.path, line, column, dotted(key_path), message)


def dotted(key_path: KeyPath) -> str:
    """Return ``('experiments', 0, 'n')`` as ``experiments[0].n``."""
    text = ""
    for part in key_path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def load_document(path: Path) -> Document:
    """Read *path*.

    Raises:
        StudyError: The file cannot be read, is no YAML, holds duplicate keys, tags or non-string keys.
    """
    loader: _Loader | None = None
    try:
        loader = _Loader(path.read_bytes())
        node = loader.get_single_node()
        if node is None:
            _refuse(path, 1, 1, "the file is empty")
        reader = _Reader(path, loader)
        return Document(path, reader.read(node, ()), reader.marks)
    except yaml.reader.ReaderError as error:
        _refuse(path, 1, 1, f"not a YAML text: {error.reason} at byte {error.position}")
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        _refuse(path, line, column, f"not valid YAML: {error.problem or error.context}")
    except OSError as error:
        _refuse(path, 1, 1, f"cannot be read: {error.strerror or error}")
    except RecursionError:
        _refuse(path, 1, 1, "nested too deeply")
    finally:
        if loader is not None:
            loader.dispose()


def _refuse(path: Path, line: int, column: int, message: str) -> NoReturn:
    raise StudyError([Problem(path, line, column, "", message)]) from None


class _Reader:
    """Turns a YAML node tree into plain data while noting where each key stands."""

    def __init__(self, path: Path, loader: _Loader) -> None:
        self.path = path
        self.loader = loader
        self.marks: dict[KeyPath, tuple[int, int]] = {}

    def read(self, node: yaml.Node, at: KeyPath) -> Any:
        self.marks.setdefault(at, _position(node))
        if len(self.marks) > MAX_NODES:
            self._refuse(node, f"holds more than {MAX_NODES:,} entries once its aliases are expanded")
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _PLAIN:
            self._refuse(node, f"tags are not supported (got {node.tag.removeprefix('tag:yaml.org,2002:')})")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, at)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(item, (*at, index)) for index, item in enumerate(node.value)]
        try:
            return self.loader.construct_object(node)
        except (ValueError, yaml.constructor.ConstructorError) as error:
            self._refuse(node, f"not a valid value: {error}")

    def _mapping(self, node: yaml.MappingNode, at: KeyPath) -> dict[str, Any]:
        seen: dict[Hashable, int] = {}
        for key, _ in node.value:
            if key.value in seen and isinstance(key.value, str):
                self._refuse(key, f"{key.value!r} is given twice (first in line {seen[key.value]})")
            if isinstance(key.value, str):
                seen[key.value] = key.start_mark.line + 1
        self.loader.flatten_mapping(node)
        data: dict[str, Any] = {}
        for key, value in node.value:
            name = self.loader.construct_object(key)
            if not isinstance(name, str):
                self._refuse(key, f"a key must be a string (got {name!r})")
            self.marks[(*at, name)] = _position(key)
            data[name] = self.read(value, (*at, name))
        return data

    def _refuse(self, node: yaml.Node, message: str) -> NoReturn:
        _refuse(self.path, *_position(node), message)


def _position(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1
