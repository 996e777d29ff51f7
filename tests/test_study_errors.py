"""Invalid study files: one located line per problem, never a traceback."""

from __future__ import annotations

import copy
import json
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_llem.planning.plan import Plan
from pytest_llem.planning.preflight import Preflight
from pytest_llem.registry import ENGINE_GROUP, installed
from pytest_llem.reporting.terminal.plan import plan_lines
from pytest_llem.study import validation
from pytest_llem.study.engines import ENGINES as GRAMMAR
from pytest_llem.study.loading import StudyConfig, load_study
from pytest_llem.study.problems import StudyError, did_you_mean, shown

ENGINES = ", ".join(dict.fromkeys([*GRAMMAR, *installed(ENGINE_GROUP)]))


def errors(folder: Path, content: str | bytes) -> list[str]:
    """Return the error lines for a study with this *content*, without the folder."""
    file = folder / "s.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(StudyError) as caught:
        load_study(file)
    lines = str(caught.value).splitlines()
    assert lines == [str(problem) for problem in caught.value.problems]
    assert all(line.startswith(f"{file}:") for line in lines)
    return [line.removeprefix(f"{folder}/") for line in lines]


def study(folder: Path, text: str) -> StudyConfig:
    file = folder / "s.yaml"
    file.write_text(text, encoding="utf-8")
    return load_study(file)


