"""What is left behind, and what is said, where something goes wrong."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_llem import registry
from pytest_llem.backends.protocol import PreflightError
from pytest_llem.measurement.orchestrator import ExperimentOrchestrator
from pytest_llem.planning.deadline import deadline_seconds
from pytest_llem.planning.host import Host
from pytest_llem.study.execution import ExecutionConfig
from tests.support.tiny import config


class TestClosing:
    @pytest.mark.usefixtures("noop_engine")
    @pytest.mark.parametrize(
        ("raising", "changes", "error"),
        [
            ("fetch", {}, RuntimeError),
            ("load", {}, RuntimeError),
            ("generate", {}, RuntimeError),
            (None, {"energy": {"backend": "nvml"}}, PreflightError),
            (None, {}, None),
        ],
        ids=["fetch", "load", "generate", "meter", "nothing"],
    )
    def test_the_engine_is_closed_whatever_raises(
        self,
        monkeypatch: pytest.MonkeyPatch,
        raising: str | None,
        changes: dict[str, Any],
        error: type[Exception] | None,
    ) -> None:
        engine: Any = registry.load(registry.BACKENDS, "noop")
        closed: list[object] = []

        def fail(*_: object) -> None:
            raise RuntimeError("no")

        if raising is not None:
            monkeypatch.setattr(engine, raising, fail)
        monkeypatch.setattr(engine, "close", lambda self: closed.append(self))
        orchestrator = ExperimentOrchestrator(config(backend="noop", **changes))
        if error is None:
            orchestrator.run()
        else:
            with pytest.raises(error):
                orchestrator.run()
        assert len(closed) == 1


class TestDeadline:
    def test_an_engine_of_unknown_cost_gets_hours_and_not_days(self) -> None:
        def deadline(n: int) -> float:
            asked = config(backend="other", n=n, max_output_tokens=2000)
            return deadline_seconds(asked, ExecutionConfig(), None, Host(2**36))

        assert 2 * 3600 < deadline(50) < deadline(100) < deadline(1000) == deadline(100_000) == 6 * 3600
