"""``pip install pytest-llem`` alone, without torch: what works, and what the messages say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest

from tests.conftest import ROOT
from tests.support.pages import files, page
from tests.support.study_results import saved_file

pytestmark = pytest.mark.slow

CONSTRAINTS = ROOT / "constraints.txt"

#: Maximum size of the bare installation in MB. torch alone is larger.
MAX_MB = 400

NEEDS = "engine 'pytorch' needs torch and transformers: pip install 'pytest-llem[pytorch]'"

STUDY = """\
name: tiny
model: builtin:tiny-llama
n: 2
max_input_tokens: 8
max_output_tokens: 4
warmup: {enabled: false}
baseline: {enabled: false}
measurement: {min_window_seconds: 0.1}
execution: {n_cycles: 2, start_method: forkserver}
gates: {delta: 0.9, metrics: [output_tokens_per_second]}
"""


class Bare:
    """An environment with the wheel, and a folder to work in.

    Args:
        environment: Folder of the environment, which is made if it does not exist.
        work: Folder in which commands run.
    """

    def __init__(self, environment: Path, work: Path) -> None:
        self.folder, self.work, self.bin = environment, work, environment / "bin"
        with filelock.FileLock(environment.with_suffix(".lock")):  # the workers of xdist share it
            if not (environment / "installed.json").is_file():
                self._install()
        self.size, self.seconds = json.loads((environment / "installed.json").read_text())

    def _install(self) -> None:
        build = ("-m", "pip", "wheel", "-q", "--no-deps", "-w", self.folder, ROOT)
        subprocess.run([sys.executable, *build], check=True)
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", self.folder], check=True)
        began = time.monotonic()
        self.pip("install", "-c", str(CONSTRAINTS), str(self.wheel))
        found = (self.megabytes(), time.monotonic() - began)
        (self.folder / "installed.json").write_text(json.dumps(found))

    @property
    def wheel(self) -> Path:
        (found,) = self.folder.glob("*.whl")
        return found

    @property
    def site_packages(self) -> Path:
        (found,) = (self.folder / "lib").glob("*/site-packages")
        return found

    def pip(self, *arguments: str) -> None:
        """Run the pip of these tests in the environment, which is made sooner without one."""
        python = ("--python", self.bin / "python")
        subprocess.run([sys.executable, "-m", "pip", "-q", *python, *arguments], check=True)

    def megabytes(self) -> float:
        """Size of the installed packages in MB."""
        return sum(file.stat().st_size for file in self.site_packages.rglob("*") if file.is_file()) / 1e6

    def __call__(self, command: str, *arguments: str | Path, **variables: str) -> tuple[int, str]:
        """Run a command in the folder, with environment *variables* in addition; return its status and output."""
        inherited = {name: os.environ[name] for name in os.environ if not name.startswith(("PYTHON", "PYTEST"))}
        done = subprocess.run(
            [self.bin / command, *arguments],
            cwd=self.work,
            env=inherited | {"COLUMNS": "200", "HF_HUB_OFFLINE": "1"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout

    def pytest(self, *arguments: str | Path) -> tuple[int, str]:
        return self("pytest", "-p", "llem", *arguments)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Bare:
    root = tmp_path_factory.getbasetemp()
    shared = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    return Bare(shared / "bare", tmp_path_factory.mktemp("work"))


@pytest.fixture(scope="module")
def measured(bare: Bare) -> Path:
    """The study's results and its baseline, measured with torch in the environment of the tests."""
    (bare.work / "tiny.yaml").write_text(STUDY)
    command = [sys.executable, "-m", "pytest", "-p", "llem", "-p", "no:randomly", "-p", "no:random_order"]
    for save in (["--llem-save", "main", "--llem-save-force"], []):  # forced: tests beside it may contend
        subprocess.run([*command, "tiny.yaml", *save], cwd=bare.work, check=True, stdout=subprocess.PIPE)
    return sorted((bare.work / "results").glob("tiny_*"))[-1]


