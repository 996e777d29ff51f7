"""``-k axis=value``: rewritten expressions, keywords of items, and their match in pytest's own ``-k``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pytest_llem.collection.selection import keywords, rewrite
from pytest_llem.study.design import Experiment, StudyConfig
from pytest_llem.study.loading import load_study

STUDY = """\
model: org/Model-1.5
dataset: my prompts.txt
sweep:
  pytorch.batch_size: [8, 80]
  pytorch.attn_implementation: [null, "sdpa (v2)"]
  decoder.temperature: [0.7, 0.75]
execution: {n_cycles: 12, cycle_order: sequential}
"""

#: Values that have a special meaning in pytest's grammar, YAML, test ids or the shell.
AWKWARD = [
    "a b",
    "a.b/c-d",
    "a=b",
    "x and y",
    "50%",
    "é",
    "[z]",
    "not",
    "a",
    "(b)",
    "C:\\d",
    "{e: f}",
    "it's",
    "b",
]


def awkward_study() -> str:
    listed = ", ".join(f'"{value}"'.replace("\\", "\\\\") for value in AWKWARD)
    return f"sweep: {{model: [{listed}]}}\nexecution: {{n_cycles: 1, cycle_order: sequential}}\n"


def write(pytester: pytest.Pytester, text: str) -> None:
    (pytester.path / "s.yaml").write_text(text, encoding="utf-8")


def rewritten(expression: str) -> str:
    return rewrite(expression)[0]


def keywords_of(folder: Path, text: str, *, point: int = 0, cycle: int = 1) -> set[str]:
    """Return the keywords of one of a study's experiments."""
    file = folder / "s.yaml"
    file.write_text(text, encoding="utf-8")
    study = load_study(file)
    [experiment] = [e for e in study.experiments if e.point is study.points[point] and e.cycle == cycle]
    return all_keywords_of(study, experiment)


def all_keywords_of(study: StudyConfig, experiment: Experiment) -> set[str]:
    """Return the keywords of an experiment under an expression that names every axis."""
    named = {*study.axis_names, *study.axis_names.values(), "cycle"}
    return set(keywords(study, experiment.point.axes, experiment.cycle, named))


class TestRewrite:
    @pytest.mark.parametrize(
        ("expression", "expected"),
        [
            ("batch_size=8", "[batch_size:8]"),
            ("pytorch.batch_size=80", "[pytorch.batch_size:80]"),
            ("precision=bfloat16", "[precision:bfloat16]"),
            ("my-engine.size=8", "[my-engine.size:8]"),
            ("cycle=2", "[cycle:2]"),
            ("a=1 and not b=2", "[a:1] and not [b:2]"),
            ("(a=1 or(b=2))and not(c=3)", "([a:1] or([b:2]))and not([c:3])"),
            ("smoke and a=1 or test_x", "smoke and [a:1] or test_x"),
        ],
    )
    def test_axis_terms_are_rewritten(self, expression: str, expected: str) -> None:
        assert rewritten(expression) == expected

    @pytest.mark.parametrize(
        "expression",
        ["", "a", "a and not b", "(a or b) and c", "a[b-1]", "a=", "=1", "1a=2", "and", "a=(1)"],
    )
    def test_other_expressions_are_unchanged(self, expression: str) -> None:
        assert rewrite(expression) == (expression, [])

    @pytest.mark.parametrize(
        ("value", "same"),
        [
            ("0.70", "0.7"),
            ("1.0", "1"),
            ("1e-4", "0.0001"),
            ("True", "true"),
            ("~", "null"),
            ("'a b'", '"a b"'),
            ("org/m-1.5", "'org/m-1.5'"),
        ],
    )
    def test_values_are_read_as_in_a_study(self, value: str, same: str) -> None:
        assert rewritten(f"a={value}") == rewritten(f"a={same}")

    @pytest.mark.parametrize(
        ("value", "other"),
        [("8", "80"), ("0.7", "0.75"), ("float16", "bfloat16"), ("a/b", "a"), ("'a b'", "a"), ("'a b'", "a-b")],
    )
    def test_different_values_stay_different(self, value: str, other: str) -> None:
        one, two = rewritten(f"a={value}"), rewritten(f"a={other}")
        assert one not in two
        assert two not in one

    def test_quotes_keep_spaces_and_pytest_words(self) -> None:
        assert rewritten("a='x and (y or z)' and b") == r"[a:x\x2520and\x2520\x2528y\x2520or\x2520z\x2529] and b"

    @pytest.mark.parametrize(
        "value", ["[", "{", "*a", "!!int", "#x", "2024-13-45", "1:30:99", "[1,2]", "@", "é", "%"]
    )
    def test_values_that_are_not_yaml_are_text(self, value: str) -> None:
        assert rewritten(f"a={value}").startswith("[a:")

    def test_axes_are_returned_in_order(self) -> None:
        assert rewrite("b=1 and (a.x=2 or not b=3)")[1] == ["b", "a.x", "b"]


