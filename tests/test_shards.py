"""``--llem-shard`` and ``llem merge``: a study in parts, joined to what one serial run has measured."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pytest_llem import StudyResult, cli
from pytest_llem.gates.saving import save
from pytest_llem.results.manifest import read_manifest
from pytest_llem.study.design import Shard
from pytest_llem.study.loading import load_study
from tests.conftest import NOOP_STUDY, OTHER_PLUGINS, Results, RunPytest, WriteStudy
from tests.support.environments import NOOP_ENGINE, ROOT, SITE_PACKAGES, Environment
from tests.support.processes import wait_until

SHARDS = ("1/3", "2/3", "3/3")

#: Changes of the study of the engine ``noop``.
STUDY = {"sweep": {"n": [1, 2, 3, 4]}, "budgets": {"output_tokens": 100}}


def _directories(root: Path) -> list[str]:
    return sorted(str(path) for path in root.iterdir() if "shard" in path.name)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _shown(result: StudyResult) -> dict[str, Any]:
    """Return what two runs of one study must have in common: not times, and not what was measured."""
    return {
        "design": result.study_design_hash,
        "protocol": result.measurement_protocol,
        "status": result.status,
        "summary": (result.summary.total, result.summary.completed, result.summary.failed),
        "entries": [(one.experiment_id, one.status, one.result_file) for one in result.experiments],
        "points": [(one.id, one.axes, one.config, one.cycles, one.testbed) for one in result.points],
        "tokens": [one.metrics["output_tokens"].values for one in result.points],
        "verdicts": [[(one.id, one.verdict) for one in point.verdicts] for point in result.points],
    }


@pytest.fixture
def write(write_study: WriteStudy) -> Callable[..., Path]:
    """Write a study of four points with a budget that each meets."""

    def write(**changes: Any) -> Path:
        return write_study(**{**STUDY, **changes})

    return write


@pytest.mark.parametrize("order", ["sequential", "interleaved", "shuffled"])
def test_shards_are_disjoint_equal_and_hold_whole_points(write: Callable[..., Path], order: str) -> None:
    study = load_study(write(execution={"n_cycles": 3, "cycle_order": order}))
    shards = [Shard.parse(text).experiments(study) for text in SHARDS]
    found = Counter(experiment.id for shard in shards for experiment in shard)
    assert found == Counter(experiment.id for experiment in study.experiments)
    assert [len({one.point.id for one in shard}) for shard in shards] == [2, 1, 1]
    assert all(len(shard) == 3 * len({one.point.id for one in shard}) for shard in shards)


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "1/3/5", "-1/3", "a/b", "1 / 3"])
def test_bad_shard_is_refused_with_the_form(run_pytest: RunPytest, write: Callable[..., Path], text: str) -> None:
    write()
    run = run_pytest(f"--llem-shard={text}")
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines([f"ERROR: --llem-shard: must be I/N, * (got {text!r})"])


def test_keywords_select_within_a_shard(
    run_pytest: RunPytest, write: Callable[..., Path], results: Results
) -> None:
    study = load_study(write())
    run = run_pytest("--llem-shard=2/3", "-k", "n=2 and cycle=1")
    assert run.ret == 0
    (wanted,) = (one.id for one in Shard(2, 3).experiments(study) if one.cycle == 1)
    assert {name for name, status in results.statuses().items() if status == "completed"} == {wanted}
    assert results.manifest["shard"] == "2/3"


def test_gates_of_a_shard_are_left_to_the_merge(run_pytest: RunPytest, write: Callable[..., Path]) -> None:
    write(budgets={"output_tokens": 0.5})
    run = run_pytest("--llem-shard=1/3", "-v")
    assert run.ret == 0
    run.stdout.fnmatch_lines(["llem: shard 1/3: llem merge judges the gates, on the results of all shards"])
    run.stdout.no_fnmatch_line("*budget*")


def test_empty_shard_says_why_nothing_runs(run_pytest: RunPytest, write: Callable[..., Path]) -> None:
    write()
    run = run_pytest("--llem-shard=5/5")
    assert run.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    run.stdout.fnmatch_lines(["llem: shard 5/5 has no experiment: there are fewer points than shards, *"])


@pytest.fixture(scope="module")
def finished_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the three shards of the study that ``write()`` writes, and of a serial run, for tests to copy."""
    folder = tmp_path_factory.mktemp("shards")
    (folder / "study.yaml").write_text(yaml.safe_dump({**NOOP_STUDY, **STUDY}, sort_keys=False))
    options = ["--rootdir=.", "--llem-start-method=forkserver", "--llem-run-id=one"]
    plugins = [option for name in OTHER_PLUGINS for option in ("-p", f"no:{name}")]
    for shard in (*SHARDS, None):
        subprocess.run(
            [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", *plugins, *options]
            + ([] if shard is None else [f"--llem-shard={shard}"]),
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(NOOP_ENGINE), "TMPDIR": str(folder)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
    return folder / "results"


@pytest.fixture
def shards(finished_shards: Path, write: Callable[..., Path], results: Results) -> list[str]:
    """Results directories of the three shards of a study."""
    write()
    shutil.copytree(finished_shards, results.root)
    return _directories(results.root)


def test_merged_shards_equal_a_serial_run_in_any_order(
    shards: list[str], results: Results, tmp_path: Path
) -> None:
    contents = []
    for number, order in enumerate(itertools.permutations(shards)):
        assert cli.main(["merge", *order, "-o", str(tmp_path / str(number))]) == 0
        contents.append(_files(tmp_path / str(number)))
    assert all(one == contents[0] for one in contents)
    assert cli.main(["merge", *shards, "-o", str(tmp_path / "0")]) == 0
    merged_again = ["merge", str(tmp_path / "0"), shards[1], "-o", str(tmp_path / "again")]
    assert cli.main(merged_again) == 0
    assert _files(tmp_path / "0") == _files(tmp_path / "again") == contents[0]
    merged, serial = (StudyResult.load(path) for path in (tmp_path / "0", results.root / "noop_one"))
    assert _shown(merged) == _shown(serial)
    names = {path.name for path in (results.root / "noop_one").iterdir()}
    assert {path.name for path in (tmp_path / "0").iterdir()} == names
    assert read_manifest(tmp_path / "0").merged_from == [Path(one).name for one in shards]


def test_merge_fails_with_missing_results_and_names_them(
    shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["merge", shards[0], shards[2], "-o", str(tmp_path / "out")]
    assert cli.main(arguments) == 1
    output = capsys.readouterr().out
    assert "8 experiments: 6 completed, 0 failed, 2 without a result" in output
    assert output.count(": in no run") == 2
    assert cli.main([*arguments, "--allow-missing"]) == 1, "budgets of the missing points cannot be judged"


def test_merge_judges_budgets(
    run_pytest: RunPytest,
    write: Callable[..., Path],
    results: Results,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(budgets={"output_tokens": 10}, execution={"n_cycles": 1})
    for shard in ("1/2", "2/2"):
        assert run_pytest(f"--llem-shard={shard}").ret == 0
    assert cli.main(["merge", *_directories(results.root), "-o", str(tmp_path / "out")]) == 1
    output = capsys.readouterr().out
    assert "budgets: 3 passed, 1 failed" in output
    assert "FAILED n=4: output_tokens: 12" in output
    verdicts = [one for point in StudyResult.load(tmp_path / "out").points for one in point.verdicts]
    assert Counter(one.verdict for one in verdicts) == {"WITHIN": 3, "BEYOND": 1}


def test_merge_compares_with_a_baseline(
    shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["merge", *shards, "-o", str(tmp_path / "out"), "--baseline", shards[0]]) == 1
    assert "not independent: the reference has the same measurement" in capsys.readouterr().out
    assert StudyResult.load(tmp_path / "out").comparison is not None


def test_merge_takes_the_baseline_of_its_testbed(
    shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["merge", *shards, "-o", str(tmp_path / "out")]) == 0
    saved = save(StudyResult.load(tmp_path / "out"), "main", tmp_path / "baselines")
    baseline = ["--baseline", "main", "--baseline-dir", str(tmp_path / "baselines")]
    assert cli.main(["merge", *shards, "-o", str(tmp_path / "out"), *baseline]) == 1
    assert "not independent: the reference has the same measurement" in capsys.readouterr().out
    saved.parent.rename(saved.parent.with_name("another"))
    assert cli.main(["merge", *shards, "-o", str(tmp_path / "out"), *baseline]) == 2
    assert "no baseline of 'noop' fits this testbed" in capsys.readouterr().err


def test_merge_reports_what_was_measured_twice(
    shards: list[str],
    run_pytest: RunPytest,
    results: Results,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_pytest("--llem-shard=2/3", "--llem-run-id=two", "-k", "cycle=1").ret == 0
    found = _directories(results.root)
    newer = results.root / "noop_two_shard-2-of-3"
    for order in (found, found[::-1]):
        assert cli.main(["merge", *order, "-o", str(tmp_path / "out")]) == 0
        output = capsys.readouterr().out
        assert output.count("overlap: ") == 1
        assert "was measured in noop_one_shard-2-of-3, noop_two_shard-2-of-3: the newest result counts" in output
        digests = {one.experiment_id: one.result_sha256 for one in read_manifest(tmp_path / "out").experiments}
        measured = [one for one in read_manifest(newer).experiments if one.status == "completed"]
        assert measured
        assert all(digests[one.experiment_id] == one.result_sha256 for one in measured)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sweep": {"n": [1, 2, 3, 5]}}, "different studies, noop [*] and noop [*]"),
        ({"execution": {"n_cycles": 3}}, "run with different settings, n_cycles: 2 and 3"),
        ({"budgets": {"output_tokens": 9}}, "run with different settings, budgets: *"),
    ],
)
def test_merge_refuses_runs_of_different_studies(
    shards: list[str],
    run_pytest: RunPytest,
    write: Callable[..., Path],
    results: Results,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    write(**changes)
    assert run_pytest("--llem-shard=1/3", "--llem-run-id=other", "-k", "n=1 and cycle=1").ret == 0
    other = results.root / "noop_other_shard-1-of-3"
    capsys.readouterr()
    assert cli.main(["merge", shards[0], str(other), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    pytest.LineMatcher([error.strip()]).fnmatch_lines([f"llem: *: {message.replace('[', '[[]')}"])
    assert not (tmp_path / "out").exists()


def test_merge_refuses_the_manifest_of_another_study(
    shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = Path(shards[0], "manifest.json")
    content = json.loads(manifest.read_text())
    content["experiments"][0]["config_hash"] = "0" * 16
    manifest.write_text(json.dumps(content))
    assert cli.main(["merge", *shards, "-o", str(tmp_path / "out")]) == 2
    other = content["experiments"][0]["experiment_id"]
    message = f"llem: {shards[0]}: manifest.json has {other}, which is not part of the study there\n"
    assert capsys.readouterr().err == message


def test_merge_does_not_overwrite_other_files(
    shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    for target in (tmp_path / "notes", Path(shards[0])):
        assert cli.main(["merge", *shards, "-o", str(target)]) == 2
        assert "exists, and has no merged results: it is not overwritten" in capsys.readouterr().err
    assert (tmp_path / "notes" / "mine.txt").exists()


def test_merge_that_cannot_write_names_its_output(
    shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["merge", *shards, "-o", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err == f"llem: {tmp_path / 'file' / 'out'}: Not a directory\n"


def test_merge_reports_a_link_to_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert cli.main(["merge", str(tmp_path / "loop"), "-o", str(tmp_path / "out")]) == 2
    assert "loop/manifest.json: Too many levels of symbolic links" in capsys.readouterr().err


def test_changed_result_is_missing_from_the_merge(
    shards: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = min(Path(shards[0], "experiments").glob("*.json"))
    damaged.write_text("{}")
    assert cli.main(["merge", *shards, "-o", str(tmp_path / "out")]) == 1
    assert f"experiments/{damaged.name} is missing, or was changed after it was written" in capsys.readouterr().out
    assert StudyResult.load(tmp_path / "out").summary.failed == 1


@pytest.mark.slow
def test_interleaved_comparison_is_merged_with_its_reference(
    run_pytest: RunPytest,
    write: Callable[..., Path],
    results: Results,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    reference = Environment(tmp_path / "env", ROOT, NOOP_ENGINE, *SITE_PACKAGES)
    write(sweep={"n": [1, 2]}, execution={"n_cycles": 1}, budgets=None)
    for shard in ("1/2", "2/2"):
        assert run_pytest(f"--llem-shard={shard}", f"--llem-against={reference.python}").ret == 0
    cli.main(["merge", *_directories(results.root), "-o", str(tmp_path / "out")])
    merged = StudyResult.load(tmp_path / "out")
    assert merged.comparison is not None
    assert (merged.comparison.paired, merged.comparison.reference) == (True, str(reference.python))
    assert [point.cycles for point in StudyResult.load(tmp_path / "out" / "reference").points] == [[1], [1]]


@pytest.mark.slow
def test_killed_and_resumed_shards_merge_to_a_serial_run(
    pytester: pytest.Pytester,
    run_pytest: RunPytest,
    write: Callable[..., Path],
    results: Results,
    tmp_path: Path,
) -> None:
    write(noop={"seconds": 0.05}, execution={"n_cycles": 2})
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", "--llem-start-method=forkserver"]
    rng = random.Random(32)
    runs = {shard: subprocess.Popen([*command, f"--llem-shard={shard}"], stdout=-3) for shard in SHARDS}

    def completed(shard: str) -> int:
        found = [*results.root.glob(f"*shard-{shard.replace('/', '-of-')}")] if results.root.exists() else []
        return sum(read_manifest(one).completed for one in found if (one / "manifest.json").exists())

    for shard in rng.sample(SHARDS, 3):
        after = rng.randint(1, 2)
        wait_until(lambda shard=shard, after=after: completed(shard) >= after)  # type: ignore[misc]
        runs[shard].kill()
        runs[shard].wait()
    for shard in SHARDS:
        assert run_pytest(f"--llem-shard={shard}", "--llem-resume").ret == 0
    directories = _directories(results.root)
    assert len(directories) == 6
    for order in (directories, rng.sample(directories, 6)):
        assert cli.main(["merge", *order, "-o", str(tmp_path / "out")]) == 0
    assert run_pytest("--llem-run-id=serial").ret == 0
    merged, serial = (StudyResult.load(path) for path in (tmp_path / "out", results.root / "noop_serial"))
    assert _shown(merged) == _shown(serial)
    assert all(one.replayed_from is None for one in merged.experiments), (
        "each is merged from the run that measured it"
    )
