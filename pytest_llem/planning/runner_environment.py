"""Whether an engine can run in another Python interpreter, and what it lacks there."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import entry_points

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from pytest_llem.isolation.interpreter import Interpreter
from pytest_llem.registry import ENGINE_GROUP
from pytest_llem.results.environment import package_version
from pytest_llem.study.engines import ENGINES as KNOWN_ENGINES

OURS = "pytest-llem"

#: Of what we require, what an experiment's process needs whatever its engine is.
WORKER = ("nvidia-ml-py", "psutil", "pydantic")

#: And what our own engines need beside that; the rest is pytest's side.
ENGINES = ("torch", "transformers")


def check_runner_environment(there: Interpreter, engine: str | None, pip: str) -> str | None:
    """Return what keeps experiments from running there, with what to do about it; None where nothing does.

    Args:
        there: The interpreter.
        engine: The engine that is to be installed there; None for one that need not be.
        pip: The command that installs there.
    """
    here, found = package_version(OURS), there.packages.get(OURS)
    ours = f"{OURS}=={here}" if here else OURS
    if found is None or "pytest_llem" not in there.modules:
        return f"has no {OURS}: install it there: {pip} install {ours}"
    if here and found != here:
        return f"has {OURS} {found}, and {here} runs here: {pip} install {ours}"
    if engine is not None and engine not in there.engines:
        known = ", ".join(sorted(there.engines))
        what = f"has no engine of that name (there are: {known})"
        if (package := _providing(engine)) is not None:
            return f"{what}: install its package there: {pip} install {package}"
        return f"{what}: {how_to_add(engine)}"
    provider = there.engines[engine] if engine is not None else None
    ours_alone = WORKER + (ENGINES if provider == OURS else ())
    needed = [one for one in _requirements(there, OURS) if canonicalize_name(one.name) in ours_alone]
    if provider not in (None, OURS):
        needed += _requirements(there, provider)
    lines = list(dict.fromkeys(_line(one) for one in needed if not _meets(there, one)))
    if lines:
        return f"lacks {' and '.join(lines)}: {pip} install {shlex.join(lines)}"
    return None


def _requirements(there: Interpreter, distribution: str) -> Iterator[Requirement]:
    """Yield what a distribution requires there."""
    markers = {"python_version": ".".join(there.python.split(".")[:2]), "python_full_version": there.python}
    for line in there.requires.get(distribution, ()):
        with suppress(InvalidRequirement):  # of before there was a standard: it cannot be judged
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate({**markers, "extra": ""}):
                yield one


def _meets(there: Interpreter, requirement: Requirement) -> bool:
    found = there.packages.get(requirement.name)
    if found is None:
        return False
    try:
        return requirement.specifier.contains(Version(found), prereleases=True)
    except InvalidVersion:  # it is there, and cannot be compared
        return True


def how_to_add(engine: str) -> str:
    """Return how an engine is added that no installed package provides: a library of its name does not do."""
    library = f"the library {engine} brings none itself; " if engine in KNOWN_ENGINES else ""
    return (
        f"{library}install a package that provides it (entry-point group {ENGINE_GROUP}), "
        "or name a class of your own, backend: package.module:Class"
    )


def _providing(engine: str) -> str | None:
    """Return the distribution that provides an engine here, as pip takes it."""
    for point in entry_points(group=ENGINE_GROUP, name=engine):
        if point.dist is not None:
            return f"{point.dist.name}=={point.dist.version}"
    return None


def _line(requirement: Requirement) -> str:
    """Return a requirement as pip takes it, without its marker."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    where = f" @ {requirement.url}" if requirement.url else str(requirement.specifier)
    return f"{requirement.name}{extras}{where}"
