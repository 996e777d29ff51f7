"""An engine that computes nothing, for all tests that do not test engines.

Options:
    fault: What to do in ``generate``; see FAULTS. ``… while broken`` limits it to the time that ``break`` exists.
        ``nan`` is the number of positions instead.
    break: The file that ``… while broken`` refers to.
    seconds: Duration of a batch in s.
    first_seconds: Duration of ``generate_first`` in s.
    size: Prompts in a batch.
    ids: Generated token ids of each prompt.
    report: Folder in which each process writes a note about itself.
    fail_once: A file. A process that does not find it creates it and fails.
    family: Folder in which the engine's child processes leave their ids.
    filler: Number of characters added to the result.
    fetch: Duration of ``fetch`` in s.
    load: Duration of ``load`` in s.
    span: File to which each process appends when it begins and ends.
    gpu: UUID, or UUIDs, of scripted GPUs that it reports to run on.
    watts: Power in W of the script's last GPU while idle and while a batch runs.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from pytest_llem.engines.protocol import EngineContext, RequestRecord
from pytest_llem.results.experiment import EngineRecord
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.engine_options import EngineOptions

Batch = Sequence[Sequence[int]]


def _raise(error: BaseException) -> None:
    raise error


def _orphan() -> None:
    if os.fork() == 0:
        os.setsid()
        time.sleep(3600)
        os._exit(0)


def _garbage() -> None:
    """Write garbage to every pipe of this process."""
    for fd in range(3, 64):
        try:
            if str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("pipe:"):
                os.write(fd, b"\0\0\0\x64abc\n[1]\n{" + b"x" * 1000)
        except OSError:
            continue


class NoMessageError(Exception):
    """An exception that cannot be pickled and whose ``__str__`` raises."""

    def __init__(self) -> None:
        self.held = threading.Lock()

    def __str__(self) -> str:
        raise SystemExit("no")


def _say_and_raise() -> None:
    print("a word from the engine")
    raise ValueError("the engine says no")


def _hold_the_lock() -> None:
    """Sleep in native code without releasing the interpreter's lock."""
    while True:  # a signal ends it
        ctypes.PyDLL(None).sleep(3600)


def _allocate() -> None:
    """Allocate more memory than the process may have, which raises MemoryError."""
    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    bytearray(2**33)


def _fill_memory() -> None:
    """Allocate memory until the kernel kills the process."""
    held = []
    while True:
        held.append(bytearray(b"x") * 2**22)


def _family(folder: str) -> None:
    """Start a child, one that leaves the session, and an orphan. All ignore the signals that they can."""
    for leaves, orphaned in ((False, False), (True, False), (True, True)):
        if os.fork() == 0:
            if leaves:
                os.setsid()
            if orphaned and os.fork():
                os._exit(0)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            Path(folder, f"{os.getpid()}.family").touch()
            time.sleep(3600)
            os._exit(0)


def _close_everything() -> None:
    """Close the event channel and all other file descriptors from 3 on."""
    os.closerange(3, 64)


def _torch_allocate() -> None:
    import torch

    torch.empty(2**46)


FAULTS: dict[str, Callable[[], object]] = {
    "no message": lambda: _raise(NoMessageError()),
    "long message": lambda: _raise(ValueError("x" * 100_000_000)),
    "hold the lock": _hold_the_lock,
    "allocate": _allocate,
    "fill memory": _fill_memory,
    "torch allocate": _torch_allocate,
    "close": _close_everything,
    "exit 0": lambda: sys.exit(),
    "real segv": lambda: ctypes.string_at(0),
    "pour": lambda: [os.write(1, b"x" * 1_000_000) for _ in range(400)],
    "raise": lambda: _raise(ValueError("the engine says no")),
    "say": lambda: print("a word from the engine ☃"),
    "say and raise": _say_and_raise,
    "memory": lambda: _raise(MemoryError("no more")),
    "exit": lambda: sys.exit(3),
    "_exit": lambda: os._exit(7),
    "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(3600),
    "linger": lambda: threading.Thread(target=time.sleep, args=(3600,)).start(),
    "linger at exit": lambda: atexit.register(time.sleep, 3600),
    "orphan": _orphan,
    "garbage": _garbage,
    "surrogate": lambda: _raise(ValueError("\udc80")),
    "signal 40": lambda: os.kill(os.getpid(), 40),
    "shout": lambda: os.write(1, b"x" * 3_000_000 + b"the last words"),
}


