"""Format the output of ``llem doctor``: the energy, the findings, and tables of the machine and its software."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from pytest_llem.doctor.records import EnergyAccess, Examination, Finding, GpuReport
from pytest_llem.reporting.terminal.tables import plain_table, render
from pytest_llem.study.problems import printable

#: Minimum width of lines in characters, also in a narrower terminal: a UUID is not wrapped, and would leave no
#: room for other cells.
_MIN_WIDTH = 70

_ENERGY = {
    "measured": "energy will be measured on this machine",
    "sampled": "energy will be integrated from sampled power on this machine",
    "estimated": "energy will be estimated, not measured, on this machine",
    "unavailable": "energy will not be available on this machine",
}


def lines(found: Examination, width: int) -> Iterator[str]:
    """Yield the lines for a terminal of *width* characters. Commands are never wrapped: they are to be copied."""
    width = max(width, _MIN_WIDTH)
    yield from _wrapped(_energy(found.energy), width)
    yield ""
    if found.findings:
        yield "Findings"
        for finding in found.findings:
            yield from _finding(finding, width)
    else:
        yield "No findings."
    yield from _gpus(found, width)
    yield from _processor(found, width)
    yield from _engines(found, width)
    yield from _surroundings(found, width)


def _energy(energy: EnergyAccess) -> str:
    text = _ENERGY[energy.method]
    if energy.boundary is not None:
        text += f": {energy.boundary} by {energy.source} (meter {energy.meter})"
    if energy.reason is None:
        return text
    # ``measured`` with a reason: the CPU's energy is measured, and that of the GPU (``device``) is not.
    link = f"; that of {energy.device} will not" if energy.method == "measured" else ""
    return f"{text}{link}: {energy.reason}"


def _finding(finding: Finding, width: int) -> Iterator[str]:
    kind = f"  {finding.severity:<8} "
    indent = " " * len(kind)
    yield from _wrapped(f"{finding.about}: {finding.message}", width, kind, indent)
    if finding.advice is not None:
        yield from _wrapped(finding.advice, width, f"{indent}→ ", f"{indent}  ")
    for command in finding.commands:
        yield f"{indent}$ {printable(command)}"


def _gpus(found: Examination, width: int) -> Iterator[str]:
    driver = found.driver
    if not found.gpus:
        reason = driver.error or "the driver reports none"
        yield ""
        yield from _wrapped(f"GPUs: none ({reason})", width)
        return
    title = f"GPUs (driver {_text(driver.version)}, CUDA up to {_text(driver.cuda)})"
    names = [(str(gpu.index), _text(gpu.name or gpu.error), _text(gpu.uuid), _cuda(gpu)) for gpu in found.gpus]
    yield from _table(title, ("", "name", "UUID", "CUDA"), names, width)
    known = [gpu for gpu in found.gpus if gpu.error is None]
    if not known:
        return
    energy = [
        (
            str(gpu.index),
            _counter(gpu),
            _number(gpu.tick_ms, 1),
            _number(gpu.call_ms, 2),
            ", ".join(one.removeprefix("nvml_power_") for one in gpu.power_sources) or "no",
            _number(gpu.power_w, 0),
            f"{_number(gpu.power_limit_w, 0)} ({_number(gpu.default_power_limit_w, 0)})",
        )
        for gpu in known
    ]
    heading = ("", "energy\ncounter", "tick\nms", "call\nms", "power reading", "now\nW", "limit\n(default) W")
    yield from _table("Energy of GPUs", heading, energy, width, right=(2, 3, 5, 6))
    states = [
        (
            str(gpu.index),
            f"{_number(gpu.used_mb, 0)} of\n{_number(gpu.memory_mb, 0)}",
            _switch(gpu.persistence_mode),
            _switch(gpu.mig_mode),
            _switch(gpu.ecc_mode),
            f"{_number(gpu.sm_clock_mhz, 0)} of\n{_number(gpu.max_sm_clock_mhz, 0)}",
            _yes_no(gpu.clocks_held),
            _text(None if gpu.clock_reasons is None else ", ".join(gpu.clock_reasons) or "none"),
            _number(gpu.temperature_c, 0),
        )
        for gpu in known
    ]
    modes = ("persis-\ntence", "MIG", "ECC")
    states_heading = ("", "memory\nMB", *modes, "clock\nMHz", "clock\nlocked", "clock\nreasons", "°C")
    yield from _table("State of GPUs", states_heading, states, width, right=(1, 5, 8))
    using = [
        (str(gpu.index), str(user.pid), _text(user.name), _number(user.used_mb, 0))
        for gpu in known
        for user in gpu.users or ()
    ]
    if using:
        yield from _table("Users of GPUs", ("", "pid", "program", "memory MB"), using, width, right=(1, 3))


def _cuda(gpu: GpuReport) -> str:
    if not gpu.visible:
        return "hidden"
    return "first" if gpu.first else "visible"


def _counter(gpu: GpuReport) -> str:
    return "fails" if gpu.energy_counter and gpu.energy_counter_error else _yes_no(gpu.energy_counter)


def _processor(found: Examination, width: int) -> Iterator[str]:
    cpu, rapl = found.cpu, found.rapl
    limit = f", limit {cpu.limit:g}" if cpu.limit is not None else ""
    rows = [
        ("model", _text(cpu.model)),
        ("CPUs", f"{_number(cpu.allowed, 0)} of {_number(cpu.count, 0)}{limit}"),
        ("SMT", _switch(cpu.smt)),
        ("governor", f"{_text(cpu.governor)}, boost {_switch(cpu.boost)}"),
        ("load", _number(cpu.load, 2)),
        ("OMP_NUM_THREADS", _variable(cpu.omp_num_threads)),
        ("virtual machine", _yes_no(cpu.virtual_machine)),
    ]
    rows += [(f"RAPL {one.device}", one.error or "readable") for one in rapl.domains]
    if not rapl.domains:
        rows.append(("RAPL", f"no counter under {rapl.root}"))
    yield from _table("CPU", None, rows, width)


def _engines(found: Examination, width: int) -> Iterator[str]:
    software = found.software
    title = f"Engines (Python {_text(software.python)}, {software.executable})"
    engines = [
        (
            one.name,
            f"{_text(one.distribution)} {_text(one.version)}",
            (one.error if one.installed else "not installed") or "yes",
            _text(one.torch_cuda),
            "-" if one.gpus is None else str(one.gpus),
        )
        for one in software.engines
    ]
    yield from _table(title, ("engine", "from", "usable", "CUDA", "GPUs"), engines, width)
    rows = [
        (one.name, _text(one.distribution), "yes" if one.auto else "no", one.error or "-") for one in found.meters
    ]
    yield from _table("Meters", ("meter", "from", "auto", "error"), rows, width)
    packages = [(one.name, _text(one.version), one.purpose) for one in software.packages]
    yield from _table("Packages", ("package", "version", "for"), packages, width)


def _surroundings(found: Examination, width: int) -> Iterator[str]:
    around = found.surroundings
    memory = _size(around.memory_mb)
    if around.memory_limit_mb is not None:
        memory += f", limit {around.memory_limit_mb:,} MB"
    rows = [
        ("system", f"{around.os} {around.kernel}"),
        ("container", around.container or "no sign of one"),
        ("memory", memory),
        ("swap in use", _size(around.swap_used_mb)),
        ("HF_HUB_OFFLINE", "set" if around.hf_hub_offline else "not set"),
        ("CUDA_VISIBLE_DEVICES", _variable(around.cuda_visible_devices)),
    ]
    rows += [
        (one.purpose, f"{_text(one.path)}: {one.error or f'{_size(one.free_mb)} free'}") for one in around.folders
    ]
    yield from _table("Surroundings", None, rows, width)


def _table(
    title: str,
    headings: Sequence[str] | None,
    rows: Sequence[Sequence[str]],
    width: int,
    *,
    right: Sequence[int] = (),
) -> Iterator[str]:
    """Yield a blank line, the title and the table. Without headings, rows are pairs of a name and its value."""
    yield ""
    yield from _wrapped(title, width)
    if not rows:
        yield "  none"
        return
    table = plain_table()
    table.show_header = headings is not None
    for column in range(len(rows[0])):
        table.add_column(
            headings[column] if headings is not None else "",
            justify="right" if column in right else "left",
            overflow="fold",
            vertical="top",
            no_wrap=headings is not None and headings[column] == "UUID",
        )
    for row in rows:
        table.add_row(*("\n".join(map(printable, cell.split("\n"))) for cell in row))
    yield from (f"  {line}" for line in render(table, width - 2))


def _wrapped(text: str, width: int, first: str = "", rest: str = "") -> list[str]:
    return textwrap.wrap(
        printable(text), width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False
    )


def _text(value: str | None) -> str:
    return "-" if value is None else value


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _size(megabytes: int | None) -> str:
    return "-" if megabytes is None else f"{megabytes:,} MB"


def _variable(value: str | None) -> str:
    return "not set" if value is None else value or "empty"


def _yes_no(value: bool | None) -> str:
    return {True: "yes", False: "no", None: "-"}[value]


def _switch(value: bool | None) -> str:
    return {True: "on", False: "off", None: "-"}[value]
