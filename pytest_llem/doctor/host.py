"""Read the facts of the host: CPU, RAPL, memory, container limits, and the folders that a run writes to."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pytest_llem.doctor.records import Cpu, Folder, Rapl, RaplDomain, Surroundings
from pytest_llem.energy.protocol import MeterUnavailableError
from pytest_llem.energy.rapl import RaplMeter, find_zones, powercap_root
from pytest_llem.hardware.cgroups import cpu_limit, memory_limit_bytes
from pytest_llem.machine.device_locks import CPU, DeviceError, try_locks
from pytest_llem.machine.owner import holder
from pytest_llem.results.environment import container, is_virtual, processor

#: Purposes of the folders that a run writes to.
TEMPORARY, LOCKS, RESULTS, HUB = "temporary files", "locks", "results", "the hub's cache"


def surroundings() -> Surroundings:
    """Return the facts of the operating system, memory, container, environment variables and folders."""
    limit = memory_limit_bytes()
    memory_mb, swap_mb = _memory_mb()
    return Surroundings(
        os=platform.system(),
        kernel=platform.release(),
        container=container(),
        memory_mb=memory_mb,
        memory_limit_mb=round(limit / 1e6) if limit is not None else None,
        swap_used_mb=swap_mb,
        hf_hub_offline=os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
        cuda_visible_devices=os.environ.get("CUDA_VISIBLE_DEVICES"),
        cuda_device_order=os.environ.get("CUDA_DEVICE_ORDER"),
        folders=[_temporary(), _locks(), _created(RESULTS, Path.cwd), _created(HUB, _hub)],
    )


def _memory_mb() -> tuple[int | None, int | None]:
    """Return the machine's memory and its used swap, in MB."""
    import psutil

    memory = swap = None
    with suppress(OSError, RuntimeError, psutil.Error):
        memory = round(psutil.virtual_memory().total / 1e6)
    with suppress(OSError, RuntimeError, psutil.Error):
        swap = round(psutil.swap_memory().used / 1e6)
    return memory, swap


def _temporary() -> Folder:
    found = Folder(purpose=TEMPORARY)
    try:
        found.path = tempfile.gettempdir()
        with tempfile.TemporaryDirectory(prefix="llem-"):
            found.free_mb = _free_mb(Path(found.path))
    except OSError as error:
        found.error = error.strerror or str(error)
    return found


def _locks() -> Folder:
    found = Folder(purpose=LOCKS)
    try:
        path = try_locks()
    except DeviceError as error:
        found.error = str(error)
    else:
        found.path, found.free_mb = str(path), _free_mb(path)
    return found


def _hub() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def _created(purpose: str, find_path: Callable[[], Path]) -> Folder:
    """Return a folder that a run creates if it does not exist."""
    found = Folder(purpose=purpose)
    try:
        path = find_path()
        found.path = str(path)
        existing = next(one for one in (path, *path.absolute().parents) if one.exists())
        found.free_mb = _free_mb(existing)
        if not os.access(existing, os.W_OK | os.X_OK):
            found.error = "Permission denied"
    except (OSError, RuntimeError) as error:  # a deleted working directory, an unknown home directory
        found.error = getattr(error, "strerror", None) or str(error)
    return found


def _free_mb(path: Path) -> int | None:
    try:
        return round(shutil.disk_usage(path).free / 1e6)
    except OSError:
        return None


#: Time for which the RAPL counters are watched, in s. They are updated about every millisecond.
_WATCHED_S = 0.2


def cpu() -> Cpu:
    """Return the facts of the processor."""
    known = processor()
    load = None
    with suppress(OSError, AttributeError):
        load = round(os.getloadavg()[0], 2)
    owner = holder(CPU)
    return Cpu(
        model=known["cpu_model"],
        count=known["cpu_count"],
        allowed=known["cpus_allowed"],
        limit=cpu_limit(),
        smt=known["smt"],
        governor=known["cpu_governor"],
        boost=known["cpu_boost"],
        load=load,
        virtual_machine=is_virtual(),
        omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
        held_by=str(owner) if owner else None,
    )


def rapl() -> Rapl:
    """Return the RAPL counters, and whether the meter ``rapl`` can read energy from them."""
    root = powercap_root()
    found = Rapl(root=str(root))
    with suppress(OSError, ValueError):  # the meter below reports the reason
        found.domains = [
            RaplDomain(device=one.device, boundary=one.boundary, path=str(one.folder / "energy_uj"))
            for one in find_zones(root)
        ]
    for domain in found.domains:
        domain.error = _unreadable(Path(domain.path))
    meter = RaplMeter(root)
    try:
        meter.open([])
    except MeterUnavailableError as error:
        found.error = str(error)
        found.denied = isinstance(error.__cause__, PermissionError)
        return found
    try:
        meter.begin()
        time.sleep(_WATCHED_S)
        reading = meter.end()
    finally:
        meter.close()
    errors = {(one.device, one.boundary): one.reason for one in reading.devices if one.energy_j is None}
    for domain in found.domains:
        domain.error = errors.get((domain.device, domain.boundary))
    found.error = next(iter(errors.values()), None)  # a single missing counter makes the sum unknown
    return found


def _unreadable(file: Path) -> str | None:
    """Return why the counter in *file* cannot be read; None if it can."""
    try:
        int(file.read_text())
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
    return None
