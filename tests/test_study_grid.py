"""Points of a study: expansion of the sweep, names, hashes and run order."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from pytest_llem.study.config import ExperimentConfig
from pytest_llem.study.design import Point, run_order
from pytest_llem.study.engines import PyTorchConfig
from pytest_llem.study.execution import CycleOrder
from pytest_llem.study.identity import config_hash, point_id, short_names, value_text
from pytest_llem.study.loading import StudyConfig, is_study, load_study
from pytest_llem.study.problems import StudyError


def load(folder: Path, text: str, name: str = "some.study.yaml") -> StudyConfig:
    file = folder / name
    file.write_text(textwrap.dedent(text), encoding="utf-8")
    return load_study(file)


def ids(study: StudyConfig) -> list[str]:
    return [point.id for point in study.points]


@pytest.fixture
def other_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Install a second engine as an entry point of a distribution."""
    site = tmp_path / "site"
    metadata = site / "other_engine-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / "other_engine.py").write_text("class OtherEngine: ...\n", encoding="utf-8")
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: other-engine\nVersion: 1.0\n", encoding="utf-8"
    )
    (metadata / "entry_points.txt").write_text(
        "[pytest_llem.engines]\nother = other_engine:OtherEngine\nthird = other_engine:OtherEngine\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(str(site))
    return "other"


def pytorch(point: Point) -> PyTorchConfig:
    """Return the section ``pytorch`` of a point."""
    assert point.config.pytorch
    return point.config.pytorch


class TestSweep:
    def test_scoped_axes_follow_universal_axes_and_last_is_fastest(self, tmp_path: Path) -> None:
        study = load(
            tmp_path,
            """\
            model: m
            sweep:
              pytorch.batch_size: [1, 8]
              precision: [bf16, fp32]
              pytorch.use_cache: [true, false]
              n: [8, 16]
            """,
        )
        expected = [
            {"precision": precision, "n": n, "pytorch.batch_size": size, "pytorch.use_cache": cache}
            for precision in ("bf16", "fp32")
            for n in (8, 16)
            for size in (1, 8)
            for cache in (True, False)
        ]
        assert [point.axes for point in study.points] == expected
        assert [list(point.axes) for point in study.points] == [list(axes) for axes in expected]
        assert ids(study)[1] == "precision=bf16-n=8-batch_size=1-use_cache=false"

    def test_points_hold_their_axis_values_and_the_shared_fields(self, tmp_path: Path) -> None:
        study = load(
            tmp_path,
            """\
            model: m
            n: 9
            pytorch: {attn_implementation: eager, batch_size: 3}
            sweep: {pytorch.batch_size: [1, 8]}
            """,
        )
        assert [point.config.n for point in study.points] == [9, 9]
        assert [pytorch(point).model_dump()["batch_size"] for point in study.points] == [1, 8]
        assert {pytorch(point).attn_implementation for point in study.points} == {"eager"}

    def test_a_scalar_is_an_axis_of_one_value(self, tmp_path: Path) -> None:
        study = load(tmp_path, "model: m\nsweep: {precision: fp16, n: [1, 2]}\n")
        assert ids(study) == ["precision=fp16-n=1", "precision=fp16-n=2"]

    def test_dotted_axis_sets_one_field_of_a_section(self, tmp_path: Path) -> None:
        study = load(
            tmp_path,
            """\
            model: m
            decoder: {top_k: 3}
            sweep: {decoder.temperature: [0.5, 1e-4], warmup.enabled: false}
            """,
        )
        assert [point.config.decoder.temperature for point in study.points] == [0.5, 0.0001]
        assert {point.config.decoder.top_k for point in study.points} == {3}
        assert ids(study) == ["temperature=0.5-enabled=false", "temperature=0.0001-enabled=false"]

    def test_a_mapping_can_be_an_axis_value(self, tmp_path: Path) -> None:
        study = load(tmp_path, "model: m\nsweep:\n  dataset: [synthetic, {n: 2, input_len: 9}]\n")
        assert [point.config.workload.n for point in study.points] == [100, 2]
        assert ids(study) == ["dataset=synthetic", 'dataset={"input_len":9,"n":2}']

    def test_a_whole_section_can_be_an_axis(self, tmp_path: Path) -> None:
        study = load(tmp_path, "model: m\nsweep:\n  pytorch: [{batch_size: 2}, {use_cache: false}]\n")
        assert [pytorch(point).batch_size for point in study.points] == [2, 1]

    def test_a_list_of_models_is_the_slowest_axis(self, tmp_path: Path) -> None:
        study = load(tmp_path, "sweep: {n: [1, 2]}\nmodel: [org/a, b]\n")
        assert ids(study) == ["model=org/a-n=1", "model=org/a-n=2", "model=b-n=1", "model=b-n=2"]

    def test_a_list_of_models_needs_no_sweep(self, tmp_path: Path) -> None:
        assert ids(load(tmp_path, "model: [a, b]\n")) == ["model=a", "model=b"]

    def test_axes_with_the_same_last_part_keep_their_full_names(self, tmp_path: Path) -> None:
        study = load(tmp_path, "model: m\nsweep: {warmup.enabled: [true], baseline.enabled: [false], n: [3]}\n")
        assert ids(study) == ["warmup.enabled=true-baseline.enabled=false-n=3"]
        assert study.axis_names == {
            "warmup.enabled": "warmup.enabled",
            "baseline.enabled": "baseline.enabled",
            "n": "n",
        }

    def test_merge_keys_and_aliases_are_expanded(self, tmp_path: Path) -> None:
        study = load(
            tmp_path,
            """\
            model: m
            decoder: &cold {temperature: 0.5, top_k: 3}
            sweep:
              decoder: [*cold, {<<: *cold, top_k: 4}]
            """,
        )
        assert [(p.config.decoder.temperature, p.config.decoder.top_k) for p in study.points] == [
            (0.5, 3),
            (0.5, 4),
        ]

    def test_version_is_accepted_and_ignored(self, tmp_path: Path) -> None:
        assert load(tmp_path, "model: m\nversion: '2.0'\n").design_hash == load(tmp_path, "model: m\n").design_hash

    def test_dates_and_similar_words_are_strings(self, tmp_path: Path) -> None:
        study = load(tmp_path, "model: m\nsweep:\n  pytorch.revision: [2024-05-01, main]\n")
        assert [pytorch(point).revision for point in study.points] == ["2024-05-01", "main"]


class TestExplicitExperiments:
    def test_listed_experiments_are_named_by_differing_fields(self, tmp_path: Path) -> None:
        study = load(
            tmp_path,
            """\
            model: m
            experiments:
              - {precision: fp32, n: 4, pytorch: {batch_size: 1}}
              - {precision: bf16, n: 4, pytorch: {batch_size: 1, use_cache: false}}
            """,
        )
        assert ids(study) == ["precision=fp32", "precision=bf16-use_cache=false"]

    def test_single_listed_experiment_is_named_by_its_model(self, tmp_path: Path) -> None:
        assert ids(load(tmp_path, "model: org/m\nexperiments:\n- {n: 2}\n")) == ["model=org/m"]

    def test_listed_experiments_override_shared_fields_shallowly(self, tmp_path: Path) -> None:
        study = load(
            tmp_path,
            """\
            model: m
            n: 9
            decoder: {temperature: 0.5, top_k: 3}
            experiments:
              - {decoder: {top_k: 4}}
              - {n: 2}
            """,
        )
        first, second = (point.config for point in study.points)
        assert (first.n, first.decoder.temperature, first.decoder.top_k) == (9, 1.0, 4)
        assert (second.n, second.decoder.temperature, second.decoder.top_k) == (2, 0.5, 3)

    def test_listed_experiments_follow_the_sweep(self, tmp_path: Path) -> None:
        study = load(
            tmp_path,
            """\
            model: m
            experiments:
              - {precision: fp32, pytorch: {batch_size: 1}}
            sweep: {pytorch.batch_size: [1, 8]}
            """,
        )
        assert ids(study) == ["batch_size=1", "batch_size=8", "precision=fp32-batch_size=1"]
        assert [point.config.precision for point in study.points] == ["bf16", "bf16", "fp32"]

    def test_listed_experiments_may_have_different_models(self, tmp_path: Path) -> None:
        assert ids(load(tmp_path, "experiments: [{model: a}, {model: b}]\n")) == ["model=a", "model=b"]


class TestCycles:
    def test_a_single_experiment_runs_once(self, tmp_path: Path) -> None:
        study = load(tmp_path, "model: builtin:tiny-llama\n")
        assert study.n_cycles == 1
        assert [experiment.id for experiment in study.experiments] == ["model=builtin:tiny-llama"]

    @pytest.mark.parametrize("points", ["sweep: {n: [1]}", "experiments: [{n: 1}]"])
    def test_a_study_runs_three_times(self, tmp_path: Path, points: str) -> None:
        study = load(tmp_path, f"model: m\n{points}\n")
        assert study.n_cycles == 3
        assert sorted(experiment.id.rpartition("-")[2] for experiment in study.experiments) == [
            "cycle=1",
            "cycle=2",
            "cycle=3",
        ]

    @pytest.mark.parametrize("text", ["execution:\n", "execution: {}\n", "execution: {n_cycles: null}\n"])
    def test_an_empty_section_leaves_the_default(self, tmp_path: Path, text: str) -> None:
        assert load(tmp_path, f"model: m\nsweep: {{n: 1}}\n{text}").n_cycles == 3

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("{}", 5), ("{max_consecutive_failures: 2}", 2), ("{max_consecutive_failures: null}", None)],
    )
    def test_null_disables_max_consecutive_failures(self, tmp_path: Path, text: str, expected: int | None) -> None:
        study = load(tmp_path, f"model: m\nexecution: {text}\n")
        assert study.execution.max_consecutive_failures == expected

    def test_given_number_of_cycles_is_used(self, tmp_path: Path) -> None:
        study = load(tmp_path, "model: m\nsweep: {n: [1, 2]}\nexecution: {n_cycles: 1}\n")
        assert {experiment.id for experiment in study.experiments} == {"n=1", "n=2"}
        assert load(tmp_path, "model: m\nexecution: {n_cycles: 2}\n").n_cycles == 2

    @pytest.mark.parametrize(
        ("text", "expected"),
        [("sweep: {n: 1}\n", True), ("experiments: []\n", True), ("model: m\n", False), ("- sweep\n", False)],
    )
    def test_file_with_sweep_or_experiments_is_a_study(self, tmp_path: Path, text: str, expected: bool) -> None:
        (tmp_path / "s.yaml").write_text(text, encoding="utf-8")
        assert is_study(tmp_path / "s.yaml") is expected


