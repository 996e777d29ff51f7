"""What may be said about a load: whether it was steady, and which metric a default gate judges."""

from __future__ import annotations

import random
from heapq import heappop, heappush

import pytest

from pytest_llem.gates.regression import compare
from pytest_llem.machine.attached_server import is_this_host
from pytest_llem.measurement.load_search import next_load
from pytest_llem.results.points import PointResult
from pytest_llem.serving.answers import Answer
from pytest_llem.serving.checks import check_steady
from pytest_llem.serving.client import SentRequest
from pytest_llem.serving.errors import NotSteadyError
from pytest_llem.study.gates import GatesConfig
from pytest_llem.study.load import SearchConfig
from tests.support.study_results import point, study_result


def queue(rate: float, seconds: float, *, seed: int, slots: int = 16, service: float = 5.0) -> list[SentRequest]:
    """Return the requests of a server with *slots*, each of which serves one in about *service* s."""
    rng = random.Random(seed)
    free, at = [0.0] * slots, 0.0
    sent: list[SentRequest] = []
    while (at := at + rng.expovariate(rate)) < seconds:
        ended = max(at, heappop(free)) + service * rng.uniform(0.8, 1.2)
        heappush(free, ended)
        answer = Answer(due=at, max_tokens=1)
        answer.sent = at
        sent.append(SentRequest(len(sent), 0, answer, ended))
    return sent


def is_steady(rate: float, began: float, seconds: float, seed: int) -> bool:
    """Return whether a window of a load on 16 slots is steady. They serve 3.2 requests/s."""
    try:
        check_steady(queue(rate, began + seconds, seed=seed), began, began + seconds)
    except NotSteadyError:
        return False
    return True


@pytest.mark.parametrize(("seconds", "missed"), [(10.0, 4), (30.0, 0)])
def test_gross_overload_is_found_in_short_windows_too(seconds: float, missed: int) -> None:
    assert sum(is_steady(8.0, 12.0, seconds, seed) for seed in range(20)) <= missed


def test_overload_is_reported_with_both_rates() -> None:
    sent, began, ended = queue(8.0, 42.0, seed=1), 12.0, 42.0
    with pytest.raises(NotSteadyError) as caught:
        check_steady(sent, began, ended)
    words = str(caught.value).split()
    rates = [float(words[words.index(word) - 1]) for word in ("requests/s", "served:")]
    offered = sum(began <= one.sent <= ended for one in sent)
    served = sum(began <= one.ended <= ended for one in sent)
    assert rates == pytest.approx([offered / 30, served / 30], rel=0.01)


def test_load_within_the_capacity_is_steady() -> None:
    assert all(is_steady(2.0, 20.0, 30.0, seed) for seed in range(20))


@pytest.mark.parametrize("is_whole", [True, False])
def test_search_tries_at_most_the_loads_that_its_deadline_has(is_whole: bool) -> None:
    search = SearchConfig(low=2, high=100, precision=0.05)
    tried = []
    for limit in range(1, 110):
        number, within, beyond = 0, None, None
        while (load := next_load(search, within, beyond, is_whole=is_whole)) is not None:
            number += 1
            within, beyond = (load, beyond) if load <= limit else (within, load)
        tried.append(number)
    assert search.max_loads - 1 <= max(tried) <= search.max_loads


def loaded(itl: list[float] | None) -> PointResult:
    metrics = {"ttft_p99_ms": [10.0, 10.1, 9.9], "tpot_p99_ms": [5.0, 5.1, 4.9]}
    return point(
        {"load.rate": 4.0},
        config={"load": {"rate": 4.0, "slo": None}},
        **metrics,
        **({} if itl is None else {"itl_p99_ms": itl}),
    )


def judged(candidate: PointResult, reference: PointResult) -> list[str]:
    found = compare(study_result(candidate), study_result(reference), GatesConfig(), name="main").verdicts
    return [one.metric for one in found]


def test_default_gates_of_a_rate_judge_tails_and_tpot_if_itl_is_unknown() -> None:
    itl = [6.0, 6.1, 5.9]
    assert judged(loaded(itl), loaded(itl)) == ["energy_per_output_token_j", "ttft_p99_ms", "itl_p99_ms"]
    assert judged(loaded(None), loaded(itl)) == ["energy_per_output_token_j", "ttft_p99_ms", "tpot_p99_ms"]


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", True),
        ("http://localhost:8000", True),
        ("http://[::1]:8000", True),
        ("http://192.0.2.1:8000", False),
        ("http://no-such-host.invalid", False),
    ],
)
def test_only_servers_of_this_host_are_measured(url: str, expected: bool) -> None:
    assert is_this_host(url) is expected
