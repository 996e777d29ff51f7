"""A server with OpenAI's API whose speed, faults and log are set by options, for tests of load and measurement.

    python -m tests.support.mock_server --port 8000 --step-ms 4+0.1 --prefill-ms 0.02

A step of the engine takes A + B · batch ms, and longer by the prefill of the requests that it admits. Each running
request gets one token per step. Times are scheduled absolutely, so that rounding of sleeps does not add up.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import mmap
import os
import signal
import subprocess
import sys
from collections import deque
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

VOCABULARY = 1000


class Request:
    """A request within the engine."""

    def __init__(self, connection: Connection, body: dict[str, Any], chat: bool, number: int) -> None:
        self.connection = connection
        self.chat = chat
        self.number = number
        self.received = monotonic()
        self.prompt = body.get("messages") or body["prompt"]
        self.prompt_tokens = _prompt_tokens(body)
        self.max_tokens = int(body.get("max_tokens") or 16)
        self.with_ids = bool(body.get("return_token_ids"))
        self.times: list[float] = []
        self.unsent: list[int] = []

    @property
    def done(self) -> bool:
        return len(self.times) >= self.max_tokens


def _prompt_tokens(body: dict[str, Any]) -> int:
    if "messages" in body:
        return sum(len(message["content"].split()) for message in body["messages"])
    prompt = body["prompt"]
    return len(prompt.split()) if isinstance(prompt, str) else len(prompt)


class Engine:
    """Continuous batching: one step after the other while there are requests."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.base_ms, self.per_request_ms = (float(part) for part in options.step_ms.split("+"))
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.work = asyncio.Event()
        self.requests = self.prompt_tokens = self.generation_tokens = 0
        self.queue_seconds, self.admitted = 0.0, 0
        self.state = _opened(options.state_file)
        self.log = _opened(options.log_file)
        self._batch = -1

    @property
    def slowdown(self) -> float:
        return 1 + (self.options.delay_percent / 100 if self.requests >= self.options.delay_after else 0.0)

    def add(self, request: Request) -> None:
        self.waiting.append(request)
        self.work.set()

    def remove(self, connection: Connection) -> None:
        """Drop the request of a connection that was closed."""
        self.running = [request for request in self.running if request.connection is not connection]
        self.waiting = deque(request for request in self.waiting if request.connection is not connection)

    async def run(self) -> None:
        end = monotonic()
        while True:
            if not (self.running or self.waiting):
                self._note_batch()
                self.work.clear()
                await self.work.wait()
                end = monotonic()
            prefill_ms = 0.0
            while self.waiting and len(self.running) < self.options.max_batch:
                request = self.waiting.popleft()
                self.running.append(request)
                prefill_ms += request.prompt_tokens * self.options.prefill_ms
                self.prompt_tokens += request.prompt_tokens
                self.queue_seconds += max(0.0, end - request.received)
                self.admitted += 1
            self._note_batch()
            end += (self.base_ms + self.per_request_ms * len(self.running) + prefill_ms) * self.slowdown / 1e3
            await asyncio.sleep(max(0.0, end - monotonic()))
            self._emit()
            if self.options.stall_after and self.requests >= self.options.stall_after:
                self.options.stall_after += self.options.stall_every or math.inf
                await asyncio.sleep(self.options.stall_seconds)
                end = monotonic()

    def _emit(self) -> None:
        """Give each running request its next token."""
        options = self.options
        self.generation_tokens += len(self.running)
        for request in self.running:
            request.times.append(monotonic())
            request.unsent.append((request.prompt_tokens + request.number + len(request.times)) % VOCABULARY)
            is_held = _every(options.merge_every, len(request.times)) or len(request.times) % options.merge
            if request.done or not is_held:
                request.connection.send_tokens(request)
            if request.done:
                usage_error = 7 if _every(options.wrong_usage_every, request.number) else 0
                if self.log is not None:  # first, since a test reads it once the answer has ended
                    entry = {"received": request.received, "tokens": request.times, "prompt": request.prompt}
                    _write(self.log, number=request.number, **entry)
                request.connection.finish(request, usage_error)
            elif 2 * len(request.times) >= request.max_tokens:
                if request.number == options.die_in_answer:
                    os._exit(3)
                if _every(options.cut_every, request.number):
                    request.connection.transport.close()
        self.running = [request for request in self.running if not request.done]

    def _note_batch(self) -> None:
        if self.state is not None and len(self.running) != self._batch:
            self._batch = len(self.running)
            _write(self.state, time=monotonic(), batch=self._batch)

    def metrics(self) -> str:
        """Return counters in the names of vLLM."""
        values = {
            "num_requests_running": len(self.running),
            "num_requests_waiting": len(self.waiting),
            "prompt_tokens_total": self.prompt_tokens,
            "generation_tokens_total": self.generation_tokens,
            "prefix_cache_queries_total": self.prompt_tokens,
            "prefix_cache_hits_total": 0,
            "num_preemptions_total": 0,
            "request_queue_time_seconds_sum": self.queue_seconds,
            "request_queue_time_seconds_count": self.admitted,
        }
        labels = '{engine="0",model_name="mock"}'
        return "".join(f"vllm:{name}{labels} {float(value)}\n" for name, value in values.items())


