"""Inputs that similar projects silently misread, according to their issue trackers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from huggingface_hub import constants

from pytest_llem import ExperimentConfig
from pytest_llem.engines.protocol import BatchEngine, PreflightError
from pytest_llem.planning.inputs import CurrentInputs
from pytest_llem.results.experiment import ExperimentResult, InputsRecord
from pytest_llem.study.loading import load_study
from pytest_llem.study.problems import StudyError
from pytest_llem.workload.datasets import read_file
from pytest_llem.workload.prompts import Texts, build_workload, prompts_digest
from tests.conftest import Results, RunPytest, WriteStudy
from tests.support.load_studies import write_load_study
from tests.support.marks import slow

GOLDEN = Path(__file__).parent / "golden" / "1.0" / "experiments"

#: Commits of a dataset on the hub.
MEASURED, LATER = "a" * 40, "b" * 40


class TestHubDatasetOfAnotherCommit:
    """datasets#6465: an updated dataset with results of the earlier version."""

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
        """Return a function that adds a commit of ``owner/prompts`` to the hub's cache as its main branch."""
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        folder = tmp_path / "hub" / "datasets--owner--prompts"

        def put(commit: str) -> None:
            (folder / "snapshots" / commit).mkdir(parents=True)
            (folder / "snapshots" / commit / "train.csv").write_text("text\none\n")
            (folder / "refs").mkdir(exist_ok=True)
            (folder / "refs" / "main").write_text(commit)

        return put

    @pytest.fixture
    def changes(self, write_study: WriteStudy) -> Callable[[str], list[str]]:
        """Return a function that returns the changes since a result of a dataset was measured."""
        result = ExperimentResult.model_validate_json(min(GOLDEN.glob("*.json")).read_text())
        result.inputs = InputsRecord(modules={}, distributions={})
        result.tokens.dataset_revision = MEASURED

        def ask(dataset: str) -> list[str]:
            study = load_study(write_study(dataset=dataset, sweep={"n": [1]}))
            return CurrentInputs(study, [], []).changes(result, study.points[0].config)

        return ask

    def test_result_of_the_cached_commit_is_current(
        self, cache: Callable[[str], None], changes: Callable[[str], list[str]]
    ) -> None:
        cache(MEASURED)
        assert changes("owner/prompts") == []

    def test_result_of_an_earlier_commit_has_changed(
        self, cache: Callable[[str], None], changes: Callable[[str], list[str]]
    ) -> None:
        cache(MEASURED)
        cache(LATER)
        assert changes("owner/prompts") == [
            "dataset 'owner/prompts' was revision aaaaaaaaaaaa in the cache, is revision bbbbbbbbbbbb now"
        ]
        assert changes(f"owner/prompts@{MEASURED}") == []

    def test_result_of_a_dataset_that_is_not_cached_has_changed(
        self, cache: Callable[[str], None], changes: Callable[[str], list[str]]
    ) -> None:
        assert changes("owner/prompts") == [
            "dataset 'owner/prompts' was revision aaaaaaaaaaaa in the cache, is missing now"
        ]


class TestConversations:
    @pytest.mark.parametrize(("measured", "changes"), [("one\nthree", 0), ("one\nother", 1)])
    def test_unchanged_conversations_of_a_load_are_current(
        self, tmp_path: Path, measured: str, changes: int
    ) -> None:
        """The hash of a load's result is that of all turns."""
        messages = [("human", "one"), ("gpt", "two"), ("human", "three")]
        line = {"conversations": [{"from": who, "value": text} for who, text in messages]}
        (tmp_path / "talks.jsonl").write_text(json.dumps(line))
        result = ExperimentResult.model_validate_json(min(GOLDEN.glob("*.json")).read_text())
        result.inputs = InputsRecord(modules={}, distributions={})
        result.tokens.dataset_hash = prompts_digest([measured])
        study = load_study(write_load_study(tmp_path, dataset="talks.jsonl"))
        current = CurrentInputs(study, [], [], knows_packages=False)
        assert len(current.changes(result, study.points[0].config)) == changes


