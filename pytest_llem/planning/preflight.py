"""Find reasons why an experiment cannot run, before it is started."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from pytest_llem.engines.models import too_long_message
from pytest_llem.engines.options import LORA, given_fields, option_problems
from pytest_llem.engines.shipped import SHIPPED, shipped_needs
from pytest_llem.isolation.engine_probe import EngineAnswer
from pytest_llem.machine.attached_server import gpus_of_server
from pytest_llem.machine.device_locks import CPU
from pytest_llem.machine.device_request import DeviceRequest, request_all, request_devices
from pytest_llem.planning.deadline import deadline_seconds, max_load_seconds
from pytest_llem.planning.estimate import RUNTIME_BYTES, gib, memory_bytes, weight_bytes
from pytest_llem.planning.host import Host, host_for, this_host
from pytest_llem.planning.model_files import Footprint, context_length_of, footprint_of, is_on_hub, model_problem
from pytest_llem.planning.study_engines import StudyEngines, question_about
from pytest_llem.serving.schedule import trace_problem
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Point, StudyConfig
from pytest_llem.study.document import Document, KeyPath, load_document
from pytest_llem.study.engine_options import Needs
from pytest_llem.study.problems import StudyError, printable
from pytest_llem.study.server import SERVER
from pytest_llem.workload.prompts import dataset_problem, hub_dataset

#: Lowest CUDA compute capability of GPUs that support bfloat16.
_MIN_BF16 = (8, 0)


class Preflight:
    """Check the points of one study without importing torch or opening a device. Each point is checked once.

    Args:
        study: The study.
        model_path: Folders that hold models by name.
        import_path: Folders searched for user-defined engines, in addition to the interpreter's own path.
        host: Machine on which the experiments run; None for this machine.

    Attributes:
        engines: The engines of the study.
        host: Machine on which the experiments run.
    """

    def __init__(
        self,
        study: StudyConfig,
        model_path: tuple[Path, ...],
        import_path: Sequence[Path],
        host: Host | None = None,
    ) -> None:
        self._study = study
        self._model_path = model_path
        self.engines = StudyEngines(study, model_path, import_path)
        self._given_host = host
        self.host = host or this_host()
        self._reasons: dict[str, str | None] = {}
        self._requests: dict[tuple[Path | None, int | None, bool], DeviceRequest] = {}

    def refusal(self, point: Point) -> str | None:
        """Return why *point* cannot run, and what to do, in one line; None if no reason is known."""
        if point.config_hash not in self._reasons:
            self._reasons[point.config_hash] = printable("; ".join(self._reasons_of(point.config))) or None
        return self._reasons[point.config_hash]

    def footprint(self, config: ExperimentConfig) -> Footprint | None:
        """Return the size of an experiment's model; None if unknown."""
        return footprint_of(config, self._model_path)

    def needs(self, config: ExperimentConfig) -> Needs:
        """Return what an experiment's engine needs; ``Needs()`` if that cannot be determined."""
        footprint = self.footprint(config)
        try:
            stated = shipped_needs(config, footprint.parameters if footprint else None)
        except ValueError:  # the options are invalid, which refusal() reports
            return Needs()
        if stated is not None:
            return stated
        answer = self._answer(config)
        return Needs() if answer is None else answer.needs(question_about(config, self._model_path))

    def _answer(self, config: ExperimentConfig) -> EngineAnswer | None:
        return self.engines.answer(config)

    def deadline_seconds(self, config: ExperimentConfig) -> float:
        """Return the maximum duration of an experiment's process, in s, without downloads."""
        execution, needs = self._study.execution, self.needs(config)
        return deadline_seconds(config, execution, needs, self.footprint(config), self.host_of(config))

    def max_load_seconds(self, config: ExperimentConfig) -> float | None:
        """Return the maximum time for loading the model, in s; None if only the deadline limits it."""
        return max_load_seconds(config, self._study.execution, self.needs(config), self.footprint(config))

    def request(self, config: ExperimentConfig) -> DeviceRequest:
        """Return the devices that an experiment may use. Experiments with equal needs share one query of NVML."""
        if config.server is not None and config.server.is_attached:
            return request_all(*gpus_of_server(config.server) or (CPU,))
        needs, python = self.needs(config), self._study.interpreter(config.backend)
        key = python, needs.gpus, needs.uses_torch
        if key not in self._requests:
            self._requests[key] = request_devices(needs, python)
        return self._requests[key]

    def _reasons_of(self, config: ExperimentConfig) -> Iterator[str]:
        if (unusable := self.engines.unusable_reason(config.backend)) is not None:
            yield unusable
            return
        if self._study.execution.skip_preflight:
            return
        packages = self.engines.packages(config.backend)
        if problem := dataset_problem(config, self._study.path.parent, packages):
            yield problem
        if config.lora is not None:
            yield LORA
        if (shipped := SHIPPED.get(config.backend)) is not None:
            unmet = list(shipped.unmet_requirements(config, packages))
            yield from unmet
        if shipped is None or (shipped.checks_options and not unmet):
            yield from self._engine_problems(config)
        if config.backend == SERVER:
            problems = option_problems(shipped, config, given_fields(config))
            yield from (f"{self._place(one.path)}: {one.message}" for one in problems)
            if config.load is not None and (problem := trace_problem(config.load, self._study.path.parent)):
                yield problem
        needs = self.needs(config)
        has_prefill_only = needs.supports is None or "prefill_only" in needs.supports
        if config.measurement.prefill_split and not has_prefill_only:
            reason = f"engine {config.backend!r} cannot stop after the first token (it has no generate_first)"
            yield f"{reason}: leave measurement.prefill_split out"
        if needs.gpus and (problem := self.request(config).problem):
            yield f"engine {config.backend!r} {problem}"
        if not needs.resolves_model:
            return
        if config.model is None:
            yield f"engine {config.backend!r} needs a model: give model in the study"
            return
        if missing := model_problem(config.model, needs.model_revision, self._model_path):
            yield missing
            return
        yield from self._context_problems(config, needs)
        yield from self._hardware_problems(config, needs)

    def _engine_problems(self, config: ExperimentConfig) -> Iterator[str]:
        """Yield why an engine cannot be used, or each invalid option of it with its place."""
        answer = self._answer(config)
        if answer is None:
            return
        if answer.problem is not None:
            yield self.engines.unusable_message(config.backend, answer.problem)
        else:
            for key_path, message in answer.problems(question_about(config, self._model_path)):
                yield f"{self._place(key_path)}: {message}"

    def _place(self, key_path: KeyPath) -> str:
        """Return where a key is written, as ``file:line:column: key``; only the key if that is unknown."""
        name = ".".join(map(str, key_path))
        if self._document is None:
            return name
        marks = self._document.marks
        axis, section = ".".join(map(str, key_path[:2])), str(key_path[0])
        prefixes = [(), ("sweep",), *(("experiments", at) for at in range(len(self._study.points)))]
        written: list[KeyPath] = [("sweep", axis), *((*one, *key_path) for one in prefixes)]
        # The key itself may not be written: the place is then an axis of its section, or the section.
        written += [one for one in marks if one[:1] == ("sweep",) and str(one[-1]).startswith(f"{section}.")]
        found = next((marks[one] for one in (*written, (section,), ("backend",)) if one in marks), None)
        return name if found is None else f"{self._study.path.name}:{found[0]}:{found[1]}: {name}"

    @cached_property
    def _document(self) -> Document | None:
        try:
            document = load_document(self._study.path)
        except StudyError:  # a configuration without a file
            return None
        return document if isinstance(document.data, dict) else None

    def host_of(self, config: ExperimentConfig) -> Host:
        """Return the machine as an experiment sees it: without GPUs if its torch is a CPU build."""
        interpreter = None if self._given_host else self.engines.interpreter(config.backend)
        return self.host if interpreter is None else host_for(interpreter.packages.get("torch"))

    def _context_problems(self, config: ExperimentConfig, needs: Needs) -> Iterator[str]:
        """Yield an error if even the shortest prompt exceeds the context. The engine checks each prompt later."""
        workload = config.workload
        shortest = 1 if config.has_texts else workload.lengths.min if workload.lengths else workload.input_len
        limit = context_length_of(config.model_name, needs.model_revision, self._model_path)
        if limit is not None and shortest is not None and shortest + workload.output_len > limit:
            yield too_long_message(config.model_name, shortest, workload.output_len, limit)

    def _hardware_problems(self, config: ExperimentConfig, needs: Needs) -> Iterator[str]:
        """Yield an error if the GPUs do not support the precision, or if the model does not fit into memory."""
        host = self.host_of(config)
        gpus = host.gpus_of_experiment(needs.gpus)
        if config.precision == "bf16" and gpus and all(gpu.capability < _MIN_BF16 for gpu in gpus):
            yield f"{gpus[0].name} does not support bf16: use precision: fp16 or fp32"
        footprint = self.footprint(config)
        if footprint is None or needs.gpus is None or (host.gpus and len(gpus) != needs.gpus):
            return  # the number of GPUs is unknown, or there are too few, which is another error
        weights, memory = weight_bytes(config, needs, footprint), host.device_memory_bytes(needs.gpus)
        if host.memory_is_limited and not gpus:
            # The kernel kills a process that exceeds the limit, so the whole estimate counts here. Elsewhere only
            # weights and runtime count, because the rest of the estimate is rough.
            if (needed := memory_bytes(config, needs, footprint)) > memory:
                yield (
                    f"model {config.model!r} needs about {gib(needed)} in {config.precision} with its batches, "
                    f"and the memory limit here is {gib(memory)}: raise the limit of the container or of its "
                    "control group"
                )
        elif weights + RUNTIME_BYTES > memory:
            where, has = gpus[0].name if gpus else "this machine", "has"
            if len(gpus) > 1:
                where, has = f"{len(gpus)} × {where}", "have"
            need = f"model {config.model!r} needs {gib(weights)} in {config.precision}"
            yield f"{need} and {where} {has} {gib(memory)} of memory"

    def needs_hub(self, config: ExperimentConfig) -> bool:
        """Return whether an experiment's model or dataset is from the Hugging Face hub, cached or not."""
        if config.has_texts and hub_dataset(str(config.dataset), self._study.path.parent) is not None:
            return True
        needs = self.needs(config)
        return needs.resolves_model and is_on_hub(config.model, needs.model_revision, self._model_path)

    def memory_bytes(self, config: ExperimentConfig) -> float | None:
        """Return the estimated memory of an experiment, in bytes; None if the model's size is unknown."""
        footprint = self.footprint(config)
        return None if footprint is None else memory_bytes(config, self.needs(config), footprint)


class UnknownHostPreflight(Preflight):
    """Preflight of experiments that run on other hosts: refuses no point, and knows no model sizes or engines."""

    def refusal(self, point: Point) -> str | None:
        return None

    def footprint(self, config: ExperimentConfig) -> Footprint | None:
        return None

    def _answer(self, config: ExperimentConfig) -> EngineAnswer | None:
        return None
