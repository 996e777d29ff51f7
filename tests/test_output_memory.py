"""Peak memory: of the window alone, and without outputs of passes that stay on the device."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pytest_llem import run_experiment
from pytest_llem.energy.account import Account, Total
from pytest_llem.engines import process_memory
from pytest_llem.engines.process_memory import peak_rss_bytes, reset_peak_rss
from pytest_llem.engines.pytorch.engine import Generated
from pytest_llem.measurement.quality_warnings import on_device, pass_warnings
from tests.support.marks import slow
from tests.support.measured import pass_window
from tests.support.tiny import GREEDY, PROMPTS, TINY, engine
from tests.support.warned import texts

ON_GPU = SimpleNamespace(is_cuda=True)

MUCH = 100_000_000


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


def _take(size: int) -> None:
    """Allocate the given bytes for a moment; they return to the kernel at once."""
    memory = bytearray(size)
    memory[::4096] = b"x" * len(memory[::4096])


def test_peak_memory_is_that_since_the_reset() -> None:
    assert reset_peak_rss()
    before = _peak()
    _take(MUCH)
    assert before + 0.9 * MUCH < _peak() < before + 1.5 * MUCH
    assert reset_peak_rss()
    assert _peak() < before + 0.5 * MUCH, "what there was before does not count"


def _peak() -> int:
    peak = peak_rss_bytes()
    assert peak is not None
    return peak


@pytest.mark.parametrize("missing", ["_CLEAR_REFS", slow("_STATUS")])
def test_peak_memory_is_unknown_without_the_kernels_counter(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    """The peak of the whole process, including the load, is not that of the window."""
    monkeypatch.setattr(process_memory, missing, tmp_path / "nowhere" / "file")
    found = run_experiment(TINY).metrics["peak_memory_mb"]
    assert (found.value, found.reason) == (None, "the engine does not report it")
