"""Test the command ``llem``: its output, its errors, and what it does not import."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import IO

import pytest

from pytest_llem import __version__, cli
from pytest_llem.registry import ENGINE_GROUP, installed
from pytest_llem.study.schema import study_schema
from tests.conftest import ROOT

COMMAND = [sys.executable, "-m", "pytest_llem.cli"]


def llem(*arguments: str, stdout: int | IO[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


def test_console_script_is_declared() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {
        "llem": f"{cli.__name__}:{cli.main.__name__}"
    }


def test_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == study_schema(installed(ENGINE_GROUP))


def test_schema_includes_installed_engines(noop_engine: None) -> None:
    done = llem("schema", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "noop" in json.loads(done.stdout)["properties"]
    assert "noop" not in study_schema()["properties"]


def test_schema_is_written_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.schema.json"
    assert cli.main(["schema", "-o", str(file)]) == 0
    assert capsys.readouterr() == ("", "")
    assert json.loads(file.read_text()) == study_schema(installed(ENGINE_GROUP))


@pytest.mark.parametrize(("place", "error"), [("no/where.json", "no such file or folder"), ("", "Is a directory")])
def test_unwritable_file_prints_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, error: str
) -> None:
    file = str(tmp_path / place)
    assert cli.main(["schema", "--output", file]) == 2
    assert capsys.readouterr() == ("", f"llem: {file}: {error}\n")


def test_closed_pipe_exits_with_2_silently() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = llem("schema", stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (2, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_prints_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = llem("schema", stdout=full)
    assert (done.returncode, done.stderr) == (2, "llem: standard output: No space left on device\n")
    done = llem("schema", "-o", "/dev/full", stdout=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (2, "llem: /dev/full: No space left on device\n")


def test_ctrl_c_prints_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pytest_llem.study.schema.schema_text", interrupt)
    assert cli.main(["schema"]) == 130
    assert capsys.readouterr() == ("", "llem: interrupted\n")


@pytest.mark.parametrize(
    "command",
    ["", "--version", "schema", "fetch study.yaml", "aa results", "compare A B", "doctor", "report results"],
)
def test_missing_standard_output_prints_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python sets it if standard output is closed
    assert cli.main(command.split()) == 2
    assert capsys.readouterr().err == "llem: standard output: is closed\n"


def test_closed_standard_output_prints_one_line() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "schema"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (2, "llem: standard output: is closed\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["shema"],
        ["schema", "extra"],
        ["schema", "--out", "x"],
        ["fetch"],
        ["fetch", "s.yaml", "--model-path"],
        ["aa"],
        ["aa", "results", "--metric", "sceonds"],
        ["compare", "A"],
        ["report"],
        ["report", "A", "B"],
        ["compare", "A", "B", "--form", "json"],
        ["doctor", "here"],
        ["doctor", "--format", "xml"],
        ["doctor", "--timeout", "0"],
        ["doctor", "--timeout", "soon"],
    ],
)
def test_wrong_usage_exits_with_2_and_an_error(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"llem {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--help"], ["schema  ", "fetch  ", "aa  ", "pytest STUDY.yaml -p llem", "--version"]),
        (["fetch", "--help"], ["STUDY", "--model-path DIR", "HF_HUB_OFFLINE=1", "llem_model_path"]),
        (["compare", "--help"], ["A  ", "B  ", "--metric METRIC", "--fail-on VERDICT"]),
        (["aa", "--help"], ["DIR", "--metric METRIC", "session"]),
        (["doctor", "--help"], ["--format FORMAT", "--python PYTHON", "--timeout SECONDS", "blocks"]),
        (["report", "--help"], ["DIR", "-o FILE", "pip install 'pytest-llem[report]'"]),
        (["schema", "--help"], ["-o FILE", "# yaml-language-server: $schema=FILE"]),
    ],
)
def test_help_lists_arguments_and_options(
    capsys: pytest.CaptureFixture[str], arguments: list[str], expected: list[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert [text for text in expected if text not in shown] == []


def test_help_imports_only_the_standard_library() -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"  # .pth files of the environment may import anything
        "from pytest_llem.cli import COMMANDS, main\n"
        "for words in [[], *([one] for one in COMMANDS)]:\n"
        "    try: main([*words, '--help'])\n"
        "    except SystemExit as stopped: assert stopped.code == 0\n"
        "loaded = set(sys.modules) - before\n"
        "assert {one.partition('.')[0] for one in loaded} - sys.stdlib_module_names == {'pytest_llem'}\n"
        "own = {one for one in loaded if one.startswith('pytest_llem.')}\n"
        "assert all(one.startswith('pytest_llem.cli') for one in own), own\n"
    )
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True, cwd=ROOT)


NAMES = [*cli.COMMANDS]


@pytest.mark.parametrize("arguments", [[], *([name] for name in NAMES)], ids=["llem", *NAMES])
def test_help_has_one_style_and_fits_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    if arguments:
        assert "examples:" in lines
        statuses = lines[lines.index("exit status:") + 1 :]
        assert [line.split()[0] for line in statuses if not line.startswith("    ")][-2:] == ["2", "130"]
        assert statuses[0].startswith("  0    ")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = re.findall(r"^    (\w+) +\S", capsys.readouterr().out, re.M)
    assert listed == NAMES


def test_error_without_standard_error_is_silent() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" 2>&-', "sh", *COMMAND, "aa", "no/where"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["table", ""],
        ["report", "results", "-o", ""],
        ["history", ""],
        ["aa", ""],
        ["summary", ""],
        ["merge", "a", "-o", ""],
        ["compare", "A", "B", "--baseline-dir", ""],
        ["fetch", ""],
        ["import", "", "-o", "out"],
        ["schema", "-o", ""],
        ["init", ""],
        ["init", "--model", ""],
    ],
    ids=" ".join,
)
def test_empty_path_is_refused_and_is_not_the_current_folder(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert capsys.readouterr().err.endswith(": must not be empty\n")
