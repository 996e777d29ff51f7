"""Read and check the options of the command line and of the ini file.

Imported only if an option is set or a study is collected.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from pytest_llem._plugin.option_values import (
    flag,
    read_duration,
    read_ini,
    read_number,
    read_one_of,
    read_option,
    read_path,
    read_seconds,
    read_whole_number,
)

if TYPE_CHECKING:
    from pytest_llem.planning.worktree import Worktree
    from pytest_llem.study.design import Shard, StudyConfig
    from pytest_llem.study.execution import CycleOrder, Overrides, StartMethod

#: Prefix of a git revision in ``--llem-against``.
GIT = "git:"

#: The worktree of the git revision in ``--llem-against``.
WORKTREE: pytest.StashKey[Worktree] = pytest.StashKey()

# Repeated from study.execution, because that is imported only if there is a study.
_ORDERS: tuple[CycleOrder, ...] = ("sequential", "interleaved", "shuffled")
_INTERLEAVE = ("pass", "cycle")
_START_METHODS: tuple[StartMethod, ...] = ("spawn", "forkserver")

#: Verdicts that fail a comparison: regressions only, or inconclusive ones too.
FailOn = Literal["regression", "inconclusive"]
_FAIL_ON: tuple[FailOn, ...] = ("regression", "inconclusive")

#: Options that have no effect unless one of the listed options is given.
_NEEDS = {
    "llem_resume_mismatch": ("llem_resume", "llem_resume_from"),
    "llem_compare_mismatch": ("llem_baseline", "llem_against"),
    "llem_baseline_max_age": ("llem_baseline",),
    "llem_baseline_dir": ("llem_baseline", "llem_save"),
    "llem_save_partial": ("llem_save",),
    "llem_save_force": ("llem_save",),
}

#: Options that must not be empty.
_NOT_EMPTY = ("llem_plan", "llem_html", "llem_resume_from", "llem_baseline", "llem_against")


@dataclass(frozen=True)
class Settings:
    """Values of the command-line and ini options, checked.

    Each field is named after its option, which :mod:`pytest_llem._plugin.declarations` explains. Only fields that
    differ from their option are listed below. None means that the option is not given, so that the study or a
    default decides. Times are in s.

    Attributes:
        results_dir_given: Whether *results_dir* is from the command line, which overrides the study.
        resume: Whether completed experiments are replayed: those of the run *resume_from*, or, if that is None, of
            the newest run with the study's design hash; and those of the runs that it was resumed from.
        order: ``cycle_order`` of the studies.
        against: Python interpreter of the reference. For a git revision, a script in its worktree.
        against_name: Name of the reference in tables.
        max_experiments: Maximum number of a study's experiments; None if ``--llem-yes`` lifts it.
        timeout: Deadline of every experiment, without downloads.
        carbon: ``intensity`` of the site's electricity in gCO2e/kWh, and its ``pue``; None without an intensity.
    """

    results_dir: Path
    results_dir_given: bool
    run_id: str | None
    plan: Path | None
    html: Path | None
    resume: bool
    resume_from: Path | None
    resume_mismatch: bool
    cycles: int | Literal["auto"] | None
    order: CycleOrder | None
    start_method: StartMethod | None
    no_gaps: bool
    strict: bool
    baseline: str | None
    baseline_dir: Path
    baseline_max_age: float | None
    against: Path | None
    against_name: str | None
    interleave: str | None
    save: str | None
    save_partial: bool
    save_force: bool
    compare_mismatch: bool
    fail_on: FailOn
    max_experiments: int | None
    time_budget: float | None
    shard: Shard | None
    timeout: float | None
    model_path: tuple[Path, ...]
    carbon: dict[str, float] | None

    @classmethod
    def from_config(cls, config: pytest.Config) -> Settings:
        """Return the settings. The command line overrides the ini file.

        Raises:
            pytest.UsageError: An option or an ini value is invalid.
        """
        read_ini(config, "llem_files")  # reports an invalid value
        for option in _NOT_EMPTY:
            if config.getoption(option) == "":
                raise pytest.UsageError(f"{flag(option)}: must not be empty")
        for option in ("llem_run_id", "llem_save"):
            name = config.getoption(option)
            if name is not None and not _is_name(name):
                raise pytest.UsageError(f"{flag(option)}: must be a name without path separators (got {name!r})")
        for option, others in _NEEDS.items():
            if config.getoption(option) and not any(map(config.getoption, others)):
                raise pytest.UsageError(f"{flag(option)}: needs {' or '.join(map(flag, others))}")
        resume_from = config.getoption("llem_resume_from")
        resume = config.getoption("llem_resume") or resume_from is not None
        baseline, against = config.getoption("llem_baseline"), _against(config)
        if baseline and against:
            raise pytest.UsageError("--llem-against: cannot be used with --llem-baseline: give one of them")
        if against and resume:
            raise pytest.UsageError(
                "--llem-resume and --llem-resume-from: cannot be used with --llem-against, "
                "which measures both sides anew"
            )
        if config.getoption("llem_save") and config.getoption("llem_shard"):
            raise pytest.UsageError("--llem-save: cannot be used with --llem-shard: save the merged results")
        return cls(
            results_dir=_folder(config, "llem_results_dir"),
            results_dir_given=config.getoption("llem_results_dir") is not None,
            run_id=config.getoption("llem_run_id"),
            plan=_file(config, "llem_plan"),
            html=_file(config, "llem_html"),
            resume=resume,
            resume_from=found.resolve() if (found := _file(config, "llem_resume_from")) else None,
            resume_mismatch=config.getoption("llem_resume_mismatch"),
            cycles=_cycles(config),
            order=read_one_of(config, "llem_order", _ORDERS),
            start_method=read_one_of(config, "llem_start_method", _START_METHODS),
            no_gaps=config.getoption("llem_no_gaps") or read_ini(config, "llem_no_gaps"),
            strict=config.getoption("llem_strict") or read_ini(config, "llem_strict"),
            baseline=baseline,
            baseline_dir=_folder(config, "llem_baseline_dir"),
            baseline_max_age=read_duration(config, "llem_baseline_max_age"),
            against=against,
            against_name=_against_name(config, against),
            interleave=read_one_of(config, "llem_interleave", _INTERLEAVE),
            save=config.getoption("llem_save"),
            save_partial=config.getoption("llem_save_partial"),
            save_force=config.getoption("llem_save_force"),
            compare_mismatch=config.getoption("llem_compare_mismatch"),
            fail_on=read_one_of(config, "llem_fail_on", _FAIL_ON) or "regression",
            max_experiments=None
            if config.getoption("llem_yes")
            else read_whole_number("llem_max_experiments", read_ini(config, "llem_max_experiments")),
            time_budget=read_duration(config, "llem_time_budget"),
            shard=_shard(config),
            timeout=read_seconds(config, "llem_timeout"),
            model_path=tuple(read_ini(config, "llem_model_path")),
            carbon=_carbon(config),
        )

    def results_dir_of(self, study: StudyConfig, rootdir: Path) -> Path:
        """Return the folder for a study's runs, from the command line, else the study, else the ini file."""
        if study.output_dir is None or self.results_dir_given:
            return self.results_dir
        return rootdir / Path(study.output_dir).expanduser()

    @property
    def overrides(self) -> Overrides:
        """Settings that override those of a study file."""
        from pytest_llem.study.execution import Overrides

        return Overrides(
            n_cycles=self.cycles,
            cycle_order=self.order,
            start_method=self.start_method,
            no_gaps=self.no_gaps,
            strict=self.strict,
            max_experiments=self.max_experiments,
            timeout_seconds=self.timeout,
            interleave=self.interleave,
        )


