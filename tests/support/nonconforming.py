"""Variants of the conforming engine, each with one fault that the conformance suite finds."""

from __future__ import annotations

import mmap
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict

from pytest_llem.engines.protocol import CacheMemory, EngineContext, ModelShape, RequestRecord
from pytest_llem.study.config import ExperimentConfig
from tests.support.conforming import ConformingEngine, ConformingOptions, Generated


class FailsToLoad(ConformingEngine):
    def load(self) -> None:
        raise OSError("there is no such file")


class OneTokenLess(ConformingEngine):
    """Ends early, though it has to generate a fixed number of tokens."""

    def generate(self, batch: Any) -> Generated:
        is_fixed = self.config.measurement.length_mode == "fixed"
        return self.run(batch, self.new_tokens - is_fixed)


class NoRecordOfTheLast(ConformingEngine):
    def requests(self, batch: Any, generated: Generated) -> list[RequestRecord]:
        return super().requests(batch, generated)[:-1]


class RecordsReversed(ConformingEngine):
    def requests(self, batch: Any, generated: Generated) -> list[RequestRecord]:
        return super().requests(batch, generated)[::-1]


class CountsPadding(ConformingEngine):
    def requests(self, batch: Any, generated: Generated) -> list[RequestRecord]:
        longest = max(map(len, batch))
        return [replace(record, input_tokens=longest) for record in super().requests(batch, generated)]


class TooFewPositions(ConformingEngine):
    def positions(self, batch: Any) -> int:
        return 1


class OtherClock(ConformingEngine):
    def requests(self, batch: Any, generated: Generated) -> list[RequestRecord]:
        outputs, sent, times = generated
        ahead = time.time() - time.monotonic()
        return super().requests(batch, (outputs, sent + ahead, [one + ahead for one in times]))


class DifferentPasses(ConformingEngine):
    """Keeps a state from pass to pass."""

    passes = 0

    def seed(self, seed: int) -> None:
        super().seed(seed)
        self.passes += 1

    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        return [10 + self.passes, *super().tokens(prompt, count)[1:]]


class DifferentProcesses(ConformingEngine):
    """Initialises its weights at random, unless it is greedy or the size of its batches is given."""

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        super().__init__(config, context)
        is_random = "batch_size" not in config.engine_section and not config.decoder.greedy
        self.start = random.SystemRandom().randrange(10**6) if is_random else 0

    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        return [10 + self.start, *super().tokens(prompt, count)[1:]]


class IgnoresSeed(ConformingEngine):
    def seed(self, seed: int) -> None:
        super().seed(0)


class IgnoresGreedy(ConformingEngine):
    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        return self.rng.choices(range(1, 200), k=count)


class DependsOnBatch(ConformingEngine):
    def tokens(self, prompt: Sequence[int], count: int) -> list[int]:
        return [10 + self.size, *super().tokens(prompt, count)[1:]]


class EncodesNothing(ConformingEngine):
    def encode(self, text: str) -> list[int]:
        return []


class EncodesDifferently(ConformingEngine):
    def encode(self, text: str) -> list[int]:
        return [*super().encode(text), random.SystemRandom().randrange(10**6)]


class RaisesInEncode(ConformingEngine):
    def encode(self, text: str) -> list[int]:
        raise NotImplementedError("no tokenizer")


class FailsWithTexts(ConformingEngine):
    def generate(self, batch: Any) -> Generated:
        if self.config.has_texts:
            raise ValueError("prompts are too long")
        return super().generate(batch)


class _AnyName(ConformingOptions):
    model_config = ConfigDict(extra="allow")


class TakesAnyOption(ConformingEngine):
    options = _AnyName


class _AnyValue(ConformingOptions):
    batch_size: Annotated[int, BeforeValidator(lambda value: value if isinstance(value, int) else 1)] = 1


class TakesAnyValue(ConformingEngine):
    options = _AnyValue

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        super().__init__(config, context)
        self.size = _AnyValue.from_config(config).batch_size


class IgnoresPrecision(ConformingEngine):
    def model_memory_bytes(self) -> int:
        return 4_000_000


class TooLongIfNatural(ConformingEngine):
    def generate(self, batch: Any) -> Generated:
        is_natural = self.config.measurement.length_mode == "natural"
        return self.run(batch, self.new_tokens + is_natural)


class IgnoresChat(ConformingEngine):
    def encode(self, text: str) -> list[int]:
        return list(text.encode())


class ClosesWhatItHasNotLoaded(ConformingEngine):
    def close(self) -> None:
        if not self.is_loaded:
            raise AttributeError("'Engine' object has no attribute 'model'")


class LeavesAProcess(ConformingEngine):
    def load(self) -> None:
        super().load()
        program = "import time; time.sleep(3)"
        os.posix_spawn(sys.executable, [sys.executable, "-ISc", program], os.environ)


#: Beginning of the names of files that an engine leaves.
LEFT = f"llem-left-{os.getpid()}-"


class LeavesSharedMemory(ConformingEngine):
    def load(self) -> None:
        super().load()
        with Path("/dev/shm", f"{LEFT}{time.monotonic_ns()}").open("w+b") as file:
            file.truncate(4096)
            self.memory = mmap.mmap(file.fileno(), 4096)


class TwoTokensForPrefill(ConformingEngine):
    def generate_first(self, batch: Any) -> Generated:
        return self.run(batch, 2)


class NoParameters(ConformingEngine):
    def shape(self) -> ModelShape:
        return replace(super().shape(), parameters=0)


class ShapeLargerThanMemory(ConformingEngine):
    def shape(self) -> ModelShape:
        return replace(super().shape(), weight_bytes=5_000_000)


class UsesMoreCacheThanThereIs(ConformingEngine):
    def cache_memory(self) -> CacheMemory:
        return CacheMemory(allocated_bytes=10, used_bytes=11)


class CacheLargerThanMemory(ConformingEngine):
    def cache_memory(self) -> CacheMemory:
        return CacheMemory(allocated_bytes=10**18)


class OnAnotherGpu(ConformingEngine):
    def load(self) -> None:
        super().load()
        self.gpus = ["GPU-00000000-0000-0000-0000-000000000000"]
