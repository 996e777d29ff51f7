"""Warnings of transformers reach the result, or the model is refused: pytest hides those of passing tests."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import ExperimentConfig, ExperimentOrchestrator, run_experiment
from pytest_llem.engines.models import context_length
from pytest_llem.engines.protocol import PreflightError
from pytest_llem.engines.tiny_llama import tiny_llama
from pytest_llem.measurement.library_warnings import MAX_CHARACTERS, MAX_WARNINGS, library_warnings
from tests.conftest import NOOP_STUDY
from tests.support.tiny import TINY, decoder, engine
from tests.support.warned import texts

pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., str]:
    """Save a tiny model: its weights as *change* returns them, and its config.json with changes."""
    from safetensors.torch import save_file

    def make(change: Callable[[dict[str, Any]], dict[str, Any]] = dict, kind: str = "llama", **fields: Any) -> str:
        model = decoder(kind, vocab_size=300, tie_word_embeddings=False)
        model.save_pretrained(tmp_path)
        for file in tiny_llama().glob("tokenizer*"):
            shutil.copy(file, tmp_path)
        weights = {name: tensor.contiguous() for name, tensor in change(model.state_dict()).items()}
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        config = tmp_path / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))
        return str(tmp_path)

    return make


# ---- weights ----


def test_missing_weights_mark_the_result_as_one_of_random_weights(save: Callable[..., str]) -> None:
    model = save(lambda weights: {name: one for name, one in weights.items() if "layers.1" not in name})
    with pytest.warns(UserWarning, match="are missing"):
        result = run_experiment({**TINY, "model": model})
    assert result.engine.random_weights is True
    expected = (
        f"the files of model {model!r} are missing 9 weights of LlamaForCausalLM, now random: "
        "model.layers.1.input_layernorm.weight, model.layers.1.mlp.down_proj.weight, "
        "model.layers.1.mlp.gate_proj.weight and 6 more"
    )
    assert expected in texts(result.warnings)
    assert "random weights: speed is real, power depends on the values and may differ" in texts(result.warnings)


def test_model_without_any_weights_is_refused(save: Callable[..., str]) -> None:
    model = save(lambda weights: {f"student.{name}": one for name, one in weights.items()})
    reason = r"none of the 21 weights of LlamaForCausalLM is in its files, which hold student\.lm_head\.weight"
    with pytest.raises(PreflightError, match=reason):
        engine(model=model)


def test_weights_of_another_shape_are_refused_by_name(save: Callable[..., str]) -> None:
    reason = "its files have 2 weights of another shape than config.json: lm_head.weight is 300×32 and not 299×32"
    with pytest.raises(PreflightError, match=reason):
        engine(model=save(vocab_size=299))


def test_unused_weights_are_a_warning(save: Callable[..., str]) -> None:
    model = save(lambda weights: {**weights, "vision.weight": weights["lm_head.weight"] + 1})
    with pytest.warns(UserWarning, match="does not use"), library_warnings() as found:
        made = engine(model=model)
    assert found == [
        f"the files of model {model!r} have 1 weight that LlamaForCausalLM does not use: vision.weight"
    ]
    assert made.describe().random_weights is False


def test_long_text_that_will_be_cut_is_no_warning(save: Callable[..., str], tmp_path: Path) -> None:
    model = save()
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": 4}))
    with library_warnings() as found:
        assert len(engine(model=model).encode("hello world")) > 4
    assert found == []


def test_complete_model_has_no_warning(save: Callable[..., str]) -> None:
    with library_warnings() as found:
        made = engine(model=save())
        made.generate(made.prepare([[5, 6, 7]])[0])
    assert found == []
    assert made.describe().random_weights is False


# ---- encoders ----


@pytest.mark.parametrize("kind", ["bert", "roformer", "xlm"])
def test_an_encoder_is_refused(kind: str, save: Callable[..., str]) -> None:
    with pytest.raises(PreflightError, match=r"is an encoder \(\w+\), whose tokens depend on later ones: name a"):
        engine(model=save(kind=kind))


def test_encoder_trained_as_a_decoder_is_accepted(save: Callable[..., str]) -> None:
    assert engine(model=save(kind="bert", is_decoder=True)).describe().name == "pytorch"


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt_neox_japanese", "cpmant", "gpt2"])
def test_decoder_is_not_refused_as_an_encoder(kind: str, save: Callable[..., str]) -> None:
    """For any configuration, and also a model with causal attention only in answers, such as CPM-Ant."""
    assert engine(model=save(kind=kind)).describe().name == "pytorch"


# ---- context ----


def test_a_prompt_beyond_the_context_is_refused_before_anything_starts(
    save: Callable[..., str], pytester: pytest.Pytester
) -> None:
    study = {**TINY, "name": "long", "model": save(), "max_input_tokens": 120, "max_output_tokens": 9}
    (pytester.path / "study.yaml").write_text(json.dumps(study))
    found = pytester.runpytest_inprocess("-p", "llem", "study.yaml")
    found.stdout.fnmatch_lines(
        ["*takes 128 tokens, and a prompt of 120 with max_output_tokens 9 is 129: lower max_input_tokens*"]
    )
    assert found.ret != 0


def test_prompts_are_refused_by_their_longest_length(save: Callable[..., str]) -> None:
    model = save()
    lengths = {"n": 3, "input_len": {"min": 100, "max": 200}, "output_len": 6}
    made = engine(model=model, dataset=lengths)
    assert len(made.prepare([[5] * 122])) == 1
    with pytest.raises(
        PreflightError, match="takes 128 tokens, and a prompt of 123 with max_output_tokens 6 is 129"
    ):
        made.prepare([[5], [5] * 123])


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({}, None),
        ({"max_position_embeddings": -1}, None),
        ({"max_position_embeddings": 1000, "rope_scaling": {"type": "linear", "factor": 4.0}}, 4000),
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 1000,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            8000,
        ),
        (
            {  # Gemma 3, whose stated length includes the factor
                "model_type": "gemma3_text",
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
            131072,
        ),
    ],
)
def test_the_context_is_the_stated_one_stretched_as_its_embeddings_are(
    config: dict[str, Any], length: int | None
) -> None:
    assert context_length(config) == length


# ---- warnings of libraries ----


def test_warnings_of_libraries_reach_the_result(noop_engine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, also in a process's second experiment, and from a logger that does not propagate."""
    import noop_engine as package

    logger = logging.getLogger("somelib.loading")
    monkeypatch.setattr(logger, "propagate", False)

    def load(self: Any) -> None:
        for _ in range(2):
            logger.warning("weights of %s\nare old", "x")
            logger.info("loading")
            logging.getLogger("huggingface_hub.utils").warning("requests without a token are slower")
            warnings.warn("a slow kernel is used", UserWarning, stacklevel=1)
            warnings.warn("use something else", DeprecationWarning, stacklevel=1)

    monkeypatch.setattr(package.NoopEngine, "load", load)
    fields = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}
    fields |= {"baseline": {"enabled": False}, "energy": {"backend": None}}
    config = ExperimentConfig.model_validate(fields)
    for _ in range(2):
        with pytest.warns(UserWarning, match="a slow"), pytest.warns(DeprecationWarning, match="use some"):
            result = ExperimentOrchestrator(config).run().result
        found = texts(one for one in result.warnings if one.code != "contended")
        assert found == ["somelib: weights of x are old", "tests: a slow kernel is used"]


def test_log_record_with_wrong_arguments_does_not_raise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)  # or pytest's handler, unlike others, raises
    with library_warnings() as found:
        logging.getLogger("somelib").warning("%d weights are old", "many")
    assert found == ["somelib: %d weights are old"]


def test_number_of_library_warnings_is_limited() -> None:
    before = logging.getLogRecordFactory()
    with library_warnings() as found:
        for number in range(99):
            logging.getLogger("talks").warning("%s %s", number, "x" * 9999)
    assert len(found) == MAX_WARNINGS
    assert {len(one) for one in found} == {MAX_CHARACTERS}
    assert logging.getLogRecordFactory() is before
