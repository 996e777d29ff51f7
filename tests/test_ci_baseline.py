"""A new user's baseline and history by the workflows alone: their shell, in repositories on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_llem import StudyResult, cli
from tests.conftest import NOOP_ENGINE, NOOP_STUDY, OTHER_PLUGINS, ROOT
from tests.support import figures

pytestmark = pytest.mark.slow

TEMPLATES = ROOT / "pytest_llem" / "cli" / "templates"

#: Stands for GitHub's API: comments are files.
GH = r"""#!/bin/bash
echo "$*" >> "$COMMENTS/calls"
method=GET
for word in "$@"; do
  case "$previous" in --method) method="$word";; --field) body="${word#body=@}";; esac
  case "$word" in repos/*) path="$word";; esac
  previous="$word"
done
case "$method" in
  GET) [ ! -e "$COMMENTS/7" ] || head -n 1 "$COMMENTS/7" | grep -q '<!-- llem -->' && echo 7;;
  POST) [ ! -e "$COMMENTS/7" ] || exit 1; cp "$body" "$COMMENTS/7";;
  PATCH) [ "${path##*/}" = 7 ] && cp "$body" "$COMMENTS/7";;
esac
exit 0
"""


def run_steps(workflow: Path, job: str, folder: Path, skip: str = "Install", **environ: str) -> list[str]:
    """Run the shell of a job as GitHub does, without steps whose name begins with *skip*; return failed steps."""
    steps: list[dict[str, Any]] = yaml.safe_load(workflow.read_text())["jobs"][job]["steps"]
    failed: list[str] = []
    for step in steps:
        name = step.get("name", "")
        if "run" not in step or name.startswith(skip) or (failed and step.get("if") != "always()"):
            continue
        env = {**os.environ, "GITHUB_STEP_SUMMARY": str(folder / "step_summary.md"), **environ}
        done = subprocess.run(
            ["bash", "-e", "-c", step["run"]], cwd=folder, env=env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(name, done.stdout, done.stderr)
            failed.append(name)
    return failed


@pytest.fixture
def git(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run git with an identity and without the user's configuration, and return its output."""
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for role in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{role}_NAME", "a")
        monkeypatch.setenv(f"GIT_{role}_EMAIL", "a@example.org")

    def run(folder: Path, *words: str) -> str:
        done = subprocess.run(["git", *words], cwd=folder, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    return run


@pytest.fixture
def project(tmp_path: Path, git: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone with a study and the workflow that ``llem init`` writes, whose remote is a bare repository."""
    origin, work = tmp_path / "origin.git", tmp_path / "work"
    monkeypatch.setenv("PYTHONPATH", f"{NOOP_ENGINE}{os.pathsep}{ROOT}")
    monkeypatch.setenv("PYTEST_ADDOPTS", " ".join(f"-p no:{name}" for name in OTHER_PLUGINS))
    git(tmp_path, "init", "-q", "--bare", "-b", "main", str(origin))
    git(tmp_path, "clone", "-q", str(origin), str(work))
    monkeypatch.chdir(work)
    assert cli.main(["init", "studies/it.yaml", "--ci", "github-main"]) == 0
    study = {**NOOP_STUDY, "sweep": {"noop.size": [1, 2]}, "gates": {"metrics": ["seconds"]}}
    study |= {"execution": {"n_cycles": 3, "skip_preflight": True}}
    (work / "studies" / "it.yaml").write_text(yaml.safe_dump(study))
    (work / "conftest.py").write_text(figures.conftest())
    (work / "pytest.ini").write_text("[pytest]\naddopts = -p no:cacheprovider\nllem_no_gaps = true\n")
    set_seconds(work, 1.0)
    (work / ".gitignore").write_text(".venv\nresults\n__pycache__\n")
    (work / ".venv" / "bin").mkdir(parents=True)
    for name in ("pytest", "llem", "pip"):
        script = f'#!/bin/sh\nexec {sys.executable} -m {name.replace("llem", "pytest_llem.cli")} "$@"\n'
        tool = work / ".venv" / "bin" / name
        tool.write_text("#!/bin/sh\n" if name == "pip" else script)
        tool.chmod(0o755)
    git(work, "switch", "-q", "-c", "main")
    git(work, "add", "-A")
    git(work, "commit", "-qm", "a study")
    git(work, "push", "-q", "origin", "main")
    return work


def set_seconds(work: Path, seconds: float) -> None:
    """Set how long a pass takes."""
    (work / "figures.json").write_text(json.dumps({"seconds": f"{seconds} * (1 + 0.001 * cycle)"}))


def fresh_checkout(work: Path, git: Callable[..., str]) -> None:
    """Do what actions/checkout does on a machine that keeps its folders."""
    git(work, "clean", "-qffdx", "-e", ".venv")


def pytest_run(work: Path, *options: str) -> tuple[int, str]:
    words = [sys.executable, "-m", "pytest", "studies/it.yaml", "-p", "llem", *options]
    done = subprocess.run(words, cwd=work, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_workflow_alone_saves_a_baseline_and_appends_to_the_history(
    project: Path, git: Callable[..., str]
) -> None:
    workflow = project / ".github" / "workflows" / "energy-main.yml"
    commits = []
    for seconds in (1.0, 1.1):
        set_seconds(project, seconds)
        git(project, "commit", "-qam", f"takes {seconds} s", "--allow-empty")
        commits.append(git(project, "rev-parse", "HEAD"))
        assert run_steps(workflow, "baseline", project, GITHUB_SHA=commits[-1]) == []
        fresh_checkout(project, git)

    git(project, "fetch", "-q", "origin", "llem")
    files = git(project, "ls-tree", "-r", "--name-only", "FETCH_HEAD").splitlines()
    history = [one for one in files if one.startswith("history/")]
    (baseline,) = [one for one in files if one.startswith("baselines/main/")]
    assert (len(files), len(history)) == (3, 2)
    assert "page" not in files
    assert git(project, "log", "--format=%s", "FETCH_HEAD").splitlines() == commits[::-1]

    (project / "figures.json").write_text(json.dumps({"seconds": "1 / (cycle - 2)"}))  # the second cycle raises
    failed = run_steps(workflow, "baseline", project, GITHUB_SHA="failed")
    assert failed == ["Measure main, and save its baseline"]
    git(project, "fetch", "-q", "origin", "llem")
    changed = git(project, "diff", "--name-only", "FETCH_HEAD~", "FETCH_HEAD").splitlines()
    assert [one.partition("/")[0] for one in changed] == ["history"], "the baseline is kept"
    fresh_checkout(project, git)

    git(project, "worktree", "prune")
    git(project, "worktree", "add", "--force", "--detach", ".llem/data", "FETCH_HEAD")
    saved = StudyResult.load(project / ".llem" / "data" / baseline)
    assert saved.environment["git"] == {"commit": commits[-1], "dirty": False}
    folder = "--llem-baseline-dir=.llem/data/baselines"
    set_seconds(project, 1.3)
    status, output = pytest_run(project, "--llem-baseline=main", folder, "--llem-baseline-max-age=30d")
    assert (status, "2 REGRESSION" in output) == (1, True)


@pytest.mark.parametrize("jobs", [["energy"], ["energy-a100", "energy-h100"]], ids=len)
def test_pull_request_has_one_comment_that_is_updated(tmp_path: Path, jobs: Sequence[str]) -> None:
    tools, comments, folder = tmp_path / "bin", tmp_path / "comments", tmp_path / "job"
    for one in (tools, comments, folder):
        one.mkdir()
    (tools / "gh").write_text(GH)
    (tools / "gh").chmod(0o755)
    environ = {"PATH": f"{tools}:{os.environ['PATH']}", "COMMENTS": str(comments), "GH_REPO": "a/b", "PR": "3"}
    for text in ("first", "second"):
        for job in jobs:
            (folder / "energy" / job).mkdir(parents=True, exist_ok=True)
            (folder / "energy" / job / "summary.md").write_text(f"{job}: the {text}\n")
        assert run_steps(TEMPLATES / "github.yml", "comment", folder, RUN="https://run", **environ) == []
        comment = (comments / "7").read_text().splitlines()
        assert comment[:2] == ["<!-- llem -->", "[Measured by this run](https://run)"]
        assert comment[3:] == [f"{job}: the {text}" for job in jobs]
    assert "--method PATCH repos/a/b/issues/comments/7" in (comments / "calls").read_text()


def test_comment_says_that_there_are_no_results(tmp_path: Path) -> None:
    (tmp_path / "gh").write_text(GH)
    (tmp_path / "gh").chmod(0o755)
    environ = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "COMMENTS": str(tmp_path), "GH_REPO": "a/b", "PR": "3"}
    assert run_steps(TEMPLATES / "github.yml", "comment", tmp_path, RUN="https://run", **environ) == []
    assert (tmp_path / "7").read_text().endswith("There are no results.\n")
