"""A real server for tests: llama.cpp's, from the package xllamacpp.

python -m tests.support.llama_cpp MODEL.gguf --port 8000 --parallel 4
"""

from __future__ import annotations

import argparse
import signal

import xllamacpp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parallel", type=int, default=4, help="requests that it runs at a time")
    options = parser.parse_args()
    parameters = xllamacpp.CommonParams()
    parameters.model.path = options.model
    parameters.hostnames, parameters.port = ["127.0.0.1"], options.port
    parameters.n_parallel, parameters.n_ctx = options.parallel, 512 * options.parallel
    parameters.cpuparams.n_threads = 1
    parameters.endpoint_metrics, parameters.warmup = True, False
    server = xllamacpp.Server(parameters)
    print(f"listening on {server.listening_address}", flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
