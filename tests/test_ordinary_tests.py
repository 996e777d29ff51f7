"""Every example in docs/ordinary-tests.md passes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "ordinary-tests.md").read_text()
BLOCKS = re.findall(r"^<!-- (slow )?test -->\n```python\n(.*?)^```", PAGE, re.M | re.S)


def test_every_python_block_of_the_page_is_a_test() -> None:
    assert len(BLOCKS) == PAGE.count("```python") == 4


@pytest.mark.parametrize(
    "source",
    [pytest.param(source, marks=pytest.mark.slow if slow else ()) for slow, source in BLOCKS],
    ids=[re.findall(r"def (test_\w+)", source)[-1] for _, source in BLOCKS],
)
def test_example_of_the_page_passes(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    # Without meters, because the short blocks are shorter than a counter's update interval.
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    pytester.makepyfile(test_example=source)
    run = pytester.runpytest_inprocess("-p", "llem", "--strict-markers", "-W", "error")
    run.assert_outcomes(passed=source.count("\ndef test_"))


def test_every_attribute_of_a_reading_is_on_the_page() -> None:
    from pytest_llem import EnergyReading

    names = {name for name in vars(EnergyReading()) if not name.startswith("_")} | {"seconds"}
    table = PAGE.partition("| of `m`")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.M)))) == names
