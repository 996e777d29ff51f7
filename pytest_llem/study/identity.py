"""Compute hashes and ids of configurations, the same on every machine."""

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

#: Part of every hash. Raise it when the meaning of a configuration changes, including any change of a field's
#: default, because fields with their default are not hashed.
DESIGN_VERSION = 2

#: Name of the repetition in an experiment's id.
CYCLE = "cycle"

_ENCODE = json.JSONEncoder(sort_keys=True, separators=(",", ":")).encode

_SCALARS = {str, int, float, bool, type(None)}

#: Hashed fields, in order. The output directory does not affect results.
_HASHED = sorted({*ExperimentConfig.model_fields} - {"output_dir"})

#: Fields of sections that are not hashed because they do not change what is measured.
_UNHASHED = {"energy": {"allow_estimated"}}

#: Characters that an id must not contain.
_UNSAFE = re.compile(r"[^\w.+:/,{}\"'-]|%", re.ASCII)


def config_hash(config: ExperimentConfig) -> str:
    """Return 16 hex digits that identify a resolved configuration, independent of its output directory.

    Only fields that differ from their default are hashed, so that fields added by later versions do not change
    existing hashes.
    """
    return ConfigHasher().hash(config)


class ConfigHasher:
    """Hash many configurations quickly, by encoding sections that they share only once."""

    def __init__(self) -> None:
        # The value is kept with its piece, because the id of a deleted object can be reused.
        self._pieces: dict[tuple[str, int], tuple[Any, str]] = {}

    def hash(self, config: ExperimentConfig) -> str:
        """Return a configuration's :func:`config_hash`, the hash of its JSON with sorted keys."""
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
    """Return 16 hex digits that identify a study's points and their order, independent of name and execution."""
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
    """Return an axis value as text for an id, in YAML's spelling, with unsafe bytes as ``%XX``."""
    try:
        return _value_text(value)
    except TypeError:  # a list or mapping is not hashable
        return _value_text.__wrapped__(value)


@lru_cache(maxsize=4096, typed=True)  # true is not 1
def _value_text(value: Any) -> str:
    text = value if isinstance(value, str) else _ENCODE(value)
    return _UNSAFE.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), text)


def same_value(one: Any, other: Any) -> bool:
    """Return whether two values are equal in a study file: 1.0 and "1" equal 1, true does not."""
    return _comparable_text(one) == _comparable_text(other)


def axes_key(axes: Mapping[str, Any]) -> frozenset[tuple[str, str]]:
    """Return a key that is equal for points whose axes have equal values, as defined by :func:`same_value`."""
    return frozenset((axis, _comparable_text(value)) for axis, value in axes.items())


def _comparable_text(value: Any) -> str:
    """Return a text that is equal for values that a study does not distinguish."""
    return value_text(int(value) if isinstance(value, float) and value.is_integer() else value)


def short_names(axes: Iterable[str]) -> dict[str, str]:
    """Return the last part of each dotted axis, or the whole name if that part is ambiguous or ``cycle``."""
    last = {axis: axis.rpartition(".")[2] for axis in axes}
    count = Counter([CYCLE, *last.values()])
    return {axis: name if count[name] == 1 else axis for axis, name in last.items()}


def point_id(axes: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """Return the id of a point, such as ``precision=bf16-batch_size=8``."""
    return "-".join([f"{_value_text(names[axis])}={value_text(value)}" for axis, value in axes.items()])


def experiment_id(point: str, cycle: int, n_cycles: int) -> str:
    """Return the point's id, with the cycle if there is more than one."""
    return f"{point}-{CYCLE}={cycle}" if n_cycles > 1 else point
