"""An engine from outside that computes nothing: what the tests of everything but the engines run.

Its section takes ``fault`` (what to do when asked to generate), ``seconds`` (how long a batch takes), ``ids``
(what each prompt generates), ``report`` (a folder in which each process leaves a note about itself), ``span`` (a
file to which each process adds when it begins and ends) and ``fail_once`` (a file: who does not find it makes it,
and fails).
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

from pytest_llem.backends.protocol import PreflightError, RequestRecord
from pytest_llem.results.models import EngineRecord


def _raise():
    raise ValueError("the engine says no")


def _orphan():
    if os.fork() == 0:
        os.setsid()
        time.sleep(60)
        os._exit(0)


def _garbage():
    """Write to every pipe this process has."""
    for fd in range(3, 64):
        try:
            if str(Path(f"/proc/self/fd/{fd}").readlink()).startswith("pipe:"):
                os.write(fd, b"\0\0\0\x64abc\n[1]\n{" + b"x" * 1000)
        except OSError:
            continue


FAULTS = {
    "raise": _raise,
    "memory": lambda: (_ for _ in ()).throw(MemoryError("no more")),
    "exit": lambda: sys.exit(3),
    "_exit": lambda: os._exit(7),
    "segv": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(3600),
    "linger": lambda: threading.Thread(target=time.sleep, args=(3600,)).start(),
    "linger at exit": lambda: atexit.register(time.sleep, 3600),
    "orphan": _orphan,
    "garbage": _garbage,
    "surrogate": lambda: (_ for _ in ()).throw(ValueError("\udc80")),
    "signal 40": lambda: os.kill(os.getpid(), 40),
    "shout": lambda: os.write(1, b"x" * 3_000_000 + b"the last words"),
}


class NoopEngine:
    gpus = ()
    no_latency = None

    def __init__(self, config, context):
        self.options = config.engine_section
        unknown = set(self.options) - {"fault", "seconds", "ids", "report", "size", "span", "fail_once"}
        if unknown:
            raise PreflightError(f"noop: unknown option {sorted(unknown)[0]!r}")
        self.output_len = config.workload.output_len
        self._span("begins")

    def _span(self, what):
        if path := self.options.get("span"):
            with Path(path).open("a") as file:
                file.write(f"{time.monotonic()} {what} {os.getpid()}\n")

    def fetch(self):
        pass

    def load(self):
        if folder := self.options.get("report"):
            note = {"pid": os.getpid(), "modules": sorted(sys.modules), "argv": sys.argv, "sid": os.getsid(0)}
            Path(folder, f"{os.getpid()}.json").write_text(json.dumps(note))

    def describe(self):
        return EngineRecord(name="noop", device="cpu")

    def encode(self, text):
        return list(text.encode())

    def vocabulary(self):
        return range(10, 20)

    def prepare(self, prompts):
        size = self.options.get("size", 1)
        return [prompts[start : start + size] for start in range(0, len(prompts), size)]

    def positions(self, batch):
        if self.options.get("fault") == "nan":
            return float("nan")
        return len(batch) * max(map(len, batch))

    def seed(self, seed):
        pass

    def generate(self, batch):
        if (made := self.options.get("fail_once")) and not Path(made).exists():
            Path(made).touch()
            raise ValueError("not the first time")
        FAULTS.get(self.options.get("fault"), lambda: None)()
        time.sleep(self.options.get("seconds", 0))
        return time.perf_counter()

    def synchronize(self):
        pass

    def requests(self, batch, generated):
        ids = self.options.get("ids", [7] * self.output_len)
        return [
            RequestRecord(len(prompt), ids, ttft_s=0.010, itl_s=[0.002] * (len(ids) - 1), e2e_s=0.012)
            for prompt in batch
        ]

    def model_memory_bytes(self):
        return 1_000_000

    def reset_peak_memory(self):
        pass

    def peak_memory_bytes(self):
        return None

    def close(self):
        self._span("ends")
