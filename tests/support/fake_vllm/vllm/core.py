"""The EngineCore: a process that schedules requests and returns their tokens, step by step."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: A request as it came, with its times and the number of tokens made so far.
Request = dict[str, Any]

#: Step at which a fault occurs.
FAULT_STEP = 3

#: Duration of a step in s.
STEP_SECONDS = 0.002

#: Tokens that the KV cache has room for.
CACHE_TOKENS = 1000

WORKER = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(3600)
"""


class Core:
    def __init__(self, config: dict[str, Any], workers: Sequence[subprocess.Popen[bytes]]) -> None:
        self.config, self.workers = config, workers
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.cached: set[tuple[int, ...]] = set()
        self.steps = 0
        self.rest = b""

    def receive(self) -> None:
        """Take the messages that have come; wait for one if there is nothing to do."""
        while True:
            idle = not self.waiting and not self.running
            if not self.buffered() and not select.select([0], [], [], None if idle else 0)[0]:
                return
            line = self.line()
            if line is None:
                sys.exit()
            message = json.loads(line)
            if message["kind"] == "reset":
                self.cached.clear()
            else:
                self.waiting.append({**message, "queued_ts": time.monotonic(), "made": 0})

    def buffered(self) -> bool:
        return b"\n" in self.rest

    def line(self) -> bytes | None:
        while not self.buffered():
            chunk = os.read(0, 1 << 16)
            if not chunk:
                return None
            self.rest += chunk
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    def step(self) -> None:
        queries = hits = 0
        while self.waiting and len(self.running) < self.config["max_num_seqs"]:
            one = self.waiting.pop(0)
            one["scheduled_ts"] = time.monotonic()
            if self.config["prefix_caching"]:
                queries += len(one["prompt"])
                hits += (len(one["prompt"]) - 1) * (tuple(one["prompt"]) in self.cached)
                self.cached.add(tuple(one["prompt"]))
            self.running.append(one)
        time.sleep(STEP_SECONDS)
        self.steps += 1
        used = sum(len(one["prompt"]) + one["made"] for one in self.running)
        outputs = [self.advance(one) for one in self.running]
        ended = {one["id"] for one in outputs if one["finish_reason"]}
        self.running = [one for one in self.running if one["id"] not in ended]
        if self.steps == FAULT_STEP:
            fault = self.config["fault"]
            if fault == "die":
                os._exit(7)
            while fault == "hang":
                time.sleep(0.02)
                if any(worker.poll() is not None for worker in self.workers):
                    os._exit(1)
            if fault == "abort":
                gone = self.running.pop()
                outputs = [one for one in outputs if one["id"] != gone["id"]]
                outputs.append(self.output(gone, [], "abort"))
        message = {"outputs": outputs, "queries": queries, "hits": hits, "usage": used / CACHE_TOKENS}
        print(json.dumps(message), flush=True)

    def advance(self, one: Request) -> dict[str, Any]:
        """Return the next tokens of a request. It ends at the end token, whose place depends on the prompt."""
        tokens: list[int] = []
        reason = None
        for _ in range(self.config["tokens_per_step"]):
            one["made"] += 1
            natural = one["made"] >= max(one["min_tokens"] + 1, 2 + sum(one["prompt"]) % 3)
            if natural and not one["ignore_eos"]:
                tokens.append(self.config["eos"])
                reason = "stop"
                break
            tokens.append(10 + (sum(one["prompt"]) + one["made"] + (one["seed"] or 0)) % 50)
            if one["made"] == one["max_tokens"]:
                reason = "length"
                break
        return self.output(one, tokens, reason)

    def output(self, one: Request, tokens: list[int], reason: str | None) -> dict[str, Any]:
        times = {name: one[name] for name in ("queued_ts", "scheduled_ts")}
        return {"id": one["id"], "tokens": tokens, "finish_reason": reason, **times}


def main() -> None:
    config = json.loads(sys.argv[1])
    workers = []
    for _ in range(config["workers"]):
        # It survives the end of its parent, as vLLM's were seen to do.
        command = [sys.executable, "-S", "-c", WORKER]
        workers.append(subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL))
    if config["notes"]:
        pids = [("EngineCore", os.getpid()), *(("Worker", worker.pid) for worker in workers)]
        Path(config["notes"]).write_text("".join(f"{name} {pid}\n" for name, pid in pids))
    core = Core(config, workers)
    try:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        print("{}", flush=True)  # it is ready, and may be ended from now on
        while True:
            core.receive()
            core.step()
    finally:
        for worker in workers:
            worker.kill()


if __name__ == "__main__":
    main()