def check(folder: Path, text: str, *expected: str) -> None:
    """Assert that ``model: m`` followed by *text* has the errors *expected* (line:column: where: message)."""
    assert errors(folder, f"model: m\n{textwrap.dedent(text)}") == [f"s.yaml:{line}" for line in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("precison: bf16", "2:1: precison: unknown key (did you mean 'precision'?)"),
        ("experimets: []", "2:1: experimets: unknown key (did you mean 'experiments'?)"),
        ("banana: 1", "2:1: banana: unknown key"),
        ("banana: {a: 1}", f"2:1: banana: unknown key, nor the name of an engine (there are: {ENGINES})"),
        ("decoder:\n  temprature: 1", "3:3: decoder.temprature: unknown key (did you mean 'temperature'?)"),
        ("dataset: {inputlen: 1}", "2:11: dataset.inputlen: unknown key (did you mean 'input_len'?)"),
        ("dataset: {input_len: {min: 0, max: 3}}", "2:23: dataset.input_len.min: must be at least 1 (got 0)"),
        (
            "dataset: {input_len: {mean: 5, stdev: -1}}",
            "2:32: dataset.input_len.stdev: must be at least 0 (got -1)",
        ),
        (
            "dataset: {input_len: {mn: 1, max: 2}}",
            "2:23: dataset.input_len.mn: unknown key (did you mean 'min'?)",
        ),
        ("pytorch: {batchsize: 1}", "2:11: pytorch.batchsize: unknown key (did you mean 'batch_size'?)"),
        ("execution: {n_cycle: 1}", "2:13: execution.n_cycle: unknown key (did you mean 'n_cycles'?)"),
        ("experiments: [{n: 1}, {m: 1}]", "2:24: m: unknown key"),
        ("experiments: [{decoder: {topp: 1}}]", "2:26: decoder.topp: unknown key (did you mean 'top_p'?)"),
        ("experiments: [{sweeps: 1}]", "2:16: sweeps: unknown key"),
        ("experiments: [{name: a}]", "2:16: name: belongs to the study and not to an experiment"),
        ("sweep: {precison: [bf16, fp16]}", "2:9: precison: unknown key (did you mean 'precision'?)"),
        (
            "sweep: {pytorch.batch_sise: [1, 8]}",
            "2:9: pytorch.batch_sise: unknown key (did you mean 'batch_size'?)",
        ),
        ("sweep: {dataset: [{n: 1}, {nn: 2}]}", "2:28: dataset.nn: unknown key (did you mean 'n'?)"),
        ("sweep: {name: [a, b]}", "2:9: name: belongs to the study and not to an experiment"),
        ("sweep: {execution.n_cycles: [1]}", "2:9: execution: belongs to the study and not to an experiment"),
        (
            "pytorch.batch_size: 8",
            "2:1: pytorch.batch_size: unknown key: only sweep has dotted keys",
        ),
        (
            "experiments: [{decoder.top_k: 8}]",
            "2:16: decoder.top_k: unknown key: only sweep has dotted keys",
        ),
        ("'': 1", "2:1: '': unknown key"),
        ("5: 1", "2:1: 5: unknown key"),
        ('"a\\nb: c": 1', "2:1: 'a\\nb: c': unknown key"),
        ("a" * 100 + ": 1", "2:1: '" + "a" * 27 + "..." + "a" * 28 + "': unknown key"),
    ],
)
def test_unknown_keys_are_errors(tmp_path: Path, text: str, expected: str) -> None:
    check(tmp_path, text, expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n: x", "n: must be a whole number (got 'x')"),
        ("n: 1.5", "n: must be a whole number (got 1.5)"),
        ("n: 1.0", "n: must be a whole number (got 1.0)"),
        ("n: '4'", "n: must be a whole number (got '4')"),
        ("n: yes", "n: must be a whole number (got yes, which YAML reads as true)"),
        ("n: true", "n: must be a whole number (got true)"),
        ("n:", "n: must be a whole number (got nothing)"),
        ("n: ~", "n: must be a whole number (got ~, which YAML reads as null)"),
        ("n: [1, {a: null}]", "n: must be a whole number (got [1, {'a': null}])"),
        ("precision: bf17", "precision: must be one of 'fp32', 'fp16' or 'bf16' (got 'bf17')"),
        ("precision: 16", "precision: must be one of 'fp32', 'fp16' or 'bf16' (got 16)"),
        ("decoder: 5", "decoder: must be a mapping (got 5)"),
        ("decoder: [top_k]", "decoder: must be a mapping (got ['top_k'])"),
        ("decoder:", "decoder: must be a mapping (got nothing)"),
        ("pytorch: 5", "pytorch: must be a mapping (got 5)"),
        ("dataset: 5", "dataset: must be a string or a mapping (got 5)"),
        ("dataset: [a]", "dataset: must be a string or a mapping (got ['a'])"),
        ("dataset: ''", "dataset: must not be empty (got '')"),
        ("execution: []", "execution: must be a mapping (got [])"),
        ("execution: false", "execution: must be a mapping (got false)"),
        ("backend: 5", "backend: must be a string (got 5); put it in quotes"),
        ("name: 5", "name: must be a string (got 5)"),
        ("n: " + "a" * 100, "n: must be a whole number (got '" + "a" * 27 + "..." + "a" * 28 + "')"),
    ],
)
def test_wrong_types_are_errors(tmp_path: Path, text: str, expected: str) -> None:
    check(tmp_path, text, f"2:1: {expected}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("decoder: {temperature: hot}", "decoder.temperature: must be a number (got 'hot')"),
        ("decoder: {temperature: '1e-4'}", "decoder.temperature: must be a number (got '1e-4')"),
        ("decoder: {temperature: -1}", "decoder.temperature: must be at least 0 (got -1)"),
        ("decoder: {temperature: -1e-4}", "decoder.temperature: must be at least 0 (got -1e-4)"),
        ("decoder: {top_p: 1.1}", "decoder.top_p: must be at most 1 (got 1.1)"),
        ("decoder: {min_p: -0.5}", "decoder.min_p: must be at least 0 (got -0.5)"),
        ("dataset: {n: 0}", "dataset.n: must be at least 1 (got 0)"),
        ("dataset: {n: 100000001}", "dataset.n: must be at most 100000000 (got 100000001)"),
        ("dataset: {n: x}", "dataset.n: must be a whole number (got 'x')"),
        ("dataset: {input_len: 0}", "dataset.input_len: must be at least 1 (got 0)"),
        ("dataset: {input_len: x}", "dataset.input_len: must be a whole number or a mapping (got 'x')"),
        ("dataset: {input_len: {min: 5, max: 3}}", "dataset.input_len: min 5 is more than max 3"),
        ("dataset: {input_len: {mean: 5}}", "dataset.input_len: needs mean and stdev together"),
        ("dataset: {input_len: {stdev: 5, min: 1, max: 3}}", "dataset.input_len: needs mean and stdev together"),
        ("dataset: {input_len: {min: 5}}", "dataset.input_len: needs mean and stdev, or min and max"),
        (
            "dataset: {input_len: {mean: 5, stdev: 1, max: 3}}",
            "dataset.input_len: mean 5 is not between min 1 and max 3",
        ),
        ("warmup: {enabled: 1}", "warmup.enabled: must be true or false (got 1)"),
        ("pytorch: {batch_size: 0}", "pytorch.batch_size: must be at least 1 (got 0)"),
        ("pytorch: {revision: 1234}", "pytorch.revision: must be a string (got 1234); put it in quotes"),
        ("energy: {backend: [nvml]}", "energy.backend: must be a string (got ['nvml'])"),
        (
            "execution: {n_cycles: 0}",
            "execution.n_cycles: must be 'auto' or a number of cycles, 1 or more (got 0)",
        ),
        (
            "execution: {n_cycles: 1e3}",
            "execution.n_cycles: must be 'auto' or a number of cycles, 1 or more (got 1e3)",
        ),
        (
            "execution: {shuffle_seed: no}",
            "execution.shuffle_seed: must be a whole number (got no, which YAML reads as false)",
        ),
        (
            "execution: {cycle_order: random}",
            "execution.cycle_order: must be one of 'sequential', 'interleaved' or 'shuffled' (got 'random')",
        ),
        (
            "execution: {experiment_timeout_seconds: 0}",
            "execution.experiment_timeout_seconds: must be greater than 0 (got 0)",
        ),
        (
            "execution: {max_consecutive_failures: 0}",
            "execution.max_consecutive_failures: must be at least 1 (got 0)",
        ),
        (
            "execution: {max_consecutive_failures: never}",
            "execution.max_consecutive_failures: must be a whole number (got 'never')",
        ),
    ],
)
def test_invalid_values_in_sections_are_errors(tmp_path: Path, text: str, expected: str) -> None:
    column = text.index("{") + 2
    check(tmp_path, text, f"2:{column}: {expected}")


@pytest.mark.parametrize(
    ("text", "column", "expected"),
    [
        ("sweep: {n: [1, 0]}", 16, "n: must be at least 1 (got 0)"),
        ("sweep: {n: 0}", 9, "n: must be at least 1 (got 0)"),
        ("sweep: {n: [1, 100, no]}", 21, "n: must be a whole number (got no, which YAML reads as false)"),
        ("sweep: {pytorch.batch_size: [1, 0]}", 33, "pytorch.batch_size: must be at least 1 (got 0)"),
        ("sweep: {dataset: [{n: 1}, {n: 0}]}", 28, "dataset.n: must be at least 1 (got 0)"),
        (
            "sweep: {pytorch: {batch_size: [1, 8]}}",
            9,
            "sweep.pytorch: an axis in a section is written with dots: pytorch.batch_size: [...]",
        ),
        ("experiments: [{n: 1}, {n: 0}]", 24, "n: must be at least 1 (got 0)"),
        ("experiments: [{decoder: {top_k: -1}}]", 26, "decoder.top_k: must be at least 0 (got -1)"),
        ("sweep: {precision.x: [1, 2]}", 9, "precision.x: 'precision' is not a mapping"),
    ],
)
def test_invalid_values_of_points_are_located(tmp_path: Path, text: str, column: int, expected: str) -> None:
    check(tmp_path, text, f"2:{column}: {expected}")