def test_bare_install_has_no_torch_and_is_small(bare: Bare, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\nbare install: {bare.size:.0f} MB in {bare.seconds:.0f} s")
    absent = ("torch", "transformers", "tokenizers", "datasets")
    assert not [name for name in absent if (bare.site_packages / name).exists()]
    assert bare.size < MAX_MB


def test_bare_install_collects_and_plans(bare: Bare) -> None:
    for study in (ROOT / "studies").glob("*.yaml"):
        status, output = bare.pytest(study, "--collect-only")
        assert (status, "experiment[" in output) == (0, True), output
    quickstart = ROOT / "studies" / "quickstart.yaml"
    status, output = bare.pytest(quickstart, "--collect-only", "--llem-plan", "plan.json")
    assert NEEDS in output
    plan = json.loads((bare.work / "plan.json").read_text())
    assert len(plan["experiments"]) == 12
    assert {one["reason"] for one in plan["preflight"]} == {NEEDS}


def test_experiment_of_pytorch_fails_before_it_starts(bare: Bare) -> None:
    (bare.work / "tiny.yaml").write_text(STUDY)
    status, output = bare.pytest("tiny.yaml", "--llem-results-dir", "refused")
    assert (status, f"preflight: {NEEDS}" in output) == (1, True), output
    assert "Traceback" not in output


def test_commands_work_without_torch(bare: Bare) -> None:
    status, output = bare("llem", "doctor")
    assert status == 1
    assert "cannot be used: needs torch and transformers" in output
    assert "-m pip install 'pytest-llem[pytorch]'" in output
    assert "Traceback" not in output
    assert bare("llem", "schema", "--output", "schema.json")[0] == 0
    assert bare("llem", "init", "written.yaml")[0] == 0
    assert bare.pytest("written.yaml", "--collect-only")[0] == 0
    (bare.work / "tiny.yaml").write_text(STUDY)
    status, output = bare("llem", "fetch", "tiny.yaml", XDG_CACHE_HOME="empty")
    assert status == 1
    assert "it needs torch and transformers: pip install 'pytest-llem[pytorch]'" in output


def test_stored_results_are_compared_and_gated(bare: Bare, measured: Path) -> None:
    status, output = bare("llem", "compare", "main", measured)
    assert (status, ": no gate failed" in output, "NOT JUDGED" in output) == (0, True, False), output
    status, output = bare.pytest("tiny.yaml", "--llem-resume", "--llem-baseline", "main")
    assert (status, "NOT JUDGED" in output) == (0, False), (
        output
    )  # INCONCLUSIVE, which is skipped, on a busy machine
    assert "2 of 2 experiments completed" in output
    assert "preflight" not in output


def test_report_is_written_with_its_extra(bare: Bare, measured: Path) -> None:
    bare.pip("install", "--no-compile", "-c", str(CONSTRAINTS), f"{bare.wheel}[report]")
    status, output = bare("llem", "report", measured, "-o", "report.html")
    assert (status, (bare.work / "report.html").is_file()) == (0, True), output
    assert not (bare.site_packages / "torch").exists()


def test_engine_without_torch_runs(bare: Bare) -> None:
    for name, text in files(page("how-to/own-engine.md")).items():
        (bare.work / name).write_text(text)
    status, output = bare.pytest("bigram.yaml", "--llem-cycles", "1")
    assert (status, "2 passed" in output) == (0, True), output


def test_runner_with_torch_runs_the_engine(bare: Bare) -> None:
    (bare.work / "runner.yaml").write_text(f"{STUDY}runners: {{pytorch: {sys.executable}}}\n")
    status, output = bare.pytest("runner.yaml", "--llem-save", "of-a-runner", "--llem-results-dir", "elsewhere")
    assert (status, "2 passed" in output) == (0, True), output
    assert saved_file(bare.work, "of-a-runner", "tiny").is_file()


def test_runner_without_torch_is_refused_with_its_pip(bare: Bare, tmp_path: Path) -> None:
    own = bare.bin / "python"
    (tmp_path / "runner.yaml").write_text(f"{STUDY}runners: {{pytorch: {own}}}\n")
    _, output = bare.pytest(tmp_path / "runner.yaml", "--collect-only")
    assert f"needs torch and transformers: {own} -m pip install 'pytest-llem[pytorch]'" in output