class TestOrder:
    def test_sequential_order_repeats_each_point_consecutively(self) -> None:
        assert run_order(range(2), 3, "sequential", 0) == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]

    def test_interleaved_order_repeats_the_sequence_of_points(self) -> None:
        assert run_order(range(2), 3, "interleaved", 0) == [(0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)]

    def test_shuffled_order_differs_by_cycle_and_has_each_point_once(self) -> None:
        order = run_order(range(20), 3, "shuffled", 7)
        assert [cycle for _, cycle in order] == [1] * 20 + [2] * 20 + [3] * 20
        rounds = [[point for point, cycle in order if cycle == one] for one in (1, 2, 3)]
        assert all(sorted(one) == list(range(20)) for one in rounds)
        assert len({tuple(one) for one in rounds}) == 3
        assert list(range(20)) not in rounds

    def test_another_seed_gives_another_shuffled_order(self) -> None:
        assert run_order(range(20), 1, "shuffled", 1) == run_order(range(20), 1, "shuffled", 1)
        assert run_order(range(20), 1, "shuffled", 1) != run_order(range(20), 1, "shuffled", 2)

    @pytest.mark.parametrize("order", ["sequential", "interleaved", "shuffled"])
    def test_points_of_a_group_follow_each_other_in_each_cycle(self, order: CycleOrder) -> None:
        pairs = run_order("abcabcabc", 3, order, 7)
        assert sorted(pairs) == [(point, cycle) for point in range(9) for cycle in (1, 2, 3)]
        parts = [pairs[at : at + 3] for at in range(0, 27, 3)]
        assert all(len({("abc"[point % 3], cycle) for point, cycle in part}) == 1 for part in parts)
        assert any(part != sorted(part) for part in parts) == (order == "shuffled")

    @pytest.mark.parametrize("order", ["sequential", "interleaved", "shuffled"])
    def test_a_study_numbers_its_experiments_in_run_order(self, tmp_path: Path, order: str) -> None:
        study = load(tmp_path, f"model: m\nsweep: {{n: [1, 2, 3]}}\nexecution: {{cycle_order: {order}}}\n")
        assert [experiment.index for experiment in study.experiments] == list(range(9))
        assert {(e.point.id, e.cycle) for e in study.experiments} == {
            (f"n={n}", cycle) for n in (1, 2, 3) for cycle in (1, 2, 3)
        }
        assert all(e.id == f"{e.point.id}-cycle={e.cycle}" for e in study.experiments)

    def test_shuffled_is_the_default_and_seeded_by_the_design(self, tmp_path: Path) -> None:
        sweep = "model: m\nsweep: {n: [1, 2, 3, 4, 5, 6, 7, 8]}\n"
        study = load(tmp_path, sweep)
        order = [experiment.id for experiment in study.experiments]
        renamed = load(tmp_path, f"name: other\n{sweep}", "elsewhere.yaml")
        seeded = load(tmp_path, f"{sweep}execution: {{shuffle_seed: 5}}\n")
        assert [experiment.id for experiment in renamed.experiments] == order
        assert [experiment.id for experiment in seeded.experiments] != order
        assert sorted(experiment.id for experiment in seeded.experiments) == sorted(order)


