"""Effective settings: capped or ignored settings are excluded or reported."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_llem import ExperimentConfig, run_experiment
from pytest_llem.engines.models import ModelSource
from pytest_llem.engines.protocol import EngineContext, PreflightError
from pytest_llem.engines.pytorch.adjusted import adjusted_settings
from pytest_llem.engines.pytorch.engine import PyTorchEngine
from pytest_llem.measurement.orchestrator import ExperimentOrchestrator
from pytest_llem.results.experiment import ExperimentResult, Identity
from pytest_llem.study.design import StudyConfig
from pytest_llem.study.loading import load_study
from pytest_llem.study.problems import StudyError
from tests.support.tiny import NATURAL, TINY, engine
from tests.support.warned import texts


class Subclass(PyTorchEngine):
    """A user-defined engine."""


SUBCLASS = f"{__name__}:Subclass"


def load(folder: Path, text: str) -> StudyConfig:
    file = folder / "s.yaml"
    file.write_text(f"model: m\n{text}\n")
    return load_study(file)


def run(axes: dict[str, Any] | None = None, **changes: Any) -> ExperimentResult:
    identity = Identity(experiment_id="one", config_hash="0" * 16, axes=axes or {})
    return ExperimentOrchestrator(ExperimentConfig.model_validate({**TINY, **changes}), identity).run().result


def adjusted(result: ExperimentResult) -> list[tuple[str, Any, Any]]:
    return [(one.setting, one.given, one.effective) for one in result.adjusted]


class TestBatchSize:
    def test_point_with_batch_size_above_n_is_excluded(self, tmp_path: Path) -> None:
        study = load(tmp_path, "n: 8\nsweep: {pytorch.batch_size: [1, 8, 16]}")
        assert [point.id for point in study.points] == ["batch_size=1", "batch_size=8"]
        assert [(one.axes, one.reason) for one in study.excluded] == [
            ({"pytorch.batch_size": 16}, "batch_size 16 is more than n 8: no batch of a pass is that large")
        ]

    def test_batch_size_above_n_is_refused_without_a_sweep(self, tmp_path: Path) -> None:
        with pytest.raises(StudyError, match="batch_size 16 is more than n 8"):
            load(tmp_path, "n: 8\npytorch: {batch_size: 16}")
        with pytest.raises(PreflightError, match=f"{SUBCLASS}: batch_size 16 is more than n 3: no batch"):
            run_experiment({**TINY, "backend": SUBCLASS, SUBCLASS: {"batch_size": 16}})

    def test_smaller_last_batch_is_noted(self, tmp_path: Path) -> None:
        study = load(tmp_path, "n: 10\nsweep: {pytorch.batch_size: [1, 4, 5]}")
        assert [(note.line, note.where, note.message) for note in study.notes] == [
            (3, "pytorch.batch_size", "4 does not divide n 10: the last batch holds 2")
        ]

    def test_result_holds_the_batches_as_they_ran(self) -> None:
        result = run(pytorch={"batch_size": 2})
        assert result.tokens.batches == {1: 1, 2: 1}
        assert result.adjusted == []
        assert ExperimentResult.model_validate_json(result.model_dump_json()).tokens.batches == {1: 1, 2: 1}

    def test_engine_that_splits_batches_is_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Some engines split batches to fit their memory."""

        def halves(made: Any, prompts: Any) -> Any:
            return [made._batch([prompt]) for prompt in prompts]

        monkeypatch.setattr(PyTorchEngine, "prepare", halves)
        result = run(pytorch={"batch_size": 3})
        assert adjusted(result) == [("pytorch.batch_size", 3, 1)]
        assert result.warnings[0].text == (
            "setting pytorch.batch_size 3 ran as 1: this is the largest batch of a pass"
        )


