"""Select sweep points exactly, by ``-k axis=value``.

pytest's ``-k`` has no ``=``, and its substring matches are ambiguous here (``8`` is in ``80``, ``float16`` in
``bfloat16``). So ``axis=value`` is rewritten to one bracketed keyword, ``[axis:value]``, which only the items
with that value have. Expressions that are valid in pytest keep their meaning.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import pytest

from pytest_llem._plugin.node_ids import EXPERIMENT, REFERENCE, REGRESSION, match_id, parse
from pytest_llem._plugin.stash import SELECTED_AXES
from pytest_llem.study.design import StudyConfig
from pytest_llem.study.document import read_value
from pytest_llem.study.identity import CYCLE, value_text
from pytest_llem.study.problems import did_you_mean

_TERM = re.compile(r"""(?<![\w.-])(?P<axis>[A-Za-z_][\w.-]*)=(?P<value>"[^"]*"|'[^']*'|[^\s()'"=]+)""")

#: What is meant as ``axis=value``, and is not valid in pytest's grammar either.
_ALMOST_TERM = re.compile(r"""(?<![\w.-])([A-Za-z_][\w.-]*)\s*==?\s*("[^"]*"|'[^']*'|[^\s()'"=]+)""")

#: Characters to escape in a keyword: those that pytest's grammar does not allow in a word, those that would make
#: the keyword ambiguous, and capital letters, because pytest ignores case.
_ESCAPED = re.compile(r"[^a-z0-9_.+/:-]")


def rewrite(expression: str) -> tuple[str, list[str]]:
    """Return a ``-k`` expression in pytest's own grammar and the axes that it names.

    Values are read as YAML, as in a study: ``0.70`` selects ``0.7``.

    Raises:
        pytest.UsageError: A term has spaces around ``=``, or ``==``.
    """
    axes: list[str] = []

    def bracketed(match: re.Match[str]) -> str:
        axes.append(match["axis"])
        text = match["value"]
        return _keyword(match["axis"], text[1:-1] if text[0] in "\"'" else read_value(text))

    rewritten = _TERM.sub(bracketed, expression)
    if (almost := _ALMOST_TERM.search(rewritten)) is not None:
        raise pytest.UsageError(
            f"-k: write {almost[1]}={almost[2]}, with one '=' and without spaces (got {almost[0]!r})"
        )
    return rewritten, axes


def explain_not_found(config: pytest.Config, studies: Mapping[str, StudyConfig]) -> Iterator[str]:
    """Yield messages for node ids on the command line: experiments that a collected study does not have, and items
    of a comparison without its option.

    pytest's own message leaves the brackets out, and cannot name the option that adds an item to the study.

    Args:
        config: pytest's configuration.
        studies: The collected studies by the key of their run.
    """
    is_compared = config.getoption("llem_baseline") or config.getoption("llem_against")
    for argument in config.args:
        node = parse(argument)
        path = config.invocation_params.dir / (node.file if node else "")
        study = next((one for one in studies.values() if one.path == path), None)
        if node is None or study is None:
            continue
        if node.function in (REFERENCE, REGRESSION) and not is_compared:
            yield f"not found: {argument}: give the --llem-baseline or --llem-against of its run"
        if node.function != EXPERIMENT or match_id(node.name, ids := tuple(one.id for one in study.experiments)):
            continue
        hint = did_you_mean(node.name, ids) or f" (there is {ids[0]!r}, and others: --collect-only lists them)"
        yield f"not found: {argument}: the study {study.name} has no experiment {node.name!r}{hint}"


def keywords(
    study: StudyConfig, axes: Mapping[str, Any], cycle: int | None, named: Collection[str]
) -> Iterator[str]:
    """Yield the keywords of an item for the axes that a ``-k`` expression names.

    Args:
        study: The item's study.
        axes: Value of each axis of the item's point.
        cycle: The item's cycle; None for a gate.
        named: Axes in the expression, by full or short name.
    """
    for axis, value in axes.items():
        for name in {axis, study.axis_names.get(axis, axis)}:
            if name in named:
                yield _keyword(name, value)
    if CYCLE in named and cycle is not None:
        yield _keyword(CYCLE, cycle)


def refuse_unknown_axes(
    studies: Collection[StudyConfig], session: pytest.Session, items: list[pytest.Item]
) -> None:
    """Refuse a ``-k`` expression with an axis that no study has, because ``not misspelt=1`` would run everything.

    Raises:
        pytest.UsageError: An axis is unknown. An xdist worker, in which that would be an internal error, reports a
            collection error and collects nothing instead.
    """
    known = {CYCLE}
    for study in studies:
        for axis, short in study.axis_names.items():
            known |= {axis, short}
    unknown = [axis for axis in session.config.stash.get(SELECTED_AXES, ()) if axis not in known]
    if not unknown:
        return
    axes = tuple(sorted(known))
    hint = did_you_mean(unknown[0], axes) or f" (there are: {', '.join(axes)})"
    message = f"-k: no collected study has an axis {', '.join(unknown)}{hint}"
    if not studies:
        message = f"-k: unknown axis {', '.join(unknown)}: no study was collected"
    items.clear()  # --collect-only would list them before the message
    if not hasattr(session.config, "workerinput"):
        raise pytest.UsageError(message)
    report = pytest.CollectReport(nodeid="-k", outcome="failed", longrepr=message, result=[])
    session.config.hook.pytest_collectreport(report=report)


def _keyword(axis: str, value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # 1.0 selects 1
    name, text = (_ESCAPED.sub(lambda match: f"\\x{ord(match[0]):x}", one) for one in (axis, value_text(value)))
    return f"[{name}:{text}]"
