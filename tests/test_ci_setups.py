"""CI jobs can be copied: those that ``llem init`` writes, and those on the how-to pages."""

from __future__ import annotations

import re
import shlex
import subprocess
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

HOW_TO = ROOT / "docs" / "how-to"
TEMPLATES = ROOT / "pytest_llem" / "cli" / "templates"
AGAINST_MAIN, SAVE_MAIN, GITLAB = (
    (TEMPLATES / f"{name}.yml").read_text() for name in ("github", "github-main", "gitlab")
)


def block(page: str, language: str, containing: str) -> str:
    """Return the code block of a how-to page that contains a text."""
    blocks = re.findall(rf"^ *```{language}\n(.*?)^ *```", (HOW_TO / page).read_text(), re.M | re.S)
    (found,) = (textwrap.dedent(one) for one in blocks if containing in one)
    return found


AGAINST_BASELINE = block("committed-baseline.md", "yaml", "jobs:")
JENKINS = block("jenkins.md", "groovy", "pipeline")
GITHUB = {"against-main": AGAINST_MAIN, "save-main": SAVE_MAIN, "against-baseline": AGAINST_BASELINE}


def steps(workflow: str) -> list[dict[str, Any]]:
    """Return the steps of all jobs of a GitHub workflow."""
    return [step for job in yaml.safe_load(workflow)["jobs"].values() for step in job["steps"]]


def scripts() -> Iterator[str]:
    """Yield the shell script of every job."""
    for workflow in GITHUB.values():
        yield "\n".join(step["run"] for step in steps(workflow) if "run" in step)
    (job,) = yaml.safe_load(GITLAB).values()
    yield "\n".join(job["script"])
    yield "\n".join(re.findall(r"sh '''(.*?)'''", JENKINS, re.S))


def commands() -> list[list[str]]:
    """Return the words of each pytest command."""
    lines = "\n".join(scripts()).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines if re.search(r"\bpytest ", line)]
    return [words for words in found if words[0].endswith("pytest")]


def test_each_job_compares_and_writes_junit() -> None:
    options = [{word for word in words if word.startswith("--")} for words in commands()]
    assert options == [
        {"--llem-against=git:origin/$BASE", "--junitxml=report.xml"},
        {"--llem-save", "--llem-baseline-dir=.llem/data/baselines", "--junitxml=report.xml"},
        {"--llem-baseline", "--junitxml=report.xml"},
        {"--llem-against=git:origin/$BASE", "--junitxml=report.xml"},
        {"--llem-against=git:origin/$CHANGE_TARGET", "--junitxml=report.xml"},
    ]


def test_pages_include_the_jobs_that_llem_init_writes() -> None:
    for page_name, name in (("github", "github"), ("gitlab", "gitlab"), ("baselines-in-ci", "github-main")):
        page = (HOW_TO / f"{page_name}.md").read_text()
        assert f"```{{literalinclude}} ../../pytest_llem/cli/templates/{name}.yml" in page
        assert f"--ci {name}" in page


@pytest.mark.parametrize("workflow", GITHUB.values(), ids=GITHUB)
def test_github_workflow_has_required_steps(workflow: str) -> None:
    read = yaml.safe_load(workflow)
    is_of_main = workflow == SAVE_MAIN
    assert ("push" if is_of_main else "pull_request") in read[True], "YAML 1.1 reads the key `on` as true"
    assert read["permissions"] == {"contents": "write" if is_of_main else "read"}
    measuring, *others = read["jobs"].values()
    assert set(measuring) <= {"runs-on", "timeout-minutes", "env", "steps"}
    for step in steps(workflow):
        assert ("uses" in step) != ("run" in step)
        assert set(step) <= {"uses", "with", "run", "name", "if"}
        assert "${{" not in step.get("run", ""), "a branch name must not get into the shell"
    uploads = [
        step["with"]["path"] for step in steps(workflow) if step.get("uses", "").startswith("actions/upload")
    ]
    assert [path.split()[:2] for path in uploads] == [["results/", "report.xml"]]
    for job in others:  # it may write comments, so it runs no code of the pull request
        assert job["permissions"] == {"pull-requests": "write"}
        assert not any("checkout" in step.get("uses", "") or "pip" in step.get("run", "") for step in job["steps"])


def test_gitlab_job_uploads_its_report() -> None:
    (job,) = yaml.safe_load(GITLAB).values()
    assert job["artifacts"] == {
        "when": "always",
        "paths": ["results/", "report.xml"],
        "reports": {"junit": "report.xml"},
    }
    assert all(isinstance(line, str) for line in job["script"]), "a colon makes YAML read a mapping"


def test_jenkinsfile_keeps_branch_names_out_of_groovy() -> None:
    assert "sh '''" in JENKINS
    assert 'sh """' not in JENKINS, "Groovy would put a branch's name into the shell"
    assert JENKINS.count("{") == JENKINS.count("}")
    assert "artifacts: 'results/**, report.xml'" in JENKINS


@pytest.mark.parametrize("script", list(scripts()), ids=[*GITHUB, "gitlab", "jenkins"])
def test_shell_parses(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_named_study_exists() -> None:
    named = {word for words in commands() for word in words if word.endswith(".yaml")}
    assert named == {"studies/llama.yaml"}
    assert all((ROOT / one).is_file() for one in named)


@pytest.mark.parametrize(
    "script",
    [one for one in scripts() if "git fetch" in one and "--llem-against" in one],
    ids=["gitlab", "jenkins"],
)
def test_job_fetches_the_target_branch(script: str, tmp_path: Path) -> None:
    """Runs the git commands of a job in a clone that has the branch of the pull request only."""
    origin, work = tmp_path / "origin", tmp_path / "work"
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (
        ["init", "-q", "-b", "main", str(origin)],
        ["-C", str(origin), *identity, "commit", "-q", "--allow-empty", "-m", "one"],
        ["-C", str(origin), "checkout", "-q", "-b", "change"],
        ["clone", "-q", "--single-branch", str(origin), str(work)],
    ):
        subprocess.run(["git", *words], check=True, capture_output=True)
    (revision,) = re.findall(r'--llem-against="git:(.*?)"', script)
    fetch = [line for line in script.splitlines() if line.strip().startswith("git ")]
    lines = [*fetch, f'git rev-parse --verify "{revision}"']
    env = {"PATH": "/usr/bin:/bin", "BASE": "main", "CHANGE_TARGET": "main"}
    subprocess.run(["bash", "-e", "-c", "\n".join(lines)], cwd=work, env=env, check=True, capture_output=True)
