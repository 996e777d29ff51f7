"""Read a YAML file as plain data with the position of every key."""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pytest_llem.study.problems import Problem, StudyError, shown

KeyPath = tuple[str | int, ...]

#: Maximum size of a study file, in bytes.
MAX_BYTES = 20_000_000

#: Maximum number of nodes. Aliases count each time they are used, so that nested aliases ("billion laughs") are
#: refused before they fill the memory.
MAX_NODES = 200_000

#: Maximum depth, below Python's recursion limit.
MAX_DEPTH = 64

_TOO_DEEP = "nested too deeply"

#: End of the message for a value that would be valid as a string.
IN_QUOTES = "; put it in quotes"

_TAG = "tag:yaml.org,2002:"

#: Characters that YAML can express but that UTF-8 or file names cannot contain.
_INVALID_CHARACTER = re.compile("[\0\ud800-\udfff]")

#: Line breaks of YAML.
_BREAK = re.compile("\r\n|[\r\n\x85\u2028\u2029]")

#: Numbers that YAML 1.1 reads in base 2, 8 or 60, unlike YAML 1.2 and JSON.
_OTHER_BASE = re.compile(r"[-+]?0b.*|[-+]?0[0-7_]*[1-7][0-7_]*|.*:.*")

#: Keys that a message shows without quotes.
_PLAIN_KEY = re.compile(r"[\w./+-]+")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, closer to YAML 1.2: ``1e-4`` is a number; dates and ``=`` are strings.

    Attributes:
        tagged: Explicit tags in the file and their positions. PyYAML would raise a KeyError for ``!!bool maybe``.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.tagged: list[tuple[str, yaml.Mark]] = []

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if tag := getattr(event, "tag", None):
            self.tagged.append((tag, event.start_mark))
        return super().compose_node(parent, index)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in {f"{_TAG}timestamp", f"{_TAG}value"}]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True)
class Document:
    """The content of a YAML file."""

    path: Path
    """The file."""
    text: str = field(repr=False)
    """The file as it was read."""
    data: Any
    """Plain dicts, lists and scalars."""
    marks: dict[KeyPath, tuple[int, int]] = field(repr=False)
    """Line and column, from 1, by key path; for an entry of a mapping, those of its key."""
    written: dict[KeyPath, str] = field(repr=False)
    """Spelling in the file of each scalar that is not a string, by key path."""
    base: Document | None = None
    """Document that provides the top-level keys that are missing in this one, or None."""

    def problem(self, key_path: KeyPath, message: str) -> Problem:
        """Return a problem located at *key_path*, or at its nearest ancestor in the file."""
        if base := self._base_of(key_path):
            return base.problem(key_path, message)
        at = key_path
        while at not in self.marks:
            at = at[:-1]
        line, column = self.marks[at]
        return Problem(self.path, line, column, dotted(key_path), message)

    def given(self, key_path: KeyPath, value: Any) -> str:
        """Return ``(got …)`` for the *value* at *key_path*, spelt as in the file."""
        if base := self._base_of(key_path):
            return base.given(key_path, value)
        return f"(got {_as_written(self.written.get(key_path), value)})"

    def _base_of(self, key_path: KeyPath) -> Document | None:
        if self.base is None or not key_path or (key_path[0],) in self.marks:
            return None
        return self.base if (key_path[0],) in self.base.marks else None


def _as_written(written: str | None, value: Any) -> str:
    """Return a *value* as it is *written* in the file, and what YAML reads it as if that may surprise."""
    if written is None or isinstance(value, str | dict | list):
        return shown(value)
    if isinstance(value, float) or written.lower() in ("", shown(value)):
        return _spelling(written)
    return f"{_spelling(written)}, which YAML reads as {shown(value)}"  # no, ~, 010


def _spelling(written: str) -> str:
    return (written if len(written) <= 60 else f"{written[:57]}...") or "nothing"


def dotted(key_path: KeyPath) -> str:
    """Return ``('experiments', 0, 'n')`` as ``experiments[0].n``."""
    text = ""
    for part in key_path:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            name = part if len(part) <= 60 and _PLAIN_KEY.fullmatch(part) else shown(part)
            text += f".{name}" if text else name
    return text


