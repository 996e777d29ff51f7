"""``--llem-against=git:REVISION``: the code of a revision is measured by this interpreter."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import pytest

from pytest_llem import StudyResult
from pytest_llem.planning import worktree
from pytest_llem.planning.worktree import RevisionError, add_worktree
from pytest_llem.results.code_state import imported_from
from tests.conftest import Results, RunPytest
from tests.support.environments import NOOP_ENGINE, ROOT, SITE_PACKAGES, Environment
from tests.support.processes import gone, wait_until

WriteStudy = Callable[..., Path]

#: A server that notes its revision.
SERVER = """
    import runpy
    from pathlib import Path

    with Path("{log}").open("a") as log:
        log.write("{revision}\\n")
    runpy.run_path("{mock}", run_name="__main__")
"""

#: An engine whose model memory is that of its revision.
ENGINE = """
    from noop_engine import NoopEngine

    class Engine(NoopEngine):
        def model_memory_bytes(self):
            return {size}
"""


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


@pytest.fixture
def repository(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in the current folder. Its engine has 2 MB in the branch main, and 1 in the working tree."""
    for name in ("GIT_AUTHOR", "GIT_COMMITTER"):
        monkeypatch.setenv(f"{name}_NAME", "somebody")
        monkeypatch.setenv(f"{name}_EMAIL", "somebody@example.org")
    monkeypatch.setenv("TMPDIR", str(pytester.mkdir("temporary")))
    monkeypatch.setattr("tempfile.tempdir", None)
    write(pytester.path / "mine.py", ENGINE.format(size=2_000_000))
    write(pytester.path / ".gitignore", "results\ntemporary\n__pycache__\n")
    git("init", "--quiet", "--initial-branch=main")
    git("add", "mine.py", ".gitignore")
    git("commit", "--quiet", "--message=one")
    write(pytester.path / "mine.py", ENGINE.format(size=1_000_000))
    return pytester.path


@pytest.fixture
def study(write_study: WriteStudy) -> WriteStudy:
    """Return a function that writes a study of the engine of :func:`repository`."""

    def made(backend: str = "mine:Engine", cycles: int = 2) -> Path:
        gates = {"metrics": ["model_memory_mb"]}
        return write_study(backend=backend, sweep={"n": [1]}, execution={"n_cycles": cycles}, gates=gates)

    return made


def worktrees() -> list[str]:
    return [line for line in git("worktree", "list", "--porcelain").splitlines() if line.startswith("worktree ")]


@pytest.mark.slow
@pytest.mark.parametrize("folder", [".", "src"], ids=["current folder", "ini pythonpath"])
def test_server_of_revision_runs_its_own_code(
    repository: Path, write_study: WriteStudy, run_pytest: RunPytest, folder: str
) -> None:
    log, mock = repository / "temporary" / "log", ROOT / "tests" / "support" / "mock_server.py"
    write(repository / "pytest.ini", f"[pytest]\npythonpath = {folder}\n")
    write(repository / folder / "served.py", SERVER.format(log=log, mock=mock, revision="main"))
    git("add", "pytest.ini", f"{folder}/served.py")
    git("commit", "--quiet", "--message=two")
    write(repository / folder / "served.py", SERVER.format(log=log, mock=mock, revision="working tree"))
    write_study(
        backend="server",
        server={"command": ["{python}", "-m", "served", "--port", "{port}"], "vocab_size": 1000},
        load={"concurrency": 1},
        max_output_tokens=4,
        sweep={"random_seed": [1]},
        execution={"n_cycles": 1},
        gates={"metrics": ["seconds"]},
        model=None,
    )
    run = run_pytest("--llem-against=git:main")
    run.stdout.no_fnmatch_line("*crash while*")  # the two clients are forked from one forkserver
    assert sorted(log.read_text().splitlines()) == ["main", "working tree"]


