"""Run an engine under observation, for the conformance suite: note what it does, and fail on demand.

This runs in the experiment's process. ``pytest_llem.testing`` reads the notes.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, cast

import psutil
from pydantic import Field

from pytest_llem.engines.function import load_engine
from pytest_llem.engines.options import needs_of_class, option_problems
from pytest_llem.engines.protocol import (
    BatchEngine,
    EngineContext,
    RequestRecord,
    ShapeUnknownError,
    SupportsCacheMemory,
    SupportsExpectedWarnings,
    SupportsModelShape,
)
from pytest_llem.engines.shipped import SHIPPED
from pytest_llem.measurement.engine_imports import create_engine
from pytest_llem.results.experiment import EngineRecord
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import EngineOptions, Needs

#: Time that processes of the engine may take to end after ``close``, in s.
END_SECONDS = 5.0

#: Message of the error that is raised on demand.
FAULT = "raised by the conformance suite after {}"

#: Helper processes of Python's multiprocessing, which end with the experiment's process.
_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")

Fault = Literal["fetch", "load", "generate", "kill"]


class ObservedOptions(EngineOptions):
    """Options of :class:`ObservedEngine`."""

    engine: str
    """The engine to observe: an entry point, or ``package.module:Class``."""
    section: dict[str, Any] = Field(default_factory=dict)
    """Its options."""
    notes: str
    """File to which the notes are appended, one JSON object a line."""
    fault: Fault | None = None
    """Method whose first call raises when it is done, or ``kill`` for SIGKILL in ``generate``. Default null: none.
    """

    def needs(self, config: ExperimentConfig, parameters: int | None) -> Needs:
        observed = self.observed_config(config)
        if self.engine in SHIPPED:  # whose section has been validated, and whose import takes seconds
            return SHIPPED[self.engine].options.from_config(observed).needs(observed, parameters)
        engine = load_engine(self.engine)
        if problems := option_problems(engine, observed):
            raise ValueError("; ".join(map(str, problems)))
        return needs_of_class(engine, observed, parameters)

    def observed_config(self, config: ExperimentConfig) -> ExperimentConfig:
        """Return the experiment as the observed engine gets it."""
        fields = config.model_dump(mode="json", exclude={config.backend})
        return ExperimentConfig.model_validate({**fields, "backend": self.engine, self.engine: self.section})


class ObservedEngine(BatchEngine):
    """Passes each call on to the engine under observation.

    Notes, by their key ``call``:
        ``new``: UUIDs of the GPUs that the engine may use (``gpus``).
        ``load``: those that it uses after ``load``.
        ``prepare``: number of tokens of each prompt (``lengths``).
        ``requests``: input tokens of each record (``input_tokens``).
        ``encode``: token ids of the same text, asked for twice (``ids``, ``again``), or ``refused``.
        ``memory``: fields of the model's ``shape``, or ``shape_unknown``, and of its KV ``cache``; ``weights`` in
        bytes.
        ``processes``: the experiment's process and its descendants: pid and time of creation (``processes``), and
        the files in shared memory that they use, without those from before the engine (``files``).
        ``close``: the ``error`` that it raised, and processes that are ``left``.
    """

    options = ObservedOptions
    reads_passthrough_kwargs = True

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        self._options = ObservedOptions.from_config(config)
        self._files_before = set(_shared_files([os.getpid()]))
        self._engine = cast("BatchEngine", create_engine(self._options.observed_config(config), context))
        self._copy_attributes()
        self._note("new", gpus=list(self.gpus))

    def _copy_attributes(self) -> None:
        """Copy attributes of the engine, which it may change in ``load``."""
        self.gpus = self._engine.gpus
        self.latency_unknown_reason = self._engine.latency_unknown_reason
        self.takes_texts, self.tokens_unknown_reason = self._engine.takes_texts, self._engine.tokens_unknown_reason
        self.batch_sizes_known = self._engine.batch_sizes_known
        if isinstance(self._engine, SupportsExpectedWarnings):
            self.expected_warnings = self._engine.expected_warnings

    def _note(self, call: str, **values: Any) -> None:
        with Path(self._options.notes).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"call": call, **values}, default=str) + "\n")

    def _note_processes(self) -> None:
        own = _children()
        files = set(_shared_files([os.getpid(), *(process.pid for process in own)])) - self._files_before
        processes = [(process.pid, process.create_time()) for process in own]
        this = psutil.Process()
        self._note("processes", processes=[(this.pid, this.create_time()), *processes], files=sorted(files))

    def _fail_after(self, method: Fault) -> None:
        if self._options.fault == method:
            self._note_processes()
            raise RuntimeError(FAULT.format(method))

    def fetch(self) -> None:
        self._engine.fetch()
        self._fail_after("fetch")

    def load(self) -> None:
        self._engine.load()
        self._copy_attributes()
        self._note("load", gpus=list(self.gpus))
        self._fail_after("load")

    def describe(self) -> EngineRecord:
        return self._engine.describe()

    def encode(self, text: str) -> list[int]:
        try:
            ids = self._engine.encode(text)
        except Exception as error:
            self._note("encode", refused=f"{type(error).__name__}: {error}")
            raise
        self._note("encode", ids=list(ids), again=list(self._engine.encode(text)))
        return ids

    def vocabulary(self) -> Sequence[int]:
        return self._engine.vocabulary()

    def prepare(self, prompts: Sequence[Sequence[int]]) -> Sequence[Any]:
        self._note("prepare", lengths=[len(prompt) for prompt in prompts])
        return self._engine.prepare(prompts)

    def positions(self, batch: Any) -> int | None:
        return self._engine.positions(batch)

    def seed(self, seed: int) -> None:
        self._engine.seed(seed)

    def generate(self, batch: Any) -> Any:
        generated = self._engine.generate(batch)
        if self._options.fault == "kill":
            self._note_processes()
            os.kill(os.getpid(), signal.SIGKILL)
        self._fail_after("generate")
        return generated

    def synchronize(self) -> None:
        self._engine.synchronize()

    def requests(self, batch: Any, generated: Any) -> list[RequestRecord]:
        records = self._engine.requests(batch, generated)
        self._note("requests", input_tokens=[record.input_tokens for record in records])
        return records

    def model_memory_bytes(self) -> int | None:
        return self._engine.model_memory_bytes()

    def reset_peak_memory(self) -> None:
        self._engine.reset_peak_memory()

    def peak_memory_bytes(self) -> int | None:
        """Note processes and memory, too, because this is called directly after the window."""
        peak = self._engine.peak_memory_bytes()
        self._note_processes()
        values: dict[str, Any] = {"weights": self._engine.model_memory_bytes()}
        if isinstance(self._engine, SupportsModelShape):
            try:
                values["shape"] = vars(self._engine.shape())
            except ShapeUnknownError as error:
                values["shape_unknown"] = str(error)
        if isinstance(self._engine, SupportsCacheMemory):
            values["cache"] = vars(self._engine.cache_memory())
        self._note("memory", **values)
        return peak

    def close(self) -> None:
        error = None
        try:
            self._engine.close()
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
            raise
        finally:
            self._note("close", error=error, left=[*map(_shown, self._processes_left())])

    def _processes_left(self) -> list[psutil.Process]:
        _, left = psutil.wait_procs([one for one in _children() if not _is_helper(one)], timeout=END_SECONDS)
        return [one for one in left if _is_alive(one)]


def _children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _is_helper(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return any(helper in " ".join(process.cmdline()) for helper in _HELPERS)
    return False


def _shown(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return f"{process.name()} (pid {process.pid})"
    return f"pid {process.pid}"


def _shared_files(pids: Iterable[int]) -> list[str]:
    """Return the files in /dev/shm that processes have mapped. They use memory until they are removed."""
    found = []
    for pid in pids:
        with suppress(OSError):  # it has ended
            maps = Path(f"/proc/{pid}/maps").read_text(errors="replace")
            found += re.findall(r"(/dev/shm/.+)$", maps, re.MULTILINE)
    return [name for name in found if not name.endswith(" (deleted)")]
