"""Read code blocks and tables from pages of the documentation."""

from __future__ import annotations

import re
import textwrap

from tests.conftest import ROOT


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
