"""Call functions in processes forked from one that has imported torch and transformers, but no model class."""

from __future__ import annotations

import atexit
import functools
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from pytest_llem.engines import tiny_llama
from pytest_llem.engines.protocol import EngineContext
from pytest_llem.engines.pytorch.engine import PyTorchEngine
from tests.support.forks import ForkServer
from tests.support.tiny import config


def call(function: Callable[..., Any], *arguments: Any, env: Mapping[str, str] | None = None) -> Any:
    """Call a function of this module in a new process, and return its value."""
    return _server().call(os.environ if env is None else env, function, *arguments)


@functools.cache
def _server() -> ForkServer:
    server = ForkServer(os.environ)
    atexit.register(server.close)
    return server


def make_tiny_llama() -> str:
    """Return the folder of the builtin model, and generate it if it is missing."""
    return str(tiny_llama.tiny_llama())


def classes_after_fetch(model: str) -> list[str]:
    """Return the modules of model classes that fetching a model has imported."""
    before = set(sys.modules)
    PyTorchEngine(config(model=model), EngineContext()).fetch()
    return [name for name in set(sys.modules) - before if ".modeling_" in name]
