"""The result of a study, made of the manifest and the results of the experiments.

The results of one point at a time are read, summarised and dropped, since a study may have 20,000 experiments.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from pytest_llem.results.cycles import (
    cycle_turns,
    gpus_of_cycles,
    not_repeated_reason,
    summarise,
    summarise_contention,
)
from pytest_llem.results.document import Record, RecordFile
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.facts import CONCURRENT, overlapping, sut_facts, testbed_facts
from pytest_llem.results.findings import Findings
from pytest_llem.results.manifest import read_manifest, stored_result, write_atomically
from pytest_llem.results.manifest_records import ErrorRecord, Manifest, ManifestEntry, StudyStatus
from pytest_llem.results.metrics import weakest
from pytest_llem.results.open_mappings import ProtocolMapping
from pytest_llem.results.points import PointResult
from pytest_llem.results.quality_warnings import StudyWarning
from pytest_llem.results.statistics import STOPPED_CONFIDENCE
from pytest_llem.results.tabular import Per, dataframe, experiment_table, point_table
from pytest_llem.results.token_agreement import GreedyOutputs, TokenAgreement
from pytest_llem.results.verdicts import ComparisonRecord
from pytest_llem.study.design import StudyConfig, measurement_protocol
from pytest_llem.times import seconds_between

if TYPE_CHECKING:
    import pandas

#: Files that hold a StudyResult: the result of a finished run, and the study at its start, without results.
RESULT, DESIGN = "study_result.json", "study_design.json"

#: Error type of an experiment whose saved result is missing or changed.
RESULT_LOST = "ResultLost"


class StudySummary(Record):
    """Totals of a study."""

    total: int
    """Number of selected experiments."""
    completed: int
    """Number of completed experiments."""
    failed: int
    """Number of failed experiments."""
    replayed: int = 0
    """Number of completed experiments whose result was taken from an earlier run."""
    wall_seconds: float
    """Time from the start of the run to the end of its last experiment, in s."""
    energy_j: float | None = None
    """Energy of all measured windows, in J; null if any window has none or boundaries differ."""
    method: str | None = None
    """Weakest method of the energies in ``energy_j``; null if ``energy_j`` is."""


class StudyResult(RecordFile):
    """The result of a study.

    Example:
        Mean energy per output token of each point, in J::

            result = StudyResult.load("results/my-study_2026-01-31T12-00-00Z")
            for point in result.points:
                print(point.id, point.metrics["energy_per_output_token_j"].mean)
    """

    pytest_llem_version: str
    """Version of pytest-llem that wrote the file."""
    name: str
    """Name of the study."""
    study_design_hash: str
    """Hash over the points; the same for the same study on every machine."""
    status: StudyStatus
    """State of the run."""
    started_at: str | None = None
    """Start of the run, UTC, as ISO 8601; null in results of versions that did not record it."""
    summary: StudySummary
    """Numbers of experiments, run time and energy of the whole study."""
    points: list[PointResult]
    """All points with their statistics, in the study's order."""
    token_agreement: list[TokenAgreement] = Field(default_factory=list)
    """Agreement of the greedy outputs of several engines."""
    comparison: ComparisonRecord | None = None
    """Comparison with a reference; null if the study was not compared."""
    experiments: list[ManifestEntry] = Field(default_factory=list)
    """All experiments, in run order; empty in a baseline."""
    excluded: list[dict[str, Any]] = Field(default_factory=list)
    """Combinations of the sweep that were left out: ``axes`` and ``reason`` of each."""
    measurement_protocol: ProtocolMapping = Field(default_factory=dict)
    """Settings that all points share: isolation, start method, cycles, order, gaps, ``gates`` and ``budgets``; and
    ``reference``, the name of the reference, in the reference's own result.
    """
    environment: dict[str, Any] = Field(default_factory=dict)
    """Machine and packages, and what the hook ``pytest_llem_environment`` added."""
    result_files: list[str] = Field(default_factory=list)
    """Paths of the results of experiments, relative to this file."""
    warnings: list[StudyWarning] = Field(default_factory=list)
    """What may be wrong with the values, the worst first, each with the experiments concerned."""

    @cached_property
    def _directory(self) -> Path | None:
        """Folder that the result was loaded from; None if it was not loaded. Equality ignores the folder."""
        return None

    @classmethod
    def load(cls, path: str | Path) -> StudyResult:
        """Return the StudyResult in a ``study_result.json`` or a results directory.

        A run that is in progress or was killed has not written ``study_result.json``. Its result is then made of
        the completed experiments, with the status ``running`` or ``interrupted``.

        Args:
            path: The file, or the results directory.

        Raises:
            ValueError: *path* holds no StudyResult, or its major schema version is another one.
            OSError: *path* cannot be read.
        """
        path = Path(path)
        file = path / RESULT if path.is_dir() else path
        result = cls.read(file) if file.exists() or not path.is_dir() else _load_unfinished(path)
        result.__dict__["_directory"] = file.parent
        return result

    @property
    def min_cycles(self) -> int:
        """Number of cycles of each point of a completed run; with ``n_cycles: auto``, the smallest number."""
        protocol = self.measurement_protocol
        return int(protocol["min_cycles"] if protocol.get("n_cycles") == "auto" else protocol.get("n_cycles", 1))

    def to_dataframe(self, per: Per = "point", *, all_columns: bool = False) -> pandas.DataFrame:
        """Return the result as a data frame, with a row for each point, experiment or request.

        The columns are among those of ``summary.csv``, ``experiments.csv`` and ``requests.csv``: axes by dotted
        key, and metrics by their names in the catalogue. The row of a point has the mean, ``…_ci95_low`` and
        ``…_ci95_high``. ``attrs["units"]`` holds the unit of each column. NaN always means that the value is
        missing.

        Args:
            per: ``point``, ``experiment`` or ``request``.
            all_columns: Whether to return all metrics of points and experiments, with ``…_sd`` and ``…_n``, not
                only the main metrics.

        Raises:
            ImportError: pandas is not installed.
            ValueError: *per* is unknown, or is ``request`` and this result was not returned by :meth:`load`.

        Example:
            Time to first token of each request, by the load on the server::

                requests = StudyResult.load("results/server_2026-11-29T10-00-00Z").to_dataframe("request")
                print(requests.groupby("load.concurrency")["ttft_ms"].median())
        """
        return dataframe(self, per, directory=self._directory, all_columns=all_columns)


