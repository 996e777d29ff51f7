"""Another Python interpreter: what is installed there, as it says itself."""

from __future__ import annotations

import inspect
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pytest_llem.engines.pytorch.requirements import OPTIONAL
from pytest_llem.isolation import probe, supervisor
from pytest_llem.isolation.launcher import OURS_ALONE
from pytest_llem.registry import ENGINE_GROUP
from pytest_llem.results.environment import PACKAGES, package_version
from pytest_llem.study.problems import shown

#: The oldest Python that we run on.
OLDEST = (3, 11)

#: How long an interpreter may take to answer, in seconds. One on a slow network drive takes long to begin.
ANSWER_SECONDS = 60.0

#: How long it may take to import engines, in seconds: some import much, and from a slow network drive.
IMPORT_SECONDS = 600.0

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


#: Likewise, to import engines: looked for as an experiment's process does.
_IMPORT = """
import json, sys
question = json.loads(sys.argv[2])
if question["sys_path"] is not None:
    sys.path[:] = question["sys_path"]
sys.path += [folder for folder in question["path"] if folder not in sys.path]
from pytest_llem.measurement.importing import import_problems
print("\\n" + sys.argv[1] + json.dumps(import_problems(question["engines"])), flush=True)
"""

#: How an ending begins that was not ours.
_STATUS = "status"


class Interpreter(BaseModel):
    """What a Python interpreter has.

    Attributes:
        python: Its version.
        packages: Version by distribution: those whose version can change a number, engines, and what they require.
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


def package_versions(python: Path | None) -> dict[str, str]:
    """Return the versions of packages that experiments run with, as their results will tell them.

    Args:
        python: The interpreter that they run in, as ``StudyConfig.interpreter`` has it; None for this one.

    Returns:
        Version by package: of those of :data:`PACKAGES` that are there and, where *python* was asked, of its
        engines and of what they require. Empty where it cannot be asked.
    """
    if python is None:
        return {name: version for name in PACKAGES if (version := package_version(name))}
    there = ask(python)
    return {} if isinstance(there, str) else there.packages


def ask(python: Path, modules: Iterable[str] = ()) -> Interpreter | str:
    """Return what an interpreter has, or what is wrong with it and what to do. Each is asked once.

    Args:
        python: Its path.
        modules: Modules that it may have, beside ours and the OPTIONAL ones.
    """
    return _ask(str(python), tuple(sorted({"pytest_llem", *OPTIONAL, *modules})))


@cache
def _ask(python: str, modules: tuple[str, ...]) -> Interpreter | str:
    question = {"group": ENGINE_GROUP, "packages": PACKAGES, "modules": modules}
    start = _START.format(oldest=OLDEST)
    try:
        if not Path(python).exists():
            return "is not there: name a Python interpreter, by its absolute path or relative to the study"
        if Path(python).is_dir():
            return "is a directory: name the interpreter in it, such as bin/python"
        command = [python, "-c", start, inspect.getsource(probe), _MARKER, json.dumps(question)]
        said, ending = _listen(command, ANSWER_SECONDS)
    except (OSError, ValueError) as error:
        return f"cannot be run ({getattr(error, 'strerror', None) or error}): name a Python interpreter"
    try:
        found = Interpreter.model_validate_json(said.rpartition(_MARKER)[2].partition("\n")[0])
    except ValidationError:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
        told = f", and said {shown(last)}" if last else ""
        return f"does not answer as Python does ({ending}{told}): name a Python interpreter that works"
    if tuple(map(int, found.python.split("."))) < OLDEST:
        needs = f"pytest-llem needs {'.'.join(map(str, OLDEST))} or newer"
        return f"is Python {found.python}, and {needs}: make that environment with a newer one"
    return found


def import_problems(python: Path | None, engines: Sequence[str], path: Sequence[str]) -> dict[str, str]:
    """Return why engines cannot be imported where they are to run, by name; nothing of those that can be.

    Nor is anything returned of what takes longer than :data:`IMPORT_SECONDS`: that is found out as it runs.

    Args:
        python: The interpreter, which has pytest-llem; None for this one.
        engines: Names of entry points, or ``package.module:Class``.
        path: Folders that are looked in beside the interpreter's own, last.
    """
    sys_path = None if python else [os.fspath(one) for one in sys.path if isinstance(one, str | os.PathLike)]
    question = {"engines": list(engines), "sys_path": sys_path, "path": list(path)}
    command = [str(python or sys.executable), "-c", _IMPORT, _MARKER, json.dumps(question)]
    try:
        said, ending = _listen(command, IMPORT_SECONDS)
    except OSError as error:
        return dict.fromkeys(engines, f"{command[0]} cannot be run: {error.strerror or error}")
    if _MARKER in said:
        found: dict[str, str] = json.loads(said.rpartition(_MARKER)[2].partition("\n")[0])
        return found
    return dict.fromkeys(engines, f"importing it ends Python ({ending})") if ending.startswith(_STATUS) else {}


def _listen(command: Sequence[str], seconds: float) -> tuple[str, str]:
    """Run *command* and return what it says, and how it ended. Nothing of it is left."""
    environment = {name: value for name, value in os.environ.items() if name not in OURS_ALONE}
    said, told, ending = "", b"", f"no answer within {seconds:g} s"
    deadline = time.monotonic() + seconds
    with (
        subprocess.Popen(
            supervisor.supervised(command),
            stdin=subprocess.PIPE,  # closed at the end, on which the supervisor ends it all, and itself
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # the command's own output
            env={**environment, "PYTHONSAFEPATH": "1"},  # as -P, which an old Python does not know
            start_new_session=True,
        ) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdout is not None
        assert process.stderr is not None
        for stream in (process.stdout, process.stderr):
            selector.register(stream, selectors.EVENT_READ)
        while ready := selector.select(max(0.0, deadline - time.monotonic())):
            for key, _ in ready:
                chunk = os.read(key.fd, 1 << 16)
                if not chunk:
                    selector.unregister(key.fileobj)
                elif key.fileobj is process.stdout:
                    told += chunk
                else:
                    said += chunk.decode("utf-8", "replace")
            if not selector.get_map():
                ending = _ending(command[0], told)
            elif _MARKER in said and "\n" in said.rpartition(_MARKER)[2]:
                ending = "no answer"
            elif len(said) > _MOST:
                ending = "output without end"
            elif time.monotonic() < deadline:
                continue
            break
    return said, ending


def _ending(program: str, told: bytes) -> str:
    """Return how a process ended, as its supervisor tells it.

    Raises:
        OSError: It could not be started.
    """
    what: dict[str, object] = {}
    for line in told.splitlines():
        what |= json.loads(line)
    if refused := what.get("refused"):
        raise OSError(str(refused).removeprefix(f"{program}: "))
    return f"{_STATUS} {what.get('status')}"
