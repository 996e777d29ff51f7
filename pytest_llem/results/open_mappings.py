"""Types of mappings in a result that may have any keys: the values of keys that pytest-llem reads are checked.

A result that was edited by hand is refused where it is read, and not where one of these values is used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Mapping = dict[str, Any]


class _Keys(BaseModel):
    """Keys that a mapping may have, besides any others. Numbers in quotes are not numbers."""

    model_config = ConfigDict(strict=True)


class _Slo(_Keys):
    attainment: float


class _Load(_Keys):
    concurrency: float | Literal["auto"] | None = None
    rate: float | Literal["auto"] | None = None
    trace: str | None = None
    slo: _Slo | None = None

    @model_validator(mode="after")
    def _has_one(self) -> _Load:
        if self.concurrency is self.rate is self.trace is None:
            raise ValueError("needs concurrency, rate or trace")
        return self


class _Config(_Keys):
    n: int | None = Field(1, ge=0)  # null if it did not reach the engine, 0 if nothing was answered
    energy: Mapping = {}
    load: _Load | None = None


class _Testbed(_Keys):
    energy_ticks: float = 1
    prefill_ticks: float = 1
    cpus: int | list[int] = 1


class _Protocol(_Keys):
    n_cycles: int | Literal["auto"] = 1
    min_cycles: int = 1
    max_cycles: int = 1
    gates: Mapping | None = None
    budgets: list[Mapping] = []
    ungated_points: list[str] = []
    reference: str = ""


def _checked(keys: type[_Keys]) -> AfterValidator:
    """Return a validator of the *keys* of a mapping, which leaves the mapping as it is."""

    def check(mapping: Mapping) -> Mapping:
        keys.model_validate(mapping)
        return mapping

    return AfterValidator(check)


#: Types of fields of a result: a point's configuration and testbed facts, and a study's measurement protocol.
ConfigMapping = Annotated[Mapping, _checked(_Config)]
TestbedMapping = Annotated[Mapping, _checked(_Testbed)]
ProtocolMapping = Annotated[Mapping, _checked(_Protocol)]
