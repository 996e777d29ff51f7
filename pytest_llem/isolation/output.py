"""A process's output, kept up to a cap."""

from __future__ import annotations

from collections import deque

HEAD_BYTES = 16_384
TAIL_BYTES = 49_152


class CappedOutput:
    """Keeps the first and the last bytes of what is written to it, and counts the rest.

    Args:
        head: Bytes kept from the beginning.
        tail: Bytes kept from the end, give or take the size of one write.
    """

    def __init__(self, head: int = HEAD_BYTES, tail: int = TAIL_BYTES) -> None:
        self._head_room = head
        self._tail_room = tail
        self._head = bytearray()
        self._tail: deque[bytes] = deque()
        self._tail_size = 0
        self._dropped = 0

    def write(self, chunk: bytes) -> None:
        """Take *chunk*."""
        if room := self._head_room - len(self._head):
            self._head += chunk[:room]
            chunk = chunk[room:]
        if chunk:
            self._tail.append(chunk)
            self._tail_size += len(chunk)
        while self._tail and self._tail_size - len(self._tail[0]) >= self._tail_room:
            oldest = len(self._tail.popleft())
            self._tail_size -= oldest
            self._dropped += oldest

    def text(self) -> str:
        """Return what was kept, with a line where something is missing."""
        gap = f"\n[… {self._dropped:,} bytes left out …]\n" if self._dropped else ""
        head, tail = (part.decode(errors="replace") for part in (bytes(self._head), b"".join(self._tail)))
        return f"{head}{gap}{tail}"
