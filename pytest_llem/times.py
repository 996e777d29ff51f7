"""Times as results have them: in UTC, as ISO 8601. Only the standard library is imported."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal


def utc(seconds: float, timespec: Literal["milliseconds", "microseconds"] = "milliseconds") -> str:
    """Return a time in s since the epoch as ISO 8601 in UTC.

    Example:
        >>> utc(0.25)
        '1970-01-01T00:00:00.250Z'
    """
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec=timespec).replace("+00:00", "Z")


def now() -> str:
    """Return the current time, with milliseconds."""
    return utc(datetime.now(UTC).timestamp())


def check_time(text: str) -> str:
    """Return *text* if it is a time with an offset from UTC, in ISO 8601.

    Raises:
        ValueError: *text* is not such a time.
    """
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError(f"a time with an offset from UTC is needed (got {text!r})")
    return text


def seconds_between(start: str, end: str) -> float:
    """Return the time from *start* to *end*, both in ISO 8601, in s."""
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
