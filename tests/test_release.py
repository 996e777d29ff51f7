"""Test the checks that the release workflow makes before it publishes."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

Problems = Callable[[str, Path], list[str]]


@pytest.fixture
def problems() -> Problems:
    found: Problems = runpy.run_path(str(ROOT / ".github" / "check_release.py"))["problems"]
    return found


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A checkout that is ready for the release 1.2.0."""
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 1.2.0 (2026-12-01)\n\n- All of it.\n")
    (tmp_path / "changelog.d").mkdir()
    return tmp_path


def test_ready_release_is_accepted(problems: Problems, released: Path) -> None:
    assert problems("v1.2.0", released) == []


def test_tag_that_differs_from_the_version_is_refused(problems: Problems, released: Path) -> None:
    assert problems("v1.3.0", released) == ["the tag is v1.3.0, and pyproject.toml has version 1.2.0"]


def test_unbuilt_changelog_is_refused(problems: Problems, released: Path) -> None:
    (released / "changelog.d" / "12.fixed.md").touch()
    (released / "CHANGELOG.md").write_text("# Changelog\n")
    assert problems("v1.2.0", released) == [
        "run 'towncrier build' first: 12.fixed.md",
        "CHANGELOG.md has no section for 1.2.0",
    ]
