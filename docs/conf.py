"""Configuration of Sphinx: MyST Markdown, the Furo theme, reference pages generated from the package."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "pytest-llem"
author = "the pytest-llem developers"
copyright = "2026, the pytest-llem developers"
release = version = version_of("pytest-llem")

extensions = ["myst_parser", "sphinx_copybutton", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "reference"]
myst_enable_extensions = ["attrs_block", "attrs_inline", "colon_fence", "deflist"]
myst_heading_anchors = 4
exclude_patterns = ["_build", "_generated", "example"]
nitpicky = False
autodoc_typehints = "description"
autodoc_member_order = "bysource"

html_theme = "furo"
html_title = f"pytest-llem {release}"
html_static_path = ["_static"]
html_extra_path = ["_generated/extra"]
(Path(__file__).parent / html_extra_path[0]).mkdir(parents=True, exist_ok=True)  # Sphinx checks it early
html_copy_source = False
copybutton_prompt_text = "$ "

linkcheck_ignore = [r"https://github\.com/pytest-llem/.*"]  # not published yet
linkcheck_anchors = False
