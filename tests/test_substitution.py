"""Placeholders in the arguments of a command."""

from __future__ import annotations

from typing import Any

import pytest

from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.substitution import PlaceholderError, Substitution


def _substitution(**fields: Any) -> Substitution:
    given = {
        "model": "smol",
        "backend": "command",
        "command": {"run": ["x"], "rate": 4.0, "flag": True, "model": "own"},
    }
    return Substitution(ExperimentConfig.model_validate({**given, **fields}), "command", out="/tmp/o.json")


@pytest.mark.parametrize(
    ("argument", "filled"),
    [
        ("plain", "plain"),
        ("{model}", "smol"),  # a field of the study precedes one of the section
        ("{command.model}", "own"),
        ("--rate={rate}", "--rate=4.0"),
        ("{command.rate}/{out}", "4.0//tmp/o.json"),
        ("{flag}", "true"),
        ("{decoder.temperature} {temperature}", "1.0 1.0"),
        ('{{"ignore_eos": {flag}}}', '{"ignore_eos": true}'),
        ("{{rate}}", "{rate}"),
    ],
)
def test_placeholders_are_filled(argument: str, filled: str) -> None:
    assert _substitution().fill([argument]) == [filled]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("{rat}", "unknown placeholder '{rat}' (did you mean 'rate'?)"),
        ('{"a": 1}', "unknown placeholder '{\"a\": 1}': it has to be a field of the experiment; write {{ and }}"),
        ("{enabled}", "unknown placeholder '{enabled}'"),  # of several sections
        ("a}", "a single '}' (got 'a}'): write {{ and }} for braces"),
        ("{pytorch}", "placeholder '{pytorch}' has no value: pytorch is null"),
    ],
)
def test_placeholder_that_cannot_be_filled_is_located(argument: str, message: str) -> None:
    with pytest.raises(PlaceholderError) as raised:
        _substitution().fill(["fine", argument])
    assert str(raised.value).startswith(message)
    assert raised.value.index == 1


def test_fields_of_placeholders_are_named_in_full() -> None:
    found = _substitution().fields_in(["{rate}", "{temperature}x{model}", "{out}", "{{n}}"])
    assert found == {"command.rate", "decoder.temperature", "model"}
