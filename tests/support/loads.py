"""Make points of servers under load from a few figures."""

from __future__ import annotations

from typing import Any

from pytest_llem.results.points import PointResult
from pytest_llem.results.serving import LoadRecord, ProbeRecord
from pytest_llem.study.load import LoadConfig
from tests.support.study_results import point

SLO = {"ttft_ms": 200, "tpot_ms": 50}


def load_point(
    load: dict[str, Any], attainment: float | None = None, cost: float = 1.0, *, speed: float = 100.0, **more: Any
) -> PointResult:
    """Return a point of a server with three cycles.

    Args:
        load: The section ``load`` of its study.
        attainment: Its ``slo_attainment``; None if it is not known.
        cost: J per output token, and per good one with an SLO.
        speed: Output tokens per second.
        more: ``axes`` in addition to that of the load, ``spread`` of the energies over cycles (relative, default
            1 %), and fields of a PointResult.
    """
    config = LoadConfig.model_validate(load)
    (name,) = (one for one in ("concurrency", "rate", "trace") if load.get(one) is not None)
    axes = {f"load.{name}": load[name], **more.pop("axes", {})}
    spread = more.pop("spread", 0.01)
    costs = [cost * (1 - spread), cost, cost * (1 + spread)]
    of_slo = {"slo_attainment": [attainment] * 3, "goodput_rps": [speed / 32 * (attainment or 0)] * 3}
    return point(
        axes,
        **{
            "config": {"precision": "bf16", "load": config.model_dump(mode="json")},
            "config_hash": f"{abs(hash(str(axes))):016x}"[:16],
            "seconds": [1.0, 1.1, 1.2],
            "output_tokens_per_second": [speed * 0.99, speed, speed * 1.01],
            "energy_per_output_token_j": costs,
            "ttft_p50_ms": [speed / 10] * 3,
            "ttft_p90_ms": [speed / 9] * 3,
            "ttft_p99_ms": [speed / 8] * 3,
            "tpot_p50_ms": [4.0] * 3,
            "tpot_p90_ms": [4.5] * 3,
            "tpot_p99_ms": [5.0] * 3,
            **({"energy_per_good_token_j": costs, **of_slo} if config.slo else {}),
            **more,
        },
    )


def load_record(load: float, probes: list[tuple[float, float]] | None = None) -> LoadRecord:
    """Return the record of a closed loop that found *load*; *probes* are loads and their attainments."""
    return LoadRecord(
        kind="closed",
        concurrency=int(load),
        ramp_seconds=0.1,
        drain_seconds=0.1,
        sent=100,
        prompts=100,
        due=90,
        failed=0,
        probes=[
            ProbeRecord(
                load=at,
                attainment=attainment,
                within_slo=attainment >= 0.99,
                window_seconds=1.0,
                output_tokens_per_second=70.0 * at,
                energy_per_output_token_j=1 / at,
            )
            for at, attainment in probes or ()
        ],
    )
