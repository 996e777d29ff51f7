"""Hashes and ids that are the same on every machine."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pytest_llem.study.config import ExperimentConfig

#: Part of what is hashed: raised when the meaning of a configuration changes.
DESIGN_VERSION = 1

#: What tells the repetitions of a point apart.
CYCLE = "cycle"

_UNSAFE = re.compile(r"[^\w.+:/,{}\"'-]|%", re.ASCII)


def config_hash(config: ExperimentConfig) -> str:
    """Return 16 hex digits that identify a resolved configuration, wherever its results go."""
    return _digest(config.model_dump(mode="json", exclude={"output_dir"}))


def study_design_hash(config_hashes: Iterable[str]) -> str:
    """Return 16 hex digits that identify a study's points, in order, whatever its name and execution."""
    return _digest(list(config_hashes))


def _digest(content: Any) -> str:
    text = json.dumps([DESIGN_VERSION, content], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def value_text(value: Any) -> str:
    """Return an axis value as an id shows it: YAML's own spelling, anything unsafe as ``%XX``."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"))
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
    return "-".join(f"{value_text(names[axis])}={value_text(value)}" for axis, value in axes.items())


def experiment_id(point: str, cycle: int, n_cycles: int) -> str:
    """Return the point's id, with the cycle where there is more than one."""
    return f"{point}-{CYCLE}={cycle}" if n_cycles > 1 else point
