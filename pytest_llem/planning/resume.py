"""What an earlier run of a study has measured already, and whether it may stand for what would be measured now."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pytest_llem.results.manifest import read_manifest, stored_result
from pytest_llem.results.models import Manifest, ManifestEntry
from pytest_llem.study.design import StudyConfig

#: Packages that determine the numbers, whatever the engine is. What an engine says of its own comes to them.
DECISIVE = ("pytest-llem", "torch", "transformers")

#: Differences that are named; the first few tell enough.
MOST_DIFFERENCES = 4


class ResumeError(ValueError):
    """An earlier run cannot be taken up; the message, a line, says why and what to do."""


@dataclass(frozen=True)
class Here:
    """What determines the numbers that would be measured now.

    Attributes:
        cpu: Model of the processor.
        gpus: Models of the GPUs that CUDA may use.
        driver: Version of their driver.
        version: What gives, for a backend, the version of a package that its experiments would run with; None
            for one that is not there.
    """

    cpu: str | None
    gpus: frozenset[str]
    driver: str | None
    version: Callable[[str], Callable[[str], str | None]]

    def differences(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Yield what was otherwise when *result*, an ExperimentResult as plain data, was measured."""
        environment, engine = result["environment"], result["engine"]
        gpus = environment.get("gpus") or []
        names = {gpu["name"] for gpu in gpus if gpu.get("name")}
        if missing := sorted(names - self.gpus):
            yield f"it ran on {', '.join(missing)}, here {_listed(self.gpus) or 'is no GPU'}"
        elif not names and self.cpu and environment.get("cpu_model") not in (None, self.cpu):
            yield f"it ran on {environment['cpu_model']}, this is {self.cpu}"
        drivers = {gpu["driver"] for gpu in gpus if gpu.get("driver")}
        if self.driver and drivers and drivers != {self.driver}:
            yield f"driver {_listed(drivers)} then, {self.driver} now"
        now = self.version(result["effective_config"]["backend"])
        then = {name: environment.get("packages", {}).get(name) for name in DECISIVE} | engine["versions"]
        for name, version in then.items():
            if version is not None and (found := now(name)) is not None and found != version:
                yield f"{name} {version} then, {found} now"


@dataclass(frozen=True)
class Replay:
    """Results of an earlier run that stand for experiments of this one.

    Attributes:
        directory: Where they are.
        entries: Of that run's manifest, by the ids of this run's experiments.
    """

    directory: Path
    entries: Mapping[str, ManifestEntry]


@dataclass
class Resume:
    """Finds what can be replayed.

    Attributes:
        source: The results directory; None for the newest one of a study's design.
        anyway: Differences do not matter: what has the same configuration, and a result, is replayed.
        here: What determines the numbers now.
    """

    source: Path | None
    anyway: bool
    here: Callable[[StudyConfig], Here]

    def of(self, study: StudyConfig, results_dir: Path) -> Replay | None:
        """Return what is there for *study*; None where no run has left anything, and all of it has to run.

        Args:
            study: What is to be run.
            results_dir: Where results directories are.

        Raises:
            ResumeError: There is something that was measured otherwise, or what was named is no results directory.
        """
        found = self._named(study) if self.source else self._newest(study, results_dir)
        if found is None:
            return None
        directory, manifest = found
        if manifest.study_design_hash != study.design_hash and not self.anyway:
            raise ResumeError(_refusal(directory, [_design_difference(study, manifest)]))
        theirs = {(entry.config_hash, entry.cycle): entry for entry in manifest.experiments}
        entries: dict[str, ManifestEntry] = {}
        differences: dict[str, None] = {}
        here = self.here(study)
        for experiment in study.experiments:
            entry = theirs.get((experiment.point.config_hash, experiment.cycle))
            text = stored_result(directory, entry) if entry is not None else None
            if entry is None or text is None:
                continue
            entries[experiment.id] = entry
            if not self.anyway:
                differences |= dict.fromkeys(here.differences(json.loads(text)))
        if differences:
            raise ResumeError(_refusal(directory, list(differences)))
        return Replay(directory, entries)

    def _named(self, study: StudyConfig) -> tuple[Path, Manifest] | None:
        """Return the directory that was named; None where it is another study's."""
        assert self.source is not None
        manifest = self._source_manifest
        if manifest.study_name != study.name and manifest.study_design_hash != study.design_hash:
            return None
        return self.source, manifest

    @cached_property
    def _source_manifest(self) -> Manifest:
        assert self.source is not None
        try:
            return read_manifest(self.source)
        except (OSError, ValueError) as error:
            raise ResumeError(f"--llem-resume-from: {error}") from error

    def _newest(self, study: StudyConfig, results_dir: Path) -> tuple[Path, Manifest] | None:
        """Return the newest run of the study's design, else the newest of its name."""
        runs = sorted(_runs(results_dir, study), key=lambda run: run[1].started_at, reverse=True)
        alike = [run for run in runs if run[1].study_design_hash == study.design_hash]
        return next(iter(alike or runs), None)


def _runs(results_dir: Path, study: StudyConfig) -> Iterator[tuple[Path, Manifest]]:
    """Yield the runs of *study* that are there, of any design."""
    if not results_dir.is_dir():
        return
    for directory in results_dir.iterdir():
        try:
            manifest = read_manifest(directory)
        except (OSError, ValueError):  # something else, which may well be there
            continue
        if manifest.study_name == study.name or manifest.study_design_hash == study.design_hash:
            yield directory, manifest


def _refusal(directory: Path, differences: list[str]) -> str:
    more = [f"and {len(differences) - MOST_DIFFERENCES} more"] if len(differences) > MOST_DIFFERENCES else []
    what = "; ".join(differences[:MOST_DIFFERENCES] + more)
    return f"{directory.name} cannot be resumed: {what} (--llem-resume-anyway does it all the same)"


def _design_difference(study: StudyConfig, manifest: Manifest) -> str:
    """Return how the study's design differs from the one of a manifest."""
    then = {entry.config_hash: entry.config_summary for entry in manifest.experiments}
    now = {point.config_hash: point.id for point in study.points}
    parts = [
        f"{len(only)} {what} ({next(iter(only.values()))}{', …' if len(only) > 1 else ''})"
        for what, one, other in (("new", now, then), ("gone", then, now))
        if (only := {digest: name for digest, name in one.items() if digest not in other})
    ]
    points = f": points {', '.join(parts)}" if parts else ""
    return f"the study's design was {manifest.study_design_hash}, is {study.design_hash}{points}"


def _listed(names: frozenset[str] | set[str]) -> str:
    return ", ".join(sorted(names))
