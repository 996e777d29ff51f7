"""``--llem-against``: a candidate or reference that cannot run is reported before anything is measured."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pytest_llem.isolation.engine_probe import probe_engines
from tests.conftest import WriteStudy
from tests.support.environments import NOOP_ENGINE, ROOT, SITE_PACKAGES, Environment
from tests.support.marks import slow

ENGINE = "from noop_engine import NoopEngine as Engine\n"

OPTIONLESS = """
from noop_engine import NoopEngine
from pytest_llem.study.engine_options import EngineOptions

class Engine(NoopEngine):
    options = EngineOptions
"""

BROKEN = {
    "missing package": "import no_such_package\n",
    "raises": "raise RuntimeError('no device')\n",
    "exits": "import sys\nsys.exit('no')\n",
    "skips": "import pytest\npytest.skip('no', allow_module_level=True)\n",
    "crashes": "import os\nos._exit(7)\n",
    "no such class": "Other = 1\n",
    "no engine": "class Engine: pass\n",
}

MESSAGES = {
    "missing package": "No module named 'no_such_package'",
    "raises": "own_engine raises RuntimeError: no device",
    "exits": "importing it raises SystemExit: no",
    "skips": "importing it raises Skipped: no",
    "crashes": "importing it ends Python (status 7)",
    "no such class": "there is no 'Engine' in {folder}/own_engine.py",
    "no engine": "missing methods: close, describe, encode and 12 more",
}


def import_problems(python: Path | None, engines: Sequence[str], path: Sequence[str]) -> dict[str, str]:
    found = probe_engines(python, {name: [] for name in engines}, path)
    return {name: answer.problem for name, answer in found.items() if answer.problem is not None}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An environment with a user's own engine."""
    environment = Environment(tmp_path_factory.mktemp("whole") / "env", ROOT, NOOP_ENGINE, *SITE_PACKAGES)
    environment.add("mine", "1.0", own_engine=ENGINE)
    return environment


@pytest.fixture
def against(pytester: pytest.Pytester, write_study: WriteStudy) -> Callable[..., pytest.RunResult]:
    """Run a study of a user's own engine against an interpreter, and check that nothing was measured."""

    def run(
        python: Path | str, *options: str, here: str = ENGINE, backend: str = "own_engine:Engine", **fields: Any
    ) -> pytest.RunResult:
        pytester.makepyfile(own_engine=here)
        write_study(backend=backend, sweep={"n": [1, 2]}, execution={"n_cycles": 1}, **fields)
        found = pytester.runpytest_inprocess("study.yaml", "-p", "llem", f"--llem-against={python}", *options)
        assert found.ret == pytest.ExitCode.USAGE_ERROR
        assert not (pytester.path / "results").exists(), "nothing was measured"
        return found

    return run


def test_interpreter_without_pytest_llem_is_refused(
    against: Callable[..., pytest.RunResult], tmp_path: Path
) -> None:
    empty = Environment(tmp_path / "empty")
    against(empty.python).stderr.fnmatch_lines(
        ["ERROR: *: no experiment was started: the reference: * has no pytest-llem: install it there: *"]
    )


