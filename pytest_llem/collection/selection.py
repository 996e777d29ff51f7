"""``-k axis=value``: exact selection of sweep points.

``=`` means nothing in pytest's ``-k`` grammar, and its plain substrings are traps (``8`` is in ``80``, ``float16``
in ``bfloat16``). So ``axis=value`` is rewritten to one bracketed keyword, ``[axis:value]``, which the items of
that point carry and no other name contains. Only expressions that used to be errors change their meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import yaml

from pytest_llem.study.identity import value_text
from pytest_llem.study.loading import Experiment, StudyConfig

_TERM = re.compile(r"""(?P<axis>[A-Za-z_][\w.]*)=(?P<value>"[^"]*"|'[^']*'|[^\s()'"=]+)""")

#: What pytest's grammar takes as one word, less what would make a keyword ambiguous.
_WORD = re.compile(r"[^\w.+/:-]", re.ASCII)

CYCLE = "cycle"


def rewrite(expression: str) -> tuple[str, list[str]]:
    """Return a ``-k`` expression in pytest's own grammar, and the axes it names.

    ``0.70`` selects ``0.7``: a value is read as the study's YAML would read it.
    """
    axes: list[str] = []

    def bracketed(match: re.Match[str]) -> str:
        axes.append(match["axis"])
        return _keyword(match["axis"], _yaml_value(match["value"]))

    return _TERM.sub(bracketed, expression), axes


def keywords(study: StudyConfig, experiment: Experiment) -> Iterator[str]:
    """Yield the keywords of an experiment: each axis under its full and its short name, and the cycle."""
    for axis, value in experiment.point.axes.items():
        for name in {axis, study.axis_names[axis]}:
            yield _keyword(name, value)
    yield _keyword(CYCLE, experiment.cycle)


def unknown_axes(named: Iterable[str], studies: Iterable[StudyConfig]) -> list[str]:
    """Return the axes of a ``-k`` expression that no study has: a misspelt ``not`` would select everything."""
    known = {CYCLE}
    for study in studies:
        for axis, short in study.axis_names.items():
            known |= {axis, short}
    return [axis for axis in named if axis not in known]


def _yaml_value(text: str) -> Any:
    if text[0] in "\"'":
        return text[1:-1]
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _keyword(axis: str, value: Any) -> str:
    # pytest compares without regard to case, and takes no percent signs.
    text = _WORD.sub(lambda match: f"\\x{ord(match[0]):x}", value_text(value))
    return f"[{axis}:{text}]".lower()
