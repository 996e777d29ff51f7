"""Compare the load client, and a study, with ``vllm bench serve``, AIPerf and guidellm on the same server.

    python tests/benchmarks/load_client.py --tokenizer DIR [--vllm PYTHON] [--aiperf PROGRAM] [--guidellm PROGRAM]
        [--checkout FOLDER] [--study] [--url URL --model NAME --vocabulary SIZE] [--rounds N]

Each round runs every client, with few and with many requests, so that drift affects all alike. The CPU time of a
client is that of its processes for the many less that for the few, so that imports do not count; making the
prompts does. Its rates and latencies are those that it reports for the many. Ratios are to ours, by round.
``--checkout`` adds our client of another version, whose repository is in FOLDER. ``--study`` adds a study of the
same load by ``server.url``, with its ramp, window and drain.

Prompts of about 64 tokens and 64 new tokens by default, in a closed loop. The server, a mock or that of ``--url``,
is the same process for all clients, and on the same processor cores.

On two cores, the one round without other load: 152 requests/s (vLLM 152, AIPerf 147) and 1.6 CPU seconds per 1,000
(2.4 and 10.6); TTFT 15.6 ms (17.6 and 20.4), and E2E latencies within 0.4 %. All slots begin together, and so end
together: a likely reason for the TTFTs is the CPU time that a client needs to send such a burst. The E2E latencies
agree, so AIPerf's lower rate is time between requests. docs/explanation/serving.md has figures of later versions,
with guidellm and a study.

The client before answers were read without a task, by ``--checkout FOLDER --tokens 128 --step-ms 5+0
--requests 64 576 --rounds 7``: 1.32 (1.11 to 1.38) times the CPU time, 1.32 (0.72 to 1.53) times the TTFT, 0.953
(0.944 to 0.978) times the tokens/s.
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
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path
from time import monotonic

from pytest_llem.serving.client import Client, Endpoint, LoadRequest
from pytest_llem.serving.errors import DatasetExhaustedError
from pytest_llem.serving.load import Load
from pytest_llem.serving.schedule import ClosedLoop
from tests.support.serving import mock_server, requests

#: The command ``vllm bench serve``, which fails with vLLM's build for CPU: its distribution has another name.
_VLLM_BENCH_SERVE = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""

#: The statistic of each metric of guidellm, and its factor to our unit.
_GUIDELLM = {
    "requests_per_second": ("mean", 1),
    "output_tokens_per_second": ("mean", 1),
    "time_to_first_token_ms": ("median", 1),
    "inter_token_latency_ms": ("median", 1),
    "request_latency": ("median", 1e3),
}


@dataclass(frozen=True)
class Report:
    """What a client reports, and the CPU time of its processes. Latencies are medians of the requests."""

    rate: float
    tokens_per_second: float
    ttft_ms: float
    tpot_ms: float
    e2e_ms: float
    cpu_seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.rate:6.2f} requests/s, {self.tokens_per_second:6.1f} tokens/s, TTFT {self.ttft_ms:6.1f} ms, "
            f"TPOT {self.tpot_ms:6.2f} ms, E2E {self.e2e_ms:6.1f} ms, {self.cpu_seconds:5.2f} CPU s per 1,000"
        )


def prompts(first: int, number: int, tokens: int) -> Iterator[LoadRequest]:
    """Yield *number* requests, and end the load after them."""
    yield from islice(requests(tokens, tokens), first, first + number)
    raise DatasetExhaustedError("all requests are sent")


async def load(url: str, number: int, concurrency: int, first: int, tokens: int) -> Report:
    """Send *number* requests with our client, of which *first* is the number of the first one."""
    endpoint = Endpoint(url, fields={"ignore_eos": True}, token_ids=True)
    async with Client(endpoint, concurrency) as client:
        load = Load(client, prompts(first, number, tokens), ClosedLoop(concurrency, ramp_seconds=0.0))
        began = monotonic()
        try:
            await load.begin()
            await load.hold(3600)
        except DatasetExhaustedError:
            pass
        while load.in_flight:
            await asyncio.sleep(0.01)
        records = [request.record for request in load.records]
        await load.stop(0)
        ended = max(request.ended for request in load.records)
    latencies = zip(*((one.ttft_s or 0.0, one.tpot_s or 0.0, one.e2e_s or 0.0) for one in records), strict=True)
    seconds = ended - began
    received = sum(record.output_tokens or 0 for record in records)
    return Report(len(records) / seconds, received / seconds, *(1e3 * statistics.median(one) for one in latencies))


def ours(
    arguments: argparse.Namespace, url: str, number: int, folder: Path, root: Path = Path(__file__).parents[2]
) -> Report:
    """Run our client of the checkout in *root*."""
    command = [sys.executable, "-m", "tests.benchmarks.load_client", "--load", url, str(number)]
    command += ["--concurrency", str(arguments.concurrency)]
    command += ["--seed", str(arguments.seed), "--tokens", str(arguments.tokens)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    return Report(**json.loads(out))


def checkout(arguments: argparse.Namespace, url: str, number: int, folder: Path) -> Report:
    return ours(arguments, url, number, folder, arguments.checkout)


def study(arguments: argparse.Namespace, url: str, number: int, folder: Path) -> Report:
    """Run a study of a window that is as long as our client took for *number* requests."""
    settings = {
        "backend": "server",
        "server": {"url": url, "vocab_size": arguments.vocabulary, "gpus": 0},
        "random_seed": arguments.seed,
        "max_input_tokens": arguments.tokens,
        "max_output_tokens": arguments.tokens,
        "load": {"concurrency": arguments.concurrency},
        "measurement": {"min_window_seconds": round(number / arguments.rate, 1)},
        "baseline": {"enabled": False},
        "execution": {"n_cycles": 1, "contended_retries": 0},
    }
    (folder / "study.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pytest", "study.yaml", "-p", "llem", f"--rootdir={folder}"]
    subprocess.run(command, check=True, capture_output=True, cwd=folder)
    [path] = folder.glob("results/*/experiments/*.json")
    result = json.loads(path.read_text())
    names = ("requests_per_second", "output_tokens_per_second", "ttft_p50_ms", "tpot_p50_ms", "e2e_p50_ms")
    report = Report(*(result["metrics"][name]["value"] for name in names))
    return replace(report, cpu_seconds=result["load"]["client_cpu_seconds"] / result["load"]["due"] * 1e3)


def vllm(arguments: argparse.Namespace, url: str, number: int, folder: Path) -> Report:
    command = [
        *(arguments.vllm, "-c", _VLLM_BENCH_SERVE, "--base-url", url),
        *("--backend", "openai", "--endpoint", "/v1/completions", "--model", arguments.model),
        *(
            "--tokenizer",
            arguments.tokenizer,
            "--dataset-name",
            "random",
            "--random-input-len",
            str(arguments.tokens),
        ),
        *(
            "--random-output-len",
            str(arguments.tokens),
            "--ignore-eos",
            "--num-prompts",
            str(number),
            "--disable-tqdm",
        ),
        *("--max-concurrency", str(arguments.concurrency), "--percentile-metrics", "ttft,tpot,itl,e2el"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", "vllm.json"),
        *("--seed", str(arguments.seed)),
    ]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads((folder / "vllm.json").read_text())
    if (lost := number - result["completed"]) > 0:  # such as an answer whose tokens have no text
        print(f"vllm: {lost} of {number} requests failed", file=sys.stderr)
    names = ("request_throughput", "output_throughput", "median_ttft_ms", "median_tpot_ms", "median_e2el_ms")
    return Report(*(result[name] for name in names))


def aiperf(arguments: argparse.Namespace, url: str, number: int, folder: Path) -> Report:
    command = [
        *(arguments.aiperf, "profile", "--url", url, "--model", arguments.model, "--endpoint-type", "completions"),
        *(
            "--streaming",
            "--tokenizer",
            arguments.tokenizer,
            "--isl",
            str(arguments.tokens),
            "--osl",
            str(arguments.tokens),
        ),
        *("--request-count", str(number), "--concurrency", str(arguments.concurrency), "--use-server-token-count"),
        *("--extra-inputs", "ignore_eos:true", "--ui", "none", "--output-artifact-dir", str(folder)),
        *("--random-seed", str(arguments.seed)),
    ]
    # Offline, it takes a folder for a name on the hub.
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)
    result = json.loads((folder / "profile_export_aiperf.json").read_text())
    rates = (result[name]["avg"] for name in ("request_throughput", "output_token_throughput"))
    latencies = (result[name]["p50"] for name in ("time_to_first_token", "inter_token_latency", "request_latency"))
    return Report(*rates, *latencies)


def guidellm(arguments: argparse.Namespace, url: str, number: int, folder: Path) -> Report:
    """Run guidellm, whose ``inter_token_latency`` is TPOT; its ``time_per_output_token`` includes TTFT."""
    target = f"target={url},model={arguments.model},request_format=/v1/completions"
    command = [
        *(arguments.guidellm, "run", "--backend", f"kind=openai_http,{target}"),
        *("--profile", f"kind=concurrent,streams={arguments.concurrency}"),
        *("--constraint", f"kind=max_requests,count={number}"),
        *("--tokenizer", f"kind=huggingface_auto,model={arguments.tokenizer}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={arguments.tokens},output_tokens={arguments.tokens}"),
        *("--seed", f"kind=static,value={arguments.seed}"),
        *("--output", f"kind=json,path={folder / 'guidellm.json'}", "--disable-console"),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    [benchmark] = json.loads((folder / "guidellm.json").read_text())["benchmarks"]
    metrics = {name: value["successful"] for name, value in benchmark["metrics"].items() if name in _GUIDELLM}
    values = [metrics[name][statistic] * scale for name, (statistic, scale) in _GUIDELLM.items()]
    return Report(*values)


def with_cpu_time(client: Callable[[int, Path], Report], few: int, many: int) -> Report:
    """Run *client* twice; the report of the many, with the CPU seconds of 1,000 requests."""
    reports, used = [], []
    for number in (few, many):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with tempfile.TemporaryDirectory() as folder:
            reports.append(client(number, Path(folder)))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return replace(reports[-1], cpu_seconds=(used[1] - used[0]) / (many - few) * 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, help="folder of another version of this repository")
    parser.add_argument("--tokenizer", help="folder of a tokenizer, for the prompts of the others")
    parser.add_argument("--vllm", help="the Python of an environment with vLLM")
    parser.add_argument("--aiperf", help="the program aiperf")
    parser.add_argument("--guidellm", help="the program guidellm")
    parser.add_argument("--study", action="store_true", help="run a study, too")
    parser.add_argument("--url", help="URL of a server that runs, instead of the mock server")
    parser.add_argument("--model", default="mock", help="name of its model")
    parser.add_argument("--vocabulary", type=int, default=1000, help="number of its token ids")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--requests", type=int, nargs=2, default=(500, 3000), metavar=("FEW", "MANY"))
    parser.add_argument("--tokens", type=int, default=64, help="of each prompt, and of each answer")
    parser.add_argument("--step-ms", default="5+0.02", help="the mock server's")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        url, number = arguments.load[0], int(arguments.load[1])
        report = asyncio.run(load(url, number, arguments.concurrency, arguments.seed * number, arguments.tokens))
        print(json.dumps(vars(report)))
        return
    clients: dict[str, Callable[..., Report]] = {"ours": ours}
    for client in (checkout, vllm, aiperf, guidellm, study):
        if getattr(arguments, client.__name__):
            clients[client.__name__] = client
    found: dict[str, list[Report]] = {name: [] for name in clients}
    with nullcontext(arguments.url) if arguments.url else mock_server("--step-ms", arguments.step_ms) as url:
        for seed in range(1, arguments.rounds + 1):
            arguments.seed = seed
            for name, client in clients.items():
                if name == "study":  # reports its client's CPU time itself
                    arguments.rate = found["ours"][-1].rate
                    with tempfile.TemporaryDirectory() as folder:
                        report = study(arguments, url, arguments.requests[1], Path(folder))
                else:
                    report = with_cpu_time(partial(client, arguments, url), *arguments.requests)
                found[name].append(report)
                print(f"{name:>8}: {report}", flush=True)
    for name in list(clients)[1:]:
        pairs = list(zip(found[name], found["ours"], strict=True))
        print(f"{name} ÷ ours:", end="")
        for field in fields(Report):
            ratios = [getattr(other, field.name) / getattr(own, field.name) for other, own in pairs]
            print(f"  {field.name} {statistics.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})", end="")
        print()


if __name__ == "__main__":
    main()