def test_broken_interpreter_is_refused(against: Callable[..., pytest.RunResult], tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\nexit 3\n")
    other.chmod(0o755)
    against(other).stderr.fnmatch_lines(
        ["*no experiment was started: the reference: * does not answer as Python does *"]
    )


def test_engine_missing_in_the_reference_is_refused(
    against: Callable[..., pytest.RunResult], tmp_path: Path
) -> None:
    bare = Environment(tmp_path / "bare", ROOT, NOOP_ENGINE, *SITE_PACKAGES)
    against(bare.python).stderr.fnmatch_lines(
        ["*the reference: engine 'own_engine:Engine': module 'own_engine' not found *"]
    )


@pytest.mark.parametrize("fault", ["missing package", "crashes"])
def test_engine_that_the_candidate_cannot_import_is_refused(
    against: Callable[..., pytest.RunResult], whole: Environment, fault: str
) -> None:
    found = against(whole.python, here=BROKEN[fault])
    (line,) = [line for line in found.errlines if "no experiment was started" in line]
    assert line.endswith(
        f"no experiment was started: the candidate: engine 'own_engine:Engine' cannot be used: {MESSAGES[fault]}"
    )


def test_engine_that_the_reference_cannot_import_is_reported(whole: Environment, tmp_path: Path) -> None:
    """The next test checks the same in a whole run."""
    modules = {fault: f"broken_{fault.replace(' ', '_')}" for fault in BROKEN}
    for fault, module in modules.items():
        (tmp_path / f"{module}.py").write_text(BROKEN[fault])
    crashing = f"{modules.pop('crashes')}:Engine"
    names = {fault: f"{module}:Engine" for fault, module in modules.items()}
    found = import_problems(whole.python, [*names.values()], [str(tmp_path)])
    messages = {fault: message.format(folder=tmp_path) for fault, message in MESSAGES.items()}
    assert found == {name: messages[fault].replace("own_engine", modules[fault]) for fault, name in names.items()}
    assert import_problems(whole.python, [crashing], [str(tmp_path)]) == {crashing: MESSAGES["crashes"]}


def test_run_against_an_unimportable_engine_measures_nothing(
    against: Callable[..., pytest.RunResult], tmp_path: Path
) -> None:
    broken = Environment(tmp_path / "broken", ROOT, NOOP_ENGINE, *SITE_PACKAGES)
    broken.add("mine", "1.0", own_engine=BROKEN["missing package"])
    against(broken.python).stderr.fnmatch_lines(
        [f"*the reference: engine 'own_engine:Engine' cannot be used with {broken.python}: No module named 'no_*"]
    )


def test_installed_engine_whose_import_fails_is_refused(
    against: Callable[..., pytest.RunResult], tmp_path: Path
) -> None:
    """Its metadata exists, and its module does not."""
    broken = Environment(tmp_path / "broken", ROOT, *SITE_PACKAGES)
    broken.add("noop", "1.0", entry_points="[pytest_llem.engines]\nnoop = no_such_module:Engine\n")
    found = against(broken.python, backend="noop")
    found.stderr.fnmatch_lines(
        ["*the reference: engine 'noop' cannot be used with *: No module named 'no_such_module'"]
    )


@pytest.mark.parametrize(
    ("here", "sides"),
    [(ENGINE, ["reference"]), (OPTIONLESS, ["candidate", "reference"])],
    ids=["reference", "both"],
)
def test_side_without_a_point_that_can_run_is_refused(
    against: Callable[..., pytest.RunResult], tmp_path: Path, here: str, sides: Sequence[str]
) -> None:
    other = Environment(tmp_path / "other", ROOT, NOOP_ENGINE, *SITE_PACKAGES)
    other.add("mine", "1.0", own_engine=OPTIONLESS)
    found = against(other.python, here=here, **{"own_engine:Engine": {"size": 1}})
    reason = "study.yaml:*: own_engine:Engine.size: the engine has no such option"
    found.stderr.fnmatch_lines(["*: " + "; ".join(f"the {side}: no point can run: {reason}*" for side in sides)])


@pytest.mark.parametrize("reason", ["skip", slow("xfail")])
def test_skipped_experiments_import_no_engine(
    pytester: pytest.Pytester, write_study: WriteStudy, whole: Environment, reason: str
) -> None:
    pytester.makepyfile(broken_engine=BROKEN["raises"], own_engine=ENGINE)
    write_study(
        backend=["own_engine:Engine", "broken_engine:Engine"],
        sweep={"n": [1]},
        execution={"n_cycles": 1},
        **{reason: [{"where": {"backend": "broken_engine:Engine"}, "reason": "not on this machine"}]},
    )
    # The verdict of a gate may depend on the machine's load.
    options = (f"--llem-against={whole.python}", "--llem-start-method=forkserver", "-k", "not regression")
    run = pytester.runpytest_inprocess("study.yaml", "-p", "llem", *options)
    assert run.parseoutcomes()["passed"] == 2
    assert run.ret == 0


def test_each_side_is_imported_in_its_own_interpreter(whole: Environment, tmp_path: Path) -> None:
    assert import_problems(whole.python, ["own_engine:Engine"], []) == {}
    (tmp_path / "here_only.py").write_text("import noop_engine\n" + ENGINE)
    here = import_problems(None, ["here_only:Engine"], [str(tmp_path), str(NOOP_ENGINE)])
    assert here == {}
    assert import_problems(Path(sys.executable), ["here_only:Engine"], [])["here_only:Engine"].startswith(
        "No module"
    )
