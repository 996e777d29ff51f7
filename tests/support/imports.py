"""Result files of load generators: real ones, and made-up ones of ``vllm bench serve``."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

#: Results that the tools wrote, with their versions in the names. Paths and texts were shortened.
GOLDEN = Path(__file__).parents[1] / "golden" / "imports"


def vllm_result(
    *, requests: int = 16, slots: int = 4, tokens: int = 8, step: float = 0.01, seed: int = 0, **more: Any
) -> dict[str, Any]:
    """Return the result of a closed loop: a token takes about *step* seconds, the first 5 times as long."""
    rng = random.Random(seed)
    free = [0.001 * slot for slot in range(slots)]
    starts, ttfts, itls = [], [], []
    for _ in range(requests):
        slot = free.index(min(free))
        starts.append(100 + free[slot])
        ttfts.append(5 * step * rng.uniform(0.98, 1.02))
        itls.append([step * rng.uniform(0.98, 1.02) for _ in range(tokens - 1)])
        free[slot] += ttfts[-1] + sum(itls[-1])
    duration = max(free)
    return {
        "date": "20260131-120000",
        "backend": "vllm",
        "model_id": "smol",
        "tokenizer_id": "smol",
        "num_prompts": requests,
        "request_rate": "inf",
        "burstiness": 1.0,
        "max_concurrency": slots,
        "duration": duration,
        "completed": requests,
        "failed": 0,
        "total_input_tokens": 16 * requests,
        "total_output_tokens": tokens * requests,
        "request_throughput": requests / duration,
        "output_throughput": tokens * requests / duration,
        "input_lens": [16] * requests,
        "output_lens": [tokens] * requests,
        "ttfts": ttfts,
        "itls": itls,
        "latencies": [ttft + sum(gaps) for ttft, gaps in zip(ttfts, itls, strict=True)],
        "start_times": starts,
        "errors": [""] * requests,
        **more,
    }


def write_vllm(file: Path, **more: Any) -> Path:
    """Write a made-up result of :func:`vllm_result` to *file*, and return it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(vllm_result(**more)), encoding="utf-8")
    return file
