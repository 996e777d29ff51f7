"""A load generator and its server, each a real process, for tests of results of other tools.

    python mini_bench.py OUT [--step S] [--requests N] [--slots N] [--startup S] [--own-server | --made-up]

Writes the JSON of a script (``llem_run``). With ``--own-server`` it starts a server and sends the requests there;
otherwise it waits for each token itself. With ``--made-up`` it writes the times of such a run without the waiting.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

TOKENS = 5


def serve(step: float) -> None:
    """Serve on a free port, which is printed. An answer has a line for each token."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            for _ in range(TOKENS):
                time.sleep(step)
                self.wfile.write(b"token\n")

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()


def answers(url: str | None, step: float) -> Iterator[float]:
    """Yield the time of each token of one answer."""
    if url is None:
        for _ in range(TOKENS):
            time.sleep(step)
            yield time.monotonic()
        return
    with urllib.request.urlopen(url) as answer:
        while answer.readline():
            yield time.monotonic()


def load(url: str | None, step: float, requests: int, slots: int) -> list[dict[str, Any]]:
    """Return *requests* requests that *slots* threads sent."""
    found: list[dict[str, Any]] = []
    left = iter(range(requests))
    lock = threading.Lock()

    def slot() -> None:
        while True:
            with lock:
                if next(left, None) is None:
                    return
            sent = time.monotonic()
            found.append({"sent": sent, "token_times": [*answers(url, step)], "input_tokens": 4})

    threads = [threading.Thread(target=slot) for _ in range(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def made_up(step: float, requests: int, slots: int) -> list[dict[str, Any]]:
    """Return the requests of a load that ends now and was never late."""
    seconds = TOKENS * step
    began = time.monotonic() - math.ceil(requests / slots) * seconds
    found = []
    for number in range(requests):
        sent = began + number // slots * seconds
        times = [sent + (token + 1) * step for token in range(TOKENS)]
        found.append({"sent": sent, "token_times": times, "input_tokens": 4})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--step", type=float, default=0.01)
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--slots", type=int, default=2)
    parser.add_argument("--startup", type=float, default=0.0)
    parser.add_argument("--own-server", action="store_true")
    parser.add_argument("--made-up", action="store_true")
    options = parser.parse_args()
    time.sleep(options.startup)
    server, url = None, None
    if options.own_server:
        command = [sys.executable, __file__, "serve", str(options.step)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        url = f"http://127.0.0.1:{int(server.stdout.readline())}"
    try:
        send = made_up if options.made_up else functools.partial(load, url)
        requests = send(options.step, options.requests, options.slots)
    finally:
        if server is not None:
            server.kill()
            server.wait()
    run = {
        "llem_run": 1,
        "tool": "mini_bench",
        "model": "mini",
        "concurrency": options.slots,
        "clock": "monotonic",
        "requests": requests,
    }
    options.out.write_text(json.dumps(run))


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(float(sys.argv[2]))
    else:
        main()
