"""Summary of the manifest and the experiments' results as the StudyResult.

Results are read one point at a time and dropped once they are summarised: a study may have 20,000 of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pytest_llem.catalogue import CATALOGUE
from pytest_llem.results.carbon import emission_factors
from pytest_llem.results.contention import PointContention
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.facts import CONCURRENT, TESTBED, overlapping, sut_facts, testbed_facts
from pytest_llem.results.manifest import read_manifest, stored_result
from pytest_llem.results.metrics import Method, Metric, weakest
from pytest_llem.results.models import (
    CycleTurns,
    ErrorRecord,
    Manifest,
    ManifestEntry,
    PointResult,
    StudyResult,
    StudySummary,
)
from pytest_llem.results.quality_warnings import QualityWarning, Severity, StudyWarning
from pytest_llem.results.statistics import Summary, mean_interval
from pytest_llem.results.token_agreement import GreedyOutputs
from pytest_llem.study.dataset import SYNTHETIC
from pytest_llem.study.design import StudyConfig
from pytest_llem.times import seconds_between

#: File written at the start of a study: a StudyResult without results.
DESIGN = "study_design.json"

#: Error type of an experiment whose saved result is missing or changed.
RESULT_LOST = "ResultLost"


_NO_CYCLE = "no completed cycle"
_UNKNOWN_METRIC = "the version that measured it did not know this metric"

#: The statistics of a point without a result, one object for all such points: there may be 10,000.
_NO_METRICS = {
    name: Summary(mean=None, n=0, unit=definition.unit, reason=_NO_CYCLE) for name, definition in CATALOGUE.items()
}


def study_design(study: StudyConfig, manifest: Manifest) -> StudyResult:
    """Return the StudyResult of *study* before any experiment has run, without results."""
    return StudyResult(
        pytest_llem_version=manifest.pytest_llem_version,
        name=study.name,
        study_design_hash=study.design_hash,
        status="running",
        started_at=manifest.started_at,
        summary=StudySummary(total=manifest.total_experiments, completed=0, failed=0, wall_seconds=0.0),
        points=[
            PointResult(
                id=point.id,
                axes=point.axes,
                config=point.config.model_dump(mode="json"),
                config_hash=point.config_hash,
                metrics={},
            )
            for point in study.points
        ],
        experiments=[],
        excluded=[{"axes": left_out.axes, "reason": left_out.reason} for left_out in study.excluded],
        measurement_protocol=_protocol(study),
        environment=manifest.environment,
    )


def build_study_result(design: StudyResult, manifest: Manifest, directory: Path) -> StudyResult:
    """Return *design* with its results.

    Args:
        design: The study without results, which is changed in place.
        manifest: The state of its experiments. One whose result file is missing or changed becomes failed.
        directory: The study's results directory.
    """
    return complete(design, manifest, add_results(design, manifest, directory))


def add_results(design: StudyResult, manifest: Manifest, directory: Path) -> Findings:
    """Set the results of each point of *design*, and return the findings that concern the whole study.

    Args:
        design: The study without results, which is changed in place.
        manifest: The state of its experiments. One whose result file is missing or changed becomes failed.
        directory: The study's results directory.
    """
    by_point: dict[str, list[ManifestEntry]] = {}
    for entry in manifest.experiments:
        if entry.status == "completed":
            by_point.setdefault(entry.config_hash, []).append(entry)
    found, outputs = Findings(), GreedyOutputs(directory)
    for point in design.points:
        entries = sorted(by_point.get(point.config_hash, ()), key=lambda entry: entry.cycle)
        by_cycle = [(entry.cycle, _result(directory, entry)) for entry in entries]
        point.cycles = [cycle for cycle, result in by_cycle if result is not None]
        results = [result for _, result in by_cycle if result is not None]
        # After reading, which removes the digest of an entry whose result is missing.
        point.result_digests = [entry.result_sha256 for entry in entries if entry.result_sha256 is not None]
        mismatches = dict.fromkeys(entry.replay_mismatch for entry in entries if entry.replay_mismatch)
        point.replay_mismatch = "; ".join(mismatches) or None
        if results:  # fields that do not reach the engine are null
            point.config = results[0].effective_config
        point.metrics = summarise(results)
        point.testbed = found.shared(testbed_facts(results))
        point.sut = found.shared(sut_facts(results))
        point.contention = _contention(results)
        point.turns = [*_turns(results)]
        for result in results:
            found.add(result, point)
        file = next((entry.result_file for entry in entries if entry.result_file is not None), None)
        if results and file is not None:  # an entry whose result is missing has no file any more
            outputs.add(results[0], point.id, file)
        found.warn_of_differing(results, point)
    design.token_agreement = list(outputs.agreements())
    found.warn_of_edits()
    _set_concurrent(found, manifest.experiments)
    return found


def complete(design: StudyResult, manifest: Manifest, found: Findings) -> StudyResult:
    """Return *design*, which has its points' results, with status, summary and warnings of the whole study."""
    manifest.recount()
    design.status = manifest.status
    design.summary = _summary(manifest, found)
    design.experiments = manifest.experiments
    # The first experiment's facts take precedence over those of this process, to which hooks may have added.
    design.environment = manifest.environment | found.environment
    design.result_files = [entry.result_file for entry in manifest.experiments if entry.result_file]
    design.warnings = found.study_warnings()
    return design


