"""Check out a git revision, and make a Python interpreter that imports the project's code from there.

The checkout is a temporary git worktree of the user's repository. The interpreter is a small script in it, which
starts this interpreter with the worktree's folders first on its path. Installed packages are the same.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from configparser import ConfigParser
from configparser import Error as ConfigParserError
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import psutil

#: Prefix of a worktree's folder, before the id of the process that made the worktree.
_PREFIX = "llem-worktree-"

#: Folder of the script in the worktree.
_BIN = ".pytest-llem"

#: Folders in which packages are installed; nothing in them is a project's own code.
_INSTALL_FOLDERS = {"site-packages", "dist-packages"}

#: Files that say what a project needs. They are compared as text, but pyproject.toml by these tables of [project],
#: and setup.cfg by the sections that setuptools reads.
_REQUIREMENTS = ("pyproject.toml", "setup.py", "setup.cfg", "requirements*.txt", "*.lock", "pylock*.toml")
_TABLES = ("dependencies", "optional-dependencies", "requires-python", "scripts", "entry-points")

#: Files of compiled modules.
_EXTENSIONS = ("*.so", "*.pyd")


class RevisionError(Exception):
    """A revision cannot be measured with this interpreter. The message is one line."""


@dataclass(frozen=True)
class Worktree:
    """A temporary worktree.

    Attributes:
        folder: Its folder.
        repository: The folder of the working tree that it belongs to.
        revision: The revision as the user gave it.
        commit: Its commit.
    """

    folder: Path
    repository: Path
    revision: str
    commit: str

    @property
    def python(self) -> Path:
        """The script that is used as the interpreter."""
        return self.folder / _BIN / "python"

    @property
    def name(self) -> str:
        """Name of the revision in tables: ``git:main (a2f19d980988)``."""
        return f"git:{self.revision} ({self.commit[:12]})"

    def counterpart(self, path: Path) -> Path:
        """Return the place in the worktree of a *path* in the working tree; any other path unchanged."""
        if not _is_own(path, self.repository):
            return path
        return self.folder / path.resolve().relative_to(self.repository)

    def remove(self) -> None:
        """Remove the worktree, also from the repository's list."""
        _git(self.repository, "worktree", "remove", "--force", str(self.folder))
        shutil.rmtree(self.folder.parent, ignore_errors=True)


