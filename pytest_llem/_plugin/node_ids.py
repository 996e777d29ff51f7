"""Node ids of study items: ``FILE::FUNCTION[NAME]``."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

#: An experiment of the study as it is here, and of the reference that it is compared with.
EXPERIMENT, REFERENCE = "experiment", "reference"

#: Gates: of a budget, and of a comparison.
BUDGET, REGRESSION = "budget", "regression"

#: Attribute of a call report that carries an experiment's outcome.
PAYLOAD_ATTRIBUTE = "llem"

EXPERIMENTS, GATES = (EXPERIMENT, REFERENCE), (BUDGET, REGRESSION)
FUNCTIONS = (*EXPERIMENTS, *GATES)


class Node(NamedTuple):
    """A node id taken apart.

    Attributes:
        file: Node id of the study's file.
        function: One of :data:`FUNCTIONS`.
        name: What is in the brackets: an experiment's id or a gate's, and what others have added to it.
    """

    file: str
    function: str
    name: str

    @property
    def run(self) -> str:
        """Key of the run that an experiment belongs to."""
        return run_key(self.file, self.function)


#: A folder may have brackets in its name, an id in the brackets has none.
_NODE = re.compile(rf"(?P<file>.*)::(?P<function>{'|'.join(FUNCTIONS)})\[(?P<name>.*)\]", re.DOTALL)


def parse(node_id: str) -> Node | None:
    """Take a node id apart; None where it is no study item's."""
    match = _NODE.match(node_id)
    return Node(**match.groupdict()) if match else None


def match_id(name: str, ids: Collection[str]) -> str | None:
    """Return the one of *ids* that the *name* of a node holds; None where it holds none.

    A name may hold more: what a parametrized fixture adds, or the group that xdist appends.
    """
    if name in ids:
        return name
    return max((one for one in ids if f"-{one}-" in f"-{name}-"), key=len, default=None)


def run_key(file: str, function: str) -> str:
    """Return what stands for a study's run wherever several are told apart: the file, or the file's reference."""
    return f"{file}::{REFERENCE}" if function == REFERENCE else file


def file_of(run: str) -> str:
    """Return the node id of the file whose run that is."""
    return run.removesuffix(f"::{REFERENCE}")


def is_reference(run: str) -> bool:
    """Whether a run is the reference's."""
    return run.endswith(f"::{REFERENCE}")
