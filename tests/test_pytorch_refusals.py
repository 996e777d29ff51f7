"""Settings that the engine pytorch refuses: in one line, and as early as possible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pytest_llem import run_experiment
from pytest_llem.engines import shipped
from pytest_llem.engines.library_errors import library_errors_as_preflight
from pytest_llem.engines.protocol import EngineContext, PreflightError
from pytest_llem.engines.pytorch.engine import PyTorchEngine
from pytest_llem.engines.shipped import unmet_by_pytorch
from pytest_llem.engines.tiny_llama import tiny_llama
from tests.support.marks import slow
from tests.support.tiny import config, engine, outputs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"pytorch": {"num_processes": 2}}, "pytorch.num_processes 2 is not supported yet: leave it at 1"),
        (
            {"pytorch": {"load_in_4bit": True}},
            "pytorch.load_in_4bit needs bitsandbytes and accelerate: pip install bitsandbytes accelerate",
        ),
        (
            {"pytorch": {"load_in_8bit": True}},
            "pytorch.load_in_8bit needs bitsandbytes and accelerate: pip install bitsandbytes accelerate",
        ),
        ({"pytorch": {"device_map": "auto"}}, "pytorch.device_map needs accelerate: pip install accelerate"),
        (
            {"pytorch": {"attn_implementation": "flash_attention_2"}},
            "pytorch.attn_implementation 'flash_attention_2' needs flash-attn or kernels: pip install flash-attn",
        ),
        (
            {"pytorch": {"attn_implementation": "flash_attention_3"}},
            "pytorch.attn_implementation 'flash_attention_3' needs flash-attn-3 or kernels: "
            "pip install flash-attn-3",
        ),
        (
            {"pytorch": {"cache_implementation": "paged"}},
            "pytorch.cache_implementation 'paged' is for continuous batching, which is not supported: "
            "leave it out",
        ),
        (
            {"pytorch": {"cache_implementation": "quantized"}},
            "pytorch.cache_implementation 'quantized' needs optimum-quanto: pip install optimum-quanto",
        ),
        (
            {
                "pytorch": {"cache_implementation": "quantized"},
                "passthrough_kwargs": {"cache_config": {"backend": "hqq"}},
            },
            "pytorch.cache_implementation 'quantized' needs hqq: pip install hqq",
        ),
        (
            {"pytorch": {"attn_implementation": "owner/kernel"}},
            "pytorch.attn_implementation 'owner/kernel' needs kernels: pip install kernels",
        ),
        (
            {"pytorch": {"attn_implementation": "paged|sdpa"}},
            "pytorch.attn_implementation 'paged|sdpa' is for continuous batching, which is not supported",
        ),
        ({"passthrough_kwargs": {"max_length": 3}}, "passthrough_kwargs.max_length: use max_output_tokens"),
        ({"passthrough_kwargs": {"temperature": 3}}, "passthrough_kwargs.temperature: use decoder.temperature"),
        ({"passthrough_kwargs": {"num_beams": 3}}, "passthrough_kwargs.num_beams: use pytorch.num_beams"),
        ({"passthrough_kwargs": {"batch_size": 3}}, "passthrough_kwargs.batch_size: use pytorch.batch_size"),
        (
            {"passthrough_kwargs": {"num_return_sequences": 2}},
            "passthrough_kwargs.num_return_sequences cannot be given: every prompt must have one answer, or "
            "metrics per request would be wrong",
        ),
        (
            {"passthrough_kwargs": {"eos_token_id": 2}},
            "passthrough_kwargs.eos_token_id cannot be given: the model and measurement.length_mode set it",
        ),
    ],
)
def test_unmet_requirements_are_known_without_loading(
    changes: dict[str, Any], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "find_spec", lambda name: None)
    assert list(unmet_by_pytorch(config(**changes))) == [sentence]
    with pytest.raises(PreflightError) as caught:
        run_experiment(config(**changes))
    assert str(caught.value) == sentence


def test_all_missing_requirements_are_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "find_spec", lambda name: None)
    both = config(pytorch={"num_processes": 2}, passthrough_kwargs={"stop_strings": "a", "top_k": 1})
    assert len(list(unmet_by_pytorch(both))) == 3
    with pytest.raises(PreflightError) as caught:
        PyTorchEngine(both, EngineContext())
    assert str(caught.value) == "; ".join(unmet_by_pytorch(both))


def test_option_with_its_packages_has_no_unmet_requirement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "find_spec", lambda name: name)
    options = {
        "load_in_4bit": True,
        "device_map": "auto",
        "attn_implementation": "flash_attention_2",
        "cache_implementation": "quantized",
    }
    assert list(unmet_by_pytorch(config(pytorch=options))) == []
    assert list(unmet_by_pytorch(config())) == []


def test_passthrough_arguments_with_a_field_are_refused() -> None:
    for name in shipped.GENERATION_FIELDS:
        assert len(list(unmet_by_pytorch(config(passthrough_kwargs={name: 1})))) == 1
    known = set(vars(transformers.GenerationConfig()))
    assert set(shipped.SET_BY_ENGINE) <= known, "and none that transformers does not know anyway"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"passthrough_kwargs": {"tipical_p": 0.5}},
            r"passthrough_kwargs\.tipical_p: transformers' generate has no such argument "
            r"\(did you mean 'typical_p'\?\)",
        ),
        (
            {"passthrough_kwargs": {"suppress_tokens": 5}},
            r"generate cannot do .* \(passthrough_kwargs\.suppress_tokens: 5\): 'int' object is not iterable",
        ),
        (
            {"passthrough_kwargs": {"typical_p": 0.5}, "decoder": {"do_sample": False}},
            r"generate cannot do .*`typical_p`: `do_sample` is not set to `True`",
        ),
        (
            {"pytorch": {"cache_implementation": "nope"}},
            r"generate cannot do .*Invalid `cache_implementation` \(nope\)",
        ),
        ({"pytorch": {"device_map": "nonsense"}}, r"pytorch\.device_map: Expected one of cpu, cuda, .*: nonsense"),
        (
            {"pytorch": {"device_map": "cuda:77"}},
            r"pytorch\.device_map: there is no GPU 77 \(\d+ visible\)",
        ),
    ],
)
def test_refused_generation_config_is_reported_before_fetching(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "find_spec", lambda name: True)
    with pytest.raises(PreflightError, match=f"^{message}") as caught:
        PyTorchEngine(config(**changes), EngineContext())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"typical_p": "x"}, r"\(passthrough_kwargs\.typical_p: 'x'\): '<' not supported between .*"),
        ({"prefill_chunk_size": "x"}, r"\(passthrough_kwargs\.prefill_chunk_size: 'x'\): .* not str"),
        (
            {"renormalize_logits": True, "suppress_tokens": ["x"]},
            r"\(passthrough_kwargs\.renormalize_logits: true, passthrough_kwargs\.suppress_tokens: \['x'\]\): .*",
        ),
    ],
)
def test_value_of_a_wrong_type_is_reported_with_its_argument(given: dict[str, Any], message: str) -> None:
    """transformers finds it when it generates, in most cases without the argument's name."""
    with pytest.raises(
        PreflightError, match=f"^generate cannot do what the experiment asks for {message}$"
    ) as caught:
        outputs(engine(passthrough_kwargs=given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"attn_implementation": "nope"},
            r'cannot be loaded: Specified `attn_implementation="nope"` is not supported',
        ),
        ({"attn_implementation": "flash_attention_4"}, r"cannot be loaded: FlashAttention4 .* installed"),
        (
            {"prompt_lookup_num_tokens": 2, "use_cache": False},
            r"^generate cannot do .* requires (`use_cache=True`|a cache)$",
        ),
    ],
)
def test_later_errors_of_transformers_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PreflightError, match=message) as caught:
        outputs(engine(pytorch=options))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"torch_compile_mode": "nope"},
            r"^pytorch\.torch_compile: Unrecognized mode=nope, should be one of: default",
        ),
        slow({"torch_compile_backend": "nope"}, r"^pytorch\.torch_compile: Invalid backend: 'nope'"),
    ],
)
def test_unknown_compile_mode_is_reported_in_one_line(options: dict[str, str], message: str) -> None:
    with pytest.raises(PreflightError, match=message):
        engine(pytorch={"torch_compile": True, **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_inductor_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    message = r"^pytorch\.torch_compile needs a C\+\+ compiler, and there is no no-such-compiler: install one$"
    with pytest.raises(PreflightError, match=message):
        PyTorchEngine(config(pytorch={"torch_compile": True}), EngineContext())
    assert PyTorchEngine(
        config(pytorch={"torch_compile": True, "torch_compile_backend": "eager"}), EngineContext()
    )
    assert PyTorchEngine(config(), EngineContext())


def test_model_with_own_code_is_refused_unless_trusted(tmp_path: Path) -> None:
    for file in tiny_llama().iterdir():
        if file.name != "config.json":
            (tmp_path / file.name).symlink_to(file)
    own = json.loads((tiny_llama() / "config.json").read_text()) | {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
    }
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "own.py").write_text("raise AssertionError('was run')")
    with pytest.raises(PreflightError, match=r"cannot be loaded: .*trust_remote_code"):
        engine(model=str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_offloaded_cache_without_gpu_is_refused() -> None:
    with pytest.raises(PreflightError, match="'offloaded' needs a GPU"):
        engine(pytorch={"cache_implementation": "offloaded"})


def test_folder_without_model_is_reported_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match=f"^model '{tmp_path}' cannot be loaded: "):
        engine(model=str(tmp_path))


def test_unexpected_error_keeps_its_type() -> None:
    with pytest.raises(ValueError, match="invalid literal"), library_errors_as_preflight("it"):
        int("x")  # raised by no library of theirs
    with pytest.raises(ValueError, match="ours"), library_errors_as_preflight("it"):
        raise ValueError("ours")
