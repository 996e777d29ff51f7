"""Run studies and experiments from Python, without a pytest command line."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pytest_llem.results.carbon import Carbon
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.study_result import StudyResult
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.loading import load_study


class StudyRunError(RuntimeError):
    """pytest ended without a StudyResult; with ``quiet=True`` the message ends with pytest's output.

    Example:
        try:
            result = run_study("studies/llama.yaml", quiet=True)
        except StudyRunError as error:
            print(error)
    """


def run_study(
    path: str | Path,
    *,
    select: str | None = None,
    results_dir: str | Path | None = None,
    model_path: str | Path | Sequence[str | Path] = (),
    carbon_intensity: float | None = None,
    pue: float | None = None,
    pytest_args: Sequence[str] = (),
    quiet: bool = False,
) -> StudyResult:
    """Run a study as ``pytest PATH -p llem`` does, in a separate pytest process, and return its result.

    Failed experiments and gates do not raise: see ``result.summary.failed``, ``result.experiments`` and the
    ``verdicts`` of ``result.points``.

    Example:
        result = run_study("studies/llama.yaml", select="batch_size=8")
        for point in result.points:
            print(point.id, point.metrics["energy_per_output_token_j"].mean)

    Args:
        path: The study file.
        select: A ``-k`` expression, such as ``"batch_size=8"``.
        results_dir: Parent of the study's results folder, relative to the current directory. None uses the study's
            ``output_dir``, else the ini option ``llem_results_dir``, else ``results``, each relative to pytest's
            rootdir.
        model_path: Folder, or folders, that hold models by name, searched before the Hugging Face hub. Empty uses
            the ini option ``llem_model_path``.
        carbon_intensity: Emissions of the electricity, in gCO2e per kWh. None uses the ini option
            ``llem_carbon_intensity``.
        pue: Power usage effectiveness of the site, 1 or more. None uses the ini option ``llem_pue``.
        pytest_args: Further arguments for pytest, such as ``["-x", "--llem-resume"]``.
        quiet: Do not show pytest's output.

    Raises:
        StudyError: The study file is invalid.
        StudyRunError: pytest ended without a result.
        TypeError: *pytest_args* is a string.
        KeyboardInterrupt: Ctrl-C was pressed. pytest has written the results so far.
    """
    # Here, so that pytest_llem.api imports no pytest: results are read without it.
    from pytest_llem._plugin import results_dir_note

    if isinstance(pytest_args, str):
        arguments = shlex.split(pytest_args)
        raise TypeError(f"pytest_args must be a list of arguments: {arguments} (got {pytest_args!r})")
    path = Path(path).expanduser().resolve()
    load_study(path)  # raises StudyError before pytest starts
    command = [sys.executable, "-m", "pytest", str(path), "-p", "llem", "-p", results_dir_note.__name__]
    if results_dir is not None:
        command += ["--llem-results-dir", str(Path(results_dir).expanduser().resolve())]
    if select is not None:
        command += ["-k", select]
    if folders := _folders(model_path):
        # pytest splits ini options of type "paths" as a shell splits words.
        command += ["-o", f"llem_model_path={shlex.join(map(str, folders))}"]
    for name, value in (("llem_carbon_intensity", carbon_intensity), ("llem_pue", pue)):
        if value is not None:
            command += ["-o", f"{name}={value}"]
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder, "note")
        process = subprocess.Popen(
            [*command, *pytest_args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if quiet else None,
            stderr=subprocess.STDOUT if quiet else None,
            env={**os.environ, results_dir_note.VARIABLE: str(note)},
            text=True,
        )
        try:
            stdout, _ = process.communicate()
        except BaseException as error:
            if not isinstance(error, KeyboardInterrupt):  # Ctrl-C has reached pytest, too
                process.send_signal(signal.SIGINT)
            process.communicate()  # while pytest writes what it has; another Ctrl-C ends the wait
            raise
        if not note.is_file():
            output = f":\n{stdout}" if stdout else ", see its output above"
            raise StudyRunError(f"pytest ended with status {process.returncode} and left no result{output}")
        return StudyResult.load(Path(note.read_text(encoding="utf-8"), "study_result.json"))


def run_experiment(
    config: ExperimentConfig | Mapping[str, Any],
    *,
    model_path: str | Path | Sequence[str | Path] = (),
    carbon_intensity: float | None = None,
    pue: float = 1.0,
) -> ExperimentResult:
    """Run one experiment in this process and return its result.

    The experiment is not isolated: earlier work in this process can affect its figures. Use ``run_study`` for
    isolation.

    Example:
        result = run_experiment({"model": "builtin:tiny-llama", "n": 8, "max_output_tokens": 16})
        print(result.metrics["output_tokens_per_second"].value)

    Args:
        config: The experiment, or its fields.
        model_path: Folder, or folders, that hold models by name, searched before the Hugging Face hub.
        carbon_intensity: Emissions of the electricity, in gCO2e per kWh. None leaves ``gco2e_g`` null.
        pue: Power usage effectiveness of the site, 1 or more.

    Raises:
        ValueError: *carbon_intensity* or *pue* is out of range.
        pydantic.ValidationError: *config* is not a valid experiment.
        PreflightError: The experiment cannot run here, such as without its model; the message says why.
    """
    from pytest_llem.engines.protocol import EngineContext
    from pytest_llem.measurement.orchestrator import ExperimentOrchestrator

    if not isinstance(config, ExperimentConfig):
        config = ExperimentConfig.model_validate(config)
    context = EngineContext(model_path=_folders(model_path))
    factors = Carbon(carbon_intensity or 0.0, pue)  # checks pue also if no intensity is given
    carbon = None if carbon_intensity is None else factors
    return ExperimentOrchestrator(config, context=context, carbon=carbon).run().result


def _folders(given: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """Return the absolute paths of one folder or of several."""
    paths = [given] if isinstance(given, str | Path) else given
    return tuple(Path(path).expanduser().resolve() for path in paths)
