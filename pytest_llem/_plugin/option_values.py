"""Read values of command-line and ini options, and check them.

All functions raise pytest.UsageError if a value is invalid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest

from pytest_llem._plugin.declarations import INI

_Word = TypeVar("_Word", bound=str)


def read_path(name: str, directory: Path, given: str) -> Path:
    """Return a path, relative to *directory*; *name* is that of the option."""
    try:
        return directory / Path(given).expanduser()
    except RuntimeError as error:  # ~nobody
        raise pytest.UsageError(f"{name}: {error} (got {given!r})") from None


def read_ini(config: pytest.Config, name: str) -> Any:
    """Return the value of an ini option."""
    try:
        return config.getini(name)
    except (TypeError, ValueError, pytest.UsageError) as error:  # UsageError from pytest 9.2 on
        raise pytest.UsageError(f"{name}: {error}") from None


#: Seconds of the units of a duration.
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def read_duration(config: pytest.Config, option: str) -> float | None:
    """Return the seconds of an option, else of its ini option if it has one; None if not set."""
    given = config.getoption(option)
    name = option if given is None else f"--{option.replace('_', '-')}"
    text = (read_ini(config, option) if option in INI else "") if given is None else given
    if given is None and not text:
        return None
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    try:
        seconds = float(number) * _UNITS[unit]
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise pytest.UsageError(
            f"{name}: must be a time above 0, in seconds or as 90s, 15m, 2h, 30d (got {text!r})"
        )
    return seconds


def read_one_of(config: pytest.Config, option: str, words: Sequence[_Word]) -> _Word | None:
    """Return the value of an option, else of its ini option, which must be one of *words*; None if not set."""
    given = config.getoption(option)
    name = option if given is None else f"--{option.replace('_', '-')}"
    word = read_ini(config, option) if given is None else given
    if (word or given is not None) and word not in words:
        raise pytest.UsageError(f"{name}: must be one of {', '.join(words)} (got {word!r})")
    return word or None


def read_number(config: pytest.Config, name: str, minimum: float, expected: str) -> float | None:
    """Return the number of an ini option, or None if it is not set."""
    text = read_ini(config, name)
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not minimum <= number < math.inf:
        raise pytest.UsageError(f"{name}: must be {expected} (got {text!r})")
    return number


def read_whole_number(name: str, text: Any) -> int:
    """Return a number of 1 or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise pytest.UsageError(f"{name}: must be a whole number, at least 1 (got {text!r})")
    return number
