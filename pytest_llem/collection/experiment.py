"""What a study's test items do: run one experiment in a process of its own."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pytest_llem.isolation.launcher import Job, Outcome, run_isolated
from pytest_llem.options import STUDIES, Settings
from pytest_llem.results.models import ErrorRecord, Identity
from pytest_llem.study.loading import Experiment, StudyConfig

#: What an item's experiment came to: plain data that rides on the report to the recorder.
PAYLOAD = pytest.StashKey[dict[str, Any]]()

#: Where on the report it rides.
REPORT_ATTRIBUTE = "llem"

#: Figures that go into the report's user properties, and so into JUnit XML.
PROPERTIES = ("energy_per_output_token_j", "output_tokens_per_second", "ttft_p50_ms", "seconds", "energy_j")


# The body of every study item. It bears the name ``experiment`` and the study's place (collection.items), and so
# fails there.
def run_experiment_item(planned: Experiment, request: pytest.FixtureRequest) -> None:
    if (error := run_item(planned, request.node)) is not None:
        pytest.fail(explain(error), pytrace=False)


def run_item(planned: Experiment, item: pytest.Item) -> ErrorRecord | None:
    """Run *planned*, keep what came of it for the report, and return why it failed, if it did."""
    assert item.parent is not None
    study = item.config.stash[STUDIES][item.parent.nodeid]
    outcome = run_isolated(_job(study, planned, item.config), timeout=study.execution.experiment_timeout_seconds)
    item.stash[PAYLOAD] = _payload(item.parent.nodeid, planned, outcome, item.config)
    others = [one for one in item.user_properties if not one[0].startswith("llem_")]  # a rerun replaces ours
    item.user_properties[:] = others + _properties(outcome.result)
    if outcome.output.strip():
        item.add_report_section("call", "experiment output", outcome.output)
    return outcome.error


def _job(study: StudyConfig, planned: Experiment, config: pytest.Config) -> Job:
    point = planned.point
    identity = Identity(
        experiment_id=planned.id,
        config_hash=point.config_hash,
        study_design_hash=study.design_hash,
        axes=point.axes,
        cycle=planned.cycle,
    )
    return Job(
        identity=identity.model_dump(mode="json"),
        config=point.config.model_dump(mode="json"),
        directory=str(study.path.parent),
        model_path=[str(folder) for folder in Settings.from_config(config).model_path],
        python_path=[str(config.rootpath)],
    )


def _payload(file: str, planned: Experiment, outcome: Outcome, config: pytest.Config) -> dict[str, Any]:
    """Return *outcome* as what may cross from an xdist worker to the controller."""
    return {
        "file": file,
        "experiment_id": planned.id,
        "result": outcome.result,
        "files": outcome.files,
        "error": outcome.error.model_dump(mode="json") if outcome.error else None,
        "worker": getattr(config, "workerinput", {}).get("workerid"),
    }


def explain(error: ErrorRecord) -> str:
    """Return what a person is told about a failed experiment."""
    phase = f" while {error.phase}" if error.phase and error.kind != "preflight" else ""
    text = f"{error.kind}{phase}: {error.message}"
    if error.kind in ("exception", "oom"):
        text = f"{error.kind}{phase}: {error.type}: {error.message}"
    return f"{text}\n\n{error.traceback}" if error.traceback else text


def attach_payload(item: pytest.Item, report: pytest.TestReport) -> None:
    """Put what came of *item*'s experiment on its report, as plain JSON."""
    if PAYLOAD in item.stash:
        setattr(report, REPORT_ATTRIBUTE, item.stash[PAYLOAD])
        del item.stash[PAYLOAD]


def _properties(result: str | None) -> list[tuple[str, object]]:
    """Return a result's main figures as a report's user properties, which JUnit XML shows."""
    if result is None:
        return []
    metrics = json.loads(result)["metrics"]
    figures = ((f"llem_{name}", metrics[name]["value"]) for name in PROPERTIES)
    return [
        *((name, value) for name, value in figures if value is not None),
        ("llem_energy_method", metrics["energy_j"]["method"]),
    ]
