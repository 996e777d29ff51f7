"""Make further Python environments without a download."""

from __future__ import annotations

import os
import shutil
import sysconfig
import textwrap
import venv
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement

import pytest_llem

ROOT = Path(pytest_llem.__file__).parent.parent
SITE_PACKAGES = tuple(dict.fromkeys(Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")))
NOOP_ENGINE = Path(__file__).parent / "noop_engine"

#: Folders of the variable, which another interpreter does not inherit.
PYTHONPATH = tuple(Path(one) for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one)

#: Search path that gives an environment all packages of this one.
EVERYTHING = (ROOT, NOOP_ENGINE, *PYTHONPATH, *SITE_PACKAGES)


class Environment:
    """A virtual environment.

    Args:
        folder: Its folder.
        path: Folders that are searched after its own packages.
    """

    def __init__(self, folder: Path, *path: Path) -> None:
        venv.create(folder, symlinks=True)
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        (self.site_packages / "others.pth").write_text("".join(f"{one}\n" for one in path))

    def add(self, name: str, version: str, *requires: str, entry_points: str = "", **modules: str) -> None:
        """Install a distribution.

        Args:
            name: Its name.
            version: Its version.
            requires: Its requirements.
            entry_points: Content of ``entry_points.txt``.
            modules: Source of its modules, by name.
        """
        metadata = self.site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {one}" for one in requires]
        (metadata / "METADATA").write_text("\n".join(lines) + "\n")
        if entry_points:
            (metadata / "entry_points.txt").write_text(entry_points)
        for module, source in modules.items():
            (self.site_packages / f"{module}.py").write_text(textwrap.dedent(source))

    def remove(self, name: str, version: str) -> None:
        """Uninstall a distribution that has no modules."""
        shutil.rmtree(self.site_packages / f"{name.replace('-', '_')}-{version}.dist-info")

    def share(self, *names: str) -> None:
        """Add distributions of the running interpreter's environment, and their requirements."""
        for name in names:
            found = distribution(name)
            for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
                if not (self.site_packages / top).is_symlink():
                    (self.site_packages / top).symlink_to(Path(str(found.locate_file(top))))
            required = [Requirement(line) for line in found.requires or ()]
            self.share(*(one.name for one in required if not one.marker or one.marker.evaluate({"extra": ""})))
