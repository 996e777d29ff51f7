"""Fixtures for tests of plugins, and the code blocks of README.md, CONTRIBUTING.md and docs/ as tests."""

from __future__ import annotations

from tests.support.examples import examples

pytest_plugins = ["pytester"]
pytest_collect_file = examples.pytest()
