"""Find out which tool wrote a file, and read its runs."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pytest_llem.importers import aiperf, guidellm, llama_bench, own, sglang, vllm
from pytest_llem.importers.reading import Fields, fail, parse, read_text
from pytest_llem.importers.run import ToolRun

#: The formats by their names on the command line.
FORMATS = {one.FORMAT: one.TOOL for one in (vllm, aiperf, guidellm, sglang, llama_bench, own)}

#: The modules by the same names, in the order in which they are asked whether a file is of their format.
_MODULES = {one.FORMAT: one for one in (own, sglang, vllm, guidellm, llama_bench, aiperf)}


def read_runs(files: Sequence[Path], name: str | None = None) -> list[ToolRun]:
    """Return the runs in *files*, in their order, those of AIPerf last. Its records are joined with its exports.

    Example:
        >>> [run.tool for run in read_runs([Path("result.json")])]
        ['vllm bench serve']

    Args:
        files: The files, or folders of them, such as that of AIPerf's artifacts.
        name: Name of their format in :data:`FORMATS`; None to find it out for each.

    Raises:
        ImportFileError: A file is given twice, cannot be read, or is of none of the formats.
    """
    expanded = [one for given in files for one in _expanded(given, files)]
    for file, times in Counter(expanded).items():
        if times > 1:
            fail(file, "is given twice: one run is not two")
    runs: list[ToolRun] = []
    exports: list[Fields] = []
    records: list[list[Fields]] = []
    for file in expanded:
        text = read_text(file)
        if name in (None, llama_bench.FORMAT) and llama_bench.matches_csv(text):
            runs += [run for row in llama_bench.rows(file, text) for run in llama_bench.read(row)]
            continue
        documents = parse(file, text)
        found = next((key for key, one in _MODULES.items() if one.matches(documents[0])), None)
        if found is None or name not in (None, found):
            fail(file, _unknown(documents, name, found))
        if found != aiperf.FORMAT:
            runs += _read(found, file, documents)
        elif aiperf.matches_export(documents[0]):
            exports.append(Fields(file, documents[0]))
        else:
            records.append([Fields(file, one, f"line {at}") for at, one in enumerate(documents, start=1)])
    return [*runs, *_aiperf(exports, records)]


def digest(file: Path) -> str:
    """Return the SHA-256 of *file*, in hex."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _expanded(given: Path, files: Sequence[Path]) -> list[Path]:
    """Return the result files in a folder; otherwise *given*, with the records beside an export of AIPerf."""
    if not given.is_dir():
        export, records = aiperf.FILES
        beside = given.with_name(records)
        is_pair = given.name == export and beside not in files and beside.is_file()
        return [given, beside] if is_pair else [given]
    of_aiperf = [given / name for name in aiperf.FILES if (given / name).is_file()]
    found = of_aiperf or sorted(one for one in given.iterdir() if one.suffix in (".json", ".jsonl", ".csv"))
    if not found:
        fail(given, "is a folder without JSON, JSON lines or CSV")
    return found


def _read(name: str, file: Path, documents: Sequence[Any]) -> Iterator[ToolRun]:
    if isinstance(documents[0], list):  # of llama-bench
        parts = [Fields(file, one, f"[{at}]") for at, one in enumerate(documents[0])]
    else:  # vllm bench serve --append-result, SGLang and llama-bench write a line for each run
        parts = [Fields(file, one, f"line {at}" if at > 1 else "") for at, one in enumerate(documents, start=1)]
    for part in parts:
        yield from _MODULES[name].read(part)


def _aiperf(exports: Sequence[Fields], records: Sequence[Sequence[Fields]]) -> Iterator[ToolRun]:
    """Yield the runs of AIPerf. If there are exports and records, they belong together in their order."""
    if exports and records and len(exports) != len(records):
        fail(
            exports[0].file, f"{len(exports)} exports of AIPerf and {len(records)} files of records: give one each"
        )
    for at in range(max(len(exports), len(records))):
        yield from aiperf.read(exports[at] if exports else None, records[at] if records else [])


def _unknown(documents: Sequence[Any], name: str | None, found: str | None) -> str:
    if name is not None:
        tools = {**FORMATS, own.FORMAT: f"a script (its key {own.KEY!r} is missing)"}
        return f"is not a file of {tools[name]}" + (f", but of {FORMATS[found]}" if found else "")
    known = ", ".join(one for key, one in FORMATS.items() if key != own.FORMAT)
    return f"is of none of the formats that can be imported: {known}, or a script's own with the key {own.KEY!r}"
