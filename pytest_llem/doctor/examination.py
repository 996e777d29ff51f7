"""What ``llem doctor`` has found, and the keys of its JSON, which minor versions only add to."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pytest_llem.doctor.records import Cpu, Driver, Gpu, Meter, Rapl, Software, Surroundings
from pytest_llem.results.document import Record
from pytest_llem.results.metrics import Method

#: Of the JSON, major.minor.
SCHEMA_VERSION = "1.0"

#: The worst first.
Severity = Literal["blocks", "hinders", "note"]
SEVERITIES: tuple[Severity, ...] = ("blocks", "hinders", "note")


class Finding(Record):
    """Something that stands in the way.

    Attributes:
        severity: ``blocks``: the energy of what engines run on is not measured, or no experiment can run.
            ``hinders``: figures are less steady, or cover less. ``note``: good to know.
        about: What it is about, such as ``GPU 0``, ``RAPL``, ``engine pytorch``.
        what: What it is.
        do: What to do about it; null where nothing can be.
        commands: Command lines for that.
    """

    severity: Severity
    about: str
    what: str
    do: str | None = None
    commands: list[str] = Field(default_factory=list)


class Verdict(Record):
    """What energy will be, as ``energy.backend: auto`` obtains it.

    Attributes:
        method: ``measured``, ``sampled``, ``estimated`` or ``unavailable``.
        source: What it is read from.
        boundary: What it covers; ``gpu_board or module`` where only a measurement shows which of the two.
        meter: Which meter reads it.
        device: What engines run on: the GPU's UUID where PyTorch takes one (or more, where it is not known which),
            else ``cpu``; ``unknown`` where the driver hangs.
        reason: Why it is not measured; null where it is.
    """

    method: Method
    source: str | None = None
    boundary: str | None = None
    meter: str | None = None
    device: str
    reason: str | None = None


class Examination(Record):
    """What ``--format json`` prints.

    Attributes:
        schema_version: Of these keys.
        version: Of pytest-llem.
        verdict: What energy will be.
        findings: What stands in the way, the worst first.
        driver: NVIDIA's.
        gpus: In NVML's order.
        rapl: The CPUs' counters.
        cpu: The processor.
        meters: Those installed.
        software: The Python that engines run in.
        surroundings: What else matters.
    """

    schema_version: str = SCHEMA_VERSION
    version: str
    verdict: Verdict
    findings: list[Finding] = Field(default_factory=list)
    driver: Driver
    gpus: list[Gpu] = Field(default_factory=list)
    rapl: Rapl
    cpu: Cpu
    meters: list[Meter] = Field(default_factory=list)
    software: Software
    surroundings: Surroundings

    @property
    def blocked(self) -> bool:
        """Whether anything blocks."""
        return any(finding.severity == "blocks" for finding in self.findings)