def _every(interval: int, number: int) -> bool:
    return interval > 0 and number % interval == 0


def _opened(path: str | None) -> TextIO | None:
    return None if path is None else Path(path).open("a", buffering=1)


def _write(file: TextIO, **entry: object) -> None:
    file.write(json.dumps(entry) + "\n")


class Connection(asyncio.Protocol):
    """One connection of HTTP/1.1, kept alive."""

    transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self.server = server
        self.received = b""
        self.served = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.engine.remove(self)

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, separator, rest = self.received.partition(b"\r\n\r\n")
        if not separator:
            return
        lines = head.split(b"\r\n")
        length = next(
            (int(line.partition(b":")[2]) for line in lines if line.lower().startswith(b"content-length:")), 0
        )
        if len(rest) < length:
            return
        self.received = rest[length:]
        self.served += 1
        self.server.handle(self, lines[0].decode().split(" ")[1], head, rest[:length])

    def reply(self, status: str, body: str, kind: str = "application/json") -> None:
        content = body.encode()
        head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(content)}\r\n\r\n"
        self.transport.write(head.encode() + content)

    def begin_stream(self) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        )

    def send_event(self, data: str) -> None:
        event = f"data: {data}\n\n".encode()
        self.transport.write(b"%x\r\n%b\r\n" % (len(event), event))

    def send_tokens(self, request: Request) -> None:
        ids, request.unsent = request.unsent, []
        text = "".join(f" t{token}" for token in ids)
        finish = '"length"' if request.done else "null"
        content = f'"delta":{{"content":"{text}"}}' if request.chat else f'"text":"{text}"'
        tokens = f',"token_ids":{ids}' if request.with_ids else ""
        self.send_event(
            f'{{"id":"cmpl-{request.number}","object":"text_completion","created":1,"model":"mock","choices":'
            f'[{{"index":0,{content},"logprobs":null,"finish_reason":{finish}{tokens}}}]}}'
        )

    def finish(self, request: Request, extra_tokens: int) -> None:
        usage = {
            "prompt_tokens": request.prompt_tokens,
            "completion_tokens": request.max_tokens + extra_tokens,
            "total_tokens": request.prompt_tokens + request.max_tokens + extra_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
        }
        self.send_event(json.dumps({"id": f"cmpl-{request.number}", "choices": [], "usage": usage}))
        self.end_stream()

    def end_stream(self) -> None:
        self.send_event("[DONE]")
        self.transport.write(b"0\r\n\r\n")


