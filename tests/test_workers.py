"""The number of xdist's workers with ``-n auto``, and what the plan says about workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from pytest_llem._plugin.stash import REMOTE
from pytest_llem.execution.plans import auto_workers, parallelism
from pytest_llem.hardware import gpus as hardware
from pytest_llem.machine import device_request
from pytest_llem.machine.device_locks import owned
from pytest_llem.machine.owner import Owner
from pytest_llem.planning.estimate import server_seconds
from pytest_llem.planning.forecast import Expected
from pytest_llem.planning.plan import Plan
from pytest_llem.planning.preflight import Preflight
from pytest_llem.study.loading import load_study
from tests.support.boards import SECTION, STUDY

UUIDS = ("GPU-wa", "GPU-wb", "GPU-wc", "GPU-wd")

WriteStudy = Callable[..., Path]


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tuple(hardware.Gpu(uuid, "H100", index=at) for at, uuid in enumerate(UUIDS))
    monkeypatch.setattr(device_request, "visible_gpus", lambda: hardware.VisibleGpus(found, found[0]))


@pytest.fixture
def no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_request, "visible_gpus", hardware.VisibleGpus)


@pytest.fixture
def write(write_study: WriteStudy) -> WriteStudy:
    """Write a study of board_engine, given by its sweep."""

    def written(**sweep: Any) -> Path:
        axes = {f"{SECTION}.{name}": values for name, values in sweep.items()}
        return write_study(**{**STUDY, "sweep": axes, SECTION: None})

    return written


def auto(pytester: pytest.Pytester, *files: str) -> int | None:
    config = pytester.parseconfig("-p", "llem", *files)
    config.option.numprocesses = "auto"
    return auto_workers(config)


@pytest.mark.usefixtures("four_gpus")
def test_auto_is_the_number_of_free_sets_of_gpus(pytester: pytest.Pytester, write: WriteStudy) -> None:
    write(gpus=[1, 2])
    assert auto(pytester, "study.yaml") == 4
    write(gpus=[2, 3])
    assert auto(pytester, "study.yaml") == 2
    with owned(UUIDS[:1], Owner.of_this_process("s", "e"), print):
        assert auto(pytester, "study.yaml") == 1, "three are free"
    with owned(UUIDS, Owner.of_this_process("s", "e"), print):
        assert auto(pytester, "study.yaml::experiment") == 1, "at least one, which waits"


@pytest.mark.usefixtures("no_gpus")
def test_auto_is_one_without_gpus(pytester: pytest.Pytester, write: WriteStudy) -> None:
    write(gpus=[1])
    assert auto(pytester, "study.yaml") == 1


@pytest.mark.usefixtures("four_gpus")
def test_auto_of_other_tests_is_left_to_xdist(
    pytester: pytest.Pytester, write: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(gpus=[1])
    pytester.makepyfile(test_other="def test(): pass")
    assert auto(pytester, "study.yaml", "test_other.py") is None
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "3")
    assert auto(pytester, "study.yaml") is None


@pytest.mark.usefixtures("four_gpus")
def test_invalid_study_is_left_to_its_worker(pytester: pytest.Pytester, write_study: WriteStudy) -> None:
    write_study(nonsense=1)
    assert auto(pytester, "study.yaml") == 1


def _said(
    pytester: pytest.Pytester, workers: int, *pools: tuple[tuple[str, ...], int], remote: bool = False
) -> tuple[int, str | None]:
    config = pytester.parseconfig("-p", "llem", "study.yaml")
    config.stash[REMOTE] = remote
    config.option.dist, config.option.tx = "load", ["popen"] * workers
    plans = {}
    for pool, count in pools:
        request = device_request.DeviceRequest(pool, count)
        preflight = SimpleNamespace(request=lambda config, request=request: request)
        plans[str(count)] = SimpleNamespace(points=[SimpleNamespace(config=None)], preflight=preflight)
    return parallelism(config, cast("Any", plans))


def test_plan_says_how_many_measure_at_a_time(pytester: pytest.Pytester) -> None:
    assert _said(pytester, 2, (UUIDS, 1)) == (2, "workers: 2 (an experiment takes 1 of 4 GPUs)")
    assert _said(pytester, 8, (UUIDS, 2)) == (
        2,
        "workers: 8, of which 2 can measure at a time (an experiment takes 2 of 4 GPUs)",
    )
    assert _said(pytester, 3, (UUIDS, 1), (UUIDS, 4)) == (3, "workers: 3 (an experiment takes 1 to 4 of 4 GPUs)")
    assert _said(pytester, 1, (("cpu",), 1)) == (1, "workers: 1 (experiments run on the CPU, one at a time)")
    assert _said(pytester, 2) == (1, None)
    assert _said(pytester, 2, (("cpu",), 1), remote=True) == (2, "workers: 2, on other hosts")


def test_estimate_does_not_divide_the_time_of_points_that_run_alone(
    write_study: WriteStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three points of one GPU run four at a time, and one of four GPUs alone."""
    study = load_study(write_study(sweep={"n": [1, 2, 3, 4]}, execution={"n_cycles": 1}))
    preflight = Preflight(study, (), [])
    counts = {1: 1, 2: 1, 3: 1, 4: 4}
    request = device_request.DeviceRequest
    monkeypatch.setattr(preflight, "request", lambda config: request(UUIDS, counts[config.n]))
    monkeypatch.setattr("pytest_llem.planning.plan.expected", lambda *given: Expected(each=100.0, once=0.0))
    plan = Plan(study, study.experiments, preflight, at_a_time=4)
    started = server_seconds(study.execution)
    assert (plan.seconds, plan.run_seconds) == (400 + started, 3 * 25 + 100 + started)
