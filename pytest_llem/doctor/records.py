"""Define the records that the JSON of ``llem doctor`` consists of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pytest_llem.results.document import Record
from pytest_llem.results.metrics import Method


class Driver(Record):
    """The NVIDIA driver.

    Attributes:
        version: Version of the driver.
        cuda: Newest CUDA version that the driver supports.
        error: Why NVML reports nothing, or not everything; null if it reports all.
        stuck: Whether the driver did not answer in time.
        present: Whether this machine has an NVIDIA device or driver, even if NVML does not report it.
    """

    version: str | None = None
    cuda: str | None = None
    error: str | None = None
    stuck: bool = False
    present: bool = False


class GpuUser(Record):
    """A process that uses a GPU.

    Attributes:
        pid: Process id.
        name: Name of the program; null if unknown.
        used_mb: GPU memory of the process, in MB; null if unknown.
    """

    pid: int
    name: str | None = None
    used_mb: int | None = None


class GpuReport(Record):
    """A GPU. Values that it does not report are null; power is in W, clocks are in MHz, memory is in MB.

    Attributes:
        index: Index in NVML and nvidia-smi.
        uuid: UUID; null if the GPU does not answer.
        error: Why the GPU does not answer; null if it does.
        name: Model of the GPU.
        visible: Whether CUDA_VISIBLE_DEVICES lets experiments use the GPU.
        first: Whether CUDA numbers the GPU as its first, which engines use by default.
        driver: Version of the driver.
        capability: CUDA compute capability.
        memory_mb: Total memory.
        used_mb: Used memory.
        energy_counter: Whether the GPU has a total energy counter.
        energy_counter_error: NVML's error if there is no energy counter, or why the counter does not advance.
        tick_ms: Time between two updates (ticks) of the energy counter, in ms.
        call_ms: Median time of a call that reads the energy counter, in ms.
        power_sources: Available power readings, best first: ``nvml_power_instant``, ``nvml_power_average``,
            ``nvml_power_usage``.
        refusal: Why the meter ``nvml`` cannot use the GPU; null if it can.
        power_w: Power draw now.
        temperature_c: Temperature now, in °C.
        power_limit_w: Enforced power limit.
        default_power_limit_w: Power limit set by the vendor.
        persistence_mode: Whether the driver stays loaded while no process uses the GPU.
        ecc_mode: Whether ECC memory is on.
        mig_mode: Whether MIG is on.
        compute_mode: ``default``, ``exclusive`` or ``prohibited``.
        sm_clock_mhz: SM clock now.
        max_sm_clock_mhz: Maximum SM clock.
        application_sm_clock_mhz: SM clock set for applications.
        memory_clock_mhz: Memory clock now.
        max_memory_clock_mhz: Maximum memory clock.
        clocks_held: Whether a setting locks the clocks (true) or they vary (false); null if unknown, because NVML
            has no call that reports it.
        lasting_clock_mhz: SM clock that the advice recommends for locking.
        clock_reasons: Reasons for the clocks now: ``idle``, ``setting``, ``power``, ``hw_slowdown``,
            ``sync_boost``, ``sw_thermal``, ``hw_thermal``, ``hw_power_brake``, ``display``.
        users: Processes that use the GPU; null if NVML does not report them.
        held_by: The experiment that holds the GPU's lease, as text.
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
        path: File of the counter.
        error: Why the counter gives no energy; null if it does.
    """

    device: str
    boundary: str
    path: str
    error: str | None = None


class Rapl(Record):
    """RAPL, the energy counters of CPUs.

    Attributes:
        root: Folder of the counters.
        domains: The counters found.
        error: Why the meter ``rapl`` cannot be used; null if it can.
        denied: Whether that is due to missing permission.
    """

    root: str
    domains: list[RaplDomain] = Field(default_factory=list)
    error: str | None = None
    denied: bool = False


class Cpu(Record):
    """The processor.

    Attributes:
        model: Model of the CPU.
        count: Number of hardware threads.
        allowed: Number of hardware threads that this process may use.
        limit: CPU limit of this process's control group, in CPUs; null for no limit.
        smt: Whether several hardware threads share a core.
        governor: Frequency governor.
        boost: Whether clocks may rise above the base clock.
        load: Load average of the last minute.
        virtual_machine: Whether this is a virtual machine.
        omp_num_threads: Value of OMP_NUM_THREADS.
        held_by: The experiment that holds the CPU's lease, as text.
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
    """An installed engine.

    Attributes:
        name: Name of the engine in a study.
        distribution: Distribution that provides the engine.
        version: Version of the distribution.
        error: Why the engine cannot be imported; null if it can.
        torch_cuda: CUDA version that the engine's torch is built for; null without torch or for a CPU-only build.
    """

    name: str
    distribution: str | None = None
    version: str | None = None
    error: str | None = None
    torch_cuda: str | None = None