class TestNumbersOfAnotherBase:
    """pyyaml#107: numbers with a leading 0 are read in base 8, with 0b in base 2, and with colons in base 60."""

    @pytest.mark.parametrize(
        ("written", "read"),
        [("010", "8"), ("-0_17", "-15"), ("0b10", "2"), ("1:30", "90"), ("1:00:00", "3600"), ("1:30.5", "90.5")],
    )
    def test_a_number_that_is_not_decimal_is_refused(
        self, write_study: WriteStudy, written: str, read: str
    ) -> None:
        path = write_study()
        path.write_text(path.read_text() + f"noop: {{level: {written}}}\n")
        with pytest.raises(StudyError) as refused:
            load_study(path)
        assert f"must be written in decimal, or in quotes as text (got {written}, which YAML reads as {read})" in (
            str(refused.value)
        )

    def test_numbers_with_one_meaning_in_all_yaml_versions_are_accepted(self, write_study: WriteStudy) -> None:
        path = write_study(sweep={"n": [1]})
        path.write_text(path.read_text() + "noop: {a: 0, b: 00, c: 0.5, d: 007.5, e: '010', f: 0x10, g: 1_000}\n")
        given = load_study(path).points[0].config.model_dump()["noop"]
        assert given == {"a": 0, "b": 0, "c": 0.5, "d": 7.5, "e": "010", "f": 16, "g": 1000}


class TestPromptsWithoutText:
    def test_objects_with_a_blank_prompt_are_left_out(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"prompt": ""}\n{"text": " \\n"}\n{"prompt": "one"}\n')
        assert [prompt.text for prompt in read_file("a.jsonl", tmp_path)] == ["one"]

    def test_prompt_without_tokens_is_refused(self) -> None:
        class NoZeroWidth:
            takes_texts = False

            def encode(self, text: str) -> list[int]:
                return list(text.replace("\u200b", "").encode())

        config = ExperimentConfig.model_validate({"model": "m", "dataset": "a.txt", "n": 2})
        with pytest.raises(
            PreflightError, match=r"^dataset 'a.txt': the tokenizer returns no tokens .* '\\u200b'"
        ):
            build_workload(config, cast(BatchEngine, NoZeroWidth()), Texts(["one", "\u200b"]))


class TestFilesOfOtherEncodings:
    @pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
    def test_utf_16_text_is_refused(self, tmp_path: Path, name: str, encoding: str) -> None:
        (tmp_path / name).write_bytes('{"prompt": "one"}\n'.encode(encoding))
        with pytest.raises(PreflightError, match=r":1: holds a NUL character, .*: save the file as UTF-8$"):
            read_file(name, tmp_path)

    def test_byte_order_marks_in_concatenated_files_are_removed(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\r\n\xef\xbb\xbf\n")
        assert [prompt.text for prompt in read_file("a.txt", tmp_path)] == ["one", "two"]


#: conftest.py that edits the prompts after the first experiment.
EDITING = """
from pathlib import Path

def pytest_llem_experiment_finished(result):
    Path(__file__).with_name("prompts.txt").write_text("three\\nfour\\n")
"""


@pytest.mark.parametrize("edited", [True, slow(False)])
def test_points_with_different_prompts_of_a_dataset_are_reported(
    write_study: WriteStudy, run_pytest: RunPytest, results: Results, edited: bool
) -> None:
    path = write_study(
        dataset="prompts.txt",
        execution={"n_cycles": 1, "cycle_order": "sequential"},
        sweep={"noop.size": [1, 2, 3]},
    )
    path.with_name("prompts.txt").write_text("one\ntwo\n")
    if edited:
        path.with_name("conftest.py").write_text(EDITING)
    run_pytest().assert_outcomes(passed=3)
    found = [one for one in results.study_result["warnings"] if one["code"] == "inputs_differ"]
    assert [(one["text"].partition(":")[0], one["experiments"]) for one in found] == (
        [("dataset 'prompts.txt' was not the same in all experiments", ["size=1"])] if edited else []
    )


def test_results_directory_not_encodable_in_the_locale_is_reported(
    write_study: WriteStudy, run_pytest: RunPytest, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(name="ünï", sweep={"n": [1]}, execution={"n_cycles": 1})
    mkdir = os.mkdir

    def in_ascii(path: Any, *rest: Any) -> None:
        os.fspath(path).encode("ascii")
        mkdir(path, *rest)

    monkeypatch.setattr(os, "mkdir", in_ascii)
    found = run_pytest()
    assert found.ret == pytest.ExitCode.USAGE_ERROR
    found.stderr.fnmatch_lines(["ERROR: *results: results cannot be written: 'ascii' codec can't encode *"])
