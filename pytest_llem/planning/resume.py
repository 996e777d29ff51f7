"""What an earlier run of a study has measured already, and whether it may stand for what would be measured now."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_llem.results.carbon import emission_factors
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.manifest import MANIFEST, read_manifest, runs_of, stored_result
from pytest_llem.results.models import Manifest, ManifestEntry
from pytest_llem.results.study_result import DESIGN
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Experiment, StudyConfig

#: What a run that came to its end leaves.
RESULT = "study_result.json"

#: Packages that determine the numbers, whatever the engine is. What an engine says of its own comes to them.
DECISIVE = ("pytest-llem", "torch", "transformers")

#: Differences that are named; the first few tell enough.
MAX_DIFFERENCES = 4


class ResumeError(ValueError):
    """An earlier run cannot be taken up; the message, a line, says why and what to do."""


@dataclass(frozen=True)
class CurrentEnvironment:
    """What determines the numbers that would be measured now.

    Attributes:
        cpu: Model of the processor.
        gpus: Models of the GPUs that CUDA may use.
        driver: Version of their driver.
        version: What gives, for a backend, the version of a package that its experiments would run with; None
            for one that is not there.
        changes: What gives, for a result and its configuration, what has changed of the code, the model and the
            dataset since.
    """

    cpu: str | None
    gpus: frozenset[str]
    driver: str | None
    version: Callable[[str], Callable[[str], str | None]]
    changes: Callable[[ExperimentResult, ExperimentConfig], list[str]]

    def differences(self, result: ExperimentResult) -> Iterator[str]:
        """Yield what was otherwise when *result* was measured."""
        environment = result.environment
        gpus = environment.get("gpus") or []
        names = {gpu["name"] for gpu in gpus if gpu.get("name")}
        if missing := sorted(names - self.gpus):
            yield f"it ran on {', '.join(missing)}, here {_listed(self.gpus) or 'is no GPU'}"
        elif not names and self.cpu and environment.get("cpu_model") not in (None, self.cpu):
            yield f"it ran on {environment['cpu_model']}, this is {self.cpu}"
        drivers = {gpu["driver"] for gpu in gpus if gpu.get("driver")}
        if self.driver and drivers and drivers != {self.driver}:
            yield f"driver {_listed(drivers)} then, {self.driver} now"
        now = self.version(result.effective_config["backend"])
        then = {name: environment.get("packages", {}).get(name) for name in DECISIVE} | result.engine.versions
        for name, version in then.items():
            if version is not None and (found := now(name)) is not None and found != version:
                yield f"{name} {version} then, {found} now"


@dataclass(frozen=True)
class Stored:
    """A result of an earlier run.

    Attributes:
        directory: The results directory.
        entry: Its entry in the manifest there.
        measured_at: When it was measured, in UTC, as ISO 8601.
        mismatch: What has changed since; None where nothing has.
        emission_factors: Carbon intensity and PUE of its ``gco2e_g``, in words; None where it has none.
    """

    directory: Path
    entry: ManifestEntry
    measured_at: str
    mismatch: str | None = None
    emission_factors: str | None = None


@dataclass(frozen=True)
class Replay:
    """Results of earlier runs that stand for experiments of this one.

    Attributes:
        results: By the ids of this run's experiments.
        torn: Experiments whose result is there and not whole.
        changed: What has changed since experiments were measured, by their ids: they are measured again.
    """

    results: Mapping[str, Stored]
    torn: int = 0
    changed: Mapping[str, str] = field(default_factory=dict)

    @property
    def sources(self) -> list[str]:
        """The names of the results directories that the results are from."""
        return list(dict.fromkeys(stored.directory.name for stored in self.results.values()))


@dataclass
class Resume:
    """Finds what can be replayed.

    Attributes:
        source: The results directory; None for the newest run of a study's design.
        anyway: Differences do not matter: what has the same configuration, and a result, is replayed.
        here: What determines the numbers now.
    """

    source: Path | None
    anyway: bool
    here: Callable[[StudyConfig], CurrentEnvironment]

    def of(self, study: StudyConfig, results_dir: Path) -> Replay | None:
        """Return what is there for *study*: results of one run, and of those that it was resumed from itself.

        Args:
            study: What is to be run.
            results_dir: Where results directories are.

        Returns:
            None where a directory was named and is another study's.

        Raises:
            ResumeError: What is there was measured otherwise, or what was named is no results directory.
        """
        runs = self._named(study) if self.source else runs_of(results_dir, study.name, study.design_hash)
        if runs is None:
            return None
        alike = [run for run in runs if self.anyway or run[1].study_design_hash == study.design_hash]
        if runs and not alike:
            raise ResumeError(_refusal(runs[0][0], [_design_difference(study, *runs[0])]))
        found = _Found(study, self.here(study), anyway=self.anyway)
        for directory, manifest in _chain(*alike[0]) if alike else ():
            differences = found.add(directory, manifest)
            if differences and not found.results:  # of the runs before the newest one they are left
                raise ResumeError(_refusal(directory, differences))
        changed = {name: text for name, text in found.changed.items() if name not in found.results}
        return Replay(found.results, len(found.torn - found.results.keys()), changed)

    def _named(self, study: StudyConfig) -> list[tuple[Path, Manifest]] | None:
        """Return the run that was named; None where it is another study's."""
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
class _Found:
    """Results that were found so far, of one run after another.

    Attributes:
        study: What is to be run.
        here: What determines its numbers now.
        anyway: Differences do not matter.
        results: What can be replayed, by the experiment's id.
        torn: Experiments whose result is not whole.
        changed: What has changed since experiments were measured, by their ids.
    """

    study: StudyConfig
    here: CurrentEnvironment
    anyway: bool
    results: dict[str, Stored] = field(default_factory=dict)
    torn: set[str] = field(default_factory=set)
    changed: dict[str, str] = field(default_factory=dict)

    def add(self, directory: Path, manifest: Manifest) -> list[str]:
        """Add the results of a run that no newer one has, unless they were measured otherwise.

        Returns:
            How they were: on another machine, or with other versions.
        """
        entries = {(entry.config_hash, entry.cycle): entry for entry in manifest.experiments}
        found: dict[str, Stored] = {}
        differing: dict[str, None] = {}
        for experiment in self.study.experiments:
            entry = entries.get((experiment.point.config_hash, experiment.cycle))
            if experiment.id in self.results or entry is None or entry.status != "completed":
                continue
            if (result := _result_of(experiment, directory, entry)) is None:
                self.torn.add(experiment.id)
                continue
            differences = list(self.here.differences(result))
            changes = self.here.changes(result, experiment.point.config)
            if self.anyway or not changes:
                mismatch = "; ".join(differences + changes) or None
                factors = emission_factors(result.metrics.get("gco2e_g"))
                found[experiment.id] = Stored(directory, entry, result.started_at, mismatch, factors)
            else:
                self.changed.setdefault(experiment.id, "; ".join(changes))
            if not self.anyway:
                differing |= dict.fromkeys(differences)
        if not differing:
            self.results |= found
        return list(differing)


