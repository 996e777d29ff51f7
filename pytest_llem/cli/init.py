"""``llem init``: write a first study for the model and the devices of this machine, and a CI job."""

from __future__ import annotations

import argparse
import re
import shlex
from importlib.resources import files
from pathlib import Path

from pytest_llem.cli.command import (
    DONE,
    NOT_RUN,
    Commands,
    add_command,
    not_empty,
    path,
    print_error,
    write,
)

BUILTIN = "builtin:tiny-llama"

#: The file of the job, by CI system.
CI_FILES = {
    "github": ".github/workflows/energy.yml",
    "github-main": ".github/workflows/energy-main.yml",
    "gitlab": "energy.gitlab-ci.yml",
}

_DESCRIPTION = f"""\
Write a commented study for a model and for the devices of this machine, and
with --ci a job that runs it for each pull or merge request, or with
--ci github-main for each push to main: it saves a baseline and appends to a
history, both in the branch llem. Files that exist are kept.

Without --model the study uses {BUILTIN}: random weights, made on first
use, without a download. It shows that everything works; measure with a real
model.
"""

_STUDY = """\
# Run this study:               pytest {file} -p llem
# List its points, run nothing: pytest {file} -p llem --collect-only
name: {name}
model: {model}

n: {n}  # prompts in one pass over the data
max_input_tokens: {tokens}  # synthetic prompts have exactly this many tokens
max_output_tokens: {output}  # and every answer exactly this many

sweep:  # every combination is a point
  precision: [{precision}]
  pytorch.batch_size: [1, {n}]

# {energy}
{settings}
execution:
  n_cycles: 3  # each point three times, each time in a new process; 5 or more for gates

# A budget fails the run if the mean of a metric is beyond its limit. Take the limits from your first run.
# budgets:
#   {metric}: {{{limit}: 1.0}}

# A comparison gates a change without a limit. It needs a baseline (--llem-save main, then --llem-baseline main)
# or a branch (--llem-against=git:main).
# gates:
#   metrics: [{metric}]
"""

_ON_GPU = """\
# The default warm-up runs until latencies settle, and the default window of 10 s holds enough counter ticks.
baseline: {duration_seconds: 10}  # idle power
"""

_ON_CPU = """\
# Short, to try it. For figures to rely on, remove these three lines: the defaults measure 10 s of a warm machine.
warmup: {n_warmup: 2, max_prompts: 10}
baseline: {duration_seconds: 5}
measurement: {min_window_seconds: 2}
"""


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Declare the command."""
    parser = add_command(
        commands,
        "init",
        _run,
        summary="write a first study for this machine, and a CI job",
        description=_DESCRIPTION,
        statuses={DONE: "done"},
        examples="  llem init\n  llem init studies/llama.yaml --model meta-llama/Llama-3.2-1B --ci github",
    )
    parser.add_argument(
        "file",
        metavar="FILE",
        nargs="?",
        type=path,
        default="study.yaml",
        help="study to write; default: study.yaml",
    )
    parser.add_argument(
        "--model",
        default=BUILTIN,
        type=not_empty,
        help="a folder, a model of the Hugging Face hub, or " + BUILTIN + " (default)",
    )
    parser.add_argument(
        "--ci", choices=CI_FILES, help="also write a job that compares with the main branch, or that measures it"
    )


def _run(options: argparse.Namespace) -> int:
    from pytest_llem._plugin.declarations import YAML_SUFFIXES
    from pytest_llem.results.manifest import write_atomically

    study: Path = options.file
    if study.suffix not in YAML_SUFFIXES:
        print_error(f"{study}: the name of a study ends with {' or '.join(YAML_SUFFIXES)}")
        return NOT_RUN
    texts = {study: _study(study, options.model)}
    if options.ci is not None:
        texts[Path(CI_FILES[options.ci])] = _ci_job(options.ci, study)
    existing = [file for file in texts if file.exists()]
    if len(existing) == len(texts):
        print_error(f"{', '.join(map(str, existing))}: exists already, nothing was written")
        return NOT_RUN
    for file, text in texts.items():
        if file not in existing:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, text)
        write(f"{'kept' if file in existing else 'wrote'} {file}\n")
    if options.ci == "gitlab":
        write(f"add to .gitlab-ci.yml:  include: {{local: {CI_FILES['gitlab']}}}\n")
    write(f"next: pytest {shlex.quote(str(study))} -p llem\n")
    return DONE


def _study(file: Path, model: str) -> str:
    """Return a study of *model* with settings that suit this machine's devices. No CUDA context is created."""
    from pytest_llem.catalogue import CATALOGUE
    from pytest_llem.planning.host import this_host

    gpus = this_host().gpus
    has_bf16 = all(gpu.capability >= (8, 0) for gpu in gpus)
    energy, metric = _energy([gpu.name for gpu in gpus])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rpartition(":")[2].rstrip("/").rpartition("/")[2]).strip("-.")
    return _STUDY.format(
        file=shlex.quote(str(file)),
        name=_scalar(name.lower() or "study"),
        model=_scalar(model),
        n=32 if gpus else 8,
        tokens=256 if gpus else 64,
        output=128 if gpus else 32,
        precision=("bf16, fp16" if has_bf16 else "fp16, fp32") if gpus else "bf16, fp32",
        energy=energy,
        settings=(_ON_GPU if gpus else _ON_CPU).rstrip(),
        metric=metric,
        limit="max" if CATALOGUE[metric].better == "lower" else "min",
    )


def _scalar(text: str) -> str:
    """Return *text* as a YAML scalar, in quotes if it needs them."""
    import yaml

    return yaml.safe_dump(text, allow_unicode=True, width=10_000).partition("\n")[0]


def _energy(gpus: list[str]) -> tuple[str, str]:
    """Return a sentence on how energy is obtained on this machine, and a metric that can be gated there."""
    from pytest_llem.doctor.host import rapl

    if gpus:
        return f"Energy: NVML, of {', '.join(dict.fromkeys(gpus))}.", "energy_per_output_token_j"
    if (error := rapl().error) is None:
        return "Energy: RAPL, of the CPU packages.", "energy_per_output_token_j"
    return f"Energy: estimated from CPU time, and not gated (RAPL: {error}).", "output_tokens_per_second"


def _ci_job(system: str, study: Path) -> str:
    template = files("pytest_llem") / "cli" / "templates" / f"{system}.yml"
    return template.read_text(encoding="utf-8").replace("studies/llama.yaml", shlex.quote(study.as_posix()))
