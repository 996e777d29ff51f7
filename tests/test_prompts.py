"""The prompts of a pass: which ones a file gives, in which order, and what is wrong with a file."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from pytest_llem import ExperimentConfig, ExperimentOrchestrator
from pytest_llem.backends.protocol import PreflightError
from pytest_llem.measurement.prompts import dataset_problem, read_texts
from tests.conftest import NOOP_STUDY

SOURCED = [
    ("a1", "A"),
    ("a2", "A"),
    ("a3", "A"),
    ("b1", "B"),
    ("a4", "A"),
    ("c1", None),
    ("b2", "B"),
    ("c2", None),
]


def config(**changes):
    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    return ExperimentConfig.model_validate({**fields, **changes})


@pytest.fixture
def texts(tmp_path):
    """Read ``n`` prompts of a file in an order."""

    def read(rows, n, order="interleaved", name="prompts.jsonl", **changes):
        lines = [json.dumps({"prompt": text} | ({"source": source} if source else {})) for text, source in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return read_texts(config(dataset=name, dataset_order=order, n=n, **changes), tmp_path)

    return read


def test_a_text_file_holds_a_prompt_a_line(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\n  \ntwo \nthree\n")
    for order in ("interleaved", "grouped"):
        assert read_texts(config(dataset="prompts.txt", n=2, dataset_order=order), tmp_path) == ["one", "two "]


def test_a_jsonl_file_holds_a_prompt_an_object(tmp_path):
    lines = ['{"prompt": "abc\u2028d", "text": "no"}', "", '{"text": "de", "id": 3, "source": null}', "\r"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    assert read_texts(config(dataset="prompts.jsonl", n=2), tmp_path) == ["abc\u2028d", "de"]


@pytest.mark.parametrize("dataset", ["synthetic", {"n": 2}])
def test_synthetic_prompts_are_no_texts(dataset, tmp_path):
    assert read_texts(config(dataset=dataset), tmp_path) is None
    assert dataset_problem(config(dataset=dataset), tmp_path) is None


def test_interleaved_takes_from_each_source_in_turn(texts):
    assert texts(SOURCED, 8) == ["a1", "b1", "c1", "a2", "b2", "c2", "a3", "a4"]
    assert texts(SOURCED, 4) == ["a1", "b1", "c1", "a2"]


def test_without_sources_the_order_is_the_files(texts):
    rows = [(str(number), None) for number in range(5)]
    assert texts(rows, 4) == texts(rows, 4, "grouped") == ["0", "1", "2", "3"]


def test_grouped_takes_the_same_prompts_source_by_source(texts):
    assert texts(SOURCED, 4, "grouped") == ["a1", "a2", "b1", "c1"]
    assert texts(SOURCED, 7, "grouped") == ["a1", "a2", "a3", "b1", "b2", "c1", "c2"]
    for n in range(1, 9):
        assert Counter(texts(SOURCED, n, "grouped")) == Counter(texts(SOURCED, n))


def test_shuffled_draws_with_the_seed(texts):
    rows = [(str(number), "A" if number % 2 else "B") for number in range(50)]
    drawn = texts(rows, 10, "shuffled", random_seed=1)
    assert drawn == texts(rows, 10, "shuffled", random_seed=1)
    assert drawn != texts(rows, 10, "shuffled", random_seed=2)
    assert len(set(drawn)) == 10
    assert set(drawn) <= {text for text, _ in rows}
    assert any(int(text) >= 10 for text in drawn), "drawn from the whole file, and not the first ten in disorder"


WRONG = [
    ("prompts.csv", "a", r"dataset 'prompts.csv': expected 'synthetic', or a .txt or .jsonl file"),
    ("owner/name", None, r"dataset 'owner/name': expected .* \(no dataset of the Hugging Face hub\)"),
    ("missing.txt", None, r"dataset 'missing.txt' cannot be read: .*No such file"),
    ("~nobody-of-that-name/a.txt", None, r"dataset '~nobody-of-that-name/a.txt' cannot be read: "),
]


@pytest.mark.usefixtures("noop_engine")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *WRONG,
        ("few.txt", "one\n", r"dataset 'few.txt' holds 1 prompts, and the experiment asks for n: 2"),
        ("bad.jsonl", '{"prompt": "a"}\n{"answer": 1}\n', r"bad.jsonl:2: expected a JSON object with a string"),
        ("bad.jsonl", "[1]\n", r"bad.jsonl:1: expected a JSON object"),
        ("bad.jsonl", '\n{"text": "a", "source": 1}\n', r"bad.jsonl:2: expected a string under 'source'"),
        ("latin.txt", b"\xff\n", r"dataset 'latin.txt' cannot be read: .*decode"),
    ],
)
def test_a_dataset_that_cannot_be_used_is_one_clear_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    phases = []
    with pytest.raises(PreflightError, match=message) as told:
        ExperimentOrchestrator(config(dataset=name), directory=tmp_path, on_phase=phases.append).run()
    assert "\n" not in str(told.value)
    assert phases == [], "before an engine is even made"


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_a_wrong_dataset_is_known_without_reading_it(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(PreflightError, match=message) as told:
        read_texts(config(dataset=name), tmp_path)
    assert dataset_problem(config(dataset=name), tmp_path) == str(told.value)


def test_a_dataset_that_is_there_has_no_problem(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff")  # which is for reading it to find
    assert dataset_problem(config(dataset="a.txt"), tmp_path) is None
    assert dataset_problem(config(dataset=str(tmp_path / "a.txt")), tmp_path / "elsewhere") is None