class Server:
    """Answers requests, with the faults that the options ask for."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.engine = Engine(options)
        self.ready_at = monotonic() + options.ready_after
        self.authorization = b"" if options.key is None else f"Authorization: Bearer {options.key}\r\n".encode()

    def handle(self, connection: Connection, path: str, head: bytes, body: bytes) -> None:
        if path == "/health":
            ready = not self.options.never_ready and monotonic() >= self.ready_at
            connection.reply("200 OK" if ready else "503 Service Unavailable", "")
        elif path == "/metrics":
            connection.reply("200 OK", self.engine.metrics(), "text/plain; version=0.0.4")
        elif self.authorization not in head:
            connection.reply("401 Unauthorized", '{"error": "Unauthorized"}')
        elif path == "/v1/models":
            connection.reply("200 OK", json.dumps({"object": "list", "data": [{"id": "mock", "object": "model"}]}))
        elif path in ("/v1/completions", "/v1/chat/completions"):
            self._complete(connection, json.loads(body), chat="chat" in path)
        else:
            connection.reply("404 Not Found", '{"error": "not found"}')

    def _complete(self, connection: Connection, body: dict[str, Any], chat: bool) -> None:
        options, engine = self.options, self.engine
        if options.close_reused and connection.served > 1:
            connection.transport.close()
            return
        engine.requests += 1
        number = engine.requests
        if options.die_after_requests and number > options.die_after_requests:
            os._exit(3)
        if _every(options.error_every, number):
            connection.reply("500 Internal Server Error", '{"error": {"message": "out of memory"}}')
            return
        connection.begin_stream()
        if _every(options.error_event_every, number):
            connection.send_event('{"error": {"message": "out of memory", "code": 500}}')
            connection.end_stream()
            return
        if chat:
            connection.send_event('{"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}')
        engine.add(Request(connection, body, chat, number))


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--port", type=int, default=0, help="0: a free port, printed as 'listening on PORT'")
    add("--step-ms", default="4+0.1", help="A+B: a step takes A + B · batch ms")
    add("--prefill-ms", type=float, default=0.0, help="for each prompt token")
    add("--max-batch", type=int, default=256)
    add("--delay-percent", type=float, default=0.0, help="longer steps, as after a regression")
    add("--delay-after", type=int, default=0, metavar="N", help="only after N requests, as by drift")
    add("--merge", type=int, default=1, help="tokens per chunk")
    add("--merge-every", type=int, default=0, metavar="N", help="send every Nth token with the next one")
    add("--key", help="API key that requests need")
    add("--key-file", type=Path, metavar="FILE", help="file with that key")
    add("--state-file", help="gets the batch size whenever it changes, as JSON lines: time (monotonic), batch")
    add(
        "--log-file",
        help="gets each finished request, as JSON lines: number, received, tokens (times), prompt",
    )
    add("--close-reused", action="store_true", help="close a connection at its second request")
    add("--never-ready", action="store_true", help="/health answers 503")
    add("--ready-after", type=float, default=0.0, metavar="SECONDS", help="/health answers 503 before")
    add("--exit-starting", type=int, metavar="CODE", help="end before listening")
    add("--die-after-requests", type=int, default=0, metavar="N")
    add("--die-in-answer", type=int, default=0, metavar="N", help="end in the middle of the Nth answer")
    add("--die-after-seconds", type=float, metavar="S")
    add("--error-every", type=int, default=0, metavar="N", help="answer every Nth request with status 500")
    add("--error-event-every", type=int, default=0, metavar="N", help="send an error as an event of the stream")
    add("--cut-every", type=int, default=0, metavar="N", help="close the connection in the middle of the answer")
    add("--wrong-usage-every", type=int, default=0, metavar="N", help="count 7 tokens too many")
    add("--stall-after", type=int, default=0, metavar="N", help="at the Nth request, pause the engine")
    add("--stall-every", type=int, default=0, metavar="N", help="pause again at each Nth request after that")
    add("--stall-seconds", type=float, default=30.0)
    add("--ignore-sigterm", action="store_true")
    add("--grandchild", metavar="FILE", help="start a process that outlives this one, and write its pid")
    add("--shm", metavar="NAME", help="use a file in /dev/shm, and leave it")
    add("--once", metavar="FILE", help="have no other options if FILE exists; else make it")
    return parser


async def serve(options: argparse.Namespace) -> None:
    """Serve until the process is ended."""
    loop = asyncio.get_running_loop()
    if options.die_after_seconds is not None:
        loop.call_later(options.die_after_seconds, os._exit, 3)
    server = Server(options)
    listening = await loop.create_server(lambda: Connection(server), "127.0.0.1", options.port, backlog=1024)
    print(f"listening on {listening.sockets[0].getsockname()[1]}", flush=True)
    await server.engine.run()


def main() -> None:
    options = parser().parse_args()
    if options.once:
        try:
            Path(options.once).touch(exist_ok=False)
        except FileExistsError:
            options = parser().parse_args(["--port", str(options.port)])
    if options.key_file:
        options.key = options.key_file.read_text()
    if options.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if options.grandchild:
        child = subprocess.Popen(["sleep", "600"])
        Path(options.grandchild).write_text(str(child.pid))
    if options.shm:
        with Path("/dev/shm", options.shm).open("wb+") as file:
            file.truncate(mmap.PAGESIZE)
            options.mapped = mmap.mmap(file.fileno(), mmap.PAGESIZE)
    if options.exit_starting is not None:
        print("no such model", file=sys.stderr)
        sys.exit(options.exit_starting)
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(options))


if __name__ == "__main__":
    main()