def add_worktree(directory: Path, revision: str, path: Sequence[Path]) -> Worktree:
    """Make the worktree of a *revision* of the repository that contains *directory*.

    Args:
        directory: A folder in the working tree, such as rootdir.
        revision: A branch, tag or commit.
        path: Folders from which this process imports, in order.

    Raises:
        RevisionError: The revision is unknown, or this environment cannot run its code.
    """
    top = _git(directory, "rev-parse", "--show-toplevel")
    if top is None:
        raise RevisionError(f"{directory} is in no git repository")
    repository = Path(top)  # git has resolved links
    commit = _git(repository, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if commit is None:
        hint = "git fetch may bring it"
        if _git(repository, "rev-parse", "--verify", "--quiet", f"origin/{revision}^{{commit}}") is not None:
            hint = f"did you mean git:origin/{revision}?"
        elif _git(repository, "rev-parse", "--is-shallow-repository") == "true":
            hint = "the clone is shallow: fetch it, in CI with fetch-depth: 0"
        raise RevisionError(f"unknown revision {revision!r} ({hint})")
    hook_paths = {name: place for name, place in _editable_mapping().items() if _is_own(place, repository)}
    folders = [*path, *(place.parent for place in hook_paths.values())]
    import_folders = [*dict.fromkeys(one.resolve() for one in folders if _is_own(one, repository))]
    projects = _project_folders(repository, [directory, *import_folders])
    if (reason := _refusal(repository, commit, import_folders, projects)) is not None:
        raise RevisionError(f"{reason}: {_how_to_install(revision)}")
    _remove_abandoned(repository)
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")).resolve() / "tree"
    if _git(repository, "worktree", "add", "--detach", str(folder), commit) is None:
        shutil.rmtree(folder.parent, ignore_errors=True)
        raise RevisionError(f"git worktree add {folder} failed")
    worktree = Worktree(folder, repository, revision, commit)
    for name in _generated(repository):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(repository / name, folder / name)
    _write_script(worktree, import_folders, hook_paths)
    return worktree


def _write_script(worktree: Worktree, import_folders: Sequence[Path], hook_paths: Mapping[str, Path]) -> None:
    """Write the script that starts this interpreter with the worktree first on its path.

    Args:
        worktree: The worktree.
        import_folders: Folders of the working tree from which the project is imported.
        hook_paths: Path in the working tree of each package that an import hook finds, by the package's name.
    """
    links = worktree.python.parent / "path"
    links.mkdir(parents=True)
    for name, place in hook_paths.items():
        if place.name != name and (target := worktree.counterpart(place)).exists():
            (links / name).symlink_to(target)
    given = [Path(one) for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    others = [one for one in given if not _is_own(one, worktree.repository)]
    path = os.pathsep.join(map(str, [links, *map(worktree.counterpart, import_folders), *others]))
    worktree.python.write_text(
        f'#!/bin/sh\nexport PYTHONPATH={shlex.quote(path)}\nexec {shlex.quote(sys.executable)} "$@"\n'
    )
    worktree.python.chmod(0o755)


def _refusal(
    repository: Path, commit: str, import_folders: Sequence[Path], projects: Sequence[Path]
) -> str | None:
    """Return why this environment cannot run the revision's code; None if it can."""
    if (extension := next(_extensions(repository, import_folders), None)) is not None:
        return f"{extension} is compiled, and the revision's source would not change it"
    if (changed := _changed_requirements(repository, commit, projects)) is not None:
        return f"{changed} differs from the revision's, which may need other packages"
    if (name := next(_installed_copies(projects, import_folders), None)) is not None:
        return f"{name} is installed, not editable, so that both sides would import the copy (pip install -e .)"
    return None


def _how_to_install(revision: str) -> str:
    folder = shlex.quote(f"../{revision.replace('/', '-')}")
    return (
        f"make an environment of its own: git worktree add --detach {folder} {shlex.quote(revision)} && "
        f"python3 -m venv {folder}/.venv && {folder}/.venv/bin/pip install -e {folder}, "
        f"and give --llem-against={folder}/.venv/bin/python"
    )


def _extensions(repository: Path, import_folders: Sequence[Path]) -> Iterator[str]:
    """Yield the compiled modules of the project's own packages, tracked or built, relative to the repository."""
    found = _git(repository, "ls-files", "--cached", "--others", "--", *_EXTENSIONS) or ""
    for name in found.splitlines():
        file = repository / name
        is_importable = file.parent in import_folders or (file.parent / "__init__.py").exists()
        if is_importable and _is_own(file, repository):
            yield name


def _generated(repository: Path) -> Iterator[str]:
    """Yield the modules of the project's packages that git ignores, such as a generated ``_version.py``."""
    found = _git(repository, "ls-files", "--others", "--ignored", "--exclude-standard", "--", "*.py") or ""
    for name in found.splitlines():
        file = repository / name
        if (file.parent / "__init__.py").exists() and _is_own(file, repository):
            yield name


def _project_folders(repository: Path, folders: Iterable[Path]) -> list[Path]:
    """Return *folders* and their parents in *repository*: the folders that may hold a ``pyproject.toml``."""
    folders_and_parents = {one for folder in map(Path.resolve, folders) for one in (folder, *folder.parents)}
    return sorted(one for one in folders_and_parents if one.is_relative_to(repository))


def _changed_requirements(repository: Path, commit: str, projects: Sequence[Path]) -> str | None:
    """Return the first file, or table in it, whose requirements differ from those in *commit*; None if none."""
    changed = _git(repository, "diff", "--name-only", "--no-renames", "-z", commit, "--") or ""
    for name in changed.split("\0"):
        file = repository / name
        if file.parent not in projects or not any(file.match(pattern) for pattern in _REQUIREMENTS):
            continue
        now, then = _read(file), _git(repository, "show", f"{commit}:{name}") or ""
        if file.name == "pyproject.toml":
            one, other = _project(now), _project(then)
            table = next((table for table in _TABLES if one.get(table) != other.get(table)), None)
            if table is not None:
                return f"project.{table} of {name}"
        elif file.name != "setup.cfg" or _setup_options(now) != _setup_options(then):
            return name
    return None


def _installed_copies(projects: Sequence[Path], import_folders: Sequence[Path]) -> Iterator[str]:
    """Yield the names of projects that are installed, not editable, and have no source in *import_folders*."""
    for folder in projects:
        name = _project(_read(folder / "pyproject.toml")).get("name")
        if not isinstance(name, str):
            continue
        # A build leaves a folder of metadata in the working tree, which may be on the path.
        named = [(one, Path(str(one.locate_file("")))) for one in distributions(name=name)]
        installed = next((one for one, place in named if _INSTALL_FOLDERS.intersection(place.parts)), None)
        if installed is None:
            continue
        tops = {Path(str(file)).parts[0] for file in installed.files or () if str(file).endswith(".py")}
        packages = {top for top in tops if not top.startswith(("..", "__editable__"))}
        if packages and not any((root / top).exists() for root in import_folders for top in packages):
            yield name


def _setup_options(text: str) -> dict[str, dict[str, str]] | str:
    """Return the sections of a setup.cfg that setuptools reads; the text if it is invalid."""
    parser = ConfigParser(interpolation=None)
    try:
        parser.read_string(text)
    except ConfigParserError:
        return text
    return {name: dict(parser[name]) for name in parser.sections() if name.startswith("options")}


def _project(text: str) -> dict[str, Any]:
    """Return the table ``project`` of a ``pyproject.toml``; empty if it is missing or invalid."""
    with suppress(tomllib.TOMLDecodeError):
        found = tomllib.loads(text).get("project", {})
        return found if isinstance(found, dict) else {}
    return {}


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _editable_mapping() -> dict[str, Path]:
    """Return the path of each top-level package that is installed as editable with an import hook.

    Setuptools uses a hook, and adds nothing to the path, if folders are not named as their packages.
    """
    hooks = [module for name, module in list(sys.modules.items()) if name.startswith("__editable__")]
    found = {name: Path(place) for hook in hooks for name, place in getattr(hook, "MAPPING", {}).items()}
    return {name: place for name, place in found.items() if "." not in name}


def _is_own(path: Path, repository: Path) -> bool:
    """Return whether *path* is in the working tree, and not in an environment in it."""
    path = path.resolve()  # otherwise the reference would import the candidate's code through a link
    prefixes = {Path(one).resolve() for one in (sys.prefix, sysconfig.get_path("stdlib"))}
    is_installed = _INSTALL_FOLDERS.intersection(path.parts) or any(path.is_relative_to(one) for one in prefixes)
    return path.is_relative_to(repository) and not is_installed


def _remove_abandoned(repository: Path) -> None:
    """Remove the worktrees of processes that were killed."""
    _git(repository, "worktree", "prune")
    for line in (_git(repository, "worktree", "list", "--porcelain") or "").splitlines():
        folder = Path(line.removeprefix("worktree "))
        if line.startswith("worktree ") and folder.parent.name.startswith(_PREFIX):
            pid = folder.parent.name.removeprefix(_PREFIX).partition("-")[0]
            if pid.isdecimal() and not psutil.pid_exists(int(pid)):
                Worktree(folder, repository, "", "").remove()


def _git(directory: Path, *arguments: str) -> str | None:
    """Return what git writes; None if it fails, or is not installed."""
    command = ["git", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(
            command, cwd=directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
