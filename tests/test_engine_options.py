"""Unknown options of an engine are refused. A subclass of an engine has its parent's options."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field

from pytest_llem import ExperimentConfig, run_experiment
from pytest_llem.engines.options import check_options
from pytest_llem.engines.protocol import EngineContext, PreflightError
from pytest_llem.engines.pytorch.engine import PyTorchEngine
from pytest_llem.study.engines import PyTorchConfig
from tests.support.tiny import TINY


class Plain(PyTorchEngine):
    """A subclass without options of its own."""


class LevelOptions(PyTorchConfig):
    """The options of ``pytorch``, and one more."""

    level: int = Field(1, ge=0)


class WithOptions(PyTorchEngine):
    """A subclass with an option of its own."""

    options = LevelOptions

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        super().__init__(config, context)
        self.level = LevelOptions.from_config(config).level


class Bare:
    """An engine without options."""


PLAIN = f"{__name__}:Plain"
WITH_OPTIONS = f"{__name__}:WithOptions"


def config(backend: str, section: dict[str, Any], **changes: Any) -> ExperimentConfig:
    return ExperimentConfig.model_validate({**TINY, "backend": backend, backend: section, **changes})


def test_subclass_takes_the_options_of_its_parent_under_its_own_section() -> None:
    one, three = (run_experiment({**TINY, "backend": PLAIN, PLAIN: {"batch_size": size}}) for size in (1, 3))
    of_parent = run_experiment({**TINY, "pytorch": {"batch_size": 3}})
    assert three.tokens.output_digest == of_parent.tokens.output_digest
    assert one.tokens.output_digest != three.tokens.output_digest  # sampled by the batch


def test_every_option_of_the_parent_reaches_the_subclass() -> None:
    section = {"use_cache": False, "num_beams": 2, "trust_remote_code": True, "deterministic": False}
    made = Plain(config(PLAIN, section), EngineContext())
    assert made._options == PyTorchEngine(config("pytorch", section), EngineContext())._options
    assert made._generation.num_beams == 2


def test_subclass_adds_options_of_its_own() -> None:
    given = config(WITH_OPTIONS, {"level": 3, "batch_size": 2})
    check_options(WithOptions, given)
    made = WithOptions(given, EngineContext())
    assert (made.level, made._options.batch_size) == (3, 2)


@pytest.mark.parametrize(
    ("backend", "section", "message"),
    [
        (
            PLAIN,
            {"batchsize": 8},
            f"{PLAIN}.batchsize: the engine has no such option (did you mean 'batch_size'?)",
        ),
        (
            PLAIN,
            {"level": 3, "batchsize": 8},
            f"{PLAIN}.level: the engine has no such option (there are: attn_implementation, ",
        ),
        (
            WITH_OPTIONS,
            {"lvel": 3},
            f"{WITH_OPTIONS}.lvel: the engine has no such option (did you mean 'level'?)",
        ),
        (PLAIN, {"batch_size": 0}, f"{PLAIN}.batch_size: must be at least 1 (got 0)"),
        (PLAIN, {"batch_size": "8"}, f"{PLAIN}.batch_size: must be a whole number (got '8')"),
        (WITH_OPTIONS, {"level": -1}, f"{WITH_OPTIONS}.level: must be at least 0 (got -1)"),
        (WITH_OPTIONS, {"batch_size": 99}, f"{WITH_OPTIONS}: batch_size 99 is more than n "),
        (
            PLAIN,
            {"cache_implementation": "static", "use_cache": False},
            f"{PLAIN}: cache_implementation 'static' needs use_cache: true",
        ),
    ],
)
def test_unknown_option_is_refused_with_its_location(backend: str, section: dict[str, Any], message: str) -> None:
    with pytest.raises(PreflightError) as refused:
        run_experiment({**TINY, "backend": backend, backend: section})
    assert str(refused.value).startswith(message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("section", "passthrough", "message"),
    [
        ({"num_processes": 2}, {}, "num_processes 2 is not supported yet"),
        ({"device_map": "nonsense"}, {}, "device_map: Expected one of"),
        ({"device_map": {"": 77}}, {}, "device_map: there is no GPU 77"),
        (
            {"device_map": {"": "cpu", "lm_heads": "cpu"}},
            {},
            "device_map: LlamaForCausalLM has no module 'lm_heads'",
        ),
        ({"cache_implementation": "paged"}, {}, "cache_implementation 'paged' is for continuous batching"),
        ({"torch_compile": True}, {}, "torch_compile needs a C++ compiler"),
        ({"torch_compile": True, "torch_compile_backend": "x"}, {}, "torch_compile: Invalid backend"),
        ({}, {"num_beams": 2}, "num_beams"),
        ({}, {"compile_config": 2}, "torch_compile"),
    ],
)
def test_refusal_by_the_parent_names_the_section_of_the_subclass(
    section: dict[str, Any], passthrough: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(PreflightError) as refused:
        run_experiment({**TINY, "backend": PLAIN, PLAIN: section, "passthrough_kwargs": passthrough or None})
    assert f"{PLAIN}.{message}" in str(refused.value)
    assert "pytorch." not in str(refused.value)


def test_engine_without_options_has_none() -> None:
    backend = f"{__name__}:Bare"
    with pytest.raises(PreflightError) as refused:
        check_options(
            Bare, config(backend, {"level": 3, "unset": None}, passthrough_kwargs={"guidance_scale": 2.0})
        )
    assert str(refused.value) == (
        f"{backend}.level: the engine has no such option "
        "(it has none: an engine names the class of its options as options); "
        f"passthrough_kwargs: engine {backend!r} does not read them: leave them out"
    )
    with pytest.raises(PreflightError, match="lora is not supported yet"):
        check_options(Bare, config(backend, {}, lora={"adapter_id": "a/b"}))
    check_options(Bare, config(backend, {}))


def test_wrong_options_do_not_fail_the_preload() -> None:
    Plain.preload(config(PLAIN, {"batch_size": 0}), EngineContext())