class TestKeywords:
    def test_full_and_short_names_and_the_cycle(self, tmp_path: Path) -> None:
        assert keywords_of(tmp_path, STUDY, cycle=12) == {
            "[batch_size:8]",
            "[pytorch.batch_size:8]",
            "[attn_implementation:null]",
            "[pytorch.attn_implementation:null]",
            "[temperature:0.7]",
            "[decoder.temperature:0.7]",
            "[cycle:12]",
        }

    @pytest.mark.parametrize(
        "expression",
        [
            "model=org/Model-1.5",
            "dataset='my prompts.txt'",
            'dataset="my prompts.txt"',
            "batch_size=8",
            "batch_size='8'",
            "revision=2024-05-01",
            "attn_implementation='a (b) [c] 50% é = \\ x'",
            "use_cache=false",
            "use_cache=no",
            "temperature=1",
            "temperature=1.0",
            "min_p=1e-4",
            "top_p=0.70",
        ],
    )
    def test_keywords_match_rewritten_expressions(self, tmp_path: Path, expression: str) -> None:
        text = """\
experiments:
- model: org/Model-1.5
  dataset: my prompts.txt
  pytorch: {batch_size: 8, revision: 2024-05-01, use_cache: false, attn_implementation: 'a (b) [c] 50% é = \\ x'}
  decoder: {temperature: 1.0, min_p: 1e-4, top_p: 0.7}
- model: other
"""
        assert rewritten(expression) in keywords_of(tmp_path, text)

    def test_each_awkward_value_selects_only_its_point(self, tmp_path: Path) -> None:
        file = tmp_path / "s.yaml"
        file.write_text(awkward_study(), encoding="utf-8")
        study = load_study(file)
        for value in AWKWARD:
            term = rewritten(f'model="{value}"')
            matching = [e for e in study.experiments if any(term in one for one in all_keywords_of(study, e))]
            assert [experiment.point.axes for experiment in matching] == [{"model": value}]

    def test_experiment_has_keywords_of_the_named_axes(self, tmp_path: Path) -> None:
        file = tmp_path / "s.yaml"
        file.write_text(STUDY, encoding="utf-8")
        study = load_study(file)
        one, named = study.experiments[0], ["batch_size", "decoder.temperature", "other"]
        assert set(keywords(study, one.point.axes, one.cycle, named)) == {
            "[batch_size:8]",
            "[decoder.temperature:0.7]",
        }

    def test_ambiguous_short_name_is_not_a_keyword(self, tmp_path: Path) -> None:
        found = keywords_of(tmp_path, "model: m\nsweep: {warmup.enabled: [true], baseline.enabled: [false]}\n")
        assert {"[warmup.enabled:true]", "[baseline.enabled:false]"} <= found
        assert not any(one.startswith("[enabled:") for one in found)

    def test_values_are_case_sensitive(
        self, collected: Callable[..., list[str]], pytester: pytest.Pytester
    ) -> None:
        write(pytester, "sweep: {model: [a, A, B]}\nexecution: {n_cycles: 1}\n")
        assert collected("model=A", "s.yaml") == ["experiment[model=A]"]
        assert collected("model=a", "s.yaml") == ["experiment[model=a]"]


