"""Every example in docs/how-to/ordinary-tests.md passes."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.pages import blocks, page

PAGE = page("how-to/ordinary-tests.md")
BLOCKS = blocks(PAGE, "python")


def test_every_python_block_of_the_page_is_a_test() -> None:
    assert len(BLOCKS) == 5
    assert all("\ndef test_" in block for block in BLOCKS)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(source, marks=pytest.mark.slow if re.search("timeout=|run_study", source) else ())
        for source in BLOCKS
    ],
    ids=[re.findall(r"def (test_\w+)", source)[-1] for source in BLOCKS],
)
def test_example_of_the_page_passes(
    pytester: pytest.Pytester, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    # Without meters, because the short blocks are shorter than a counter's update interval.
    monkeypatch.setenv("LLEM_POWERCAP_ROOT", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    shutil.copytree(ROOT / "studies", pytester.path / "studies")
    pytester.makepyfile(test_example=source)
    run = pytester.runpytest_inprocess("-p", "llem", "--strict-markers", "-W", "error")
    run.assert_outcomes(passed=source.count("\ndef test_"))


def test_every_attribute_of_a_reading_is_on_the_page() -> None:
    from pytest_llem import EnergyReading

    names = {name for name in vars(EnergyReading()) if not name.startswith("_")} | {"seconds"}
    table = PAGE.partition("| attribute |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", table, re.M)))) == names
