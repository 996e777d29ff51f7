from __future__ import annotations

from collections.abc import Generator

import pytest

pytest_plugins = ["pytester"]


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """Make ``-n auto`` start half as many workers again as there are CPUs: a third of tests' time is waiting."""
    cpus = yield
    return cpus + cpus // 2
