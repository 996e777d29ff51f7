"""A small engine that conforms to the protocol and has every optional ability, for variants with one fault each.

It computes nothing: a token follows from the prompt or, when it samples, from the seed.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from pytest_llem.engines.protocol import BatchEngine, CacheMemory, EngineContext, ModelShape, RequestRecord
from pytest_llem.results.experiment import EngineRecord
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import EngineOptions, Needs

#: Ends a sequence if lengths are natural.
EOS = 0

#: Tokens of the chat template.
TEMPLATE = [1, 2]

Prompts = Sequence[Sequence[int]]

#: Output ids of each prompt, the time of the call, and of each step.
Generated = tuple[list[list[int]], float, list[float]]


class ConformingOptions(EngineOptions):
    batch_size: int = Field(1, ge=1)

    def needs(self, config: ExperimentConfig, parameters: int | None) -> Needs:
        return Needs(gpus=0, sequences=self.batch_size, compiles=False)


class ConformingEngine(BatchEngine):
    options: type[EngineOptions] = ConformingOptions

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        self.config = config
        self.size = config.engine_section.get("batch_size") or 1
        self.new_tokens = config.workload.output_len
        self.rng = random.Random()
        self.is_loaded = False

    def load(self) -> None:
        self.is_loaded = True

    def describe(self) -> EngineRecord:
        return EngineRecord(name="conforming", device="cpu")

    def encode(self, text: str) -> list[int]:
        return [*(TEMPLATE if self.config.prompt_format == "chat" else []), *text.encode()]

    def vocabulary(self) -> Sequence[int]:
        return range(10, 200)

    def prepare(self, prompts: Prompts) -> list[Any]:
        return [prompts[at : at + self.size] for at in range(0, len(prompts), self.size)]

    def seed(self, seed: int) -> None:
        self.rng.seed(seed)

    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        if self.config.decoder.greedy:
            ids = [(sum(prompt) + 7 * step) % 200 for step in range(count)]
        else:
            ids = self.rng.choices(range(200), k=count)
        is_natural = self.config.measurement.length_mode == "natural"
        return ids[: ids.index(EOS) + 1] if is_natural and EOS in ids else ids

    def run(self, batch: Prompts, count: int) -> Generated:
        sent = time.monotonic()
        time.sleep(1e-4)
        return [self.tokens(prompt, count) for prompt in batch], sent, [time.monotonic()] * count

    def generate(self, batch: Any) -> Generated:
        return self.run(batch, self.new_tokens)

    def generate_first(self, batch: Any) -> Generated:
        return self.run(batch, 1)

    def requests(self, batch: Any, generated: Generated) -> list[RequestRecord]:
        outputs, sent, times = generated
        pairs = zip(batch, outputs, strict=True)
        return [RequestRecord(len(prompt), ids, sent, times[: len(ids)]) for prompt, ids in pairs]

    def model_memory_bytes(self) -> int | None:
        return 4_000_000 if self.config.precision == "fp32" else 2_000_000

    def shape(self) -> ModelShape:
        return ModelShape(
            parameters=900_000,
            head_parameters=100_000,
            attention_width=64,
            kv_values_per_token=128,
            kv_bytes_per_value=2,
            weight_bytes=1_900_000,
            precision="fp32",
        )

    def cache_memory(self) -> CacheMemory:
        return CacheMemory(allocated_bytes=10_000_000, used_bytes=20_000)
