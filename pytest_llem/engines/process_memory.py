"""Read and reset the peak resident memory of this process, which is the memory use of a CPU engine."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")

#: Value to write to ``clear_refs`` to reset the peak; see proc(5).
_RESET_PEAK = "5"


def reset_peak_rss() -> bool:
    """Reset the peak to the current value. Return whether that worked: not every kernel can, or allows it."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def peak_rss_bytes() -> int | None:
    """Return the largest resident set since :func:`reset_peak_rss`, in bytes; None on other systems than Linux."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
