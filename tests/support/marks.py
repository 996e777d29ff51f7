"""Marks of single cases."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """Return *values* as a case of ``parametrize`` that ``-m "not slow"`` leaves out.

    For a case whose siblings show the same behaviour sooner.

    Example:
        >>> @pytest.mark.parametrize("workers", [(), slow(("-n", "2"))])
        ... def test_gap_ends(workers): ...
    """
    return pytest.param(*values, marks=pytest.mark.slow)
