"""Detect changes of code, model and dataset since a result was measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pytest_llem.engines.models import ModelSource, folder_state
from pytest_llem.engines.protocol import PreflightError
from pytest_llem.engines.shipped import shipped_needs
from pytest_llem.isolation.interpreter import ask_code_state
from pytest_llem.planning.runner_environment import missing_here
from pytest_llem.results import code_state
from pytest_llem.results.code_state import CodeState
from pytest_llem.results.experiment import ExperimentResult, InputsRecord
from pytest_llem.results.manifest import read_manifest, stored_result
from pytest_llem.results.points import PointResult
from pytest_llem.results.study_result import result_lost
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.dataset import HubDataset
from pytest_llem.study.design import StudyConfig
from pytest_llem.workload.datasets import cached_dataset
from pytest_llem.workload.prompts import hub_dataset, read_texts, texts_digest

#: Maximum number of names in a message.
MAX_NAMES = 3


@dataclass
class CurrentInputs:
    """Compare results with the code, models and datasets that a study would use now.

    Each file is read once; changes while the study runs are recorded in its new results.

    Attributes:
        study: The study.
        model_path: Folders that hold models by name.
        import_path: Folders searched for user-defined engines, in addition to the interpreter's own path.
        knows_packages: Whether installed packages and models are those of the hosts that run the study.
    """

    study: StudyConfig
    model_path: Sequence[Path]
    import_path: Sequence[Path]
    knows_packages: bool = True
    # What has been read so far: code by interpreter, models by name, prompts by config_hash, hub datasets.
    _code: dict[Path | None, CodeState] = field(default_factory=dict)
    _models: dict[str, str | None] = field(default_factory=dict)
    _prompts: dict[str, str | None] = field(default_factory=dict)
    _datasets: dict[HubDataset, str | None] = field(default_factory=dict)

    def changes(self, result: ExperimentResult, config: ExperimentConfig) -> list[str]:
        """Return the changes since *result* was measured with *config*; unknown states count as changes."""
        if result.inputs is None:
            return [f"pytest-llem {result.pytest_llem_version} did not record the code that ran"]
        return [
            *self._changed_code(result.inputs, config.backend),
            *(self._changed_model(result, config) if self.knows_packages else ()),
            *self._changed_dataset(result, config),
        ]

    def changes_since(self, directory: Path, point: PointResult) -> list[str]:
        """Return the changes since the results of *point* in a results directory were measured.

        The state of the code is in the results of experiments. A missing result counts as a change.
        """
        config = next(one.config for one in self.study.points if one.config_hash == point.config_hash)
        found: dict[str, None] = {}
        for entry in read_manifest(directory).experiments:
            if entry.config_hash == point.config_hash and entry.status == "completed":
                text = stored_result(directory, entry)
                if text is None:
                    found[result_lost(entry).message] = None
                else:
                    result = ExperimentResult.model_validate_json(text)
                    found |= dict.fromkeys(self.changes(result, config))
        return list(found)

    def _changed_code(self, inputs: InputsRecord, backend: str) -> Iterator[str]:
        python = self.study.interpreter(backend)
        known = self._code.setdefault(python, CodeState(modules={}, distributions={}))
        modules = inputs.modules.keys() - known["modules"].keys()
        distributions = inputs.distributions if self.knows_packages else {}
        packages = distributions.keys() - known["distributions"].keys()
        if modules or packages:
            found = self._current(python, sorted(modules), sorted(packages))
            known["modules"] |= found["modules"]
            known["distributions"] |= found["distributions"]
        now = known["modules"]
        edited = [name for name, digest in inputs.modules.items() if digest is not None and now[name] != digest]
        missing = [name for name in edited if now[name] is None]
        if edited := [name for name in edited if now[name] is not None]:
            yield f"code has changed: {listed(edited)}"
        if missing:
            yield f"code is missing now: {listed(missing)}"
        if unknown := [name for name, digest in inputs.modules.items() if digest is None]:
            yield f"code was edited while it ran: {listed(unknown)}"
        # If the engine cannot run here, missing packages are no change: nothing would be measured here anyway.
        absent_counts = python is not None or missing_here(backend) is None
        for name, version in distributions.items():
            current = known["distributions"][name]
            if current != version and (absent_counts or current is not None):
                old, new = ((one or "not installed").partition(" ")[0] for one in (version, current))
                yield f"{name} was {old}, is {new} now" if old != new else f"{name} {old} has changed files"

    def _current(self, python: Path | None, modules: Sequence[str], packages: Sequence[str]) -> CodeState:
        """Return the state of the code that experiments would import.

        Args:
            python: The interpreter that runs them; None for this one.
            modules: Names of modules.
            packages: Names of distributions.
        """
        path = [str(folder) for folder in self.import_path]
        if python is None:
            return code_state.current(modules, packages, [*sys.path, *path])
        unknown = CodeState(modules=dict.fromkeys(modules), distributions=dict.fromkeys(packages))
        question = {"modules": modules, "packages": packages, "path": path}
        found: CodeState = ask_code_state(python, question) or unknown
        return found

    def _changed_model(self, result: ExperimentResult, config: ExperimentConfig) -> Iterator[str]:
        assert result.inputs is not None
        name = config.model
        if name is None:
            return
        if name not in self._models:
            self._models[name] = folder_state(name, self.model_path)
        if self._models[name] != result.inputs.model_folder:
            yield f"the folder of model {name!r} has changed"
        elif (revision := result.engine.model_revision) is not None:
            stated = shipped_needs(config)
            wanted = stated.model_revision if stated else None
            current = revision if wanted == revision else ModelSource(name, "hub", revision=wanted).commit
            yield from _moved("model", name, revision, current)

    def _changed_dataset(self, result: ExperimentResult, config: ExperimentConfig) -> Iterator[str]:
        directory, key = self.study.path.parent, result.identity.config_hash
        if not config.has_texts:
            return
        if on_hub := hub_dataset(str(config.dataset), directory):
            if on_hub not in self._datasets:
                folder = cached_dataset(on_hub)
                self._datasets[on_hub] = folder.name if folder else None
            yield from _moved("dataset", on_hub.name, result.tokens.dataset_revision, self._datasets[on_hub])
            return
        if key not in self._prompts:
            try:
                texts = read_texts(config, directory)
            except PreflightError:
                texts = None
            self._prompts[key] = texts_digest(texts, config) if texts else None
        if self._prompts[key] != result.tokens.dataset_hash:
            yield f"dataset {config.dataset!r} has changed"


def _moved(kind: str, name: str, then: str | None, now: str | None) -> Iterator[str]:
    """Yield a message if the commit of a model or dataset of the hub has changed."""
    if then != now:
        was, cached = (f"revision {one[:12]}" if one else "missing" for one in (then, now))
        yield f"{kind} {name!r} was {was} in the cache, is {cached} now"


def listed(names: Sequence[str]) -> str:
    """Return the first of *names*, and the number of the others."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(names[:MAX_NAMES]) + more
