"""Find results of earlier runs that can replace experiments of this run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from pytest_llem.hardware.gpus import visible_gpus
from pytest_llem.isolation.interpreter import package_versions
from pytest_llem.planning.inputs import CurrentInputs
from pytest_llem.results.carbon import emission_factors
from pytest_llem.results.environment import cpu_model, package_version
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.manifest import MANIFEST, read_manifest, runs_of, stored_result
from pytest_llem.results.manifest_records import Manifest, ManifestEntry
from pytest_llem.results.study_result import DESIGN, RESULT
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Experiment, StudyConfig
from pytest_llem.study.section import flatten

#: Packages whose versions affect results of any engine. The versions that an engine reports are compared, too.
DECISIVE = ("pytest-llem", "torch", "transformers")

#: Maximum number of differences in a message.
MAX_DIFFERENCES = 4


class ResumeError(ValueError):
    """An earlier run cannot be resumed; the one-line message says why and what to do."""


@dataclass(frozen=True)
class CurrentEnvironment:
    """The environment in which experiments would be measured now.

    Attributes:
        cpu: Model of the CPU; None if unknown.
        gpus: Models of the GPUs that CUDA may use; None if unknown.
        driver: Version of the GPUs' driver; None if unknown.
        version: Returns, for a backend, a function from a package's name to the version that its experiments would
            use, None for a package that is not installed.
        changes: Returns the changes of code, model and dataset since a result of a configuration was measured.
    """

    cpu: str | None
    gpus: frozenset[str] | None
    driver: str | None
    version: Callable[[str], Callable[[str], str | None]]
    changes: Callable[[ExperimentResult, ExperimentConfig], list[str]]

    @classmethod
    def of_this_machine(cls, study: StudyConfig, inputs: CurrentInputs) -> CurrentEnvironment:
        """Return this machine, the package versions of each runner of *study*, and the state of *inputs*."""

        def version(backend: str) -> Callable[[str], str | None]:
            python = study.interpreter(backend)
            return package_version if python is None else package_versions(python).get

        gpus = visible_gpus().all
        return cls(
            cpu=cpu_model(),
            gpus=frozenset(gpu.name for gpu in gpus if gpu.name),
            driver=next((gpu.driver for gpu in gpus if gpu.driver), None),
            version=version,
            changes=inputs.changes,
        )

    @classmethod
    def of_other_hosts(cls, inputs: CurrentInputs) -> CurrentEnvironment:
        """Return the environment of hosts of which nothing is known, and the state of *inputs*."""
        return cls(None, None, None, version=lambda backend: lambda package: None, changes=inputs.changes)

    def differences(self, result: ExperimentResult) -> Iterator[str]:
        """Yield the differences between this environment and the one of *result*."""
        environment = result.environment
        gpus = environment.get("gpus") or []
        names = {gpu["name"] for gpu in gpus if gpu.get("name")}
        if self.gpus is not None and (missing := sorted(names - self.gpus)):
            yield f"it ran on {', '.join(missing)}, this machine has {_listed(self.gpus) or 'no GPU'}"
        elif not names and self.cpu and environment.get("cpu_model") not in (None, self.cpu):
            yield f"it ran on {environment['cpu_model']}, this machine has {self.cpu}"
        drivers = {gpu["driver"] for gpu in gpus if gpu.get("driver")}
        if self.driver and drivers and drivers != {self.driver}:
            yield f"driver was {_listed(drivers)}, is {self.driver} now"
        now = self.version(result.effective_config["backend"])
        then = {name: environment.get("packages", {}).get(name) for name in DECISIVE} | result.engine.versions
        for name, version in then.items():
            if version is not None and (found := now(name)) is not None and found != version:
                yield f"{name} was {version}, is {found} now"


@dataclass(frozen=True)
class StoredResult:
    """A result of an earlier run.

    Attributes:
        directory: The results directory.
        entry: The result's entry in that directory's manifest.
        measured_at: Time of the measurement, in UTC, as ISO 8601.
        mismatch: How environment, code, model or dataset differ from now, as text; None if they do not.
        emission_factors: Carbon intensity and PUE of its ``gco2e_g`` as text, or None.
    """

    directory: Path
    entry: ManifestEntry
    measured_at: str
    mismatch: str | None = None
    emission_factors: str | None = None


@dataclass(frozen=True)
class Replay:
    """Results of earlier runs that replace experiments of this run.

    Attributes:
        results: Results by the ids of this run's experiments.
        damaged: Number of experiments whose stored result is missing or damaged.
        changed: Changes since experiments were measured, by their ids; these experiments are measured again.
        unreadable: Why manifests of earlier runs, of whichever study, cannot be read.
    """

    results: Mapping[str, StoredResult]
    damaged: int = 0
    changed: Mapping[str, str] = field(default_factory=dict)
    unreadable: Sequence[str] = ()

    @property
    def sources(self) -> list[str]:
        """Names of the results directories of the results."""
        return list(dict.fromkeys(stored.directory.name for stored in self.results.values()))


@dataclass
class Resume:
    """Search earlier runs for results that can be replayed.

    Attributes:
        source: Results directory to resume from; None for the newest run of a study's design.
        shard: The shard to be run, ``I/N``, whose runs are searched; None for the whole study.
        allow_mismatch: Replay every result of the same configuration, despite differences.
        current: Returns the current environment of a study.
    """

    source: Path | None
    shard: str | None
    allow_mismatch: bool
    current: Callable[[StudyConfig], CurrentEnvironment]

    def find(self, study: StudyConfig, results_dir: Path) -> Replay | None:
        """Return the results for *study* of one run and of the runs that it was itself resumed from.

        Args:
            study: The study to be run.
            results_dir: Parent of the results directories.

        Returns:
            None if ``source`` belongs to another study.

        Raises:
            ResumeError: The results were measured with another design or environment, or ``source`` is not a
                results directory.
        """
        unreadable: list[str] = []
        runs = self._source_run(study) if self.source else self._runs(study, results_dir, unreadable)
        if runs is None:
            return None
        matching = [run for run in runs if self.allow_mismatch or run[1].study_design_hash == study.design_hash]
        if runs and not matching:
            raise ResumeError(_refusal(runs[0][0], [_design_difference(study, *runs[0])]))
        found = _FoundResults(study, self.current(study), allow_mismatch=self.allow_mismatch)
        for directory, manifest in _chain(*matching[0]) if matching else ():
            differences = found.add(directory, manifest)
            # A differing older run is ignored if a newer run has results.
            if differences and not found.results:
                raise ResumeError(_refusal(directory, differences))
        changed = {name: text for name, text in found.changed.items() if name not in found.results}
        return Replay(found.results, len(found.damaged - found.results.keys()), changed, unreadable)

    def _runs(self, study: StudyConfig, results_dir: Path, unreadable: list[str]) -> list[tuple[Path, Manifest]]:
        found = runs_of(results_dir, study.name, study.design_hash, unreadable)
        return [run for run in found if run[1].shard == self.shard]

    def _source_run(self, study: StudyConfig) -> list[tuple[Path, Manifest]] | None:
        """Return the run in ``source``; None if it belongs to another study."""
        assert self.source is not None
        manifest = self._source_manifest
        if manifest.study_name != study.name and manifest.study_design_hash != study.design_hash:
            return None
        return [(self.source, manifest)]

    @cached_property
    def _source_manifest(self) -> Manifest:
        assert self.source is not None
        if self.source.name == MANIFEST and self.source.is_file():
            raise ResumeError(f"--llem-resume-from: {self.source}: name the directory that holds it")
        try:
            return read_manifest(self.source)
        except (OSError, ValueError) as error:
            raise ResumeError(f"--llem-resume-from: {error}") from error


@dataclass
class _FoundResults:
    """Results found so far, while runs are searched from the newest to the oldest.

    Attributes:
        study: The study to be run.
        current: Its current environment.
        allow_mismatch: Ignore differences.
        results: Results that can be replayed, by the experiment's id.
        damaged: Ids of experiments whose stored result is missing or damaged.
        changed: Changes since experiments were measured, by their ids.
    """

    study: StudyConfig
    current: CurrentEnvironment
    allow_mismatch: bool
    results: dict[str, StoredResult] = field(default_factory=dict)
    damaged: set[str] = field(default_factory=set)
    changed: dict[str, str] = field(default_factory=dict)

    def add(self, directory: Path, manifest: Manifest) -> list[str]:
        """Add the results of a run that no newer run has, unless its environment differs.

        Returns:
            The differences: another machine, or other versions.
        """
        entries = {(entry.config_hash, entry.cycle): entry for entry in manifest.experiments}
        found: dict[str, StoredResult] = {}
        differing: dict[str, None] = {}
        for experiment in self.study.experiments:
            entry = entries.get((experiment.point.config_hash, experiment.cycle))
            if experiment.id in self.results or entry is None or entry.status != "completed":
                continue
            if (result := _result_of(experiment, directory, entry)) is None:
                self.damaged.add(experiment.id)
                continue
            differences = list(self.current.differences(result))
            changes = self.current.changes(result, experiment.point.config)
            if self.allow_mismatch or not changes:
                mismatch = "; ".join(differences + changes) or None
                factors = emission_factors(result.metrics.get("gco2e_g"))
                found[experiment.id] = StoredResult(directory, entry, result.started_at, mismatch, factors)
            else:
                self.changed.setdefault(experiment.id, "; ".join(changes))
            if not self.allow_mismatch:
                differing |= dict.fromkeys(differences)
        if not differing:
            self.results |= found
        return list(differing)


def _chain(directory: Path, manifest: Manifest) -> list[tuple[Path, Manifest]]:
    """Return a run and the existing runs that it was resumed from, directly or indirectly, newest first."""
    found = {directory: manifest}
    names = [directory.parent / name for name in manifest.resumed_from]
    while names:
        if (earlier := names.pop()) in found or earlier.parent != directory.parent:
            continue
        with suppress(OSError, ValueError):
            found[earlier] = read_manifest(earlier)
            names += [earlier.parent / name for name in found[earlier].resumed_from]
    return sorted(found.items(), key=lambda run: run[1].started_at, reverse=True)


def _result_of(experiment: Experiment, directory: Path, entry: ManifestEntry) -> ExperimentResult | None:
    """Return the stored result of *entry*; None if it is invalid or not a result of *experiment*."""
    text = stored_result(directory, entry)
    try:
        result = ExperimentResult.model_validate_json(text or "")
    except ValueError:
        return None
    identity = result.identity
    matches = (identity.config_hash, identity.cycle) == (experiment.point.config_hash, experiment.cycle)
    return result if matches else None


def _refusal(directory: Path, differences: list[str]) -> str:
    more = [f"and {len(differences) - MAX_DIFFERENCES} more"] if len(differences) > MAX_DIFFERENCES else []
    what = "; ".join(differences[:MAX_DIFFERENCES] + more)
    return f"{directory.name} cannot be resumed: {what} (--llem-resume-mismatch replays the common results)"


def _design_difference(study: StudyConfig, directory: Path, manifest: Manifest) -> str:
    """Return a description of how the study's design differs from that of a run."""
    then = {entry.config_hash: entry.config_summary for entry in manifest.experiments}
    now = {point.config_hash: point.id for point in study.points}
    parts = [
        f"{len(only)} {what} ({next(iter(only.values()))}{', …' if len(only) > 1 else ''})"
        for what, one, other in (("new", now, then), ("removed", then, now))
        if (only := {digest: name for digest, name in one.items() if digest not in other})
    ]
    points = f": points {', '.join(parts)}" if parts else ""
    if then.keys() != now.keys() and {*then.values()} == {*now.values()}:
        points = f": the same points, hashed differently by pytest-llem {manifest.pytest_llem_version}"
    fields = _field_difference(study, directory)
    return f"the study's design was {manifest.study_design_hash}, is {study.design_hash} now{fields or points}"


def _field_difference(study: StudyConfig, directory: Path) -> str | None:
    """Return the differing fields of the first common point that differs; None if there is no such point."""
    for name in (RESULT, DESIGN):
        try:
            points = json.loads((directory / name).read_text(encoding="utf-8"))["points"]
            stored = {point["id"]: (point["config_hash"], point["config"]) for point in points}
        except (OSError, ValueError, LookupError, TypeError):  # an unfinished run, or an edited file
            continue
        for point in study.points:
            digest, config = stored.get(point.id, (point.config_hash, {}))
            if digest == point.config_hash:
                continue
            now = dict(flatten(point.config.model_dump(mode="json")))
            then = dict(flatten(config))
            changed = [name for name in now if name in then and then[name] != now[name]]
            # A field that the engine did not use is null in a result, whatever the study said.
            changed = [name for name in changed if then[name] is not None] or changed
            if changed:
                fields = [f"{name} was {then[name]}, is {now[name]} now" for name in changed[:MAX_DIFFERENCES]]
                return f": in {point.id}, {', '.join(fields)}"
    return None


def _listed(names: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(names))
