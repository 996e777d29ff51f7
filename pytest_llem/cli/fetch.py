"""Declare ``llem fetch``, which downloads the models and datasets of studies before a run."""

from __future__ import annotations

import argparse

from pytest_llem.cli.command import DONE, FAILED, Commands, add_command, path

_DESCRIPTION = """\
Download the models and datasets of studies, so that a later run needs no
network. Prints one line for each.

Models are searched as in a run: also in the folders of the ini option
llem_model_path. Downloads from the Hugging Face hub go into its cache
(HF_HOME). With HF_HUB_OFFLINE=1 nothing is downloaded.
"""

_EXAMPLES = """\
  llem fetch studies/*.yaml
  HF_HUB_OFFLINE=1 llem fetch studies/llama.yaml   # check only
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add the command to *commands*."""
    parser = add_command(
        commands,
        "fetch",
        _run,
        summary="download the models and datasets of studies",
        description=_DESCRIPTION,
        statuses={DONE: "everything is available", FAILED: "something is not available, or a study is invalid"},
        examples=_EXAMPLES,
    )
    parser.add_argument("studies", metavar="STUDY", nargs="+", type=path, help="a study file")
    parser.add_argument(
        "--model-path",
        metavar="DIR",
        action="append",
        default=[],
        type=path,
        help="folder that contains models by name, which need no download; may be given several times",
    )


def _run(options: argparse.Namespace) -> int:
    from pytest_llem.cli.downloads import fetch

    return fetch(options.studies, options.model_path)
