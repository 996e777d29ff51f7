"""Find out which packages the environment of an experiment has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

#: The package that reads datasets of the Hugging Face hub, for every engine.
DATASETS = "datasets"


def _is_here(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ImportError:  # its parent package is missing
        return False


@dataclass(frozen=True)
class Packages:
    """The environment that an experiment runs in.

    Attributes:
        has: Whether one of the optional modules is installed.
        pip: The command that installs packages into it.
    """

    has: Callable[[str], bool] = _is_here
    pip: str = "pip"


THIS_ENVIRONMENT = Packages()
