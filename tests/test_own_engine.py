"""A user's own engine: a class that the study names, imported only in the experiment's process."""

from __future__ import annotations

import json
import re

import pytest

from pytest_llem import ExperimentConfig, registry, run_experiment
from pytest_llem.engines.protocol import BatchEngine, Engine, PreflightError
from pytest_llem.isolation.launcher import Job, run_isolated
from pytest_llem.results.experiment import ExperimentResult
from tests.conftest import NOOP_STUDY, Results, RunPytest, WriteStudy
from tests.support.pages import files, page

ENGINE = """
    from noop_engine import NoopEngine
    from pytest_llem.results.experiment import EngineRecord

    class Engine(NoopEngine):
        def describe(self):
            return EngineRecord(name="mine", device="cpu", settings=self.given)

    NOTHING = None
"""

FIELDS = {key: value for key, value in NOOP_STUDY.items() if key not in ("name", "sweep", "execution")}


PAGE = page("how-to/own-engine.md")


@pytest.fixture
def example(pytester: pytest.Pytester) -> None:
    """Put the engine and the study of the page into the test's folder."""
    for name, text in files(PAGE).items():
        (pytester.path / name).write_text(text)


def test_example_engine_of_the_page_runs(
    pytester: pytest.Pytester, example: None, run_pytest: RunPytest, results: Results
) -> None:
    run = run_pytest("--llem-cycles=1", files=["bigram.yaml"])
    run.assert_outcomes(passed=2)
    assert set(results.statuses()) == {"batch_size=1", "batch_size=8"}
    for name, result in zip(results.statuses(), results.experiments(), strict=True):
        assert result.engine.name == "bigram"
        assert f"batch_size={result.engine.settings['batch_size']}" == name
        assert (result.tokens.output_tokens, result.tokens.deterministic) == (8 * 64, True)
        assert result.metrics["model_memory_mb"].value is None
        assert all(result.metrics[f"{name}_p50_ms"].value for name in ("ttft", "itl", "e2e"))


def test_example_engine_refuses_what_the_page_says(
    pytester: pytest.Pytester, example: None, run_pytest: RunPytest
) -> None:
    study = (pytester.path / "bigram.yaml").read_text()
    (pytester.path / "misspelt.yaml").write_text(study.replace("Engine.batch_size", "Engine.batchsize"))
    (pytester.path / "half.yaml").write_text(study.replace("precision: fp32", "precision: bf16"))
    run = run_pytest("--llem-cycles=1", files=["misspelt.yaml", "half.yaml"])
    run.assert_outcomes(failed=4)
    message = "my_engine:BigramEngine.batchsize: the engine has no such option (did you mean 'batch_size'"
    assert message in PAGE
    run.stdout.fnmatch_lines(
        [f"preflight: misspelt.yaml:11:3: {message}*", "preflight: needs precision: fp32 and decoder: *"]
    )


def test_every_method_of_an_engine_is_on_the_page() -> None:
    table = PAGE.partition("| method |")[2].partition("\n\n")[0]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.MULTILINE)))
    methods = [
        name
        for protocol in (Engine, BatchEngine)
        for name, one in vars(protocol).items()
        if callable(one) and not name.startswith("_")
    ]
    assert set(named) == {"__init__", *methods}


@pytest.fixture
def own(pytester: pytest.Pytester, noop_engine: None) -> None:
    """Put a package with an engine, and broken modules, into the test's folder."""
    (pytester.path / "mine").mkdir()
    pytester.makepyfile(
        **{"mine/__init__": "", "mine/engine": ENGINE, "broken": "import os; os.environ['NO_SUCH_']"}
    )
    pytester.makepyfile(wanting="import a_module_that_is_not_there")


@pytest.mark.slow
def test_study_runs_an_engine_named_by_its_class(
    pytester: pytest.Pytester, own: None, write_study: WriteStudy, results: Results
) -> None:
    write_study(
        backend="mine.engine:Engine",
        sweep={"n": [2]},
        execution={"n_cycles": 1},
        **{"mine.engine:Engine": {"size": 2}},
    )
    pytester.makeconftest(
        """
        import json, pathlib, sys

        def pytest_unconfigure(config):
            pathlib.Path("modules.json").write_text(json.dumps(sorted(sys.modules)))
        """
    )
    pytester.runpytest_subprocess("study.yaml", "-p", "llem").assert_outcomes(passed=1)
    result = results.read(results.manifest["experiments"][0]["result_file"])
    assert result["engine"]["name"] == "mine"
    assert result["engine"]["settings"] == {"size": 2}
    imported = {name.partition(".")[0] for name in json.loads((pytester.path / "modules.json").read_text())}
    assert "pytest_llem" in imported
    assert "mine" not in imported


def test_process_finds_the_engine_by_the_python_path(pytester: pytest.Pytester, own: None) -> None:
    config = ExperimentConfig.model_validate({**FIELDS, "backend": "mine.engine:Engine"})
    identity = {"experiment_id": "one", "config_hash": "0" * 16}
    outcomes = [
        run_isolated(Job(identity, config.model_dump(mode="json"), directory=".", python_path=path))
        for path in ([str(pytester.path)], [])
    ]
    assert outcomes[0].error is None
    assert outcomes[0].result
    assert ExperimentResult.model_validate_json(outcomes[0].result).engine.name == "mine"
    error = outcomes[1].error
    assert error
    assert (error.kind, error.traceback) == ("preflight", None)
    assert error.message == "engine 'mine.engine:Engine' cannot be used: No module named 'mine'"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.here:Engine", "No module named 'nothing'"),
        ("mine.engine:Engin", "there is no 'Engin' in {folder}/mine/engine.py"),
        ("namespace:Engine", "there is no 'Engine' in namespace"),
        ("mine.engine:NOTHING", "missing methods: close, describe, encode and 12 more"),
        ("wanting:Engine", "No module named 'a_module_that_is_not_there'"),
        ("broken:Engine", "broken raises KeyError: 'NO_SUCH_'"),
        ("mine.engine:", "expected package.module:Class (got 'mine.engine:')"),
        (":Engine", "expected package.module:Class (got ':Engine')"),
        ("mine/engine.py:Engine", "expected package.module:Class (got 'mine/engine.py:Engine')"),
        ("missing", "'missing' is not installed (there are: "),
    ],
)
def test_unusable_engine_is_reported_in_one_line(
    pytester: pytest.Pytester, own: None, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    pytester.syspathinsert()
    (pytester.path / "namespace").mkdir()
    with pytest.raises(PreflightError) as caught:
        run_experiment({**FIELDS, "backend": name})
    message = message.format(folder=pytester.path)
    assert str(caught.value).startswith(f"engine {name!r} cannot be used: {message}")
    assert "\n" not in str(caught.value)


def test_error_in_the_engines_code_keeps_its_type(pytester: pytest.Pytester, own: None) -> None:
    """A KeyError in the engine is not reported as a missing engine."""
    constructor = "def __init__(self, config, context): {}['size']"
    engine = f"import mine.engine\nclass Engine(mine.engine.Engine):\n    {constructor}"
    pytester.makepyfile(clumsy=engine)
    pytester.syspathinsert()
    with pytest.raises(KeyError, match="size"):
        run_experiment({**FIELDS, "backend": "clumsy:Engine"})


def test_nested_class_may_be_named(own: None, pytester: pytest.Pytester) -> None:
    pytester.syspathinsert()
    pytester.makepyfile(nested="class Outer:\n    class Inner:\n        pass")
    assert registry.load(registry.ENGINE_GROUP, "nested:Outer.Inner").__name__ == "Inner"
