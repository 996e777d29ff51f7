"""Wait until an experiment's GPU memory is free: otherwise the next experiment would be charged with it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from pytest_llem.hardware.gpu_state import GpuStates, gpu_sensors
from pytest_llem.machine.device_locks import CPU, Ownership
from pytest_llem.results.experiment import GapRecord

#: How far memory in use may be above its earlier value, in bytes.
MARGIN_BYTES = 64 * 2**20

#: Longest time to wait, in s.
MAX_S = 30.0

#: Time between two readings, in s.
POLL_S = 0.25


@dataclass(frozen=True)
class Settled:
    """The result of waiting for memory.

    Attributes:
        seconds: Time waited, in s; None if no memory could be compared.
        left_mb: Memory in use above its earlier value, in MB by UUID, of GPUs where it exceeds the margin; None if
            no memory could be compared.
        used: Memory in use, in bytes by UUID, of GPUs where it can be read.
    """

    seconds: float | None = None
    left_mb: dict[str, float] | None = None
    used: dict[str, int] = field(default_factory=dict)


@dataclass
class GpuMemory:
    """Waits for GPU memory to be freed.

    Attributes:
        sensors: Creates a context that yields a function, which reads the GPUs' states.
        sleep: Sleeps for the given seconds.
        clock: A monotonic clock, in s.
    """

    sensors: Callable[[], AbstractContextManager[Callable[[], GpuStates]]] = gpu_sensors
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic

    def settle(self, uuids: Collection[str], before: Mapping[str, int]) -> Settled:
        """Wait until no GPU has more memory in use than before, for at most ``MAX_S``.

        Args:
            uuids: UUIDs of the GPUs.
            before: Earlier memory in use, in bytes by UUID, of GPUs where it is known.
        """
        if not uuids:
            return Settled()
        with self.sensors() as read:
            waited, began = 0.0, self.clock()
            while True:
                seen = {uuid: state.used_bytes for uuid, state in read().items() if uuid in uuids}
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

    def settle_owned(self, ownership: Ownership, gap: GapRecord) -> GapRecord:
        """Wait until no owned GPU has more memory in use than before its previous experiment.

        Args:
            ownership: The devices. The memory that is in use now is noted there.
            gap: Idle time before the experiment.

        Returns:
            *gap* with the time waited.
        """
        settled = self.settle(ownership.devices - {CPU}, ownership.used_before)
        ownership.note_used(settled.used)
        return gap.model_copy(update={"memory_waited_seconds": settled.seconds, "memory_left_mb": settled.left_mb})
