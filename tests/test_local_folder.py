"""Locks on file systems of clusters: where they do not work, or lock all machines, a local folder is used."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from pathlib import Path

import pytest

from pytest_llem import local_folder
from pytest_llem.local_folder import file_system, lock_problem
from pytest_llem.machine.device_locks import try_locks
from pytest_llem.machine.owner import FOLDER
from pytest_llem.results.manifest import read_manifest
from tests.conftest import RunPytest, WriteStudy

MOUNTS = """\
overlay / overlay rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sda1 /home/local\\040disk ext4 rw 0 0
mds:/scratch /scratch lustre rw 0 0
host:/x /mnt/x fuse.sshfs rw 0 0
systemd-1 /auto autofs rw 0 0
server:/auto /auto nfs4 rw 0 0
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/tmp", "overlay"),
        ("/home/ann/results", "nfs4"),
        ("/home/local disk/tmp", "ext4"),
        ("/scratch", "lustre"),
        ("/mnt/x/deep", "fuse.sshfs"),
        ("/homework", "overlay"),
        ("/auto/ann", "nfs4"),
    ],
)
def test_file_system_is_that_of_the_deepest_mount(tmp_path: Path, folder: str, kind: str) -> None:
    (tmp_path / "mounts").write_text(MOUNTS)
    assert file_system(Path(folder), tmp_path / "mounts") == kind
    is_network = kind in ("nfs4", "lustre", "fuse.sshfs")
    expected = f"is on a network file system ({kind})"
    assert (lock_problem(Path(folder), tmp_path / "mounts") == expected) is is_network


@pytest.fixture
def lockless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder without locks, as some mounts of NFS have none, which holds temporary files and results."""
    folder = tmp_path / "lockless"
    folder.mkdir()
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).is_relative_to(folder):  # noqa: PTH115
            raise OSError(errno.ENOLCK, "No locks available")
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr(local_folder, "_OTHERS", (str(folder / "missing"), str(tmp_path)))
    return folder


def test_leases_are_in_a_local_folder_if_there_are_no_locks(lockless: Path) -> None:
    assert try_locks() == lockless.parent / FOLDER
    assert not (lockless / FOLDER).exists()


def test_run_without_locks_says_so_and_writes_its_results(
    lockless: Path, run_pytest: RunPytest, write_study: WriteStudy
) -> None:
    write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
    run = run_pytest(f"--llem-results-dir={lockless / 'results'}")
    run.assert_outcomes(passed=1)
    run.stdout.fnmatch_lines(
        [
            f"llem: {lockless} has no locks: No locks available: devices are leased in {lockless.parent}",
            f"llem: {lockless} has no locks: *: a run that is killed is not reported as interrupted there",
        ]
    )
    (directory,) = (one for one in (lockless / "results").iterdir() if one.is_dir())
    manifest = read_manifest(directory)
    assert (manifest.status, manifest.completed, manifest.boot_id) == ("completed", 1, None)
