"""The pages of the documentation, with the parts that are generated from the package, and their anchors."""

from __future__ import annotations

import functools
import re
import sys
import tempfile
import textwrap
from pathlib import Path

from tests.conftest import ROOT

DOCS = ROOT / "docs"


def pages() -> list[Path]:
    """Return README.md, CONTRIBUTING.md and every page below docs/, without what is built from them."""
    built = ("_build", "_generated")
    found = (page for page in DOCS.rglob("*.md") if not {*page.relative_to(DOCS).parts} & {*built})
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(found)]


@functools.cache
def generated() -> dict[str, str]:
    """Return the generated parts of reference pages by their names."""
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        import reference
    finally:
        sys.path.pop(0)
    with tempfile.TemporaryDirectory() as folder:
        reference.generate(Path(folder))
        return {file.stem: file.read_text(encoding="utf-8") for file in Path(folder).glob("*.md")}


def text_of(page: Path) -> str:
    """Return a page's text with its generated parts."""
    text = page.read_text(encoding="utf-8")
    return re.sub(
        r"```\{include\} \.\./_generated/([\w-]+)\.md\n.*?```", lambda one: generated()[one[1]], text, flags=re.S
    )


def anchors(page: Path) -> set[str]:
    """Return the anchors that links to *page* may name: those of headings, and those that are given."""
    text = text_of(page)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}
    given = re.findall(r"\{#([\w.-]+)\}|\{id=\"([\w.-]+)\"\}|^\(([\w.-]+)\)=$", text, re.MULTILINE)
    return slugs | {name for names in given for name in names if name}


def page(name: str) -> str:
    """Return the text of a page under ``docs``."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    """Return all code blocks of a language on a page, without indentation."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in found]


def files(text: str) -> dict[str, str]:
    """Return the code blocks of a page that are files, by the name in their first line."""
    found = (block for language in ("python", "yaml", "toml") for block in blocks(text, language))
    return {name[1]: block for block in found if (name := re.match(r"# ([\w./-]+\.\w+)\n", block))}
