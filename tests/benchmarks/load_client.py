"""Measure what the load client costs, beside ``vllm bench serve`` and AIPerf, against the mock server.

    python tests/benchmarks/load_client.py --tokenizer DIR [--vllm PYTHON] [--aiperf PROGRAM] [--rounds N]

Each round runs every client, with few and with many requests, so that drift affects all alike. The CPU time of a
client is that of its processes for the many less that for the few, so that imports do not count; making the
prompts does. Its request rate, TTFT and E2E latency are those that it reports for the many. Ratios are to ours, by
round.

Prompts of about 64 tokens, 64 new tokens, closed loop. The mock server is the same process for all clients, and on
the same processor cores.

On two cores, the one round without other load: 152 requests/s (vLLM 152, AIPerf 147) and 1.6 CPU seconds per 1,000
(2.4 and 10.6); TTFT 15.6 ms (17.6 and 20.4), and E2E latencies within 0.4 %. All slots begin together, and so end
together: a likely reason for the TTFTs is the CPU time that a client needs to send such a burst. The E2E latencies
agree, so AIPerf's lower rate is time between requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic

from pytest_llem.serving.client import Client, Endpoint
from pytest_llem.serving.errors import DatasetExhaustedError
from pytest_llem.serving.load import Load
from pytest_llem.serving.schedule import ClosedLoop
from tests.support.serving import mock_server, requests

TOKENS = 64

#: The command ``vllm bench serve``, which fails with vLLM's build for CPU: its distribution has another name.
_VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True)
class Report:
    """What a client reports, and the CPU time of its processes."""

    rate: float
    ttft_ms: float
    e2e_ms: float
    cpu_seconds: float = 0.0


async def load(url: str, number: int, concurrency: int) -> Report:
    """Send *number* requests with our client."""
    async with Client(Endpoint(url, token_ids=True), concurrency) as client:
        load = Load(client, islice(requests(TOKENS, TOKENS), number), ClosedLoop(concurrency, ramp_seconds=0.0))
        began = monotonic()
        try:
            await load.begin()
            await load.hold(3600)
        except DatasetExhaustedError:
            pass
        while load.in_flight:
            await asyncio.sleep(0.01)
        records = [request.record for request in load.records]
        await load.drain(0)
        ended = max(request.ended for request in load.records)
    ttft = statistics.mean(record.ttft_s or 0.0 for record in records)
    e2e = statistics.mean(record.e2e_s or 0.0 for record in records)
    return Report(len(records) / (ended - began), ttft * 1e3, e2e * 1e3)


def ours(arguments: argparse.Namespace, url: str, number: int, folder: Path) -> Report:
    command = [sys.executable, __file__, "--load", url, str(number), "--concurrency", str(arguments.concurrency)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return Report(**json.loads(out))


def vllm(arguments: argparse.Namespace, url: str, number: int, folder: Path) -> Report:
    command = [
        *(arguments.vllm, "-c", _VLLM_BENCH_SERVE, "--base-url", url),
        *("--backend", "openai", "--endpoint", "/v1/completions", "--model", "mock"),
        *("--tokenizer", arguments.tokenizer, "--dataset-name", "random", "--random-input-len", str(TOKENS)),
        *("--random-output-len", str(TOKENS), "--ignore-eos", "--num-prompts", str(number), "--disable-tqdm"),
        *("--max-concurrency", str(arguments.concurrency), "--percentile-metrics", "ttft,e2el"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", "vllm.json"),
    ]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads((folder / "vllm.json").read_text())
    assert result["completed"] == number
    return Report(result["request_throughput"], result["mean_ttft_ms"], result["mean_e2el_ms"])


def aiperf(arguments: argparse.Namespace, url: str, number: int, folder: Path) -> Report:
    command = [
        *(arguments.aiperf, "profile", "--url", url, "--model", "mock", "--endpoint-type", "completions"),
        *("--streaming", "--tokenizer", arguments.tokenizer, "--isl", str(TOKENS), "--osl", str(TOKENS)),
        *("--request-count", str(number), "--concurrency", str(arguments.concurrency), "--use-server-token-count"),
        *("--extra-inputs", "ignore_eos:true", "--ui", "none", "--output-artifact-dir", str(folder)),
    ]
    # Offline, it takes a folder for a name on the hub.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=180)
    result = json.loads((folder / "profile_export_aiperf.json").read_text())
    rate, ttft, e2e = (
        result[name]["avg"] for name in ("request_throughput", "time_to_first_token", "request_latency")
    )
    return Report(rate, ttft, e2e)


def with_cpu_time(client: Callable[[int, Path], Report], few: int, many: int) -> Report:
    """Run *client* twice; the report of the many, with the CPU seconds of 1,000 requests."""
    reports, used = [], []
    for number in (few, many):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with tempfile.TemporaryDirectory() as folder:
            reports.append(client(number, Path(folder)))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    report = reports[-1]
    return Report(report.rate, report.ttft_ms, report.e2e_ms, (used[1] - used[0]) / (many - few) * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="folder of a tokenizer, for the prompts of the others")
    parser.add_argument("--vllm", help="the Python of an environment with vLLM")
    parser.add_argument("--aiperf", help="the program aiperf")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests", type=int, nargs=2, default=(500, 3000), metavar=("FEW", "MANY"))
    parser.add_argument("--step-ms", default="5+0.02", help="the mock server's")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        report = asyncio.run(load(arguments.load[0], int(arguments.load[1]), arguments.concurrency))
        print(json.dumps(vars(report)))
        return
    clients = {"ours": ours}
    if arguments.vllm:
        clients["vllm bench"] = vllm
    if arguments.aiperf:
        clients["aiperf"] = aiperf
    found: dict[str, list[Report]] = {name: [] for name in clients}
    with mock_server("--step-ms", arguments.step_ms) as url:
        for _ in range(arguments.rounds):
            for name, client in clients.items():
                report = with_cpu_time(partial(client, arguments, url), *arguments.requests)
                found[name].append(report)
                print(
                    f"{name:>10}: {report.rate:6.1f} requests/s, {report.cpu_seconds:5.2f} CPU s per 1,000, ",
                    end="",
                )
                print(f"TTFT {report.ttft_ms:6.1f} ms, E2E {report.e2e_ms:6.1f} ms", flush=True)
    for name in list(clients)[1:]:
        pairs = list(zip(found[name], found["ours"], strict=True))
        print(f"{name} ÷ ours:", end="")
        for figure in ("rate", "cpu_seconds", "ttft_ms", "e2e_ms"):
            ratios = [getattr(other, figure) / getattr(own, figure) for other, own in pairs]
            print(f"  {figure} {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})", end="")
        print()


if __name__ == "__main__":
    main()