def load_document(path: Path) -> Document:
    """Return the content of *path*.

    Raises:
        StudyError: The file cannot be read, is not valid YAML, is empty, too large or too deeply nested, or
            contains tags, duplicate keys, keys that are neither text nor whole numbers, or values that JSON cannot
            represent.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            _refuse(path, (1, 1), f"is larger than {MAX_BYTES // 10**6} MB, the limit for a study")
        raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except FileNotFoundError:
        _refuse(path, (1, 1), "no such file or folder")
    except (OSError, ValueError) as error:  # ValueError: an invalid path
        _refuse(path, (1, 1), f"cannot be read: {getattr(error, 'strerror', None) or error}")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        place = _place(raw[: error.start].decode())
        _refuse(path, place, f"not UTF-8 text (byte 0x{raw[error.start]:02x})")
    return _parse(path, text)


def read_value(text: str) -> Any:
    """Return the value that *text* has in a study file; *text* itself if it is not valid YAML."""
    try:
        return _parse(Path(), text).data
    except StudyError:
        return text


def _parse(path: Path, text: str) -> Document:
    try:
        loader = _Loader(text)
    except yaml.reader.ReaderError as error:
        place = _place(text[: error.position])
        _refuse(path, place, f"not a YAML text: the character U+{ord(text[error.position]):04X} may not be in one")
    try:
        node = loader.get_single_node()
        if loader.tagged:
            raise StudyError(
                Problem(path, mark.line + 1, mark.column + 1, "", f"tags are not supported (got {_tag(tag)})")
                for tag, mark in loader.tagged
            )
        if node is None or (node.tag == f"{_TAG}null" and not node.value):
            _refuse(path, (1, 1), "the file is empty")
        reader = _Reader(path, loader)
        data = reader.read(node, ())
        if reader.problems:
            raise StudyError(reader.problems)
        return Document(path, text, data, reader.marks, reader.written)
    except StudyError:  # a ValueError, which would be caught below
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        _refuse(path, place, f"not valid YAML: {_yaml_error(error)}")
    except RecursionError:
        _refuse(path, (1, 1), _TOO_DEEP)
    except (ValueError, OverflowError):  # uncaught in PyYAML: "\Uffffffff", a %YAML of 5,000 digits
        mark = loader.get_mark()
        _refuse(path, (mark.line + 1, mark.column + 1), "not valid YAML: an escape or a number is too large")
    finally:
        loader.dispose()


#: Advice for errors of PyYAML that contain these words.
_ADVICE = {
    "'\\t'": "; indent with spaces",
    "cannot start any token": "; put the value in quotes",
    "expected <block end>": "; look at the indentation",
    "expected ',' or '}'": "; a bracket may be open, or a value may need quotes",
    "expected ',' or ']'": "; a bracket may be open, or a value may need quotes",
    "mapping values are not allowed": "; look at the indentation, or put the value in quotes",
}


def _yaml_error(error: yaml.MarkedYAMLError) -> str:
    """Return PyYAML's error message without its context, and advice."""
    parts = (error.context, error.problem)
    message = ", ".join(text for text in parts if text and not text.startswith("while "))
    advice = next((text for part, text in _ADVICE.items() if part in message), "")
    return f"{message}{advice}"


def _refuse(path: Path, place: tuple[int, int], message: str) -> NoReturn:
    raise StudyError([Problem(path, *place, "", message)]) from None


def _place(before: str) -> tuple[int, int]:
    """Return the line and column, from 1, of the end of the text *before*."""
    lines = _BREAK.split(before)
    return len(lines), len(lines[-1]) + 1


def _tag(tag: str) -> str:
    name = tag.replace(_TAG, "!!", 1) if tag.startswith(_TAG) else tag
    return name if name.isprintable() and len(name) <= 60 else shown(name)