def test_missing_model_is_reported_once_for_all_points(tmp_path: Path) -> None:
    assert errors(tmp_path, "# comment\nsweep: {n: [1, 2]}\n") == ["s.yaml:2:1: model: is required"]
    assert errors(tmp_path, "experiments: [{n: 1}, {n: 2}]\n") == ["s.yaml:1:1: model: is required"]
    assert errors(tmp_path, "model: ''\n") == ["s.yaml:1:1: model: must not be empty (got '')"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: no", "model: must be a string (got no, which YAML reads as false); put it in quotes"),
        ("model: On", "model: must be a string (got On, which YAML reads as true); put it in quotes"),
        ("model: 010", "model: must be written in decimal, or in quotes as text (got 010, which YAML reads as 8)"),
        ("model: 1.50", "model: must be a string (got 1.50); put it in quotes"),
        ("model:", "model: must be a string (got nothing)"),
        ("model: null", "model: must be a string (got null)"),
        ("no: 1", "no: a key must be a string (got no, which YAML reads as false); put it in quotes"),
        ("~: 1", "'~': a key must be a string (got ~, which YAML reads as null); put it in quotes"),
    ],
)
def test_yaml_words_read_as_other_types_are_explained(tmp_path: Path, text: str, expected: str) -> None:
    assert errors(tmp_path, text) == [f"s.yaml:1:1: {expected}"]


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path) -> None:
    text = "model: m\nsweep: {decoder.temperature: [1e-4, 1E2, +2.5e0, .5e-1]}\n"
    points = study(tmp_path, text).points
    assert [point.config.decoder.temperature for point in points] == [1e-4, 100, 2.5, 0.05]
    assert study(tmp_path, "model: 1e-4x\n").points[0].config.model == "1e-4x"


class TestText:
    @pytest.mark.parametrize("content", ["", " \n\n", "# a comment\n", "---\n", "\ufeff"])
    def test_an_empty_file_is_an_error(self, tmp_path: Path, content: str) -> None:
        assert errors(tmp_path, content) == ["s.yaml:1:1: the file is empty"]

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("- a\n- b", "['a', 'b']"),
            ("text", "'text'"),
            ("5", "5"),
            ("no", "no, which YAML reads as false"),
            ("null", "null"),
        ],
    )
    def test_a_file_that_is_not_a_mapping_is_an_error(self, tmp_path: Path, content: str, expected: str) -> None:
        assert errors(tmp_path, content) == [f"s.yaml:1:1: a study must be a mapping (got {expected})"]

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            ("a: [1,\n", "2:1: not valid YAML: expected the node content, but found '<stream end>'"),
            (
                "a: b: c",
                "1:5: not valid YAML: mapping values are not allowed here; look at the indentation, "
                "or put the value in quotes",
            ),
            (
                "a:\n\tb: 1",
                "2:1: not valid YAML: found character '\\t' that cannot start any token; indent with spaces",
            ),
            (
                "a: 1\n---\nb: 2",
                "2:1: not valid YAML: expected a single document in the stream, but found another document",
            ),
            ("model: *m", "1:8: not valid YAML: found undefined alias 'm'"),
            ('a: "\\U00110000"', "1:7: not valid YAML: an escape or a number is too large"),
            ('a: "\\Uffffffff"', "1:7: not valid YAML: an escape or a number is too large"),
            ("a: \0", "1:4: not a YAML text: the character U+0000 may not be in one"),
            ("a: 1\nb: é\x07", "2:5: not a YAML text: the character U+0007 may not be in one"),
            (b"a: 1\nb: caf\xe9\n", "2:7: not UTF-8 text (byte 0xe9)"),
            ("model: é".encode("utf-16"), "1:1: not UTF-8 text (byte 0xff)"),
            ("a: 1\r\nb: 2\r\na: 3", "3:1: a: is given twice (first in line 1)"),
        ],
    )
    def test_a_file_that_is_not_yaml_is_an_error(
        self, tmp_path: Path, content: str | bytes, expected: str
    ) -> None:
        assert errors(tmp_path, content) == [f"s.yaml:{expected}"]

    def test_a_missing_file_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(StudyError) as caught:
            load_study(tmp_path / "missing.yaml")
        assert str(caught.value) == f"{tmp_path}/missing.yaml:1:1: no such file or folder"

    def test_directory_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(StudyError) as caught:
            load_study(tmp_path)
        assert str(caught.value) == f"{tmp_path}:1:1: cannot be read: Is a directory"

    def test_invalid_path_is_an_error(self) -> None:
        with pytest.raises(StudyError, match="cannot be read"):
            load_study(Path("a\0b.yaml"))

    def test_duplicate_keys_are_errors_at_every_level(self, tmp_path: Path) -> None:
        check(
            tmp_path,
            """\
            n: 1
            decoder:
              top_k: 1
              "top_k": 2
            sweep: {precision: [bf16], precision: [fp16]}
            n: 2
            """,
            "5:3: decoder.top_k: is given twice (first in line 4)",
            "6:28: sweep.precision: is given twice (first in line 6)",
            "7:1: n: is given twice (first in line 2)",
        )

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("n: !!int '5'", "2:4: tags are not supported (got !!int)"),
            ("n: !!bool maybe", "2:4: tags are not supported (got !!bool)"),
            ("n: !own 5", "2:4: tags are not supported (got !own)"),
            ("n: ! 5", "2:4: tags are not supported (got !)"),
            ("n: !a%0Ab 5", "2:4: tags are not supported (got '!a\\nb')"),
            ("!!str n: 5", "2:1: tags are not supported (got !!str)"),
            ("decoder: !!map {}", "2:10: tags are not supported (got !!map)"),
            (
                "n: !!python/object/apply:os.system ['true']",
                "2:4: tags are not supported (got !!python/object/apply:os.system)",
            ),
        ],
    )
    def test_yaml_tags_are_errors(self, tmp_path: Path, text: str, expected: str) -> None:
        check(tmp_path, text, expected)

    def test_tags_construct_no_objects(self, tmp_path: Path) -> None:
        trap = tmp_path / "sprung"
        check(
            tmp_path,
            f"a: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{trap}']]",
            "2:4: tags are not supported (got !!python/object/apply:pathlib.Path.touch)",
            "2:46: tags are not supported (got !!python/object/apply:pathlib.Path)",
        )
        assert not trap.exists()

    def test_keys_that_are_not_text_are_errors(self, tmp_path: Path) -> None:
        check(tmp_path, "? [a, b]\n: 1\n", "2:3: a key must be a string")
        check(tmp_path, "decoder:\n  ?\n  : 1", "3:4: decoder.'': a key must be a string (got nothing)")
        check(tmp_path, "decoder:\n  ? {a: b}\n  : 1\n", "3:5: decoder: a key must be a string")

    def test_merge_key_without_a_mapping_is_an_error(self, tmp_path: Path) -> None:
        check(tmp_path, "decoder: {<<: 5}", "2:15: decoder: << takes a mapping, or a list of mappings")
        check(tmp_path, "decoder: {<<: [{}, [1]]}", "2:20: decoder: << takes a mapping, or a list of mappings")
        check(tmp_path, "name: <<", "2:1: name: not a valid value (got <<)")


