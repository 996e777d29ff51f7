"""Hashes and ids that are the same on every machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from pytest_llem.study.config import ExperimentConfig

#: Part of what is hashed: raised when the meaning of a configuration changes.
DESIGN_VERSION = 1

#: What tells the repetitions of a point apart.
CYCLE = "cycle"

_ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode

_SCALARS = {str, int, float, bool, type(None)}

#: Where results go says nothing about what they are.
_IN_NO_HASH = "output_dir"

_UNSAFE = re.compile(r"[^\w.+:/,{}\"'-]|%", re.ASCII)


def config_hash(config: ExperimentConfig) -> str:
    """Return 16 hex digits that identify a resolved configuration, wherever its results go."""
    return ConfigHasher().hash(config)


class ConfigHasher:
    """Hashes many configurations: the sections that they share are turned into text once."""

    def __init__(self) -> None:
        # A text beside the section, which keeps the section's id from being another's.
        self._sections: dict[int, tuple[BaseModel, str]] = {}

    def hash(self, config: ExperimentConfig) -> str:
        """Return a configuration's :func:`config_hash`: over what json.dumps would make of it with sorted keys."""
        fields = vars(config)
        if config.model_extra:
            fields = {**fields, **config.model_extra}
        pieces = [
            f"{_known_text(name)}:{self._text(fields[name])}" for name in sorted(fields) if name != _IN_NO_HASH
        ]
        return _digest(f"{{{','.join(pieces)}}}")

    def _text(self, value: Any) -> str:
        if type(value) in _SCALARS:
            return _known_text(value)
        if not isinstance(value, BaseModel):
            return _ENCODE(value)
        known = self._sections.get(id(value))
        if known is None:
            known = self._sections[id(value)] = (value, _ENCODE(value.model_dump(mode="json")))
        return known[1]


def study_design_hash(config_hashes: Iterable[str]) -> str:
    """Return 16 hex digits that identify a study's points, in order, whatever its name and execution."""
    return _digest(_ENCODE(list(config_hashes)))


def _digest(text: str) -> str:
    return hashlib.sha256(f"[{DESIGN_VERSION},{text}]".encode()).hexdigest()[:16]


_known_text = lru_cache(maxsize=4096, typed=True)(_ENCODE)  # true is not 1


def value_text(value: Any) -> str:
    """Return an axis value as an id shows it: YAML's own spelling, anything unsafe as ``%XX``."""
    try:
        return _value_text(value)
    except TypeError:  # a list or a mapping cannot be looked up
        return _value_text.__wrapped__(value)


@lru_cache(maxsize=4096, typed=True)  # true is not 1
def _value_text(value: Any) -> str:
    text = value if isinstance(value, str) else _ENCODE(value)
    return _UNSAFE.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), text)


def same_value(one: Any, other: Any) -> bool:
    """Whether two values mean the same in a study file: 1.0 is 1, true is not."""
    return value_text(_plain(one)) == value_text(_plain(other))


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def short_names(axes: Iterable[str]) -> dict[str, str]:
    """Return for each dotted axis its last part, where no other axis, nor the cycle, has the same."""
    axes = list(axes)
    last = [CYCLE, *(axis.rpartition(".")[2] for axis in axes)]
    return {axis: name if last.count(name) == 1 else axis for axis, name in zip(axes, last[1:], strict=True)}


def point_id(axes: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return ``precision=bf16-batch_size=8``."""
    return "-".join([f"{_value_text(names[axis])}={value_text(value)}" for axis, value in axes.items()])


def experiment_id(point: str, cycle: int, n_cycles: int) -> str:
    """Return the point's id, with the cycle where there is more than one."""
    return f"{point}-{CYCLE}={cycle}" if n_cycles > 1 else point
