"""A study of llama.cpp's server with real weights."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import Results, RunPytest
from tests.support import weights
from tests.support.load_studies import result_of
from tests.support.serving import ROOT

STUDY = """
name: llama
backend: server
model: MODEL
max_input_tokens: 32
max_output_tokens: 8
server:
  preset: llama.cpp
  command: ["{python}", -m, tests.support.llama_cpp, "{model}", --port, "{port}"]
  gpus: 0
load:
  slo: {ttft_ms: 60000}
measurement: {min_window_seconds: 1}
energy: {allow_estimated: true}
sweep:
  load.concurrency: [1, 4]
execution: {n_cycles: 1, experiment_gap_seconds: 0}
"""


@pytest.fixture
def model() -> Path:
    try:
        return weights.gguf()
    except weights.WeightsUnavailableError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"real weights are not available: {error}")


@pytest.mark.slow
def test_load_points_share_a_real_server_and_count_what_it_counts(
    pytester: pytest.Pytester,
    run_pytest: RunPytest,
    results: Results,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.path.joinpath("study.yaml").write_text(STUDY.replace("MODEL", str(model)))
    run_pytest().assert_outcomes(passed=2)
    found = [result_of(results, one) for one in results.manifest["experiments"]]
    assert len({one["server"]["id"] for one in found}) == 1
    for one in found:
        load, metrics = one["load"], {name: metric["value"] for name, metric in one["metrics"].items()}
        assert load["client_output_tokens"] == load["server_output_tokens"] == 8 * load["sent"]
        assert 0 < metrics["ttft_p50_ms"] < metrics["e2e_p50_ms"]
        assert metrics["tpot_p50_ms"] > 0
        # A busy machine delays the reading of an answer, so that some or all of its tokens arrive together.
        reason = one["metrics"]["itl_p50_ms"].get("reason") or ""
        assert metrics["itl_p50_ms"] is not None or "arrived together" in reason or "second token" in reason
        assert metrics["energy_per_output_token_j"] > 0
        assert metrics["concurrency_mean"] == pytest.approx(load["concurrency"], rel=0.1)
        assert one["effective_config"]["precision"] is None  # a GGUF file has its own
        assert not [warning for warning in one["warnings"] if warning["code"] == "tokens_disagree"]
    assert json.dumps(found[0]["engine"]["settings"]).count("ignore_eos") == 1
