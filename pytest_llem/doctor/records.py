"""What is known of each part of a machine: records that the JSON of ``llem doctor`` is made of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pytest_llem.results.document import Record
from pytest_llem.results.metrics import Method


class Driver(Record):
    """NVIDIA's driver.

    Attributes:
        version: Its version.
        cuda: The newest CUDA that it runs.
        error: Why NVML tells nothing, or no more: it is not there, it failed, or it did not answer in time.
        stuck: It did not answer in time.
        present: There is an NVIDIA device on this machine, whether NVML knows it or not.
    """

    version: str | None = None
    cuda: str | None = None
    error: str | None = None
    stuck: bool = False
    present: bool = False


class GpuUser(Record):
    """A process that uses a GPU.

    Attributes:
        pid: Its id.
        name: Its program; null where nobody tells.
        used_mb: GPU memory that it has, in MB; null where that is not known.
    """

    pid: int
    name: str | None = None
    used_mb: int | None = None


class GpuReport(Record):
    """A GPU. What it does not tell is null; power is in W, clocks in MHz, memory in MB.

    Attributes:
        index: NVML's, as nvidia-smi counts.
        uuid: Its identity; null where it does not answer.
        error: Why it does not answer.
        name: Its model.
        visible: CUDA_VISIBLE_DEVICES leaves it to experiments.
        first: CUDA counts it as its first, which an engine takes where nothing else is said.
        driver: Version of the driver.
        capability: CUDA compute capability.
        memory_mb: All of its memory.
        used_mb: What of it is in use.
        energy_counter: It has a total energy counter.
        energy_counter_error: What NVML says of it otherwise, or why it does not tick.
        tick_ms: The time between two ticks of that.
        call_ms: How long a call that reads it takes, the median.
        power_sources: What tells its power, the best first: ``nvml_power_instant``, ``nvml_power_average``,
            ``nvml_power_usage``.
        refusal: Why the meter ``nvml`` cannot use it.
        power_w: What it draws now.
        temperature_c: In °C.
        power_limit_w: As it is enforced.
        default_power_limit_w: As the vendor has set it.
        persistence_mode: The driver stays loaded while nobody uses it.
        ecc_mode: Memory is error-correcting.
        mig_mode: It is cut into instances.
        compute_mode: ``default``, ``exclusive`` or ``prohibited``.
        sm_clock_mhz: Of the processors, now.
        max_sm_clock_mhz: At most.
        application_sm_clock_mhz: As applications are to have it.
        memory_clock_mhz: Of the memory, now.
        max_memory_clock_mhz: At most.
        clocks_held: A setting holds the clocks now (true), they move (false). NVML has no call that tells whether
            they are locked.
        lasting_clock_mhz: A clock to lock them at.
        clock_reasons: Why they are as they are now: ``idle``, ``setting``, ``power``, ``hw_slowdown``,
            ``sync_boost``, ``sw_thermal``, ``hw_thermal``, ``hw_power_brake``, ``display``.
        users: Processes that use it; null where NVML does not tell.
        held_by: The experiment of pytest-llem that has it, in words.
    """

    index: int
    uuid: str | None = None
    error: str | None = None
    name: str | None = None
    visible: bool = True
    first: bool = False
    driver: str | None = None
    capability: str | None = None
    memory_mb: int | None = None
    used_mb: int | None = None
    energy_counter: bool | None = None
    energy_counter_error: str | None = None
    tick_ms: float | None = None
    call_ms: float | None = None
    power_sources: list[str] = Field(default_factory=list)
    refusal: str | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    power_limit_w: float | None = None
    default_power_limit_w: float | None = None
    persistence_mode: bool | None = None
    ecc_mode: bool | None = None
    mig_mode: bool | None = None
    compute_mode: str | None = None
    sm_clock_mhz: float | None = None
    max_sm_clock_mhz: float | None = None
    application_sm_clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    max_memory_clock_mhz: float | None = None
    clocks_held: bool | None = None
    lasting_clock_mhz: int | None = None
    clock_reasons: list[str] | None = None
    users: list[GpuUser] | None = None
    held_by: str | None = None


class RaplDomain(Record):
    """A counter of RAPL.

    Attributes:
        device: ``package-0``, ``dram-0``, …
        boundary: ``cpu_package`` or ``dram``.
        path: Its file.
        error: Why it gives no energy; null where it does.
    """

    device: str
    boundary: str
    path: str
    error: str | None = None


class Rapl(Record):
    """RAPL, the CPUs' own energy counters.

    Attributes:
        root: Where they are looked for.
        domains: Those that are there.
        error: Why the meter ``rapl`` cannot be used; null where it can.
        denied: That is for want of permission.
    """

    root: str
    domains: list[RaplDomain] = Field(default_factory=list)
    error: str | None = None
    denied: bool = False


class Cpu(Record):
    """The processor.

    Attributes:
        model: Its model.
        count: Hardware threads.
        allowed: Those that this process may use.
        limit: CPUs' time that its control group may take; null for no limit.
        smt: Several threads share a core.
        governor: What governs the clocks.
        boost: They may rise above the base clock.
        load: Of the last minute, as the system tells it.
        virtual_machine: This is one.
        omp_num_threads: OMP_NUM_THREADS.
        held_by: The experiment of pytest-llem that has the CPU, in words.
    """

    model: str | None = None
    count: int | None = None
    allowed: int | None = None
    limit: float | None = None
    smt: bool | None = None
    governor: str | None = None
    boost: bool | None = None
    load: float | None = None
    virtual_machine: bool | None = None
    omp_num_threads: str | None = None
    held_by: str | None = None


class Engine(Record):
    """An engine that is installed.

    Attributes:
        name: As a study names it.
        distribution: What provides it.
        version: Of that.
        error: Why it cannot be imported; null where it can.
        torch_cuda: The CUDA that the torch it imports is built for; null where there is none, or for CPUs alone.
    """

    name: str
    distribution: str | None = None
    version: str | None = None
    error: str | None = None
    torch_cuda: str | None = None


class Meter(Record):
    """A meter that is installed.

    Attributes:
        name: As a study names it.
        distribution: What provides it.
        auto: ``energy.backend: auto`` takes it here.
        error: Why it cannot be used here; null where it can, and for meters of others, which are not tried.
    """

    name: str
    distribution: str | None = None
    auto: bool = False
    error: str | None = None


class Package(Record):
    """A package that the engine ``pytorch``, or something else that a study may ask for, needs.

    Attributes:
        name: As pip calls it.
        version: The one that is installed; null for none.
        what_for: What needs it.
    """

    name: str
    version: str | None = None
    what_for: str


class Folder(Record):
    """A folder that a run writes to.

    Attributes:
        what_for: What it is for.
        path: Where it is; null where there is none.
        free_mb: Free on its disk, in MB.
        error: Why it cannot be used; null where it can.
    """

    what_for: str
    path: str | None = None
    free_mb: int | None = None
    error: str | None = None


class Surroundings(Record):
    """What else matters.

    Attributes:
        os: The system.
        kernel: Its version.
        container: Its kind; null for no sign of one.
        memory_mb: Of the machine.
        memory_limit_mb: What this process's control group may have; null for no limit.
        swap_used_mb: Of the machine.
        hf_hub_offline: HF_HUB_OFFLINE is set: nothing is downloaded.
        cuda_visible_devices: CUDA_VISIBLE_DEVICES.
        cuda_device_order: CUDA_DEVICE_ORDER.
        folders: Those that a run writes to.
    """

    os: str
    kernel: str
    container: str | None = None
    memory_mb: int | None = None
    memory_limit_mb: int | None = None
    swap_used_mb: int | None = None
    hf_hub_offline: bool = False
    cuda_visible_devices: str | None = None
    cuda_device_order: str | None = None
    folders: list[Folder] = Field(default_factory=list)


class Software(Record):
    """The Python that engines run in.

    Attributes:
        python: Its version.
        executable: Its path.
        error: Why it cannot be used.
        engines: Those installed there.
        packages: Versions of what can change a number, and of what some studies need.
    """

    python: str | None = None
    executable: str
    error: str | None = None
    engines: list[Engine] = Field(default_factory=list)
    packages: list[Package] = Field(default_factory=list)


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
    gpus: list[GpuReport] = Field(default_factory=list)
    rapl: Rapl
    cpu: Cpu
    meters: list[Meter] = Field(default_factory=list)
    software: Software
    surroundings: Surroundings

    @property
    def blocked(self) -> bool:
        """Whether anything blocks."""
        return any(finding.severity == "blocks" for finding in self.findings)