class NoopOptions(EngineOptions):
    """The options: any value, as tests also give wrong ones."""

    fault: Any = None
    seconds: Any = None
    first_seconds: Any = None
    ids: Any = None
    report: Any = None
    size: Any = None
    span: Any = None
    fail_once: Any = None
    family: Any = None
    filler: Any = None
    break_: Any = Field(None, alias="break")
    fetch: Any = None
    load: Any = None
    gpu: Any = None
    watts: Any = None


class NoopEngine:
    options = NoopOptions
    latency_unknown_reason = None
    tokens_unknown_reason = None
    takes_texts = False
    batch_sizes_known = True

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        self.given: dict[str, Any] = config.engine_section
        self.output_len = config.workload.output_len
        gpus = self.given.get("gpu", [])
        self.gpus: list[str] = [gpus] if isinstance(gpus, str) else gpus
        self._span("begins")

    def _span(self, what: str) -> None:
        if path := self.given.get("span"):
            with Path(path).open("a") as file:
                file.write(f"{time.monotonic()} {what} {os.getpid()}\n")

    def _draw(self, busy: bool) -> None:
        """Set the power of the script's last GPU from now on: while a batch runs, or while idle."""
        if watts := self.given.get("watts"):
            script = Path(os.environ["LLEM_SCRIPTED_NVML"])
            text = script.read_text()
            found = re.search(r"^start (.*)$", text, re.MULTILINE)
            assert found is not None
            start = float(found[1])
            new = script.with_suffix(".new")
            new.write_text(f"{text}power {time.monotonic() - start:.9f} {watts[busy]}\n")
            new.replace(script)

    def fetch(self) -> None:
        time.sleep(self.given.get("fetch", 0))

    def load(self) -> None:
        time.sleep(self.given.get("load", 0))
        if folder := self.given.get("report"):
            note = {"pid": os.getpid(), "modules": sorted(sys.modules), "argv": sys.argv, "sid": os.getsid(0)}
            Path(folder, f"{os.getpid()}.json").write_text(json.dumps(note))

    def describe(self) -> EngineRecord:
        device = "cuda" if self.gpus else "cpu"
        return EngineRecord(name="noop", device=device, settings={"filler": "x" * self.given.get("filler", 0)})

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def vocabulary(self) -> Sequence[int]:
        return range(10, 20)

    def prepare(self, prompts: Batch) -> list[Batch]:
        size = self.given.get("size", 1)
        return [prompts[start : start + size] for start in range(0, len(prompts), size)]

    def positions(self, batch: Batch) -> float:
        if self.given.get("fault") == "nan":
            return float("nan")
        return len(batch) * max(map(len, batch))

    def seed(self, seed: int) -> None:
        pass

    def generate(self, batch: Batch) -> tuple[float, float]:
        if (made := self.given.get("fail_once")) and not Path(made).exists():
            Path(made).touch()
            raise ValueError("not the first time")
        if folder := self.given.get("family"):
            _family(folder)
        fault, only_while_broken, _ = self.given.get("fault", "none").strip().partition(" while broken")
        if not only_while_broken or Path(self.given["break"]).exists():
            FAULTS.get(fault, lambda: None)()
        began = time.monotonic()
        self._draw(busy=True)
        time.sleep(max(self.given.get("seconds", 0), 5e-5))  # no engine takes less
        self._draw(busy=False)
        return began, time.monotonic()

    def generate_first(self, batch: Batch) -> None:
        self._draw(busy=True)
        time.sleep(self.given.get("first_seconds", 0))
        self._draw(busy=False)

    def synchronize(self) -> None:
        pass

    def requests(self, batch: Batch, generated: tuple[float, float] | None) -> list[RequestRecord]:
        ids = self.given.get("ids", [7] * self.output_len)
        if generated is None:  # the first token alone
            return [RequestRecord(len(prompt), ids[:1]) for prompt in batch]
        began, ended = generated
        times = [ended - (ended - began) * left / len(ids) for left in reversed(range(len(ids)))]
        return [RequestRecord(len(prompt), ids, began, times, last_token=ended) for prompt in batch]

    def model_memory_bytes(self) -> int:
        return 1_000_000

    def reset_peak_memory(self) -> None:
        pass

    def peak_memory_bytes(self) -> None:
        return None

    def close(self) -> None:
        self._span("ends")
