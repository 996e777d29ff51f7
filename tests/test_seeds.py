"""An experiment generates the same tokens in every pass and in every process."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import run_experiment
from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.engines.pytorch import engine as pytorch
from pytest_llem.engines.pytorch.engine import PyTorchEngine
from pytest_llem.engines.tiny_llama import tiny_llama
from pytest_llem.measurement import pass_window
from pytest_llem.measurement.requests import Requests
from tests.conftest import ROOT
from tests.support.clock import clock
from tests.support.measured import output_ids
from tests.support.tiny import TINY, engine, outputs
from tests.support.warned import texts

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SEVERAL = {**TINY, "n": 5, "max_output_tokens": 4}

EXPERIMENTS = {
    f"{kind} {mode} batch {size}": {
        "decoder": decoder,
        "measurement": {"length_mode": mode, "min_window_seconds": 60},
        "pytorch": {"batch_size": size},
    }
    for kind, decoder in (("greedy", {"do_sample": False}), ("sampled", {}))
    for mode, size in (("fixed", 2), ("natural", 5))  # several batches, and one
}


def _count_seconds(patch: pytest.MonkeyPatch) -> None:
    """Replace the clock of window and engine by one that counts reads: 60 of them are several passes."""
    counter = itertools.count(step=1.0)
    for module in (pass_window, pytorch):
        patch.setattr(module, "time", clock(counter.__next__, lambda: 0.0))


def tokens(experiments: dict[str, dict[str, Any]]) -> dict[str, tuple[bool | None, str | None]]:
    """Run experiments; return, for each, whether its passes agree and the digest of its tokens."""
    found = {}
    for name, fields in experiments.items():
        with pytest.MonkeyPatch.context() as patch:
            _count_seconds(patch)
            result = run_experiment(fields)
        assert (result.window.passes or 0) > 1, name
        found[name] = result.tokens.deterministic, result.tokens.output_digest
    return found


@pytest.mark.slow
def test_another_process_and_every_pass_give_the_same_tokens() -> None:
    fields = {name: {**SEVERAL, **changes} for name, changes in EXPERIMENTS.items()}
    code = (
        "import json, sys; from tests.test_seeds import tokens; print(json.dumps(tokens(json.loads(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", code, json.dumps(fields)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    found = tokens(fields)
    assert json.loads(done.stdout.splitlines()[-1]) == {name: list(one) for name, one in found.items()}
    assert {deterministic for deterministic, _ in found.values()} == {True}
    assert found["sampled fixed batch 2"] != found["greedy fixed batch 2"]


def test_another_seed_gives_other_tokens() -> None:
    made = engine()
    first = outputs(made)
    made.seed(1)
    batches = made.prepare([[5, 6, 7, 5, 6, 7, 5, 6], [9, 9, 9, 9], [40, 41, 42]])
    other = [request for batch in batches for request in made.requests(batch, made.generate(batch))]
    assert [output_ids(one) for one in other] != first


def test_everything_random_is_seeded() -> None:
    numpy = pytest.importorskip("numpy")
    made = engine()

    def drawn(seed: int) -> tuple[float, float, float]:
        made.seed(seed)
        return random.random(), numpy.random.random(), torch.rand(1).item()

    assert drawn(3) == drawn(3)
    assert all(one != other for one, other in zip(drawn(3), drawn(4), strict=True))
    assert drawn(2**40 + 5) == drawn(2**40 + 5), "larger than NumPy's maximum seed"


@pytest.mark.filterwarnings("ignore:.* missing 1 weight of LlamaForCausalLM:UserWarning")
def test_weights_missing_in_the_files_are_initialised_identically(tmp_path: Path) -> None:
    """transformers initialises them at random, before the seed of a batch is set."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "headless"
    folder.mkdir()
    for file in tiny_llama().iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    weights = load_file(tiny_llama() / "model.safetensors")
    save_file(
        {name: one for name, one in weights.items() if name != "lm_head.weight"}, folder / "model.safetensors"
    )
    greedy = {"model": str(folder), "decoder": {"do_sample": False}, "precision": "fp32"}
    first = outputs(engine(**greedy))
    torch.rand(7)
    assert outputs(engine(**greedy)) == first
    assert outputs(engine(**greedy, random_seed=1)) != first


@pytest.mark.parametrize(
    ("passes", "deterministic"),
    [
        ([[[1, 2], [3]]], None),
        ([[[1, 2], [3]], [[1, 2], (3,)]], True),
        ([[[1, 2], [3]], [[1, 2], [3]], [[1, 2], [4]]], False),
        ([[[1, 2], [3]], [[3], [1, 2]]], False),
        ([[[1, 2]], [[1]]], False),
        ([[[1, 2], [3]], [[1, 2], None]], None),
        ([[[1, 2], None], [[1, 2], [3]], [[1, 2], [4]]], False),
    ],
)
def test_passes_are_compared_token_by_token(passes: list[Any], deterministic: bool | None) -> None:
    requests = Requests([[RequestRecord(1, ids) for ids in one] for one in passes])
    assert requests.deterministic is deterministic


def test_differing_passes_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    message = (
        "outputs differ between passes with the same seed: kernels are not deterministic, or the engine ignores "
        "the seed"
    )
    fields = {**SEVERAL, "measurement": {"min_window_seconds": 60}}
    _count_seconds(monkeypatch)
    assert message not in texts(run_experiment(fields).warnings)
    monkeypatch.setattr(PyTorchEngine, "seed", lambda self, seed: None)  # the effect of nondeterministic kernels
    result = run_experiment(fields)
    assert result.tokens.deterministic is False
    assert message in texts(result.warnings)
