"""Drive a server with the load of an experiment, and return its metrics and records."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pytest_llem.energy.account import Meters, Total
from pytest_llem.engines.protocol import EngineCrashError, RequestRecord
from pytest_llem.measurement.driver import Driver, measure_turns
from pytest_llem.measurement.load_measurement import LoadMeasurement
from pytest_llem.measurement.load_metrics import load_metrics, requests_of
from pytest_llem.measurement.load_search import search
from pytest_llem.measurement.load_window import LoadWindow, join_windows
from pytest_llem.measurement.observers import WindowObservers
from pytest_llem.measurement.progress import Progress
from pytest_llem.measurement.requests import Requests
from pytest_llem.measurement.turns import Turns
from pytest_llem.results.experiment import TokenRecord, WarmupRecord
from pytest_llem.results.metrics import Metric, metric
from pytest_llem.results.quality_warnings import QualityWarning
from pytest_llem.results.serving import PHASES, DriftRecord, LoadRecord
from pytest_llem.results.statistics import total_of
from pytest_llem.serving.client import Client, LoadRequest, Prompt
from pytest_llem.serving.engine import ServerEngine
from pytest_llem.serving.errors import DatasetExhaustedError, LoadError
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.load import LoadConfig
from pytest_llem.workload.prompts import Texts, texts_digest

#: Maximum number of requests in flight while warming up.
_WARMUP_CONCURRENCY = 8


class LoadDriver(Driver[LoadWindow]):
    """Puts the load of an experiment on a server, and measures.

    Args:
        engine: The server.
        config: The experiment.
        texts: The texts of the dataset; None for synthetic prompts.
        directory: Folder that a trace's path is relative to.
        cycle: Number of the cycle. Each cycle has arrivals and synthetic prompts of its own.
        on_progress: Called about once a second while the load is on.
    """

    def __init__(
        self,
        engine: ServerEngine,
        config: ExperimentConfig,
        texts: Texts | None,
        *,
        directory: Path = Path(),
        cycle: int = 1,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        assert config.load is not None
        self._engine, self._config, self._load = engine, config, config.load
        self._texts = texts
        conversations, vocabulary = (None, engine.vocabulary()) if texts is None else (texts.conversations, ())
        self._requests = LoadRequests(config, conversations, vocabulary, cycle, engine.record.first_prompt)
        self._drift = engine.record.drift
        self._drift_requests: Sequence[RequestRecord] = ()
        self._measurement = LoadMeasurement(
            engine, config, self._requests, directory=directory, cycle=cycle, on_progress=on_progress
        )

    def run_once(self) -> None:
        """Send one request, so that the server allocates all that it needs."""
        self._send_unmeasured(1, 1)

    def warm_up(self, on_run: Callable[[int, int | None], None]) -> WarmupRecord | None:
        """Send ``warmup.n_warmup`` requests. The ramp-up before each window also warms up, with its load."""
        warmup = self._config.warmup
        if not warmup.enabled:
            return None
        on_run(0, warmup.n_warmup)
        began = time.monotonic()
        self._send_unmeasured(warmup.n_warmup, min(warmup.n_warmup, _WARMUP_CONCURRENCY))
        return WarmupRecord(runs=warmup.n_warmup, seconds=time.monotonic() - began)

    def measure(self, meters: Meters, observers: WindowObservers, turns: Turns | None = None) -> LoadWindow:
        """Measure the steady state for at least ``measurement.min_window_seconds``.

        Raises:
            LoadError: The load could not be kept.
            EngineCrashError: The server has ended, or refuses connections.
            ValueError: No request was answered in the window.
        """
        min_seconds = self._config.measurement.min_window_seconds
        if turns is None:

            def measure(load: LoadConfig, label: str = "") -> LoadWindow:
                return self._measurement.measure(load, meters, observers, min_seconds, label=label)

            return search(self._load, measure) if self._load.is_search else measure(self._load)
        return join_windows(
            measure_turns(
                turns,
                observers,
                min_seconds,
                lambda seconds, turn: self._measurement.measure(self._load, meters, observers, seconds, turn=turn),
            )
        )

    def measure_drift(self, meters: Meters, observers: WindowObservers) -> None:
        """Measure the first load on the server again, with the same arrivals unless a search found it."""
        if self._drift is None:
            return
        seconds = self._config.measurement.min_window_seconds
        self._drift, self._drift_requests = measure_again(
            self._drift,
            lambda load: self._measurement.measure(
                load, meters, observers, seconds, label="the first load again, ", number=1
            ),
        )

    def record(self, window: LoadWindow) -> LoadRecord:
        """Return the record of the load of *window*."""
        load, due = self._load, window.due
        good = [window.is_good(one) for one in due]
        sent = [one for part in window.parts for one in part.records]
        return LoadRecord(
            kind="open" if load.is_open else "closed",
            concurrency=None if load.is_open or window.load is None else int(window.load),
            rate=window.load if load.is_open else None,
            ramp_seconds=sum(part.ramp_seconds for part in window.parts),
            drain_seconds=sum(part.drain_seconds for part in window.parts),
            sent=len(sent),
            prompts=self._requests.taken,
            due=len(due),
            failed=sum(not one.is_served for one in due),
            good=None if None in good else sum(map(bool, good)),
            client_output_tokens=total_of(one.output_tokens for one in sent if one.error is None),
            server_output_tokens=None if window.server_tokens is None else round(window.server_tokens),
            client_cpu_seconds=window.client_cpu_seconds,
            probes=list(window.probes),
        )

    def records(self, window: LoadWindow) -> dict[str, Any]:
        server = self._engine.record.model_copy(update={"drift": self._drift})
        return {"server": server, "load": self.record(window)}

    def requests(self, window: LoadWindow) -> Requests:
        return requests_of(window)

    def sent(self, window: LoadWindow, requests: Requests) -> Requests:
        """Return the requests of *window*, by phase: due in ramp-up, window or drain, or sent to measure drift."""
        phases: dict[str, list[RequestRecord]] = {phase: [] for phase in PHASES}
        phases["drift"] += self._drift_requests
        for part in window.parts:
            for record in part.records:
                due = record.start or part.began
                phase = "ramp" if due < part.began else "window" if due < part.ended else "drain"
                phases[phase].append(record)
        return Requests(list(phases.values()), numbers=list(phases))

    def metrics(self, window: LoadWindow, requests: Requests) -> dict[str, Metric]:
        return load_metrics(window, requests)

    def loading_metrics(self, seconds: float, total: Total) -> dict[str, Metric]:
        """Return the time that the server took to start. The time that its client took is not part of it."""
        server = self._engine.record
        reason = "the server ran already" if server.attached else None
        return {
            "load_seconds": metric("load_seconds", server.ready_seconds, reason=reason),
            "load_energy_j": metric(
                "load_energy_j",
                None,
                method="unavailable",
                reason=reason or "the server started before the meters",
            ),
        }

    def token_record(self, window: LoadWindow, requests: Requests) -> TokenRecord:
        """Return the token counts of ``n`` requests, as the mean over the window's."""
        work, passes = window.work, window.work.requests / window.prompts
        return TokenRecord(
            prompts=window.prompts,
            input_tokens=None if work.input_tokens is None else round(work.input_tokens / passes),
            output_tokens=None if work.output_tokens is None else round(work.output_tokens / passes),
            padding_waste=None,
            dataset_hash=None if self._texts is None else texts_digest(self._texts, self._config),
            requests=requests.total,
            failed_requests=requests.failed,
        )

    def warnings(self, window: LoadWindow, requests: Requests) -> Iterator[QualityWarning]:
        """Yield quality warnings about the server and its load."""
        load = self.record(window)
        counted, received = load.server_output_tokens, load.client_output_tokens
        if counted is not None and received is not None and counted != received:
            yield QualityWarning.of(
                "tokens_disagree",
                f"the server counted {counted:,} output tokens, and the client received {received:,}",
            )
        if self._drift is not None and self._drift.reason is not None:
            text = f"the first load on the server could not be measured again: {self._drift.reason}"
            yield QualityWarning.of("server_drift", text)
        if self._engine.record.attached:
            yield QualityWarning.of("server_attached", "the server ran already: it is not a fresh process")

    def _send_unmeasured(self, count: int, concurrency: int) -> None:
        """Send *count* requests that are not measured, and wait for their answers.

        Raises:
            EngineCrashError: The server refuses connections.
            ValueError: The server does not answer one of them.
        """

        async def send() -> None:
            async with Client(self._engine.endpoint(), concurrency) as client:
                slots = asyncio.Semaphore(concurrency)

                async def one(request: LoadRequest) -> str | None:
                    async with slots:
                        return (await client.send(request))[-1].error

                requests = [next(self._requests) for _ in range(count)]
                errors = await asyncio.gather(*map(one, requests))
                if (failed := next(filter(None, errors), None)) is not None:
                    if await client.refuses():
                        raise EngineCrashError(f"the server refuses connections: {failed}")
                    raise ValueError(f"the server does not answer a request: {failed}")

        asyncio.run(send())


