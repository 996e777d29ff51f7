"""The processor, and its energy counters."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from pytest_llem.doctor.records import Cpu, Rapl, RaplDomain
from pytest_llem.energy.protocol import MeterUnavailableError
from pytest_llem.energy.rapl import RaplMeter, domains, powercap_root
from pytest_llem.hardware.cgroups import cpu_limit
from pytest_llem.machine.devices import CPU, holder
from pytest_llem.results.processor import is_virtual, processor

#: For how long the counters are watched, in s: they are updated about every millisecond.
_WATCHED_S = 0.2


def cpu() -> Cpu:
    """Return what is known of the processor."""
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


def rapl(root: Path | None = None) -> Rapl:
    """Return which counters of RAPL there are, and whether they give energy here, as the meter finds.

    Args:
        root: The powercap folder; None for the system's.
    """
    root = root or powercap_root()
    found = Rapl(root=str(root))
    with suppress(OSError, ValueError):  # the meter says why
        found.domains = [
            RaplDomain(device=one.device, boundary=one.boundary, path=str(one.folder / "energy_uj"))
            for one in domains(root)
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
    found.error = next((reason for reason in errors.values()), None)  # one without energy leaves the sum without
    return found


def _unreadable(file: Path) -> str | None:
    try:
        int(file.read_text())
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
    return None