class _ConfigReader:
    """A plugin that ends pytest once it has read its command line and ini file."""

    def __init__(self) -> None:
        self.config: pytest.Config | None = None
        self.path: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_cmdline_main(self, config: pytest.Config) -> int:
        Settings.from_config(config)
        self.config, self.path = config, sys.path[:]
        return 0


def read_config(paths: Sequence[Path]) -> pytest.Config | None:
    """Return the configuration of ``pytest PATHS -p llem`` and extend ``sys.path`` as pytest does.

    Nothing is collected.

    Returns:
        None if an option is invalid; pytest has reported it on standard error.
    """
    reader = _ConfigReader()
    pytest.main([*(str(path.absolute()) for path in paths), "-p", "llem"], plugins=[reader])
    if reader.config is not None:
        sys.path[:] = reader.path  # pytest.main() has removed the entries of the ini option pythonpath
    return reader.config


def _is_name(text: str) -> bool:
    return text not in {"", ".", ".."} and not set(text) & set("/\\") and text.isprintable()


def _folder(config: pytest.Config, option: str) -> Path:
    """Return the path in an option, else in its ini option, relative to rootdir."""
    name, given = read_option(config, option)
    if not given:
        raise pytest.UsageError(f"{name}: must not be empty")
    return read_path(name, config.rootpath, given)


