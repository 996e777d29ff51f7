"""A real sshd on this machine, with its own configuration, keys and port, and hosts that it can be reached as."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

from tests.conftest import NOOP_ENGINE, ROOT
from tests.support.processes import wait_until

_SSHD = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")

_SERVER = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile {folder}/pid
UsePAM no
PasswordAuthentication no
StrictModes no
PermitUserEnvironment no
AcceptEnv *
MaxStartups 100
"""

_CLIENT = """\
Host *
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentityFile {folder}/user_key
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking accept-new
  LogLevel ERROR
  SetEnv {variables}
"""


class SshUnavailableError(Exception):
    """There is no sshd on this machine, or it cannot be started."""


class SshServer:
    """An sshd. Any name of a host leads to it.

    Attributes:
        folder: Folder of its keys and configuration.
    """

    def __init__(self, folder: Path, temporary: Path) -> None:
        if _SSHD is None or shutil.which("ssh") is None:
            raise SshUnavailableError("sshd is not installed (apt-get install openssh-server)")
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # sshd refuses to start without it
        self.folder = folder
        for name in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        # ssh joins the values of SetEnv with spaces.
        variables = {"PYTHONPATH": f"{NOOP_ENGINE}:{ROOT}", "TMPDIR": temporary, "OMP_NUM_THREADS": 1}
        settings = {
            "port": self._port,
            "folder": folder,
            "user": getpass.getuser(),
            "variables": " ".join(f"{name}={value}" for name, value in {**variables, "HF_HUB_OFFLINE": 1}.items()),
        }
        (folder / "sshd_config").write_text(_SERVER.format(**settings))
        (folder / "ssh_config").write_text(_CLIENT.format(**settings))
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        assert _SSHD is not None
        with (self.folder / "log").open("ab") as log:
            command = [_SSHD, "-D", "-e", "-f", str(self.folder / "sshd_config")]
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(self._accepts)
        except AssertionError:
            raise SshUnavailableError((self.folder / "log").read_text()) from None

    def stop(self) -> None:
        """End it and its connections, as if its host had disappeared."""
        assert self._process is not None
        connections = self.below().values()
        self._process.kill()
        self._process.wait()
        for process in connections:
            with suppress(psutil.NoSuchProcess):
                if process.name().startswith("sshd"):
                    process.kill()

    def below(self) -> dict[int, psutil.Process]:
        """Return the processes of all connections by id: sshd's own, and what runs for its clients."""
        assert self._process is not None
        with suppress(psutil.NoSuchProcess):
            return {one.pid: one for one in psutil.Process(self._process.pid).children(recursive=True)}
        return {}

    def cut(self, pid: int, number: signal.Signals = signal.SIGKILL) -> None:
        """Kill or stop sshd's processes of the connection for which the process *pid* runs."""
        for process in psutil.Process(pid).parents():
            if process.name().startswith("sshd") and process.pid in self.below():
                process.send_signal(number)

    def worker(self, host: str, folder: Path, options: str = "") -> str:
        """Return xdist's option for a worker in *folder* on *host*."""
        python = f"python={sys.executable}//chdir={folder}"
        return f"--tx=ssh={options}{host}//ssh_config={self.folder / 'ssh_config'}//{python}"

    def _accepts(self) -> bool:
        with socket.socket() as client:
            client.settimeout(1)
            return client.connect_ex(("127.0.0.1", self._port)) == 0
