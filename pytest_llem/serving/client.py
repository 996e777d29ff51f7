"""Send requests to an OpenAI-compatible server, and record when each part of an answer arrived."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import monotonic
from types import SimpleNamespace
from typing import Any, Literal, Self

import aiohttp
from yarl import URL

from pytest_llem.engines.protocol import RequestRecord
from pytest_llem.serving.answers import MAX_ERROR_CHARACTERS, Answer
from pytest_llem.serving.errors import LoadError

#: A prompt: token ids (completions API only), or a text.
Prompt = Sequence[int] | str

#: Beginning of the error of a request for which there was no connection.
CANNOT_CONNECT = "cannot connect"

#: The client closes idle connections after this time, in s. vLLM and SGLang (uvicorn) close theirs after 5 s.
_KEEP_ALIVE_SECONDS = 4.0

#: Connections beyond those of the load, for /metrics.
_SPARE_CONNECTIONS = 2

#: Open files of this process besides the load's connections.
_OTHER_FILES = 128

#: Time before each attempt to connect to a server that may be gone, in s, and the number of attempts.
_SECONDS_BEFORE_ATTEMPT, _ATTEMPTS = 0.1, 3


@dataclass(frozen=True)
class Endpoint:
    """A server's API, and what all requests to it have in common.

    Attributes:
        url: Base URL of the server, without ``/v1``.
        api: ``completions`` (prompts are token ids or texts) or ``chat`` (prompts are texts).
        model: Name of the model; None if the server has one model and needs no name.
        key: API key, sent as ``Authorization: Bearer``.
        fields: Further fields of every request, such as ``temperature`` and ``ignore_eos``.
        token_ids: Whether to ask for ``return_token_ids``, which vLLM and SGLang support.
        timeout_seconds: Time limit for one request from sending to the end of the answer, in s.

    Example:
        >>> Endpoint("http://127.0.0.1:8000", fields={"ignore_eos": True}, token_ids=True)
    """

    url: str
    api: Literal["completions", "chat"] = "completions"
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    fields: Mapping[str, Any] = field(default_factory=dict)
    token_ids: bool = False
    timeout_seconds: float = 600.0


@dataclass(frozen=True)
class LoadRequest:
    """One prompt, or one conversation.

    Attributes:
        index: Number of the request in the dataset.
        turns: The prompt. Several are a conversation in the chat API: each answer becomes part of the next prompt.
        max_tokens: Maximum number of output tokens of each turn.
    """

    index: int
    turns: Sequence[Prompt]
    max_tokens: int


@dataclass(frozen=True)
class SentRequest:
    """A request that was sent, and its answer.

    Attributes:
        index: ``LoadRequest.index``.
        turn: Number of the turn within the conversation, from 0.
        answer: What has arrived.
        ended: When the answer's end was seen, or the request failed, on the clock of ``time.monotonic``, in s.
        error: Why the request failed, if that is known before the answer is decoded; else None.
    """

    index: int
    turn: int
    answer: Answer
    ended: float
    error: str | None = None

    @property
    def sent(self) -> float:
        """When the request was sent, on the clock of ``time.monotonic``, in s."""
        return self.answer.sent

    @cached_property
    def record(self) -> RequestRecord:
        """The request's times, tokens and error. The first use decodes the answer."""
        return self.answer.record(self.error)