def _file(config: pytest.Config, option: str) -> Path | None:
    """Return the path in an option, relative to the current folder; None if it is not given."""
    given = config.getoption(option)
    return None if given is None else read_path(flag(option), config.invocation_params.dir, given)


def _cycles(config: pytest.Config) -> int | Literal["auto"] | None:
    name, text = read_option(config, "llem_cycles")
    return text if text in (None, "auto") else read_whole_number(name, text)


def _carbon(config: pytest.Config) -> dict[str, float] | None:
    intensity = read_number(config, "llem_carbon_intensity", 0, "a number of gCO2e per kWh")
    pue = read_number(config, "llem_pue", 1, "a number, at least 1") or 1.0
    return None if intensity is None else {"intensity": intensity, "pue": pue}


def _shard(config: pytest.Config) -> Shard | None:
    from pytest_llem.study.design import Shard

    given = config.getoption("llem_shard")
    try:
        return None if given is None else Shard.parse(given)
    except ValueError as error:
        raise pytest.UsageError(f"--llem-shard: {error}") from None


def _against(config: pytest.Config) -> Path | None:
    """Return the Python interpreter of the reference; None without ``--llem-against``.

    Links are not followed, because the interpreter of a virtual environment is a link.
    """
    given = config.getoption("llem_against")
    if not given:
        return None
    if given.startswith(GIT):
        return worktree_of(config, given.removeprefix(GIT)).python
    path = read_path("--llem-against", config.invocation_params.dir, given)
    if not path.is_file() or not os.access(path, os.X_OK):
        raise pytest.UsageError(f"--llem-against: must be git:REVISION or a Python interpreter (got {given!r})")
    return Path(os.path.abspath(path))  # noqa: PTH100 (Path.resolve follows links)


def _against_name(config: pytest.Config, against: Path | None) -> str | None:
    if WORKTREE in config.stash:
        return config.stash[WORKTREE].name
    return None if against is None else str(against)


def worktree_of(config: pytest.Config, revision: str) -> Worktree:
    """Return the worktree of a git revision. The controller makes it once, and removes it when pytest ends.

    Raises:
        pytest.UsageError: The revision cannot be measured.
    """
    from pytest_llem.planning.worktree import RevisionError, Worktree, add_worktree

    if WORKTREE not in config.stash:
        if hasattr(config, "workerinput"):
            folder, repository, revision, commit = config.workerinput["llem_worktree"]
            config.stash[WORKTREE] = Worktree(Path(folder), Path(repository), revision, commit)
        else:
            try:
                made = add_worktree(config.rootpath, revision, [Path(one) for one in sys.path])
            except RevisionError as error:
                raise pytest.UsageError(f"--llem-against: {error}") from None
            config.stash[WORKTREE] = made
            config.add_cleanup(made.remove)
    return config.stash[WORKTREE]