class TestIdenticalPoints:
    """Points that are the same experiment under different names."""

    def test_axis_values_without_effect_make_no_points(self, tmp_path: Path) -> None:
        study = load(tmp_path, "sweep: {decoder.temperature: [0.0, 0.7], decoder.top_k: [50, 10]}")
        assert [point.id for point in study.points] == [
            "temperature=0.0-top_k=50",
            "temperature=0.7-top_k=50",
            "temperature=0.7-top_k=10",
        ]
        assert [one.reason for one in study.excluded] == [
            "decoder.top_k has no effect: the likeliest token is taken, nothing is sampled; "
            "the same point without it is decoder.temperature=0.0, decoder.top_k=50"
        ]

    def test_first_of_identical_points_is_kept_with_a_note(self, tmp_path: Path) -> None:
        study = load(tmp_path, "decoder: {do_sample: false}\nsweep: {decoder.top_k: [10, 20], n: [1, 2]}")
        assert [point.id for point in study.points] == ["top_k=10-n=1", "top_k=10-n=2"]
        assert len(study.excluded) == 2
        assert any(note.where == "decoder.top_k" for note in study.notes)

    @pytest.mark.parametrize(
        "text",
        [
            "decoder: {do_sample: false, top_k: 10}\nsweep: {decoder.min_p: [null, 0.1]}",
            "decoder: {do_sample: false, preset: creative}\nsweep: {decoder.top_p: [0.9, 0.1]}",
        ],
        ids=["beside a setting without effect", "beside a preset's value"],
    )
    def test_axis_without_effect_makes_no_second_point(self, tmp_path: Path, text: str) -> None:
        study = load(tmp_path, text)
        assert (len(study.points), len(study.excluded)) == (1, 1)

    def test_identical_listed_experiments_are_excluded(self, tmp_path: Path) -> None:
        study = load(
            tmp_path,
            "experiments:\n- {precision: fp32, warmup: {enabled: false}}\n"
            "- {precision: fp32, warmup: {enabled: false, n_warmup: 9}}\n- {precision: bf16}",
        )
        assert [point.axes["precision"] for point in study.points] == ["fp32", "bf16"]
        assert study.excluded[0].reason.startswith(
            "warmup.n_warmup has no effect with enabled: false; the same point without it"
        )

    def test_setting_without_effect_outside_the_sweep_is_only_noted(self, tmp_path: Path) -> None:
        study = load(tmp_path, "decoder: {do_sample: false, top_k: 10}\nsweep: {n: [1, 2]}")
        assert (len(study.points), study.excluded) == (2, ())


@pytest.mark.parametrize(
    ("fields", "setting", "why"),
    [
        ({"warmup": {"enabled": False, "n_warmup": 9}}, "warmup.n_warmup", "with enabled: false"),
        (
            {"warmup": {"convergence_detection": False, "max_prompts": 9}},
            "warmup.max_prompts",
            "with convergence_detection: false",
        ),
        (
            {"baseline": {"enabled": False, "duration_seconds": 9}},
            "baseline.duration_seconds",
            "with enabled: false",
        ),
        (
            {"energy": {"backend": None}, "baseline": {"duration_seconds": 9}},
            "baseline.duration_seconds",
            "a meter",
        ),
        (
            {"energy": {"backend": "estimate"}, "baseline": {"duration_seconds": 9}},
            "baseline.duration_seconds",
            "idle power is never estimated",
        ),
        (
            {"passthrough_kwargs": {"cache_config": {"nbits": 4}}},
            "passthrough_kwargs.cache_config",
            "without cache_implementation: quantized",
        ),
        (
            {"passthrough_kwargs": {"max_matching_ngram_size": 3}},
            "passthrough_kwargs.max_matching_ngram_size",
            "without prompt_lookup_num_tokens",
        ),
        ({"decoder": {"do_sample": False, "top_k": 9}}, "decoder.top_k", "nothing is sampled"),
    ],
)
def test_setting_without_effect_is_noted(tmp_path: Path, fields: dict[str, Any], setting: str, why: str) -> None:
    (note,) = load(
        tmp_path,
        "\n".join(f"{key}: {value}" for key, value in fields.items())
        .replace("None", "null")
        .replace("False", "false"),
    ).notes
    assert note.where == setting
    assert note.message.startswith("has no effect")
    assert why in note.message


