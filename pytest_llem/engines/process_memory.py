"""The most memory this process has held: what a CPU engine can tell of its memory use."""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")

#: What the kernel wants written there to reset the peak (proc(5)).
_RESET_PEAK = "5"


def reset_peak_rss() -> bool:
    """Let the peak start from what is held now; return whether it does. Not every kernel can, or allows it."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def peak_rss_bytes() -> int | None:
    """Return the largest resident set since :func:`reset_peak_rss`, in bytes; null off Linux."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
