"""Define the records that the JSON of ``llem doctor`` consists of."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pytest_llem.results.document import Record
from pytest_llem.results.metrics import Method

#: Version of the JSON, as major.minor.
SCHEMA_VERSION = "1.0"

#: Severities of findings, worst first.
Severity = Literal["blocks", "hinders", "note"]
SEVERITIES: tuple[Severity, ...] = ("blocks", "hinders", "note")


class Driver(Record):
    """The NVIDIA driver."""

    version: str | None = None
    """Version of the driver."""
    cuda: str | None = None
    """Newest CUDA version that the driver supports."""
    error: str | None = None
    """Why NVML reports nothing, or not everything; null if it reports everything."""
    stuck: bool = False
    """Whether the driver did not answer in time."""
    present: bool = False
    """Whether this machine has an NVIDIA device or driver, even if NVML does not report it."""


class GpuUser(Record):
    """A process that uses a GPU."""

    pid: int
    """Process id."""
    name: str | None = None
    """Name of the program; null if unknown."""
    used_mb: int | None = None
    """GPU memory of the process, in MB; null if unknown."""


class GpuReport(Record):
    """A GPU. Values that it does not report are null; power is in W, clocks are in MHz, memory is in MB."""

    index: int
    """Index in NVML and nvidia-smi."""
    uuid: str | None = None
    """UUID; null if the GPU does not answer."""
    error: str | None = None
    """Why the GPU does not answer; null if it does."""
    name: str | None = None
    """Model of the GPU."""
    visible: bool = True
    """Whether CUDA_VISIBLE_DEVICES lets experiments use the GPU."""
    first: bool = False
    """Whether CUDA numbers the GPU as its first, which engines use by default."""
    driver: str | None = None
    """Version of the driver."""
    capability: str | None = None
    """CUDA compute capability."""
    memory_mb: int | None = None
    """Total memory."""
    used_mb: int | None = None
    """Used memory."""
    energy_counter: bool | None = None
    """Whether the GPU has a total energy counter."""
    energy_counter_error: str | None = None
    """NVML's error if there is no energy counter, or why the counter does not advance."""
    tick_ms: float | None = None
    """Time between two updates (ticks) of the energy counter, in ms."""
    call_ms: float | None = None
    """Median time of a call that reads the energy counter, in ms."""
    power_sources: list[str] = Field(default_factory=list)
    """Available power readings, best first: ``nvml_power_instant``, ``nvml_power_average``, ``nvml_power_usage``.
    """
    refusal: str | None = None
    """Why the meter ``nvml`` cannot use the GPU; null if it can."""
    power_w: float | None = None
    """Power draw now."""
    temperature_c: float | None = None
    """Temperature now, in °C."""
    power_limit_w: float | None = None
    """Enforced power limit."""
    default_power_limit_w: float | None = None
    """Power limit set by the vendor."""
    persistence_mode: bool | None = None
    """Whether the driver stays loaded while no process uses the GPU."""
    ecc_mode: bool | None = None
    """Whether ECC memory is on."""
    mig_mode: bool | None = None
    """Whether MIG is on."""
    compute_mode: str | None = None
    """``default``, ``exclusive`` or ``prohibited``."""
    sm_clock_mhz: float | None = None
    """SM clock now."""
    max_sm_clock_mhz: float | None = None
    """Maximum SM clock."""
    application_sm_clock_mhz: float | None = None
    """SM clock set for applications."""
    memory_clock_mhz: float | None = None
    """Memory clock now."""
    max_memory_clock_mhz: float | None = None
    """Maximum memory clock."""
    clocks_held: bool | None = None
    """Whether a setting locks the clocks (true) or they vary (false); null if unknown, because NVML has no call
    that reports it.
    """
    sustained_clock_mhz: int | None = None
    """SM clock that the advice recommends for locking."""
    clock_reasons: list[str] | None = None
    """Reasons for the clocks now: ``idle``, ``setting``, ``power``, ``hw_slowdown``, ``sync_boost``,
    ``sw_thermal``, ``hw_thermal``, ``hw_power_brake``, ``display``, ``board_limit``, ``reliability``.
    """
    users: list[GpuUser] | None = None
    """Processes that use the GPU; null if NVML does not report them."""
    held_by: str | None = None
    """The experiment that holds the GPU's lease, as text; null if none does."""


class RaplDomain(Record):
    """A counter of RAPL."""

    device: str
    """``package-0``, ``dram-0``, …"""
    boundary: str
    """``cpu_package`` or ``dram``."""
    path: str
    """File of the counter."""
    error: str | None = None
    """Why the counter gives no energy; null if it does."""


class Rapl(Record):
    """RAPL, the energy counters of CPUs."""

    root: str
    """Folder of the counters."""
    domains: list[RaplDomain] = Field(default_factory=list)
    """The counters found."""
    error: str | None = None
    """Why the meter ``rapl`` cannot be used; null if it can."""
    denied: bool = False
    """Whether ``error`` is due to missing permission."""


class Cpu(Record):
    """The processor."""

    model: str | None = None
    """Model of the CPU."""
    count: int | None = None
    """Number of hardware threads."""
    allowed: int | None = None
    """Number of hardware threads that this process may use."""
    limit: float | None = None
    """CPU limit of this process's control group, in CPUs; null for no limit."""
    smt: bool | None = None
    """Whether several hardware threads share a core."""
    governor: str | None = None
    """Frequency governor."""
    boost: bool | None = None
    """Whether clocks may rise above the base clock."""
    load: float | None = None
    """Load average of the last minute."""
    virtual_machine: bool | None = None
    """Whether this is a virtual machine."""
    omp_num_threads: str | None = None
    """Value of OMP_NUM_THREADS."""
    held_by: str | None = None
    """The experiment that holds the CPU's lease, as text; null if none does."""


