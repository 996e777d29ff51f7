"""Read the docstrings of fields, for the JSON Schema and the documentation.

pydantic's ``use_attribute_docstrings`` reads them whenever a class is made: nearly half of the import time of each
process.
"""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache
from itertools import pairwise

from pydantic import BaseModel


def field_docstrings(model: type[BaseModel]) -> dict[str, str]:
    """Return the docstrings of a model's fields, also of inherited ones, by the fields' names.

    Example:
        >>> from pytest_llem.results.metrics import Metric
        >>> field_docstrings(Metric)["value"]
        'Value in ``unit``; null if it is not available, never 0 instead.'
    """
    found: dict[str, str] = {}
    for one in reversed(model.__mro__):
        if one.__module__.startswith("pytest_llem."):
            found |= _of_classes(one.__module__)[one.__name__]
    return found


@cache
def _of_classes(module: str) -> dict[str, dict[str, str]]:
    """Return the docstrings of fields by the names of a module's classes."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {one.name: dict(_of_fields(one)) for one in tree.body if isinstance(one, ast.ClassDef)}


def _of_fields(definition: ast.ClassDef) -> list[tuple[str, str]]:
    return [
        (field.target.id, inspect.cleandoc(text.value.value))
        for field, text in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    ]
