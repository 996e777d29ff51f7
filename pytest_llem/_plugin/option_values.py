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


def flag(option: str) -> str:
    """Return the name of an option on the command line: ``--llem-save`` of ``llem_save``."""
    return f"--{option.replace('_', '-')}"


def read_path(name: str, directory: Path, given: str) -> Path:
    """Return a path, relative to *directory*; *name* is the option's, for messages."""
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


def read_option(config: pytest.Config, option: str) -> tuple[str, Any]:
    """Return name, for messages, and value of an option, else of its ini option; the value is None if not set."""
    given = config.getoption(option)
    if given is not None:
        return flag(option), given
    return option, (read_ini(config, option) or None) if option in INI else None


#: Seconds of the units of a duration.
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def read_duration(config: pytest.Config, option: str) -> float | None:
    """Return the seconds of an option, else of its ini option if it has one; None if not set."""
    name, text = read_option(config, option)
    if text is None:
        return None
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS else (text, "s")
    seconds = _number(number) * _UNITS[unit]
    if not 0 < seconds < math.inf:
        raise pytest.UsageError(
            f"{name}: must be a time above 0, in seconds or as 90s, 15m, 2h, 30d (got {text!r})"
        )
    return seconds


def read_seconds(config: pytest.Config, option: str) -> float | None:
    """Return a number of seconds without a unit, of an option, else of its ini option; None if not set."""
    name, text = read_option(config, option)
    if text is not None and not 0 < _number(text) < math.inf:
        raise pytest.UsageError(f"{name}: must be a number of seconds, greater than 0 (got {text!r})")
    return None if text is None else _number(text)


def read_one_of(config: pytest.Config, option: str, words: Sequence[_Word]) -> _Word | None:
    """Return the value of an option, else of its ini option, which must be one of *words*; None if not set."""
    name, word = read_option(config, option)
    if word is not None and word not in words:
        raise pytest.UsageError(f"{name}: must be one of {', '.join(words)} (got {word!r})")
    found: _Word | None = word
    return found


def read_number(config: pytest.Config, name: str, minimum: float, expected: str) -> float | None:
    """Return the number of an ini option, or None if it is not set. *expected* describes it in the error."""
    text = read_ini(config, name)
    if text and not minimum <= _number(text) < math.inf:
        raise pytest.UsageError(f"{name}: must be {expected} (got {text!r})")
    return _number(text) if text else None


def read_whole_number(name: str, text: Any) -> int:
    """Return *text*, the value of option *name*, as a whole number of 1 or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise pytest.UsageError(f"{name}: must be a whole number, at least 1 (got {text!r})")
    return number


def _number(text: str) -> float:
    """Return *text* as a number; NaN if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan
