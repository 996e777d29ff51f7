"""Make the parts of a result that describe the window, its tokens and devices, and the configuration that ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pytest_llem.energy.account import Account
from pytest_llem.measurement.requests import Requests
from pytest_llem.measurement.window import Window
from pytest_llem.results.experiment import DeviceEnergy, ExperimentResult, TokenRecord, WindowRecord
from pytest_llem.results.statistics import total_of
from pytest_llem.study.config import ExperimentConfig
from pytest_llem.times import utc
from pytest_llem.workload.prompts import Workload


def token_record(workload: Workload, requests: Requests, positions: int | None) -> TokenRecord:
    """Return the token counts of a pass.

    Args:
        workload: The prompts.
        requests: Requests of the window.
        positions: Input positions of a pass, padding included; None if unknown.
    """
    input_tokens = requests.input_tokens
    return TokenRecord(
        prompts=len(workload.prompts),
        input_tokens=input_tokens,
        output_tokens=total_of(request.output_tokens for request in requests.passes[0]),
        truncated_prompts=workload.truncated,
        padding_waste=None if positions is None or input_tokens is None else 1 - input_tokens / positions,
        output_digest=requests.output_digest(),
        deterministic=requests.deterministic,
        dataset_hash=workload.digest,
        dataset_revision=workload.revision,
        requests=requests.total,
        failed_requests=requests.failed,
        batches=dict(sorted(Counter(requests.sizes).items())) or None,
    )


def device_energies(account: Account) -> list[DeviceEnergy]:
    """Return each device's energy over the whole window."""
    return [DeviceEnergy.model_validate(asdict(device)) for device in account.devices]


def window_record(window: Window) -> WindowRecord:
    """Return the window's record: its length, energy, drift and resolution."""
    account = window.account
    return WindowRecord(
        **window.pass_fields,
        window_seconds=window.seconds,
        window_energy_j=account.total.energy_j,
        energy_seconds=account.seconds,
        tick_seconds=account.tick_seconds,
        quantisation_error=1 / account.ticks if account.ticks else None,
        tail_seconds=account.seconds - window.seconds if account.seconds else None,
        read_skew_seconds=account.read_skew_seconds,
        began_at=utc(window.began_at, "microseconds"),
        ended_at=utc(window.began_at + window.ended - window.began, "microseconds"),
        restarts=window.restarts,
        compiled=window.compiled,
    )


def effective_config(config: ExperimentConfig, unused: Iterable[str]) -> dict[str, Any]:
    """Return *config* as it ran, as plain data.

    Args:
        config: The experiment.
        unused: Fields that did not reach the engine. They become null; ``measurement.length_mode`` becomes
            ``natural``.
    """
    data = config.model_dump(mode="json")
    for name in unused:
        section, _, key = name.rpartition(".")
        fields = data[section] if section else data
        fields[key] = "natural" if name == "measurement.length_mode" else None
    return data


@dataclass(frozen=True)
class Measured:
    """The outcome of an experiment.

    Attributes:
        result: The result to save.
        requests: The requests that are saved; None if a command's file has none.
        files: Contents of the files to save with the result, by file name suffix.
    """

    result: ExperimentResult
    requests: Requests | None
    files: Mapping[str, str]
