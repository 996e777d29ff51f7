"""Refuse a release whose tag is not the version, or whose changelog has not been built.

python .github/check_release.py v0.1.0
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent


def problems(tag: str, root: Path = ROOT) -> list[str]:
    """Return what is wrong with a release of *root* under *tag*, a line each."""
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, and pyproject.toml has version {version}")
    if fragments := sorted(one.name for one in (root / "changelog.d").glob("*.*.md")):
        found.append(f"run 'towncrier build' first: {', '.join(fragments)}")
    if f"\n## {version} (" not in (root / "CHANGELOG.md").read_text():
        found.append(f"CHANGELOG.md has no section for {version}")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(problems(sys.argv[1])) or None)
