"""Call functions in processes forked from one that has imported what they need: 20 times as fast as a fresh start.

    python -m tests.support.forks DESCRIPTOR

serves calls on a listening socket until its standard input is closed.
"""

from __future__ import annotations

import importlib
import os
import pickle
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

ROOT = Path(__file__).parents[2]


class ForkServer:
    """A process that forks a process for each call.

    Args:
        env: Its environment. Variables that are read at the start of a process (``LD_LIBRARY_PATH``) hold for all
            calls. Others may differ from call to call. Folders of a call's ``PYTHONPATH`` are searched as well.
    """

    def __init__(self, env: Mapping[str, str]) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind("")  # Linux makes up an address that needs no file
            listener.listen()
            self._address = listener.getsockname()
            command = [sys.executable, "-m", "tests.support.forks", str(listener.fileno())]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=[listener.fileno()], env=env, cwd=ROOT
            )

    def call(self, env: Mapping[str, str], function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of a module in a new process with an environment, and return its value.

        Raises:
            RuntimeError: It returned no value; standard error says why.
        """
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._address)
            with connection.makefile("rwb") as stream:
                pickle.dump((function.__module__, dict(env)), stream)
                pickle.dump((function, arguments), stream)
                stream.flush()
                try:
                    return pickle.load(stream)
                except EOFError:
                    raise RuntimeError(f"{function.__qualname__} gave nothing: see standard error") from None

    def close(self) -> None:
        """End the server. Running calls continue."""
        self._process.communicate()


def _serve(listener: socket.socket) -> None:
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        with connection, cast(BinaryIO, connection.makefile("rwb")) as stream:
            module, env = pickle.load(stream)
            importlib.import_module(module)
            if os.fork() == 0:
                listener.close()
                os.environ.clear()
                os.environ.update(env)
                folders = env.get("PYTHONPATH", "").split(os.pathsep)
                sys.path[1:1] = [folder for folder in folders if folder and folder not in sys.path]
                function, arguments = pickle.load(stream)
                pickle.dump(function(*arguments), stream)
                return


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
