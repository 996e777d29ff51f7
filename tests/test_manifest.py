"""The manifest and its journal: what a reader finds after kills and failed writes at any time."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import random
import shutil
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_llem import ExperimentResult, StudyResult
from pytest_llem.results import manifest as module
from pytest_llem.results import study_result
from pytest_llem.results.cycles import summarise as summarise_cycles
from pytest_llem.results.document import SCHEMA_VERSION
from pytest_llem.results.journal import Journal
from pytest_llem.results.manifest import (
    JOURNAL,
    ManifestWriter,
    read_manifest,
    stored_file,
    stored_files,
    stored_result,
    write_atomically,
)
from pytest_llem.results.manifest_records import ErrorRecord, Manifest, ManifestEntry
from pytest_llem.results.merge import merge
from pytest_llem.times import now

GOLDEN = Path(__file__).parent / "golden" / "1.0"
ERROR = ErrorRecord(kind="exception", type="ValueError", message="no\nand no")


def _start(directory: Any, entries: int = 30) -> Any:
    directory.mkdir(parents=True, exist_ok=True)
    made = [
        ManifestEntry(experiment_id=f"n={n}", config_hash=f"{n:016x}", config_summary=f"n={n}", cycle=1)
        for n in range(entries)
    ]
    manifest = Manifest(
        study_name="s",
        study_design_hash="0" * 16,
        pytest_llem_version="0",
        started_at=now(),
        total_experiments=entries,
        experiments=made,
    )
    return ManifestWriter(directory, manifest)


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the whole manifest after as many transitions as it has entries, whatever time has passed."""
    monkeypatch.setattr(module, "REFRESH_SHARE", 1)
    monkeypatch.setattr(module, "REFRESH_PAUSE", math.inf)


def _complete(writer: Any, one: Any) -> None:
    writer.completed(one, f'{{"result of": "{one}"}}', {"requests.csv": "a,b\n"}, worker=None, device="cpu")


def _step(writer: Any, rng: Any) -> None:
    """Advance one experiment by a transition, as a study would."""
    one = rng.choice([entry for entry in writer.manifest.experiments if entry.status in ("pending", "running")])
    if one.status == "pending":
        writer.running(one.experiment_id)
    else:
        ends = (
            lambda n: _complete(writer, n),
            lambda n: writer.failed(n, ERROR),
            lambda n: writer.skipped(n, "é"),
        )
        rng.choice(ends)(one.experiment_id)


def _sound(directory: Any, manifest: Any) -> None:
    """Assert that completed experiments have their results, and that the counters are right."""
    by_status = [entry.status for entry in manifest.experiments]
    assert manifest.completed == by_status.count("completed")
    assert manifest.failed == by_status.count("failed")
    assert manifest.skipped == by_status.count("skipped")
    assert manifest.pending == by_status.count("pending") + by_status.count("running")
    for entry in manifest.experiments:
        assert (stored_result(directory, entry) is not None) == (entry.status == "completed"), entry


def _state(manifest: Any) -> Any:
    return [entry.model_dump() for entry in manifest.experiments]


@pytest.mark.slow
def test_manifest_is_valid_at_every_byte_of_the_journal(tmp_path: Path, seldom: None) -> None:
    directory, rng = tmp_path / "run", random.Random(4)
    writer = _start(directory, entries=12)
    states = [_state(writer.manifest)]
    for _ in range(11):
        _step(writer, rng)
        states.append(_state(writer.manifest))
    journal = (directory / JOURNAL).read_bytes()
    assert journal.count(b"\n") == 11
    for size in range(len(journal) + 1):
        (directory / JOURNAL).write_bytes(journal[:size])
        found = read_manifest(directory)
        whole = journal[:size].count(b"\n")
        # A line is there with its last brace; what ends it is not waited for.
        assert _state(found) in states[whole : whole + 2]
        if journal[:size].endswith(b"\n"):
            assert _state(found) == states[whole]
        _sound(directory, found)