def load_unfinished(directory: Path) -> StudyResult:
    """Return the result so far of a run that is in progress or was killed.

    Raises:
        ValueError: *directory* holds no results of a study.
        OSError: The results cannot be read.
    """
    manifest = read_manifest(directory)
    try:
        design = StudyResult.read(directory / DESIGN)
    except FileNotFoundError:
        raise ValueError(f"{directory}: holds neither study_result.json nor {DESIGN}") from None
    return build_study_result(design, manifest, directory)


def _result(directory: Path, entry: ManifestEntry) -> ExperimentResult | None:
    text = stored_result(directory, entry)
    try:
        if text is not None:
            return ExperimentResult.model_validate_json(text)
    except ValueError:  # pydantic's ValidationError is one
        pass
    message = f"{entry.result_file} is gone, or no longer what was written"
    entry.status = "failed"
    entry.error = ErrorRecord(kind="exception", type=RESULT_LOST, message=message)
    entry.result_file = entry.result_sha256 = None
    return None


class Findings:
    """What is kept of the results for the whole study.

    Attributes:
        environment: Environment of the first result.
        count: Number of results.
        known: Energies of the windows that have one, in J.
        boundaries: Boundaries of these energies.
        methods: Methods of these energies.
        warnings: Ids of experiments by the code, severity and text of the warning that concerns them.
        spans: Start, end and point of each result.
    """

    def __init__(self) -> None:
        self.environment: dict[str, Any] = {}
        self.count = 0
        self.known: list[float] = []
        self.boundaries: set[str | None] = set()
        self.methods: set[Method | None] = set()
        self.warnings: dict[tuple[str, Severity, str], list[str]] = {}
        self.spans: list[tuple[str, str, PointResult]] = []
        self._facts: dict[str, dict[str, Any]] = {}
        #: Ids of experiments by digest of the code, by engine and module.
        self._code: dict[tuple[str, str], dict[str | None, list[str]]] = {}
        #: Ids of experiments by digest of the dataset or model, by its name and use.
        self._inputs: dict[tuple[str, str], dict[str, list[str]]] = {}

    def shared(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Return *facts* as one object for all points with equal facts, since most points have the same."""
        return self._facts.setdefault(json.dumps(facts), facts)

    def add(self, result: ExperimentResult, point: PointResult) -> None:
        """Add a *result* of *point*."""
        self.count += 1
        self.spans.append((result.started_at, result.completed_at, point))
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

    def warn_of_edits(self) -> None:
        """Warn about modules, datasets and models that were not the same in all experiments.

        The warning names the experiments that had the less frequent state.
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
    """Yield name, use and digest of the dataset of texts, and of the local model folder, of *result*."""
    config = result.effective_config
    dataset, digest = config.get("dataset"), result.tokens.dataset_hash
    if isinstance(dataset, str) and dataset != SYNTHETIC and digest is not None:
        used = json.dumps([config.get(name) for name in ("n", "dataset_order", "random_seed")])
        yield (f"dataset {dataset!r}", used), digest
    if result.inputs is not None and result.inputs.model_folder is not None:
        yield (f"model {config.get('model')!r}", ""), result.inputs.model_folder


def summarise(cycles: Sequence[ExperimentResult]) -> dict[str, Summary]:
    """Return the statistics of every metric over a point's *cycles*."""
    if not cycles:
        return _NO_METRICS
    return {name: _summarise([cycle.metrics.get(name) for cycle in cycles], name) for name in CATALOGUE}


def _summarise(cycles: Sequence[Metric | None], name: str) -> Summary:
    unit = CATALOGUE[name].unit
    figures = [figure for figure in cycles if figure is not None]
    values = [figure.value for figure in figures if figure.value is not None]
    not_judged = next((figure.not_judged for figure in figures if figure.not_judged is not None), None)
    if not values:
        reasons = [figure.reason for figure in figures if figure.reason]
        reason = reasons[0] if reasons else _UNKNOWN_METRIC
        return Summary(mean=None, n=0, unit=unit, reason=reason, not_judged=not_judged)
    known = [figure for figure in figures if figure.value is not None]
    boundaries = {figure.boundary for figure in known}
    covered = {figure.covers_engine for figure in known}
    methods = {figure.method for figure in known}
    if len(methods) > 1 and "estimated" in methods:
        not_judged = "energy was estimated in some of its cycles and not in others"
    factors = dict.fromkeys(filter(None, map(emission_factors, known))) if name == "gco2e_g" else {}
    if len(factors) > 1:  # possible with replayed cycles; their mean has no carbon intensity
        not_judged = f"its cycles differ in carbon intensity or PUE: {'; '.join(factors)}"
    mean, sd, interval = mean_interval(values)
    return Summary(
        mean=mean,
        sd=sd,
        cv=sd / abs(mean) if sd is not None and mean else None,
        ci95=interval,
        n=len(values),
        unit=unit,
        method=weakest(methods),
        boundary=boundaries.pop() if len(boundaries) == 1 else None,
        not_judged=not_judged,
        covers_engine=False if False in covered else None if None in covered else True,
        invalid=next((figure.invalid for figure in known if figure.invalid), None),
        values=[None if figure is None else figure.value for figure in cycles],
    )


def _contention(cycles: Sequence[ExperimentResult]) -> PointContention | None:
    """Return which of a point's *cycles* are contended; None if no cycle records contention."""
    if all(one.contention is None for one in cycles):
        return None
    states = {one.identity.cycle: one.contention.state if one.contention else "unknown" for one in cycles}
    reasons = (one.contention.reasons for one in cycles if one.contention and one.contention.state == "contended")
    return PointContention(
        contended=[cycle for cycle, state in states.items() if state == "contended"],
        unknown=[cycle for cycle, state in states.items() if state == "unknown"],
        reasons=list(dict.fromkeys(chain.from_iterable(reasons))),
    )


def _turns(cycles: Sequence[ExperimentResult]) -> Iterator[CycleTurns]:
    """Yield the turns of each of a point's *cycles* that was measured alternately."""
    for result in cycles:
        if (found := result.interleaving) is not None:
            shared = set.intersection(*(set(turn.metrics) for turn in found.turns))
            metrics = {name: [turn.metrics[name] for turn in found.turns] for name in sorted(shared)}
            yield CycleTurns(cycle=result.identity.cycle, pair=found.pair, metrics=metrics)


def _set_concurrent(found: Findings, entries: Iterable[ManifestEntry]) -> None:
    """Set the fact :data:`CONCURRENT` of each point that has a result."""
    failed = [
        (entry.started_at, entry.completed_at)
        for entry in entries
        if entry.status == "failed" and entry.started_at and entry.completed_at
    ]
    overlaps = overlapping([*((began, ended) for began, ended, _ in found.spans), *failed])
    concurrent: dict[str, bool] = {}
    for (_, _, point), overlap in zip(found.spans, overlaps, strict=False):
        concurrent[point.id] = overlap or concurrent.get(point.id, False)
    for _, _, point in found.spans:
        point.testbed = {**point.testbed, CONCURRENT: concurrent[point.id]}


def _summary(manifest: Manifest, found: Findings) -> StudySummary:
    alike = len(found.boundaries) == 1 and len(found.known) == found.count
    ended = [entry.completed_at for entry in manifest.experiments if entry.completed_at]
    return StudySummary(
        total=sum(entry.status != "deselected" for entry in manifest.experiments),
        completed=manifest.completed,
        failed=manifest.failed,
        replayed=sum(
            entry.status == "completed" and entry.replayed_from is not None for entry in manifest.experiments
        ),
        wall_seconds=seconds_between(manifest.started_at, max(ended)) if ended else 0.0,
        energy_j=sum(found.known) if alike else None,
        method=weakest(found.methods) if alike else None,
    )


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


_ISOLATION = {
    "spawn": "a fresh spawned process for every experiment",
    "forkserver": "a process for every experiment, forked from one that has imported and opened no device",
}


def _protocol(study: StudyConfig) -> dict[str, Any]:
    execution = study.execution
    return {
        "isolation": _ISOLATION[execution.start_method],
        "start_method": execution.start_method,
        "n_cycles": execution.n_cycles,
        **(
            {"min_cycles": execution.min_cycles, "max_cycles": execution.max_cycles}
            if execution.until_decided
            else {}
        ),
        "cycle_order": execution.cycle_order,
        "shuffle_seed": study.design_hash if execution.shuffle_seed is None else execution.shuffle_seed,
        "experiment_gap_seconds": execution.experiment_gap_seconds,
        "cycle_gap_seconds": execution.cycle_gap_seconds,
        "window": "whole passes over all prompts; totals are per pass",
        "unit_of_repetition": "cycle",
        "interval": "Student t, 95 %",
        "gates": study.gates.model_dump(mode="json"),
    }
