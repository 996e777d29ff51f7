"""Define the section ``server``: the server that is measured, as a command, a preset or a URL."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from pytest_llem.study.engine_options import EngineOptions, Needs
from pytest_llem.study.engines import VLLM_SIZES, product_of_sizes, vllm_memory_share
from pytest_llem.study.section import NullableSection, single_error

if TYPE_CHECKING:  # which imports this module
    from pytest_llem.study.config import ExperimentConfig

#: Name of the backend whose experiments put a load on a server.
SERVER = "server"

PresetName = Literal["vllm", "sglang", "llama.cpp"]

#: Fields of ``decoder`` that every OpenAI-compatible server takes, and those that the servers of presets take too.
_COMMON_FIELDS = {"temperature", "do_sample", "top_p"}
_PRESET_FIELDS = {*_COMMON_FIELDS, "top_k", "min_p", "repetition_penalty", "min_new_tokens"}

#: Options by which the servers of presets split or copy a model over GPUs, under all of their names.
_SGLANG_COPIES = ("dp", "dp_size", "data_parallel_size")
_SIZES: dict[str, Sequence[str]] = {
    "vllm": VLLM_SIZES,
    "sglang": (
        *("tp", "tp_size", "tensor_parallel_size", "pp", "pp_size", "pipeline_parallel_size"),
        *_SGLANG_COPIES,
    ),
}

Gpus = Annotated[
    Annotated[int, Field(ge=0)] | Annotated[list[str], Field(min_length=1)],
    single_error("must be a number of GPUs, 0 or more, or a list of their UUIDs"),
]


class ReadyConfig(NullableSection):
    """How to see that a server is ready."""

    path: str = Field("/health", pattern="^/")
    """Path that answers with status 200 once the server is ready. Default ``/health``."""
    timeout_seconds: float = Field(1800.0, gt=0)
    """Maximum time until the server is ready, in seconds. Default 1800."""


class StopConfig(NullableSection):
    """How to stop a server."""

    grace_seconds: float = Field(10.0, ge=0)
    """Time between SIGTERM and SIGKILL, in seconds. Default 10."""


class ServerConfig(EngineOptions):
    """The server that is measured. Exactly one of ``preset``, ``command`` and ``url`` starts or names it; a
    ``preset`` may be given with the others to say what kind of server it is.
    """

    NULL_MEANS: ClassVar[frozenset[str]] = frozenset({"metrics"})

    name: str | None = Field(None, min_length=1)
    """Name of the server in ids and tables, if a study has several: it stands for the other fields. Default null:
    ids have the fields in which servers differ.
    """
    preset: PresetName | None = None
    """Kind of server: ``vllm``, ``sglang`` or ``llama.cpp``. Gives the command, unless ``command`` or ``url`` is
    given, and the server's names of fields in requests. Default null: any server with OpenAI's API.
    """
    args: dict[str, Any] | None = None
    """With a preset's command: options of the server, ``max_num_seqs: 256`` for ``--max-num-seqs 256``; null
    leaves one out. With ``command``: values of placeholders in it, ``{name}`` for each. Default null: none.
    """
    command: Annotated[list[str], Field(min_length=1)] | None = None
    """Program and arguments, without a shell. ``{port}``, ``{python}``, ``{model}``, ``{precision}`` and the names
    in ``args`` are replaced by their values. Default null: the preset's.
    """
    url: str | None = Field(None, pattern=r"^https?://\S+$")
    """A server that already runs on this host, such as ``http://127.0.0.1:8000``. Default null: it is started."""
    gpus: Gpus | None = None
    """Number of GPUs of the server, or with ``url`` their UUIDs, or 0. Default null: the parallel sizes in
    ``args``, or one if this machine has any; with ``url``, the GPUs that its processes use.
    """
    ready: ReadyConfig = Field(default_factory=ReadyConfig)
    """How to see that the server is ready. Default: by status 200 of ``/health``."""
    api: Literal["completions", "chat"] = "completions"
    """``completions`` sends token ids, and texts as they are; ``chat`` sends texts as messages. Default
    ``completions``.
    """
    model_name: str | None = Field(None, min_length=1)
    """Name of the model in requests. Default null: the first that the server lists."""
    metrics: str | None = Field("/metrics", pattern="^/")
    """Path of the server's counters in Prometheus' format; null if it has none. Default ``/metrics``."""
    stop: StopConfig = Field(default_factory=StopConfig)
    """How to stop the server. Default: SIGTERM, and SIGKILL after 10 s."""
    env: dict[str, str] | None = None
    """Environment variables of the server, in addition to those of pytest. Default null: none."""
    api_key_env: str | None = Field(None, min_length=1)
    """Name of the environment variable with the API key. Default null: none is sent."""
    vocab_size: int | None = Field(None, ge=256)
    """Number of token ids from which synthetic prompts are drawn. Default null: from the model's files, or from
    the server.
    """

    @model_validator(mode="after")
    def _goes_together(self) -> ServerConfig:
        if self.command is not None and self.url is not None:
            raise ValueError("command and url exclude each other: a server is started, or runs already")
        if self.command is None and self.url is None and self.preset is None:
            raise ValueError("needs a preset, a command or a url")
        if self.url is not None:
            for name, default in (("args", None), ("env", None), ("stop", StopConfig())):
                if getattr(self, name) != default:
                    raise ValueError(f"{name} needs a server that is started, and with url it runs already")
        if isinstance(self.gpus, int) and self.gpus > 0 and self.url is not None:
            raise ValueError("gpus as a number need a server that is started: with url, list their UUIDs")
        if isinstance(self.gpus, list) and self.url is None:
            raise ValueError("gpus as UUIDs need a url: the GPUs of a server that is started are leased")
        return self

    @property
    def is_attached(self) -> bool:
        """Whether the server runs already, and is not started for the experiment."""
        return self.url is not None

    @property
    def underscored_args(self) -> dict[str, Any]:
        """``args`` that have a value, with underscores in their names, where a study may have dashes."""
        return {name.replace("-", "_"): value for name, value in (self.args or {}).items() if value is not None}

    def needs(self, config: ExperimentConfig, parameters: int | None) -> Needs:
        from pytest_llem.study.server_command import fields_in_command

        used = fields_in_command(config)
        if problems := "; ".join(self._problems(config, used)):
            raise ValueError(problems)
        assert config.load is not None
        return Needs(
            gpus=self._gpus(),
            sequences=config.load.concurrency if isinstance(config.load.concurrency, int) else None,
            compiles=self.preset in ("vllm", "sglang"),
            memory_share=self._memory_share(),
            unused=self._unused(config, used),
        )

    def _problems(self, config: ExperimentConfig, used: Container[str]) -> Iterator[str]:
        """Yield why an experiment cannot run, if its command takes the fields *used*."""
        if self.api == "chat" and not config.has_texts:
            yield "api 'chat' sends texts, and synthetic prompts are token ids: use a dataset of texts"
        if "model" in used and config.model is None:
            yield "the command takes {model}: give model in the study"
        if config.prompt_format == "chat":
            yield "prompt_format 'chat': a server applies its own chat template: use server.api: chat"

    def _unused(self, config: ExperimentConfig, used: Container[str]) -> dict[str, str]:
        """Return the fields that do not reach the server, if its command takes the fields *used*, and why."""
        if self.is_attached:
            unused = {"precision": "does not reach a server that already runs"}
        else:
            unused = {
                name: f"does not reach the server: its command has no {{{name}}}: leave {name} out, or add that"
                for name in ("model", "precision")
                if name not in used
            }
        taken = _COMMON_FIELDS if self.preset is None else _PRESET_FIELDS
        for name in {*type(config.decoder).model_fields} - taken - {"preset"}:
            unused[f"decoder.{name}"] = "not every server takes it: give server.preset if yours does"
        for name in {*type(config.warmup).model_fields} - {"enabled", "n_warmup"}:
            unused[f"warmup.{name}"] = "the ramp-up goes on until the load is steady: give load.ramp_seconds"
        if config.has_texts:
            unused["server.vocab_size"] = "has no effect: only synthetic prompts are drawn from a vocabulary"
            unused["max_input_tokens"] = "a server gets texts whole"
            unused["dataset_order"] = "a server gets the texts in their order"
        unused["prompt_format"] = "a server applies its own chat template: use server.api"
        return unused

    def _gpus(self) -> int | None:
        if isinstance(self.gpus, int):
            return self.gpus
        if isinstance(self.gpus, list):
            return len(self.gpus)
        args = self.underscored_args
        sizes = _SIZES.get(self.preset or "", ())
        if self.preset == "sglang" and args.get("enable_dp_attention"):  # the copies share the tp_size GPUs
            sizes = [name for name in sizes if name not in _SGLANG_COPIES]
        return product_of_sizes(args, sizes)

    def _memory_share(self) -> float | None:
        """Return the share of a GPU's memory that the server reserves; None if it takes what it needs."""
        args = self.underscored_args
        if self.preset == "vllm":
            return vllm_memory_share(args)
        given = args.get("mem_fraction_static", 0.88) if self.preset == "sglang" else None
        return float(given) if isinstance(given, int | float) else None


def is_attached(config: ExperimentConfig) -> bool:
    """Return whether an experiment is on a server that runs already."""
    return config.server is not None and config.server.is_attached
