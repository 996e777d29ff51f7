"""The share of equal greedy tokens of several engines in one study."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_llem.gates.verdict_text import percent
from tests.conftest import Results, RunPytest, WriteStudy

OTHER = """
from noop_engine import NoopEngine


class Other(NoopEngine):
    pass
"""


@pytest.fixture
def both(pytester: pytest.Pytester, noop_engine: None, write_study: WriteStudy) -> Callable[..., None]:
    """Write a study of two engines, whose answers are given, with greedy decoding by default."""
    pytester.makepyfile(other=OTHER)

    def write(ids: list[int], other: list[int], **fields: object) -> None:
        write_study(
            backend=["noop", "other:Other"],
            sweep=None,
            n=2,
            max_output_tokens=4,
            noop={"ids": ids},
            execution={"n_cycles": 1},
            **{"other:Other": {"ids": other}, "decoder": {"do_sample": False}, **fields},
        )

    return write


@pytest.mark.parametrize(
    ("ids", "other", "share"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0),
        ([1, 2, 3, 4], [1, 2, 9, 4], 0.5),  # what follows a difference is not the same work
        ([1, 2, 3, 4], [9, 2, 3, 4], 0.0),
    ],
)
def test_share_of_equal_tokens_is_in_result_and_summary(
    both: Callable[..., None],
    run_pytest: RunPytest,
    results: Results,
    ids: list[int],
    other: list[int],
    share: float,
) -> None:
    both(ids, other)
    run = run_pytest()
    run.assert_outcomes(passed=2)
    (found,) = results.read("study_result.json")["token_agreement"]
    assert (found["share"], found["requests"], found["tokens"]) == (share, 2, 8)
    run.stdout.fnmatch_lines([f"greedy tokens of *: {percent(share)} of 8"])


@pytest.mark.parametrize("decoder", [{"do_sample": True}, {"temperature": 0.7}])
def test_sampled_outputs_are_not_compared(
    both: Callable[..., None], run_pytest: RunPytest, results: Results, decoder: dict[str, object]
) -> None:
    both([1, 2, 3, 4], [1, 2, 3, 4], decoder=decoder)
    run_pytest().assert_outcomes(passed=2)
    assert results.read("study_result.json")["token_agreement"] == []