class Client:
    """Sends requests over the kept-alive connections of one aiohttp session.

    Garbage collection is off while the client is open: a full one takes tens of ms, in which no request is
    sent, and requests leave no reference cycles.

    Args:
        endpoint: Where the requests go.
        connections: Maximum number of requests in flight.

    Example:
        >>> async with Client(Endpoint("http://127.0.0.1:8000"), connections=8) as client:
        ...     [record] = await client.send(LoadRequest(0, [[1, 17, 4]], max_tokens=16))
    """

    def __init__(self, endpoint: Endpoint, connections: int) -> None:
        self.endpoint = endpoint
        self._connections = connections
        self._answers: set[Answer] = set()
        path = "/v1/completions" if endpoint.api == "completions" else "/v1/chat/completions"
        self._url = endpoint.url.rstrip("/") + path
        self._fields = dict(endpoint.fields) | {"stream": True, "stream_options": {"include_usage": True}}
        if endpoint.model is not None:
            self._fields["model"] = endpoint.model
        if endpoint.token_ids:
            self._fields["return_token_ids"] = True

    async def __aenter__(self) -> Self:
        """Open the session.

        Raises:
            LoadError: The system allows fewer open files than connections are needed.
        """
        limit = self._connections + _SPARE_CONNECTIONS
        _allow_open_files(limit + _OTHER_FILES)
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self.endpoint.key is not None:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        #: The session, also for requests to other paths of the server.
        self.session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=limit, keepalive_timeout=_KEEP_ALIVE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None),  # aiohttp's timer would be set anew for every chunk
            headers=headers,
            trace_configs=[trace],
        )
        gc.disable()
        return self

    async def __aexit__(self, *_: object) -> None:
        gc.enable()
        await self.session.close()

    @property
    def unanswered(self) -> list[SentRequest]:
        """The requests in flight, as if they never ended: ``ended`` is infinite."""
        return [SentRequest(0, 0, answer, math.inf) for answer in self._answers]

    @property
    def chunks_in_flight(self) -> int:
        """Number of chunks of the answers that have not ended: for a display, about the number of their tokens."""
        return sum(len(answer.times) for answer in self._answers)

    async def send(self, request: LoadRequest, due: float | None = None) -> list[RequestRecord]:
        """Send *request*, and return a record for each turn. A conversation ends with a turn that fails.

        An error is part of the record, and not raised: an HTTP status of 400 or more, a refused connection, an
        incomplete stream, a timeout, a wrong ``usage``. What arrived before is kept. If the server has closed a
        kept-alive connection, the request is sent again on another.

        Args:
            request: What to send.
            due: When the request should be sent by the schedule, on the clock of ``time.monotonic``.
        """
        sent: list[SentRequest] = []
        await self.exchange(request, sent, due)
        return [turn.record for turn in sent]

    async def exchange(self, request: LoadRequest, sent: list[SentRequest], due: float | None = None) -> None:
        """Send *request* as ``send`` does; append each turn to *sent* when it ends or this task is cancelled."""
        chat = self.endpoint.api == "chat"
        messages: list[dict[str, str]] = []
        for number, prompt in enumerate(request.turns):
            content: dict[str, Any] = {"prompt": prompt}
            if chat:
                messages.append({"role": "user", "content": str(prompt)})
                content = {"messages": messages}
            body = json.dumps(content | {"max_tokens": request.max_tokens} | self._fields).encode()
            answer = Answer(due, request.max_tokens)
            self._answers.add(answer)
            error: str | None = "cancelled before the answer's end"
            try:
                error = await self._stream(body, answer)
            finally:
                self._answers.remove(answer)
                sent.append(turn := SentRequest(request.index, number, answer, monotonic(), error))
            if number + 1 == len(request.turns) or turn.record.error is not None:
                return
            messages.append({"role": "assistant", "content": turn.record.output_text or ""})
            due = None

    async def refuses(self) -> bool:
        """Return whether the server refuses connections at each of several attempts, within tenths of a second."""
        url = URL(self._url)
        for _ in range(_ATTEMPTS):
            # A process that ends has its connections closed one by one, its listening socket maybe last.
            await asyncio.sleep(_SECONDS_BEFORE_ATTEMPT)
            try:
                _, writer = await asyncio.wait_for(asyncio.open_connection(url.host, url.port), timeout=5)
            except ConnectionRefusedError:
                continue
            except (OSError, TimeoutError):
                return False
            writer.close()
            return False
        return True

    async def _post(self, body: bytes, answer: Answer) -> aiohttp.ClientResponse:
        """Send one request, and return when the headers of the answer have arrived."""
        while True:
            answer.reused = False
            answer.sent = monotonic()
            try:
                return await self.session.post(
                    self._url, data=body, allow_redirects=False, trace_request_ctx=answer
                )
            except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError):
                # The server closed an idle connection while the request was on its way. Each such attempt takes an
                # old connection out of the pool, and one on a new connection is not repeated.
                if not answer.reused:
                    raise

    async def _stream(self, body: bytes, answer: Answer) -> str | None:
        """Send one request and read the answer into *answer*; return why it failed, if it did."""
        try:
            async with asyncio.timeout(self.endpoint.timeout_seconds):
                async with await self._post(body, answer) as response:
                    if response.status != 200:
                        text = await response.text(errors="replace")
                        return f"HTTP {response.status}: {text[:MAX_ERROR_CHARACTERS]}"
                    await answer.read(response)
            return None
        except TimeoutError:
            return f"no complete answer within {self.endpoint.timeout_seconds:g} s"
        except aiohttp.ClientConnectorError as error:
            return f"{CANNOT_CONNECT}: {error.os_error.strerror or error.os_error}"
        except aiohttp.ServerDisconnectedError:
            return "the server closed the connection before it answered"
        except aiohttp.ClientPayloadError:
            return f"the stream was cut after {len(answer.events()[0])} chunks"
        except (aiohttp.ClientError, OSError) as error:
            return f"the connection broke: {type(error).__name__}: {error}"


async def _note_reuse(
    session: aiohttp.ClientSession, context: SimpleNamespace, parameters: aiohttp.TraceConnectionReuseconnParams
) -> None:
    answer = context.trace_request_ctx
    if answer is not None:
        answer.reused = True


def _allow_open_files(number: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= number:
        return
    if hard != resource.RLIM_INFINITY and hard < number:
        raise LoadError(f"the load needs {number} open files, and this system allows {hard}: see ulimit -Hn")
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
