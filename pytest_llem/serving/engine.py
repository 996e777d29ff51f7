"""The engine ``server``: a server that runs already, in processes of its own."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any

from pytest_llem.engines.models import ModelSource, resolve_model
from pytest_llem.engines.protocol import (
    Engine,
    EngineContext,
    EngineCrashError,
    ModelNotFoundError,
    PreflightError,
)
from pytest_llem.results.experiment import EngineRecord
from pytest_llem.serving.client import Endpoint
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.server import ServerConfig
from pytest_llem.study.server_command import PRESETS

#: Time limit of a GET request to the server, in s.
_TIMEOUT_SECONDS = 30.0

#: Settings of ``decoder`` that are sent in requests, under the names that the preset gives them.
_DECODER_FIELDS = ("top_k", "min_p", "repetition_penalty", "min_new_tokens")

#: If a vocabulary's special tokens are not known, synthetic prompts leave out this share of its ids at each end:
#: special tokens are the first or the last ones.
_LEFT_OUT_SHARE = 0.05


class ServerEngine(Engine):
    """A server that pytest's process has started, or that ran before. It is measured through its API."""

    options = ServerConfig

    def __init__(self, config: ExperimentConfig, context: EngineContext) -> None:
        if context.server is None:
            raise PreflightError("backend 'server' runs in a pytest session only, which starts the server")
        assert config.server is not None
        self._config, self._options, self._context = config, config.server, context
        self.record = context.server
        self.gpus: Sequence[str] = context.gpus
        pid = self.record.supervisor_pid or self.record.pid  # the ancestor of all other processes of the server
        self.processes: Sequence[int] = () if pid is None else (pid,)
        self._models: list[dict[str, Any]] = []

    def load(self) -> None:
        """Ask the server for its models."""
        found = self._ask("/v1/models")
        self._models = [one for one in (found or {}).get("data") or () if isinstance(one, dict)]
        if self._options.model_name is None and found is None:
            raise PreflightError(
                f"{self.record.url}/v1/models: the server does not list its models: give server.model_name"
            )

    def describe(self) -> EngineRecord:
        options = self._options
        source, versions = self._source, dict(self.record.packages)
        version = self._ask("/version") or {}
        if isinstance(version.get("version"), str):
            versions[options.preset or "server"] = version["version"]
        return EngineRecord(
            name="server",
            versions=versions,
            device="cuda" if self.gpus else "cpu",
            settings={
                "preset": options.preset,
                "api": options.api,
                "model": self._model_name,
                "command": self._given_command(),
                "sampling": self._fields(),
            },
            **({} if source is None else source.provenance()),
            random_weights=options.underscored_args.get("load_format") == "dummy"
            or (source is not None and source.random_weights),
        )

    def endpoint(self) -> Endpoint:
        """Return the endpoint to which requests are sent."""
        assert self._config.load is not None
        return Endpoint(
            self.record.url,
            api=self._options.api,
            model=self._model_name,
            key=self._key,
            fields=self._fields(),
            token_ids=self._options.preset in ("vllm", "sglang"),
            timeout_seconds=self._config.load.request_timeout_seconds,
        )

    def vocabulary(self) -> Sequence[int]:
        """Return the token ids that a synthetic prompt may hold.

        Raises:
            PreflightError: The size of the vocabulary is not known.
        """
        if self._options.vocab_size is not None:
            return _vocabulary_of_size(self._options.vocab_size)
        folder = None if self._source is None else self._source.folder
        if folder is not None and (ids := _vocabulary_of(folder)) is not None:
            return ids
        sizes = [size for one in self._models if isinstance(size := (one.get("meta") or {}).get("n_vocab"), int)]
        if sizes:
            return _vocabulary_of_size(sizes[0])
        model = self._config.model
        why = "the study names no model" if model is None else f"no tokenizer of model {model!r} on this machine"
        raise PreflightError(
            "synthetic prompts are random token ids, and the size of the server's vocabulary is not known "
            f"({why}): give server.vocab_size, or a dataset of texts"
        )

    @property
    def _model_name(self) -> str | None:
        if self._options.model_name is not None:
            return self._options.model_name
        return next((one["id"] for one in self._models if isinstance(one.get("id"), str)), None)

    @cached_property
    def _key(self) -> str | None:
        name = self._options.api_key_env
        if name is None:
            return None
        if not os.environ.get(name):
            raise PreflightError(f"server.api_key_env: the environment variable {name} is not set")
        return os.environ[name]

    @cached_property
    def _source(self) -> ModelSource | None:
        """Where the model was found; None if the study names none, or only the server can find it."""
        if self._config.model is None:
            return None
        try:
            return resolve_model(self._config.model, self._context.model_path, None, download=False)
        except ModelNotFoundError:
            return None

    def _fields(self) -> Mapping[str, Any]:
        """Return the fields of every request that control sampling and the end of the answer."""
        config, decoder = self._config, self._config.decoder
        fields: dict[str, Any] = {"temperature": 0.0} if decoder.greedy else {"temperature": decoder.temperature}
        if not decoder.greedy:
            fields["top_p"] = decoder.top_p
        if config.measurement.length_mode == "fixed":
            fields["ignore_eos"] = True
        if self._options.preset is None:
            return fields
        preset = PRESETS[self._options.preset]
        given = {name: getattr(decoder, name) for name in _DECODER_FIELDS}
        if decoder.greedy:
            del given["top_k"], given["min_p"]
        if config.measurement.length_mode == "fixed":
            given["min_new_tokens"] = None
        return fields | {
            preset.decoder.get(name, name): value for name, value in given.items() if value is not None
        }

    def _given_command(self) -> list[str] | None:
        """Return the command with its placeholders, since the port differs at each start; None if attached."""
        options = self._options
        return None if options.is_attached else [*(options.command or PRESETS[options.preset or ""].command)]

    def _ask(self, path: str) -> dict[str, Any] | None:
        """Return the JSON object that the server answers; None if it has none under *path*.

        Raises:
            EngineCrashError: The server does not answer.
            PreflightError: The server refuses the API key, or asks for one.
        """
        request = urllib.request.Request(self.record.url.rstrip("/") + path)
        if self._key is not None:
            request.add_header("Authorization", f"Bearer {self._key}")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
                found = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            if error.code not in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
                return None
            name = self._options.api_key_env
            problem = f"refuses the key in {name}" if name else "asks for an API key: name its variable"
            raise PreflightError(f"server.api_key_env: the server {problem} (HTTP {error.code})") from error
        except ValueError:
            return None
        except OSError as error:
            raise EngineCrashError(f"the server does not answer at {self.record.url}: {error}") from error
        return found if isinstance(found, dict) else None


def _vocabulary_of(folder: Path) -> list[int] | None:
    """Return the token ids of a model's folder without special tokens; None if its files do not say."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = config.get("text_config", config)["vocab_size"]
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        special = {one["id"] for one in tokenizer.get("added_tokens", ())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return [token for token in range(size) if token not in special]


def _vocabulary_of_size(size: int) -> range:
    """Return token ids of a vocabulary of which only the size is known."""
    left_out = int(size * _LEFT_OUT_SHARE)
    return range(left_out, size - left_out)
