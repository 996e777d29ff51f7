"""Build the command of a server: presets, and placeholders in commands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING, Any

from pytest_llem.study.problems import did_you_mean

if TYPE_CHECKING:  # which imports this module
    from pytest_llem.study.config import ExperimentConfig
    from pytest_llem.study.server import ServerConfig

#: vLLM's and SGLang's names of precisions.
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class ServerPreset:
    """What is known of a kind of server.

    Attributes:
        command: Its command, with placeholders.
        decoder: Name in requests of each field of ``decoder`` that is named otherwise there.
        env: Environment variables that it gets unless they are set.
        negates: Whether an option that is off is given as ``--no-…``.
    """

    command: Sequence[str]
    decoder: Mapping[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    negates: bool = False


PRESETS: dict[str, ServerPreset] = {
    "vllm": ServerPreset(
        command=(
            *("{python}", "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", "{model}", "--dtype", "{dtype}", "--host", "127.0.0.1", "--port", "{port}"),
        ),
        decoder={"min_new_tokens": "min_tokens"},
        env={"VLLM_NO_USAGE_STATS": "1"},
        negates=True,
    ),
    "sglang": ServerPreset(
        command=(
            *("{python}", "-m", "sglang.launch_server", "--enable-metrics"),
            *("--model-path", "{model}", "--dtype", "{dtype}", "--host", "127.0.0.1", "--port", "{port}"),
        ),
        decoder={"min_new_tokens": "min_tokens"},
    ),
    "llama.cpp": ServerPreset(
        command=("llama-server", "--model", "{model}", "--metrics", "--host", "127.0.0.1", "--port", "{port}"),
        decoder={"repetition_penalty": "repeat_penalty"},
    ),
}

#: Placeholders that each command may have beside the names in ``args``, and the fields of the study behind them.
_FIELDS = {"model": "model", "precision": "precision", "dtype": "precision"}
_KNOWN = ("port", "python", *_FIELDS)


def placeholders(server: ServerConfig) -> set[str]:
    """Return the fields of the study that the command of *server* takes, and the placeholders of its arguments.

    Raises:
        ValueError: The command has an unknown placeholder, or does not take one of ``args``.
    """
    if server.is_attached:
        return set()
    args = server.args or {}
    if server.command is None:
        list(_options(server))  # to check them
    names = {name for part in _template(server) for name in _names(part)}
    known = (*_KNOWN, *(args if server.command is not None else ()))
    for name in sorted(names):
        if name not in known:
            hint = did_you_mean(name, known) or f" (there are: {', '.join(known)})"
            raise ValueError(f"command: unknown placeholder {{{name}}}{hint}")
    if "port" not in names:
        raise ValueError("command: needs the placeholder {port}: each server gets a port of its own")
    if server.command is not None and (left := sorted({*args} - names)):
        raise ValueError(f"args: {left[0]!r} does not reach the server: its command has no {{{left[0]}}}")
    return {_FIELDS.get(name, name) for name in names}


def server_command(config: ExperimentConfig, *, port: int, python: str, model: str | None) -> list[str]:
    """Return program and arguments of an experiment's server.

    Args:
        config: The experiment; its server is started by a command.
        port: The port that the server shall listen on.
        python: The Python interpreter of the server.
        model: Folder or name of the model; None if the study names none.
    """
    server = config.server
    assert server is not None
    values = {"port": port, "python": python, "model": model, "precision": config.precision}
    values["dtype"] = _DTYPES[config.precision]
    if server.command is not None:
        values |= server.args or {}
    command = [part.format_map({name: _text(value) for name, value in values.items()}) for part in _template(server)]
    return command if server.command is not None else [*command, *_options(server)]


def server_env(server: ServerConfig) -> dict[str, str]:
    """Return the environment variables of a server, beside those of pytest."""
    preset = PRESETS[server.preset].env if server.preset else {}
    return {**preset, **(server.env or {})}


def _template(server: ServerConfig) -> Sequence[str]:
    if server.command is not None:
        return server.command
    assert server.preset is not None
    return PRESETS[server.preset].command


def _names(part: str) -> Iterator[str]:
    """Yield the names of the placeholders in a part of a command.

    Raises:
        ValueError: Its braces are unbalanced, or a placeholder is more than a name.
    """
    try:
        for _, name, form, conversion in Formatter().parse(part):
            if name is None:
                continue
            if not name.isidentifier() or form or conversion:
                raise ValueError("a placeholder is a name in braces")
            yield name
    except ValueError as error:
        raise ValueError(f"command: {part!r}: {error}; write {{{{ and }}}} for braces") from None


def _options(server: ServerConfig) -> Iterator[str]:
    """Yield the options in ``args`` as arguments of a preset's command.

    Raises:
        ValueError: An option cannot be switched off.
    """
    assert server.preset is not None
    for name, value in (server.args or {}).items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            yield option
        elif value is False and PRESETS[server.preset].negates:
            yield f"--no-{name.replace('_', '-')}"
        elif value is False:
            raise ValueError(f"args: {name!r} cannot be false: {server.preset} has no option for that: leave it out")
        elif isinstance(value, list):
            yield option
            yield from map(_text, value)
        else:
            yield option
            yield _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
