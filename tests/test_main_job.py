"""The quickstart study, without a GPU, network or download."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from pytest_llem import StudyResult
from tests.conftest import ROOT, Results

pytestmark = pytest.mark.slow


def test_the_quickstart_study_passes_without_loading_torch(pytester: pytest.Pytester, results: Results) -> None:
    shutil.copy(ROOT / "studies" / "quickstart.yaml", pytester.path / "quickstart.yaml")
    pytester.makeconftest(
        """
        import json, pathlib, sys

        def pytest_unconfigure(config):
            pathlib.Path("modules.json").write_text(json.dumps(sorted(sys.modules)))
        """
    )
    # .ci/run runs all cycles, and imports torch for each experiment.
    options = ("-p", "llem", "--llem-cycles=1", "--llem-start-method=forkserver")
    run = pytester.runpytest_subprocess("quickstart.yaml", *options)
    run.assert_outcomes(passed=4)
    loaded = {name.partition(".")[0] for name in json.loads((pytester.path / "modules.json").read_text())}
    assert loaded.isdisjoint({"torch", "transformers"})

    result = StudyResult.load(results.directory)
    assert (result.status, result.summary.completed, len(result.points)) == ("completed", 4, 4)
    for point in result.points:
        assert point.metrics["output_tokens_per_second"].n == 1
        assert (point.metrics["output_tokens_per_second"].mean or 0) > 0
        assert point.metrics["energy_j"].boundary == "cpu_package"
    run.stdout.fnmatch_lines(
        [
            "*= llem: quickstart =*",
            "*TTFT p50*J/out token*",
            "*bf16 * 1 * 1 *",
            "*bf16 * 8 * 1 *",
            "*fp32 * 1 * 1 *",
            "*fp32 * 8 * 1 *",
            "4 of 4 experiments completed",
            "results: results/quickstart_*",
        ]
    )


def test_experiment_process_does_not_import_pytest(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
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
