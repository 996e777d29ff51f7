"""Find why an experiment of the engine ``vllm`` cannot run, without importing vLLM."""

from __future__ import annotations

from collections.abc import Iterator

from pytest_llem.engines.packages import Packages
from pytest_llem.study.config import ExperimentConfig

#: Arguments of vLLM's engine that only pytest-llem sets, and what to use instead.
ENGINE_FIELDS = {
    "model": "use model",
    "dtype": "use precision",
    "seed": "use random_seed",
    "disable_log_stats": "vLLM has to report the times of its requests",
    "worker_extension_cls": "pytest-llem measures memory with an extension of its own",
}

#: Arguments of vLLM's sampling that fields of the study set, and which.
SAMPLING_FIELDS = {
    "n": "every prompt must have one answer, or metrics per request would be wrong",
    "max_tokens": "use max_output_tokens",
    "min_tokens": "use decoder.min_new_tokens",
    "ignore_eos": "use measurement.length_mode",
    "seed": "use random_seed",
    "output_kind": "pytest-llem times every token",
    **{name: f"use decoder.{name}" for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")},
}


def unmet_requirements(config: ExperimentConfig, packages: Packages) -> list[str]:
    """Return why *config* cannot run: one sentence for each problem, with what to do.

    vLLM's own arguments are checked by vLLM, in the interpreter that has it.

    Args:
        config: An experiment of the engine ``vllm``.
        packages: The environment in which it will run.
    """
    return list(_unmet(config, packages))


def _unmet(config: ExperimentConfig, packages: Packages) -> Iterator[str]:
    if not packages.has("vllm"):
        yield f"engine 'vllm' needs vLLM: {packages.pip} install vllm"
    options = config.vllm
    if options is None:
        return
    if options.beam_search is not None:
        yield "vllm.beam_search is not supported: leave it out"
    for section, given, fields in (
        ("engine", options.engine, ENGINE_FIELDS),
        ("sampling", options.sampling, SAMPLING_FIELDS),
    ):
        for name in given or {}:
            if name in fields:
                yield f"vllm.{section}.{name} cannot be given: {fields[name]}"
