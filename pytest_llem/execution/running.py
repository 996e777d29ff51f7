"""Hooks around each item. They are registered only if a study runs, so that other pytest runs do not pay."""

from __future__ import annotations

from collections.abc import Generator

import pytest

from pytest_llem.execution.device_lease import lease_devices
from pytest_llem.execution.experiment import REPLAYED_PROPERTY, attach_payload, place_skip


class Running:
    """The plugin of every process that runs or records a study's items."""

    @pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of plugins that time the item
    def pytest_runtest_protocol(
        self, item: pytest.Item, nextitem: pytest.Item | None
    ) -> Generator[None, object, object]:
        with lease_devices(item, nextitem):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if call.when == "call":
            attach_payload(item, report)
            place_skip(item, report)
        return report

    @pytest.hookimpl
    def pytest_report_teststatus(
        self, report: pytest.CollectReport | pytest.TestReport
    ) -> tuple[str, str, str] | None:
        is_passed = report.when == "call" and report.passed
        if is_passed and any(name == REPLAYED_PROPERTY for name, _ in report.user_properties):
            return "passed", ".", "REPLAYED"
        return None
