"""Base classes and helpers of the sections of a study file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError


class Section(BaseModel):
    """A frozen section of a study file that refuses unknown keys and does not coerce types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class NullableSection(Section):
    """A section in which null means a field's default."""

    NULL_MEANS: ClassVar[frozenset[str]] = frozenset()
    """Fields in which null is a separate value."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: one for key, one in data.items() if one is not None or key in cls.NULL_MEANS}


def check_finite(value: Any, name: str) -> None:
    """Check that an engine's options contain no NaN or infinity, which JSON results cannot represent.

    Args:
        value: The options.
        name: Dotted name of *value*, for the message.

    Raises:
        ValueError: A number is not finite.
    """
    if isinstance(value, dict):
        for key, one in value.items():
            check_finite(one, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for place, one in enumerate(value):
            check_finite(one, f"{name}[{place}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number (got {value})")


def single_error(message: str) -> WrapValidator:
    """Return a validator that reports *message* instead of one error per alternative type."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("single_error", "{message}", {"message": message}) from None

    return WrapValidator(validate)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that a field holds, or may hold; None if it holds values only."""
    kinds = (field.annotation, *get_args(field.annotation))
    return next((one for one in kinds if isinstance(one, type) and issubclass(one, BaseModel)), None)


def flatten(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and value of every leaf of a nested mapping."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