@pytest.fixture
def collected(pytester: pytest.Pytester) -> Callable[..., list[str]]:
    """Return a function that returns the names of the items in some files that a ``-k`` expression selects."""

    def collect(expression: str, *files: str) -> list[str]:
        arguments = ["-p", "llem", "--collect-only", "-q", "-p", "no:randomly", "-k", expression]
        result = pytester.runpytest(*files, *arguments)
        names = [line.partition("::")[2] for line in result.outlines if "::" in line]
        assert result.ret == (pytest.ExitCode.OK if names else pytest.ExitCode.NO_TESTS_COLLECTED)
        return names

    return collect


class TestUnderPytest:
    @pytest.mark.parametrize(
        ("expression", "expected"),
        [
            ("batch_size=8", ["8-null", "8-x"]),
            ("not pytorch.batch_size=8 and experiment", ["80-null", "80-x"]),
            ("batch_size=0 or cycle=2", []),
            ("batch_size=80 and not (attn_implementation=null or cycle=2)", ["80-x"]),
            ("s.yaml and attn_implementation='sdpa (v2)' and not test_x", ["8-x", "80-x"]),
        ],
    )
    def test_exactly_the_named_points_are_selected(
        self, pytester: pytest.Pytester, collected: Callable[..., list[str]], expression: str, expected: list[str]
    ) -> None:
        write(
            pytester,
            """\
model: m
sweep:
  pytorch.batch_size: [8, 80]
  pytorch.attn_implementation: [null, "sdpa (v2)"]
execution: {n_cycles: 1, cycle_order: sequential}
""",
        )
        names = {"null": "null", "x": "sdpa%20%28v2%29"}
        assert collected(expression, "s.yaml") == [
            f"experiment[batch_size={size}-attn_implementation={names[kind]}]"
            for size, kind in (one.split("-") for one in expected)
        ]

    def test_awkward_values_are_selected_exactly(
        self, pytester: pytest.Pytester, collected: Callable[..., list[str]]
    ) -> None:
        write(pytester, awkward_study())
        everything = collected("cycle=1", "s.yaml")
        assert len(everything) == len(AWKWARD)
        expression = " or ".join(f'model="{value}"' for value in AWKWARD[::2])
        assert collected(expression, "s.yaml") == everything[::2]
        assert collected(f"not ({expression})", "s.yaml") == everything[1::2]

    @pytest.mark.parametrize(
        ("expression", "expected"),
        [
            ("n=1 or test_ordinary", ["experiment[n=1]", "test_ordinary[n=1]"]),
            ("not n=1", ["experiment[n=2]", "test_ordinary[n=1]"]),
            ("ordinary", ["test_ordinary[n=1]"]),
        ],
    )
    def test_selection_of_a_study_and_an_ordinary_test(
        self, pytester: pytest.Pytester, collected: Callable[..., list[str]], expression: str, expected: list[str]
    ) -> None:
        write(pytester, "model: m\nsweep: {n: [1, 2]}\nexecution: {n_cycles: 1, cycle_order: sequential}\n")
        pytester.makepyfile(
            test_it='import pytest\n@pytest.mark.parametrize("n", [1], ids=["n=1"])\ndef test_ordinary(n): pass\n'
        )
        assert collected(expression, "s.yaml", "test_it.py") == expected

    @pytest.mark.parametrize(
        ("expression", "expected"),
        [
            ("not batch_sise=8", "*-k: no collected study has an axis batch_sise (there are: cycle, n)"),
            ("n=1 or other.n=2", "*-k: no collected study has an axis other.n (there are: cycle, n)"),
            ("n==1", "*-k: write n=1, with one '=' and without spaces (got 'n==1')"),
        ],
    )
    def test_invalid_expression_is_a_usage_error(
        self, pytester: pytest.Pytester, expression: str, expected: str
    ) -> None:
        write(pytester, "model: m\nsweep: {n: [1, 2]}\n")
        result = pytester.runpytest("s.yaml", "-p", "llem", "--collect-only", "-q", "-k", expression)
        assert result.ret == pytest.ExitCode.USAGE_ERROR
        result.stderr.fnmatch_lines([expected])
