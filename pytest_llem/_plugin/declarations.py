"""Command-line options, their ini twins and the marker, as pytest's help has them."""

from __future__ import annotations

from typing import Any, Literal

import pytest

#: The marker that holds an ordinary test to a budget.
ENERGY_BUDGET = "energy_budget"

#: What ``pytest --markers`` says of it.
MARKER_HELP = (
    f"{ENERGY_BUDGET}(*, joules=None, seconds=None, allow_estimated=False): "
    "fail the test if its call takes more energy (J) or time (s); an estimate decides only where that is allowed"
)

#: Endings of a file that may be a study.
YAML_SUFFIXES = (".yaml", ".yml")

#: Type, default and help of each key of the ini file.
INI: dict[str, tuple[Literal["string", "bool", "paths", "args"], Any, str]] = {
    "llem_results_dir": (
        "string",
        "results",
        "where each study's results folder goes, relative to rootdir",
    ),
    "llem_cycles": ("string", "", "repetitions of every point, whatever the study says"),
    "llem_fail_on": ("string", "", "regression, or inconclusive: the verdicts that fail a comparison"),
    "llem_order": ("string", "", "sequential, interleaved or shuffled, whatever the study says"),
    "llem_timeout": ("string", "", "seconds after which an experiment is ended, whatever the study says"),
    "llem_start_method": ("string", "", "spawn or forkserver, whatever the study says"),
    "llem_no_gaps": ("bool", False, "no idle time between experiments"),
    "llem_strict": ("bool", False, "a combination that makes no valid experiment is an error"),
    "llem_max_experiments": ("string", "500", "a study of more experiments needs --llem-yes"),
    "llem_model_path": (
        "paths",
        [],
        "folders that hold models by name, looked in before the Hugging Face hub",
    ),
    "llem_carbon_intensity": (
        "string",
        "",
        "what electricity emits here, in gCO2e per kWh; without it gco2e_g is null",
    ),
    "llem_pue": ("string", "", "power usage effectiveness of the site, for gco2e_g; default 1"),
    "llem_files": (
        "args",
        ["*.study.yaml", "*.study.yml"],
        "file names taken as studies when pytest walks a directory; a YAML named on the command line always is",
    ),
}


def add_options(parser: pytest.Parser) -> None:
    """Declare everything under one heading of ``pytest --help``."""
    group = parser.getgroup("llem", "energy studies of LLM inference")
    group.addoption(
        "--llem-results-dir",
        metavar="DIR",
        help="where the results folders go, relative to rootdir (default: ini llem_results_dir, else results)",
    )
    group.addoption(
        "--llem-run-id",
        metavar="ID",
        help="name the results folder STUDY_ID, with a number behind it where that is taken (default: the time)",
    )
    group.addoption(
        "--llem-resume",
        action="store_true",
        help="do not run again what earlier runs of the same design have completed",
    )
    group.addoption(
        "--llem-resume-from",
        metavar="DIR",
        help="likewise, with the results folder DIR",
    )
    group.addoption(
        "--llem-resume-mismatch",
        action="store_true",
        help="also where the design, the device or the versions of packages have changed since",
    )
    group.addoption(
        "--llem-save",
        metavar="NAME",
        help="keep the results as the baseline NAME, in .llem/baselines below rootdir",
    )
    group.addoption(
        "--llem-save-partial",
        action="store_true",
        help="also those of a run in which an experiment failed, or was not selected",
    )
    group.addoption(
        "--llem-save-force",
        action="store_true",
        help="also results that are contended, replayed or invalid, or regressed from the baseline they replace",
    )
    group.addoption(
        "--llem-baseline",
        metavar="NAME|FILE",
        help="compare with the baseline NAME, or a saved result: each metric of each point becomes a test",
    )
    group.addoption(
        "--llem-against",
        metavar="PYTHON",
        help="compare with what the interpreter PYTHON measures, in turns with this one",
    )
    group.addoption(
        "--llem-compare-mismatch",
        action="store_true",
        help="also where the device, the data or the way of measuring differ",
    )
    group.addoption(
        "--llem-fail-on",
        metavar="VERDICT",
        help="regression, or inconclusive: then also what could not be decided "
        "(ini: llem_fail_on; default: regression)",
    )
    group.addoption(
        "--llem-cycles",
        metavar="N",
        help="repetitions of every point, whatever the study says (ini: llem_cycles)",
    )
    group.addoption(
        "--llem-order",
        metavar="ORDER",
        help="sequential, interleaved or shuffled, whatever the study says (ini: llem_order)",
    )
    group.addoption(
        "--llem-timeout",
        metavar="SECONDS",
        help="end an experiment that takes longer, whatever the study says; downloads do not count "
        "(ini: llem_timeout; default: from the model's size, prompts and tokens)",
    )
    group.addoption(
        "--llem-start-method",
        metavar="METHOD",
        help="spawn, or forkserver: fork experiments from a process that has imported what they need, "
        "whatever the study says (ini: llem_start_method)",
    )
    group.addoption(
        "--llem-no-gaps",
        action="store_true",
        help="no idle time between experiments (ini: llem_no_gaps)",
    )
    group.addoption(
        "--llem-strict",
        action="store_true",
        help="a combination that makes no valid experiment is an error, and not left out (ini: llem_strict)",
    )
    group.addoption(
        "--llem-yes",
        action="store_true",
        help="run a study of more experiments than ini llem_max_experiments (default 500)",
    )
    group.addoption(
        "--llem-plan",
        metavar="FILE",
        help="write what is to be run to FILE, as JSON; with --collect-only nothing else happens",
    )
    group.addoption(
        "--llem-html",
        metavar="FILE",
        help="write the results as a page to FILE; of several studies, each to FILE with its name in it "
        "(needs pytest-llem[report])",
    )
    for name, (type_, default, text) in INI.items():
        parser.addini(name, text, type=type_, default=default)


def is_any_option_given(config: pytest.Config) -> bool:
    """Whether the command line or the ini file says anything of ours, be it wrong."""
    given = (value for name, value in vars(config.option).items() if name.startswith("llem_"))
    if any(value is not None and value is not False for value in given):
        return True
    try:
        return any(config.getini(name) != default for name, (_, default, _) in INI.items())
    except (TypeError, ValueError, pytest.UsageError):  # no text, no truth value, or a quote that is not closed
        return True
