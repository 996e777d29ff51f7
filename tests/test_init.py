"""``llem init``: the study that it writes loads, on every kind of machine, and nothing is overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pytest_llem.cli import main
from pytest_llem.cli.init import CI_FILES
from pytest_llem.doctor import host as doctor_host
from pytest_llem.doctor.records import Rapl
from pytest_llem.planning import host
from pytest_llem.planning.host import GpuCapacity, Host
from pytest_llem.study.loading import load_study

H100 = GpuCapacity("NVIDIA H100 80GB HBM3", 80 * 10**9, (9, 0))
V100 = GpuCapacity("Tesla V100-SXM2-16GB", 16 * 10**9, (7, 0))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty current folder, on a machine without a GPU and without RAPL."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(tmp_path / "powercap"))
    monkeypatch.setattr(host, "this_host", lambda: Host(8 * 10**9))
    return tmp_path


def with_commented_sections(text: str) -> str:
    """Return a study with its commented budgets and gates switched on."""
    return text.replace("# budgets:", "budgets:").replace("# gates:", "gates:").replace("#   ", "  ")


@pytest.mark.parametrize(
    ("gpus", "precisions", "energy"),
    [
        ((), ["bf16", "fp32"], "estimated"),
        ((H100, H100), ["bf16", "fp16"], "NVML, of NVIDIA H100 80GB HBM3."),
        ((V100,), ["fp16", "fp32"], "NVML, of Tesla V100-SXM2-16GB."),
    ],
    ids=["cpu", "h100", "v100"],
)
def test_study_suits_the_devices_and_loads(
    gpus: tuple[GpuCapacity, ...],
    precisions: list[str],
    energy: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "this_host", lambda: Host(64 * 10**9, gpus))
    assert main(["init"]) == 0
    text = (folder / "study.yaml").read_text()
    study = load_study(folder / "study.yaml")
    assert [point.config.precision for point in study.points] == [one for one in precisions for _ in range(2)]
    assert energy in text
    (folder / "all.yaml").write_text(with_commented_sections(text))
    gated = load_study(folder / "all.yaml")
    assert gated.budgets
    assert gated.gates.metrics


def test_energy_of_cpu_packages_is_gated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_host, "rapl", lambda: Rapl(root="powercap"))
    assert main(["init"]) == 0
    text = (folder / "study.yaml").read_text()
    assert "# Energy: RAPL, of the CPU packages." in text
    assert "energy_per_output_token_j: {max:" in text


def test_estimated_energy_is_not_gated_and_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_host, "rapl", lambda: Rapl(root="powercap", error="no package counter"))
    assert main(["init"]) == 0
    text = (folder / "study.yaml").read_text()
    assert "# Energy: estimated from CPU time, and not gated (RAPL: no package counter)." in text
    assert "energy_per_output_token_j: {max:" not in text


@pytest.mark.parametrize("model", ["org/Model-1B", "a: b # c", "010", "/models/größe/", "null"])
def test_model_is_written_as_given(model: str, folder: Path) -> None:
    assert main(["init", "sub/it.yaml", "--model", model]) == 0
    assert {point.config.model for point in load_study(folder / "sub" / "it.yaml").points} == {model}


def test_commands_of_a_file_with_a_space_are_quoted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "my study.yaml", "--ci", "gitlab"]) == 0
    assert "bin/pytest 'my study.yaml' -p llem" in Path(CI_FILES["gitlab"]).read_text()
    assert "next: pytest 'my study.yaml' -p llem\n" in capsys.readouterr().out
    assert "pytest 'my study.yaml' -p llem\n" in (folder / "my study.yaml").read_text()


@pytest.mark.parametrize("system", ["github", "github-main", "gitlab"])
def test_ci_job_runs_the_study(system: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "bench/it.yaml", "--ci", system]) == 0
    written = [line.removeprefix("wrote ") for line in capsys.readouterr().out.splitlines() if "wrote" in line]
    (job,) = [folder / name for name in written if "it.yaml" not in name]
    assert "pytest bench/it.yaml -p llem" in job.read_text()
    assert yaml.safe_load(job.read_text())


def test_existing_files_are_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = folder / ".github" / "workflows" / "energy.yml"
    job.parent.mkdir(parents=True)
    job.write_text("mine")
    assert main(["init", "--ci", "github"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["wrote study.yaml", f"kept {job.relative_to(folder)}"]
    assert job.read_text() == "mine"
    assert main(["init"]) == 2
    assert capsys.readouterr().err == "llem: study.yaml: exists already, nothing was written\n"


def test_file_that_pytest_would_not_collect_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "study.txt"]) == 2
    assert capsys.readouterr().err == "llem: study.txt: the name of a study ends with .yaml or .yml\n"
    assert [*folder.iterdir()] == []


def test_llem_alone_prints_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "write a first study" in capsys.readouterr().out