class TestSize:
    def test_nesting_2000_deep_is_an_error(self, tmp_path: Path) -> None:
        check(tmp_path, "n: " + "[" * 2000 + "]" * 2000, "1:1: nested too deeply")
        check(tmp_path, "n: " + "{a: " * 2000 + "1" + "}" * 2000, "1:1: nested too deeply")

    def test_nesting_deeper_than_the_limit_is_an_error(self, tmp_path: Path) -> None:
        check(tmp_path, "n: " + "[" * 65 + "]" * 65, "2:68: nested too deeply")
        axis = ".".join("a" * 100)
        check(tmp_path, f"sweep: {{{axis}: [1]}}", f"2:9: sweep.{shown(axis)}: nested too deeply")

    def test_billion_laughs_is_an_error(self, tmp_path: Path) -> None:
        lines = ["a: &a [ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
        lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
        [line] = errors(tmp_path, "\n".join(lines))
        assert line.endswith("holds more than 200,000 entries once its aliases are expanded")

    def test_billion_laughs_by_merge_keys_is_an_error(self, tmp_path: Path) -> None:
        lines = ["a: &a {ha: 1}"]
        lines += [
            f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ]
        [line] = errors(tmp_path, "\n".join(lines))
        assert line.endswith("holds more than 200,000 entries once its aliases are expanded")

    @pytest.mark.parametrize("text", ["&a [*a]", "&a {n: *a}", "&a {<<: *a}", "&a {n: [{<<: [*a]}]}"])
    def test_alias_of_itself_is_an_error(self, tmp_path: Path, text: str) -> None:
        check(tmp_path, f"dataset: {text}", "2:10: holds an alias of itself")

    def test_sweep_of_a_billion_points_is_refused(self, tmp_path: Path) -> None:
        values = ", ".join(map(str, range(1, 1001)))
        axes = "".join(f"  {axis}: [{values}]\n" for axis in ("n", "max_input_tokens", "decoder.temperature"))
        assert errors(tmp_path, f"model: m\nsweep:\n{axes}") == [
            "s.yaml:2:1: sweep: makes 3,000,000,000 experiments (1,000,000,000 points × 3 cycles), "
            "more than the maximum of 100,000"
        ]

    def test_sweep_of_10_to_the_1000_points_is_refused(self, tmp_path: Path) -> None:
        axes = "".join(f"  passthrough_kwargs.k{i}: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\n" for i in range(1000))
        [message] = errors(tmp_path, f"model: m\nsweep:\n{axes}")
        assert message.startswith("s.yaml:2:1: sweep: makes about 10^1000 experiments")

    def test_too_many_cycles_or_listed_experiments_are_refused(self, tmp_path: Path) -> None:
        values = ", ".join(map(str, range(1, 251)))
        sweep = f"sweep: {{n: [{values}], max_input_tokens: [{values}]}}\n"
        limit = "more than the maximum of 100,000"
        check(tmp_path, sweep, f"2:1: sweep: makes 187,500 experiments (62,500 points × 3 cycles), {limit}")
        check(
            tmp_path,
            f"{sweep}execution: {{n_cycles: 2}}",
            f"3:13: execution.n_cycles: makes 125,000 experiments (62,500 points × 2 cycles), {limit}",
        )
        check(
            tmp_path,
            "execution: {n_cycles: 9000000000000000000}",
            "2:13: execution.n_cycles: makes about 10^19 experiments (1 point × about 10^19 cycles), " + limit,
        )
        listed = ", ".join("{}" for _ in range(34_000))
        message = f"makes 102,000 experiments (34,000 points × 3 cycles), {limit}"
        check(tmp_path, f"experiments: [{listed}]", f"2:1: experiments: {message}")

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (".nan", "must be a finite number (got .nan)"),
            ("-.inf", "must be a finite number (got -.inf)"),
            ("1e999", "must be a finite number (got 1e999)"),
            ("9223372036854775808", "must fit in 64 bits (got 9223372036854775808)"),
            ("-9223372036854775809", "must fit in 64 bits (got -9223372036854775809)"),
            ("0x" + "f" * 5000, "must fit in 64 bits (got 0x" + "f" * 55 + "...)"),
            ("1" * 5000, "not a valid value (got " + "1" * 57 + "...)"),
            ("1" + ":30" * 300 + ".5", "not a valid value (got 1" + ":30" * 18 + ":3...)"),
            ("0x_", "not a valid value (got 0x_)"),
            ('"a\\0b"', "text must not contain the character U+0000"),
            ('"\\ud800"', "text must not contain the character U+D800"),
        ],
    )
    def test_values_that_json_cannot_represent_are_errors(self, tmp_path: Path, value: str, expected: str) -> None:
        check(tmp_path, f"decoder: {{temperature: {value}}}", f"2:11: decoder.temperature: {expected}")
        check(tmp_path, f"sweep: {{n: [1, {value}]}}", f"2:16: sweep.n[1]: {expected}")