def selected_points(result: StudyResult) -> tuple[list[PointResult], Mapping[str, int]]:
    """Return the selected points, and the number of selected experiments by hash of the point's configuration.

    A baseline keeps no experiments. Its cycles count as selected experiments.
    """
    selected = Counter(entry.config_hash for entry in result.experiments if entry.status != "deselected")
    if not result.experiments:
        selected = Counter({point.config_hash: len(point.cycles) for point in result.points})
    return [point for point in result.points if selected[point.config_hash]], selected


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
        measurement_protocol=measurement_protocol(study),
        environment=manifest.environment,
    )


def build_study_result(design: StudyResult, manifest: Manifest, directory: Path) -> StudyResult:
    """Return *design* with the results of its experiments.

    Args:
        design: The study without results, which is changed in place.
        manifest: The state of the experiments. A completed one becomes failed if its result file is missing or
            changed.
        directory: The study's results directory.
    """
    return complete(design, manifest, add_results(design, manifest, directory))


def add_results(design: StudyResult, manifest: Manifest, directory: Path) -> Findings:
    """Set the results of each point of *design*, and return the findings that concern the whole study.

    Args:
        design: The study without results, which is changed in place.
        manifest: The state of the experiments. A completed one becomes failed if its result file is missing or
            changed.
        directory: The study's results directory.
    """
    by_point: dict[str, list[ManifestEntry]] = {}
    for entry in manifest.experiments:
        if entry.status == "completed":
            by_point.setdefault(entry.config_hash, []).append(entry)
    findings, greedy_outputs = Findings(), GreedyOutputs(directory)
    confidence = STOPPED_CONFIDENCE if design.measurement_protocol.get("n_cycles") == "auto" else 0.95
    for point in design.points:
        entries = sorted(by_point.get(point.config_hash, ()), key=lambda entry: entry.cycle)
        read = [(entry, result) for entry in entries if (result := _read_result(directory, entry)) is not None]
        results = [result for _, result in read]
        _set_results(point, [entry for entry, _ in read], results, confidence)
        point.testbed = findings.shared(testbed_facts(results))
        point.sut = findings.shared(sut_facts(results))
        for result in results:
            findings.add(result, point)
        if read:
            greedy_outputs.add(results[0], point.id, str(read[0][0].result_file))
        findings.warn_of_differing(results, point)
    design.token_agreement = list(greedy_outputs.agreements())
    findings.warn_of_edits()
    findings.warn_of_drift(design.points)
    _set_concurrent(findings, manifest.experiments)
    return findings


def _set_results(
    point: PointResult, entries: Sequence[ManifestEntry], results: Sequence[ExperimentResult], confidence: float
) -> None:
    """Set all of *point* that follows from its own *results*, except for its testbed and SUT facts.

    Args:
        point: The point, which is changed in place.
        entries: The manifest's entry of each result.
        results: The results, in order of their cycles.
        confidence: Confidence of the intervals of its metrics, 0 to 1.
    """
    point.cycles = [entry.cycle for entry in entries]
    point.result_digests = [entry.result_sha256 for entry in entries if entry.result_sha256 is not None]
    mismatches = dict.fromkeys(entry.replay_mismatch for entry in entries if entry.replay_mismatch)
    point.replay_mismatch = "; ".join(mismatches) or None
    if results:  # replace the study's configuration by what reached the engine: unused fields are null
        point.config = results[0].effective_config
    point.metrics = summarise(results, confidence=confidence)
    point.contention = summarise_contention(results)
    point.turns = [*cycle_turns(results)]
    point.loads = [result.load for result in results if result.load is not None]
    point.gpus = gpus_of_cycles(results)
    point.drifts = [one.server.drift for one in results if one.server is not None and one.server.drift is not None]
    point.not_repeated = not_repeated_reason(results)


