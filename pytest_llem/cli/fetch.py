"""``llem fetch``: models and datasets, ahead of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from pytest_llem.cli.command import DONE, FAILED, Commands, need_output
from pytest_llem.cli.command import add as add_command

_DESCRIPTION = """\
Bring the models and datasets of studies to this machine ahead of a run, which
may then have no network. Tells of each in a line.

Models are looked for as pytest does, in the folders of its ini option
llem_model_path too; what comes from the Hugging Face hub goes into its cache
(HF_HOME). With HF_HUB_OFFLINE=1 nothing is downloaded.
"""

_EXAMPLES = """\
  llem fetch studies/*.yaml
  HF_HUB_OFFLINE=1 llem fetch studies/llama.yaml   # is all of it here?
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "fetch",
        _run,
        summary="download the models and datasets of studies",
        description=_DESCRIPTION,
        statuses={DONE: "all of it is here", FAILED: "something is not to be had, or a study is wrong"},
        examples=_EXAMPLES,
    )
    parser.add_argument("studies", metavar="STUDY", nargs="+", type=Path, help="a study file")
    parser.add_argument(
        "--model-path",
        metavar="DIR",
        action="append",
        default=[],
        type=Path,
        help="a folder that holds models by name, which need no download; may be given several times",
    )


def _run(options: argparse.Namespace) -> int:
    need_output()
    from pytest_llem.cli.needs import fetch

    return fetch(options.studies, options.model_path)