class TestStructure:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("sweep: [n]", "2:1: sweep: must be a mapping with at least one axis (got ['n'])"),
            ("sweep:", "2:1: sweep: must be a mapping with at least one axis (got nothing)"),
            ("sweep: {}", "2:1: sweep: must be a mapping with at least one axis (got {})"),
            ("sweep: {n: []}", "2:9: sweep.n: an axis needs at least one value"),
            ("sweep: {n: [1], n.x: [2]}", "2:17: sweep.n.x: is part of 'n', which is an axis too"),
            (
                "sweep: {decoder: [{top_k: 1}], decoder.top_p: [1]}",
                "2:32: sweep.decoder.top_p: is part of 'decoder', which is an axis too",
            ),
            ("n: 5\nsweep: {n.x: [2]}", "3:9: sweep.n.x: 'n' is not a mapping (it is given as 5)"),
            ("experiments:", "2:1: experiments: must be a list with at least one experiment (got nothing)"),
            ("experiments: []", "2:1: experiments: must be a list with at least one experiment (got [])"),
            (
                "experiments: {n: 1}",
                "2:1: experiments: must be a list with at least one experiment (got {'n': 1})",
            ),
            ("experiments: [n]", "2:15: experiments[0]: must be a mapping (got 'n')"),
            (
                "experiments: [{n: 1}, ~]",
                "2:23: experiments[1]: must be a mapping (got ~, which YAML reads as null)",
            ),
        ],
    )
    def test_wrong_structure_is_an_error(self, tmp_path: Path, text: str, expected: str) -> None:
        check(tmp_path, text, expected)

    def test_errors_in_a_list_of_models(self, tmp_path: Path) -> None:
        assert errors(tmp_path, "model: []") == ["s.yaml:1:1: model: an axis needs at least one value"]
        assert errors(tmp_path, "model: [a]\nsweep: {model: [b]}") == [
            "s.yaml:2:9: sweep.model: is given as a list and swept too"
        ]
        assert errors(tmp_path, "model: [a, no]\n") == [
            "s.yaml:1:12: model: must be a string (got no, which YAML reads as false); put it in quotes"
        ]
        assert errors(tmp_path, "model: [a, b]\nexperiments:\n- {n: 1}\n- {model: c}\n") == [
            "s.yaml:3:3: experiments[0]: needs its own model: the study's is a list"
        ]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("sweep: {n: [1, 2, 1]}", "2:19: sweep.n[2]: is given twice"),
            (
                "sweep: {decoder.temperature: [1, 1.0]}",
                "2:1: sweep: temperature=1.0 is the same experiment as temperature=1",
            ),
            ("sweep: {n: [1, 2]}\nexperiments: [{n: 3}, {n: 2}]", "3:23: experiments[1]: n=2 is given twice"),
            (
                "sweep: {n: [1, 2]}\nexperiments: [{n: 2, precision: bf16}]",
                "3:15: experiments[0]: n=2-precision=bf16 is the same experiment as n=2",
            ),
            (
                "sweep: {pytorch.revision: [null, 'null']}",
                "2:1: sweep: two experiments share the id revision=null",
            ),
            ("experiments: [{n: 1}, {n: 1}]", "2:23: experiments[1]: is the same experiment as experiments[0]"),
        ],
    )
    def test_duplicate_points_are_errors(self, tmp_path: Path, text: str, expected: str) -> None:
        check(tmp_path, text, expected)

    @pytest.mark.parametrize("name", ["a/b", "a\\b", "..", ".", "", "a\nb", "a\u200eb"])
    def test_invalid_study_names_are_errors(self, tmp_path: Path, name: str) -> None:
        written = yaml.safe_dump(name, default_style='"').strip()
        expected = f"must be a name without path separators or control characters (got {name!r})"
        check(tmp_path, f"name: {written}", f"2:1: name: {expected}")

    def test_name_that_is_too_long_is_an_error(self, tmp_path: Path) -> None:
        study(tmp_path, f"model: m\nname: {'é' * 100}\n")
        name = shown("é" * 101)
        check(tmp_path, f"name: {'é' * 101}", f"2:1: name: must be at most 200 bytes long (got {name})")

    def test_unknown_engine_is_an_error(self, tmp_path: Path) -> None:
        message = f"no engine of that name (got 'nope'; there are: {ENGINES})"
        check(tmp_path, "backend: nope", f"2:1: backend: {message}")
        check(tmp_path, "backend: nope\nnope: {x: 1}", f"2:1: backend: {message}")
        check(tmp_path, "backend: nope\nsweep: {nope.x: [1, 2]}", f"2:1: backend: {message}")
        check(tmp_path, "backend: [pytorch, nope]", f"2:20: backend: {message}")
        check(tmp_path, "experiments: [{backend: nope}]", f"2:16: backend: {message}")

    def test_section_of_another_engine_is_an_error(self, tmp_path: Path) -> None:
        check(
            tmp_path,
            "backend: nope\npytorch: {batch_size: 1}",
            f"2:1: backend: no engine of that name (got 'nope'; there are: {ENGINES})",
            "3:1: pytorch: is a section of another engine (the backend is 'nope')",
        )


