"""The JSON Schema of a study file: agreement with the loader and with the models' docstrings."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import pytest_llem
from pytest_llem import registry
from pytest_llem.study.document import load_document
from pytest_llem.study.grid import STUDY_KEYS
from pytest_llem.study.loading import load_study
from pytest_llem.study.problems import StudyError
from pytest_llem.study.schema import field_docstrings, study_schema
from pytest_llem.study.section import Section
from tests.conftest import NOOP_STUDY, ROOT
from tests.support.pages import blocks

SHIPPED = Path(pytest_llem.__file__).parent / "study.schema.json"
RENEW = "python -m pytest_llem.study.schema > pytest_llem/study.schema.json"
MODELINE = "# yaml-language-server: $schema=../pytest_llem/study.schema.json"

SCHEMA = study_schema()
VALIDATOR = Draft202012Validator(SCHEMA)

STUDIES = sorted((ROOT / "studies").glob("*.yaml"))


#: Cached because looking up entry points takes most of the time of loading a study.
_entry_points = functools.cache(entry_points)


@pytest.fixture
def entry_points_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "entry_points", _entry_points)


def schema_errors(document: Any, validator: Draft202012Validator = VALIDATOR) -> list[str]:
    return [f"{error.json_path}: {error.message[:200]}" for error in validator.iter_errors(document)]


def read(folder: Path, text: str) -> Any:
    """Write a study file and return its data as read by the loader."""
    file = folder / "s.yaml"
    file.write_text(text, encoding="utf-8")
    return load_document(file).data


def loaded(folder: Path) -> bool:
    """Return whether the study loads."""
    try:
        load_study(folder / "s.yaml")
    except StudyError:
        return False
    return True


def test_schema_is_valid_json_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == Draft202012Validator.META_SCHEMA["$id"]


def test_shipped_schema_is_up_to_date() -> None:
    assert json.loads(SHIPPED.read_text()) == SCHEMA, f"renew it: {RENEW}"


def test_schema_has_every_key_of_a_study() -> None:
    assert list(SCHEMA["properties"])[: len(STUDY_KEYS)] == list(STUDY_KEYS)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_example_studies_are_valid_and_name_the_schema(path: Path) -> None:
    assert schema_errors(load_document(path).data) == []
    modeline, _, _ = path.read_text().partition("\n")
    assert modeline == MODELINE
    assert (path.parent / modeline.partition("=")[2]).samefile(SHIPPED)


def test_study_in_the_readme_is_valid(tmp_path: Path) -> None:
    assert schema_errors(read(tmp_path, blocks((ROOT / "README.md").read_text(), "yaml")[0])) == []


GOOD = [
    "model: m",
    "model: [a, b]",
    "sweep: {model: [a, b]}",
    "experiments: [{model: a}, {model: b, precision: fp32}]",
    "name: my-study\nversion: 2.0\nmodel: m",
    "version: [what, ever]\nmodel: m",
    "model: m\nbase:",
    "model: m\nexecution:\nrunners:\nskip:\nxfail:",
    "model: m\nskip: []",
    "model: m\nsweep: {precision: bf16}",
    "model: m\nsweep: {precision: [bf16, fp16], decoder.temperature: [0, 0.5, 1], pytorch.batch_size: 8}",
    "model: m\nsweep: {decoder: [{top_k: 1}, {top_k: 2}], dataset: [a.txt, {n: 4}]}",
    "model: m\nsweep: {dataset.input_len: [8, {mean: 8, stdev: 2}, {min: 4, max: 12}]}",
    "model: m\ndataset: {input_len: {mean: 8, max: 20}}\nsweep: {dataset.input_len.stdev: [0, 2, 4.5]}",
    "model: m\nsweep: {dataset.n: [1, 2], pytorch.revision: [null, v1], pytorch.batch_size: [null, 2]}",
    "model: m\nsweep: {pytorch.device_map: [auto, {model: 0, lm_head: cpu}]}",
    "model: m\npytorch: {device_map: auto}\nsweep: {pytorch.max_memory.0: [10GiB, 5]}",
    "model: m\nbackend: [pytorch, vllm]",
    "model: m\nsweep: {pytorch.batch_size: [1, 2], vllm.engine.max_num_seqs: [1, 2], tensorrt.any.thing: [a]}",
    "model: m\nsweep: {tensorrt.of_its_own: [[1, 2], [3]]}",
    "model: m\nbackend: vllm\nvllm: {engine: {block_size: 16, hf_overrides: {x: [1]}}, sampling: {stop: [a]}}",
    "model: m\nbackend: tensorrt\ntensorrt: {x: {y: z}}",
    "model: m\npassthrough_kwargs: {penalty_alpha: 0.6}\nsweep: {passthrough_kwargs.guidance_scale: [1, 2.5]}",
    "model: m\nbackend: mine.engines:Engine\nmine.engines:Engine: {x: 1}",
    "model: m\nbackend: mine:Engine\nsweep: {'mine:Engine.x.y': [1, 2]}",
    "model: m\nsweep: {backend: [pytorch, 'a.b:C'], 'a.b:C': [{x: 1}, {x: 2}]}",
    "model: m\npytorch:\nvllm: ~",
    "model: m\npytorch: {batch_size: ~, use_cache: ~, num_beams: 4}",
    "model: m\nlora: {adapter_id: a, merge_weights: true}",
    "model: m\nenergy: {backend: ~, allow_estimated: true}",
    "model: m\ndecoder: {preset: creative, temperature: 1, min_p: 0.1}",
    "model: m\nmeasurement: {min_window_seconds: 0, length_mode: natural}",
    "model: m\nbaseline: {duration_seconds: 5}",
    "model: m\nexecution: {n_cycles: ~, cycle_gap_seconds: 1.5, experiment_gap_seconds: auto}",
    "model: m\nexecution: {experiment_gap_seconds: 3, shuffle_seed: -1, experiment_timeout_seconds: 60}",
    "model: m\nexecution: {max_consecutive_failures: 1}",
    "model: m\nexecution: {max_consecutive_failures: ~}",
    "model: m\nrunners: {pytorch: local, vllm: local}",
    "model: m\nsweep: {n: [1, 2]}\nskip: [{where: {n: 1}}]\nxfail: [{where: {n: [2, 3]}, reason: r}]",
    "model: m\nbudgets: {energy_j: 4, seconds: {max: 1e-3}, ttft_p50_ms: {min: 1, max: ~}, active_energy_j: -1}",
    "model: m\nbudgets: [{metric: energy_j, max: 4}, {metric: seconds, min: 1, where: {n: 100}}]",
    "model: m\nbudgets:\ngates:",
    "model: m\nbudgets: {}\ngates: {}",
    "model: m\nbudgets: []",
    "model: m\nexperiments: [{n: 1, budgets: {seconds: 4}}, {n: 2, budgets: }, {n: 3, budgets: []}]",
    "model: m\ngates: {alpha: 0.05, delta: 0, metrics: [seconds, energy_j]}",
    "model: m\ngates: {alpha: ~, delta: {ttft_p50_ms: 0.1, mfu: 0.5}, metrics: ~}",
    "model: m\noutput_dir: out",
    "model: m\nrandom_seed: 9223372036854775807",
]


@pytest.mark.usefixtures("entry_points_once")
@pytest.mark.parametrize("text", GOOD)
def test_studies_that_load_are_valid(tmp_path: Path, text: str) -> None:
    assert schema_errors(read(tmp_path, text)) == []
    assert loaded(tmp_path)


def test_field_may_be_given_by_a_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("model: m\nn: 3\n")
    assert schema_errors(read(tmp_path, "base: base.yaml\nsweep: {precision: [bf16]}\n")) == []
    assert loaded(tmp_path)


WRONG = [
    # Unknown keys at each level.
    "precison: bf16",
    "banana: {a: 1}",
    "pytorch.batch_size: 8",
    "decoder: {temprature: 1}",
    "dataset: {inputlen: 1}",
    "warmup: {n: 1}",
    "baseline: {seconds: 30}",
    "energy: {meter: nvml}",
    "measurement: {window: 1}",
    "pytorch: {batchsize: 1}",
    "lora: {adapter_id: a, rank: 8}",
    "execution: {n_cycle: 1}",
    "skip: [{where: {n: 1}, why: x}]",
    "experiments: [{n: 1}, {m: 1}]",
    "experiments: [{decoder: {topp: 1}}]",
    "experiments: [{name: a}]",
    "experiments: [{sweep: {n: [1]}}]",
    "experiments: [{decoder.top_k: 8}]",
    "'a.b': {x: 1}",
    # Values of wrong types.
    "- n",
    "n: x",
    "n: 1.5",
    "n: '4'",
    "n: true",
    "n:",
    "n: [1, 2]",
    "name: 5",
    "name:",
    "base: 5",
    "base: ''",
    "model: 5",
    "model: ''",
    "model: [a, 5]",
    "backend: 5",
    "decoder: 5",
    "decoder:",
    "decoder: {temperature: hot}",
    "decoder: {do_sample: 1}",
    "dataset: 5",
    "dataset: ''",
    "pytorch: [batch_size]",
    "pytorch: {revision: 1234}",
    "pytorch: {device_map: [0]}",
    "pytorch: {max_memory: {'0': [1]}}",
    "backend: vllm\nvllm: {engine: 5}",
    "backend: tensorrt\ntensorrt: 5",
    "backend: mine:Engine\nmine:Engine: 5",
    "passthrough_kwargs: [a]",
    "energy: {backend: [nvml]}",
    "execution: []",
    "execution: {skip_preflight: 1}",
    "execution: {experiment_gap_seconds: soon}",
    "runners: [local]",
    "runners: {pytorch: 5}",
    "runners: {pytorch: ''}",
    "skip: {where: {n: 1}}",
    "skip: [n]",
    "xfail: [{where: [n]}]",
    "xfail: [{reason: r}]",
    "experiments: {n: 1}",
    "experiments: [n]",
    "sweep: [n]",
    "sweep:",
    # Values out of range, and unknown words.
    "n: 0",
    "n: 100000001",
    "random_seed: -1",
    "decoder: {temperature: -1e-4}",
    "decoder: {top_p: 1.1}",
    "decoder: {top_p: 0}",
    "dataset: {n: 0}",
    "warmup: {window_size: 1}",
    "baseline: {duration_seconds: 4}",
    "execution: {n_cycles: 0}",
    "execution: {experiment_gap_seconds: -1}",
    "execution: {experiment_timeout_seconds: 0}",
    "execution: {max_consecutive_failures: 0}",
    "execution: {max_consecutive_failures: 2.5}",
    "pytorch: {batch_size: 0}",
    "precision: bf17",
    "backend: nope",
    "backend: [pytorch, nope]",
    "backend: a:b:c",
    "prompt_format: jinja",
    "decoder: {preset: wild}",
    "measurement: {length_mode: long}",
    "execution: {cycle_order: random}",
    "pytorch: {bnb_4bit_quant_type: int4}",
    "runners: {nope: local}",
    "name: a/b",
    "name: ..",
    'name: "a\\nb"',
    "skip: [{where: {}}]",
    # Gates.
    "budgets: 5",
    "budgets: {energy: 1}",
    "budgets: {energy_j: }",
    "budgets: {energy_j: '1'}",
    "budgets: {energy_j: true}",
    "budgets: {energy_j: {}}",
    "budgets: {energy_j: {maximum: 1}}",
    "budgets: {energy_j: {max: x}}",
    "budgets: {energy_j: {max: 1, where: {n: 1}}}",
    "budgets: [energy_j]",
    "budgets: [{energy_j: 1}]",
    "budgets: [{max: 1}]",
    "budgets: [{metric: , max: 1}]",
    "budgets: [{metric: energy_j}]",
    "budgets: [{metric: energy, max: 1}]",
    "budgets: [{metric: energy_j, max: 1, where: {}}]",
    "experiments: [{n: 1, budgets: {energy: 1}}]",
    "experiments: [{n: 1, gates: {}}]",
    "sweep: {budgets: [1, 2]}",
    "gates: 5",
    "gates: {alpha: 0}",
    "gates: {alpha: 0.5}",
    "gates: {delta: 1}",
    "gates: {delta: x}",
    "gates: {delta: {energy: 0.1}}",
    "gates: {delta: {energy_j: -0.1}}",
    "gates: {metrics: energy_j}",
    "gates: {metrics: []}",
    "gates: {metrics: [energy]}",
    "gates: {metrics: [mean_power_w]}",
    "gates: {metrics: [energy_j, energy_j]}",
    "gates: {metric: [energy_j]}",
    # Axes.
    "sweep: {}",
    "sweep: {precison: [bf16]}",
    "sweep: {pytorch.batch_sise: [1]}",
    "sweep: {batch_size: [1]}",
    "sweep: {decoder.temperature.x: [1]}",
    "sweep: {precision.x: [1]}",
    "sweep: {name: [a]}",
    "sweep: {execution.n_cycles: [1]}",
    "sweep: {other.size: [1]}",
    "sweep: {n: []}",
    "sweep: {n: [1, 0]}",
    "sweep: {n: 0}",
    "sweep: {n: [[1, 2]]}",
    "sweep: {precision: [bf16, bf17]}",
    "sweep: {pytorch: {batch_size: [1, 8]}}",
    "sweep: {dataset: [{n: 1}, {nn: 2}]}",
    "dataset: {input_len: {mn: 1, max: 2}}",
    "dataset: {input_len: {min: 0, max: 2}}",
    "sweep: {dataset.input_len.mn: [1, 2]}",
    "sweep: {dataset.input_len: [{mean: 4, stdev: 1}, {mean: x, stdev: 1}]}",
    "sweep: {vllm.engine.x: []}",
    "sweep: {passthrough_kwargs.x: []}",
    "experiments: []",
    "model: []",
]


@pytest.mark.usefixtures("entry_points_once")
@pytest.mark.parametrize("text", WRONG)
def test_studies_that_do_not_load_are_invalid(tmp_path: Path, text: str) -> None:
    start = "" if text.startswith(("model:", "-")) else "model: m\n"
    document = read(tmp_path, start + text)
    assert not loaded(tmp_path)
    assert schema_errors(document)


#: One value of each kind.
PROBES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 30, 10**9, 2**63 - 1, -0.5, 0.5, 1.5, 1e-30),
    *("", "x", "auto", "fp16", "nf4", "fixed", "shuffled", "pytorch", "a.b:C", "a:b:c"),
    *([], [1], ["x"], {}, {"n": 1}, {"top_k": 1}, {"x": {"y": []}}, {"enabled": True}),
]

#: Fields that the schema does not restrict, because valid values depend on what is installed.
BY_MACHINE = {"energy.backend"}


@pytest.mark.usefixtures("entry_points_once")
@pytest.mark.parametrize("axis", sorted(set(SCHEMA["properties"]["sweep"]["properties"]) - BY_MACHINE))
def test_loader_and_schema_agree_on_every_value(tmp_path: Path, axis: str) -> None:
    """The value is on an axis, so that an incompatible combination is excluded and is not an error."""
    for value in PROBES:
        others: dict[str, Any] = {"model": "m"} if axis != "model" else {}
        if axis.startswith("command"):
            if value is None and axis == "command":
                continue  # required, which a schema cannot say of a field of one engine
            others = {"backend": "command", "command": {"run": ["x"]}}
        study = {**others, "sweep": {axis: [value]}}
        (tmp_path / "s.yaml").write_text(yaml.safe_dump(study))
        try:
            load_study(tmp_path / "s.yaml")
        except StudyError as error:
            refused = not all("no valid combination" in problem.message for problem in error.problems)
        else:
            refused = False
        assert bool(schema_errors(study)) == refused, (axis, value, schema_errors(study))


class TestEngines:
    def test_installed_engine_has_a_section_with_any_content(self, tmp_path: Path, noop_engine: None) -> None:
        validator = Draft202012Validator(study_schema(["noop", "pytorch"]))
        assert schema_errors(NOOP_STUDY, validator) == []
        study = {**NOOP_STUDY, "noop": {"report": "."}, "runners": {"noop": "local"}}
        assert schema_errors(study, validator) == []
        assert loaded_as(tmp_path, study)
        for wrong in (
            {**study, "noop": 5},
            {**study, "sweep": {"noop.size": []}},
            {**study, "sweep": {"noopsize": 1}},
        ):
            assert schema_errors(wrong, validator)
            assert not loaded_as(tmp_path, wrong)

    def test_engine_that_is_not_installed_is_unknown(self) -> None:
        assert schema_errors(NOOP_STUDY)

    def test_engine_name_is_escaped_in_patterns(self) -> None:
        validator = Draft202012Validator(study_schema(["my.engine+"]))
        assert schema_errors({"sweep": {"my.engine+.size": [1]}}, validator) == []
        assert schema_errors({"sweep": {"my-engine+.size": [1]}}, validator)

    def test_installed_engine_does_not_replace_one_of_the_grammar(self) -> None:
        assert study_schema(["pytorch", "server", "vllm"]) == SCHEMA


def loaded_as(folder: Path, study: Any) -> bool:
    (folder / "s.yaml").write_text(yaml.safe_dump(study))
    return loaded(folder)


def _schemas(node: Any, at: str = "$") -> Iterator[tuple[str, Any]]:
    """Yield the path and schema of each property."""
    if isinstance(node, dict):
        for keyword in ("properties", "patternProperties"):
            for name, one in node.get(keyword, {}).items():
                yield f"{at}.{name}", one
                yield from _schemas(one, f"{at}.{name}")
        for keyword, one in node.items():
            if keyword == "$defs":
                for name, definition in one.items():
                    yield from _schemas(definition, name)
            elif keyword not in ("properties", "patternProperties"):
                yield from _schemas(one, at)
    elif isinstance(node, list):
        for one in node:
            yield from _schemas(one, at)


def test_every_property_is_described() -> None:
    found = dict(_schemas(study_schema(["noop"])))
    assert {"$.precision", "$.sweep.pytorch.batch_size", "Rule.where", "ExecutionConfig.n_cycles", "$.noop"} <= {
        *found
    }
    for place, schema in found.items():
        assert re.match(r"[\w(].*\w.*\.$", schema.get("description", "")), place
        assert "``" not in schema["description"], place
        assert ":class:" not in schema["description"], place


def test_every_default_is_given() -> None:
    defaults = {place: schema["default"] for place, schema in _schemas(SCHEMA) if "default" in schema}
    for model in sections():
        for name, field in model.model_fields.items():
            if field.default is not PydanticUndefined:
                assert defaults[f"{model.__name__}.{name}"] == field.default


def sections() -> list[type[BaseModel]]:
    """Return all sections of a study file."""
    found: list[type[BaseModel]] = []
    new: list[type[BaseModel]] = [Section]
    while new:
        one = new.pop()
        new += [kind for kind in one.__subclasses__() if kind.__module__.startswith("pytest_llem.study.")]
        found += [one] if one.model_fields else []
    return sorted(found, key=lambda model: model.__name__)


def test_schema_has_every_section() -> None:
    assert {model.__name__ for model in sections()} == {*SCHEMA["$defs"]}


@pytest.mark.parametrize(
    ("model", "field"), [pytest.param(model, name, id=f"{model.__name__}.{name}")
                         for model in sections() for name in model.model_fields]
)  # fmt: skip
def test_docstring_describes_every_field_and_its_default(model: type[Any], field: str) -> None:
    info = model.model_fields[field]
    text = " ".join(field_docstrings(model)[field].split())
    assert text.endswith(".")
    if info.is_required():
        assert re.search(r"\bRequired\.", text)
        return
    in_words = re.search(r"\bDefault: \w", text)
    stated = re.search(r"\bDefault (?:``(?P<text>[^`]+)``|(?P<value>\S+?))(?=[,:;.]* |[,:;.]*$)", text)
    if info.default is PydanticUndefined or info.default is None or info.default == "":
        assert in_words or (stated and stated["value"] == "null"), text
    elif isinstance(info.default, str):
        assert stated, text
        assert stated["text"] == info.default
    else:
        assert stated, text
        value = json.loads(stated["value"])
        assert value == info.default
        assert isinstance(value, bool) == isinstance(info.default, bool)
