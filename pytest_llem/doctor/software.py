"""Find the installed engines, whether they can be imported, the meters, and packages that some studies need."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from pytest_llem.doctor.probe import ProbeProcess
from pytest_llem.doctor.records import Engine, Meter, Package, Software
from pytest_llem.engines.shipped import OPTIONAL_MODULES
from pytest_llem.isolation.interpreter import ask, this_interpreter
from pytest_llem.isolation.launcher import PYTHON_VARIABLES
from pytest_llem.planning.runner_environment import check_runner_environment, is_installed, missing_engine_packages
from pytest_llem.registry import ENGINE_GROUP, METER_GROUP
from pytest_llem.results.environment import package_version

#: Beginning of the line of JSON in the output of an engine's import, which may print lines of its own.
_MARKER = "llem doctor: "

#: Code that the examined interpreter runs with an engine's entry-point group and name. It creates no CUDA context.
_IMPORT = f"""
import json, sys
from importlib.metadata import entry_points
error = gpus = None
try:
    for point in entry_points(group=sys.argv[1], name=sys.argv[2]):
        engine = point.load()
        try:
            from pytest_llem.measurement.engine_imports import default_gpus
            gpus = default_gpus(sys.argv[2], engine)
            gpus = "all" if gpus is None else gpus
        except Exception:  # options without defaults, which only a study can give
            gpus = None
except BaseException as failure:
    error = type(failure).__name__ + ": " + str(failure)
version = getattr(sys.modules.get("torch"), "version", None)
report = {{"error": error, "torch_cuda": getattr(version, "cuda", None), "gpus": gpus}}
print("\\n" + {_MARKER!r} + json.dumps(report), flush=True)
"""

#: Packages that some studies need, by distribution, with their purpose.
PURPOSES = {
    "torch": "the engine pytorch",
    "transformers": "the engine pytorch",
    "vllm": "the engine vllm",
    "accelerate": "device maps, quantised weights",
    "bitsandbytes": "quantised weights",
    "kernels": "attention kernels of the hub",
    "flash-attn": "attn_implementation: flash_attention_2",
    "datasets": "datasets of the hub",
    "pandas": "StudyResult.to_dataframe",
    "jinja2": "report.html",
    "plotly": "report.html",
}

#: Packages that only pytest's own process needs, even if engines run in another interpreter.
_PYTEST_PACKAGES = ("pandas", "jinja2", "plotly")


@contextmanager
def import_engines(python: Path | None = None) -> Iterator[Callable[[float], Software]]:
    """Import each installed engine without a missing package in its own process, which ends with the context at
    the latest.

    Args:
        python: The interpreter; None for this one.

    Yields:
        A function that waits for the imports and returns the installed software. It takes the time limit of the
        imports, in s from their start.
    """
    software, without = _installed(python), PYTHON_VARIABLES if python is not None else ()
    with ExitStack() as stack:
        probes: dict[str, ProbeProcess] = {}
        for engine in software.engines:
            if engine.error is None:
                command = [software.executable, "-P", "-c", _IMPORT, ENGINE_GROUP, engine.name]
                probes[engine.name] = stack.enter_context(ProbeProcess(command, without))

        def wait(seconds: float) -> Software:
            for engine in software.engines:
                if engine.name in probes:
                    output, failure = probes[engine.name].answer(seconds)
                    report = _report(output)
                    engine.error = report.get("error") if report else failure or "the process reported nothing"
                    engine.torch_cuda, engine.gpus = report.get("torch_cuda"), report.get("gpus")
            return software

        yield wait


def _installed(python: Path | None) -> Software:
    """Return the installed engines and packages, from their metadata."""
    executable = sys.executable if python is None else str(python)
    found = this_interpreter() if python is None else ask(python, OPTIONAL_MODULES)
    if isinstance(found, str):
        return Software(executable=executable, error=found)
    pip = f"{executable} -m pip"
    packages = found.packages | {name: version for name in _PYTEST_PACKAGES if (version := package_version(name))}
    return Software(
        python=found.python,
        executable=executable,
        error=None if python is None else check_runner_environment(found, None, pip),
        engines=[
            Engine(
                name=name,
                distribution=provider,
                version=packages.get(provider),
                error=missing_engine_packages(found, name, pip),
                installed=is_installed(found, name),
            )
            for name, provider in sorted(found.engines.items())
        ],
        packages=[Package(name=name, version=packages.get(name), purpose=use) for name, use in PURPOSES.items()],
    )


def _report(output: str) -> dict[str, Any]:
    """Return what :data:`_IMPORT` reported in *output*; empty if it did not."""
    _, marker, rest = output.rpartition(_MARKER)
    try:
        report = json.loads(rest.partition("\n")[0]) if marker else {}
    except ValueError:
        return {}
    return report if isinstance(report, dict) else {}


def meters() -> list[Meter]:
    """Return the installed meters. None is imported, because a meter may be third-party code."""
    found = {point.name: point.dist.name if point.dist else None for point in entry_points(group=METER_GROUP)}
    return [Meter(name=name, distribution=provider) for name, provider in sorted(found.items())]