class Engine(Record):
    """An installed engine."""

    name: str
    """Name of the engine in a study."""
    distribution: str | None = None
    """Distribution that provides the engine."""
    version: str | None = None
    """Version of the distribution."""
    error: str | None = None
    """Why the engine cannot be used: a package is missing, or it cannot be imported; null if it can be used."""
    installed: bool = True
    """Whether a package of the extra that has the engine's name is installed; true without such an extra."""
    torch_cuda: str | None = None
    """CUDA version that the engine's torch is built for; null without torch or for a CPU-only build."""
    gpus: int | Literal["all"] | None = None
    """Number of GPUs that an experiment with the engine's default options leases, or ``all`` visible ones; null
    if unknown, because an option has no default or the engine cannot be used.
    """


class Meter(Record):
    """An installed meter."""

    name: str
    """Name of the meter in a study."""
    distribution: str | None = None
    """Distribution that provides the meter."""
    auto: bool = False
    """Whether ``energy.backend: auto`` uses the meter on this machine."""
    error: str | None = None
    """Why the meter cannot be used on this machine; null if it can. Third-party meters are not tried."""


class Package(Record):
    """A package that only some uses of pytest-llem need."""

    name: str
    """Name of the distribution."""
    version: str | None = None
    """Installed version; null if it is not installed."""
    purpose: str
    """What needs the package, such as ``the engine pytorch``."""


class Folder(Record):
    """A folder that a run writes to."""

    purpose: str
    """``temporary files``, ``locks``, ``results`` or ``the hub's cache``."""
    path: str | None = None
    """Path of the folder; null if there is none."""
    free_mb: int | None = None
    """Free space on its disk, in MB."""
    error: str | None = None
    """Why the folder cannot be used; null if it can."""


class Surroundings(Record):
    """Operating system, memory, environment variables and folders."""

    os: str
    """Name of the operating system."""
    kernel: str
    """Version of the kernel."""
    container: str | None = None
    """Kind of container; null if there is no sign of one."""
    memory_mb: int | None = None
    """Memory of the machine, in MB."""
    memory_limit_mb: int | None = None
    """Memory limit of this process's control group, in MB; null for no limit."""
    swap_used_mb: int | None = None
    """Used swap of the machine, in MB."""
    hf_hub_offline: bool = False
    """Whether HF_HUB_OFFLINE is set, so that nothing is downloaded."""
    cuda_visible_devices: str | None = None
    """Value of CUDA_VISIBLE_DEVICES."""
    cuda_device_order: str | None = None
    """Value of CUDA_DEVICE_ORDER."""
    folders: list[Folder] = Field(default_factory=list)
    """Folders that a run writes to."""


class Software(Record):
    """The Python environment of engines."""

    python: str | None = None
    """Version of Python."""
    executable: str
    """Path of the interpreter."""
    error: str | None = None
    """Why the interpreter cannot be used; null if it can."""
    engines: list[Engine] = Field(default_factory=list)
    """Installed engines."""
    packages: list[Package] = Field(default_factory=list)
    """Packages that some studies need."""

    @property
    def torch(self) -> str | None:
        """Version of PyTorch; None if it is not installed."""
        return next((package.version for package in self.packages if package.name == "torch"), None)


class Finding(Record):
    """A problem, or a fact that a user should know."""

    severity: Severity
    """``blocks``: the energy of the engines' devices is not measured, or no experiment can run. ``hinders``:
    figures vary more, or are incomplete. ``note``: for information.
    """
    about: str
    """Part of the machine, such as ``GPU 0``, ``RAPL``, ``engine pytorch``."""
    message: str
    """What was found, as text."""
    advice: str | None = None
    """What to do about it; null if there is no advice."""
    commands: list[str] = Field(default_factory=list)
    """Command lines that carry out the advice."""


class EnergyAccess(Record):
    """How ``energy.backend: auto`` obtains energy on this machine."""

    method: Method
    """``measured``, ``sampled``, ``estimated`` or ``unavailable``."""
    source: str | None = None
    """What the energy is read from."""
    boundary: str | None = None
    """What the energy covers; ``gpu_board or module`` if only a measurement can show which."""
    meter: str | None = None
    """Meter that reads the energy."""
    device: str
    """Device of engines: UUID of the GPU that PyTorch uses (several if it is not known which), else ``cpu``;
    ``unknown`` if the driver hangs.
    """
    reason: str | None = None
    """Why the energy of ``device`` is not measured; null if it is."""


class Examination(Record):
    """The output of ``llem doctor --format json``."""

    schema_version: str = SCHEMA_VERSION
    """Version of this JSON."""
    version: str
    """Version of pytest-llem."""
    energy: EnergyAccess
    """How energy will be obtained."""
    findings: list[Finding] = Field(default_factory=list)
    """Findings, worst first."""
    driver: Driver
    """NVIDIA driver."""
    gpus: list[GpuReport] = Field(default_factory=list)
    """GPUs, in NVML's order."""
    rapl: Rapl
    """RAPL counters."""
    cpu: Cpu
    """Processor."""
    meters: list[Meter] = Field(default_factory=list)
    """Installed meters."""
    software: Software
    """Python environment of engines."""
    surroundings: Surroundings
    """Operating system, memory, environment variables and folders."""

    @property
    def blocked(self) -> bool:
        """Whether a finding blocks."""
        return any(finding.severity == "blocks" for finding in self.findings)
