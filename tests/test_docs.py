"""Test the links of all pages, and the tables of docs/."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pytest_llem.results.quality_warnings import WARNINGS
from tests.conftest import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub generates for a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_a_file_and_a_heading(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_code_spans_exist(page: Path) -> None:
    named = re.findall(r"`((?:docs|pytest_llem|studies|tests|\.ci|\.github)/[\w./-]+)`", page.read_text())
    assert [one for one in named if not (ROOT / one).exists()] == []


def test_docs_list_every_warning_code() -> None:
    page = (ROOT / "docs/measurement.md").read_text()
    rows = re.findall(r"^\| `(error|warning|note)` \|[^|]*\|(.*)\|$", page, re.MULTILINE)
    shown = {code: severity for severity, codes in rows for code in re.findall(r"`(\w+)`", codes)}
    assert shown == {code: kind.severity for code, kind in WARNINGS.items()}
