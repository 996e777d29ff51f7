"""Follow the start of vLLM: its processes log what they do, and why they fail."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress

#: Environment variable with the name of the socket to which vLLM's processes report.
ADDRESS = "LLEM_VLLM_START"

#: Phases of a start in order: text of the log record with which each begins, and its name. A record that a version
#: of vLLM does not have leaves its phase out.
PHASES = (
    ("Starting to load model", "loading weights"),
    ("Model loading took", "profiling memory"),
    ("Warming up model for the compilation", "compiling"),
    ("Starting torch.compile", "compiling"),
    ("Dynamo bytecode transform time", "compiling"),
    ("torch.compile took", "profiling memory"),
    ("Available KV cache memory", "capturing CUDA graphs"),
    ("Graph capturing finished", "warming up vLLM"),
)

#: Prefix of a message that holds an error, and not the number of a phase.
_ERROR = "!"

#: Maximum size of a message in bytes.
_MAX_BYTES = 4096


class StartRecords(logging.Handler):
    """Sends the phases and errors in vLLM's log records to :class:`StartMonitor`."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            found = [str(at) for at, (begins, _) in enumerate(PHASES) if begins in text]
            if record.exc_info and (error := record.exc_info[1]) is not None:
                found.append(f"{_ERROR}{type(error).__name__}: {' '.join(str(error).split())}")
        except Exception:  # a record that cannot be formatted may not stop vLLM
            self.handleError(record)
            return
        address = os.environ.get(ADDRESS)
        for message in found if address else ():
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(message.encode()[:_MAX_BYTES], f"\0{address}")


class StartMonitor:
    """Reports the phases of vLLM's start while it is entered.

    Args:
        report: Called with the name of each phase, from the second on in a thread of its own.

    Attributes:
        error: The first error that a process of vLLM logged; None if there is none.

    Example:
        >>> with StartMonitor(context.report_phase) as start:
        ...     engine = LLMEngine.from_engine_args(arguments)
    """

    def __init__(self, report: Callable[[str], None]) -> None:
        self._report = report
        self.error: str | None = None

    def __enter__(self) -> StartMonitor:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = f"llem-vllm-{os.getpid()}"
        self._socket.bind(f"\0{address}")  # an abstract address: no file is left behind
        os.environ[ADDRESS] = address
        self._report("starting vLLM")
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def _follow(self) -> None:
        reached = -1
        while message := self._socket.recv(_MAX_BYTES).decode(errors="replace"):
            if message.startswith(_ERROR):
                self.error = self.error or message.removeprefix(_ERROR)
            elif (at := int(message)) > reached:  # workers reach a phase at different times
                reached = at
                self._report(PHASES[at][1])

    def __exit__(self, *error: object) -> None:
        address = os.environ.pop(ADDRESS)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"", f"\0{address}")  # ends _follow, which reads all earlier messages first
        self._thread.join()
        self._socket.close()
