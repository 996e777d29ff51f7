"""Token counts of the real engine, for known answer and prompt lengths, compared with values by hand."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import ExperimentConfig, ExperimentOrchestrator
from pytest_llem.engines.protocol import EngineContext
from pytest_llem.engines.pytorch import engine as pytorch
from pytest_llem.engines.pytorch import loading
from pytest_llem.measurement import pass_window
from tests.support.clock import clock
from tests.support.measured import output_ids
from tests.support.tiny import GREEDY, NATURAL, TINY
from tests.support.warned import texts

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

END, PAD = 2, 0

#: A prompt's last token determines the number of tokens of its answer, the last of which is the end token.
LENGTHS = {100 + count: count for count in range(1, 7)}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the tiny model answer 50, 51, 52, …, with the length given by the prompt's last token."""
    real = loading.load_model

    def load_model(*given: Any) -> Any:
        model = real(*given)
        forward = model.forward
        wanted = []
        step = 0

        @functools.wraps(forward)
        def scripted(*args: Any, **kwargs: Any) -> Any:
            nonlocal wanted, step
            output = forward(*args, **kwargs)
            ids = kwargs["input_ids"]
            if ids.shape[1] > 1:  # the prompts
                wanted, step = [LENGTHS.get(last, 99) for last in ids[:, -1].tolist()], 0
            step += 1
            output.logits[:] = -30.0
            for row, count in enumerate(wanted):
                output.logits[row, -1, END if step == count else 49 + step] = 30.0
            return output

        model.forward = scripted
        return model

    monkeypatch.setattr(loading, "load_model", load_model)


