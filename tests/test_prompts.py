"""The prompts of a pass: their lengths, their order, and errors in files of prompts."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import ExperimentConfig, ExperimentOrchestrator, run_experiment
from pytest_llem.engines.protocol import PreflightError
from pytest_llem.isolation.worker import FETCHING
from pytest_llem.study.dataset import LengthConfig
from pytest_llem.study.identity import config_hash
from pytest_llem.workload import prompts
from pytest_llem.workload.datasets import Prompt
from pytest_llem.workload.prompts import (
    build_workload,
    dataset_problem,
    other_prompts,
    prompts_digest,
    read_texts,
)
from tests.conftest import NOOP_STUDY
from tests.support.narrow import not_none
from tests.support.tiny import TINY

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


def config(**changes: Any) -> Any:
    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    return ExperimentConfig.model_validate({**fields, **changes})


@pytest.fixture
def texts(tmp_path: Path) -> Callable[..., Any]:
    """Read ``n`` prompts of a file in a given order."""

    def read(rows: Any, n: Any, order: str = "interleaved", name: str = "prompts.jsonl", **changes: Any) -> Any:
        lines = [json.dumps({"prompt": text} | ({"source": source} if source else {})) for text, source in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return not_none(read_texts(config(dataset=name, dataset_order=order, n=n, **changes), tmp_path)).prompts

    return read


def test_text_file_has_one_prompt_per_line(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\n\n  \ntwo \nthree\n")
    for order in ("interleaved", "grouped"):
        found = not_none(read_texts(config(dataset="prompts.txt", n=2, dataset_order=order), tmp_path))
        assert (found.prompts, found.revision) == (["one", "two "], None)


def test_jsonl_file_has_one_prompt_per_object(tmp_path: Path) -> None:
    lines = ['{"prompt": "abc\u2028d", "text": "no"}', "", '{"text": "de", "id": 3, "source": null}', "\r"]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    assert not_none(read_texts(config(dataset="prompts.jsonl", n=2), tmp_path)).prompts == ["abc\u2028d", "de"]


@pytest.mark.parametrize("dataset", ["synthetic", {"n": 2}])
def test_synthetic_prompts_have_no_texts(dataset: dict[str, int] | str, tmp_path: Path) -> None:
    assert read_texts(config(dataset=dataset), tmp_path) is None
    assert dataset_problem(config(dataset=dataset), tmp_path) is None


def test_interleaved_alternates_between_sources(texts: Callable[..., Any]) -> None:
    assert texts(SOURCED, 8) == ["a1", "b1", "c1", "a2", "b2", "c2", "a3", "a4"]
    assert texts(SOURCED, 4) == ["a1", "b1", "c1", "a2"]


def test_order_is_the_files_without_sources(texts: Callable[..., Any]) -> None:
    rows = [(str(number), None) for number in range(5)]
    assert texts(rows, 4) == texts(rows, 4, "grouped") == ["0", "1", "2", "3"]


def test_grouped_orders_the_same_prompts_by_source(texts: Callable[..., Any]) -> None:
    assert texts(SOURCED, 4, "grouped") == ["a1", "a2", "b1", "c1"]
    assert texts(SOURCED, 7, "grouped") == ["a1", "a2", "a3", "b1", "b2", "c1", "c2"]
    for n in range(1, 9):
        assert Counter(texts(SOURCED, n, "grouped")) == Counter(texts(SOURCED, n))


def test_shuffled_uses_the_seed(texts: Callable[..., Any]) -> None:
    rows = [(str(number), "A" if number % 2 else "B") for number in range(50)]
    drawn = texts(rows, 10, "shuffled", random_seed=1)
    assert drawn == texts(rows, 10, "shuffled", random_seed=1)
    assert drawn != texts(rows, 10, "shuffled", random_seed=2)
    assert len(set(drawn)) == 10
    assert set(drawn) <= {text for text, _ in rows}
    assert any(int(text) >= 10 for text in drawn), "drawn from the whole file, and not the first ten in disorder"


@pytest.mark.parametrize(("kind", "number"), [("repeated", 4), ("distinct", 8)])
def test_load_takes_the_prompts_in_the_files_order(tmp_path: Path, kind: str, number: int) -> None:
    lines = [json.dumps({"prompt": text, "source": source}) for text, source in SOURCED]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    load = {"backend": "server", "server": {"url": "http://127.0.0.1:9"}, "load": {"rate": 1, "prompts": kind}}
    experiment = ExperimentConfig.model_validate({**load, "model": "m", "dataset": "prompts.jsonl", "n": 4})
    found = not_none(read_texts(experiment, tmp_path)).prompts
    assert found == [text for text, _ in SOURCED[:number]]


WRONG = [
    (
        "prompts.csv",
        "a",
        r"dataset 'prompts.csv': expected 'synthetic', 'aienergyscore', a .txt or .jsonl file, or owner/name of "
        r"the Hugging Face hub",
    ),
    ("gsm8k", None, r"dataset 'gsm8k': expected "),
    ("a/b/c/d", None, r"dataset 'a/b/c/d': expected "),
    ("missing.txt", None, r"dataset 'missing.txt' cannot be read: .*No such file"),
    ("~nobody-of-that-name/a.txt", None, r"dataset '~nobody-of-that-name/a.txt' cannot be read: "),
]


@pytest.mark.usefixtures("noop_engine")
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        *WRONG,
        ("few.txt", "one\n", r"dataset 'few.txt' has 1 prompt, but the experiment needs n: 2"),
        ("bad.jsonl", '{"prompt": "a"}\n{"answer": 1}\n', r"bad.jsonl:2: expected a JSON object with a string"),
        ("bad.jsonl", "[1]\n", r"bad.jsonl:1: expected a JSON object"),
        ("bad.jsonl", '\n{"text": "a", "source": 1}\n', r"bad.jsonl:2: expected a string under 'source'"),
        ("latin.txt", b"\xff\n", r"latin.txt:1: is not UTF-8 .*: save the file as UTF-8"),
    ],
)
def test_unusable_dataset_is_reported_in_one_line(
    tmp_path: Path, name: str, content: bytes | str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    phases: list[object] = []
    with pytest.raises(PreflightError, match=message) as caught:
        ExperimentOrchestrator(config(dataset=name), directory=tmp_path, on_progress=phases.append).run()
    assert "\n" not in str(caught.value)
    assert phases == [], "before an engine is even made"


@pytest.mark.parametrize(("name", "content", "message"), WRONG)
def test_wrong_dataset_is_detected_without_reading_it(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(PreflightError, match=message) as caught:
        read_texts(config(dataset=name), tmp_path)
    assert dataset_problem(config(dataset=name), tmp_path) == str(caught.value)


def test_existing_dataset_has_no_problem(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")  # which is for reading it to find
    assert dataset_problem(config(dataset="a.txt"), tmp_path) is None
    assert dataset_problem(config(dataset=str(tmp_path / "a.txt")), tmp_path / "elsewhere") is None


# ---- synthetic prompts ----


class Vocabulary:
    """The part of an engine that synthetic prompts need."""

    takes_texts = False

    def vocabulary(self) -> Any:
        return range(3, 259)

    def encode(self, text: Any) -> Any:
        return [*text.encode()]


ENGINE: Any = Vocabulary()


def workload(dataset: Any, **changes: Any) -> Any:
    return build_workload(config(dataset=dataset, **changes), ENGINE, None)


def lengths(dataset: Any, **changes: Any) -> Any:
    return [len(prompt) for prompt in workload(dataset, **changes).prompts]


def test_prompts_have_equal_lengths_without_a_distribution() -> None:
    made = workload({"n": 3, "input_len": 4, "seed": 7})
    assert [len(prompt) for prompt in made.prompts] == [4, 4, 4]
    # The seed must give the same prompts as in older versions, as results are compared with older ones.
    assert made.prompts[0] == [85, 41, 169, 21]


def test_lengths_are_normally_distributed_and_clipped() -> None:
    spread = {"mean": 100, "stdev": 20, "min": 70, "max": 140}
    found = lengths({"n": 20_000, "input_len": spread})
    normal = statistics.NormalDist(100, 20)
    assert (min(found), max(found)) == (70, 140)
    # Of 20,000 the share has a standard error of 0.0018 here: five of them.
    for bound in (85, 100, 115):
        share = sum(one <= bound for one in found) / len(found)
        assert share == pytest.approx(normal.cdf(bound + 0.5), abs=0.018)
    assert found.count(70) / len(found) == pytest.approx(normal.cdf(70.5), abs=0.01), (
        "clipped, and not drawn again"
    )


def test_lengths_with_bounds_only_are_uniform() -> None:
    count = Counter(lengths({"n": 20_000, "input_len": {"min": 5, "max": 9}}))
    assert sorted(count) == [5, 6, 7, 8, 9]
    assert all(one == pytest.approx(4000, abs=300) for one in count.values())


def test_lengths_are_equal_on_every_machine() -> None:
    normal = {"n": 8, "input_len": {"mean": 50, "stdev": 12.5}, "seed": 3}
    assert lengths(normal) == NORMAL
    assert lengths({"n": 8, "input_len": {"min": 1, "max": 1000}, "seed": 3}) == UNIFORM
    assert lengths({**normal, "n": 4}) == NORMAL[:4], "fewer prompts are the first of more"
    assert lengths({**normal, "seed": 4}) != NORMAL
    del normal["seed"]
    assert lengths(normal, random_seed=3) == NORMAL


NORMAL = [51, 66, 66, 56, 54, 50, 36, 48]
UNIFORM = [244, 794, 490, 893, 196, 32, 545, 419]


def test_mean_without_spread_is_a_fixed_length() -> None:
    assert set(lengths({"n": 5, "input_len": {"mean": 9, "stdev": 0}})) == {9}


@pytest.mark.parametrize(
    ("given", "least", "most"),
    [
        ({"mean": 100, "stdev": 10}, 50, 150),
        ({"mean": 100, "stdev": 10.5, "max": 120}, 48, 120),
        ({"mean": 10, "stdev": 10, "min": None}, 1, 60),
        ({"min": 4, "max": 4}, 4, 4),
    ],
)
def test_longest_possible_prompt_is_the_experiments_length(given: dict[str, Any], least: int, most: int) -> None:
    made = config(dataset={"input_len": given}, max_input_tokens=7)
    assert made.max_input_tokens == made.workload.input_len == most
    written = made.model_dump(mode="json")["dataset"]["input_len"]
    assert (written["min"], written["max"]) == (least, most)
    assert config_hash(made) == config_hash(config(dataset={"input_len": written}))


def test_distribution_changes_the_config_hash() -> None:
    hashes = {
        config_hash(config(dataset={"n": 4, "input_len": one}))
        for one in (9, {"min": 1, "max": 9}, {"min": 2, "max": 9}, {"mean": 5, "stdev": 1, "max": 9})
    }
    assert len(hashes) == 4


def test_config_hash_without_distribution_is_unchanged() -> None:
    assert config_hash(config(dataset={"n": 4, "input_len": 9})) == HASH


HASH = "05d94ff2b8a40677"


@pytest.mark.parametrize("stdev", [-1, float("nan"), float("inf"), "1"])
def test_invalid_spread_is_refused(stdev: float | str) -> None:
    with pytest.raises(ValueError, match="stdev"):
        LengthConfig.model_validate({"mean": 5, "stdev": stdev})


@pytest.mark.usefixtures("noop_engine")
def test_prompts_of_many_lengths_reach_the_engine() -> None:
    dataset = {"n": 6, "input_len": {"min": 2, "max": 30}, "seed": 1}
    result = ExperimentOrchestrator(config(dataset=dataset)).run().result
    assert result.tokens.input_tokens == sum(lengths(dataset))
    assert result.tokens.truncated_prompts == 0


def test_engine_of_texts_warms_up_with_token_ids_of_synthetic_prompts() -> None:
    class OfTexts(Vocabulary):
        takes_texts = True

    engine: Any = OfTexts()
    synthetic = config(dataset={"n": 3, "input_len": 4})
    warm = other_prompts(synthetic, engine, build_workload(synthetic, engine, None), "warm-up")
    assert [len(prompt) for prompt in warm] == [4, 4, 4]
    assert {token for prompt in warm for token in prompt} <= set(engine.vocabulary())


# ---- their digest ----


def test_digest_depends_on_the_prompts_and_their_order(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "na\\u00efve"}\n{"prompt": "two\\nlines"}\n')
    texts = read_texts(config(dataset="a.jsonl", n=2), tmp_path)
    made = build_workload(config(dataset="a.jsonl", n=2, max_input_tokens=3), ENGINE, texts)
    lines = b'"na\\u00efve"\n"two\\nlines"\n'
    assert made.digest == hashlib.sha256(lines).hexdigest() == TEXTS
    assert made.truncated == 2, "before they are cut"
    assert prompts_digest(["a", "b"]) != prompts_digest(["b", "a"])
    assert prompts_digest(["ab"]) != prompts_digest(["a", "b"])
    assert prompts_digest(["\ud800"]), "what JSON lets a text be, and UTF-8 does not"


TEXTS = "2ff092b77ff140445b2ccafe74edb69bc728306cd09c4ac0827d54990361640a"


def test_digest_of_token_ids() -> None:
    assert prompts_digest([[1, 2], [3]]) == hashlib.sha256(b"[1,2]\n[3]\n").hexdigest()
    assert workload({"n": 3, "input_len": 4, "seed": 7}).digest == SYNTHETIC


SYNTHETIC = "8f13815a9da0399c7fa16d2058f5b990fa94a8dfa426550581f308a5cf03b5f6"


@pytest.mark.slow
def test_digest_is_in_the_result() -> None:
    result = run_experiment({**TINY, "dataset": {"n": 2, "input_len": {"min": 3, "max": 9}}})
    assert result.tokens.dataset_hash == IN_RESULT
    assert result.tokens.dataset_revision is None


IN_RESULT = "f7d9d5fc242396055cce38037fe0b8ad65d5e55717b5972f6c66b74a7bc2705f"


@pytest.mark.usefixtures("noop_engine")
def test_fetching_a_dataset_does_not_count_towards_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "hub_problem", lambda dataset: None)
    monkeypatch.setattr(prompts, "fetch_dataset", lambda dataset: Path("c0ffee"))
    monkeypatch.setattr(prompts, "read_dataset", lambda dataset, folder: [Prompt("one"), Prompt("two")])
    phases: list[str] = []
    note = lambda progress: phases.append(progress.phase)  # noqa: E731
    result = ExperimentOrchestrator(config(dataset="owner/name"), on_progress=note).run().result
    assert phases[:2] == ["fetching the dataset", "fetching the model"]
    assert set(phases) & set(FETCHING) == set(FETCHING)
    assert result.tokens.dataset_revision == "c0ffee"
