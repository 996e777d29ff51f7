"""What CI runs: ``nox -l`` lists it, and ``nox -s "tests-3.12(pytest='8.3')" -- tests/test_plan.py`` runs one."""

from __future__ import annotations

import os
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


@nox.session(python="3.11")
def changelog(session: nox.Session) -> None:
    """Show the changelog of the next release; with ``-- --version 0.1.0`` as the release will have it."""
    session.install("towncrier")
    session.run("towncrier", "build", "--draft", *(session.posargs or ["--version", "unreleased"]))
