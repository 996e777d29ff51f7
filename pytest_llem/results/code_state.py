"""Digests of the code that a process has imported, and of the same code as it is now.

    python -m pytest_llem.results.code_state FILE

FILE holds what is asked for, as :func:`current` takes it, in JSON; the answer is printed as JSON. Nothing but the
standard library is imported, and none of the code that is looked at: it may be run in any interpreter.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path
from typing import Any, TypedDict

#: A file that has changed later may not be what was imported. A forked process inherits the time of its server.
_BEGAN = time.time()

#: Folders in which packages are installed.
_INSTALLED = {"site-packages", "dist-packages"}

#: transformers copies a model's own code there, from where the model is.
_COPIES = "transformers_modules"

#: Characters of a digest.
_LENGTH = 16


class CodeState(TypedDict):
    """Code by name.

    ``modules`` has the digest of each module's file, and null where it is unknown: of those that lie outside of
    folders of installed packages, such as the user's own and editable installations. ``distributions`` has the
    version of each package that is installed, and for one that was not installed from an index, where a version
    may stand for any code, a digest of its files too.
    """

    modules: dict[str, str | None]
    distributions: dict[str, str | None]


def imported() -> CodeState:
    """Return the code that this process has imported, without the standard library. Reads each file once."""
    standard = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")})
    modules: dict[str, str | None] = {}
    tops: set[str] = set()
    for spec in _specs():
        origin = str(spec.origin)
        if _INSTALLED.intersection(Path(origin).parts):
            tops.add(spec.name.partition(".")[0])
        elif not origin.startswith(standard):
            modules[spec.name] = _digest(origin, before=_BEGAN)
    found: dict[str, str | None] = {}
    for one in distributions():  # of two of one name, the first is the one that is imported
        if not tops.isdisjoint(_top_level(one)):
            found.setdefault(one.metadata["Name"], _version(one))
    return CodeState(modules=dict(sorted(modules.items())), distributions=dict(sorted(found.items())))


def current(modules: Iterable[str], packages: Iterable[str], path: Sequence[str]) -> CodeState:
    """Return the code that an import would find now; null for what it would not find.

    Args:
        modules: Names of modules.
        packages: Names of distributions.
        path: Where modules are looked for, as ``sys.path`` would be.
    """
    specs: dict[str, ModuleSpec | None] = {}
    files = {name: _find(name, path, specs) for name in modules}
    return CodeState(
        modules={name: _digest(str(spec.origin)) if spec else None for name, spec in files.items()},
        distributions={name: _installed_version(name) for name in packages},
    )


def _specs() -> Iterator[ModuleSpec]:
    """Yield how each module that lies in a file was found."""
    for name, module in list(sys.modules.items()):
        try:  # a module may be anything, and answer with anything
            spec = module.__spec__
        except Exception:
            continue
        if isinstance(spec, ModuleSpec) and spec.has_location and name.partition(".")[0] != _COPIES:
            yield spec


def _find(name: str, path: Sequence[str], known: dict[str, ModuleSpec | None]) -> ModuleSpec | None:
    """Return where a module would be imported from, without importing the packages around it."""
    if name not in known:
        package = name.rpartition(".")[0]
        around = _find(package, path, known) if package else None
        if not package:
            known[name] = PathFinder.find_spec(name, path) or _by_hook(name)
        elif around is not None and around.submodule_search_locations is not None:
            known[name] = PathFinder.find_spec(name, list(around.submodule_search_locations))
        else:
            known[name] = None
    return known[name]


def _by_hook(name: str) -> ModuleSpec | None:
    """Return where an editable installation has a module: its finder is not on the path."""
    for finder in sys.meta_path:
        if finder is not PathFinder and (spec := finder.find_spec(name, None)) is not None:
            return spec
    return None


def _digest(file: str, before: float | None = None) -> str | None:
    """Return the digest of a file; None where it cannot be read, or has changed since *before*."""
    try:
        with open(file, "rb") as content:  # noqa: PTH123 (there may be a thousand of them)
            if before is not None and os.fstat(content.fileno()).st_ctime > before:
                return None
            return hashlib.sha256(content.read()).hexdigest()[:_LENGTH]
    except OSError:
        return None


def _top_level(package: Distribution) -> set[str]:
    """Return the names of the modules and packages that a distribution installs."""
    if named := package.read_text("top_level.txt"):
        return set(named.split())
    return {line.split("/", 1)[0].split(".", 1)[0] for line in (package.read_text("RECORD") or "").splitlines()}


def _version(package: Distribution) -> str:
    if package.read_text("direct_url.json") is None:
        return package.version
    files = sorted(line for line in (package.read_text("RECORD") or "").splitlines() if _is_content(line))
    return f"{package.version} {hashlib.sha256(chr(10).join(files).encode()).hexdigest()[:_LENGTH]}"


def _is_content(line: str) -> bool:
    """Whether a line of RECORD is of a file that can be imported or read: no script, no metadata, no bytecode."""
    return not line.startswith("..") and ".dist-info/" not in line and ",sha256=" in line


def _installed_version(name: str) -> str | None:
    try:
        return _version(distribution(name))
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    print(json.dumps(current(asked["modules"], asked["packages"], [*sys.path, *asked["path"]])))


#: A working tree on a slow drive takes long to look at, and nobody waits longer for it.
SECONDS = 10.0

#: What is told of each: nothing of branches, remotes or files.
_STATUS = ("--porcelain=v2", "--branch", "--untracked-files=no", "--ignore-submodules=dirty", "--no-renames")


def working_tree(directory: Path, seconds: float = SECONDS) -> dict[str, Any] | None:
    """Return the commit that the git working tree around *directory* is at, and whether it differs from that.

    ``GIT_DIR`` and the like hold as for any git command. Nothing is written there.

    Args:
        directory: Somewhere in it.
        seconds: How long git may take.

    Returns:
        ``commit``, null before the first one, and ``dirty``: files that git tracks are not as they were committed.
        None where there is no git, or no working tree.
    """
    # A lock, or a daemon of file system events, would be left in somebody's repository.
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "status", *_STATUS]
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    lines = done.stdout.decode("ascii", "replace").splitlines()
    found = next((line.removeprefix("# branch.oid ") for line in lines if line.startswith("# branch.oid ")), "")
    commit = found if found and set(found) <= set("0123456789abcdef") else None
    return {"commit": commit, "dirty": any(not line.startswith("#") for line in lines)}
