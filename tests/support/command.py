"""Run ``llem fetch`` in a process forked from one that has imported it, as the import takes a second.

Modules that read the environment on import (huggingface_hub) are imported by the forked process.
"""

from __future__ import annotations

import atexit
import functools
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest_llem.cli
import pytest_llem.cli.downloads
import pytest_llem.plugin
from tests.support.forks import ForkServer


def fetch(*arguments: str, env: Mapping[str, str]) -> tuple[int, str, str]:
    """Run ``llem fetch`` in the current folder; return its exit status, standard output and standard error."""
    status, out, err = _server().call(env, _fetch, str(Path.cwd()), arguments)
    return int(status), str(out), str(err)


@functools.cache
def _server() -> ForkServer:
    server = ForkServer(os.environ)
    atexit.register(server.close)
    return server


def _fetch(folder: str, arguments: tuple[str, ...]) -> tuple[int, str, str]:
    os.chdir(folder)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        status = pytest_llem.cli.main(["fetch", *arguments])
        sys.stdout.flush()
        sys.stderr.flush()
        out.seek(0)
        err.seek(0)
        return status, out.read(), err.read()
