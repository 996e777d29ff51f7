"""Baselines in a session: of this testbed, in a folder of the user's, and not too old."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pytest_llem._plugin import baseline
from pytest_llem._plugin.baseline import local_testbeds
from pytest_llem.hardware.gpus import Gpu, VisibleGpus
from tests.conftest import RunPytest, WriteStudy
from tests.support.study_results import saved_file

STUDY: dict[str, Any] = {
    "sweep": {"n": [2]},
    "execution": {"n_cycles": 2},
    "gates": {"metrics": ["output_tokens_per_second"], "delta": 0.9},
}


#: Also on a machine that other tests load.
SAVE = ("--llem-save=main", "--llem-save-force")


@pytest.fixture
def study(write_study: WriteStudy) -> None:
    write_study(**STUDY)


def test_baseline_of_another_testbed_is_one_line(
    study: None, run_pytest: RunPytest, pytester: pytest.Pytester
) -> None:
    assert run_pytest(*SAVE).ret == 0
    file = saved_file(pytester.path, "main", "noop")
    file.parent.rename(file.parent.with_name("nvidia-l4_72-w_amd-epyc"))
    run = run_pytest("--llem-baseline=main")
    assert run.ret == pytest.ExitCode.INTERRUPTED
    run.stdout.fnmatch_lines(
        [
            f"*--llem-baseline: main: no baseline of 'noop' fits this testbed ({file.parent.name}); "
            "there are: nvidia-l4_72-w_amd-epyc; save it: pytest study.yaml -p llem --llem-save main"
        ]
    )
    assert run_pytest("--llem-baseline=.llem/baselines/main/nvidia-l4_72-w_amd-epyc").ret == 0


def test_baseline_of_workers_on_other_hosts_fits_their_results(
    study: None, run_pytest: RunPytest, pytester: pytest.Pytester
) -> None:
    """The controller may be on a machine of another kind."""
    assert run_pytest(*SAVE).ret == 0
    pytester.makeconftest("""
        from pytest_llem._plugin import baseline, stash

        def pytest_collection_finish(session):
            session.config.stash[stash.REMOTE] = True
            session.config.stash[baseline._TESTBEDS] = ["another"]
    """)
    assert run_pytest("--llem-baseline=main").ret == 0


def test_baseline_of_the_measured_devices_is_judged(
    study: None, run_pytest: RunPytest, pytester: pytest.Pytester
) -> None:
    """Which of several models the engine uses is not known when the items are collected."""
    assert run_pytest(*SAVE).ret == 0
    file = saved_file(pytester.path, "main", "noop")
    other = json.loads(file.read_text())
    other["points"][0] |= {"id": "n=3", "axes": {"n": 3}}
    (file.parent.parent / "another").mkdir()
    (file.parent.parent / "another" / file.name).write_text(json.dumps(other))
    pytester.makeconftest(f"""
        from pytest_llem._plugin import baseline

        def pytest_configure(config):
            config.stash[baseline._TESTBEDS] = ["another", {file.parent.name!r}]
    """)
    run = run_pytest("--llem-baseline=main", "-rs")
    assert run.ret == 0
    skipped = "SKIPPED*n=3: cannot be judged: only the baseline of other devices has this point"
    run.stdout.fnmatch_lines(["  output_tokens_per_second * → *", skipped])


def test_folder_of_baselines_is_from_option_or_ini(
    study: None, run_pytest: RunPytest, pytester: pytest.Pytester
) -> None:
    run = run_pytest(*SAVE, "--llem-baseline-dir=restored")
    run.stdout.fnmatch_lines(["baseline: restored/main/*/noop.json"])
    assert not (pytester.path / ".llem").exists()
    pytester.makeini("[pytest]\nllem_baseline_dir = restored\nllem_baseline_max_age = 30d\n")
    assert run_pytest("--llem-baseline=main").ret == 0


@pytest.mark.parametrize("change", ["age", "schema"])
def test_unusable_baseline_names_the_command_that_renews_it(
    study: None, run_pytest: RunPytest, pytester: pytest.Pytester, change: str
) -> None:
    assert run_pytest("--llem-save=v1.2", "--llem-save-force").ret == 0
    file = saved_file(pytester.path, "v1.2", "noop")
    if change == "schema":
        file.write_text(file.read_text().replace('"schema_version": "2', '"schema_version": "7'))
    run = run_pytest("--llem-baseline=v1.2", *(["--llem-baseline-max-age=0.001s"] if change == "age" else []))
    assert run.ret == pytest.ExitCode.INTERRUPTED
    what = {"age": "seconds ago, and at most 0.001 seconds are allowed", "schema": "schema version 7.*"}[change]
    run.stdout.fnmatch_lines([f"*{what}; save it: pytest study.yaml -p llem --llem-save v1.2"])


def test_invalid_age_is_refused(study: None, run_pytest: RunPytest) -> None:
    run = run_pytest("--llem-baseline=main", "--llem-baseline-max-age=soon")
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines(["ERROR: --llem-baseline-max-age: must be a time above 0, * (got 'soon')"])


@pytest.mark.parametrize("option", ["--llem-baseline-max-age=1d", "--llem-baseline-dir=saved"])
def test_option_without_a_baseline_is_refused(study: None, run_pytest: RunPytest, option: str) -> None:
    run = run_pytest(option)
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines([f"ERROR: {option.partition('=')[0]}: needs --llem-baseline*"])


def test_mixed_gpus_may_be_each_testbed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = (*[Gpu("1", "NVIDIA L4", power_limit_w=72.0)] * 2, Gpu("2", "NVIDIA H100", power_limit_w=700.0))
    monkeypatch.setattr(baseline, "visible_gpus", lambda: VisibleGpus(gpus))
    monkeypatch.setattr(baseline, "processor", lambda: {"cpu_model": "AMD EPYC", "cpus_allowed": 8})
    assert [one.key for one in local_testbeds()] == [
        "nvidia-h100+nvidia-l4_700-w+72-w_amd-epyc",
        "nvidia-h100_700-w_amd-epyc",
        "nvidia-l4_72-w_amd-epyc",
        "amd-epyc_8-cpus",
    ]
