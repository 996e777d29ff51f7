"""Run the experiments of a conformance suite, and fail or skip its checks by their results."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest
from pydantic import ValidationError

from pytest_llem.execution.isolated import ExperimentError
from pytest_llem.isolation.engine_probe import EngineAnswer
from pytest_llem.measurement import observed_engine
from pytest_llem.measurement.observed_engine import ObservedEngine
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.manifest_records import ErrorRecord
from pytest_llem.study.config import ExperimentConfig

#: Runs one experiment and returns its result, as the fixture ``isolated_experiment`` does.
RunExperiment = Callable[[ExperimentConfig], ExperimentResult]

#: The page that describes each check.
PAGE = "https://github.com/pytest-llem/pytest-llem/blob/main/docs/how-to/engine-conformance.md"

#: The engine that passes calls on to the engine under test, and notes them.
_OBSERVED = f"{observed_engine.__name__}:{ObservedEngine.__qualname__}"

#: Fields of a short experiment. Prompts differ in length, so that records in the wrong order are found.
SMALL: Mapping[str, Any] = {
    "dataset": {"n": 5, "input_len": {"min": 2, "max": 9}, "seed": 3},
    "max_output_tokens": 5,
    "warmup": {"enabled": False},
    "baseline": {"enabled": False},
    "energy": {"backend": None},
    "measurement": {"min_window_seconds": 0},
}

_TEXTS = ("A cat sat.", "The quick brown fox jumps over the lazy dog.", "One, two, three.")

#: Phases of an experiment before its model is loaded; None for a refusal in pytest's process.
_BEFORE_LOAD = (None, "starting", "importing", "ready", "fetching the dataset", "fetching the model")

#: Beginnings of error messages of the measurement, and the check that reports them.
_REPORTED_BY = {
    "the engine returned records for": "test_records_are_one_for_each_prompt_in_order",
    "the engine contradicts its input: it reports ": "test_input_tokens_are_those_of_the_prompt",
    "the engine generated ": "test_number_of_output_tokens_is_exact",
    "the engine contradicts the clock": "test_times_are_in_order_and_within_the_window",
    "the engine contradicts itself": "test_times_are_in_order_and_within_the_window",
}

#: Time that processes may take to disappear after the experiment, in s.
_GONE_SECONDS = 5.0


@dataclass(frozen=True)
class Run:
    """One experiment of the suite.

    Attributes:
        result: Its result; None if it failed.
        error: Why it failed; None if it did not.
        notes: What :class:`ObservedEngine` noted about calls to the engine.
        minimal: Run of the minimal experiment; None if this run is of it.
    """

    result: ExperimentResult | None
    error: ErrorRecord | None
    notes: Sequence[Mapping[str, Any]]
    minimal: Run | None

    def noted(self, call: str) -> Iterator[Mapping[str, Any]]:
        """Yield the notes about a *call*."""
        return (note for note in self.notes if note["call"] == call)

    @property
    def refusal(self) -> str | None:
        """Why the experiment was refused; None if it was not."""
        return self.error.message if self.error is not None and self.error.kind == "preflight" else None

    @property
    def reported_by(self) -> str | None:
        """The check that reports the error; None if no check does."""
        message = self.error.message if self.error is not None else ""
        return next((check for start, check in _REPORTED_BY.items() if message.startswith(start)), None)

    def require_result(self, reported_by: str | None = None) -> ExperimentResult:
        """Return the result. If there is none, skip the test if another one reports why, and else fail.

        Args:
            reported_by: The test that reports an error of this experiment; None if this test has to.
        """
        if self.error is None:
            assert self.result is not None
            return self.result
        if self.minimal is None or self.minimal.error is not None:
            reported_by = (self.minimal or self).reported_by or "test_experiment_completes"
        if reported_by is not None:
            pytest.skip(f"the experiment failed ({first_line(self.error)}): see {reported_by}")
        fail(f"the experiment failed while {self.error.phase} ({first_line(self.error)})", "experiments")


class Experiments:
    """Runs the experiments of one suite, each configuration once.

    Args:
        run: Runs one experiment in a fresh process.
        fields: The engine's minimal experiment.
        folder: Folder for the notes of the observed engine.
    """

    def __init__(self, run: RunExperiment, fields: Mapping[str, Any], folder: Path) -> None:
        self._run, self._folder = run, folder
        self._fields = _merged(SMALL, fields)
        self._done: dict[str, Run] = {}
        self.answer: EngineAnswer | None = None
        self.backend = ExperimentConfig.model_validate(self._fields).backend
        self.other_seed = (self.config().random_seed + 1) % 2**63
        self.texts = folder / "texts.txt"
        self.texts.write_text("".join(f"{text}\n" for text in _TEXTS), encoding="utf-8")

    def config(self, **changes: Any) -> ExperimentConfig:
        """Return the minimal experiment with *changes*."""
        return ExperimentConfig.model_validate(_merged(self._fields, changes))

    def of_texts(self, **changes: Any) -> Mapping[str, Any]:
        """Return changes that replace synthetic prompts by texts."""
        return {"dataset": str(self.texts), "n": len(_TEXTS), "max_input_tokens": 64, **changes}

    def __call__(self, *, fault: str | None = None, **changes: Any) -> Run:
        """Run the minimal experiment with *changes*, with the engine under observation.

        Args:
            fault: Method of the engine that raises when it is done, or ``kill`` for SIGKILL in ``generate``.
            changes: Fields to change.
        """
        key = f"{fault} {self.config(**changes).model_dump_json()}"
        if key not in self._done:
            self._done[key] = self.fresh(fault=fault, **changes)
        return self._done[key]

    def fresh(self, *, fault: str | None = None, **changes: Any) -> Run:
        """Run the experiment, even if it has run already."""
        fields = self.config(**changes).model_dump(mode="json", exclude={self.backend}, exclude_unset=True)
        notes = self._folder / f"{time.monotonic_ns()}.jsonl"
        section = self.config(**changes).engine_section
        observed = {"engine": self.backend, "section": section, "notes": str(notes), "fault": fault}
        minimal = self() if fault or self.config(**changes) != self.config() else None
        return self._run_fields({**fields, "backend": _OBSERVED, _OBSERVED: observed}, minimal, notes)

    def directly(self, **changes: Any) -> Run:
        """Run the minimal experiment with *changes*, without observation: as a study names the engine."""
        return self._run_fields(_merged(self._fields, changes), self())

    def _run_fields(self, fields: Mapping[str, Any], minimal: Run | None, notes: Path | None = None) -> Run:
        result = error = None
        try:
            result = self._run(ExperimentConfig.model_validate(fields))
        except ExperimentError as caught:
            error = caught.error
        except ValidationError as caught:  # as the study would be refused
            message = caught.errors()[0]["msg"]
            error = ErrorRecord(kind="preflight", type=type(caught).__name__, message=message)
        lines = notes.read_text(encoding="utf-8").splitlines() if notes and notes.exists() else []
        return Run(result, error, [json.loads(line) for line in lines], minimal)


def fail(sentence: str, section: str) -> NoReturn:
    """Fail with one sentence, and the section of the page that describes the rule."""
    pytest.fail(f"{sentence}: see {PAGE}#{section}", pytrace=False)


def fail_if_reported(run: Run, check: str, rule: str) -> None:
    """Fail if the measurement refused what the engine reported, and *check* is the one that reports it."""
    if run.error is not None and run.reported_by == check:
        fail(f"{run.error.message}, and {rule}", "records")


def skip_if_refused(run: Run, what: str) -> None:
    if run.refusal is not None:
        pytest.skip(f"the engine refuses {what}: {run.refusal}")


def require_refusal(run: Run, given: str) -> None:
    """Fail unless an experiment with the invalid setting *given* was refused before the model was loaded."""
    error = run.error
    if error is not None and error.kind == "preflight" and error.phase in _BEFORE_LOAD:
        return
    ended = "gave a result" if error is None else f"failed while {error.phase} ({error.type})"
    fail(f"an experiment with {given}, {ended}, and has to be refused before the model is loaded", "options")


def fail_if_alive(run: Run) -> None:
    """Fail if a process of the experiment still runs."""
    started = {tuple(one) for note in run.noted("processes") for one in note["processes"]}
    deadline = time.monotonic() + _GONE_SECONDS
    while alive := [pid for pid, created in started if pid != os.getpid() and _runs(pid, created)]:
        if time.monotonic() > deadline:
            pids = ", ".join(map(str, sorted(alive)))
            fail(f"processes {pids} still ran after the experiment, and none of it may be left", "processes")
        time.sleep(0.05)


def input_tokens(run: Run) -> tuple[list[int], list[int | None]]:
    """Return the number of tokens of each prompt of a pass, and those that the records of the first pass report.

    Skip the test if there are no records, or not as many as prompts.
    """
    prepared = [note["lengths"] for note in run.noted("prepare")]
    reported = [tokens for note in run.noted("requests") for tokens in note["input_tokens"]]
    if not prepared or not reported or run.reported_by == "test_records_are_one_for_each_prompt_in_order":
        run.require_result(run.reported_by)
        pytest.skip("the engine returned no records")
    lengths: list[int] = prepared[-1]
    return lengths, reported[: len(lengths)]


def digest(run: Run, reported_by: str | None = None) -> str:
    digest = run.require_result(reported_by).tokens.output_digest
    if digest is None:
        pytest.skip("the engine does not return its output")
    return digest


def first_line(error: ErrorRecord) -> str:
    return f"{error.type}: {error.message.strip().partition(chr(10))[0]}"


def _merged(fields: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return *fields* with *changes*; sections are merged, except for ``decoder`` and ``dataset``."""
    merged = dict(fields)
    for name, value in changes.items():
        old = merged.get(name)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and name not in ("decoder", "dataset"):
            value = {**old, **value}
        merged[name] = value
    return merged


def _runs(pid: int, created: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
