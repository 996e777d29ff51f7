"""What is installed: engines, and whether they can be imported; meters; packages that some studies need."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pytest_llem.doctor.probe import ProbeProcess
from pytest_llem.doctor.records import Engine, Meter, Package, Software
from pytest_llem.engines.pytorch.requirements import OPTIONAL
from pytest_llem.isolation.interpreter import ask
from pytest_llem.isolation.launcher import PYTHON_VARIABLES
from pytest_llem.isolation.probe import answer
from pytest_llem.planning.runner_environment import check_runner_environment
from pytest_llem.registry import ENGINE_GROUP, METER_GROUP
from pytest_llem.results.environment import PACKAGES, package_version

_MARKER = "llem doctor: "

#: Run by the interpreter that is looked at, with the group and the name of an engine. No CUDA context is made.
_IMPORT = f"""
import json, sys
from importlib.metadata import entry_points
error = None
try:
    for point in entry_points(group=sys.argv[1], name=sys.argv[2]):
        point.load()
except BaseException as failure:
    error = type(failure).__name__ + ": " + str(failure)
version = getattr(sys.modules.get("torch"), "version", None)
told = {{"error": error, "torch_cuda": getattr(version, "cuda", None)}}
print("\\n" + {_MARKER!r} + json.dumps(told), flush=True)
"""

#: What some studies need, by distribution, and for what.
WANTED = {
    "torch": "the engine pytorch",
    "transformers": "the engine pytorch",
    "accelerate": "device maps, quantised weights",
    "bitsandbytes": "quantised weights",
    "kernels": "attention kernels of the hub",
    "flash-attn": "attn_implementation: flash_attention_2",
    "datasets": "datasets of the hub",
    "pandas": "StudyResult.to_dataframe",
    "jinja2": "report.html",
    "plotly": "report.html",
}

#: Those of them that only pytest's side needs.
_HERE = ("pandas", "jinja2", "plotly")


class Imports:
    """Engines being imported, each by a process of its own, from being made until it is left.

    Args:
        python: The interpreter; None for this one.
    """

    def __init__(self, python: Path | None = None) -> None:
        self._stack = ExitStack()
        self._asked: dict[str, ProbeProcess] = {}
        self._software = _installed(python)
        for engine in self._software.engines:
            command = [self._software.executable, "-P", "-c", _IMPORT, ENGINE_GROUP, engine.name]
            without = PYTHON_VARIABLES if python is not None else ()
            self._asked[engine.name] = self._stack.enter_context(ProbeProcess(command, without))

    def __enter__(self) -> Imports:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def found(self, seconds: float) -> Software:
        """Return what is installed, once every engine was imported, or not.

        Args:
            seconds: How long they may take.
        """
        for engine in self._software.engines:
            said, failure = self._asked[engine.name].answer(seconds)
            told = _told(said)
            engine.error = told.get("error") if told else failure or "it told nothing"
            engine.torch_cuda = told.get("torch_cuda")
        return self._software


def _installed(python: Path | None) -> Software:
    """Return what is installed, by its metadata."""
    wanted = {*PACKAGES, *WANTED}
    if python is None:
        question = {"group": ENGINE_GROUP, "packages": sorted(wanted), "modules": []}
        there, executable, error = answer(question), sys.executable, None
        there["python"] = platform.python_version()
    else:
        other = ask(python, OPTIONAL)
        executable = str(python)
        if isinstance(other, str):
            return Software(executable=executable, error=other)
        there, error = other.model_dump(), check_runner_environment(other, None, f"{executable} -m pip")
        # These are for pytest's side, which runs here.
        there["packages"] |= {name: found for name in _HERE if (found := package_version(name))}
    packages: Mapping[str, str] = there["packages"]
    return Software(
        python=there["python"],
        executable=executable,
        error=error,
        engines=[
            Engine(name=name, distribution=provider, version=packages.get(provider))
            for name, provider in sorted(there["engines"].items())
        ],
        packages=[Package(name=name, version=packages.get(name), what_for=use) for name, use in WANTED.items()],
    )


def _told(said: str) -> dict[str, Any]:
    _, marker, rest = said.rpartition(_MARKER)
    try:
        told = json.loads(rest.partition("\n")[0]) if marker else {}
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def meters() -> list[Meter]:
    """Return the meters that are installed here. None is loaded: each is anyone's code."""
    found = {point.name: point.dist.name if point.dist else None for point in entry_points(group=METER_GROUP)}
    return [Meter(name=name, distribution=provider) for name, provider in sorted(found.items())]


def version() -> str:
    """Return that of pytest-llem."""
    return package_version("pytest-llem") or "unknown"
