"""Install Tavern in an environment of its own, as it does not work with the pytest that the tests use."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import filelock

from tests.support.environments import EVERYTHING, Environment
from tests.support.weights import cache

REQUIREMENTS = ("tavern==3.7.1", "pytest<9.2")


class UnavailableError(Exception):
    """Tavern cannot be installed here; the message says why."""


def python(folder: Path) -> Path:
    """Return a Python interpreter with Tavern and all packages of this one.

    Args:
        folder: Folder for its virtual environment.

    Raises:
        UnavailableError: pip cannot download Tavern.
    """
    return Environment(folder, _packages(), *EVERYTHING).python


def _packages() -> Path:
    """Return the folder of Tavern and its requirements, and install them first if they are missing."""
    root = cache()
    root.mkdir(parents=True, exist_ok=True)
    target = root / "-".join(["python{}.{}".format(*sys.version_info), *REQUIREMENTS])
    with filelock.FileLock(root / "tavern.lock"):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as scratch:
                made = Path(scratch, "packages")
                install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(made), *REQUIREMENTS]
                done = subprocess.run(install, capture_output=True, text=True, check=False)
                if done.returncode != 0:
                    raise UnavailableError(f"{' '.join(install)}: {done.stderr.strip()}")
                made.rename(target)
    return target
