"""Test what is imported when. import-linter checks which package may import which: see pyproject.toml."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from pathlib import Path

import pytest

import pytest_llem

PACKAGE = Path(pytest_llem.__file__).parent

#: Optional dependencies, and the only package that may import them.
HTML, HTML_NEEDS = "reporting.html", {"jinja2", "plotly"}


def _modules() -> Iterator[tuple[str, Path]]:
    """Yield the name within the package, and the file, of each module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), path


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


def test_only_html_package_imports_plotly_and_is_imported_late() -> None:
    for name, path in _modules():
        if not name.startswith(f"{HTML}.") or name == f"{HTML}.__init__":
            assert not {one.partition(".")[0] for one in _imports(path)} & HTML_NEEDS, name
            late = [one for one in _imports(path, at_load=True) if one.startswith(f"pytest_llem.{HTML}")]
            assert not late, name


def test_ordinary_run_imports_only_the_plugin_modules(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_modules():
            own = sorted(name for name in sys.modules if name.startswith("pytest_llem"))
            light = ["_plugin", "_plugin.declarations", "_plugin.stash", "hookspecs", "plugin"]
            assert own == ["pytest_llem", *(f"pytest_llem.{name}" for name in light)]
            assert not {"yaml", "pydantic", "rich", "torch", "scipy", "multiprocessing.spawn"} & set(sys.modules)
        """
    )
    pytester.runpytest_subprocess("-p", "llem", "-p", "no:xdist").assert_outcomes(passed=1)


def test_public_names_exist_and_are_imported_late() -> None:
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
    assert "pytorch" in entry_points(group="pytest_llem.engines").names
    assert {"nvml", "rapl", "estimate"} <= entry_points(group="pytest_llem.meters").names
    for group in ("pytest_llem.engines", "pytest_llem.meters"):
        for point in entry_points(group=group):
            if point.name == "vllm":  # its library is not installed here
                assert find_spec(point.module)
            else:
                assert point.load()


def test_package_has_a_py_typed_marker() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.slow
def test_experiment_process_does_not_import_pytest(pytester: pytest.Pytester) -> None:
    """The engine ``pytorch`` does not import pytest in the experiment's process."""
    code = (
        "import sys\n"
        "from pytest_llem import run_experiment\n"
        "run_experiment({'model': 'builtin:tiny-llama', 'n': 1, 'warmup': {'enabled': False},\n"
        "                'measurement': {'min_window_seconds': 0}, 'max_output_tokens': 2,\n"
        "                'baseline': {'enabled': False}})\n"
        "held = {name.partition('.')[0] for name in sys.modules}\n"
        "assert held.isdisjoint({'pytest', '_pytest', 'pluggy', 'xdist'}), held\n"
        "assert 'torch' in held\n"
    )
    assert pytester.run(sys.executable, "-c", code).ret == 0