class TestCombinations:
    REASON = "pytorch: cache_implementation 'static' needs use_cache: true"

    def test_invalid_combination_is_excluded_with_its_reason(self, tmp_path: Path) -> None:
        found = study(
            tmp_path,
            "model: m\nsweep: {pytorch.use_cache: [true, false], pytorch.cache_implementation: [null, static]}\n",
        )
        assert [point.id for point in found.points] == [
            "use_cache=true-cache_implementation=null",
            "use_cache=true-cache_implementation=static",
            "use_cache=false-cache_implementation=null",
        ]
        [excluded] = found.excluded
        assert excluded.axes == {"pytorch.use_cache": False, "pytorch.cache_implementation": "static"}
        assert excluded.reason == self.REASON

    def test_error_if_all_combinations_are_invalid(self, tmp_path: Path) -> None:
        wrong = "pytorch: {cache_implementation: static}\n"
        check(
            tmp_path,
            f"{wrong}sweep: {{n: [1, 2], pytorch.use_cache: [false]}}",
            f"3:1: sweep: no valid combination: {self.REASON}",
        )
        check(
            tmp_path,
            "experiments: [{pytorch: {cache_implementation: static, use_cache: false}}]",
            f"2:15: experiments[0]: no valid combination: {self.REASON}",
        )

    def test_invalid_combination_in_a_single_experiment_is_an_error(self, tmp_path: Path) -> None:
        check(tmp_path, "pytorch: {cache_implementation: static, use_cache: false}", f"2:1: {self.REASON}")

    def test_errors_beside_an_excluded_combination_are_reported(self, tmp_path: Path) -> None:
        check(
            tmp_path,
            "pytorch: {cache_implementation: static}\nsweep: {pytorch.use_cache: [true, false], n: [0]}",
            "3:47: n: must be at least 1 (got 0)",
        )


def test_several_problems_are_reported_in_file_order(tmp_path: Path) -> None:
    assert errors(
        tmp_path,
        textwrap.dedent(
            """\
            execution:
              n_cycles: 0
              cycle_order: any
            modle: m
            n: 0
            decoder: {topk: 3, temperature: -1}
            sweep:
              max_input_tokens: []
              precision: [bf16, bf17, fp16, fp17]
              pytorch.batch_sise: [1, 8]
            experiments:
              - {n: no}
              - 7
            name: a/b
            """
        ),
    ) == [
        "s.yaml:2:3: execution.n_cycles: must be 'auto' or a number of cycles, 1 or more (got 0)",
        "s.yaml:3:3: execution.cycle_order: must be one of 'sequential', 'interleaved' or 'shuffled' (got 'any')",
        "s.yaml:4:1: modle: unknown key (did you mean 'model'?)",
        "s.yaml:5:1: n: must be at least 1 (got 0)",
        "s.yaml:6:11: decoder.topk: unknown key (did you mean 'top_k'?)",
        "s.yaml:6:20: decoder.temperature: must be at least 0 (got -1)",
        "s.yaml:8:3: sweep.max_input_tokens: an axis needs at least one value",
        "s.yaml:9:21: precision: must be one of 'fp32', 'fp16' or 'bf16' (got 'bf17')",
        "s.yaml:9:33: precision: must be one of 'fp32', 'fp16' or 'bf16' (got 'fp17')",
        "s.yaml:10:3: pytorch.batch_sise: unknown key (did you mean 'batch_size'?)",
        "s.yaml:12:6: n: must be a whole number (got no, which YAML reads as false)",
        "s.yaml:13:5: experiments[1]: must be a mapping (got 7)",
        "s.yaml:14:1: name: must be a name without path separators or control characters (got 'a/b')",
    ]


def test_several_yaml_problems_are_reported_at_once(tmp_path: Path) -> None:
    check(
        tmp_path,
        "n: .inf\nn: 2\ndecoder: {no: 1, top_k: 99999999999999999999}\n",
        "2:1: n: must be a finite number (got .inf)",
        "3:1: n: is given twice (first in line 2)",
        "4:11: decoder.no: a key must be a string (got no, which YAML reads as false); put it in quotes",
        "4:18: decoder.top_k: must fit in 64 bits (got 99999999999999999999)",
    )