STUDY = """\
name: a
model: m
decoder: {temperature: 0.5, top_k: 3}
sweep:
  precision: [bf16, fp32, fp16]
  pytorch.batch_size: [1, 2, 4]
experiments:
  - {n: 5, pytorch: {revision: é, attn_implementation: eager}}
execution: {n_cycles: 4}
"""

REPORT = """\
import json, sys
from pathlib import Path
from pytest_llem.study.loading import load_study
study = load_study(Path(sys.argv[1]))
json.dump(
    [study.design_hash, [p.config_hash for p in study.points], [e.id for e in study.experiments]], sys.stdout
)
"""


class TestHashes:
    def test_hashes_are_the_same_in_another_process_and_folder(self, tmp_path: Path) -> None:
        study = load(tmp_path, STUDY)
        expected = [
            study.design_hash,
            [point.config_hash for point in study.points],
            [experiment.id for experiment in study.experiments],
        ]
        for seed in ("1", "2"):
            folder = tmp_path / f"folder {seed}"
            folder.mkdir()
            (folder / "copy.yaml").write_text(STUDY, encoding="utf-8")
            done = subprocess.run(
                [sys.executable, "-c", REPORT, "copy.yaml"],
                cwd=folder,
                env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONUTF8": "1"},
                capture_output=True,
                check=True,
                text=True,
                timeout=120,
            )
            assert json.loads(done.stdout) == expected

    @pytest.mark.parametrize(
        "changed",
        [
            STUDY.replace("name: a", "name: b"),
            STUDY.replace("name: a\n", ""),
            STUDY.replace(
                "{n_cycles: 4}", "{n_cycles: 2, cycle_order: sequential, experiment_timeout_seconds: 5}"
            ),
            "# comment\nversion: 2\n" + STUDY,
            STUDY.replace("temperature: 0.5, top_k: 3", "top_k: 3, 'temperature': 5e-1"),
            STUDY.replace("model: m\n", "model: m\nn: 100\nwarmup: {}\n"),
        ],
        ids=["name", "no name", "execution", "comment", "spelling", "explicit defaults"],
    )
    def test_design_hash_ignores_name_and_execution(self, tmp_path: Path, changed: str) -> None:
        assert load(tmp_path, changed).design_hash == load(tmp_path, STUDY).design_hash

    @pytest.mark.parametrize(
        "changed",
        [
            STUDY.replace("model: m", "model: other"),
            STUDY.replace("[1, 2, 4]", "[1, 4, 2]"),
            STUDY.replace("[1, 2, 4]", "[1, 2]"),
            STUDY.replace("top_k: 3", "top_k: 4"),
        ],
        ids=["model", "order of points", "fewer points", "shared field"],
    )
    def test_another_design_has_another_hash(self, tmp_path: Path, changed: str) -> None:
        assert load(tmp_path, changed).design_hash != load(tmp_path, STUDY).design_hash

    def test_hashes_are_16_hex_digits(self, tmp_path: Path) -> None:
        study = load(tmp_path, STUDY)
        hashes = [study.design_hash, *(point.config_hash for point in study.points)]
        assert len(set(hashes)) == len(hashes) == 11
        assert all(len(one) == 16 and set(one) <= set("0123456789abcdef") for one in hashes)

    def test_every_field_of_an_experiment_changes_its_hash(self) -> None:
        config = ExperimentConfig(model="m", dataset="synthetic")
        seen = {config_hash(config): "unchanged"}
        for where, other in variations(config):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # pydantic warns about values of another type
                digest = config_hash(other)
            assert digest not in seen, f"{where} has the same hash as {seen[digest]}"
            seen[digest] = where
        assert {"model", "decoder.temperature", "warmup.enabled", "pytorch.batch_size"} <= set(seen.values())

    def test_explicit_defaults_do_not_change_the_hash(self) -> None:
        spelt = ExperimentConfig.model_validate(ExperimentConfig(model="m").model_dump())
        assert config_hash(spelt) == config_hash(ExperimentConfig(model="m"))


