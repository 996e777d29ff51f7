"""The house keeps its direction: which room may import which, and what may not be imported at all."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import pytest_llem

PACKAGE = Path(pytest_llem.__file__).parent

#: Every room, and the rooms it may import. ``study``, ``results`` and ``hardware`` are the ground under them all.
MAY_IMPORT = {
    "hardware": set(),
    "registry": set(),
    "board": set(),
    "nodes": set(),
    "catalogue": set(),
    "study": {"catalogue", "registry"},
    "results": {"catalogue", "study"},
    "gates": {"catalogue", "results", "study"},
    "energy": {"hardware", "registry", "results", "study"},
    "backends": {"study", "results"},
    "measurement": {"catalogue", "backends", "energy", "hardware", "registry", "results", "study"},
    "isolation": {"measurement", "backends", "energy", "hardware", "registry", "results", "study"},
    "extras": set(),
    "overwriting": set(),
    "declarations": set(),
    "stash": {"board", "study"},
    "options": {"extras", "overwriting", "study"},
    "planning": {"backends", "hardware", "isolation", "measurement", "registry", "results", "study"},
    "collection": {
        *("board", "declarations", "energy", "gates", "hardware", "isolation", "measurement", "nodes"),
        *("options", "overwriting", "planning", "results", "stash", "study"),
    },
    "doctor": {"backends", "energy", "hardware", "isolation", "planning", "registry", "results"},
    "reporting": {
        *("board", "catalogue", "declarations", "doctor", "gates", "nodes", "options", "overwriting"),
        *("planning", "results", "stash", "study"),
    },
    "hookspecs": {"results"},
    "run_note": set(),
    "fixtures": {"collection", "energy"},
    "session": {
        *("board", "collection", "isolation", "nodes", "options", "planning", "reporting", "stash", "study"),
    },
    "plugin": {"collection", "declarations", "fixtures", "hookspecs", "session", "stash"},
    "cli": {
        *(
            "backends",
            "catalogue",
            "doctor",
            "extras",
            "gates",
            "measurement",
            "options",
            "registry",
            "reporting",
            "results",
        ),
        *("study",),
    },
    "api": {"backends", "measurement", "results", "run_note", "study"},
    "__init__": {"api", "collection", "energy", "measurement", "results", "study"},
}

KNOWS_PYTEST = {
    "declarations",
    "stash",
    "options",
    "collection",
    "fixtures",
    "reporting",
    "run_note",
    "session",
    "plugin",
}
HEAVY = {"torch", "transformers", "tokenizers", "huggingface_hub", "datasets", "scipy", "numpy", "pynvml"}

#: What only some installations have, and the room that needs it.
PAGES, PAGES_NEED = "reporting.html", {"jinja2", "plotly"}


def _modules() -> Iterator[tuple[str, str, Path]]:
    """Yield each module of the package: its room, its name in the package, and its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield parts[0], ".".join(parts), path


@functools.cache
def _imports(path: Path, *, at_load: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if at_load else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_room_imports_against_the_flow() -> None:
    for room, name, path in _modules():
        imported = _imports(path)
        ours = {one.split(".")[1] for one in imported if one.startswith("pytest_llem.")}
        assert ours - {room} <= MAY_IMPORT[room], name
        everything = {one.partition(".")[0] for one in imported}
        assert "_pytest" not in everything, f"{name}: private pytest API"
        assert room in KNOWS_PYTEST or "pytest" not in everything, name


def test_what_is_heavy_is_imported_late() -> None:
    parts = ("pytorch", "generation", "loading", "shape")
    theirs = {f"backends.{part}" for part in parts}
    for _, name, path in _modules():
        heavy = {one.partition(".")[0] for one in _imports(path, at_load=True)} & HEAVY
        assert not heavy or name in theirs, name


def test_pages_are_written_by_one_room_that_is_entered_late() -> None:
    for _, name, path in _modules():
        if not name.startswith(f"{PAGES}.") or name == f"{PAGES}.__init__":
            assert not {one.partition(".")[0] for one in _imports(path)} & PAGES_NEED, name
            late = [one for one in _imports(path, at_load=True) if one.startswith(f"pytest_llem.{PAGES}")]
            assert not late, name


def test_an_ordinary_run_loads_nothing_of_ours_but_the_plugin(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_modules():
            ours = sorted(name for name in sys.modules if name.startswith("pytest_llem"))
            light = ["declarations", "fixtures", "hookspecs", "plugin", "stash"]
            assert ours == ["pytest_llem", *(f"pytest_llem.{name}" for name in light)]
            assert not {"yaml", "pydantic", "rich", "torch", "scipy", "multiprocessing.spawn"} & set(sys.modules)
        """
    )
    pytester.runpytest_subprocess("-p", "llem", "-p", "no:xdist").assert_outcomes(passed=1)


def test_the_public_names_are_there_and_late() -> None:
    code = (
        "import sys, pytest_llem\n"
        "assert not {'pydantic', 'yaml', 'torch'} & set(sys.modules)\n"
        "for name in pytest_llem.__all__: assert getattr(pytest_llem, name)\n"
        "assert not {'torch', 'transformers', 'pytest'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert pytest_llem.__version__ == version("pytest-llem")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pytest_llem.nothing  # noqa: B018


def test_entry_points_are_declared_and_load() -> None:
    assert {point.name: point.value for point in entry_points(group="pytest11")}["llem"] == "pytest_llem.plugin"
    assert "pytorch" in entry_points(group="pytest_llem.backends").names
    assert {"nvml", "rapl", "estimate"} <= entry_points(group="pytest_llem.energy").names
    for group in ("pytest_llem.backends", "pytest_llem.energy"):
        for point in entry_points(group=group):
            assert point.load()


def test_the_package_ships_a_py_typed_marker() -> None:
    assert (PACKAGE / "py.typed").is_file()