def test_values_in_messages_are_shortened_to_one_line() -> None:
    assert shown("a\nb") == "'a\\nb'"
    assert shown([True, None, 0.5, "x", {"a": [1]}]) == "[true, null, 0.5, 'x', {'a': [1]}]"
    assert len(shown(["x" * 50] * 50)) == len(shown({"x" * 50: "y" * 50})) == 60
    assert shown(list(range(10**6))) == "[0, 1, 2, 3, 4, 5, ...]"


def test_no_suggestion_without_a_similar_name() -> None:
    assert did_you_mean("banana", ("model", "n")) == ""
    assert did_you_mean("modell", ("model", "n")) == " (did you mean 'model'?)"


BASE: dict[str, Any] = {
    "name": "x",
    "base": "common.yaml",
    "model": "m",
    "backend": "pytorch",
    "runners": {"pytorch": "local", "vllm": "docker", "my.own:Engine": "env/bin/python"},
    "n": 4,
    "dataset": {"n": 3, "input_len": 5},
    "decoder": {"temperature": 0.5, "top_k": 3},
    "energy": {"backend": "zeus"},
    "pytorch": {
        "use_cache": True,
        "cache_implementation": "static",
        "device_map": "auto",
        "max_memory": {0: "1GB"},
    },
    "passthrough_kwargs": {"typical_p": 0.5},
    "output_dir": "out",
    "execution": {
        "n_cycles": 2,
        "cycle_order": "interleaved",
        "shuffle_seed": 3,
        "experiment_gap_seconds": "auto",
    },
    "sweep": {"precision": ["bf16", "fp16"], "pytorch.batch_size": [1, 8], "decoder.top_p": 0.5},
    "budgets": [
        {"metric": "energy_j", "max": 4.5, "min": 1},
        {"metric": "seconds", "max": 3, "where": {"precision": "bf16"}},
        {"metric": "seconds", "min": 1, "where": {"batch_size": [1, 2]}},
    ],
    "gates": {
        "alpha": 0.05,
        "delta": {"seconds": 0.1, "ttft_p50_ms": 0.2},
        "metrics": ["seconds", "ttft_p50_ms"],
    },
    "experiments": [
        {"precision": "fp32", "budgets": {"energy_j": 4, "active_energy_j": {"max": 2, "min": -1}}},
        {"n": 9, "pytorch": {"batch_size": 2}, "budgets": None},
        {"backend": "vllm", "vllm": {"engine": {"block_size": 16}}},
        {"backend": "my.own:Engine"},
    ],
    "skip": [{"where": {"precision": ["fp32"], "batch_size": 8}, "reason": "r"}],
    "xfail": [{"where": {"decoder.top_p": 0.5}}],
}
_SECTIONS = (BASE, BASE["sweep"], BASE["pytorch"], BASE["execution"], BASE["gates"], *BASE["budgets"])
KEYS = sorted({key for section in _SECTIONS for key in section} | {"seconds", "energy_j"})

