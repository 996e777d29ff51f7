"""The CI setups in the README can be copied: their YAML and shell parse, and every option exists."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

PAGE = (ROOT / "README.md").read_text().partition("\n## In CI\n")[2].partition("\n## ")[0]


def blocks(name: str) -> list[str]:
    """Return the code blocks after a line ``<!-- name -->``."""
    return re.findall(rf"^<!-- {name} -->\n```\w+\n(.*?)^```", PAGE, re.M | re.S)


GITHUB, (GITLAB,), SHELL = blocks("github"), blocks("gitlab"), blocks("shell")


def steps(workflow: str) -> list[dict[str, Any]]:
    """Return the steps of the only job of a GitHub workflow."""
    (job,) = yaml.safe_load(workflow)["jobs"].values()
    assert isinstance(job["steps"], list)
    return job["steps"]


def scripts() -> Iterator[str]:
    """Yield every shell script on the page."""
    yield from SHELL
    for workflow in GITHUB:
        yield from (step["run"] for step in steps(workflow) if "run" in step)
    (job,) = yaml.safe_load(GITLAB).values()
    yield "\n".join(job["script"])


def commands() -> list[list[str]]:
    """Return the words of each pytest command."""
    lines = "\n".join(scripts()).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if re.search(r"\bpytest ", line)]
    return [words for words in found if words[0].endswith("pytest")]


def test_page_has_all_promised_setups() -> None:
    assert len(GITHUB) == 2
    assert PAGE.count("```") == 2 * (len(GITHUB) + 1 + len(SHELL)), "no block is left unchecked"
    options = [{word for word in words if word.startswith("--")} for words in commands()]
    assert options == [
        {"--llem-save"},
        {"--llem-against=../main/.venv/bin/python", "--junitxml=report.xml"},
        {"--llem-baseline", "--junitxml=report.xml"},
        {"--llem-against=$REFERENCE/.venv/bin/python", "--junitxml=report.xml"},
    ]


@pytest.mark.parametrize("workflow", GITHUB)
def test_github_workflow_has_required_steps(workflow: str) -> None:
    read = yaml.safe_load(workflow)
    assert "pull_request" in read[True], "YAML 1.1 reads the key `on` as true"
    assert read["permissions"] == {"contents": "read"}
    (job,) = read["jobs"].values()
    assert set(job) <= {"runs-on", "timeout-minutes", "env", "steps"}
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        assert set(step) <= {"uses", "with", "run", "name", "if"}
        assert "${{" not in step.get("run", ""), "a branch name must not get into the shell"
    uploads = [step["with"]["path"] for step in job["steps"] if step.get("uses", "").startswith("actions/upload")]
    assert [path.split() for path in uploads] == [["results/", "report.xml"]]


def test_gitlab_job_uploads_its_report() -> None:
    (job,) = yaml.safe_load(GITLAB).values()
    assert job["artifacts"] == {
        "when": "always",
        "paths": ["results/", "report.xml"],
        "reports": {"junit": "report.xml"},
    }
    assert all(isinstance(line, str) for line in job["script"]), "a colon makes YAML read a mapping"


@pytest.mark.parametrize("script", list(scripts()))
def test_shell_parses(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_option_named_exists(pytester: pytest.Pytester) -> None:
    named = set(re.findall(r"(?<![\w-])--(?:llem-[\w-]+|junitxml|lf|deselect)\b", PAGE))
    ran = pytester.runpytest_inprocess("--help", "-p", "llem")
    help_text = ran.stdout.str().replace("--junit-xml", "--junitxml")
    missing = {one for one in named if not re.search(rf"^  (?:[-\w]+, )*{one}(?![\w-])", help_text, re.M)}
    assert not missing


def test_named_study_exists() -> None:
    named = {word for words in commands() for word in words if word.endswith(".yaml")}
    assert named
    assert all((ROOT / one).is_file() for one in named)


def test_worktree_is_a_second_checkout_beside_the_first(tmp_path: Path) -> None:
    """Runs the git commands of the first workflow, also on a runner whose last run was cut off."""
    job = next(iter(yaml.safe_load(GITHUB[0])["jobs"].values()))
    (shell,) = [step["run"] for step in job["steps"] if "worktree add" in step.get("run", "")]
    git = [line for line in shell.splitlines() if "worktree" in line]
    origin, work = tmp_path / "origin", tmp_path / "work" / "repo"
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (
        ["init", "-q", "-b", "main", str(origin)],
        ["-C", str(origin), *identity, "commit", "-q", "--allow-empty", "-m", "one"],
        ["clone", "-q", str(origin), str(work)],
    ):
        subprocess.run(["git", *words], check=True, capture_output=True)
    env = {"PATH": "/usr/bin:/bin", "REFERENCE": f"{work}/../main", "BASE": "main"}
    for _ in range(2):
        subprocess.run(["bash", "-e", "-c", "\n".join(git)], cwd=work, env=env, check=True, capture_output=True)
        assert (work.parent / "main" / ".git").is_file()