def measure_again(
    drift: DriftRecord, measure: Callable[[LoadConfig], LoadWindow]
) -> tuple[DriftRecord, Sequence[RequestRecord]]:
    """Return *drift* with the metrics of its load measured again, and the requests that were sent for this.

    An error becomes the ``reason`` in the record: a diagnostic does not fail the experiment.

    Args:
        drift: The first load, and its metrics.
        measure: Measures a load.
    """
    try:
        window = measure(LoadConfig.model_validate(drift.load))
    except (LoadError, EngineCrashError, ValueError) as error:
        return drift.model_copy(update={"reason": str(error)}), ()
    metrics = load_metrics(window, requests_of(window))
    after = {name: value for name in drift.before if (value := metrics[name].value) is not None}
    return drift.model_copy(update={"after": after, "window_seconds": window.seconds}), window.records


class LoadRequests(Iterator[LoadRequest]):
    """Yields the requests of an experiment.

    A synthetic prompt is random token ids, which depend on the seed, the cycle and the prompt's number. Texts are
    sent in their order.

    Args:
        config: The experiment.
        texts: Texts of each request: several are the turns of a conversation; None for synthetic prompts.
        vocabulary: Token ids of which synthetic prompts are made.
        cycle: Number of the cycle. Each cycle has synthetic prompts of its own.
        first: Number of the first request: earlier experiments sent those before it to the same server. 0 is used
            if prompts are repeated.

    Attributes:
        taken: Number of requests so far.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        texts: Sequence[Sequence[str]] | None,
        vocabulary: Sequence[int],
        cycle: int,
        first: int,
    ) -> None:
        self._config, self._texts, self._vocabulary, self._cycle = config, texts, vocabulary, cycle
        assert config.load is not None
        self._is_distinct = config.load.prompts == "distinct"
        self._next = first if self._is_distinct else 0
        self.taken = 0

    def __next__(self) -> LoadRequest:
        """Return the next request.

        Raises:
            DatasetExhaustedError: All texts have been sent, and may not be repeated.
        """
        index = self._next if self._is_distinct else self._next % self._config.n
        request = self._synthetic(index) if self._texts is None else self._of_texts(index, self._texts)
        self._next += 1
        self.taken += 1
        return request

    def _synthetic(self, index: int) -> LoadRequest:
        workload = self._config.workload
        rng = random.Random(f"{workload.seed}:{self._cycle}:{index}")
        length = workload.lengths.draw(rng) if workload.lengths else workload.input_len
        return LoadRequest(index, [rng.choices(self._vocabulary, k=length)], workload.output_len)

    def _of_texts(self, index: int, texts: Sequence[Sequence[str]]) -> LoadRequest:
        if index >= len(texts):
            raise DatasetExhaustedError(
                f"the dataset has {len(texts)} prompts, and the server has got them all: use a larger dataset, or "
                "load.prompts: repeated"
            )
        assert self._config.server is not None
        turns: Sequence[Prompt] = texts[index] if self._config.server.api == "chat" else texts[index][:1]
        return LoadRequest(index, turns, self._config.max_output_tokens)
