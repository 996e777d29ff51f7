"""Drive a server with a load: ramp, window in the steady state, drain."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_llem.energy.account import Account, Meters, Total, join_accounts
from pytest_llem.engines.protocol import EngineCrashError, RequestRecord
from pytest_llem.measurement.driver import Driver
from pytest_llem.measurement.load_metrics import load_metrics, requests_of
from pytest_llem.measurement.load_window import LoadWindow, due_at
from pytest_llem.measurement.observers import WindowObservers
from pytest_llem.measurement.progress import Progress
from pytest_llem.measurement.requests import Requests
from pytest_llem.measurement.turns import Turn, Turns, progress
from pytest_llem.results.experiment import TokenRecord, WarmupRecord
from pytest_llem.results.metrics import Metric, metric
from pytest_llem.results.quality_warnings import QualityWarning
from pytest_llem.results.serving import LoadRecord, ProbeRecord
from pytest_llem.results.statistics import total_of
from pytest_llem.serving.checks import check_client, check_steady
from pytest_llem.serving.client import Client, LoadRequest
from pytest_llem.serving.counters import Counters, read_counters
from pytest_llem.serving.engine import ServerEngine
from pytest_llem.serving.errors import NotSteadyError, ServerGoneError
from pytest_llem.serving.load import Load
from pytest_llem.serving.prompts import synthetic_requests, text_requests
from pytest_llem.serving.schedule import ClosedLoop, OpenLoop, constant, from_trace, poisson
from pytest_llem.serving.search import next_load
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.load import LoadConfig
from pytest_llem.workload.prompts import Texts, prompts_digest

#: Interval between two reports of the live progress, and between two reads of the server's counters, in s.
_SAMPLE_SECONDS = 1.0

#: Maximum number of requests in flight while warming up.
_WARMUP_CONCURRENCY = 8


class LoadDriver(Driver[LoadWindow]):
    """Puts the load of an experiment on a server, and measures.

    Args:
        engine: The server.
        config: The experiment.
        texts: The texts of the dataset; None for synthetic prompts.
        directory: Folder that a trace's path is relative to.
        cycle: Number of the cycle, which no other shares prompts or arrivals with.
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
        self._directory, self._cycle, self._on_progress = directory, cycle, on_progress
        first = engine.record.first_prompt
        self._texts = None if texts is None else texts.conversations
        self._vocabulary = engine.vocabulary() if texts is None else ()
        self._requests = self._counted(self._make_requests(first))
        self.prompts_taken = 0
        self._slices = 0
        #: What precedes the phases of a search's probe in progress reports.
        self._probing = ""

    def run_once(self) -> None:
        """Send one request, so that the server allocates all that it needs."""
        self._send_alone(1, 1)

    def warm_up(self, on_run: Callable[[int, int | None], None]) -> WarmupRecord | None:
        """Send ``warmup.n_warmup`` requests. The ramp before each window is a warm-up with its load."""
        warmup = self._config.warmup
        if not warmup.enabled:
            return None
        on_run(0, warmup.n_warmup)
        began = time.monotonic()
        self._send_alone(warmup.n_warmup, min(warmup.n_warmup, _WARMUP_CONCURRENCY))
        return WarmupRecord(runs=warmup.n_warmup, seconds=time.monotonic() - began)

    def measure(self, meters: Meters, observers: WindowObservers, turns: Turns | None = None) -> LoadWindow:
        """Measure the steady state for at least ``measurement.min_window_seconds``.

        Args:
            meters: Open meters, outside of a window.
            observers: Observe each window, or turn.
            turns: Turns with another experiment; None to measure without interruption.

        Raises:
            LoadError: The load could not be kept.
            EngineCrashError: The server has ended.
        """
        min_seconds = self._config.measurement.min_window_seconds
        if turns is None:
            if self._load.is_search:
                return self._search(meters, observers)
            return self._slice(self._load, meters, min_seconds, observers)
        taken: list[LoadWindow] = []
        while True:
            measured = math.fsum(one.seconds for one in taken)
            turn = turns.next_turn(progress(len(taken), measured, min_seconds, observers.waiting_cpus))
            if turn is None:
                return join_windows(taken)
            taken.append(self._slice(self._load, meters, turns.min_seconds, observers, turn))

    def _search(self, meters: Meters, observers: WindowObservers) -> LoadWindow:
        """Return the window of the largest load within the SLO."""
        search, probes = self._load.search, []
        is_whole = self._load.concurrency == "auto"
        best: LoadWindow | None = None
        within: float | None = None
        beyond: float | None = None
        while (load := next_load(search, within, beyond, is_whole=is_whole)) is not None:
            window, probe = self._probe(load, meters, observers)
            probes.append(probe)
            if probe.within_slo:
                best, within = window, load
            else:
                beyond = load
        if best is None:
            found = probe.reason or f"{probe.attainment:.1%} of the requests were within it"
            raise NotSteadyError(f"no load is within the SLO: at load.search.low ({search.low:g}), {found}")
        return replace(best, probes=tuple(probes))

    def _probe(
        self, load: float, meters: Meters, observers: WindowObservers
    ) -> tuple[LoadWindow | None, ProbeRecord]:
        name = "concurrency" if self._load.concurrency == "auto" else "rate"
        point = self._load.model_copy(update={name: int(load) if name == "concurrency" else load})
        self._probing = f"{name} {load:g}, "
        began = time.monotonic()
        try:
            window = self._slice(point, meters, self._config.measurement.min_window_seconds, observers)
        except NotSteadyError as error:
            seconds = time.monotonic() - began
            return None, ProbeRecord(
                load=load, attainment=None, within_slo=False, reason=str(error), window_seconds=seconds
            )
        metrics = load_metrics(window, requests_of(window))
        attainment = metrics["slo_attainment"].value
        assert point.slo is not None
        return window, ProbeRecord(
            load=load,
            attainment=attainment,
            within_slo=attainment is not None and attainment >= point.slo.attainment,
            reason=metrics["slo_attainment"].reason,
            window_seconds=window.seconds,
            output_tokens_per_second=metrics["output_tokens_per_second"].value,
            energy_per_output_token_j=metrics["energy_per_output_token_j"].value,
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
            prompts=self.prompts_taken,
            due=len(due),
            failed=sum(not one.is_served for one in due),
            good=None if None in good else sum(map(bool, good)),
            client_output_tokens=total_of(one.output_tokens for one in sent if one.error is None),
            server_output_tokens=None if window.server_tokens is None else round(window.server_tokens),
            client_cpu_seconds=window.client_cpu_seconds,
            probes=list(window.probes),
        )

    def records(self, window: LoadWindow) -> dict[str, Any]:
        """Return the records of the server and of the load."""
        return {"server": self._engine.record, "load": self.record(window)}

    def requests(self, window: LoadWindow) -> Requests:
        """Return the requests that were due in *window*."""
        return requests_of(window)

    def sent(self, window: LoadWindow, requests: Requests) -> Requests:
        """Return every request, by whether it was due in the ramp, the window or the drain."""
        phases: dict[object, list[RequestRecord]] = {"ramp": [], "window": [], "drain": []}
        for part in window.parts:
            for record in part.records:
                due = due_at(record) or part.began
                phase = "ramp" if due < part.began else "window" if due < part.ended else "drain"
                phases[phase].append(record)
        return Requests(list(phases.values()), numbers=list(phases))

    def check(self, window: LoadWindow, requests: Requests) -> str | None:
        """Return why no gate may judge the requests; None if gates may."""
        return None

    def metrics(self, window: LoadWindow, requests: Requests) -> dict[str, Metric]:
        """Return the metrics that follow from the requests of *window*."""
        return load_metrics(window, requests)

    def loading_metrics(self, seconds: float, total: Total) -> dict[str, Metric]:
        """Return the time that the server took to start. What its client took is not its loading."""
        server = self._engine.record
        began = "the server ran already" if server.attached else None
        return {
            "load_seconds": metric("load_seconds", server.ready_seconds, reason=began),
            "load_energy_j": metric(
                "load_energy_j", None, method="unavailable", reason=began or "the server started before the meters"
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
            dataset_hash=None if self._texts is None else prompts_digest(map("\n".join, self._texts)),
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
        if self._engine.record.attached:
            yield QualityWarning.of("server_attached", "the server ran already: it is not a fresh process")

    def _slice(
        self,
        load: LoadConfig,
        meters: Meters,
        min_seconds: float,
        observers: WindowObservers,
        turn: Turn | None = None,
    ) -> LoadWindow:
        """Measure once: ramp, at least *min_seconds* of steady state, drain."""
        self._slices += 1
        try:
            return asyncio.run(self._measured(load, meters, min_seconds, observers, turn))
        except ServerGoneError as error:
            raise EngineCrashError(str(error)) from error

    async def _measured(
        self,
        load: LoadConfig,
        meters: Meters,
        min_seconds: float,
        observers: WindowObservers,
        turn: Turn | None,
    ) -> LoadWindow:
        started, connections = time.monotonic(), self._connections(load)
        async with Client(self._engine.endpoint(), connections) as client, _watched(self._engine) as lost:
            under_load = Load(
                client, self._requests, self._schedule(load), max_error_rate=load.max_error_rate, lost=lost
            )
            before = await self._counters(client)
            account: Account | None = None
            is_metering = False
            batches: list[float] = []
            try:
                async with self._reported(under_load, Progress("ramping up")):
                    await under_load.begin()
                await asyncio.to_thread(observers.begin)
                is_metering = True
                await asyncio.to_thread(meters.begin)
                began, began_at, cpu = time.monotonic(), time.time(), time.process_time()
                measuring = Progress("measuring", total=min_seconds, unit="s")
                async with self._reported(under_load, measuring), self._sampled(client, batches):
                    await under_load.hold(min_seconds, min_finished=connections if not load.is_open else 1)
                ended, cpu_seconds = time.monotonic(), time.process_time() - cpu
                account = await asyncio.to_thread(meters.end)
                await asyncio.to_thread(observers.end, account, turn)
                self._on_progress(Progress("draining"))
            finally:
                if is_metering and account is None:
                    await asyncio.to_thread(meters.end)
                await under_load.drain(load.request_timeout_seconds)
            drained = time.monotonic()
            after = await self._counters(client)
        lags = under_load.send_lags(began, ended)
        check_client(lags, under_load.records)
        if load.is_open:
            check_steady(under_load.records, began, ended)
        window = LoadWindow(
            ended - began,
            account,
            began,
            began_at,
            records=[one.record for one in under_load.records],
            slo=load.slo,
            prompts=self._config.n,
            load=_load_of(load),
            ramp_seconds=began - started,
            drain_seconds=drained - ended,
            send_lags=lags,
            concurrency=under_load.mean_in_flight(began, ended),
            batch=math.fsum(batches) / len(batches) if batches else None,
            client_cpu_seconds=cpu_seconds,
            server_tokens=_difference(before, after, "generation_tokens"),
            cache_queries=_difference(before, after, "prefix_cache_queries"),
            cache_hits=_difference(before, after, "prefix_cache_hits"),
        )
        if not window.work.requests or not window.metered_work.requests:
            raise ValueError("no request was answered in the window: raise measurement.min_window_seconds")
        return window

    @asynccontextmanager
    async def _reported(self, load: Load, phase: Progress) -> AsyncIterator[None]:
        """Report *phase* with the state of *load*, about once a second."""
        phase = replace(phase, phase=f"{self._probing}{phase.phase}")

        async def report() -> None:
            began = at = time.monotonic()
            tokens = load.tokens_so_far
            self._on_progress(replace(phase, in_flight=load.in_flight))
            while True:
                await asyncio.sleep(_SAMPLE_SECONDS)
                now, so_far = time.monotonic(), load.tokens_so_far
                rate, tokens, at = (so_far - tokens) / (now - at), so_far, now
                done = None if phase.total is None else min(int(now - began), int(phase.total))
                self._on_progress(
                    replace(phase, done=done, in_flight=load.in_flight, tokens_per_second=max(0.0, rate))
                )

        async with _in_background(report()):
            yield

    @asynccontextmanager
    async def _sampled(self, client: Client, batches: list[float]) -> AsyncIterator[None]:
        """Collect how many requests the server runs, about once a second."""

        async def sample() -> None:
            while True:
                await asyncio.sleep(_SAMPLE_SECONDS)
                counters = await self._counters(client)
                if counters is not None and counters.running is not None:
                    batches.append(counters.running)

        async with _in_background(sample()):
            yield

    async def _counters(self, client: Client) -> Counters | None:
        path = self._config.server.metrics if self._config.server else None
        return None if path is None else await read_counters(client.session, self._engine.record.url, path)

    def _connections(self, load: LoadConfig) -> int:
        return load.max_in_flight if load.is_open else int(load.concurrency or 1)

    def _schedule(self, load: LoadConfig) -> ClosedLoop | OpenLoop:
        ramp = None if load.ramp_seconds == "auto" else float(load.ramp_seconds)
        if not load.is_open:
            return ClosedLoop(int(load.concurrency or 1), ramp)
        seed = f"{self._config.random_seed}:{self._cycle}:{self._slices}"
        if load.trace is not None:
            arrivals = from_trace(self._directory / load.trace)
        elif load.arrival == "poisson":
            arrivals = poisson(float(load.rate or 0), seed)
        else:
            arrivals = constant(float(load.rate or 0))
        return OpenLoop(arrivals, load.max_in_flight, ramp)

    def _make_requests(self, first: int) -> Iterator[LoadRequest]:
        if self._texts is None:
            return synthetic_requests(self._config, self._vocabulary, self._cycle, first)
        return text_requests(self._config, self._texts, first)

    def _counted(self, requests: Iterator[LoadRequest]) -> Iterator[LoadRequest]:
        for request in requests:
            self.prompts_taken += 1
            yield request

    def _send_alone(self, count: int, concurrency: int) -> None:
        """Send so many requests that are not measured, and wait for their answers.

        Raises:
            EngineCrashError: The server refuses connections.
            ValueError: It does not answer one of them.
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


def join_windows(parts: Sequence[LoadWindow]) -> LoadWindow:
    """Return the windows of one experiment's turns as one window, which lasts as long as they do together."""
    first = parts[0]
    seconds = math.fsum(part.seconds for part in parts)

    def mean(values: Sequence[float | None]) -> float | None:
        weighted = [
            None if value is None else value * part.seconds for value, part in zip(values, parts, strict=True)
        ]
        total = total_of(weighted)
        return None if total is None else total / seconds

    return LoadWindow(
        seconds,
        join_accounts([part.account for part in parts]),
        first.began,
        first.began_at,
        slo=first.slo,
        prompts=first.prompts,
        load=first.load,
        send_lags=[lag for part in parts for lag in part.send_lags],
        concurrency=mean([part.concurrency for part in parts]),
        batch=mean([part.batch for part in parts]),
        client_cpu_seconds=total_of(part.client_cpu_seconds for part in parts),
        server_tokens=total_of(part.server_tokens for part in parts),
        cache_queries=total_of(part.cache_queries for part in parts),
        cache_hits=total_of(part.cache_hits for part in parts),
        records=[record for part in parts for record in part.records],
        turns=parts,
    )


def _load_of(load: LoadConfig) -> float | None:
    given = load.concurrency if load.rate is None else load.rate
    return None if given is None else float(given)


def _difference(before: Counters | None, after: Counters | None, name: str) -> float | None:
    """Return how much a counter has risen; None if the server does not export it."""
    first, last = getattr(before, name, None), getattr(after, name, None)
    return None if first is None or last is None else last - first


@asynccontextmanager
async def _in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Do *work* as long as the context lasts."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def _watched(engine: ServerEngine) -> AsyncIterator[asyncio.Event]:
    """Yield an event that is set when the server's first process ends."""
    lost, pidfds = asyncio.Event(), []
    loop = asyncio.get_running_loop()
    try:
        if engine.record.pid is not None:
            pidfds.append(os.pidfd_open(engine.record.pid))
    except ProcessLookupError:
        lost.set()
    except (AttributeError, OSError):  # not Linux, or another user's
        pass
    for fd in pidfds:
        loop.add_reader(fd, lost.set)
    try:
        yield lost
    finally:
        for fd in pidfds:
            loop.remove_reader(fd)
            os.close(fd)
