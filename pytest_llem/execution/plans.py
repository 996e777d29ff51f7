"""Make the plan of each study of a session, and find how many of its experiments can run at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from pytest_llem._plugin import overwriting
from pytest_llem._plugin.baseline import baseline_of
from pytest_llem._plugin.node_ids import REFERENCE, is_reference, run_key
from pytest_llem._plugin.options import WORKTREE, Settings
from pytest_llem._plugin.stash import REMOTE, STUDIES
from pytest_llem.collection.items import experiment_of, is_experiment, run_of
from pytest_llem.execution.jobs import preflight_of
from pytest_llem.execution.replay import replays_of
from pytest_llem.execution.scheduling import are_all_studies, distributes_one_at_a_time
from pytest_llem.execution.session_facts import import_path
from pytest_llem.gates.baselines import BaselineError
from pytest_llem.gates.plan_lines import expected_cycles, minimum_detectable_effects
from pytest_llem.local_folder import local_folder, lock_problem
from pytest_llem.machine.device_locks import CPU, DeviceError, free_devices
from pytest_llem.machine.device_request import DeviceRequest
from pytest_llem.planning.estimate import duration_text
from pytest_llem.planning.forecast import Forecast, forecast
from pytest_llem.planning.host import load_warning
from pytest_llem.planning.plan import Plan
from pytest_llem.planning.preflight import Preflight
from pytest_llem.study.design import Experiment, Point, StudyConfig
from pytest_llem.study.loading import load_study
from pytest_llem.study.problems import StudyError
from pytest_llem.study.server_command import runs_python


def make_plans(
    config: pytest.Config, studies: Mapping[str, StudyConfig], selected: Mapping[str, Iterable[Experiment]]
) -> list[Plan]:
    """Return the plan of each study for its *selected* experiments. Both mappings are keyed by run."""
    in_order = {run: sorted(found, key=lambda experiment: experiment.index) for run, found in selected.items()}
    replays = replays_of(config, {run: studies[run] for run, experiments in in_order.items() if experiments})
    plans = {
        run: Plan(studies[run], experiments, preflight_of(config, run, studies[run]), replays.get(run))
        for run, experiments in in_order.items()
    }
    load = None if config.stash.get(REMOTE, False) else load_warning()
    at_a_time, workers = parallelism(config, plans)
    plans = {run: replace(plan, at_a_time=at_a_time) for run, plan in plans.items()}
    return [
        replace(
            plan,
            reference=plans.get(run_key(run, REFERENCE)),
            against=Settings.from_config(config).against_name,
            minimum_detectable_effect=_effects(config, studies[run], plan) if plan.to_run else (),
            host_load_warning=load if plan.to_run else None,
            workers=workers,
        )
        for run, plan in plans.items()
        if not is_reference(run)
    ]


def make_forecast(
    config: pytest.Config, studies: Mapping[str, StudyConfig], selected: Mapping[str, Iterable[Experiment]]
) -> Forecast:
    """Return how long the *selected* experiments are expected to take. Both mappings are keyed by run.

    The forecast identifies an experiment by its run's key and its id.
    """
    return forecast(
        (run, studies[run], preflight_of(config, run, studies[run]), [(one.id, one.point) for one in experiments])
        for run, experiments in selected.items()
    )


def _effects(config: pytest.Config, study: StudyConfig, plan: Plan) -> list[str]:
    """Return the plan's lines about the changes that gates can detect, or the cycles that they will need."""
    settings = Settings.from_config(config)
    if settings.against is not None and study.execution.until_decided:
        each = None if plan.seconds is None else duration_text(2 * plan.seconds / len(plan.to_run))
        return expected_cycles(study, each)
    if settings.against is not None:
        return minimum_detectable_effects(study, None)
    # Which baseline fits the testbeds of other hosts is known only once these have results.
    if config.stash.get(REMOTE, False):
        return []
    try:
        baseline = baseline_of(config, study)
        return [] if baseline is None else minimum_detectable_effects(study, baseline)
    except BaselineError as error:  # removed since the items were collected
        raise pytest.UsageError(f"--llem-baseline: {error}") from error


def plans_of(config: pytest.Config, items: Sequence[pytest.Item]) -> list[Plan]:
    """Return the plan of each collected study. *items* are the selected items."""
    studies = config.stash.get(STUDIES, {})
    selected: dict[str, list[Experiment]] = {run: [] for run in studies}
    for item in items:
        if is_experiment(item):
            selected[run_of(item)].append(experiment_of(item))
    return make_plans(config, studies, selected)


def lock_notes(config: pytest.Config, studies: Iterable[StudyConfig]) -> Iterator[str]:
    """Yield a note if devices are leased outside the folder for temporary files, or results are without locks."""
    given, used = Path(tempfile.gettempdir()), local_folder()
    if used != given:
        yield f"{given} {lock_problem(given)}: devices are leased in {used}"
    settings = Settings.from_config(config)
    for folder in dict.fromkeys(settings.results_dir_of(study, config.rootpath) for study in studies):
        existing = next(one for one in (folder, *folder.parents) if one.is_dir())
        if (problem := lock_problem(existing)) is not None:
            yield f"{existing} {problem}: a run that is killed is not reported as interrupted there"