def complete(design: StudyResult, manifest: Manifest, findings: Findings) -> StudyResult:
    """Return *design*, whose points have their results, with status, summary and warnings of the whole study."""
    manifest.recount()
    design.status = manifest.status
    design.summary = _summary(manifest, findings)
    design.experiments = manifest.experiments
    # Facts that the first experiment recorded replace those of pytest's process, which may run on another host.
    # The manifest's environment also has what the hook pytest_llem_environment added.
    design.environment = manifest.environment | findings.environment
    design.result_files = [entry.result_file for entry in manifest.experiments if entry.result_file]
    design.warnings = findings.study_warnings()
    return design


def _load_unfinished(directory: Path) -> StudyResult:
    """Return the result so far of a run that is in progress or was killed.

    Raises:
        ValueError: *directory* holds no results of a study.
        OSError: The results cannot be read.
    """
    manifest = read_manifest(directory)
    return build_study_result(read_design(directory), manifest, directory)


def read_design(directory: Path) -> StudyResult:
    """Return the study of a run that has not ended, without results.

    Raises:
        ValueError: *directory* holds no ``study_design.json``, or an invalid one.
        OSError: The file cannot be read.
    """
    try:
        return StudyResult.read(directory / DESIGN)
    except FileNotFoundError:
        raise ValueError(f"{directory}: holds neither {RESULT} nor {DESIGN}") from None


def write_result(directory: Path, result: StudyResult) -> None:
    """Write *result* and its tables to a results directory.

    Raises:
        OSError: A file could not be written.
    """
    write_atomically(directory / RESULT, result.model_dump_json(indent=1) + "\n")
    write_atomically(directory / "summary.csv", point_table(result).to_csv())
    write_atomically(directory / "experiments.csv", experiment_table(result).to_csv())


def _read_result(directory: Path, entry: ManifestEntry) -> ExperimentResult | None:
    """Return the result of a completed experiment. If it cannot be read, return None and set *entry* to failed."""
    text = stored_result(directory, entry)
    try:
        if text is not None:
            return ExperimentResult.model_validate_json(text)
    except ValueError:  # such as pydantic's ValidationError
        pass
    entry.status = "failed"
    entry.error = result_lost(entry)
    entry.result_file = entry.result_sha256 = None
    return None


def result_lost(entry: ManifestEntry) -> ErrorRecord:
    """Return the error of a completed experiment whose result cannot be read any more."""
    message = f"{entry.result_file} is missing, or was changed after it was written"
    return ErrorRecord(kind="exception", type=RESULT_LOST, message=message)


def _set_concurrent(findings: Findings, entries: Iterable[ManifestEntry]) -> None:
    """Set the testbed fact :data:`CONCURRENT` of each point with results: whether other experiments ran meanwhile.

    Only experiments on the same host count. Failed experiments do not record their host: they count if all results
    are from one host.
    """
    failed = [
        (entry.started_at, entry.completed_at)
        for entry in entries
        if entry.status == "failed" and entry.started_at and entry.completed_at
    ]
    points: dict[str, PointResult] = {}
    concurrent: dict[str, bool] = {}
    for spans in findings.spans.values():
        times = [(began, ended) for began, ended, *_ in spans]
        overlaps = overlapping(times + failed if len(findings.spans) == 1 else times)
        # Not strict: the overlaps of failed experiments, at the end, belong to no point.
        for (_, _, point, recorded), overlap in zip(spans, overlaps, strict=False):
            points[point.id] = point
            concurrent[point.id] = overlap or recorded or concurrent.get(point.id, False)
    for point_id, point in points.items():
        point.testbed = {**point.testbed, CONCURRENT: concurrent[point_id]}  # the facts are shared between points


def _summary(manifest: Manifest, findings: Findings) -> StudySummary:
    # Energies of different boundaries are never added, and a sum without some results would be too small.
    has_total = len(findings.boundaries) == 1 and len(findings.known) == findings.count
    ended = [entry.completed_at for entry in manifest.experiments if entry.completed_at]
    return StudySummary(
        total=sum(entry.status != "deselected" for entry in manifest.experiments),
        completed=manifest.completed,
        failed=manifest.failed,
        replayed=sum(
            entry.status == "completed" and entry.replayed_from is not None for entry in manifest.experiments
        ),
        wall_seconds=seconds_between(manifest.started_at, max(ended)) if ended else 0.0,
        energy_j=sum(findings.known) if has_total else None,
        method=weakest(findings.methods) if has_total else None,
    )
