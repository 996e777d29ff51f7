"""What a reader of the figures has to know beside them."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_llem.measurement.window import Window
from pytest_llem.results.experiment import EngineRecord, WarmupRecord

#: A window of fewer ticks than this is too coarse for the counter that measured it.
FEWEST_TICKS = 20


def find_warnings(
    window: Window,
    warmup: WarmupRecord | None,
    engine: EngineRecord,
    refusals: Mapping[str, str],
    *,
    allow_estimated: bool = False,
    cut: tuple[int, int] = (0, 0),
    deterministic: bool | None = None,
) -> list[str]:
    """Return what a reader of the figures has to know, a sentence each.

    Args:
        window: What was measured.
        warmup: What went before, if anything.
        engine: What ran.
        refusals: Why a meter could not be used, by its name.
        allow_estimated: An estimate of the energy is what was asked for.
        cut: How many prompts were cut to ``max_input_tokens``, and of how many.
        deterministic: Whether every pass, seeded alike, generated the same tokens; None where it was one pass.
    """
    account, total = window.account, window.account.total
    found = [f"meter {name}: {why}" for name, why in refusals.items()]
    if total.energy_j is None and not refusals:
        found.append(f"no energy: {total.reason}")
    if total.method == "estimated" and not allow_estimated:
        found.append("energy is estimated from CPU time, not measured")
    if cut[0]:
        found.append(f"{cut[0]} of {cut[1]} prompts were cut to max_input_tokens")
    if deterministic is False:
        found.append("outputs differ between passes: this device's kernels are not deterministic")
    if engine.device != "cpu" and total.boundary and "gpu_board" not in total.boundary:
        found.append(f"the engine ran on {engine.device}, and the energy covers {total.boundary} only")
    if account.tick_seconds and account.seconds and account.seconds < FEWEST_TICKS * account.tick_seconds:
        found.append(
            f"the window holds {account.seconds / account.tick_seconds:.0f} ticks of the energy counter, "
            f"fewer than {FEWEST_TICKS}: raise measurement.min_window_seconds"
        )
    if warmup is not None and warmup.converged is False:
        found.append(f"warm-up stopped after {warmup.runs} runs before latencies settled")
    if engine.random_weights:
        found.append("random weights: speed is real, power depends on the values and may differ")
    return found
