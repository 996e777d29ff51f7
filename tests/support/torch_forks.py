"""Calls in processes forked from one that has imported torch and transformers, but no model's class."""

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
    """Call a function of this module in a process of its own, and return what it gives."""
    return _server().call(os.environ if env is None else env, function, *arguments)


@functools.cache
def _server() -> ForkServer:
    server = ForkServer(os.environ)
    atexit.register(server.close)
    return server


def make_tiny_llama() -> str:
    """Return the folder of the builtin model, which is made where it is not there."""
    return str(tiny_llama.tiny_llama())


def classes_after_fetch(model: str) -> list[str]:
    """Return the modules of models' classes that fetching a model has imported."""
    before = set(sys.modules)
    PyTorchEngine(config(model=model), EngineContext()).fetch()
    return [name for name in set(sys.modules) - before if ".modeling_" in name]
