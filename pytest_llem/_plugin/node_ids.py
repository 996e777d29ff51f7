"""Parse and compare the node ids of study items: ``FILE::FUNCTION[NAME]``."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

#: Test functions of a study's experiments, and of the reference's experiments in a comparison.
EXPERIMENT, REFERENCE = "experiment", "reference"

#: Test functions of budgets and of regression gates.
BUDGET, REGRESSION = "budget", "regression"

#: Attribute of a call report that carries an experiment's outcome.
PAYLOAD_ATTRIBUTE = "llem"

EXPERIMENTS, GATES = (EXPERIMENT, REFERENCE), (BUDGET, REGRESSION)
FUNCTIONS = (*EXPERIMENTS, *GATES)


class Node(NamedTuple):
    """The parts of a node id.

    Attributes:
        file: Node id of the study's file.
        function: One of :data:`FUNCTIONS`.
        name: Text in the brackets: the id of an experiment or gate, and parts that other plugins added.
    """

    file: str
    function: str
    name: str

    @property
    def run(self) -> str:
        """Key of the run of an experiment."""
        return run_key(self.file, self.function)


#: The greedy first group is deliberate: a folder's name may contain ``::experiment[``, an id does not.
_NODE = re.compile(rf"(?P<file>.*)::(?P<function>{'|'.join(FUNCTIONS)})\[(?P<name>.*)\]", re.DOTALL)


def parse(node_id: str) -> Node | None:
    """Return the parts of a node id; None if it does not belong to a study item."""
    match = _NODE.match(node_id)
    return Node(**match.groupdict()) if match else None


def match_id(name: str, ids: Collection[str]) -> str | None:
    """Return the one of *ids* that the *name* of a node contains; None if there is none.

    A name can contain more than the id: parametrized fixtures add parts, and xdist appends a group.
    """
    if name in ids:
        return name
    return max((one for one in ids if f"-{one}-" in f"-{name}-"), key=len, default=None)


def run_key(file: str, function: str) -> str:
    """Return the key of a run: the study's file, or the file with a suffix for the reference of a comparison."""
    return f"{file}::{REFERENCE}" if function == REFERENCE else file


def file_of(run: str) -> str:
    """Return the node id of the study file of a run's key."""
    return run.removesuffix(f"::{REFERENCE}")


def is_reference(run: str) -> bool:
    """Return whether a run's key is that of the reference."""
    return run.endswith(f"::{REFERENCE}")


def other_side(run: str) -> str:
    """Return the key of the run on the other side of a comparison."""
    return run_key(file_of(run), EXPERIMENT if is_reference(run) else REFERENCE)
