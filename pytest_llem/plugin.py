"""Implement the pytest hooks that are needed in every run, and fixtures for ordinary tests.

This module is loaded in every pytest run of its environment, so it imports nothing heavy until a study file, an
option, the marker or a fixture is used, or xdist starts workers. The hooks that only studies need are in
``session`` and are registered when a study may be run.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_llem._plugin.declarations import (
    ENERGY_BUDGET,
    MARKER_HELP,
    RESULT_SUFFIXES,
    YAML_SUFFIXES,
    add_options,
    is_any_option_given,
)
from pytest_llem._plugin.stash import OTHER_YAML, SELECTED_AXES, STUDIES

if TYPE_CHECKING:
    from execnet import XSpec
    from xdist.workermanage import WorkerController

    from pytest_llem.energy.metering import EnergyMeter
    from pytest_llem.execution.isolated import IsolatedExperiment


def pytest_addoption(parser: pytest.Parser) -> None:
    add_options(parser)


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    from pytest_llem import hookspecs

    pluginmanager.add_hookspecs(hookspecs)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER_HELP)
    expression = config.getoption("keyword", "") or ""
    if "=" in expression or is_any_option_given(config):
        from pytest_llem.session import configure

        configure(config, expression)  # here, so that errors are reported before anything is collected


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(
    file_path: Path, parent: pytest.Collector
) -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    collected = yield
    if _is_result(file_path, parent) and not any(collected):
        from pytest_llem.collection.result_files import ResultFile

        return [*collected, ResultFile.from_parent(parent, path=file_path)]
    if file_path.suffix not in YAML_SUFFIXES or any(collected):
        return collected  # not YAML, or already collected by another plugin
    named = parent.session.isinitpath(file_path)  # on the command line
    if named or any(fnmatch.fnmatch(file_path.name, one) for one in parent.config.getini("llem_files")):
        from pytest_llem.collection.items import StudyFile

        study_file: StudyFile = StudyFile.from_parent(parent, path=file_path)
        study_file.named = named
        collected.append(study_file)
    else:
        parent.config.stash.setdefault(OTHER_YAML, []).append(file_path)
    return collected


def _is_result(file_path: Path, parent: pytest.Collector) -> bool:
    may_be_result = parent.config.getoption("llem_budgets") and file_path.suffix in RESULT_SUFFIXES
    return bool(may_be_result) and parent.session.isinitpath(file_path)


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    try:
        return (yield)
    except pytest.UsageError as error:
        if STUDIES not in session.config.stash:
            raise
        from pytest_llem.collection.selection import explain_not_found

        studies = session.config.stash[STUDIES]
        messages = [*explain_not_found(session.config, studies)]
        raise pytest.UsageError(*(messages or error.args)) from None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> Generator[None, None, None]:
    if STUDIES not in config.stash and SELECTED_AXES not in config.stash:
        return (yield)
    # Not in ``session``: which plugin orders items last would then depend on when that module is registered.
    from pytest_llem.collection.items import deselect_other_shards, restore_run_order
    from pytest_llem.collection.selection import refuse_unknown_axes
    from pytest_llem.session import register

    register(config)
    if not session.testsfailed:
        refuse_unknown_axes(config.stash.get(STUDIES, {}).values(), session, items)
    deselect_other_shards(config, items)
    restore_run_order(items)  # --stepwise resumes at a position in this order
    yield
    restore_run_order(items)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: pytest.ExitCode, config: pytest.Config
) -> None:
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and (files := config.stash.get(OTHER_YAML, [])):
        from pytest_llem.collection.items import name_hint

        if (hint := name_hint(files, config.invocation_params.dir)) is not None:
            terminalreporter.write_line(f"llem: {hint}", yellow=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: Sequence[XSpec]) -> None:
    if any(not spec.popen or spec.via for spec in specs):
        from pytest_llem.session import prepare_remote_workers

        prepare_remote_workers(config, specs)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: WorkerController) -> None:
    from pytest_llem.session import identify_worker, register

    register(node.config)  # a controller collects nothing; its workers report the studies
    identify_worker(node)


@pytest.hookimpl(optionalhook=True, tryfirst=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    if not all(argument.partition("::")[0].endswith(YAML_SUFFIXES) for argument in config.args):
        return None
    from pytest_llem.execution.plans import auto_workers

    return auto_workers(config)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker(ENERGY_BUDGET) is not None:
        from pytest_llem.execution.energy_budget import EnergyBudget

        EnergyBudget.of(item)  # reports invalid arguments before anything runs


@pytest.hookimpl(wrapper=True, trylast=True)  # innermost, so that other plugins' wrappers are not measured
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    if item.get_closest_marker(ENERGY_BUDGET) is None:
        return (yield)
    from pytest_llem.execution.energy_budget import metered

    with metered(item):
        return (yield)


@pytest.fixture(scope="session")
def energy_meter() -> EnergyMeter:
    """Measure the energy of a block: ``with energy_meter() as m: …``, then ``m.energy_j`` in J and ``m.seconds``.

    ``m.method`` is how the energy was read. ``m.energy_j`` is None if no meter can be read; ``m.reason`` says why.
    ``energy_meter(backend="nvml")`` chooses a meter.

    Example:
        def test_energy_of_summary(energy_meter):
            with energy_meter() as m:
                summarize(TEXT)
            assert m.energy_j < 50
    """
    from pytest_llem.energy.metering import EnergyMeter

    return EnergyMeter()


@pytest.fixture(scope="session")
def isolated_experiment(pytestconfig: pytest.Config) -> IsolatedExperiment:
    """Run an experiment in a new process: ``isolated_experiment({"model": …})`` returns an ExperimentResult.

    A failed experiment raises ``pytest_llem.ExperimentError``. Paths are relative to rootdir; ``timeout=`` is in
    seconds.

    Example:
        def test_throughput(isolated_experiment):
            result = isolated_experiment({"model": "builtin:tiny-llama", "n": 8})
            assert result.metrics["output_tokens_per_second"].value > 100
    """
    from pytest_llem.execution.isolated import IsolatedExperiment

    return IsolatedExperiment(pytestconfig)