def test_kill_before_the_journal_is_emptied_is_harmless(
    tmp_path: Path, seldom: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = _start(tmp_path)
    monkeypatch.setattr(Journal, "clear", lambda self: None)
    for _ in range(29):
        writer.failed("n=0", ERROR)
    writer.running("n=0")
    assert json.loads((tmp_path / "manifest.json").read_text())["pending"] == 30, "it was written whole"
    assert (tmp_path / JOURNAL).read_text().count("\n") == 29
    assert _state(read_manifest(tmp_path)) == _state(writer.manifest), "older lines count for nothing"


def test_invalid_journal_lines_are_ignored(tmp_path: Path, seldom: None) -> None:
    writer = _start(tmp_path)
    writer.running("n=0")
    writer.running("n=1")
    one, other = (tmp_path / JOURNAL).read_bytes().splitlines(keepends=True)
    junk = b'\x00\xff\n[]\n{"sequence": 9}\n\n'
    stranger = other.replace(b"n=1", b"who?")
    (tmp_path / JOURNAL).write_bytes(one + junk + stranger + other + other[:40])
    assert [entry.status for entry in read_manifest(tmp_path).experiments[:3]] == ["running", "running", "pending"]


def test_small_study_is_written_whole_after_every_transition(tmp_path: Path) -> None:
    writer = _start(tmp_path, entries=64)
    for n in range(64):
        writer.running(f"n={n}")
        assert json.loads((tmp_path / "manifest.json").read_text())["experiments"][n]["status"] == "running"


def test_large_study_is_seldom_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH_PAUSE", math.inf)
    writer = _start(tmp_path, entries=640)
    written: list[Path] = []
    real = module.write_atomically

    def count(path: Path, text: str) -> None:
        written.append(path)
        real(path, text)

    monkeypatch.setattr(module, "write_atomically", count)
    for n in range(640):
        writer.running(f"n={n}")
        writer.failed(f"n={n}", ERROR)
    assert len(written) == 1280 // 10, "once in 640 / 64 transitions"
    assert read_manifest(tmp_path).failed == 640


def test_slow_study_is_written_whole_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REFRESH_SHARE", math.inf)
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    real = module.write_atomically

    def slow(path: Any, text: Any) -> Any:
        clock[0] += 0.1
        return real(path, text)

    monkeypatch.setattr(module, "write_atomically", slow)
    writer = _start(tmp_path)
    seen = []
    for n in range(4):
        clock[0] += 6
        writer.running(f"n={n}")
        seen.append(json.loads((tmp_path / "manifest.json").read_text())["experiments"][n]["status"])
    assert seen == ["pending", "running", "pending", "running"], "0.1 s in 10 s at the most"


@pytest.mark.parametrize("gone", [[JOURNAL], ["manifest.json"], ["manifest.json", JOURNAL]])
def test_deleted_manifest_and_journal_are_written_again(tmp_path: Path, seldom: None, gone: list[str]) -> None:
    writer = _start(tmp_path)
    for n in range(5):
        writer.running(f"n={n}")
        _complete(writer, f"n={n}")
    for name in gone:
        (tmp_path / name).unlink()
    writer.running("n=5")
    found = read_manifest(tmp_path)
    assert _state(found) == _state(writer.manifest)
    _sound(tmp_path, found)


def test_deleted_results_are_not_completed(tmp_path: Path, seldom: None) -> None:
    writer = _start(tmp_path)
    _complete(writer, "n=0")
    shutil.rmtree(tmp_path / "experiments")
    _complete(writer, "n=1")
    first, second = read_manifest(tmp_path).experiments[:2]
    assert stored_result(tmp_path, first) is None
    assert stored_result(tmp_path, second) == '{"result of": "n=1"}'


def test_stored_files_keep_carriage_returns(tmp_path: Path) -> None:
    writer = _start(tmp_path, 1)
    writer.running("n=0")
    writer.completed("n=0", "{}", {"outputs.csv": 'a\r\n"b\rc"\n'})
    assert stored_files(tmp_path, writer.entry("n=0")) == {"outputs.csv": 'a\r\n"b\rc"\n'}


def test_stored_files_of_another_path_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret.requests.csv").write_text("secret")
    writer = _start(tmp_path / "run", 1)
    writer.running("n=0")
    _complete(writer, "n=0")
    entry = writer.entry("n=0")
    entry.result_file = "../secret.json"
    assert stored_files(tmp_path / "run", entry) == {}
    assert stored_file(tmp_path / "run", entry, "requests.csv") is None
    entry.config_hash, entry.result_file = "*", "experiments/*-c1.json"
    assert stored_files(tmp_path / "run", entry) == {}


def test_another_attempt_keeps_nothing_of_the_one_before(tmp_path: Path) -> None:
    writer = _start(tmp_path, 1)
    entry = writer.entry("n=0")
    writer.running("n=0")
    writer.completed("n=0", "{}", {"requests.csv": "1", "power.csv": "1"}, worker="gw1", device="cpu")
    writer.running("n=0")
    assert (entry.worker, entry.device) == (None, None)
    writer.completed("n=0", "{}", {"requests.csv": "2"})
    assert stored_files(tmp_path, entry) == {"requests.csv": "2"}
    writer.running("n=0")
    writer.failed("n=0", ERROR)
    assert [*tmp_path.glob("experiments/*.csv")] == []


def test_lone_surrogates_are_escaped_in_every_file(tmp_path: Path) -> None:
    """JSON of a server may hold one, and so may the name of a file."""
    write_atomically(tmp_path / "text", "a\ud800")
    assert (tmp_path / "text").read_text() == "a\\ud800"
    error = ERROR.model_copy(update={"message": "a\ud800"})
    assert ErrorRecord.model_validate_json(error.model_dump_json()).message == "a\\ud800"


def test_missing_directory_raises_each_time(tmp_path: Path, seldom: None) -> None:
    writer = _start(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            _complete(writer, "n=0")
    assert writer.entry("n=0").status == "pending"
    assert not (tmp_path / "run").exists()


class _Faults:
    """Makes writes fail: ``short`` after some bytes, ``full`` at once; later writes may succeed."""

    def __init__(self) -> None:
        self.now: str | None = None
        self.os_write = os.write
        self.replace = Path.replace

    def write(self, file: Any, data: Any) -> Any:
        if self.now == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.now in ("short", "short and stuck"):
            self.now = self.now.replace("short", "full").replace("full and stuck", "stuck")
            return self.os_write(file, bytes(data)[: len(data) // 2])
        if self.now == "stuck":
            raise OSError(errno.EIO, "Input/output error")
        return self.os_write(file, data)

    def truncate(self, file: Any, size: Any) -> None:
        if self.now == "stuck":
            raise OSError(errno.EIO, "Input/output error")
        os.truncate(file, size)

    def whole(self, path: Any, text: Any, real: Any) -> Any:
        if self.now is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, text)


STEPS = st.lists(
    st.tuples(
        st.randoms(use_true_random=False), st.sampled_from([None, None, "full", "short", "short and stuck"])
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(steps=STEPS)
def test_manifest_recovers_from_failed_writes(tmp_path_factory: pytest.TempPathFactory, steps: Any) -> None:
    directory, faults = tmp_path_factory.mktemp("run"), _Faults()
    real = module.write_atomically
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "REFRESH_SHARE", 0.3)
        patch.setattr(module, "REFRESH_PAUSE", math.inf)
        patch.setattr(module, "write_atomically", lambda path, text: faults.whole(path, text, real))
        patch.setattr("pytest_llem.results.journal.os.write", faults.write)
        patch.setattr("pytest_llem.results.journal.os.ftruncate", faults.truncate)
        writer = _start(directory)
        for rng, fault in steps:
            faults.now = fault
            failed = False
            try:
                _step(writer, rng)
            except OSError:
                failed = True
            found = read_manifest(directory)
            _sound(directory, found)
            if not failed:
                assert _state(found) == _state(writer.manifest)
        faults.now = None
        writer.finish("interrupted")
    assert _state(read_manifest(directory)) == _state(writer.manifest)
    assert not (directory / JOURNAL).exists()


def test_finished_manifest_has_no_journal_and_nothing_running(tmp_path: Path, seldom: None) -> None:
    writer = _start(tmp_path)
    writer.running("n=0")
    assert (tmp_path / JOURNAL).is_file()
    writer.finish("interrupted")
    assert not (tmp_path / JOURNAL).exists()
    found = Manifest.read(tmp_path / "manifest.json")
    error = found.experiments[0].error
    assert error is not None
    assert error.kind == "interrupted"
    assert (found.status, found.failed, found.pending) == ("interrupted", 1, 29)


def test_entry_of_a_replayed_experiment_names_its_source(tmp_path: Path) -> None:
    writer = _start(tmp_path)
    writer.completed("n=0", "{}", {"requests.csv": "a\n"}, device="cpu", replayed_from="earlier_run")
    entry = read_manifest(tmp_path).experiments[0]
    assert (entry.status, entry.replayed_from, entry.device) == ("completed", "earlier_run", "cpu")
    assert stored_result(tmp_path, entry) == "{}"
    assert entry.result_file is not None
    assert (tmp_path / entry.result_file).with_suffix(".requests.csv").read_text() == "a\n"
    writer.running("n=0")
    assert writer.entry("n=0").replayed_from is None, "run again after all"


def _started(at: str) -> str:
    fields = {"study_name": "s", "study_design_hash": "0", "pytest_llem_version": "0", "total_experiments": 0}
    return json.dumps({**fields, "started_at": at, "experiments": []})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no manifest.json, so no results of a study"),
        ("not json", "not a Manifest: the file: Invalid JSON"),
        ("{}", "not a Manifest: study_name: Field required"),
        ("\udcff", "not a Manifest: the file: Invalid JSON"),
        ('{"schema_version": "3.0", "studies": []}', "schema version 3.0 cannot be read"),
        (_started("noon"), "not a Manifest: started_at: Value error, Invalid isoformat string: 'noon'"),
        (_started("2026-11-30T12:00:00"), "started_at: Value error, a time with an offset from UTC is needed"),
    ],
)
def test_invalid_manifest_is_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=message) as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_missing_manifest_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, fault in (("file", r"holds no manifest\.json"), ("nothing", "nothing: no such file or folder$")):
        with pytest.raises(ValueError, match=fault):
            read_manifest(tmp_path / name)


def test_parent_of_runs_is_refused_with_the_newest_run(tmp_path: Path) -> None:
    for run, ended in (("a", 2), ("b", 1)):
        _start(tmp_path / run)
        os.utime(tmp_path / run / "manifest.json", (ended, ended))
    with pytest.raises(ValueError, match=f"no results of a study; name a run in it, such as {tmp_path / 'a'}$"):
        read_manifest(tmp_path)


def test_files_of_a_failed_experiment_replace_those_of_an_earlier_attempt(tmp_path: Path) -> None:
    writer = _start(tmp_path)
    one = writer.manifest.experiments[0].experiment_id
    for files in ({"output.txt": "no memory", "server.txt": "gone"}, {"output.txt": "no disk"}, {}):
        writer.failed(one, ERROR, files)
        assert {file.name.partition(".")[2]: file.read_text() for file in tmp_path.glob("experiments/*")} == files


def test_output_that_cannot_be_saved_does_not_hide_the_error(tmp_path: Path) -> None:
    writer = _start(tmp_path)
    (tmp_path / "experiments").write_text("a file in place of the folder")
    writer.failed(writer.manifest.experiments[0].experiment_id, ERROR, {"output.txt": "no memory"})
    entry = read_manifest(tmp_path).experiments[0]
    assert (entry.status, entry.error) == ("failed", ERROR)


def test_files_of_schema_version_1_0_are_read() -> None:
    manifest = read_manifest(GOLDEN)
    assert (manifest.schema_version, SCHEMA_VERSION) == ("2.0", "2.0")
    assert [entry.status for entry in manifest.experiments] == ["completed", "completed", "failed", "failed"]
    assert manifest.experiments[0].replayed_from is None
    for entry in manifest.experiments[:2]:
        stored = stored_result(GOLDEN, entry)
        assert stored is not None
        result = ExperimentResult.model_validate_json(stored)
        assert result.identity.experiment_id == entry.experiment_id
    found = StudyResult.load(GOLDEN)
    assert (found.schema_version, found.summary.completed, found.summary.replayed) == ("2.0", 2, 0)
    assert found.points[0].metrics["seconds"].n == 2


def _design() -> Any:
    golden = StudyResult.load(GOLDEN)
    return golden.model_copy(
        update={"points": [one.model_copy(update={"metrics": {}}) for one in golden.points], "experiments": []}
    )


def test_unfinished_run_is_loaded(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    whole = StudyResult.load(tmp_path)
    (tmp_path / "study_result.json").unlink()
    with pytest.raises(ValueError, match=r"holds neither study_result\.json nor study_design\.json"):
        StudyResult.load(tmp_path)
    with pytest.raises(ValueError, match=r"holds neither study_result\.json nor study_design\.json"):
        merge([tmp_path], tmp_path / "merged", "reference", lambda merged: None)
    (tmp_path / "study_design.json").write_text(_design().model_dump_json())
    found = StudyResult.load(tmp_path)
    for point, then in zip(found.points, whole.points, strict=True):
        known = {
            name: point.metrics[name].model_copy(update={"values": []})  # which were not kept then
            for name in then.metrics
        }
        assert point.testbed.get("cpu") == ("A processor" if point.cycles else None)
        later_fields: dict[str, Any] = {
            "cycles": [],
            "testbed": {},
            "sut": {},
            "result_digests": [],
            "contention": None,
        }
        assert point.model_copy(update={"metrics": known, **later_fields}) == then
        later = [summary for name, summary in point.metrics.items() if name not in then.metrics]
        assert {summary.reason for summary in later if summary.n == 0} <= {
            "the version that measured it did not know this metric",
            "no completed cycle",
        }
    assert (found.summary, found.result_files, found.warnings) == (
        whole.summary,
        whole.result_files,
        whole.warnings,
    )

    lost = found.experiments[1].result_file
    assert lost is not None
    file = tmp_path / lost
    file.write_text(file.read_text()[:-10])
    found = StudyResult.load(tmp_path)
    error = found.experiments[1].error
    assert error is not None
    assert (found.experiments[1].status, error.type) == ("failed", "ResultLost")
    assert (found.summary.completed, found.summary.failed, found.points[0].metrics["seconds"].n) == (1, 3, 1)


def test_replayed_results_are_counted(tmp_path: Path) -> None:
    manifest = Manifest.read(GOLDEN / "manifest.json")
    manifest.experiments[0].replayed_from = "earlier"
    found = study_result.build_study_result(_design(), manifest, GOLDEN)
    assert (found.summary.completed, found.summary.replayed) == (2, 1)


def test_results_are_read_one_point_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = json.loads((GOLDEN / min(GOLDEN.glob("experiments/*.json"))).read_text())
    writer, design = _start(tmp_path, entries=40), _design()
    (point,) = design.points[:1]
    design.points = [point.model_copy(update={"config_hash": f"{n:016x}", "id": f"n={n}"}) for n in range(40)]
    for n in range(40):
        text = json.dumps({**given, "identity": {"experiment_id": f"n={n}", "config_hash": f"{n:016x}"}})
        writer.completed(f"n={n}", text, {}, worker=None, device=None)
    seen: list[weakref.ref[ExperimentResult]] = []
    most: list[int] = []

    def summarise(cycles: Any, **_: Any) -> Any:
        gc.collect()
        seen.extend(map(weakref.ref, cycles))
        most.append(sum(one() is not None for one in seen))
        return summarise_cycles(cycles)

    monkeypatch.setattr(study_result, "summarise", summarise)
    gc.freeze()  # so that a collection looks at no more than what this test makes
    try:
        found = study_result.build_study_result(design, writer.manifest, tmp_path)
    finally:
        gc.unfreeze()
    assert [one.metrics["seconds"].n for one in found.points] == [1] * 40
    assert len(most) == 40
    assert max(most) <= 2


def test_error_of_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "result.json"
    file.write_text("old")

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match=r"No space left on device: '.*/result\.json'"):
        write_atomically(file, "new")
    assert [*tmp_path.iterdir()] == [file]
    assert file.read_text() == "old"
