"""Check whether a Python interpreter, this one or a runner, has what an engine needs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import entry_points

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from pytest_llem.isolation.interpreter import Interpreter, this_interpreter
from pytest_llem.registry import ENGINE_GROUP
from pytest_llem.results.environment import package_version
from pytest_llem.study.engines import ENGINES as KNOWN_ENGINES

PLUGIN = "pytest-llem"

#: Requirements of the plugin that every experiment process needs; pytest's process needs the rest.
WORKER_PACKAGES = ("nvidia-ml-py", "psutil", "pydantic")


def check_runner_environment(interpreter: Interpreter, engine: str | None, pip: str) -> str | None:
    """Return why experiments cannot run in an interpreter, and what to do; None if they can.

    Args:
        interpreter: The interpreter.
        engine: Name of the engine that must be installed; None for a class or a command, which need not be.
        pip: The pip command of the interpreter's environment.
    """
    version, found = package_version(PLUGIN), interpreter.packages.get(PLUGIN)
    requirement = f"{PLUGIN}=={version}" if version else PLUGIN
    if found is None or "pytest_llem" not in interpreter.modules:
        return f"has no {PLUGIN}: install it there: {pip} install {requirement}"
    if version and found != version:
        return f"has {PLUGIN} {found}, and {version} runs here: {pip} install {requirement}"
    if engine is not None and engine not in interpreter.engines:
        known = ", ".join(sorted(interpreter.engines))
        what = f"has no engine of that name (there are: {known})"
        if (package := _provider_requirement(engine)) is not None:
            return f"{what}: install its package there: {pip} install {package}"
        return f"{what}: {how_to_install(engine)}"
    provider = interpreter.engines[engine] if engine is not None else None
    needed = [one for one in _requirements(interpreter, PLUGIN) if canonicalize_name(one.name) in WORKER_PACKAGES]
    if provider not in (None, PLUGIN):
        needed += _requirements(interpreter, provider)
    if unmet := _unmet(interpreter, needed):
        return f"needs {' and '.join(unmet.values())}: {pip} install {shlex.join(unmet)}"
    return missing_engine_packages(interpreter, engine, pip) if engine is not None else None


def missing_engine_packages(interpreter: Interpreter, engine: str, pip: str) -> str | None:
    """Return what is missing of the extra that has an engine's name, and what to do; None if nothing is.

    The extra belongs to the distribution that provides the engine, and lists what only this engine needs. Without
    an extra of that name, the engine needs nothing in addition.

    Args:
        interpreter: The interpreter that runs the engine.
        engine: Name of an engine that is installed there.
        pip: The pip command of the interpreter's environment.
    """
    unmet = _unmet(interpreter, _engine_requirements(interpreter, engine))
    if not unmet:
        return None
    extra = f"{interpreter.engines[engine]}[{engine}]"
    return f"needs {' and '.join(unmet.values())}: {pip} install {shlex.quote(extra)}"


def is_installed(interpreter: Interpreter, engine: str) -> bool:
    """Return whether an interpreter has any package of an engine's extra, or the engine has no extra."""
    needed = _engine_requirements(interpreter, engine)
    return not needed or any(interpreter.version(one.name) is not None for one in needed)


def missing_here(engine: str) -> str | None:
    """Return :func:`missing_engine_packages` of this interpreter; None for an engine that is not installed."""
    return _missing_here(engine, tuple(sys.path))


@lru_cache(maxsize=64)  # called for each point of a study
def _missing_here(engine: str, path: tuple[str, ...]) -> str | None:
    here = this_interpreter()
    return missing_engine_packages(here, engine, "pip") if engine in here.engines else None


def _engine_requirements(interpreter: Interpreter, engine: str) -> list[Requirement]:
    """Return what the extra of an engine's name requires in addition to its distribution."""
    provider = interpreter.engines[engine]
    without_extra = {str(one) for one in _requirements(interpreter, provider)}
    return [one for one in _requirements(interpreter, provider, engine) if str(one) not in without_extra]


def _requirements(interpreter: Interpreter, distribution: str, extra: str = "") -> Iterator[Requirement]:
    """Yield the requirements of a distribution, and those of an extra, for an interpreter's version of Python."""
    version = interpreter.python
    markers = {"python_version": ".".join(version.split(".")[:2]), "python_full_version": version}
    for line in interpreter.requires.get(distribution, ()):
        with suppress(InvalidRequirement):  # old distributions have requirements that predate the standard
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({**markers, "extra": extra}):
                yield one


def _meets(interpreter: Interpreter, requirement: Requirement) -> bool:
    found = interpreter.version(requirement.name)
    if found is None:
        return False
    try:
        return requirement.specifier.contains(Version(found), prereleases=True)
    except InvalidVersion:  # installed, but its version cannot be compared
        return True


def how_to_install(engine: str) -> str:
    """Return how to add an engine that no installed package provides; a library of the same name is not enough."""
    library = f"the library {engine} itself provides no engine; " if engine in KNOWN_ENGINES else ""
    return (
        f"{library}install a package that provides it (entry-point group {ENGINE_GROUP}), "
        "or name a class of your own, backend: package.module:Class"
    )


def _provider_requirement(engine: str) -> str | None:
    """Return the pip requirement of the distribution that provides an engine in this environment, or None."""
    for point in entry_points(group=ENGINE_GROUP, name=engine):
        if point.dist is not None:
            return f"{point.dist.name}=={point.dist.version}"
    return None


def _unmet(interpreter: Interpreter, requirements: Iterable[Requirement]) -> dict[str, str]:
    """Return a text for each requirement that an interpreter does not meet, by its pip argument.

    The text is the package's name, or the required and the installed version if another version is installed.
    """
    unmet: dict[str, str] = {}
    for one in requirements:
        if not _meets(interpreter, one):
            wanted, version = _pip_requirement(one), interpreter.version(one.name)
            unmet[wanted] = one.name if version is None else f"{wanted} (found {version})"
    return unmet


def _pip_requirement(requirement: Requirement) -> str:
    """Return a requirement without its marker, as an argument of pip."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    where = f" @ {requirement.url}" if requirement.url else str(requirement.specifier)
    return f"{requirement.name}{extras}{where}"