def write_plan(config: pytest.Config, plans: Sequence[Plan]) -> None:
    """Write the plan to the file of ``--llem-plan``, if that is given.

    Raises:
        pytest.UsageError: The file cannot be written, or the number of studies is not one.
    """
    path = Settings.from_config(config).plan
    if path is None:
        return
    if len(plans) != 1:
        raise pytest.UsageError(f"--llem-plan: needs exactly one study, but {len(plans)} were collected")
    try:
        if (problem := overwriting.check_overwrite(path, overwriting.PLAN)) is not None:
            raise pytest.UsageError(f"--llem-plan: {problem}")
        path.write_text(plans[0].to_json(), encoding="utf-8")
    except OSError as error:
        raise pytest.UsageError(f"--llem-plan: {error}") from error


def _same_servers(config: pytest.Config, points: Iterable[Point]) -> Iterator[str]:
    """Yield why servers would be the same on both sides of a comparison."""
    for server in (point.config.server for point in points):
        if server is None:
            continue
        if server.is_attached:
            yield f"server.url {server.url}: a server that runs already is the same on both sides"
        elif config.stash.get(WORKTREE, None) is not None and not runs_python(server):
            yield "the server's command has no {python}, so that it is the same at every revision"


def check_both_sides(
    config: pytest.Config, studies: Mapping[str, StudyConfig], selected: Mapping[str, Iterable[Experiment]]
) -> None:
    """Check that candidate and reference can run. Does nothing without ``--llem-against``.

    Args:
        config: The controller's pytest configuration.
        studies: The studies by run key.
        selected: The experiments to run, by run key.

    Raises:
        pytest.UsageError: An interpreter cannot be used, an engine cannot be imported in it, a server would be the
            same on both sides, or no point of a side can run: the other side would be measured in vain.
    """
    if Settings.from_config(config).against is None:
        return
    problems: dict[str, None] = {}
    for run, study in studies.items():
        points = [one.point for one in selected[run]]
        wanted = [point for point in points if point.skip is None and point.xfail is None]
        side = "the reference" if is_reference(run) else "the candidate"
        preflight = preflight_of(config, run, study)
        found = list(preflight.engines.problems(sorted({point.config.backend for point in wanted})))
        reasons = [] if found else [preflight.refusal(point) for point in wanted]
        if reasons and None not in reasons:
            found = [f"no point can run: {reasons[0]}"]
        problems |= dict.fromkeys(f"{side}: {problem}" for problem in found)
        if is_reference(run):
            problems |= dict.fromkeys(f"{side}: {problem}" for problem in _same_servers(config, points))
    if problems:
        raise pytest.UsageError(f"--llem-against: no experiment was started: {'; '.join(problems)}")


def auto_workers(config: pytest.Config) -> int | None:
    """Return the number of workers with ``-n auto``: one for each set of devices that is free now, at least one.

    Returns:
        None to leave it to xdist, if any argument is not a study or the user has set another number.
    """
    if os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS") or config.option.numprocesses != "auto":
        return None
    if not are_all_studies(config):
        return None
    settings = Settings.from_config(config)
    requests: list[DeviceRequest] = []
    for argument in config.args:
        try:
            study = load_study(config.invocation_params.dir / argument.partition("::")[0], settings.overrides)
        except (StudyError, OSError):  # reported when a worker collects it
            continue
        preflight = Preflight(study, settings.model_path, import_path(config))
        requests += [preflight.request(point.config) for point in study.points if point.skip is None]
    unique = set(requests)
    try:
        free = free_devices({device for one in unique for device in one.pool})
    except DeviceError:  # reported by the experiments
        return 1
    return max(1, _at_a_time(unique, free))


def _at_a_time(requests: Iterable[DeviceRequest], free: set[str]) -> int:
    """Return how many experiments can run at a time on *free* devices."""
    numbers = (len(free.intersection(one.pool)) // one.count for one in requests if one.count)
    return max(numbers, default=0)


def parallelism(config: pytest.Config, plans: Mapping[str, Plan]) -> tuple[int, str | None]:
    """Return how many experiments of *plans* run at a time, and the plan's line about xdist's workers.

    Args:
        config: The configuration of xdist's controller, or of a run without xdist.
        plans: The plans by run key.

    Returns:
        1 and None in a run without xdist, or if one of xdist's own schedulers distributes the experiments.
    """
    if getattr(config.option, "dist", "no") == "no" or not distributes_one_at_a_time(config):
        return 1, None
    workers = len(config.option.tx)
    if config.stash.get(REMOTE, False):  # the devices of this host say nothing about theirs
        return workers, f"workers: {workers}, on other hosts"
    found = {plan.preflight.request(point.config) for plan in plans.values() for point in plan.points}
    requests = [one for one in found if one.count]
    possible = _at_a_time(requests, {device for one in requests for device in one.pool})
    at_a_time = max(1, min(workers, possible))
    text = f"workers: {workers}"
    if workers > at_a_time:
        text += f", of which {at_a_time} can measure at a time"
    return at_a_time, f"{text} ({_devices(requests)})" if requests else None


def _devices(requests: Collection[DeviceRequest]) -> str:
    """Return which devices the experiments take."""
    if all(one.pool == (CPU,) for one in requests):
        return "experiments run on the CPU, one at a time"
    counts = sorted({one.count for one in requests})
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    gpus = max((len(one.pool) for one in requests), default=0)
    return f"an experiment takes {number} of {gpus} GPU{'s' * (gpus > 1)}"
