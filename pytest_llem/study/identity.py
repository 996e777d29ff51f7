"""Hashes and ids that are the same on every machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from pytest_llem.study.config import ExperimentConfig

#: Part of what is hashed. Raise it when the meaning of a configuration changes, and so with every change of a
#: field's default, since a field that has its default is not hashed.
DESIGN_VERSION = 2

#: What tells the repetitions of a point apart.
CYCLE = "cycle"

_ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode

_SCALARS = {str, int, float, bool, type(None)}

#: Fields that are hashed, in order: where results go says nothing about what they are.
_HASHED = sorted({*ExperimentConfig.model_fields} - {"output_dir"})

#: Fields of sections that are not hashed, because they change nothing that is measured.
_UNHASHED = {"energy": {"allow_estimated"}}

_UNSAFE = re.compile(r"[^\w.+:/,{}\"'-]|%", re.ASCII)


def config_hash(config: ExperimentConfig) -> str:
    """Return 16 hex digits that identify a resolved configuration, wherever its results go.

    Only fields that differ from their default are hashed, so that a field that a later version adds leaves the
    hash of every older configuration as it is.
    """
    return ConfigHasher().hash(config)


class ConfigHasher:
    """Hashes many configurations: what they have in common is turned into text once."""

    def __init__(self) -> None:
        # A piece beside its value, which keeps the value's id from being another's.
        self._pieces: dict[tuple[str, int], tuple[Any, str]] = {}

    def hash(self, config: ExperimentConfig) -> str:
        """Return a configuration's :func:`config_hash`: over what json.dumps would make of it with sorted keys."""
        fields, names = vars(config), _HASHED
        if config.model_extra:
            fields = {**fields, **config.model_extra}
            names = sorted({*_HASHED, *config.model_extra})
        pieces = []
        for name in names:
            value = fields[name]
            scalar = type(value) in _SCALARS
            pieces.append(_scalar_piece(name, value) if scalar else self._piece(name, value))
        return _digest(f"{{{','.join(filter(None, pieces))}}}")

    def _piece(self, name: str, value: Any) -> str:
        known = self._pieces.get((name, id(value)))
        if known is None:
            plain, is_default = value, False
            if isinstance(value, BaseModel):
                plain = value.model_dump(mode="json", exclude_defaults=True, exclude=_UNHASHED.get(name))
                is_default = not plain
            known = self._pieces[name, id(value)] = (value, "" if is_default else _named_piece(name, plain))
        return known[1]


def study_design_hash(config_hashes: Iterable[str]) -> str:
    """Return 16 hex digits that identify a study's points, in order, whatever its name and execution."""
    return _digest(_ENCODE(list(config_hashes)))


def _digest(text: str) -> str:
    return hashlib.sha256(f"[{DESIGN_VERSION},{text}]".encode()).hexdigest()[:16]


@lru_cache(maxsize=4096, typed=True)  # true is not 1
def _scalar_piece(name: str, value: Any) -> str:
    field = ExperimentConfig.model_fields.get(name)
    return "" if field is not None and value == field.get_default() else _named_piece(name, value)


def _named_piece(name: str, value: Any) -> str:
    return f"{_ENCODE(name)}:{_ENCODE(value)}"


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
    return _meaning(one) == _meaning(other)


def axes_key(axes: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """Return what two points share whose axes have the same values, as :func:`same_value` has it."""
    return frozenset((axis, _meaning(value)) for axis, value in axes.items())


def _meaning(value: Any) -> str:
    return value_text(int(value) if isinstance(value, float) and value.is_integer() else value)


def short_names(axes: Iterable[str]) -> dict[str, str]:
    """Return for each dotted axis its last part, where no other axis, nor the cycle, has the same."""
    last = {axis: axis.rpartition(".")[2] for axis in axes}
    count = Counter([CYCLE, *last.values()])
    return {axis: name if count[name] == 1 else axis for axis, name in last.items()}


def point_id(axes: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return ``precision=bf16-batch_size=8``."""
    return "-".join([f"{_value_text(names[axis])}={value_text(value)}" for axis, value in axes.items()])


def experiment_id(point: str, cycle: int, n_cycles: int) -> str:
    """Return the point's id, with the cycle where there is more than one."""
    return f"{point}-{CYCLE}={cycle}" if n_cycles > 1 else point
