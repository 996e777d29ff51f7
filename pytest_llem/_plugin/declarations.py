"""Declare the command-line options, the ini options and the marker."""

from __future__ import annotations

from typing import Any, Literal

import pytest

#: The marker that gives an ordinary test an energy budget.
ENERGY_BUDGET = "energy_budget"

#: Text of ``pytest --markers``.
MARKER_HELP = (
    f"{ENERGY_BUDGET}(*, joules=None, seconds=None, allow_estimated=False): "
    "fail the test if its call takes more energy (J) or time (s); estimated energy needs allow_estimated"
)

#: Suffixes of files that may be studies.
YAML_SUFFIXES = (".yaml", ".yml")

#: Suffixes of files that may be results.
RESULT_SUFFIXES = (".json", ".jsonl", ".csv")

#: Metavariable and help text of each option; None for a flag.
OPTIONS: dict[str, tuple[str | None, str]] = {
    "--llem-results-dir": (
        "DIR",
        "parent of the results folders, relative to rootdir (default: the study's output_dir, else ini "
        "llem_results_dir, else results)",
    ),
    "--llem-run-id": (
        "ID",
        "name the results folder STUDY_ID, with a number appended if that exists (default ID: the time)",
    ),
    "--llem-resume": (
        None,
        "replay the completed experiments of earlier runs of the same design instead of running them",
    ),
    "--llem-resume-from": ("DIR", "like --llem-resume, from the results folder DIR"),
    "--llem-resume-mismatch": (
        None,
        "resume even if the design, the device or package versions have changed since",
    ),
    "--llem-save": (
        "NAME",
        "save the results as the baseline NAME of this testbed, in the folder of the baselines",
    ),
    "--llem-save-partial": (None, "save even if an experiment failed or was not selected"),
    "--llem-save-force": (
        None,
        "save even results that are contended, replayed or invalid, that have no value for a gate, or that "
        "regressed from the baseline NAME",
    ),
    "--llem-baseline": (
        "NAME|FILE",
        "compare with the baseline NAME of this testbed or a saved result FILE: each metric of each point "
        "becomes a test",
    ),
    "--llem-baseline-dir": (
        "DIR",
        "folder of the baselines, relative to rootdir (ini: llem_baseline_dir; default: .llem/baselines)",
    ),
    "--llem-baseline-max-age": (
        "AGE",
        "refuse a baseline that was measured longer than AGE (90s, 15m, 2h, 30d) ago (ini: llem_baseline_max_age)",
    ),
    "--llem-budgets": (
        "FILE",
        "judge the result files that are named on the command line, of other tools or studies, by the budgets in "
        "the YAML FILE: each budget of each point becomes a test",
    ),
    "--llem-against": (
        "REFERENCE",
        "compare with git:REVISION, the code of a branch or commit, or with the Python interpreter of an "
        "environment; both are measured, interleaved",
    ),
    "--llem-interleave": (
        "WHAT",
        "what alternates with --llem-against: pass (both are loaded, and measure alternately) or cycle (one "
        "whole experiment after the other); overrides the study (ini: llem_interleave; default: pass)",
    ),
    "--llem-compare-mismatch": (None, "compare even if the device, the data or the measurement settings differ"),
    "--llem-fail-on": (
        "VERDICT",
        "verdicts that fail a comparison: regression, or inconclusive (both) (ini: llem_fail_on; default: "
        "regression)",
    ),
    "--llem-cycles": (
        "N",
        "repetitions of every point, at least 1, or auto: until every gate is decided; overrides the study (ini: "
        "llem_cycles)",
    ),
    "--llem-time-budget": (
        "TIME",
        "start no experiment that would probably end later than TIME (90s, 15m, 2h) after the run's start",
    ),
    "--llem-shard": (
        "I/N",
        "run only part I, from 1, of N equal parts of each study, the same on every machine; llem merge joins "
        "the results of all parts, and judges the gates",
    ),
    "--llem-order": (
        "ORDER",
        "order of experiments: sequential, interleaved or shuffled; overrides the study (ini: llem_order)",
    ),
    "--llem-timeout": (
        "SECONDS",
        "end an experiment that takes longer; overrides the study; downloads do not count (ini: llem_timeout; "
        "default: from the model's size, prompts and tokens)",
    ),
    "--llem-start-method": (
        "METHOD",
        "start of experiment processes: spawn, or forkserver, which forks them from a process that has imported "
        "what they need; overrides the study (ini: llem_start_method)",
    ),
    "--llem-no-gaps": (None, "no idle time between experiments (ini: llem_no_gaps)"),
    "--llem-strict": (
        None,
        "report invalid combinations of a sweep as errors instead of leaving them out (ini: llem_strict)",
    ),
    "--llem-yes": (None, "run studies of more experiments than ini llem_max_experiments (default 500)"),
    "--llem-plan": ("FILE", "write the plan to FILE as JSON; with --collect-only nothing is run"),
    "--llem-html": (
        "FILE",
        "write an HTML report to FILE; with several studies, each study's name is added to FILE (needs "
        "pytest-llem[report])",
    ),
}