@pytest.fixture
def token_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advance the clock with the tokens only: 10/16 s for the first, 1/16 s for each further one."""
    now = [0.0]

    class Clock(pytorch._TokenClock):
        def put(self, value: Any) -> None:
            if self._prompt_seen:
                now[0] += 1 / 16 if self.times else 10 / 16
            super().put(value)

    monkeypatch.setattr(pytorch, "_TokenClock", Clock)
    for module in (pytorch, pass_window):
        monkeypatch.setattr(module, "time", clock(lambda: now[0]))


def measured(tmp_path: Path, prompts: Any, **changes: Any) -> Any:
    """Run a whole experiment on *prompts*, given as token ids."""
    (tmp_path / "prompts.txt").write_text("x\n" * len(prompts))
    rest = iter(prompts)
    config = {**TINY, **GREEDY, "n": len(prompts), "dataset": "prompts.txt", **changes}
    orchestrator = ExperimentOrchestrator(
        ExperimentConfig.model_validate(config), context=EngineContext(), directory=tmp_path
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch.PyTorchEngine, "encode", lambda self, text: next(rest))
        return orchestrator.run()


def test_answers_that_end_at_different_steps_are_counted_exactly(tmp_path: Path, scripted: None) -> None:
    """Answers of 3, 1, 6 (its end is the sixth) and 6 tokens without an end, in one batch."""
    prompts = [[5, 6, 103], [7, 8, 101], [9, 9, 106], [9, 9, 9]]
    outcome = measured(tmp_path, prompts, measurement=NATURAL, pytorch={"batch_size": 4})
    answers = [
        [50, 51, END],
        [END],
        [50, 51, 52, 53, 54, END],
        [50, 51, 52, 53, 54, 55],
    ]
    assert [output_ids(one) for one in outcome.requests.passes[0]] == answers
    tokens = outcome.result.tokens
    assert (tokens.input_tokens, tokens.output_tokens, tokens.padding_waste) == (12, 3 + 1 + 6 + 6, 0.0)
    text = ";".join(",".join(map(str, ids)) for ids in answers)
    assert tokens.output_digest == hashlib.sha256(text.encode()).hexdigest()
    metrics = {name: one.value for name, one in outcome.result.metrics.items()}
    assert metrics["output_tokens_per_second"] == pytest.approx(16 / metrics["seconds"])
    assert metrics["energy_per_output_token_j"] == pytest.approx(metrics["energy_j"] / 16)
    assert metrics["energy_per_request_j"] == pytest.approx(metrics["energy_j"] / 4)


def test_padding_is_not_output_even_if_it_is_an_ordinary_token(tmp_path: Path, scripted: None) -> None:
    """The batch runs until its longest answer ends; the other rows are filled with padding."""
    seen = []
    real = pytorch.PyTorchEngine.requests

    def requests(self: Any, batch: Any, generated: Any) -> Any:
        seen.append(generated.output_ids.tolist())
        return real(self, batch, generated)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch.PyTorchEngine, "requests", requests)
        outcome = measured(tmp_path, [[5, 102], [5, 104]], measurement=NATURAL, pytorch={"batch_size": 2})
    assert seen == [[[50, END, PAD, PAD], [50, 51, 52, END]]]
    assert outcome.result.tokens.output_tokens == 2 + 4


def test_fixed_length_ignores_end_tokens(tmp_path: Path, scripted: None) -> None:
    outcome = measured(tmp_path, [[5, 102], [5, 104]], pytorch={"batch_size": 2})
    assert [output_ids(one) for one in outcome.requests.passes[0]] == [
        [50, END, 52, 53, 54, 55],
        [50, 51, 52, END, 54, 55],
    ]
    assert outcome.result.tokens.output_tokens == 12


def test_unequal_prompts_are_counted_without_their_padding(tmp_path: Path, scripted: None) -> None:
    """Batches of 5 and 2 tokens (10 positions), and of 1 and 4 (8)."""
    prompts = [[5, 6, 7, 8, 9], [5, 6], [5], [5, 6, 7, 8]]
    outcome = measured(tmp_path, prompts, pytorch={"batch_size": 2})
    tokens = outcome.result.tokens
    assert (tokens.input_tokens, tokens.output_tokens) == (5 + 2 + 1 + 4, 4 * 6)
    assert tokens.padding_waste == pytest.approx(1 - 12 / 18)
    assert [one.input_tokens for one in outcome.requests.passes[0]] == [5, 2, 1, 4]
    assert [[one.input_tokens for one in batch] for batch in outcome.requests.batches()] == [[5, 2], [1, 4]]


def test_cut_prompts_count_with_their_cut_length(tmp_path: Path, scripted: None) -> None:
    outcome = measured(tmp_path, [[5] * 12, [5] * 8, [5, 6]], pytorch={"batch_size": 3})
    tokens = outcome.result.tokens
    assert (tokens.input_tokens, tokens.truncated_prompts) == (8 + 8 + 2, 1)
    assert tokens.padding_waste == pytest.approx(1 - 18 / 24)
    assert "1 of 3 prompts were cut to max_input_tokens" in texts(outcome.result.warnings)


def test_latencies_of_a_row_end_with_it(tmp_path: Path, scripted: None, token_clock: None) -> None:
    """The first token comes after 625 ms, a further one every 62.5 ms; the rows end at 3, 1 and 6 tokens."""
    prompts = [[5, 6, 103], [7, 8, 101], [9, 9, 106]]
    outcome = measured(tmp_path, prompts, measurement=NATURAL, pytorch={"batch_size": 3})
    requests = outcome.requests.passes[0]
    assert [one.ttft_s for one in requests] == [0.625, 0.625, 0.625]
    assert [list(one.itl_s) for one in requests] == [[0.0625] * 2, [], [0.0625] * 5]
    assert [one.e2e_s for one in requests] == [0.75, 0.625, 0.9375]
    value = {name: one.value for name, one in outcome.result.metrics.items()}
    assert (value["ttft_p50_ms"], value["ttft_p99_ms"]) == (625, 625)
    assert (value["itl_p50_ms"], value["itl_p99_ms"]) == (62.5, 62.5)
    # of 625, 750 and 937.5 ms: the middle one, and 80 % of the way to the last
    assert (value["e2e_p50_ms"], value["e2e_p90_ms"]) == (750, pytest.approx(900))
    assert outcome.files["requests.csv"].splitlines()[2].startswith("1,1,3,1,625.0000,,,625.0000,,,")