keys = (
    st.sampled_from(KEYS) | st.text(max_size=4) | st.sampled_from(["decoder.temperature.x", "a..b", ".", "other"])
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(KEYS)
    | st.dates() | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
SNIPPETS = [
    *":-?[]{},&*#|>%@`!'\"\t\0\\",
    *("\n", "\n  ", "\n- ", ": ", "- ", "&a ", "*a", "<<: ", "!!int ", "!x ", "---\n", "...\n", "%YAML 1.1\n"),
    *("~", "no", "0", "-1", "1e-4", "1e999", ".nan", "0x_", "1:30", "2024-13-45", "=", "é", "\u2028", "\ufeff"),
    *('"\\ud800"', '"\\Uffffffff"', "9" * 30, "[" * 80, "a" * 90),
]


@st.composite
def mutated_trees(draw: st.DrawFn) -> str:
    """A valid study with values and keys replaced, removed and added at random."""
    tree = copy.deepcopy(BASE)
    for _ in range(draw(st.integers(1, 4))):
        node: Any = tree
        while True:
            steps = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not steps:
                break
            step = draw(st.sampled_from(steps))
            if not isinstance(node[step], dict | list) or draw(st.booleans()):
                break
            node = node[step]
        if isinstance(node, list):
            node.append(draw(values))
        elif not steps or draw(st.booleans()):
            node[draw(keys)] = draw(values)
        elif draw(st.booleans()):
            node[step] = draw(values)
        else:
            del node[step]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


@st.composite
def mutated_texts(draw: st.DrawFn) -> str:
    """A valid study's text with parts removed and inserted at random."""
    text = yaml.safe_dump(BASE, sort_keys=False)
    for _ in range(draw(st.integers(1, 5))):
        start = draw(st.integers(0, len(text)))
        end = start + draw(st.sampled_from([0, 0, 1, 2, 5, 30]))
        text = text[:start] + draw(st.sampled_from(SNIPPETS) | st.text(max_size=3)) + text[end:]
    return text


#: Words of pydantic and Python that errors for the author of a study must not contain.
JARGON = re.compile(
    r"input should|pydantic|valid dictionary|instance of|Config\b|NoneType|Traceback|object at 0x|\[type="
)


@settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(text=mutated_trees() | mutated_texts())
@pytest.mark.slow
def test_mutated_study_loads_or_is_refused_with_located_errors(tmp_path: Path, text: str) -> None:
    content = text.encode("utf-8", "surrogatepass")
    file = tmp_path / "s.yaml"
    file.write_bytes(content)
    (tmp_path / "common.yaml").write_text("max_input_tokens: 7\nlora: null\n")
    try:
        found = load_study(file)
    except StudyError as error:
        caught = error
    else:
        assert found.points
        assert len({experiment.id for experiment in found.experiments}) == len(found.experiments)
        assert all(experiment.id.isascii() for experiment in found.experiments)
        by_point = [(one.metric, one.point) for one in found.budgets]
        assert len({*by_point}) == len(by_point)
        assert {point for _, point in by_point} <= {point.id for point in found.points}
        for one in found.budgets:
            assert (one.maximum, one.minimum) != (None, None)
            assert 1 <= one.line <= len(text.splitlines())
        assert all(str(note).isprintable() and len(note.message) < 200 for note in found.notes)
        plan = Plan(found, found.experiments, Preflight(found, (tmp_path,), [tmp_path]))
        assert all(line.isprintable() for line in plan_lines(plan, tmp_path))
        assert len(json.loads(plan.to_json())["experiments"]) == len(found.experiments)
        return
    assert caught.problems
    assert list(caught.problems) == sorted(caught.problems, key=lambda one: (one.path, one.line, one.column))
    lines = re.split("\r\n|[\r\n\x85\u2028\u2029]", content.decode("utf-8", "replace"))
    for problem in caught.problems:
        if problem.path != file:
            assert problem.path == tmp_path / "common.yaml"
            continue
        assert 1 <= problem.line <= len(lines)
        assert 1 <= problem.column <= len(lines[problem.line - 1]) + 1
        assert str(problem).startswith(f"{file}:{problem.line}:{problem.column}: ")
        assert str(problem).isprintable()
        assert len(problem.message) < 200
        assert not JARGON.search(problem.message)


def test_meter_that_is_not_installed_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("model: m\nsweep:\n  energy.backend: [auto, nvlm, null]\n")
    with pytest.raises(StudyError) as caught:
        load_study(path)
    assert str(caught.value) == (
        f"{path}:3:26: energy.backend: no meter of that name is installed "
        "(got 'nvlm'; there are: auto, estimate, nvml, rapl)"
    )


@pytest.mark.parametrize(
    ("key", "home"),
    [("batch_size", "pytorch"), ("temperature", "decoder"), ("n_cycles", "execution"), ("n_warmup", "warmup")],
)
def test_key_at_the_wrong_level_gets_a_suggestion(tmp_path: Path, key: str, home: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(f"model: m\n{key}: 8\n")
    with pytest.raises(StudyError) as caught:
        load_study(path)
    assert str(caught.value) == f"{path}:2:1: {key}: unknown key (did you mean '{home}.{key}'?)"


@pytest.mark.parametrize(("key", "hint"), [("batch_size", "code:run.batch_size"), ("level", "code:run.level")])
def test_key_without_prefix_is_suggested_for_own_engine(tmp_path: Path, key: str, hint: str) -> None:
    check(
        tmp_path,
        f"backend: code:run\nsweep: {{{key}: [1, 2]}}",
        f"3:9: {key}: unknown key (did you mean '{hint}'?)",
    )


def test_axis_that_the_dataset_overrides_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("model: m\ndataset: {n: 3}\nsweep:\n  n: [2, 4]\n")
    with pytest.raises(StudyError) as caught:
        load_study(path)
    assert str(caught.value) == f"{path}:4:3: n: cannot be an axis: dataset.n is given and overrides it"
    path.write_text("model: m\nsweep:\n  max_input_tokens: [7]\n  dataset.input_len: [2, 4]\n")
    with pytest.raises(StudyError, match=r"3:3: max_input_tokens: cannot be an axis: dataset\.input_len is given"):
        load_study(path)


def test_validation_stops_after_many_problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "MAX_PROBLEMS", 3)
    (tmp_path / "study.yaml").write_text("model: m\nsweep: {n: [0, -1, -2, -3, -4]}\n")
    with pytest.raises(StudyError) as caught:
        load_study(tmp_path / "study.yaml")
    assert [problem.message for problem in caught.value.problems] == [
        f"must be at least 1 (got {n})" for n in (0, -1, -2)
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sweep: {pytorch.: [{batch_size: 1}]}", "2:9: sweep.pytorch.: a part of its name is empty"),
        ("sweep: {.n: [1]}", "2:9: sweep..n: a part of its name is empty"),
        ("sweep: {decoder..top_k: [1]}", "2:9: sweep.decoder..top_k: a part of its name is empty"),
        ("output_dir: ~nosuchuser/x", "2:1: output_dir: must be the path of a folder (got '~nosuchuser/x')"),
        ('output_dir: "a\\nb"', "2:1: output_dir: must be the path of a folder (got 'a\\nb')"),
        (
            "sweep: {output_dir: [a, b]}",
            "2:9: sweep.output_dir: must be the same for all experiments: a study has one results directory",
        ),
        (
            "n: [1, 2]",
            "2:1: n: must be a whole number (got [1, 2]); a list of values goes under sweep, as n: [...]",
        ),
    ],
)
def test_common_mistakes_of_new_users_have_helpful_errors(tmp_path: Path, text: str, message: str) -> None:
    check(tmp_path, text, message)


def test_file_larger_than_the_limit_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    with file.open("wb") as opened:
        opened.truncate(5 * 10**9)
    with pytest.raises(StudyError, match="1:1: is larger than 20 MB, the limit for a study"):
        load_study(file)


def test_negative_zero_is_read_as_zero(tmp_path: Path) -> None:
    ids = [
        study(tmp_path, f"model: m\nsweep: {{decoder.temperature: [{zero}]}}\n").points[0].id
        for zero in ("-0.0", "0.0")
    ]
    assert ids == ["temperature=0.0"] * 2