class TestResult:
    def test_setting_without_effect_is_a_warning(self) -> None:
        result = run(decoder={"do_sample": False, "top_k": 10}, pytorch={"length_penalty": 2.0})
        assert adjusted(result) == [("decoder.top_k", 10, None), ("pytorch.length_penalty", 2.0, None)]
        assert "setting decoder.top_k 10 has no effect: the likeliest token is taken, nothing is sampled" in (
            texts(result.warnings)
        )

    def test_disabled_section_is_only_reported_for_axes(self) -> None:
        """Only the axis is reported, although two more settings of the section have no effect."""
        off = {"enabled": False, "n_warmup": 9, "max_prompts": 99}
        assert adjusted(run({"warmup.n_warmup": 9}, warmup=off)) == [("warmup.n_warmup", 9, None)]

    def test_section_of_a_subclass_is_checked(self) -> None:
        result = run(backend=SUBCLASS, **{SUBCLASS: {"length_penalty": 2.0, "revision": "v1"}})
        assert adjusted(result) == [
            (f"{SUBCLASS}.revision", "v1", None),
            (f"{SUBCLASS}.length_penalty", 2.0, None),
        ]

    def test_limit_that_is_never_reached_is_reported(self, tmp_path: Path) -> None:
        (tmp_path / "p.txt").write_text("a\nbb\nccc\n")
        fields: dict[str, Any] = {"dataset": str(tmp_path / "p.txt"), "max_input_tokens": 64}
        result = run({"max_input_tokens": 64}, **fields)
        ((setting, given, effective),) = adjusted(result)
        assert (setting, given) == ("max_input_tokens", 64)
        assert 0 < effective < result.tokens.input_tokens
        assert run(**fields).adjusted == [], "only axes are reported"

    def test_answers_that_all_end_early_are_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            PyTorchEngine, "requests", lambda made, batch, _: [_record(length) for length in batch.lengths]
        )
        result = run({"max_output_tokens": 6}, measurement=NATURAL)
        assert adjusted(result) == [("max_output_tokens", 6, 2)]

    def test_settings_that_ran_as_given_are_not_reported(self) -> None:
        axes = {"max_input_tokens": 8, "max_output_tokens": 6, "pytorch.batch_size": 3}
        section = {"batch_size": 3, "attn_implementation": "eager", "cache_implementation": "dynamic"}
        assert run(axes, precision="fp16", decoder={"top_k": 20}, pytorch=section).adjusted == []


def _record(length: int) -> Any:
    from pytest_llem.engines.protocol import RequestRecord

    return RequestRecord(length, [1, 2])


@pytest.fixture(scope="module")
def model() -> Any:
    return engine(precision="fp32", pytorch={"attn_implementation": "eager"})._model


class TestModel:
    """Settings that transformers changes."""

    def adjusted(self, model: Any, kind: str = "local", **changes: Any) -> list[tuple[str, Any, Any]]:
        config = ExperimentConfig.model_validate({**TINY, "precision": "fp32", **changes})
        found = adjusted_settings(model, config, ModelSource("somewhere", kind))
        return [(one.setting, one.given, one.effective) for one in found]

    def test_unchanged_settings_are_not_reported(self, model: Any) -> None:
        assert self.adjusted(model, pytorch={"attn_implementation": "eager"}) == []

    def test_changed_data_type_is_reported(self, model: Any) -> None:
        assert self.adjusted(model, precision="bf16") == [("precision", "bf16", "fp32")]

    def test_changed_attention_is_reported(self, model: Any) -> None:
        found = self.adjusted(model, pytorch={"attn_implementation": "sdpa"})
        assert found == [("pytorch.attn_implementation", "sdpa", "eager")]

    def test_revision_of_a_local_folder_is_reported(self, model: Any) -> None:
        assert self.adjusted(model, pytorch={"revision": "v1"}) == [("pytorch.revision", "v1", None)]
        assert self.adjusted(model, "hub", pytorch={"revision": "v1"}) == []

    def test_top_k_above_the_vocabulary_size_is_reported(self, model: Any) -> None:
        size = model.config.vocab_size
        assert self.adjusted(model, decoder={"top_k": size}) == []
        assert self.adjusted(model, decoder={"top_k": size + 1}) == [("decoder.top_k", size + 1, size)]
        assert self.adjusted(model, decoder={"top_k": size + 1, "temperature": 0}) == []

    def test_cache_that_the_model_does_not_support_is_reported(
        self, model: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(type(model), "_supports_default_dynamic_cache", classmethod(lambda cls: False))
        found = self.adjusted(model, pytorch={"cache_implementation": "static"})
        assert found == [("pytorch.cache_implementation", "static", None)]

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, [("precision", "fp32", "gptq")]),
            ({"load_in_4bit": True}, [("pytorch.load_in_4bit", True, None)]),
            (
                {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
                [("pytorch.load_in_4bit", True, None), ("pytorch.bnb_4bit_quant_type", "nf4", None)],
            ),
        ],
    )
    def test_quantised_files_are_reported(self, model: Any, monkeypatch: Any, options: Any, expected: Any) -> None:
        quantised = SimpleNamespace(to_json_string=lambda **_: '{"quant_method": "gptq", "bits": 4}')
        monkeypatch.setattr(model.config, "quantization_config", quantised, raising=False)
        assert self.adjusted(model, pytorch=options) == expected


def test_seeds_of_more_than_32_bits_differ() -> None:
    made = PyTorchEngine(ExperimentConfig.model_validate(TINY), EngineContext())
    drawn = []
    for seed in (5, 5 + 2**32, 5 + 2**62):
        made.seed(seed)
        drawn.append(torch.rand(1).item())
    assert len(set(drawn)) == 3