def variations(section: BaseModel) -> Iterator[tuple[str, Any]]:
    """Yield, for each field, its dotted name and a copy of the section in which only this field is changed."""
    for name, field in type(section).model_fields.items():
        if field.exclude or name in ("output_dir", "allow_estimated"):
            continue  # expanded, or not part of the hash
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            for where, other in variations(value):
                yield f"{name}.{where}", section.model_copy(update={name: other})
        else:
            changed = value + 1 if isinstance(value, int | float) else f"{value}!"
            yield name, section.model_copy(update={name: not value if isinstance(value, bool) else changed})


class TestNames:
    @pytest.mark.parametrize(
        ("file", "name"),
        [
            ("x.yaml", "x"),
            ("x.y.yml", "x.y"),
            ("a.study.yaml", "a"),
            (".study.yaml", ".study"),
            ("é ß.yaml", "é ß"),
        ],
    )
    def test_study_is_named_after_its_file(self, tmp_path: Path, file: str, name: str) -> None:
        assert load(tmp_path, "model: m\n", file).name == name

    def test_given_name_overrides_the_file_name(self, tmp_path: Path) -> None:
        assert load(tmp_path, "name: mine\nmodel: m\n").name == "mine"

    def test_study_keeps_the_text_of_its_file(self, tmp_path: Path) -> None:
        text = "model: é # comment\r\nsweep: {n: [1]}\r\n"
        (tmp_path / "x.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
        study = load_study(tmp_path / "x.yaml")
        assert (study.text, study.line, study.points[0].config.model) == (text, 2, "é")

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (8, "8"),
            (0.7, "0.7"),
            (1.0, "1.0"),
            (True, "true"),
            (None, "null"),
            ("org/Model-1.5", "org/Model-1.5"),
            ("builtin:tiny-llama", "builtin:tiny-llama"),
            ("a b", "a%20b"),
            ("a=b[c]%", "a%3Db%5Bc%5D%25"),
            ("é", "%C3%A9"),
            ({"b": 1, "a": [None]}, '{"a":%5Bnull%5D,"b":1}'),
        ],
    )
    def test_axis_values_are_escaped_in_ids(self, value: object, text: str) -> None:
        assert value_text(value) == text

    def test_axis_ending_in_cycle_keeps_its_full_name(self) -> None:
        assert short_names(["other.cycle", "n"]) == {"other.cycle": "other.cycle", "n": "n"}

    def test_axis_names_are_escaped_in_ids(self) -> None:
        assert point_id({"a b": 1}, {"a b": "a b"}) == "a%20b=1"