class Meter(Record):
    """An installed meter.

    Attributes:
        name: Name of the meter in a study.
        distribution: Distribution that provides the meter.
        auto: Whether ``energy.backend: auto`` uses the meter on this machine.
        error: Why the meter cannot be used on this machine; null if it can. Third-party meters are not tried.
    """

    name: str
    distribution: str | None = None
    auto: bool = False
    error: str | None = None


class Package(Record):
    """A package that the engine ``pytorch`` or an option of a study needs.

    Attributes:
        name: Name of the distribution.
        version: Installed version; null if it is not installed.
        what_for: Purpose of the package.
    """

    name: str
    version: str | None = None
    what_for: str


class Folder(Record):
    """A folder that a run writes to.

    Attributes:
        what_for: Purpose of the folder.
        path: Path of the folder; null if there is none.
        free_mb: Free space on its disk, in MB.
        error: Why the folder cannot be used; null if it can.
    """

    what_for: str
    path: str | None = None
    free_mb: int | None = None
    error: str | None = None


class Surroundings(Record):
    """Operating system, memory, environment variables and folders.

    Attributes:
        os: Name of the operating system.
        kernel: Version of the kernel.
        container: Kind of container; null if there is no sign of one.
        memory_mb: Memory of the machine, in MB.
        memory_limit_mb: Memory limit of this process's control group, in MB; null for no limit.
        swap_used_mb: Used swap of the machine, in MB.
        hf_hub_offline: Whether HF_HUB_OFFLINE is set, so that nothing is downloaded.
        cuda_visible_devices: Value of CUDA_VISIBLE_DEVICES.
        cuda_device_order: Value of CUDA_DEVICE_ORDER.
        folders: Folders that a run writes to.
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
    """The Python environment of engines.

    Attributes:
        python: Version of Python.
        executable: Path of the interpreter.
        error: Why the interpreter cannot be used; null if it can.
        engines: Installed engines.
        packages: Packages that some studies need.
    """

    python: str | None = None
    executable: str
    error: str | None = None
    engines: list[Engine] = Field(default_factory=list)
    packages: list[Package] = Field(default_factory=list)


#: Version of the JSON, as major.minor.
SCHEMA_VERSION = "1.0"

#: Severities of findings, worst first.
Severity = Literal["blocks", "hinders", "note"]
SEVERITIES: tuple[Severity, ...] = ("blocks", "hinders", "note")


class Finding(Record):
    """A problem, or a fact that a user should know.

    Attributes:
        severity: ``blocks``: the energy of the engines' devices is not measured, or no experiment can run.
            ``hinders``: figures vary more, or are incomplete. ``note``: for information.
        about: Part of the machine, such as ``GPU 0``, ``RAPL``, ``engine pytorch``.
        what: The finding.
        do: Advice; null if there is none.
        commands: Command lines that carry out the advice.
    """

    severity: Severity
    about: str
    what: str
    do: str | None = None
    commands: list[str] = Field(default_factory=list)


class Verdict(Record):
    """How ``energy.backend: auto`` obtains energy on this machine.

    Attributes:
        method: ``measured``, ``sampled``, ``estimated`` or ``unavailable``.
        source: What the energy is read from.
        boundary: What the energy covers; ``gpu_board or module`` if only a measurement can show which.
        meter: Meter that reads the energy.
        device: Device of engines: UUID of the GPU that PyTorch uses (several if it is not known which), else
            ``cpu``; ``unknown`` if the driver hangs.
        reason: Why energy is not measured; null if it is.
    """

    method: Method
    source: str | None = None
    boundary: str | None = None
    meter: str | None = None
    device: str
    reason: str | None = None


class Examination(Record):
    """The output of ``llem doctor --format json``.

    Attributes:
        schema_version: Version of this JSON.
        version: Version of pytest-llem.
        verdict: How energy will be obtained.
        findings: Findings, worst first.
        driver: NVIDIA driver.
        gpus: GPUs, in NVML's order.
        rapl: RAPL counters.
        cpu: Processor.
        meters: Installed meters.
        software: Python environment of engines.
        surroundings: Operating system, memory, environment variables and folders.
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
        """Whether a finding blocks."""
        return any(finding.severity == "blocks" for finding in self.findings)
