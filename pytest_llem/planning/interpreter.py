"""Another Python interpreter: what is installed there, as it says itself."""

from __future__ import annotations

import inspect
import json
import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pytest_llem.planning import probe
from pytest_llem.registry import BACKENDS
from pytest_llem.results.environment import PACKAGES, package_version
from pytest_llem.study.problems import shown

OURS = "pytest-llem"

#: The oldest Python that we run on.
OLDEST = (3, 11)

#: Of what we require, what an experiment's process needs whatever its engine is.
WORKER = ("nvidia-ml-py", "psutil", "pydantic")

#: How long an interpreter may take to answer, in seconds. One on a slow network drive takes long to begin.
ANSWER_SECONDS = 60.0

#: One that says more than this, in characters, is not answering.
_MOST = 1 << 20

_MARKER = "pytest-llem's answer: "

#: Run there, with the source of the probe, the marker and the question. Any Python understands this much.
_START = """
import sys
if sys.version_info < {oldest}:
    sys.stdout.write(sys.argv[2] + '{{"python": "%d.%d.%d"}}\\n' % sys.version_info[:3])
else:
    exec(sys.argv[1])
"""


class Interpreter(BaseModel):
    """What a Python interpreter has.

    Attributes:
        python: Its version.
        packages: Version by distribution: those whose version can change a number, and what engines require.
        engines: Which distribution provides each engine.
        requires: What each of these distributions requires.
        modules: Those of the modules asked for that it has.
    """

    model_config = ConfigDict(frozen=True)

    python: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    packages: dict[str, str] = Field(default_factory=dict)
    engines: dict[str, str] = Field(default_factory=dict)
    requires: dict[str, list[str]] = Field(default_factory=dict)
    modules: frozenset[str] = frozenset()

    def lacks(self, engine: str | None, pip: str) -> str | None:
        """Return what keeps experiments from running there, with what to do about it; None where nothing does.

        Args:
            engine: The engine that is to be installed there; None for one that need not be.
            pip: The command that installs there.
        """
        here, there = package_version(OURS), self.packages.get(OURS)
        ours = f"{OURS}=={here}" if here else OURS
        if there is None or "pytest_llem" not in self.modules:
            return f"has no {OURS}: install it there: {pip} install {ours}"
        if here and there != here:
            return f"has {OURS} {there}, and {here} runs here: {pip} install {ours}"
        if engine is not None and engine not in self.engines:
            known = ", ".join(sorted(self.engines))
            command = f"{pip} install {_providing(engine) or 'PACKAGE'}"
            return f"has no engine of that name (there are: {known}): install its package there: {command}"
        needed = [one for one in self._requirements(OURS) if canonicalize_name(one.name) in WORKER]
        if engine is not None:
            needed += self._requirements(self.engines[engine])
        lines = list(dict.fromkeys(_line(one) for one in needed if not self._meets(one)))
        if lines:
            return f"lacks {' and '.join(lines)}: {pip} install {shlex.join(lines)}"
        return None

    def _requirements(self, distribution: str) -> Iterator[Requirement]:
        """Yield what a distribution requires there."""
        markers = {"python_version": ".".join(self.python.split(".")[:2]), "python_full_version": self.python}
        for line in self.requires.get(distribution, ()):
            with suppress(InvalidRequirement):  # of before there was a standard: it cannot be judged
                one = Requirement(line)
                if one.marker is None or one.marker.evaluate({**markers, "extra": ""}):
                    yield one

    def _meets(self, requirement: Requirement) -> bool:
        found = self.packages.get(requirement.name)
        if found is None:
            return False
        try:
            return requirement.specifier.contains(Version(found), prereleases=True)
        except InvalidVersion:  # it is there, and cannot be compared
            return True


def _providing(engine: str) -> str | None:
    """Return the distribution that provides an engine here, as pip takes it."""
    for point in entry_points(group=BACKENDS, name=engine):
        if point.dist is not None:
            return f"{point.dist.name}=={point.dist.version}"
    return None


def _line(requirement: Requirement) -> str:
    """Return a requirement as pip takes it, without its marker."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    where = f" @ {requirement.url}" if requirement.url else str(requirement.specifier)
    return f"{requirement.name}{extras}{where}"


def package_versions(python: Path | None) -> dict[str, str]:
    """Return the versions of :data:`PACKAGES` that experiments run with, as their results will tell them.

    Args:
        python: The interpreter that they run in, as ``StudyConfig.interpreter`` has it; None for this one.

    Returns:
        Version by package; without those that are not installed, and empty where *python* cannot be asked.
    """
    if python is None:
        return {name: found for name in PACKAGES if (found := package_version(name))}
    told = ask(python)
    return (
        {} if isinstance(told, str) else {name: told.packages[name] for name in PACKAGES if name in told.packages}
    )


def ask(python: Path, modules: Iterable[str] = ()) -> Interpreter | str:
    """Return what an interpreter has, or what is wrong with it and what to do. Each is asked once.

    Args:
        python: Its path.
        modules: Modules that it may have.
    """
    return _ask(str(python), tuple(sorted({"pytest_llem", *modules})))


@cache
def _ask(python: str, modules: tuple[str, ...]) -> Interpreter | str:
    question = {"group": BACKENDS, "packages": PACKAGES, "modules": modules}
    start = _START.format(oldest=OLDEST)
    try:
        if not Path(python).exists():
            return "is not there: name a Python interpreter, by its absolute path or relative to the study"
        if Path(python).is_dir():
            return "is a directory: name the interpreter in it, such as bin/python"
        said, ending = _listen([python, "-c", start, inspect.getsource(probe), _MARKER, json.dumps(question)])
    except (OSError, ValueError) as error:
        return f"cannot be run ({getattr(error, 'strerror', None) or error}): name a Python interpreter"
    try:
        found = Interpreter.model_validate_json(said.rpartition(_MARKER)[2].partition("\n")[0])
    except ValidationError:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
        told = f", and said {shown(last)}" if last else ""
        return f"does not answer as Python does ({ending}{told}): name a Python interpreter that works"
    if tuple(map(int, found.python.split("."))) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return (
            f"is Python {found.python}, and {OURS} needs {oldest} or newer: make that environment with a newer one"
        )
    return found


def _listen(command: Sequence[str]) -> tuple[str, str]:
    """Run *command* and return what it says, and how it ended. Nothing of it is left."""
    # The environment and the path that its experiments have. Told by a variable, which any Python takes.
    environment = {name: one for name, one in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**environment, "PYTHONSAFEPATH": "1"},
        start_new_session=True,
    )
    assert process.stdout is not None
    said, ending = "", f"no answer within {ANSWER_SECONDS:g} s"
    deadline = time.monotonic() + ANSWER_SECONDS
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while selector.select(left := max(0.0, deadline - time.monotonic())) and left:
                chunk = os.read(process.stdout.fileno(), 1 << 16)
                said += chunk.decode("utf-8", "replace")
                if not chunk:
                    ending = f"status {process.wait(left)}"
                elif len(said) > _MOST:
                    ending = "output without end"
                elif _MARKER in said and "\n" in said.rpartition(_MARKER)[2]:
                    ending = "no answer"
                else:
                    continue
                break
    except subprocess.TimeoutExpired:  # it has closed its output and goes on
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        with suppress(subprocess.TimeoutExpired):  # one that is stuck in the kernel is left there
            process.wait(5)
    return said, ending