def _chain(directory: Path, manifest: Manifest) -> list[tuple[Path, Manifest]]:
    """Return a run, and those that it was resumed from, the newest first. Those that are gone are left out."""
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
    """Return the result that *entry* has of *experiment*; None where it is none, or another's."""
    text = stored_result(directory, entry)
    try:
        result = ExperimentResult.model_validate_json(text or "")
    except ValueError:
        return None
    identity = result.identity
    own = (identity.config_hash, identity.cycle) == (experiment.point.config_hash, experiment.cycle)
    return result if own else None


def _refusal(directory: Path, differences: list[str]) -> str:
    more = [f"and {len(differences) - MAX_DIFFERENCES} more"] if len(differences) > MAX_DIFFERENCES else []
    what = "; ".join(differences[:MAX_DIFFERENCES] + more)
    return f"{directory.name} cannot be resumed: {what} (--llem-resume-mismatch replays what both have)"


def _design_difference(study: StudyConfig, directory: Path, manifest: Manifest) -> str:
    """Return how the study's design differs from the one of a run."""
    then = {entry.config_hash: entry.config_summary for entry in manifest.experiments}
    now = {point.config_hash: point.id for point in study.points}
    parts = [
        f"{len(only)} {what} ({next(iter(only.values()))}{', …' if len(only) > 1 else ''})"
        for what, one, other in (("new", now, then), ("gone", then, now))
        if (only := {digest: name for digest, name in one.items() if digest not in other})
    ]
    points = f": points {', '.join(parts)}" if parts else ""
    if then.keys() != now.keys() and {*then.values()} == {*now.values()}:
        points = f": the same points, hashed by pytest-llem {manifest.pytest_llem_version} otherwise than now"
    fields = _field_difference(study, directory)
    return f"the study's design was {manifest.study_design_hash}, is {study.design_hash}{fields or points}"


def _field_difference(study: StudyConfig, directory: Path) -> str | None:
    """Return the fields in which the first point that both have differs; None where no point tells."""
    for name in (RESULT, DESIGN):
        try:
            points = json.loads((directory / name).read_text(encoding="utf-8"))["points"]
            configs = {point["id"]: point["config"] for point in points}
        except (OSError, ValueError, LookupError, TypeError):  # not at its end, or tampered with
            continue
        for point in study.points:
            now = dict(_flat(point.config.model_dump(mode="json")))
            then = dict(_flat(configs.get(point.id)))
            changed = [name for name in now if name in then and then[name] != now[name]]
            if changed:
                told = [f"{name}: {then[name]} then, {now[name]} now" for name in changed[:MAX_DIFFERENCES]]
                return f": {point.id} had {', '.join(told)}"
    return None


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the fields of *config* by dotted name."""
    for name, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _listed(names: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(names))
