"""Facts of a host for the controller.

execnet runs this file on the host, so it imports only the standard library.
"""

from __future__ import annotations

import hashlib
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: Packages that a worker needs.
PACKAGES = ("pytest-llem", "pytest-xdist", "pytest")


def facts(files: list[str]) -> dict[str, Any]:
    """Return the SHA-256 of *files* and the versions of :data:`PACKAGES`, None for what is missing."""
    digests: dict[str, str | None] = {}
    for name in files:
        try:
            digests[name] = hashlib.sha256(Path(name).read_bytes()).hexdigest()
        except OSError:
            digests[name] = None
    packages: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            packages[package] = version(package)
        except PackageNotFoundError:
            packages[package] = None
    return {"digests": digests, "packages": packages, "python": sys.executable, "folder": str(Path.cwd())}


if __name__ == "__channelexec__":
    controller: Any = globals()["channel"]  # execnet sets it
    controller.send(facts(controller.receive()))
