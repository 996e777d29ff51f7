"""Fixtures for tests of plugins, and the code blocks of README.md, CONTRIBUTING.md and docs/ as tests."""

from __future__ import annotations

try:
    from tests.support.examples import examples
except ImportError:  # without the extra "test", as in the README's first command
    pass
else:
    pytest_collect_file = examples.pytest()

pytest_plugins = ["pytester"]
