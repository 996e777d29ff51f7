"""Build the command of a server: presets, and placeholders in commands."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pytest_llem.study.config import DATA_TYPES, ExperimentConfig
from pytest_llem.study.server import ServerConfig
from pytest_llem.study.substitution import PlaceholderError, Substitution


@dataclass(frozen=True)
class ServerPreset:
    """What is known of a kind of server.

    Attributes:
        command: Its command, with placeholders.
        decoder: Name in requests by field of ``decoder``, for fields whose name differs there.
        env: Environment variables that the server gets unless ``server.env`` sets them.
        negates: Whether an option that is false is given as ``--no-…``.
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


def fields_in_command(config: ExperimentConfig) -> set[str]:
    """Return the fields of the study that the command of an experiment's server takes, by dotted name.

    Raises:
        ValueError: A placeholder cannot be filled, ``{port}`` is missing, or one of ``args`` is wrong or unused.
    """
    server = config.server
    assert server is not None
    if server.is_attached:
        return set()
    parts = _template(server)
    if not any("{port}" in part for part in parts):
        raise ValueError("command: needs the placeholder {port}: each server gets a port of its own")
    substitution = _substitution(config, port="0", python="python", model=config.model or "")
    try:
        found = substitution.fields_in(parts)
    except PlaceholderError as error:
        raise ValueError(f"command[{error.index}]: {error}") from None
    by_placeholder = {"{model}": "model", "{dtype}": "precision"}
    found |= {name for placeholder, name in by_placeholder.items() if any(placeholder in part for part in parts)}
    if server.command is None:
        list(_options(server))  # to check them
        return found
    unused = [name for name in server.args or {} if f"server.args.{name}" not in found]
    if unused:
        problem = f"{unused[0]!r} does not reach the server: its command has no {{{unused[0]}}}"
        raise ValueError(f"args: {problem}: leave {unused[0]} out, or add that")
    return found


def server_command(config: ExperimentConfig, *, port: int, python: str, model: str | None) -> list[str]:
    """Return program and arguments of an experiment's server.

    Args:
        config: The experiment; its server is started by a command.
        port: The port that the server shall listen on.
        python: The Python interpreter of the server.
        model: Folder, file or name of the model; None if the study names none.
    """
    server = config.server
    assert server is not None
    command = _substitution(config, port=str(port), python=python, model=model or "").fill(_template(server))
    return command if server.command is not None else [*command, *_options(server)]


def _substitution(config: ExperimentConfig, **others: str) -> Substitution:
    return Substitution(config, "server", dtype=DATA_TYPES[config.precision], **others)


def server_hash(config: ExperimentConfig) -> str:
    """Return a digest that is equal for experiments that may share a server.

    They differ only in how they are measured: ``load``, ``measurement``, ``warmup`` and ``baseline``.
    """
    text = config.model_dump_json(exclude={"load", "measurement", "warmup", "baseline", "output_dir"})
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def server_env(server: ServerConfig) -> dict[str, str]:
    """Return the environment variables of a server, beside those of pytest."""
    preset = PRESETS[server.preset].env if server.preset else {}
    return {**preset, **(server.env or {})}


def runs_python(server: ServerConfig) -> bool:
    """Return whether a server's command runs a Python interpreter that the study or an option chooses."""
    return not server.is_attached and any("{python}" in part for part in _template(server))


def _template(server: ServerConfig) -> Sequence[str]:
    if server.command is not None:
        return server.command
    assert server.preset is not None
    return PRESETS[server.preset].command


def _options(server: ServerConfig) -> Iterator[str]:
    """Yield the options in ``args`` as arguments of a preset's command.

    Raises:
        ValueError: An option cannot be switched off, or is in the command already.
    """
    assert server.preset is not None
    preset = PRESETS[server.preset]
    for name, value in (server.args or {}).items():
        option = f"--{name.replace('_', '-')}"
        if option in preset.command:  # the server would take the last one, and a result's label would be wrong
            raise ValueError(
                f"args: {name!r} is in the command of preset {server.preset!r} already, with model and precision "
                "of the study: leave it out"
            )
        if value is None:
            continue
        if value is True:
            yield option
        elif value is False and preset.negates:
            yield f"--no-{name.replace('_', '-')}"
        elif value is False:
            raise ValueError(f"args: {name!r} cannot be false for {server.preset}: leave it out")
        elif isinstance(value, list):
            yield option
            yield from map(_text, value)
        else:
            yield option
            yield _text(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
