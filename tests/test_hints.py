"""What pytest says if the command line names something that does not exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.reporting.terminal.summary import shown_from
from pytest_llem.study.problems import did_you_mean
from tests.conftest import FORKSERVER

WriteStudy = Callable[..., Path]

STUDY = {"sweep": {"noop.size": [1, 2]}, "execution": {"n_cycles": 2}}


def _errors(pytester: pytest.Pytester, *arguments: str) -> str:
    run = pytester.runpytest_inprocess("-p", "llem", *arguments)
    assert run.ret == pytest.ExitCode.USAGE_ERROR
    assert "experiment[" not in run.stdout.str(), "the list of ids hides the error"
    (line,) = (line for line in run.errlines if line.startswith("ERROR: "))
    return line.removeprefix("ERROR: ")


def test_unknown_axis_is_reported_without_list_of_ids(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(**STUDY)
    text = _errors(pytester, "study.yaml", "--collect-only", "-q", "-k", "sise=1")
    assert text == "-k: no collected study has an axis sise (did you mean 'size'?)"


@pytest.mark.parametrize("term", ["size = 1", "size==1", "size= 1"])
def test_almost_valid_axis_term_has_a_hint(pytester: pytest.Pytester, write_study: WriteStudy, term: str) -> None:
    write_study(**STUDY)
    text = _errors(pytester, "study.yaml", "-k", f"cycle=1 and {term}")
    assert text == f"-k: write size=1, with one '=' and without spaces (got {term!r})"


def test_missing_id_is_reported_with_its_bracket(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(**STUDY)
    text = _errors(pytester, "study.yaml::experiment[size=1-cycle=7]")
    assert text.startswith("not found: study.yaml::experiment[size=1-cycle=7]: the study noop has no experiment")
    assert "(did you mean 'size=1-cycle=" in text


def test_gate_without_its_option_is_reported_with_the_option(
    pytester: pytest.Pytester, write_study: WriteStudy
) -> None:
    write_study(**STUDY)
    gate = "study.yaml::regression[seconds-size=1]"
    text = _errors(pytester, gate)
    assert text == f"not found: {gate}: give the --llem-baseline or --llem-against of its run"


def test_other_missing_names_keep_message_of_pytest(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(**STUDY)
    assert _errors(pytester, "study.yaml::nothing").startswith("not found: ")


def test_part_of_a_metric_suggests_the_metric() -> None:
    assert did_you_mean("tokens_per_sec", tuple(CATALOGUE)) == " (did you mean 'output_tokens_per_second'?)"


def test_missing_folder_to_resume_from_is_an_error(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(**STUDY)
    text = _errors(pytester, "study.yaml", "--collect-only", "--llem-resume-from", "nowhere")
    assert text == f"--llem-resume-from: {pytester.path / 'nowhere'}: no such file or folder"


def test_study_with_another_name_is_pointed_out(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(**STUDY)
    (pytester.path / "broken.yaml").write_text("a: [")
    (pytester.path / "data.yaml").write_text("a: 1")
    run = pytester.runpytest_inprocess("-p", "llem", ".")
    assert run.ret == pytest.ExitCode.NO_TESTS_COLLECTED
    run.stdout.fnmatch_lines(
        [
            "llem: study.yaml looks like a study, and its name does not match llem_files: rename it to "
            "study.study.yaml, or name it: pytest study.yaml"
        ]
    )
    (pytester.path / "study.yaml").rename(pytester.path / "my study.yaml")
    run = pytester.runpytest_inprocess("-p", "llem", ".")
    run.stdout.fnmatch_lines(["llem: my study.yaml looks like *, or name it: pytest 'my study.yaml'"])


def test_studies_with_other_names_are_ignored_beside_tests(
    pytester: pytest.Pytester, write_study: WriteStudy
) -> None:
    write_study(**STUDY)
    pytester.makepyfile("def test_a(): pass")
    run = pytester.runpytest_inprocess("-p", "llem", ".")
    run.assert_outcomes(passed=1)
    run.stdout.no_fnmatch_line("*looks like a study*")


@pytest.mark.parametrize("option", ["-x", "--stepwise"])
def test_study_that_was_not_reached_leaves_no_results(
    pytester: pytest.Pytester, write_study: WriteStudy, option: str
) -> None:
    write_study(**STUDY).rename("z.study.yaml")
    pytester.makepyfile(test_a="def test_a(): assert 0")
    run = pytester.runpytest_inprocess("-p", "llem", option, "test_a.py", "z.study.yaml")
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(["noop: not started, so there are no results"])
    assert not (pytester.path / "results").exists()


def test_equal_failures_are_shown_once_with_their_count(
    pytester: pytest.Pytester, write_study: WriteStudy
) -> None:
    write_study(**STUDY | {"noop": {"fault": "raise"}})
    run = pytester.runpytest_inprocess("-p", "llem", FORKSERVER, "study.yaml")
    run.assert_outcomes(failed=4)
    (line,) = (line for line in run.outlines if line.startswith("failed 4 times: "))
    assert line.startswith("failed 4 times: exception while ")
    assert line.endswith(" and 3 more]")


@pytest.mark.parametrize(
    ("directory", "shown"), [("/a", "x/results"), ("/a/y", "../x/results"), ("/b", "/a/x/results")]
)
def test_path_is_absolute_if_only_the_root_is_shared(directory: str, shown: str) -> None:
    assert shown_from(Path(directory), Path("/a/x/results")) == Path(shown)
