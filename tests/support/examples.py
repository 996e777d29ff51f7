"""Run every code block of README.md, CONTRIBUTING.md and the pages under docs/, with Sybil.

A block that cannot run says why in the line before it:

    <!-- skip: next "output of a real run" -->

What running means depends on the language: a study loads, a command of pytest collects, a command of ``llem``
parses, other shell has valid syntax, Python runs, and TOML, INI and JSON parse. A block whose first line is a
comment with a file name, such as ``# studies/llama.yaml``, is that file for the page's later blocks.
"""

from __future__ import annotations

import configparser
import importlib
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
from sybil import Example, Sybil
from sybil.parsers.myst import CodeBlockParser, SkipParser

from pytest_llem import cli
from pytest_llem.study.loading import load_study

ROOT = Path(__file__).parent.parent.parent

#: The first line of a block that is a file: a comment with its name, and maybe a remark.
_FILE = re.compile(r"\A# ([\w./-]+\.\w+)(?::.*)?$", re.MULTILINE)

#: Options that need more than a study, and whether a value follows.
_NEED_MORE = {
    "--llem-against": True,
    "--llem-baseline": True,
    "--llem-save": True,
    "--llem-resume": False,
    "--llem-resume-from": True,
    "--llem-resume-mismatch": False,
    "--llem-compare-mismatch": False,
    "--llem-save-partial": False,
    "--llem-save-force": False,
    "--llem-fail-on": True,
}

_MODEL = "model: builtin:tiny-llama\n"

#: Languages of blocks that cannot run, and need a reason.
SHOWN_ONLY = ("text", "console", "sh", "shell", "diff", "groovy")


def _folder(example: Example) -> Path:
    folder: Path = example.namespace["pytester"].path
    return folder


def _keep(example: Example, default: str | None = None) -> str | None:
    """Write a block that is a file, for the later blocks of its page, and return its name."""
    named = _FILE.match(example.parsed)
    name = named[1] if named else default
    if name is not None:
        file = _folder(example) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(example.parsed), encoding="utf-8")
    return name


def _yaml(example: Example) -> None:
    """Load a study, whole or in part: a part gets a model."""
    text = str(example.parsed)
    if not re.search(r"^(model|base|backend):", text, re.MULTILINE):
        example.parsed = text if _FILE.match(text) else _MODEL + text
    name = _keep(example, "study.yaml")
    assert name is not None
    study = load_study(_folder(example) / name)
    assert study.points


def _bash(example: Example) -> None:
    """Check the syntax of shell commands, collect those of pytest, and parse those of llem."""
    for line in str(example.parsed).replace("\\\n", " ").splitlines():
        subprocess.run(["bash", "-n", "-c", line], check=True)
        for command in re.split(r"&&|;|\|", line.removeprefix("$ ")):
            words = shlex.split(command, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words[:1] == ["pytest"] and any(word.endswith((".yaml", "]")) for word in words):
                _collect(example, words[1:])
            elif words[:1] == ["llem"]:
                _parse(words[1:])


def _collect(example: Example, arguments: list[str]) -> None:
    """Collect what a command of pytest would run, without options that need an earlier run or an environment."""
    words = iter(arguments)
    kept = []
    for word in words:
        name, has_value, _ = word.partition("=")
        if name not in _NEED_MORE:
            kept.append(word)
        elif _NEED_MORE[name] and not has_value:
            next(words)
    run = example.namespace["pytester"].runpytest_inprocess(*kept, "--collect-only")
    assert run.ret in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED), run.stderr.str()


def _parse(arguments: list[str]) -> None:
    """Parse the arguments of ``llem``."""
    if arguments:
        cli._parser().parse_args(arguments)


def _python(example: Example) -> None:
    """Collect a block that has tests, and run any other."""
    text = str(example.parsed)
    name = _keep(example)
    folder = _folder(example)
    if "def test_" in text:
        name = name or "test_page.py"
        (folder / name).write_text(text, encoding="utf-8")
        run = example.namespace["pytester"].runpytest_inprocess(name, "--collect-only", "-p", "llem")
        assert run.ret == pytest.ExitCode.OK, run.stdout.str()
        return
    exec(compile(text, f"{example.path}:{example.line}", "exec"), example.namespace)


def _ini(example: Example) -> None:
    configparser.ConfigParser().read_string(str(example.parsed))


def _refuse(example: Example) -> None:
    raise AssertionError('a block without a language that runs: add <!-- skip: next "why" --> before it')


def _parsed(parse: Callable[[str], Any]) -> Callable[[Example], None]:
    return lambda example: (parse(str(example.parsed)), None)[1]


examples = Sybil(
    parsers=[
        SkipParser(),
        CodeBlockParser("yaml", _yaml),
        CodeBlockParser("bash", _bash),
        CodeBlockParser("python", _python),
        CodeBlockParser("toml", _parsed(tomllib.loads)),
        CodeBlockParser("json", _parsed(json.loads)),
        CodeBlockParser("ini", _ini),
        *(CodeBlockParser(language, _refuse) for language in SHOWN_ONLY),
    ],
)


def run_page(page: Path, pytester: pytest.Pytester) -> None:
    """Run the code blocks of a page, in order and in one folder.

    Raises:
        Exception: A block fails; notes name the page and the line.
    """
    # pytester forgets what a run imports, but extension modules cannot be imported twice.
    for name in ("numpy", "scipy.special", "pandas"):
        importlib.import_module(name)
    shutil.copytree(ROOT / "studies", pytester.path / "studies")
    document = examples.parse(page)
    document.namespace["pytester"] = pytester
    for example in document.examples():
        try:
            example.evaluate()
        except SkipTest:  # with its reason in the page
            continue
        except Exception as error:
            error.add_note(f"{page}:{example.line}")
            raise