class TestRun:
    @pytest.mark.parametrize(
        "workers", [(), pytest.param(("-n", "2"), marks=pytest.mark.slow)], ids=["serial", "xdist"]
    )
    def test_working_tree_is_compared_with_the_revision(
        self,
        repository: Path,
        study: WriteStudy,
        run_pytest: RunPytest,
        results: Results,
        workers: tuple[str, ...],
    ) -> None:
        study()
        run = run_pytest("--llem-against=git:main", *workers, "-rA")
        run.assert_outcomes(passed=2 + 2 + 1)
        name = f"git:main ({git('rev-parse', 'main')[:12]})"
        run.stdout.fnmatch_lines([f"  against {name}: 2 experiments interleaved pass by pass, *"])
        own, other = (StudyResult.load(folder) for folder in (results.directory, results.directory / "reference"))
        assert own.comparison is not None
        assert own.comparison.reference == name
        (verdict,) = own.points[0].verdicts
        assert verdict.verdict == "IMPROVEMENT"
        assert verdict.ratio == pytest.approx(0.5)
        assert other.points[0].sut["commit"] == git("rev-parse", "main")
        assert len(worktrees()) == 1, "that of the repository itself"
        assert not list((repository / "temporary").glob("llem-worktree-*"))

    @pytest.mark.slow
    def test_package_of_a_src_layout_is_that_of_the_revision(
        self,
        repository: Path,
        study: WriteStudy,
        run_pytest: RunPytest,
        results: Results,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """As of an editable installation, ``src`` is on the path."""
        package = repository / "src" / "package"
        write(package / "__init__.py", "")
        write(package / "engine.py", ENGINE.format(size=4_000_000))
        git("add", "src")
        git("commit", "--quiet", "--message=two")
        write(package / "engine.py", ENGINE.format(size=1_000_000))
        monkeypatch.syspath_prepend(repository / "src")
        study("package.engine:Engine")
        run_pytest("--llem-against=git:main").assert_outcomes(passed=5)
        (verdict,) = StudyResult.load(results.directory).points[0].verdicts
        assert verdict.ratio == pytest.approx(0.25)

    def test_engine_that_the_revision_does_not_have_is_an_error(
        self, repository: Path, study: WriteStudy, run_pytest: RunPytest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write(repository / "fresh" / "new.py", ENGINE.format(size=1_000_000))
        monkeypatch.setenv("PYTHONPATH", f"{repository / 'fresh'}{os.pathsep}{os.environ['PYTHONPATH']}")
        monkeypatch.syspath_prepend(repository / "fresh")
        study("new:Engine")
        run = run_pytest("--llem-against=git:main")
        assert run.ret == pytest.ExitCode.USAGE_ERROR
        run.stderr.fnmatch_lines(["*the reference: engine 'new:Engine': module 'new' not found*"])

    def test_plan_alone_leaves_no_worktree(
        self, repository: Path, study: WriteStudy, run_pytest: RunPytest
    ) -> None:
        study()
        assert run_pytest("--llem-against=git:main", "--collect-only", "-q").ret == 0
        assert len(worktrees()) == 1

    @pytest.mark.slow
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_interrupt_removes_the_worktree(
        self, repository: Path, write_study: WriteStudy, number: signal.Signals
    ) -> None:
        (repository / "temporary" / "notes").mkdir()
        write_study(
            backend="mine:Engine",
            sweep={"n": [1]},
            measurement={"min_window_seconds": 600},
            **{"mine:Engine": {"seconds": 0.05, "report": str(repository / "temporary" / "notes")}},
        )
        command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", "--llem-against=git:main"]
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda: len([*(repository / "temporary" / "notes").iterdir()]) == 2)
        run.send_signal(number)
        run.wait(60)
        pids = [int(file.stem) for file in (repository / "temporary" / "notes").iterdir()]
        wait_until(lambda: all(map(gone, pids)), 30)
        assert len(worktrees()) == 1

    def test_worktree_of_a_killed_run_is_removed_by_the_next(self, repository: Path) -> None:
        killed = subprocess.Popen([sys.executable, "-c", ""])
        killed.wait()
        abandoned = repository / "temporary" / f"llem-worktree-{killed.pid}-x" / "tree"
        git("worktree", "add", "--quiet", "--detach", str(abandoned), "main")
        add_worktree(repository, "main", []).remove()
        assert len(worktrees()) == 1
        assert not abandoned.parent.exists()


@pytest.mark.slow
@pytest.mark.parametrize(("place", "hook"), [("src/mine", "*.pth"), ("lib/code", "*_finder.py")])
def test_editable_project_is_that_of_the_revision_and_a_copy_is_refused(
    repository: Path, study: WriteStudy, results: Results, tmp_path: Path, place: str, hook: str
) -> None:
    """Setuptools makes an import hook if a package's folder has another name."""
    (repository / "mine.py").unlink()
    write(
        repository / "pyproject.toml",
        f"""
        [build-system]
        requires = ["setuptools"]
        build-backend = "setuptools.build_meta"
        [project]
        name = "mine"
        version = "1.0"
        [tool.setuptools]
        packages = ["mine"]
        package-dir = {{mine = "{place}"}}
        """,
    )
    write(repository / place / "__init__.py", ENGINE.format(size=2_000_000))
    git("add", "--all")
    git("commit", "--quiet", "--message=two")
    write(repository / place / "__init__.py", ENGINE.format(size=1_000_000))
    environment = Environment(tmp_path / "env", ROOT, NOOP_ENGINE, *SITE_PACKAGES)
    install = [str(environment.python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--editable", str(repository)], check=True)
    assert list(environment.site_packages.glob(f"__editable__{hook}"))
    study()
    command = [str(environment.python), "-m", "pytest", "study.yaml", "-p", "llem", "--llem-against=git:main"]
    inherited = {**os.environ, "PYTHONPATH": ""}
    subprocess.run(command, env=inherited, check=True)
    (verdict,) = StudyResult.load(results.directory).points[0].verdicts
    assert verdict.ratio == pytest.approx(0.5)
    subprocess.run([*install, str(repository)], check=True)
    refused = subprocess.run(command, env=inherited, check=False, capture_output=True, text=True)
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert "mine is installed, not editable, so that both sides would import the copy" in refused.stderr


class TestRefusal:
    def _refusal(self, folder: Path, revision: str = "main") -> str:
        with pytest.raises(RevisionError) as caught:
            add_worktree(folder, revision, [folder])
        assert len(worktrees()) == 1
        return str(caught.value)

    def test_unknown_revision(self, repository: Path, study: WriteStudy, run_pytest: RunPytest) -> None:
        study()
        run = run_pytest("--llem-against=git:nowhere")
        assert run.ret == pytest.ExitCode.USAGE_ERROR
        run.stderr.fnmatch_lines(["ERROR: --llem-against: unknown revision 'nowhere' (git fetch may bring it)"])

    def test_unknown_revision_of_a_shallow_clone(self, repository: Path) -> None:
        git("clone", "--quiet", "--depth=1", f"file://{repository}", "temporary/clone")
        with pytest.raises(RevisionError, match="in CI with fetch-depth: 0"):
            add_worktree(repository / "temporary" / "clone", "main~1", [])

    def test_no_repository(self, tmp_path: Path) -> None:
        with pytest.raises(RevisionError, match="is in no git repository"):
            add_worktree(tmp_path, "main", [])

    def test_compiled_module(self, repository: Path) -> None:
        (repository / "fast.so").touch()
        (repository / "temporary" / "elsewhere.so").touch()
        reason = self._refusal(repository)
        assert reason.startswith("fast.so is compiled, and the revision's source would not change it: make an ")
        assert "git worktree add --detach ../main main && python3 -m venv ../main/.venv" in reason
        assert reason.endswith("--llem-against=../main/.venv/bin/python")

    @pytest.mark.parametrize(
        ("name", "text", "what"),
        [
            ("pyproject.toml", '[project]\nname = "x"\ndependencies = ["torch>=3"]\n', "project.dependencies of "),
            ("requirements-dev.txt", "torch\n", "requirements-dev.txt"),
            ("setup.py", "import setuptools\n", "setup.py"),
            ("setup.cfg", "[options]\ninstall_requires = torch\n", "setup.cfg"),
            ("uv.lock", "version = 1\n", "uv.lock"),
        ],
    )
    def test_other_requirements(self, repository: Path, name: str, text: str, what: str) -> None:
        write(repository / name, text)
        git("add", name)
        assert self._refusal(repository).startswith(what)

    def test_requirements_of_a_project_below_the_top(self, repository: Path) -> None:
        write(repository / "project" / "pyproject.toml", '[project]\ndependencies = ["torch"]\n')
        write(repository / "another" / "setup.py", "import setuptools\n")
        git("add", "project", "another")
        add_worktree(repository, "main", [repository]).remove()
        with pytest.raises(RevisionError, match=r"project\.dependencies of project/pyproject\.toml differs"):
            add_worktree(repository, "main", [repository / "project" / "src"])

    def test_requirements_that_the_working_tree_has_removed(self, repository: Path) -> None:
        write(repository / "setup.py", "import setuptools\n")
        git("add", "setup.py")
        git("commit", "--quiet", "--message=two")
        git("rm", "--quiet", "setup.py")
        assert self._refusal(repository).startswith("setup.py differs")

    @pytest.mark.parametrize(
        ("name", "text"), [("pyproject.toml", "[tool.ruff]\n"), ("setup.cfg", "[flake8]\nignore = E501\n")]
    )
    def test_settings_of_tools_are_no_requirements(self, repository: Path, name: str, text: str) -> None:
        write(repository / name, text)
        git("add", name)
        add_worktree(repository, "main", [repository]).remove()

    def test_project_that_is_installed_and_not_editable(self, repository: Path) -> None:
        write(repository / "pyproject.toml", f'[project]\nname = "{distribution("pluggy").name}"\n')
        reason = self._refusal(repository)
        assert reason.startswith("pluggy is installed, not editable, so that both sides would import")


def test_own_code_excludes_environments_in_the_working_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    own = [
        tmp_path,
        tmp_path / "src",
        tmp_path / ".venv" / "lib",
        tmp_path / "x" / "site-packages",
        tmp_path.parent,
    ]
    assert [worktree._is_own(one, tmp_path) for one in own] == [True, True, False, False, False]


def test_modules_imported_from_the_working_tree_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's own worktree may be in the working tree, as TMPDIR may be. Links lead to the same file."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "tree")
    link, tmp_path = tmp_path / "link", tmp_path / "tree"
    for folder, name in ((link, "of_the_candidate"), (link / "worktree", "of_the_reference")):
        write(folder / f"{name}.py", "")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.setitem(sys.modules, name, importlib.import_module(name))
    assert imported_from(str(tmp_path), str(tmp_path / "worktree")) == ["of_the_candidate"]


def test_link_to_the_working_tree_leads_to_the_worktree(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the reference would import from the link, which has the candidate's code."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    link = repository / "temporary" / "link"
    link.symlink_to(repository)
    made = add_worktree(link, "main", [link])
    assert made.counterpart(link / "package") == made.folder / "package"
    assert f":{made.folder}\n" in made.python.read_text()
    made.remove()


def test_generated_modules_are_copied(repository: Path) -> None:
    write(repository / ".gitignore", "_version.py\nbuild\n")
    for name in ("package/__init__.py", "package/_version.py", "build/copy.py"):
        write(repository / name, "")
    git("add", ".gitignore", "package")
    git("commit", "--quiet", "--message=two")
    made = add_worktree(repository, "main", [])
    assert (made.folder / "package" / "_version.py").exists()
    assert not (made.folder / "build").exists()
    made.remove()


def test_study_with_runners_is_refused(repository: Path, write_study: WriteStudy, run_pytest: RunPytest) -> None:
    write_study(sweep={"n": [1]}, runners={"noop": sys.executable})
    run = run_pytest("--llem-against=git:main")
    run.stdout.fnmatch_lines(["*--llem-against=git:…: the study has runners, *"])