@pytest.mark.usefixtures("other_engine")
class TestSeveralEngines:
    def test_each_engine_is_crossed_with_universal_and_own_axes(self, tmp_path: Path) -> None:
        study = load(
            tmp_path,
            """\
            model: m
            sweep:
              pytorch.batch_size: [1, 8]
              precision: [bf16, fp16]
              other.engine.block_size: [16, 32, 64]
            """,
        )
        pytorch = [
            f"backend=pytorch-precision={precision}-batch_size={size}"
            for precision in ("bf16", "fp16")
            for size in (1, 8)
        ]
        other = [
            f"backend=other-precision={precision}-block_size={size}"
            for precision in ("bf16", "fp16")
            for size in (16, 32, 64)
        ]
        assert ids(study) == pytorch + other
        assert [point.config.engine_section for point in study.points[4:7]] == [
            {"engine": {"block_size": size}} for size in (16, 32, 64)
        ]
        assert all(point.config.pytorch is None for point in study.points[4:])

    def test_list_of_backends_gives_engines_and_order(self, tmp_path: Path) -> None:
        study = load(tmp_path, "model: m\nbackend: [other, pytorch]\nsweep: {pytorch.batch_size: [1, 2]}\n")
        assert ids(study) == ["backend=other", "backend=pytorch-batch_size=1", "backend=pytorch-batch_size=2"]

    def test_engines_may_be_swept(self, tmp_path: Path) -> None:
        study = load(tmp_path, "model: m\nsweep: {n: [1, 2], backend: [pytorch, other], other.x: [5]}\n")
        assert ids(study) == [
            "n=1-backend=pytorch",
            "n=1-backend=other-x=5",
            "n=2-backend=pytorch",
            "n=2-backend=other-x=5",
        ]

    def test_single_engine_is_not_an_axis(self, tmp_path: Path) -> None:
        assert ids(load(tmp_path, "model: m\nbackend: other\nsweep: {other.x: [1]}\n")) == ["x=1"]
        assert ids(load(tmp_path, "model: m\nbackend: [other]\nsweep: {other.x: [1]}\n")) == ["x=1"]
        assert ids(load(tmp_path, "model: m\nsweep: {other.x: [1]}\n")) == ["x=1"]

    def test_engine_section_applies_to_its_own_points_only(self, tmp_path: Path) -> None:
        study = load(
            tmp_path,
            """\
            model: m
            backend: [pytorch, other]
            pytorch: {use_cache: false}
            other: {deep: {est: 1}}
            sweep: {other.deep.y: [2], n: [1]}
            """,
        )
        pytorch, other = (point.config for point in study.points)
        assert pytorch.engine_section["use_cache"] is False
        assert pytorch.model_extra == {}
        assert other.engine_section == {"deep": {"est": 1, "y": 2}}
        assert other.pytorch is None

    def test_engine_section_applies_to_its_own_listed_experiments(self, tmp_path: Path) -> None:
        study = load(
            tmp_path,
            """\
            model: m
            pytorch: {use_cache: false}
            other: {x: 1}
            sweep: {pytorch.batch_size: [2]}
            experiments:
              - {backend: other}
              - {backend: other, other: {z: 2}}
            """,
        )
        assert [point.config.backend for point in study.points] == ["pytorch", "other", "other"]
        assert [point.config.engine_section for point in study.points[1:]] == [{"x": 1}, {"z": 2}]
        assert pytorch(study.points[0]).use_cache is False

    def test_axis_of_an_engine_that_is_not_used_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(StudyError) as caught:
            load(tmp_path, "model: m\nbackend: pytorch\nsweep:\n  n: [1]\n  other.x: [1, 2]\n", "s.yaml")
        path = tmp_path / "s.yaml"
        assert (
            str(caught.value) == f"{path}:5:3: sweep.other.x: is an axis of 'other', but the backend is 'pytorch'"
        )

    def test_axis_of_an_engine_missing_in_the_list_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(StudyError) as caught:
            load(tmp_path, "model: m\nbackend: [pytorch, third]\nsweep:\n  other: [{x: 1}]\n", "s.yaml")
        path = tmp_path / "s.yaml"
        assert str(caught.value) == (
            f"{path}:4:3: sweep.other: is an axis of 'other', but the backend is 'pytorch' or 'third'"
        )

    def test_a_section_that_no_point_uses_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(StudyError) as caught:
            load(tmp_path, "model: m\nother: {x: 1}\nsweep: {pytorch.batch_size: [1]}\n", "s.yaml")
        path = tmp_path / "s.yaml"
        assert str(caught.value) == f"{path}:2:1: other: is a section of another engine (the backend is 'pytorch')"

    def test_a_section_of_another_engine_in_an_experiment_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(StudyError) as caught:
            load(tmp_path, "model: m\nexperiments:\n- backend: other\n  pytorch: {batch_size: 1}\n", "s.yaml")
        path = tmp_path / "s.yaml"
        assert str(caught.value) == f"{path}:4:3: pytorch: is a section of another engine (the backend is 'other')"

    def test_engine_section_must_be_a_mapping(self, tmp_path: Path) -> None:
        with pytest.raises(StudyError) as caught:
            load(tmp_path, "model: m\nbackend: other\nother: no\n", "s.yaml")
        path = tmp_path / "s.yaml"
        assert str(caught.value) == f"{path}:3:1: other: must be a mapping (got no, which YAML reads as false)"
