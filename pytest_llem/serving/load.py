"""Keep a server under load: ramp-up, steady state, drain."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Callable, Coroutine, Iterator
from time import monotonic
from typing import Any

from pytest_llem.serving.checks import check_steady, mean_in_flight
from pytest_llem.serving.client import CANNOT_CONNECT, Client, LoadRequest, SentRequest
from pytest_llem.serving.errors import DatasetExhaustedError, NotSteadyError, ServerGoneError, TooManyErrors
from pytest_llem.serving.schedule import ClosedLoop, OpenLoop

#: Until this many requests have finished, the share of failed ones is judged as if this many had.
_MIN_JUDGED = 20

#: Number of finished requests after which an open loop can be steady.
_MIN_RAMP_REQUESTS = 10

#: Interval at which the lateness of the event loop is measured, in s.
_HEARTBEAT_SECONDS = 0.01

#: Iterations of the event loop from the arrival of data until the task that waits for it has run.
_ITERATIONS = 3


class Load:
    """A load on a server: requests, and when they are sent.

    Args:
        client: The open client.
        requests: The requests in order, without end, or up to a DatasetExhaustedError.
        schedule: When to send them.
        max_error_rate: Largest share of failed requests that is accepted.
        lost: Set by the caller when the server's process has ended; None if the caller does not watch it.

    Example:
        >>> load = Load(client, requests, ClosedLoop(16))
        >>> try:
        ...     await load.begin()
        ...     await load.hold(30)
        ... finally:
        ...     await load.stop(timeout=60)
        >>> [sent.record for sent in load.records]
    """

    def __init__(
        self,
        client: Client,
        requests: Iterator[LoadRequest],
        schedule: ClosedLoop | OpenLoop,
        *,
        max_error_rate: float = 0.0,
        lost: asyncio.Event | None = None,
    ) -> None:
        self._client = client
        self._requests = requests
        self._schedule = schedule
        self._max_error_rate = max_error_rate
        self._lost = asyncio.Event() if lost is None else lost
        self._sent: list[SentRequest] = []
        #: Duration of each request, in s; that of a conversation includes all of its turns.
        self._durations: list[float] = []
        #: When each request was sent, and how late, in s.
        self._lags: list[tuple[float, float]] = []
        self._in_flight = self._finished = self._failed = self._tokens = 0
        self._first_error = ""
        self._stopping = False
        self._raised = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._progress = asyncio.Event()
        self._undecoded: asyncio.Queue[SentRequest] = asyncio.Queue()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._heartbeat = Heartbeat()

    async def begin(self) -> None:
        """Start to send. Return when the steady state has begun.

        Closed loop: when every slot has finished a request. Open loop: see ``OpenLoop.ramp_seconds``.

        Raises:
            ServerGoneError: The server refuses connections, or ``lost`` was set.
            TooManyErrors: A larger share of the requests failed than ``max_error_rate``.
            NotSteadyError: Open loop: ``max_in_flight`` was reached.
            DatasetExhaustedError: There are no more requests or arrivals.
        """
        self._heartbeat.start()
        self._spawn(self._watch_server())
        self._spawn(self._decode())
        if isinstance(self._schedule, ClosedLoop):
            await self._or_failure(self._begin_closed(self._schedule))
        else:
            self._spawn(self._run_open(self._schedule))
            await self._or_failure(self._wait_until_steady(self._schedule))

    async def hold(self, seconds: float, min_finished: int = 0) -> None:
        """Keep the load up for *seconds*, and longer until *min_finished* more requests have ended.

        Raises:
            LoadError: As for ``begin``.
        """
        finished = self._finished + min_finished
        await self._or_failure(asyncio.sleep(seconds))
        await self._or_failure(self._until(lambda: self._finished >= finished))
        await self._or_failure(self._check_errors(self._finished))

    def check_steady(self, began: float, ended: float) -> None:
        """Check that the requests in flight do not grow within a window that has just ended.

        Args:
            began: Begin of the window, on the clock of ``time.monotonic``, in s.
            ended: End of the window.

        Raises:
            NotSteadyError: The requests in flight grow.
        """
        try:
            check_steady([*self._sent, *self._client.unanswered], began, ended)
        except NotSteadyError:
            self._raised = True
            raise

    async def stop(self, timeout: float) -> None:
        """Send no more requests, wait up to *timeout* s for those in flight, and cancel the rest.

        After an error it does not wait. A request that is cancelled is in ``records`` with an error, and does not
        count as failed.

        Raises:
            LoadError: As for ``begin``, unless such an error was raised before.
        """
        self._stopping = True
        try:
            if not self._raised:
                async with asyncio.timeout(timeout):
                    await self._or_failure(self._until(lambda: self._in_flight == 0))
        except TimeoutError:
            pass
        finally:
            self._heartbeat.stop()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if not self._raised:
            await self._or_failure(self._check_all())

    @property
    def records(self) -> list[SentRequest]:
        """All requests that have ended, in order of sending, those of ramp-up and drain included."""
        return sorted(self._sent, key=lambda request: request.sent)

    @property
    def in_flight(self) -> int:
        """Number of requests that were sent and have not ended."""
        return self._in_flight

    @property
    def finished(self) -> int:
        """Number of requests that have ended; each turn of a conversation is one."""
        return self._finished

    @property
    def tokens_so_far(self) -> int:
        """About the number of output tokens so far, for a display: of answers in flight, chunks are counted."""
        return self._tokens + self._client.chunks_in_flight

    def mean_in_flight(self, began: float, ended: float) -> float:
        """Return the mean number of requests in flight within a window, by the records. Use it after ``stop``.

        Args:
            began: Begin of the window, on the clock of ``time.monotonic``, in s.
            ended: End of the window.
        """
        return mean_in_flight(self._sent, began, ended)

    def send_lags(self, began: float, ended: float) -> list[float]:
        """Return how late each request of a window was sent, in s.

        Open loop: the time since it was due. Closed loop: the time since its slot was free. The lateness
        of the event loop is included, because the end of an answer is seen late by as much.
        """
        return [lag for sent, lag in self._lags if began <= sent <= ended]

    async def _begin_closed(self, schedule: ClosedLoop) -> None:
        """Start the slots one after the other, and wait until each has finished a request."""
        finished = [asyncio.Event() for _ in range(schedule.concurrency)]
        self._spawn(self._run_slot(finished[0]))
        if schedule.ramp_seconds is None:
            await finished[0].wait()
        start = monotonic()
        for event in finished[1:]:
            # Latencies grow while slots start, so the latest one counts, also if it ends during the wait.
            while (next_start := start + self._ramp_seconds(schedule) / schedule.concurrency) > monotonic():
                await asyncio.sleep(next_start - monotonic())
            start = next_start
            self._spawn(self._run_slot(event))
        for event in finished:
            await event.wait()

    def _ramp_seconds(self, schedule: ClosedLoop) -> float:
        return self._durations[-1] if schedule.ramp_seconds is None else schedule.ramp_seconds

    async def _run_slot(self, finished: asyncio.Event) -> None:
        free: float | None = None
        while not self._stopping:
            free = await self._exchange(self._next_request(), free=free) - self._heartbeat.lateness()
            finished.set()

    async def _run_open(self, schedule: OpenLoop) -> None:
        began = monotonic()
        number = 0
        for number, offset in enumerate(schedule.arrivals, 1):
            request = self._next_request()  # before it is due, since making a prompt takes time
            due = began + offset
            # A late arrival waits for nothing, but lets the one before it begin.
            await asyncio.sleep(max(0.0, due - monotonic()))
            if self._stopping:
                return
            if self._in_flight >= schedule.max_in_flight:
                elapsed = monotonic() - began
                offered, served = number / elapsed, self._finished / elapsed
                raise NotSteadyError(
                    f"not steady: {self._in_flight} requests are in flight while {offered:.3g} requests/s were "
                    f"offered and {served:.3g} served: lower load.rate"
                )
            self._spawn(self._exchange(request, due))
        raise DatasetExhaustedError(f"the trace has {number} arrivals and the load needs more: use a longer trace")

    async def _wait_until_steady(self, schedule: OpenLoop) -> None:
        """Wait until about as many requests end as arrive: after one latency, and another since latencies vary."""
        began = monotonic()
        if schedule.ramp_seconds is not None:
            await asyncio.sleep(schedule.ramp_seconds)
            return

        def steady() -> bool:
            if not self._durations:
                return False
            median, elapsed = statistics.median(self._durations), monotonic() - began
            enough = len(self._durations) >= _MIN_RAMP_REQUESTS or elapsed >= _MIN_RAMP_REQUESTS * median
            return enough and elapsed >= 2 * median

        await self._until(steady)

    def _next_request(self) -> LoadRequest | DatasetExhaustedError:
        try:
            return next(self._requests)
        except DatasetExhaustedError as error:  # to be raised only if the request is to be sent
            return error

    async def _exchange(
        self, request: LoadRequest | DatasetExhaustedError, due: float | None = None, free: float | None = None
    ) -> float:
        """Send *request*, and return when its last answer ended, on the clock of ``time.monotonic``, in s.

        Args:
            request: The request, or the error to raise in its place.
            due: When to send it by the schedule of an open loop, else None.
            free: When its slot became free; None in an open loop and for the slot's first request.

        Raises:
            DatasetExhaustedError: It is given as *request*.
        """
        if isinstance(request, DatasetExhaustedError):
            raise request
        began = monotonic()
        answers: list[SentRequest] = []
        self._in_flight += 1
        try:
            await self._client.exchange(request, answers, due)
        finally:
            self._in_flight -= 1
            self._sent += answers
        if (earliest := free if due is None else due) is not None:
            self._lags.append((answers[0].sent, answers[0].sent - earliest))
        ended = answers[-1].ended
        self._durations.append(ended - began)
        self._finished += len(answers)
        self._tokens += sum(len(one.answer.times) for one in answers)  # about, until they are decoded
        self._progress.set()
        for answer in answers:
            if answer.error is None:
                self._undecoded.put_nowait(answer)
            else:  # before the next request, which may fail as fast
                await self._check(answer)
        return ended

    async def _decode(self) -> None:
        """Decode answers one by one, so that due requests are sent in between: answers often end together."""
        while True:
            await self._check(await self._undecoded.get())
            await asyncio.sleep(0)

    async def _check(self, request: SentRequest) -> None:
        """Count the tokens of *request*, and raise if it is one failure too many."""
        self._tokens += (request.record.output_tokens or 0) - len(request.answer.times)
        if (error := request.record.error) is not None:
            self._failed += 1
            self._first_error = self._first_error or error
            if error.startswith(CANNOT_CONNECT):
                await self._check_server()
            await self._check_errors(max(self._finished, _MIN_JUDGED))

    async def _check_all(self) -> None:
        """Raise if too many of all requests failed."""
        while not self._undecoded.empty():
            await self._check(self._undecoded.get_nowait())
        await self._check_errors(self._finished)

    async def _check_errors(self, finished: int) -> None:
        """Raise if too many of *finished* requests failed."""
        if self._failed > self._max_error_rate * finished:
            await self._check_server()
            raise TooManyErrors(
                f"{self._failed} of {self._finished} requests failed, and load.max_error_rate is "
                f"{self._max_error_rate:g}; the first: {self._first_error}"
            )

    async def _check_server(self) -> None:
        if await self._client.refuses():
            raise ServerGoneError(
                f"{self._client.endpoint.url} refuses connections; the first error: {self._first_error}"
            )

    async def _watch_server(self) -> None:
        await self._lost.wait()
        raise ServerGoneError("the server has ended")

    def _spawn(self, work: Coroutine[Any, Any, object]) -> None:
        task = asyncio.create_task(self._report_failure(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _report_failure(self, work: Coroutine[Any, Any, object]) -> None:
        try:
            await work
        except Exception as error:
            if not self._failure.done():
                self._failure.set_exception(error)

    async def _or_failure(self, work: Coroutine[Any, Any, None]) -> None:
        """Wait for *work*, and raise the first error of *work* or of any other task."""
        task = asyncio.create_task(work)
        try:
            await asyncio.wait((task, self._failure), return_when=asyncio.FIRST_COMPLETED)
            await (self._failure if self._failure.done() else task)
        except Exception:
            self._raised = True
            raise
        finally:
            task.cancel()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._progress.clear()
            await self._progress.wait()


class Heartbeat:
    """Measures how late the event loop is: by how much a repeated timer is overdue, or was until just now."""

    def start(self) -> None:
        # The loop's clock is that of time.monotonic.
        self._due, self._late = monotonic() + _HEARTBEAT_SECONDS, 0.0
        self._timer = asyncio.get_running_loop().call_at(self._due, self._beat)

    def stop(self) -> None:
        self._timer.cancel()

    def lateness(self) -> float:
        """Return how late the event loop is now, in s."""
        return max(self._late, monotonic() - self._due, 0.0)

    def _beat(self) -> None:
        late = monotonic() - self._due
        self.start()
        self._keep_late(late, _ITERATIONS)

    def _keep_late(self, late: float, iterations: int) -> None:
        """Report *late* for some iterations more: only then do tasks see what arrived while the loop was late."""
        self._late = late if iterations else 0.0
        if iterations:
            asyncio.get_running_loop().call_soon(self._keep_late, late, iterations - 1)
