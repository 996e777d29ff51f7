"""Find out which GPUs are connected by NVLink, and choose GPUs that are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import combinations

from pytest_llem.hardware.nvml import Nvml

#: Pairs of GPUs that NVLink connects, by their UUIDs.
Links = frozenset[frozenset[str]]

#: ``nvmlGpuP2PCapsIndex_t`` and ``nvmlGpuP2PStatus_t``.
_NVLINK, _OK = "NVML_P2P_CAPS_INDEX_NVLINK", "NVML_P2P_STATUS_OK"

#: Number of combinations to compare; beyond it, the first GPUs are chosen.
_MAX_COMBINATIONS = 20_000


def nvlinks(uuids: Sequence[str]) -> Links:
    """Return the pairs of GPUs that NVLink connects; none if NVML does not report it. No CUDA context is created.

    Args:
        uuids: UUIDs of the GPUs.
    """
    with Nvml() as nvml:
        kind, connected = nvml.constant(_NVLINK), nvml.constant(_OK)
        if kind is None:
            return frozenset()
        handles = {uuid: nvml.ask("nvmlDeviceGetHandleByUUID", uuid) for uuid in uuids}
        return frozenset(
            frozenset(pair)
            for pair in combinations(uuids, 2)
            if nvml.ask("nvmlDeviceGetP2PStatus", *map(handles.get, pair), kind) == connected
        )


def best_connected(free: Sequence[str], count: int, links: Links) -> tuple[str, ...]:
    """Return *count* of the *free* GPUs, with as many of their pairs connected by NVLink as possible.

    Among equals, those whose choice separates the fewest connected pairs of free GPUs, and then the first.

    Args:
        free: UUIDs of free GPUs, at least *count*.
        count: Number of GPUs.
        links: Pairs that NVLink connects.

    Example:
        >>> best_connected(["a", "b", "c"], 2, frozenset({frozenset("bc")}))
        ('b', 'c')
        >>> best_connected(["a", "b", "c"], 1, frozenset({frozenset("ab")}))
        ('c',)
    """
    among = [pair for pair in links if pair <= set(free)]
    if len(among) in (0, len(free) * (len(free) - 1) // 2):  # all choices are alike
        return tuple(free[:count])
    best, best_score = tuple(free[:count]), (-1, 0)
    for number, chosen in enumerate(combinations(free, count)):
        if number == _MAX_COMBINATIONS:
            break
        score = _score(set(chosen), among)
        if score > best_score:
            best, best_score = chosen, score
    return best


def _score(chosen: Collection[str], links: Sequence[frozenset[str]]) -> tuple[int, int]:
    inside = [len(pair.intersection(chosen)) for pair in links]
    return inside.count(2), -inside.count(1)
