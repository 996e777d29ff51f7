"""Find the processes and GPUs of a server that runs already on this host."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

import psutil

from pytest_llem.hardware.gpus import gpu_processes, visible_gpus
from pytest_llem.hardware.nvml import Nvml
from pytest_llem.isolation.model_server import listening_processes
from pytest_llem.study.server import ServerConfig


def is_this_host(url: str) -> bool:
    """Return whether the host of *url* is this one."""
    try:
        found = {str(one[4][0]) for one in socket.getaddrinfo(urlsplit(url).hostname, None)}
    except OSError:
        return False
    own = {address.address for addresses in psutil.net_if_addrs().values() for address in addresses}
    return bool(found & own) or all(one.startswith("127.") for one in found)


def listening_process(url: str) -> int | None:
    """Return the pid of the process that listens on the port of *url* on this host; None if it cannot be seen."""
    return next(iter(listening_processes(url)), None)


def gpus_of_server(server: ServerConfig) -> list[str]:
    """Return the UUIDs of the GPUs of a server that runs already: those that the study names, or that it uses."""
    if isinstance(server.gpus, list):
        return server.gpus
    pid = listening_process(server.url or "")
    if pid is None or server.gpus == 0:
        return []
    own = _tree(pid)
    with Nvml() as nvml:
        return [uuid for uuid, pids in _gpu_users(nvml).items() if own & pids]


def other_gpu_user(server: ServerConfig, pid: int | None) -> str | None:
    """Return which other process uses the server's GPUs; None if none is seen."""
    own = _tree(pid) if pid is not None else set()
    with Nvml() as nvml:
        users = _gpu_users(nvml)
    for gpu in gpus_of_server(server):
        if own and (others := sorted(users.get(gpu, set()) - own)):
            return (
                f"server.url: {gpu} is also used by other processes than the server's "
                f"({', '.join(map(str, others))}): no energy is the server's alone"
            )
    return None


def _gpu_users(nvml: Nvml) -> dict[str, set[int]]:
    """Return the pids of the processes that use each GPU which is visible to this process, by its UUID."""
    found = {}
    for gpu in visible_gpus().all:
        handle = nvml.ask("nvmlDeviceGetHandleByUUID", gpu.uuid)
        if handle is not None:
            found[gpu.uuid] = {one.pid for one in gpu_processes(nvml, handle) or ()}
    return found


def _tree(pid: int) -> set[int]:
    """Return the pids of a process and its descendants."""
    try:
        process = psutil.Process(pid)
        return {pid, *(one.pid for one in process.children(recursive=True))}
    except psutil.Error:
        return {pid}