#: Type, default and help text of each ini option.
INI: dict[str, tuple[Literal["string", "bool", "paths", "args"], Any, str]] = {
    "llem_results_dir": (
        "string",
        "results",
        "parent of the results folders of studies without output_dir, relative to rootdir",
    ),
    "llem_baseline_dir": ("string", ".llem/baselines", "folder of the baselines, relative to rootdir"),
    "llem_baseline_max_age": (
        "string",
        "",
        "age (90s, 15m, 2h, 30d) from which a baseline is refused; default: any age",
    ),
    "llem_cycles": ("string", "", "repetitions of every point, at least 1, or auto; overrides the study"),
    "llem_fail_on": (
        "string",
        "",
        "verdicts that fail a comparison: regression, or inconclusive (both); default regression",
    ),
    "llem_order": ("string", "", "order of experiments: sequential, interleaved or shuffled; overrides the study"),
    "llem_interleave": ("string", "", "what alternates with --llem-against: pass or cycle; overrides the study"),
    "llem_timeout": ("string", "", "seconds after which an experiment is ended, above 0; overrides the study"),
    "llem_start_method": ("string", "", "start of experiment processes: spawn or forkserver; overrides the study"),
    "llem_no_gaps": ("bool", False, "no idle time between experiments"),
    "llem_strict": ("bool", False, "report invalid combinations of a sweep as errors instead of leaving them out"),
    "llem_max_experiments": (
        "string",
        "500",
        "number of experiments above which a study needs --llem-yes, at least 1",
    ),
    "llem_model_path": ("paths", [], "folders that hold models by name, searched before the Hugging Face hub"),
    "llem_carbon_intensity": (
        "string",
        "",
        "emissions of the electricity, in gCO2e per kWh, at least 0; without it gco2e_g is null",
    ),
    "llem_pue": ("string", "", "power usage effectiveness of the site, for gco2e_g, at least 1; default 1"),
    "llem_files": (
        "args",
        ["*.study.yaml", "*.study.yml"],
        "patterns of study files in directories; a YAML file named on the command line is always a study",
    ),
}


def add_options(parser: pytest.Parser) -> None:
    """Add all options, in one group of ``pytest --help``, and all ini options."""
    group = parser.getgroup("llem", "energy studies of LLM inference")
    for name, (metavar, text) in OPTIONS.items():
        if metavar is None:
            group.addoption(name, action="store_true", help=text)
        else:
            group.addoption(name, metavar=metavar, help=text)
    for name, (type_, default, text) in INI.items():
        parser.addini(name, text, type=type_, default=default)


def is_any_option_given(config: pytest.Config) -> bool:
    """Return whether the command line or the ini file sets any option of this plugin, valid or not."""
    given = (value for name, value in vars(config.option).items() if name.startswith("llem_"))
    if any(value is not None and value is not False for value in given):
        return True
    try:
        return any(config.getini(name) != default for name, (_, default, _) in INI.items())
    except (TypeError, ValueError, pytest.UsageError):  # an invalid type or boolean, or an unclosed quote
        return True
