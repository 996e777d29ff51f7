"""Hashes of configurations: fields added by later versions must not change existing hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from pytest_llem.study.config import ExperimentConfig, LoRAConfig, MeasurementConfig
from pytest_llem.study.dataset import DatasetConfig, LengthConfig
from pytest_llem.study.engines import CommandConfig, PyTorchConfig, VLLMConfig
from pytest_llem.study.identity import DESIGN_VERSION, config_hash
from pytest_llem.study.load import LoadConfig, SloConfig
from pytest_llem.study.server import ServerConfig
from tests.conftest import Results, RunPytest, WriteStudy

#: File with the defaults of the current design version.
DEFAULTS = Path(__file__).parent / "golden" / "defaults.json"

OPTIONAL_SECTIONS: dict[str, type[BaseModel]] = {
    "dataset": DatasetConfig,
    "dataset.input_len": LengthConfig,
    "lora": LoRAConfig,
    "pytorch": PyTorchConfig,
    "vllm": VLLMConfig,
    "server": ServerConfig,
    "load": LoadConfig,
    "load.slo": SloConfig,
    "command": CommandConfig,
}


def test_only_fields_that_differ_from_their_default_are_hashed() -> None:
    config = ExperimentConfig.model_validate(
        {"model": "m", "n": 7, "decoder": {"top_k": 3, "top_p": 1.0}, "pytorch": {"batch_size": 1}}
    )
    hashed = f'[{DESIGN_VERSION},{{"decoder":{{"top_k":3}},"model":"m","n":7}}]'
    assert config_hash(config) == hashlib.sha256(hashed.encode()).hexdigest()[:16]


def test_new_field_of_a_section_does_not_change_the_hash() -> None:
    class Later(MeasurementConfig):
        new_field: int = 5

    config = ExperimentConfig(model="m", measurement=MeasurementConfig(min_window_seconds=3))
    later = config.model_copy(update={"measurement": Later(min_window_seconds=3)})
    assert config_hash(later) == config_hash(config)
    used = config.model_copy(update={"measurement": Later(min_window_seconds=3, new_field=6)})
    assert config_hash(used) != config_hash(config)


def test_section_of_defaults_does_not_change_the_hash() -> None:
    config = ExperimentConfig(model="m", backend="vllm")
    spelt = ExperimentConfig(model="m", backend="vllm", vllm=VLLMConfig(), dataset=DatasetConfig())
    assert config_hash(spelt) == config_hash(config)


def test_changed_default_needs_a_new_design_version() -> None:
    known = json.loads(DEFAULTS.read_text(encoding="utf-8"))
    now = dict(_defaults(ExperimentConfig)) | {
        f"{where}.{name}": value
        for where, section in OPTIONAL_SECTIONS.items()
        for name, value in _defaults(section)
    }
    changed = {
        name: (then, now[name]) for name, then in known["defaults"].items() if name in now and now[name] != then
    }
    assert not changed or known["version"] != DESIGN_VERSION, (
        f"defaults changed, from and to: {changed}. A field that has its default is not hashed, so experiments "
        "that ran with the old default would pass for ones with the new: raise identity.DESIGN_VERSION"
    )
    assert known == {"version": DESIGN_VERSION, "defaults": now}, f"write down version and defaults in {DEFAULTS}"


def _defaults(section: type[BaseModel]) -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        value = field.get_default(call_default_factory=True, validated_data={})
        if isinstance(value, BaseModel):
            yield from ((f"{name}.{inner}", one) for inner, one in _defaults(type(value)))
        elif not field.is_required():
            yield name, value


def test_resume_reports_a_design_hashed_by_another_version(
    write_study: WriteStudy, run_pytest: RunPytest, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study(sweep={"noop.size": [1]}, execution={"n_cycles": 1})
    run_pytest().assert_outcomes(passed=1)
    file = results.directory / "manifest.json"
    text = file.read_text(encoding="utf-8")
    for digest in (results.manifest["study_design_hash"], results.manifest["experiments"][0]["config_hash"]):
        text = text.replace(digest, "0" * 16)
    file.write_text(text, encoding="utf-8")
    done = run_pytest("--llem-resume")
    done.stderr.fnmatch_lines(["*cannot be resumed: *: the same points, hashed differently by pytest-llem *"])
