"""Read the stream of an answer, and make a request's record of it.

What servers stream: vLLM and SGLang send ``token_ids`` with each chunk if asked to. A chunk of several tokens is
possible everywhere, as is one without text, for example while a character is incomplete. The chat API begins with
a chunk that has only a role. ``usage`` arrives in a last chunk without choices (vLLM, SGLang) or with the finish
reason (llama.cpp). An error within a stream that began with status 200 is an event with the key ``error``.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any

import aiohttp

from pytest_llem.engines.protocol import RequestRecord

#: Number of characters of an error's body that a record keeps.
MAX_ERROR_CHARACTERS = 200


class Answer:
    """What has arrived of an answer. Events are found and decoded once the answer has ended, all at once.

    Args:
        due: When an open loop has to send its request, on the clock of ``time.monotonic``, in s; None in a
            closed loop, and for later turns of a conversation.
        max_tokens: Number of output tokens that it may have at most.

    Attributes:
        sent: When its request was sent, on the same clock.
        reused: Whether the request was sent over a connection of an earlier one.
        pieces: The bytes of each read.
        times: When each of ``pieces`` was read, on the same clock.
    """

    __slots__ = ("due", "max_tokens", "pieces", "reused", "sent", "times")

    def __init__(self, due: float | None, max_tokens: int) -> None:
        self.due, self.max_tokens = due, max_tokens
        self.sent = 0.0
        self.reused = False
        self.pieces: list[bytes] = []
        self.times: list[float] = []

    async def read(self, response: aiohttp.ClientResponse) -> None:
        """Read to the end. The connection is used again only if nothing of the answer is left in it."""
        connection = response.connection
        self.add(response.content, monotonic())
        if connection is not None:  # else all has arrived
            assert connection.transport is not None
            assert connection.protocol is not None
            arrivals = _Arrivals(self, response.content, connection.transport, connection.protocol)
            connection.transport.set_protocol(arrivals)
            await response.content.wait_eof()

    def add(self, content: aiohttp.StreamReader, now: float) -> None:
        """Add the bytes that *content* holds, read at the time *now*."""
        if piece := content.read_nowait():
            self.pieces.append(piece)
            self.times.append(now)

    def events(self) -> tuple[list[bytes], list[float]]:
        """Return the data of the server-sent events, and when the end of each arrived."""
        events: list[bytes] = []
        times: list[float] = []
        rest = b""
        # The last line may have no newline.
        for piece, time in zip([*self.pieces, b"\n"], [*self.times, *self.times[-1:]], strict=False):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    events.append(line[5:])
                    times.append(time)
        return events, times

    def record(self, error: str | None) -> RequestRecord:
        """Decode the answer, drop its pieces, and return its record.

        Args:
            error: Why the request failed, if it is known to have failed.
        """
        events, times = self.events()
        self.pieces = []
        done = bool(events) and events[-1].strip() == b"[DONE]"
        content = _Content()
        try:
            content.add(json.loads(b"[" + b",".join(events[: -1 if done else None]) + b"]"), times)
        except (ValueError, TypeError, AttributeError, LookupError) as reason:
            error = error or f"the answer is not a stream of completion chunks: {type(reason).__name__}: {reason}"
        if error is None and not events:
            error = "the answer is not an event stream"
        error = error or content.error
        if error is None and not done and content.finish is None:
            error = f"the stream was cut after {len(events)} chunks"
        ids, usage = content.ids, content.usage
        if problem := _usage_problem(usage, len(ids), self.max_tokens):
            error, usage = error or problem, {}
        output_tokens = usage.get("completion_tokens")
        # A server may leave out ids of some chunks, for example of a tool call: then usage has the number.
        has_all_ids = bool(ids) and (output_tokens is None or error is not None or len(ids) == output_tokens)
        token_times: Sequence[float] = ()
        if has_all_ids and (error is not None or output_tokens is not None):
            token_times = content.id_times
        elif not ids:
            by_chunk = (content.times, content.text_times)
            token_times = next((times for times in by_chunk if len(times) == output_tokens), ())
        return RequestRecord(
            input_tokens=usage.get("prompt_tokens"),
            output_ids=ids if has_all_ids else None,
            sent=self.sent,
            token_times=token_times,
            # If token_times is empty: when the first and the last chunk with generated output arrived.
            first_token=None if token_times or not content.times else content.times[0],
            last_token=None if token_times or not content.times else content.times[-1],
            due=self.due,
            output_text="".join(content.texts),
            output_count=None if has_all_ids else output_tokens,
            error=error,
            cached_tokens=content.cached_tokens,
        )


class _Arrivals(asyncio.Protocol):
    """An asyncio protocol around that of aiohttp, which records when each piece of an answer's bytes arrives.

    A task that waited for each chunk would take more CPU time than all else that is done with a chunk.
    """

    def __init__(
        self,
        answer: Answer,
        content: aiohttp.StreamReader,
        transport: asyncio.Transport,
        http: asyncio.Protocol,
    ) -> None:
        self._answer, self._content, self._transport, self._http = answer, content, transport, http

    def data_received(self, data: bytes) -> None:
        now = monotonic()
        self._http.data_received(data)
        if self._content.exception() is None:
            self._answer.add(self._content, now)
        if self._content.is_eof():  # aiohttp may use the connection for another request
            self._transport.set_protocol(self._http)

    def eof_received(self) -> None:
        self._http.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._http.connection_lost(exc)

    def pause_writing(self) -> None:
        self._http.pause_writing()

    def resume_writing(self) -> None:
        self._http.resume_writing()


class _Content:
    """What the chunks of an answer hold."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.ids: list[int] = []
        self.id_times: list[float] = []
        #: When each chunk with generated output arrived: text, token ids, reasoning or a tool call.
        self.times: list[float] = []
        #: When each chunk with a text arrived, also an empty one in the completions API, such as for a control
        #: token of llama.cpp.
        self.text_times: list[float] = []
        self.usage: dict[str, Any] = {}
        self.cached_tokens: int | None = None
        self.finish: str | None = None
        self.error: str | None = None

    def add(self, chunks: Sequence[dict[str, Any]], times: Sequence[float]) -> None:
        for chunk, time in zip(chunks, times, strict=False):  # [DONE] has a time and is not a chunk
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta") or choice
                text = delta.get("text") or delta.get("content")
                ids = choice.get("token_ids")
                if text:
                    if not isinstance(text, str):
                        raise TypeError(f"the text of a chunk is {text!r}")
                    self.texts.append(text)
                if ids:
                    self.ids += ids
                    self.id_times += [time] * len(ids)
                if text or ids or any(delta.get(key) for key in ("reasoning", "reasoning_content", "tool_calls")):
                    self.times.append(time)
                finish = choice.get("finish_reason")
                if text or (choice.get("text") == "" and not finish):
                    self.text_times.append(time)
                self.finish = finish or self.finish
            if usage := chunk.get("usage"):
                details = usage.get("prompt_tokens_details") or {}
                self.cached_tokens = details.get("cached_tokens", self.cached_tokens)
                self.usage = usage
            if self.cached_tokens is None and (timings := chunk.get("timings")):  # of llama.cpp
                self.cached_tokens = timings.get("cache_n")
            if problem := chunk.get("error"):
                message = problem.get("message") if isinstance(problem, dict) else problem
                self.error = f"error within the stream: {str(message)[:MAX_ERROR_CHARACTERS]}"
        if self.finish in ("abort", "error"):
            self.error = self.error or f"the server ended the answer with finish_reason {self.finish!r}"


def _usage_problem(usage: Mapping[str, Any], ids: int, max_tokens: int) -> str | None:
    """Return what is wrong with *usage* for an answer of which *ids* token ids arrived; None if nothing is."""
    if not usage:
        return None if ids else "the answer has no usage, so its number of tokens is unknown"
    for name in ("prompt_tokens", "completion_tokens"):
        if not isinstance(usage.get(name), int) or usage[name] < 0:
            return f"wrong usage: {name} is {usage.get(name)!r}"
    output_tokens = usage["completion_tokens"]
    if output_tokens > max_tokens:
        return f"wrong usage: {output_tokens} completion_tokens, of at most {max_tokens}"
    if output_tokens < ids:
        return f"wrong usage: {output_tokens} completion_tokens, but {ids} token ids arrived"
    return None
