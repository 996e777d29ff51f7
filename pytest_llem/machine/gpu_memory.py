"""GPU memory between two experiments: what one has left behind would be counted as the next one's."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from pytest_llem.hardware.gpu_state import GpuSensors, GpuStates

#: How far above what it was memory in use may be, in bytes.
MARGIN_BYTES = 64 * 2**20

#: It is waited for no longer than this, in seconds.
MAX_S = 30.0

#: Seconds between two looks.
POLL_S = 0.25


@dataclass(frozen=True)
class Settled:
    """What became of the memory.

    Attributes:
        seconds: How long it was waited for; None where it was not, or cannot be, looked at.
        left_mb: How much more is in use than before, in MB by UUID: only where it is more than the margin. None
            where nothing was looked at.
        used: What is in use, in bytes by UUID, where it can be read.
    """

    seconds: float | None = None
    left_mb: dict[str, float] | None = None
    used: dict[str, int] = field(default_factory=dict)


@dataclass
class GpuMemory:
    """Waits for memory.

    Attributes:
        gauges: What gives, on being entered, a function that looks at the GPUs.
        sleep: Sleeps for so many seconds.
        clock: Never goes back; in seconds.
    """

    gauges: Callable[[], AbstractContextManager[Callable[[], GpuStates]]] = GpuSensors
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def settle(self, uuids: Collection[str], before: Mapping[str, int]) -> Settled:
        """Wait until no GPU has more memory in use than before, but not for ever.

        Args:
            uuids: The GPUs.
            before: What they had in use, in bytes by UUID, as far as it is known.
        """
        if not uuids:
            return Settled()
        with self.gauges() as look:
            waited, began = 0.0, self.clock()
            while True:
                seen = {uuid: state.used_bytes for uuid, state in look().items() if uuid in uuids}
                used = {uuid: amount for uuid, amount in seen.items() if amount is not None}
                more = {uuid: amount - before[uuid] for uuid, amount in used.items() if uuid in before}
                left = {uuid: amount for uuid, amount in more.items() if amount > MARGIN_BYTES}
                if not left or waited >= MAX_S:
                    break
                self.sleep(min(POLL_S, MAX_S - waited))
                waited = self.clock() - began
        if not more:
            return Settled(used=used)
        return Settled(waited, {uuid: round(amount / 1e6, 1) for uuid, amount in left.items()}, used)
