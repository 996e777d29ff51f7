"""Collection, selection and order of study items, as a pytest user expects them."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pytest_llem.collection.items import is_skipped
from tests.conftest import FORKSERVER, Results, WriteStudy
from tests.support.marks import slow

IDS = [f"precision={precision}-size={size}" for precision in ("bf16", "fp32") for size in (1, 2)]
IN_ORDER = {"n_cycles": 1, "cycle_order": "sequential", "start_method": "forkserver"}
ONE_EXPERIMENT = {"sweep": {"n": [1]}, "execution": {"n_cycles": 1}}


def collected(run: pytest.RunResult) -> list[str]:
    """Return the ids in the output of ``--collect-only -q``."""
    return [line for line in run.outlines if "::" in line]


def test_a_file_of_any_name_is_a_study_when_named(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study("anything.yml", execution=IN_ORDER)
    run = pytester.runpytest_inprocess("anything.yml", "-p", "llem", "--collect-only", "-q")
    assert collected(run) == [f"anything.yml::experiment[{one}]" for one in IDS]


def test_only_study_files_of_a_directory_are_collected(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study("one.study.yaml", execution=IN_ORDER)
    write_study("two.yaml", execution=IN_ORDER)
    (pytester.path / "lone.study.yaml").write_text("model: none\nbackend: noop\n")
    pytester.makepyfile("def test_ordinary(): pass")
    run = pytester.runpytest_inprocess("-p", "llem", "--collect-only", "-q")
    run.stdout.fnmatch_lines(
        ["*PytestCollectionWarning: lone.study.yaml is not collected: it has neither a sweep*"]
    )
    assert {line.partition("::")[0] for line in collected(run)} == {
        "one.study.yaml",
        "test_only_study_files_of_a_directory_are_collected.py",
    }
    run = pytester.runpytest_inprocess("-p", "llem", "--collect-only", "-q", "-o", "llem_files=t*.yaml")
    assert "two.yaml" in {line.partition("::")[0] for line in collected(run)}


def test_yaml_collected_by_another_plugin_is_not_a_study(
    pytester: pytest.Pytester, write_study: WriteStudy
) -> None:
    write_study("theirs.yaml")
    pytester.makeconftest(
        """
        import pytest

        class Theirs(pytest.File):
            def collect(self):
                yield Item.from_parent(self, name="theirs")

        class Item(pytest.Item):
            def runtest(self): pass

        def pytest_collect_file(file_path, parent):
            if file_path.suffix == ".yaml":
                return Theirs.from_parent(parent, path=file_path)
        """
    )
    run = pytester.runpytest_inprocess("theirs.yaml", "-p", "llem", "--collect-only", "-q")
    assert collected(run) == ["theirs.yaml::theirs"]


@pytest.mark.parametrize("autoload", [True, slow(False)])
def test_option_p_llem_works_with_and_without_autoload(
    pytester: pytest.Pytester, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch, autoload: bool
) -> None:
    if not autoload:
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    write_study(**ONE_EXPERIMENT)
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "--strict-markers", "-W", "error")
    run.assert_outcomes(passed=1)


def test_a_pasted_id_runs_that_experiment(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    write_study()
    run = pytester.runpytest_inprocess(
        "study.yaml::experiment[precision=bf16-size=2-cycle=2]", "-p", "llem", FORKSERVER
    )
    run.assert_outcomes(passed=1)
    assert results.statuses()["precision=bf16-size=2-cycle=2"] == "completed"


@pytest.mark.parametrize("workers", [(), slow(("-n", "2"))], ids=["serial", "xdist"])
def test_a_typo_in_one_study_is_a_located_collection_error(
    pytester: pytest.Pytester, write_study: WriteStudy, workers: tuple[str, ...]
) -> None:
    write_study("good.yaml", **ONE_EXPERIMENT)
    (pytester.path / "studies").mkdir()
    (pytester.path / "studies" / "bad.yaml").write_text("model: x\nprecison: bf16\nsweep:\n  n: [0]\n")
    run = pytester.runpytest_inprocess("good.yaml", "studies/bad.yaml", "-p", "llem", *workers)
    assert run.ret == (pytest.ExitCode.TESTS_FAILED if workers else pytest.ExitCode.INTERRUPTED)
    run.stdout.fnmatch_lines(
        [
            "*ERROR collecting studies/bad.yaml*",
            "studies/bad.yaml:2:1: precison: unknown key (did you mean 'precision'?)",
            "studies/bad.yaml:4:7: n: must be at least 1 (got 0)",
        ]
    )
    assert "Traceback" not in run.stdout.str()
    assert "INTERNALERROR" not in run.stdout.str()
    assert workers or not (pytester.path / "results").exists(), "no experiment ran"


def test_an_items_location_is_its_line_in_the_study(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    path = write_study(sweep={"noop.fault": ["raise"]}, execution={"n_cycles": 1})
    line = path.read_text().splitlines().index("sweep:") + 1
    pytester.makeconftest(
        """
        def pytest_collection_modifyitems(items):
            print([(str(item.reportinfo()[0]), item.reportinfo()[1] + 1) for item in items])
        """
    )
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", FORKSERVER, "-s", "--tb=line")
    run.stdout.fnmatch_lines(
        [f"*('{path}', {line})*", f"{path}:*: Failed: exception while measuring: ValueError: *"]
    )


def test_study_items_keep_their_order_and_ordinary_tests_theirs(
    pytester: pytest.Pytester, write_study: WriteStudy
) -> None:
    write_study()
    pytester.makepyfile(test_plain="def test_a(): pass\ndef test_b(): pass")
    pytester.makeconftest(
        """
        import pytest

        def pytest_collection_modifyitems(items):
            items.reverse()
        """
    )
    plain = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "-p", "no:randomly", "--collect-only", "-q")
    shuffled = pytester.runpytest_inprocess(
        "test_plain.py", "study.yaml", "-p", "llem", "-p", "no:randomly", "--collect-only", "-q"
    )
    assert [one for one in collected(shuffled) if "study" in one] == collected(plain)
    assert [one for one in collected(shuffled) if "plain" in one] == [
        "test_plain.py::test_b",
        "test_plain.py::test_a",
    ]


def test_selection_by_axis_runs_exactly_that(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    write_study(sweep={"noop.size": [1, 10], "n": [1, 2]}, execution=IN_ORDER)
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", FORKSERVER, "-k", "size=1 and not n=2")
    run.assert_outcomes(passed=1, deselected=3)
    assert [one for one, status in results.statuses().items() if status == "completed"] == ["n=1-size=1"]


@pytest.mark.parametrize("workers", [(), slow(("-n", "2"))], ids=["serial", "xdist"])
def test_an_unknown_axis_is_refused(
    pytester: pytest.Pytester, write_study: WriteStudy, workers: tuple[str, ...]
) -> None:
    write_study()
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "-k", "not batch_sise=8", *workers)
    assert run.ret != 0
    assert "no collected study has an axis batch_sise" in run.stdout.str() + run.stderr.str()
    run.assert_outcomes(errors=1 if workers else 0)


def test_axis_in_k_is_refused_without_a_study(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test(): pass")
    run = pytester.runpytest("-p", "llem", "-k", "size=8")
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines(["ERROR: -k: unknown axis size: no study was collected"])


def test_last_failed_failed_first_and_deselect(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(sweep={"noop.fault": ["none", "raise"], "n": [1, 2]}, execution=IN_ORDER)
    pytester.runpytest_inprocess("study.yaml", "-p", "llem", FORKSERVER).assert_outcomes(passed=2, failed=2)
    ids = {fault: [f"study.yaml::experiment[n={n}-fault={fault}]" for n in (1, 2)] for fault in ("none", "raise")}
    for option, expected in (
        ("--lf", ids["raise"]),
        ("--ff", [*ids["raise"], *ids["none"]]),
        (f"--deselect={ids['raise'][0]}", [*ids["none"], ids["raise"][1]]),
    ):
        run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", option, "--collect-only", "-q")
        assert collected(run) == expected
    pytester.runpytest_inprocess("study.yaml", "-p", "llem", FORKSERVER, "--lf").assert_outcomes(
        failed=2, deselected=2
    )


def test_a_late_conftest_cannot_reorder_a_study(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study("a.study.yaml", sweep={"n": [1, 2, 3]}, execution=IN_ORDER)
    (pytester.mkpydir("late") / "conftest.py").write_text(
        "import pytest\n@pytest.hookimpl(wrapper=True)\n"
        "def pytest_collection_modifyitems(items):\n    yield\n    items.reverse()\n"
    )
    (pytester.path / "late" / "test_it.py").write_text("def test(): pass\n")
    run = pytester.runpytest_inprocess("-p", "llem", "--collect-only", "-q")
    experiments = [one for one in collected(run) if "experiment" in one]
    assert experiments == [f"a.study.yaml::experiment[n={n}]" for n in (1, 2, 3)]


def test_a_study_that_a_conftest_collects_runs(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    write_study("study.llem", sweep={"n": [1, 2]}, execution={"n_cycles": 1})
    with (pytester.path / "conftest.py").open("a") as file:
        file.write(
            "\nfrom pytest_llem.collection.items import StudyFile\n"
            "def pytest_collect_file(file_path, parent):\n"
            "    if file_path.suffix == '.llem':\n"
            "        return StudyFile.from_parent(parent, path=file_path)\n"
        )
    pytester.runpytest_inprocess("study.llem", "-p", "llem", FORKSERVER).assert_outcomes(passed=2)
    assert results.manifest["completed"] == 2


def test_a_study_runs_without_the_cache_plugin(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    write_study(**ONE_EXPERIMENT)
    pytester.runpytest_inprocess("study.yaml", "-p", "llem", FORKSERVER, "-p", "no:cacheprovider").assert_outcomes(
        passed=1
    )
    assert results.manifest["status"] == "completed"


def test_collecting_imports_no_torch(pytester: pytest.Pytester) -> None:
    study = pytester.path / "study.yaml"
    study.write_text("model: builtin:tiny-llama\nsweep: {pytorch.batch_size: [1, 8]}\n")
    code = (
        "import pytest, sys\n"
        "assert pytest.main(['study.yaml', '-p', 'llem', '--collect-only', '-q']) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "study.yaml::experiment[batch_size=8-cycle=3]" in done.stdout


def test_help_lists_the_options_and_ini_options(pytester: pytest.Pytester) -> None:
    run = pytester.runpytest_inprocess("--help", "-p", "llem")
    run.stdout.fnmatch_lines(
        ["energy studies of LLM inference:", "*--llem-results-dir=DIR*", "*--llem-run-id=ID*"]
    )
    for option in ("llem_results_dir", "llem_model_path", "llem_files"):
        run.stdout.fnmatch_lines([f"*{option} (*"])


def test_doubly_quiet_collection_prints_only_the_count(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study()
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--collect-only", "-qq")
    assert [line for line in run.outlines if line] == ["study.yaml: 8"]


def test_output_of_ordinary_runs_is_unchanged(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makepyfile("def test_plain(request): assert not [f for f in request.fixturenames if 'llem' in f]")
    outputs = []
    for plugin in ((), ("-p", "llem")):
        run = pytester.runpytest_subprocess("--strict-markers", "-W", "error", *plugin)
        run.assert_outcomes(passed=1)
        outputs.append([line for line in run.outlines if " in " not in line and not line.startswith("plugins:")])
    assert outputs[0] == outputs[1]


def test_results_are_written_without_a_terminal_reporter(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", FORKSERVER, "-p", "no:terminal")
    assert run.ret == 0
    assert results.study_result["summary"]["completed"] == 1


@pytest.mark.slow
def test_a_study_outside_rootdir_runs_but_not_under_xdist(
    pytester: pytest.Pytester, write_study: WriteStudy, results: Results
) -> None:
    path = write_study(**ONE_EXPERIMENT)
    inner = pytester.path / "inner"
    inner.mkdir()
    (inner / "pytest.ini").write_text("[pytest]\n")
    moved = path.rename(pytester.path / "elsewhere.yaml")
    command = (str(moved), "-p", "llem", "-c", "inner/pytest.ini", "--rootdir=inner")
    pytester.runpytest_inprocess(*command).assert_outcomes(passed=1)
    assert json.loads(next((inner / "results").glob("noop_*/manifest.json")).read_text())["completed"] == 1
    run = pytester.runpytest_inprocess(*command, "-n", "1")
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    run.stderr.fnmatch_lines(["ERROR: with pytest-xdist, studies must be inside rootdir *"])


def test_a_study_may_be_run_from_another_working_directory(
    pytester: pytest.Pytester, write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(**ONE_EXPERIMENT)
    (pytester.path / "deep").mkdir()
    monkeypatch.chdir(pytester.path / "deep")
    run = pytester.runpytest_inprocess("../study.yaml", "-p", "llem", FORKSERVER, f"--rootdir={pytester.path}")
    run.assert_outcomes(passed=1)
    run.stdout.fnmatch_lines(["results: ../results/noop_*"])


@pytest.mark.parametrize(
    ("mark", "expected"),
    [
        ("skip", True),
        ("skipif(True, reason='r')", True),
        ("skipif(1, reason='r')", True),
        ("skipif(condition=True, reason='r')", True),
        ("skipif(reason='r')", True),
        ("skipif(False, reason='r')", False),
        ("skipif('True', reason='r')", False),  # pytest evaluates it when the item runs
        ("xfail", False),
    ],
)
def test_skipped_item_is_known_before_it_runs(pytester: pytest.Pytester, mark: str, expected: bool) -> None:
    item = pytester.getitem(f"import pytest\n@pytest.mark.{mark}\ndef test_func(): ...")
    assert is_skipped(item) is expected
