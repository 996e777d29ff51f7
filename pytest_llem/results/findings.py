"""What the results of a study's experiments show together: warnings, energies and times."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from pytest_llem.results.drift import server_drift
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.facts import TESTBED
from pytest_llem.results.metrics import Method
from pytest_llem.results.points import PointResult
from pytest_llem.results.quality_warnings import QualityWarning, Severity, StudyWarning
from pytest_llem.study.dataset import SYNTHETIC


class Findings:
    """Collects what results show about the whole study, so that the results themselves can be dropped.

    Attributes:
        environment: Environment of the first result.
        count: Number of results.
        known: Energies of the windows that have one, in J.
        boundaries: Boundaries of ``energy_j`` of all results.
        methods: Methods of ``energy_j`` of all results.
        warnings: Ids of experiments by the code, severity and text of the warning that concerns them.
        spans: Start, end and point of each result, and whether other experiments ran on the machine meanwhile, by
            the id of its host, which is None if unknown.
    """

    def __init__(self) -> None:
        self.environment: dict[str, Any] = {}
        self.count = 0
        self.known: list[float] = []
        self.boundaries: set[str | None] = set()
        self.methods: set[Method | None] = set()
        self.warnings: dict[tuple[str, Severity, str], list[str]] = {}
        self.spans: dict[str | None, list[tuple[str, str, PointResult, bool]]] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        #: Of each engine and module: ids of experiments by digest of the module.
        self._code: dict[tuple[str, str], dict[str | None, list[str]]] = {}
        #: Of each dataset (with the settings that select its prompts) and model: ids of experiments by digest.
        self._inputs: dict[tuple[str, str], dict[str, list[str]]] = {}

    def shared(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return *facts* as one object for all points with equal facts, since most points have the same."""
        return self._facts.setdefault(json.dumps(facts), facts)

    def add(self, result: ExperimentResult, point: PointResult) -> None:
        """Add a *result* of *point*."""
        self.count += 1
        span = result.started_at, result.completed_at, point, bool(result.concurrent)
        self.spans.setdefault(result.environment.get("host_id"), []).append(span)
        self.environment = self.environment or result.environment
        self.boundaries.add(result.metrics["energy_j"].boundary)
        self.methods.add(result.metrics["energy_j"].method)
        if result.window.window_energy_j is not None:
            self.known.append(result.window.window_energy_j)
        for module, digest in (result.inputs.modules if result.inputs else {}).items():
            states = self._code.setdefault((result.effective_config["backend"], module), {})
            states.setdefault(digest, []).append(result.identity.experiment_id)
        for key, state in _input_states(result):
            self._inputs.setdefault(key, {}).setdefault(state, []).append(result.identity.experiment_id)
        for warning in [*result.warnings, *_gap_warnings(result)]:
            self._warn(warning, [result.identity.experiment_id])

    def _warn(self, warning: QualityWarning, ids: Iterable[str]) -> None:
        self.warnings.setdefault((warning.code, warning.severity, warning.text), []).extend(ids)

    def warn_of_differing(self, results: Sequence[ExperimentResult], point: PointResult) -> None:
        """Warn if the *results* of the cycles of *point* differ in testbed facts that must match."""
        names = [
            fact.name
            for key, fact in TESTBED.items()
            if fact.concerns != "nothing" and isinstance(point.testbed.get(key), list)
        ]
        if names:
            text = f"cycles of a point differ in {', '.join(names)}"
            self._warn(QualityWarning.of("cycles_differ", text), [one.identity.experiment_id for one in results])

    def warn_of_drift(self, points: Sequence[PointResult]) -> None:
        """Warn if servers have changed between the first and the last load on them."""
        drift = server_drift(points)
        if drift is not None and drift.is_large:
            self._warn(QualityWarning.of("server_drift", drift.text), [])

    def warn_of_edits(self) -> None:
        """Warn about modules, datasets and models that were not the same in all experiments.

        The warning names the experiments that had a less frequent state, or in which a module was edited.
        """
        for (name, _), seen in self._inputs.items():
            if others := sorted(seen.values(), key=len)[:-1]:
                text = f"{name} was not the same in all experiments: was it edited while the study ran?"
                self._warn(QualityWarning.of("inputs_differ", text), chain.from_iterable(others))
        edited: dict[tuple[str, ...], list[str]] = {}
        for (_, module), states in self._code.items():
            *rarer, usual = sorted(states.items(), key=lambda state: (state[0] is not None, len(state[1])))
            if usual[0] is None:  # edited during every experiment
                rarer.append(usual)
            if rarer:
                edited.setdefault(tuple(chain.from_iterable(ids for _, ids in rarer)), []).append(module)
        for ids, modules in edited.items():
            more = f" and {len(modules) - 1} more" if len(modules) > 1 else ""
            text = f"code was edited while the study ran: {modules[0]}{more}"
            self._warn(QualityWarning.of("code_edited", text), ids)

    def study_warnings(self) -> list[StudyWarning]:
        """Return each warning once, the worst first, with its experiments unless it concerns all."""
        found = [
            StudyWarning(
                code=code,
                severity=severity,
                text=text,
                experiments=[] if len(ids) == self.count else ids,
            )
            for (code, severity, text), ids in self.warnings.items()
        ]
        return sorted(found, key=lambda one: one.rank)


def _input_states(result: ExperimentResult) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield name, selection of prompts, and digest of the dataset of texts, and of the local model folder."""
    config = result.effective_config
    dataset, digest = config.get("dataset"), result.tokens.dataset_hash
    if isinstance(dataset, str) and dataset != SYNTHETIC and digest is not None:
        selection = json.dumps([config.get(name) for name in ("n", "dataset_order", "random_seed")])
        yield (f"dataset {dataset!r}", selection), digest
    if result.inputs is not None and result.inputs.model_folder is not None:
        yield (f"model {config.get('model')!r}", ""), result.inputs.model_folder


def _gap_warnings(result: ExperimentResult) -> Iterator[QualityWarning]:
    gap = result.gap
    if gap is None:
        return
    if gap.reason == "timeout":
        text = f"the gap ended after {gap.seconds:.0f} s with a GPU warmer or busier than "
        yield QualityWarning.of("gap_timeout", text + "before the first experiment")
    if gap.memory_left_mb:
        gpus = result.contention.gpus if result.contention is not None else []
        held = [one.device for one in gpus if one.others_memory_mb and one.device in gap.memory_left_mb]
        if held:
            yield QualityWarning.of(
                "memory_of_others",
                f"other processes hold memory of {', '.join(held)}: contention.gpus of the result says how much",
            )
        if left := [uuid for uuid in gap.memory_left_mb if uuid not in held]:
            yield QualityWarning.of(
                "memory_not_released",
                f"{', '.join(left)} had not released the memory of the previous experiment, or another process "
                "holds it: gap.memory_left_mb of the result says how much",
            )
