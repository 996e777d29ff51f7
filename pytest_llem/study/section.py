"""What every part of a study file has in common."""

from __future__ import annotations

import inspect
import math
import re
from typing import Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

_ATTRIBUTE = re.compile(r"^    (?P<name>\w+): (?P<text>.+(?:\n {8}.+)*)", re.MULTILINE)


class Section(BaseModel):
    """A frozen part of a study file: unknown keys are errors, nothing is coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class NullableSection(Section):
    """A section in which null stands for a field's default, whatever the field.

    Attributes:
        NULL_MEANS: Those fields in which it is a value of its own.
    """

    NULL_MEANS: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: one for key, one in data.items() if one is not None or key in cls.NULL_MEANS}


def check_finite(value: Any, name: str) -> None:
    """See that what an engine takes by its own names holds numbers only that JSON, and so a result, can hold.

    Raises:
        ValueError: One is none; *name* is where *value* stands.
    """
    if isinstance(value, dict):
        for key, one in value.items():
            check_finite(one, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for place, one in enumerate(value):
            check_finite(one, f"{name}[{place}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number (got {value})")


def field_docs(section: type[BaseModel]) -> dict[str, str]:
    """Return what the docstring of *section* says of each of its fields, by name."""
    _, _, attributes = (inspect.getdoc(section) or "").partition("Attributes:\n")
    return {one["name"]: " ".join(one["text"].split()) for one in _ATTRIBUTE.finditer(attributes)}


def single_error(message: str) -> WrapValidator:
    """Return a validator that tells *message* in place of one error for each type that a value might have had."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("told", "{message}", {"message": message}) from None

    return WrapValidator(validate)
