"""The engine pytorch: placement and quantisation of a model."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_llem.engines import shipped
from pytest_llem.engines.protocol import EngineContext, PreflightError
from pytest_llem.engines.pytorch import placement
from pytest_llem.engines.pytorch.engine import PyTorchEngine
from tests.support import torch_forks
from tests.support.marks import slow
from tests.support.tiny import GREEDY, config, decoder, engine, outputs

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the arguments of ``from_pretrained``. The model that it returns cannot be moved."""
    seen = {}
    real = transformers.AutoModelForCausalLM.from_pretrained

    def from_pretrained(location: Any, **given: Any) -> Any:
        seen.update(given)
        plain = {name: given[name] for name in ("dtype", "trust_remote_code")}
        model, found = real(location, output_loading_info=True, **plain)
        if quantised := given.get("quantization_config"):
            model.config.quantization_config = quantised
            model.is_loaded_in_4bit = quantised.load_in_4bit
            model.is_loaded_in_8bit = quantised.load_in_8bit
        monkeypatch.setattr(model, "to", lambda *args: pytest.fail("it was moved"))
        monkeypatch.setattr(model, "num_parameters", lambda: 1)  # which would ask bitsandbytes
        return model, found

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", from_pretrained)
    return seen


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
@pytest.mark.parametrize("placed", ["auto", {"model": "cpu", "lm_head": "cpu"}])
def test_device_map_changes_no_token(placed: dict[str, str] | str) -> None:
    made = engine(**GREEDY, pytorch={"device_map": placed, "batch_size": 3})
    assert outputs(made) == outputs(engine(**GREEDY, pytorch={"batch_size": 3}))
    if not torch.cuda.is_available() or placed != "auto":
        assert (list(made.gpus), made.describe().device) == ([], "cpu")


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
def test_max_memory_offloads_to_disk() -> None:
    """8 of 12 MB may be in memory. The rest is read from the disk when it is needed."""
    options = {"device_map": "auto", "max_memory": {"cpu": "8MB"}, "batch_size": 3}
    made = engine(**GREEDY, pytorch=options)
    assert outputs(made) == outputs(engine(**GREEDY, pytorch={"batch_size": 3}))
    assert set(made.describe().settings["hf_device_map"].values()) == {"cpu", "disk"}


@pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")
def test_unknown_module_in_device_map_is_reported() -> None:
    reason = r"^pytorch\.device_map: LlamaForCausalLM has no module 'lm_heads' \(did you mean 'lm_head'\?\)$"
    with pytest.raises(PreflightError, match=reason):
        engine(pytorch={"device_map": {"model": "cpu", "lm_heads": "cpu"}})


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"device_map": "auto"}, {"device_map": "auto"}),
        ({"device_map": {"model": "cpu"}}, {"device_map": {"model": "cpu"}}),
        ({"device_map": "cpu", "max_memory": {"cpu": "1GiB"}}, {"max_memory": {"cpu": "1GiB"}}),
    ],
)
def test_device_map_reaches_transformers_and_model_is_not_moved(
    options: dict[str, Any], given: dict[str, Any], loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "find_spec", lambda name: True)
    engine(pytorch=options)
    assert {name: loaded[name] for name in given} == given


def test_model_may_be_on_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, faked in torch."""
    uuids = [SimpleNamespace(uuid=f"u{index}") for index in range(2)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: uuids[index])
    monkeypatch.setattr(shipped, "find_spec", lambda name: True)

    def gpus(**options: Any) -> Any:
        return list(PyTorchEngine(config(pytorch=options), EngineContext()).gpus)

    assert gpus() == ["GPU-u0"]
    assert gpus(device_map="auto") == gpus(device_map="balanced") == ["GPU-u0", "GPU-u1"]
    assert gpus(device_map="auto", max_memory={"1": "1GiB", "cpu": "9GiB"}) == ["GPU-u1"]
    assert gpus(device_map="cuda:1") == gpus(device_map={"model": 1, "lm_head": "1"}) == ["GPU-u1"]
    assert gpus(device_map="cuda") == ["GPU-u0"]
    assert gpus(device_map={"a": 0, "b": "cuda:1", "c": "disk", "d": "cpu"}) == ["GPU-u0", "GPU-u1"]
    assert gpus(device_map="cpu") == []
    with pytest.raises(PreflightError, match=r"^pytorch\.max_memory: there is no GPU 2 \(2 visible\)$"):
        gpus(device_map="auto", max_memory={"2": "1GiB"})

    spread = SimpleNamespace(hf_device_map={"a": 1, "b": torch.device("cuda:0"), "c": "cpu", "d": "disk"})
    assert placement.used_gpus(spread) == [0, 1]


def test_offloaded_model_gets_input_on_its_execution_device() -> None:
    for place, device in ((1, "cuda:1"), ("cpu", "cpu")):
        hook = SimpleNamespace(execution_device=place)
        embeddings = SimpleNamespace(weight=torch.empty(1, device="meta"), _hf_hook=hook)
        model = SimpleNamespace(get_input_embeddings=lambda embeddings=embeddings: embeddings)
        assert placement.input_device(model) == torch.device(device)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        ({"load_in_8bit": True}, {"load_in_8bit": True, "load_in_4bit": False}),
        (
            {"load_in_4bit": True},
            {
                "bnb_4bit_quant_type": "fp4",
                "bnb_4bit_compute_dtype": "float32",
                "bnb_4bit_use_double_quant": False,
            },
        ),
        (
            {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": "bfloat16",
                "bnb_4bit_use_double_quant": True,
            },
            {
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_compute_dtype": "bfloat16",
                "bnb_4bit_use_double_quant": True,
            },
        ),
    ],
)
def test_quantisation_reaches_transformers_and_is_recorded(
    options: dict[str, Any], given: dict[str, Any], loaded: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shipped, "find_spec", lambda name: True)
    made = engine(pytorch=options)
    found = loaded["quantization_config"].to_dict()
    assert {name: found[name] for name in given} == given
    written = made.describe().settings["quantization"]
    assert {name: written[name] for name in given} == given
    assert json.loads(made.describe().model_dump_json())["settings"]["quantization"] == written


# ---- fetching ----


@pytest.mark.parametrize("name", [slow("llama"), "gpt2"])
@pytest.mark.slow
def test_model_class_is_imported_before_loading_is_timed(name: str, tmp_path: Path) -> None:
    """In a new process: this one has imported all classes."""
    if name == "gpt2":
        decoder("gpt2", n_embd=32, n_layer=1, n_head=4).save_pretrained(tmp_path / "gpt2")
    model = str(tmp_path / "gpt2") if name == "gpt2" else "builtin:tiny-llama"
    assert f"transformers.models.{name}.modeling_{name}" in torch_forks.call(
        torch_forks.classes_after_fetch, model
    )


@pytest.mark.parametrize("content", ["{}", "no json", '{"model_type": "unheard-of"}'])
def test_errors_of_a_model_are_reported_when_loading(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    made = PyTorchEngine(config(model=str(tmp_path)), EngineContext())
    made.fetch()
    with pytest.raises(PreflightError, match=r"cannot be loaded: "):
        made.load()