class _Reader:
    """Convert a tree of YAML nodes into plain data and record the position of each key."""

    def __init__(self, path: Path, loader: _Loader) -> None:
        self.path = path
        self.loader = loader
        self.marks: dict[KeyPath, tuple[int, int]] = {}
        self.written: dict[KeyPath, str] = {}
        self.problems: list[Problem] = []
        self._nodes = 0
        #: Ids of the nodes that are being read: an alias of one of them would never end.
        self._open: set[int] = set()

    def read(self, node: yaml.Node, at: KeyPath) -> Any:
        """Return the data of *node* at the key path *at*; add wrong keys and values to ``problems``.

        Raises:
            StudyError: The data is too deep or too large, or contains itself.
        """
        self.marks.setdefault(at, _position(node))
        self._count(node)
        if len(at) > MAX_DEPTH:
            _refuse(self.path, _position(node), _TOO_DEEP)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, at)
        with self._inside(node):
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, at)
            return [self.read(item, (*at, index)) for index, item in enumerate(node.value)]

    def _scalar(self, node: yaml.ScalarNode, at: KeyPath) -> Any:
        place = self.marks.get(at, _position(node))
        try:
            value = self.loader.construct_object(node)
        except (ValueError, ArithmeticError, yaml.YAMLError):  # 0x_, 5,000 digits, 1:30:30:…, << as a value
            self._add_problem(place, at, f"not a valid value (got {_spelling(node.value)})")
            return None
        if isinstance(value, str):
            if wrong := _INVALID_CHARACTER.search(value):
                self._add_problem(place, at, f"text must not contain the character U+{ord(wrong[0]):04X}")
            return value
        self.written[at] = node.value
        if isinstance(value, int | float) and _OTHER_BASE.fullmatch(node.value):
            given = f"(got {_spelling(node.value)}, which YAML reads as {value})"
            self._add_problem(place, at, f"must be written in decimal, or in quotes as text {given}")
        elif isinstance(value, float) and not math.isfinite(value):
            self._add_problem(place, at, f"must be a finite number (got {_spelling(node.value)})")
        elif value == 0.0 and isinstance(value, float):
            return 0.0  # not -0.0, which is equal but spelt differently
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            self._add_problem(place, at, f"must fit in 64 bits (got {_spelling(node.value)})")
        return value

    def _mapping(self, node: yaml.MappingNode, at: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for name, (key, value) in self._entries(node, at).items():
            self.marks[(*at, name)] = _position(key)
            data[name] = self.read(value, (*at, name))
        return data

    def _entries(self, node: yaml.MappingNode, at: KeyPath) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Return key and value nodes by name; the mapping's own entries win over those merged by ``<<``."""
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        others: list[yaml.Node] = []
        for key, value in node.value:
            self._count(key)
            if key.tag == f"{_TAG}merge":
                others += value.value if isinstance(value, yaml.SequenceNode) else [value]
                continue
            if not isinstance(key, yaml.ScalarNode):
                self._add_problem(_position(key), at, "a key must be a string")
                continue
            name = self._scalar(key, (*at, key.value))
            if isinstance(name, int) and not isinstance(name, bool):
                name = str(name)  # JSON keys are strings, and max_memory has device numbers as keys
            if not isinstance(name, str):
                given = f"(got {_as_written(key.value, name)}){IN_QUOTES if key.value else ''}"
                self._add_problem(_position(key), (*at, key.value), f"a key must be a string {given}")
            elif name in own:
                line, _ = _position(own[name][0])
                self._add_problem(_position(key), (*at, name), f"is given twice (first in line {line})")
            else:
                own[name] = (key, value)
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for other in others:
            if not isinstance(other, yaml.MappingNode):
                self._add_problem(_position(other), at, "<< takes a mapping, or a list of mappings")
                continue
            with self._inside(other):
                merged = self._entries(other, at) | merged
        return merged | own

    @contextmanager
    def _inside(self, node: yaml.Node) -> Iterator[None]:
        if id(node) in self._open:
            _refuse(self.path, _position(node), "holds an alias of itself")
        self._open.add(id(node))
        yield
        self._open.discard(id(node))

    def _count(self, node: yaml.Node) -> None:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            message = f"holds more than {MAX_NODES:,} entries once its aliases are expanded"
            _refuse(self.path, _position(node), message)

    def _add_problem(self, place: tuple[int, int], at: KeyPath, message: str) -> None:
        self.problems.append(Problem(self.path, *place, dotted(at), message))


def _position(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1
