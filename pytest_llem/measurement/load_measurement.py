"""Measure a server under one load: ramp-up, window in the steady state, drain."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_llem.energy.account import Account, Meters
from pytest_llem.engines.protocol import EngineCrashError
from pytest_llem.measurement.load_window import LoadWindow
from pytest_llem.measurement.observers import WindowObservers
from pytest_llem.measurement.progress import Progress
from pytest_llem.measurement.turns import Turn
from pytest_llem.serving.checks import check_client
from pytest_llem.serving.client import Client, LoadRequest
from pytest_llem.serving.counters import Counters, mean_batch, read_counters
from pytest_llem.serving.engine import ServerEngine
from pytest_llem.serving.errors import ServerGoneError
from pytest_llem.serving.load import Load
from pytest_llem.serving.schedule import ClosedLoop, OpenLoop, constant, from_trace, poisson
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.load import LoadConfig

#: Interval between two reports of the live progress, and between two reads of the server's counters, in s.
_SAMPLE_SECONDS = 1.0


class LoadMeasurement:
    """Measures one server under loads, one load after the other.

    Args:
        engine: The server.
        config: The experiment.
        requests: Iterator of the requests to send. It raises an error if the dataset is exhausted.
        directory: Folder that a trace's path is relative to.
        cycle: Number of the cycle, part of the seed of Poisson arrivals, so that cycles differ.
        on_progress: Called about once a second while a load is on.
    """

    def __init__(
        self,
        engine: ServerEngine,
        config: ExperimentConfig,
        requests: Iterator[LoadRequest],
        *,
        directory: Path,
        cycle: int,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._engine, self._config, self._requests = engine, config, requests
        self._directory, self._cycle, self._on_progress = directory, cycle, on_progress
        self._number = 0

    def measure(
        self,
        load: LoadConfig,
        meters: Meters,
        observers: WindowObservers,
        min_seconds: float,
        *,
        turn: Turn | None = None,
        label: str = "",
        number: int | None = None,
    ) -> LoadWindow:
        """Return one window under *load*: ramp-up, at least *min_seconds* of steady state, drain.

        Args:
            load: The load.
            meters: Open meters that have no window in progress.
            observers: Observers of the window.
            min_seconds: Minimum length of the window, in s.
            turn: Turn in which the window is measured; None if candidate and reference are not interleaved.
            label: Text before the name of each phase in progress reports.
            number: Number of the window in this experiment, which is part of the seed of Poisson arrivals; None
                for the next number.

        Raises:
            LoadError: Too many requests failed, the server is too slow for the load, the client is too slow, or
                there are too few prompts.
            EngineCrashError: The server has ended, or refuses connections.
            ValueError: No request was answered in the window.
        """
        self._number += 1
        schedule = self._schedule(load, number or self._number)
        try:
            return asyncio.run(self._measure(load, schedule, meters, observers, min_seconds, turn, label))
        except ServerGoneError as error:
            raise EngineCrashError(str(error)) from error

    async def _measure(
        self,
        load: LoadConfig,
        schedule: ClosedLoop | OpenLoop,
        meters: Meters,
        observers: WindowObservers,
        min_seconds: float,
        turn: Turn | None,
        label: str,
    ) -> LoadWindow:
        started, connections = time.monotonic(), load.max_in_flight if load.is_open else int(load.concurrency or 1)
        min_finished = 1 if load.is_open else connections  # closed loop: as many answers as it has in flight
        async with (
            Client(self._engine.endpoint(), connections) as client,
            _watch_server(self._engine) as server_ended,
        ):
            under_load = Load(
                client, self._requests, schedule, max_error_rate=load.max_error_rate, lost=server_ended
            )
            before_ramp = await self._counters(client)
            account: Account | None = None
            is_metering = False
            readings: list[Counters] = []
            try:
                async with self._report_progress(under_load, Progress(f"{label}ramping up")):
                    await under_load.begin()
                before_window = await self._counters(client)
                # Observers and meters block, for example until a counter ticks. In a thread they leave the event
                # loop free to send requests.
                await asyncio.to_thread(observers.begin)
                is_metering = True
                await asyncio.to_thread(meters.begin)
                began, began_at, cpu = time.monotonic(), time.time(), time.process_time()
                measuring = Progress(f"{label}measuring", total=min_seconds, unit="s")
                async with self._report_progress(under_load, measuring), self._sample_counters(client, readings):
                    await under_load.hold(min_seconds, min_finished)
                ended, cpu_seconds = time.monotonic(), time.process_time() - cpu
                account = await asyncio.to_thread(meters.end)
                await asyncio.to_thread(observers.end, account, turn)
                after_window = await self._counters(client)
                if load.is_open:
                    under_load.check_steady(began, ended)
                self._on_progress(Progress(f"{label}draining"))
            finally:
                if is_metering and account is None:
                    await asyncio.to_thread(meters.end)
                await under_load.stop(load.request_timeout_seconds)
            drained = time.monotonic()
            after_drain = await self._counters(client)
        lags = under_load.send_lags(began, ended)
        check_client(lags, under_load.records)
        window = LoadWindow(
            ended - began,
            account,
            began,
            began_at,
            records=[one.record for one in under_load.records],
            slo=load.slo,
            prompts=self._config.n,
            load=_value_of(load),
            ramp_seconds=began - started,
            drain_seconds=drained - ended,
            send_lags=lags,
            concurrency=under_load.mean_in_flight(began, ended),
            batch=mean_batch(readings),
            client_cpu_seconds=cpu_seconds,
            server_tokens=_increase(before_ramp, after_drain, "generation_tokens"),
            cache_queries=_increase(before_ramp, after_drain, "prefix_cache_queries"),
            cache_hits=_increase(before_ramp, after_drain, "prefix_cache_hits"),
            queue_seconds=_increase(before_window, after_window, "queue_seconds"),
            queued_requests=_increase(before_window, after_window, "queue_count"),
        )
        if not window.work.requests or not window.metered_work.requests:
            raise ValueError("no request was answered in the window: raise measurement.min_window_seconds")
        return window

    @asynccontextmanager
    async def _report_progress(self, load: Load, phase: Progress) -> AsyncIterator[None]:
        """Report *phase*, with requests in flight and tokens per second, about once a second."""

        async def report() -> None:
            began = read_at = time.monotonic()
            tokens = load.tokens_so_far
            self._on_progress(replace(phase, in_flight=load.in_flight))
            while True:
                await asyncio.sleep(_SAMPLE_SECONDS)
                now, so_far = time.monotonic(), load.tokens_so_far
                rate, tokens, read_at = (so_far - tokens) / (now - read_at), so_far, now
                done = None if phase.total is None else min(int(now - began), int(phase.total))
                self._on_progress(
                    replace(phase, done=done, in_flight=load.in_flight, tokens_per_second=max(0.0, rate))
                )

        async with _in_background(report()):
            yield

    @asynccontextmanager
    async def _sample_counters(self, client: Client, readings: list[Counters]) -> AsyncIterator[None]:
        """Add readings of the server's counters to *readings*, about once a second."""

        async def sample() -> None:
            while True:
                await asyncio.sleep(_SAMPLE_SECONDS)
                if (counters := await self._counters(client)) is not None:
                    readings.append(counters)

        async with _in_background(sample()):
            yield

    async def _counters(self, client: Client) -> Counters | None:
        path = self._config.server.metrics if self._config.server else None
        return None if path is None else await read_counters(client.session, self._engine.record.url, path)

    def _schedule(self, load: LoadConfig, number: int) -> ClosedLoop | OpenLoop:
        ramp = None if load.ramp_seconds == "auto" else float(load.ramp_seconds)
        if not load.is_open:
            return ClosedLoop(int(load.concurrency or 1), ramp)
        if load.trace is not None:
            arrivals = from_trace(self._directory / load.trace)
        elif load.arrival == "poisson":
            arrivals = poisson(float(load.rate or 0), f"{self._config.random_seed}:{self._cycle}:{number}")
        else:
            arrivals = constant(float(load.rate or 0))
        return OpenLoop(arrivals, load.max_in_flight, ramp)


def _value_of(load: LoadConfig) -> float | None:
    """Return the requests in flight of a closed loop, or the request rate of an open loop; None for a trace."""
    given = load.concurrency if load.rate is None else load.rate
    return None if given is None else float(given)


def _increase(before: Counters | None, after: Counters | None, name: str) -> float | None:
    """Return by how much a counter increased; None if a reading does not have it."""
    first, last = getattr(before, name, None), getattr(after, name, None)
    return None if first is None or last is None else last - first


@asynccontextmanager
async def _in_background(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run *work* as a task, and cancel it at the end of the context."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def _watch_server(engine: ServerEngine) -> AsyncIterator[asyncio.Event]:
    """Yield an event that is set when the server's first process ends."""
    ended, pidfds = asyncio.Event(), []
    loop = asyncio.get_running_loop()
    try:
        if engine.record.pid is not None:
            pidfds.append(os.pidfd_open(engine.record.pid))
    except ProcessLookupError:
        ended.set()
    except (AttributeError, OSError):  # pidfd_open does not exist (not Linux) or is not permitted
        pass
    for fd in pidfds:
        loop.add_reader(fd, ended.set)
    try:
        yield ended
    finally:
        for fd in pidfds:
            loop.remove_reader(fd)
            os.close(fd)
