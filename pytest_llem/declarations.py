"""Command-line options and their ini twins, as ``pytest --help`` has them."""

from __future__ import annotations

import pytest


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
        "--llem-resume-anyway",
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
        "--llem-compare-anyway",
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
    parser.addini(
        "llem_results_dir", "where each study's results folder goes, relative to rootdir", default="results"
    )
    parser.addini("llem_cycles", "repetitions of every point, whatever the study says", default="")
    parser.addini("llem_fail_on", "regression, or inconclusive: the verdicts that fail a comparison", default="")
    parser.addini("llem_order", "sequential, interleaved or shuffled, whatever the study says", default="")
    parser.addini(
        "llem_timeout", "seconds after which an experiment is ended, whatever the study says", default=""
    )
    parser.addini("llem_start_method", "spawn or forkserver, whatever the study says", default="")
    parser.addini("llem_no_gaps", "no idle time between experiments", type="bool", default=False)
    parser.addini(
        "llem_strict", "a combination that makes no valid experiment is an error", type="bool", default=False
    )
    parser.addini("llem_max_experiments", "a study of more experiments needs --llem-yes", default="500")
    parser.addini(
        "llem_model_path",
        "folders that hold models by name, looked in before the Hugging Face hub",
        type="paths",
        default=[],
    )
    parser.addini(
        "llem_carbon_intensity",
        "what electricity emits here, in gCO2e per kWh; without it gco2e_g is null",
        default="",
    )
    parser.addini("llem_pue", "power usage effectiveness of the site, for gco2e_g; default 1", default="")
    parser.addini(
        "llem_files",
        "file names taken as studies when pytest walks a directory; a YAML named on the command line always is",
        type="args",
        default=["*.study.yaml", "*.study.yml"],
    )
