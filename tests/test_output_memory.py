"""Outputs of passes do not stay on the device, where they would count in peak_memory_mb."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_llem.energy.account import Account, Total
from pytest_llem.engines.pytorch.engine import Generated
from pytest_llem.measurement.quality_warnings import on_device, pass_warnings
from tests.support.measured import pass_window
from tests.support.tiny import GREEDY, PROMPTS, engine
from tests.support.warned import texts

ON_GPU = SimpleNamespace(is_cuda=True)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["streamed", "beams"])
@pytest.mark.parametrize("first", [False, True], ids=["whole", "prefill"])
def test_engine_keeps_new_tokens_alone_on_the_host(options: dict[str, Any], first: bool) -> None:
    made = engine(**GREEDY, pytorch={"batch_size": 3, **options})
    (batch,) = made.prepare(PROMPTS)
    generated = (made.generate_first if first else made.generate)(batch)
    new = generated.output_ids
    assert new.shape == (3, 1 if first else 6)
    assert new.device.type == "cpu"
    assert new.untyped_storage().nbytes() == new.numel() * 4, "no prompt is kept with it"
    assert not on_device(generated)


def test_outputs_leave_the_device_before_generate_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    made = engine(**GREEDY, pytorch={"batch_size": 3})
    copied: list[Any] = []

    class OnGpu(torch.Tensor):  # type: ignore[misc]  # untyped there
        """Records the device that it is copied to."""

        def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            copied.append(args[0])
            return super().to(*args, **kwargs).as_subclass(torch.Tensor)

    generate = made._model.generate
    monkeypatch.setattr(made._model, "generate", lambda **given: generate(**given).as_subclass(OnGpu))
    (batch,) = made.prepare(PROMPTS)
    assert type(made.generate(batch).output_ids) is torch.Tensor
    assert copied == ["cpu"]


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (ON_GPU, True),
        ([1, (2, {"ids": ON_GPU})], True),
        (Generated(ON_GPU, 0.0, []), True),
        (Generated(torch.zeros(1), 0.0, []), False),
        ((1.0, 2.0), False),
        ("text", False),
        (None, False),
    ],
)
def test_tensor_on_a_gpu_is_found(returned: Any, expected: bool) -> None:
    assert on_device(returned) is expected


def test_engine_that_leaves_outputs_on_the_gpu_is_a_warning() -> None:
    account = Account((), Total(1.0, "measured", "nvml_total_energy", "gpu_board"), 1.0, tick_seconds=0.01)
    found = [
        [*texts(pass_warnings(pass_window([[one]] * 7, 1.0, account)))]
        for one in (SimpleNamespace(ids=ON_GPU), SimpleNamespace(ids=[1, 2]))
    ]
    assert found == [
        ["peak_memory_mb includes the outputs of 7 passes: what the engine's generate returns is on the GPU"],
        [],
    ]
