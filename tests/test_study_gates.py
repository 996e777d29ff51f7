"""``budgets`` and ``gates`` in study files: their meaning, and error messages."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from pytest_llem.catalogue import CATALOGUE, PREFILL_METRICS
from pytest_llem.study.budgets import SIGNED
from pytest_llem.study.design import StudyConfig
from pytest_llem.study.gates import DEFAULT_DELTA, DEFAULT_FAMILY
from pytest_llem.study.loading import load_study
from pytest_llem.study.problems import StudyError
from pytest_llem.study.unreachable_gates import _IDLE_POWER_METRICS

#: Two lines long. 8 divides n; otherwise there would be a note.
STUDY = "<<: {model: m, n: 96}\nsweep: {precision: [bf16, fp32], pytorch.batch_size: [1, 8]}\n"

#: Its points.
IDS = [f"precision={precision}-batch_size={size}" for precision in ("bf16", "fp32") for size in (1, 8)]


def load(folder: Path, text: str) -> StudyConfig:
    (folder / "s.yaml").write_text(text)
    return load_study(folder / "s.yaml")


def errors(folder: Path, text: str) -> list[str]:
    with pytest.raises(StudyError) as caught:
        load(folder, text)
    return [str(problem.shown_from(folder)) for problem in caught.value.problems]


def notes(folder: Path, text: str) -> list[str]:
    return [str(note.shown_from(folder)) for note in load(folder, text).notes]


def limits(study: StudyConfig) -> list[tuple[str, str, float | None, float | None, int]]:
    return [(one.metric, one.point, one.maximum, one.minimum, one.line) for one in study.budgets]


def after_study(text: str) -> str:
    """Return the study followed by *text*, whose first line is the file's third."""
    return STUDY + textwrap.dedent(text).lstrip("\n")


class TestBudgets:
    @pytest.mark.parametrize(
        ("written", "maximum", "minimum"),
        [
            ("{seconds: 4}", 4.0, None),
            ("{seconds: 1e-3}", 0.001, None),
            ("{seconds: {max: 4}}", 4.0, None),
            ("{seconds: {min: 0.5}}", None, 0.5),
            ("{seconds: {max: 4, min: 0.5}}", 4.0, 0.5),
            ("{seconds: {max: 4, min: 4}}", 4.0, 4.0),
            ("{seconds: {max: 4, min: }}", 4.0, None),
            ("{seconds: 0}", 0.0, None),
            ("[{metric: seconds, max: 4}]", 4.0, None),
            ("[{metric: seconds, max: 4, min: 0.5, where: }]", 4.0, 0.5),
            ("[{metric: seconds, max: 4}, {metric: seconds, min: 0.5}]", 4.0, 0.5),
            ("[{metric: seconds, min: 0.5}, {metric: seconds, max: 4}]", 4.0, 0.5),
        ],
    )
    def test_each_form_of_budgets_applies_to_every_point(
        self, tmp_path: Path, written: str, maximum: float | None, minimum: float | None
    ) -> None:
        study = load(tmp_path, f"{STUDY}budgets: {written}\n")
        assert limits(study) == [("seconds", point, maximum, minimum, 3) for point in IDS]
        assert [one.id for one in study.budgets] == [f"seconds-{point}" for point in IDS]
        assert study.notes == ()

    @pytest.mark.parametrize("written", ["", "{}", "[]", "~"])
    def test_study_may_have_no_budgets(self, tmp_path: Path, written: str) -> None:
        assert load(tmp_path, f"{STUDY}budgets: {written}\n").budgets == ()

    @pytest.mark.parametrize("metric", CATALOGUE)
    def test_every_metric_may_have_a_budget(self, tmp_path: Path, metric: str) -> None:
        assert limits(load(tmp_path, f"model: m\nbudgets: {{{metric}: 7.5}}\n")) == [
            (metric, "model=m", 7.5, None, 2)
        ]

    @pytest.mark.parametrize("metric", SIGNED)
    def test_budget_of_a_signed_metric_may_be_negative(self, tmp_path: Path, metric: str) -> None:
        study = load(tmp_path, f"model: m\nbudgets: {{{metric}: {{max: -1, min: -2.5}}}}\n")
        assert limits(study) == [(metric, "model=m", -1.0, -2.5, 2)]

    def test_budgets_are_ordered_by_point_then_as_written(self, tmp_path: Path) -> None:
        study = load(
            tmp_path,
            after_study(
                """
                budgets:
                  - {metric: ttft_p50_ms, max: 9, where: {batch_size: 8}}
                  - metric: seconds
                    max: 4
                  - {metric: ttft_p50_ms, max: 5, where: {batch_size: 1}}
                """
            ),
        )
        first, second = ("seconds", 4.0, None, 5), ("ttft_p50_ms", 5.0, None, 7)
        large = ("ttft_p50_ms", 9.0, None, 4)
        of_points = [(IDS[0], [first, second]), (IDS[1], [large, first])]
        of_points += [(IDS[2], [first, second]), (IDS[3], [large, first])]
        assert limits(study) == [
            (metric, point, maximum, minimum, line)
            for point, budgets in of_points
            for metric, maximum, minimum, line in budgets
        ]

    @pytest.mark.parametrize(
        ("where", "fitting"),
        [
            ("{precision: fp32}", [2, 3]),
            ("{pytorch.batch_size: 8.0, precision: [bf16, fp32]}", [1, 3]),
            ("{pytorch: {batch_size: 8}, precision: bf16}", [1]),
            ("{decoder.do_sample: true}", [0, 1, 2, 3]),
        ],
    )
    def test_where_of_a_budget_matches_as_in_rules(self, tmp_path: Path, where: str, fitting: list[int]) -> None:
        study = load(tmp_path, f"{STUDY}budgets: [{{metric: seconds, max: 4, where: {where}}}]\n")
        assert [one.point for one in study.budgets] == [IDS[index] for index in fitting]

    def test_experiment_may_have_budgets_of_its_own(self, tmp_path: Path) -> None:
        study = load(
            tmp_path,
            textwrap.dedent(
                """\
                model: m
                budgets: {seconds: 4, ttft_p50_ms: 9}
                sweep: {precision: [bf16]}
                experiments:
                  - {n: 2}
                  - n: 3
                    budgets: {seconds: {min: 1}}
                  - {n: 4, budgets: }
                  - {n: 5, budgets: {}}
                  - {n: 6, budgets: []}
                  - n: 7
                    budgets:
                      - {metric: seconds, max: 2, where: {n: 7}}
                """
            ),
        )
        assert limits(study) == [
            ("seconds", "precision=bf16", 4.0, None, 2),
            ("ttft_p50_ms", "precision=bf16", 9.0, None, 2),
            ("seconds", "n=2", 4.0, None, 2),
            ("ttft_p50_ms", "n=2", 9.0, None, 2),
            ("seconds", "n=3", None, 1.0, 7),
            ("seconds", "n=7", 2.0, None, 13),
        ]
        assert study.notes == ()

    def test_study_of_one_experiment_may_have_budgets(self, tmp_path: Path) -> None:
        study = load(tmp_path, "model: m\nbudgets:\n  seconds: 4\n")
        assert limits(study) == [("seconds", "model=m", 4.0, None, 3)]

    def test_budgets_of_a_base_study_are_ignored_with_a_note(self, tmp_path: Path) -> None:
        (tmp_path / "common.yaml").write_text(
            "model: m\nbudgets: {second: 4}\ngates: 7\nexperiments: [{budgets: 7}]\n"
        )
        study = load(tmp_path, "base: common.yaml\n")
        assert (study.budgets, study.gates.family_of(None), study.gates_line) == ((), DEFAULT_FAMILY, 1)
        assert [str(note.shown_from(tmp_path)) for note in study.notes] == [
            "common.yaml:4:1: experiments: is ignored in a base: only the study itself can set it",
            "common.yaml:2:1: budgets: is ignored in a base: only the study itself can set it",
            "common.yaml:3:1: gates: is ignored in a base: only the study itself can set it",
        ]

    def test_skipped_point_keeps_its_budgets(self, tmp_path: Path) -> None:
        study = load(tmp_path, f"{STUDY}skip: [{{where: {{precision: fp32}}}}]\nbudgets: {{seconds: 4}}\n")
        assert [one.point for one in study.budgets] == IDS


class TestHashes:
    #: Hashes of versions before budgets and gates existed.
    DESIGN = "29ff948bdadb50be"
    POINTS = ("e29e8fc8b883739b", "3f47bc1901d8f645", "eb3acf97f157cdbd", "33bf1a1a42ee5e0b")

    @pytest.mark.parametrize(
        "more",
        [
            "",
            "budgets: {seconds: 4, energy_j: {max: 3, min: 1}}",
            "budgets: [{metric: seconds, max: 4, where: {batch_size: 8}}]",
            "gates: {alpha: 0.05, delta: {seconds: 0.1}, metrics: [seconds]}",
            "energy: {allow_estimated: true}",
        ],
    )
    def test_budgets_do_not_change_identity_hashes(self, tmp_path: Path, more: str) -> None:
        study = load(tmp_path, f"{STUDY.replace('<<: {model: m, n: 96}', 'model: m')}{more}\n")
        assert (study.design_hash, tuple(point.config_hash for point in study.points)) == (
            self.DESIGN,
            self.POINTS,
        )

    def test_budgets_of_an_experiment_do_not_change_identity(self, tmp_path: Path) -> None:
        text = "model: m\nexperiments: [{n: 1}, {n: 2{}}]\n"
        plain, budgeted = (load(tmp_path, text.replace("{}", more)) for more in ("", ", budgets: {seconds: 1}"))
        assert plain.design_hash == budgeted.design_hash
        assert [point.id for point in plain.points] == [point.id for point in budgeted.points] == ["n=1", "n=2"]

    def test_budgets_do_not_distinguish_experiments(self, tmp_path: Path) -> None:
        text = "model: m\nexperiments: [{n: 1, budgets: {seconds: 1}}, {n: 1, budgets: {seconds: 2}}]\n"
        assert errors(tmp_path, text) == ["s.yaml:2:46: experiments[1]: is the same experiment as experiments[0]"]


class TestWrongBudgets:
    @pytest.mark.parametrize(
        ("written", "message"),
        [
            (
                "7",
                "1: budgets: must be a mapping of metrics to limits, "
                "or a list of {metric, max, min, where} (got 7)",
            ),
            ("{energy: 1}", "11: budgets.energy: no metric of that name (did you mean 'energy_j'?)"),
            ("{watts: 1}", "11: budgets.watts: no metric of that name"),
            ("{seconds: '4'}", "11: budgets.seconds: must be a number or a mapping {max, min} (got '4')"),
            (
                "{seconds: yes}",
                "11: budgets.seconds: must be a number or a mapping {max, min} "
                "(got yes, which YAML reads as true)",
            ),
            ("{seconds: }", "11: budgets.seconds: must be a number or a mapping {max, min} (got nothing)"),
            ("{seconds: [4]}", "11: budgets.seconds: must be a number or a mapping {max, min} (got [4])"),
            ("{seconds: .inf}", "11: budgets.seconds: must be a finite number (got .inf)"),
            ("{seconds: {}}", "11: budgets.seconds: needs a max or a min"),
            ("{seconds: {max: }}", "11: budgets.seconds: needs a max or a min"),
            ("{seconds: {max: '4'}}", "21: budgets.seconds.max: must be a number (got '4')"),
            ("{seconds: {max: true}}", "21: budgets.seconds.max: must be a number (got true)"),
            ("{seconds: {maximum: 4}}", "21: budgets.seconds.maximum: unknown key (did you mean 'max'?)"),
            ("{seconds: {max: 1, min: 2.5}}", "11: budgets.seconds: min 2.5 is above max 1"),
            ("{seconds: -1}", "11: budgets.seconds: must be at least 0, as seconds is (got -1)"),
            ("{seconds: {min: -1}}", "21: budgets.seconds.min: must be at least 0, as seconds is (got -1)"),
            (
                "{metric: seconds}",
                "11: budgets.metric: write a budget with metric as an entry of a list: [{metric: ..., max: ...}]",
            ),
            (
                "{seconds: {max: 1, where: {n: 1}}}",
                "29: budgets.seconds.where: unknown key: write a budget for some points as an entry of a list: "
                "[{metric: seconds, max: ..., where: ...}]",
            ),
            ("[7]", "11: budgets[0]: must be a mapping (got 7)"),
            ("[{max: 4}]", "11: budgets[0].metric: is required"),
            ("[{metric: , max: 4}]", "12: budgets[0].metric: is required"),
            ("[{metric: 7, max: 4}]", "12: budgets[0].metric: must be a string (got 7); put it in quotes"),
            (
                "[{metric: second, max: 4}]",
                "12: budgets[0].metric: no metric of that name (did you mean 'seconds'?)",
            ),
            ("[{metric: seconds}]", "11: budgets[0]: needs a max or a min"),
            ("[{metric: seconds, max: 4, wher: {}}]", "37: budgets[0].wher: unknown key (did you mean 'where'?)"),
            ("[{metric: seconds, max: 4, where: {}}]", "37: budgets[0].where: must not be empty (got {})"),
            ("[{metric: seconds, max: 4, where: 7}]", "37: budgets[0].where: must be a mapping (got 7)"),
            (
                "[{metric: seconds, max: 4, where: {precison: fp32}}]",
                "45: budgets[0].where.precison: is neither an axis nor a field (did you mean 'precision'?)",
            ),
            (
                "[{seconds: 4}]",
                "12: budgets[0].seconds: unknown key: an entry of a list has the key metric: "
                "{metric: seconds, max: ...}",
            ),
        ],
    )
    def test_invalid_budgets_are_refused(self, tmp_path: Path, written: str, message: str) -> None:
        assert errors(tmp_path, f"{STUDY}budgets: {written}\n") == [f"s.yaml:3:{message}"]

    def test_budgets_of_an_experiment_are_checked(self, tmp_path: Path) -> None:
        text = "model: m\nexperiments:\n- n: 1\n  budgets: {second: 1}\n- n: 2\n  budgets: [{metric: seconds}]\n"
        assert errors(tmp_path, text) == [
            "s.yaml:4:13: experiments[0].budgets.second: no metric of that name (did you mean 'seconds'?)",
            "s.yaml:6:13: experiments[1].budgets[0]: needs a max or a min",
        ]

    def test_budgets_of_an_excluded_experiment_are_checked(self, tmp_path: Path) -> None:
        left_out = "{pytorch: {use_cache: false, cache_implementation: static}, budgets: @}"
        text = f"model: m\nexperiments: [{{n: 2}}, {left_out}]\n"
        assert load(tmp_path, text.replace("@", "{seconds: 1}")).budgets == ()
        assert load(tmp_path, text.replace("@", "{seconds: 1}")).notes == ()
        assert len(errors(tmp_path, text.replace("@", "{second: 1}"))) == 1

    def test_all_errors_are_reported_at_once(self, tmp_path: Path) -> None:
        message = errors(
            tmp_path,
            "model: m\nn: 0\nbudgets:\n  second: 1\n  energy_j: x\n  seconds: {max: x, mi: 2}\n"
            "gates: {alpha: 2, metrcs: []}\n",
        )
        assert message == [
            "s.yaml:2:1: n: must be at least 1 (got 0)",
            "s.yaml:4:3: budgets.second: no metric of that name (did you mean 'seconds'?)",
            "s.yaml:5:3: budgets.energy_j: must be a number or a mapping {max, min} (got 'x')",
            "s.yaml:6:13: budgets.seconds.max: must be a number (got 'x')",
            "s.yaml:6:21: budgets.seconds.mi: unknown key (did you mean 'min'?)",
            "s.yaml:7:9: gates.alpha: must be less than 0.5 (got 2)",
            "s.yaml:7:19: gates.metrcs: unknown key (did you mean 'metrics'?)",
        ]

    def test_second_limit_for_the_same_point_is_refused(self, tmp_path: Path) -> None:
        message = errors(
            tmp_path,
            after_study(
                """
                budgets:
                  - {metric: seconds, max: 4}
                  - {metric: seconds, max: 4, where: {precision: fp32}}
                  - metric: seconds
                    min: 1
                  - {metric: seconds, min: 2, where: {precision: bf16, batch_size: 1}}
                  - {metric: ttft_p50_ms, max: 2, where: {batch_size: 1}}
                  - {metric: ttft_p50_ms, max: 2, where: {batch_size: 8}}
                """
            ),
        )
        assert message == [
            f"s.yaml:5:23: budgets[1].max: seconds has a maximum for {IDS[2]} and 1 more already (line 4); "
            "restrict one of them with where",
            f"s.yaml:8:23: budgets[3].min: seconds has a minimum for {IDS[0]} already (line 6); "
            "restrict one of them with where",
        ]

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            ("max: 2", "min: 3", "min 3 conflicts with max 2 (line 4) for model=m"),
            ("min: 3", "max: 2", "max 2 conflicts with min 3 (line 4) for model=m"),
        ],
    )
    def test_limits_that_exclude_each_other_are_refused(
        self, tmp_path: Path, first: str, second: str, message: str
    ) -> None:
        text = f"model: m\n\nbudgets:\n- {{metric: seconds, {first}}}\n- {{metric: seconds, {second}}}\n"
        assert errors(tmp_path, text) == [f"s.yaml:5:21: budgets[1].{second[:3]}: {message}"]

    def test_budgets_and_gates_cannot_be_swept(self, tmp_path: Path) -> None:
        message = "belongs to the study and not to an experiment"
        assert errors(tmp_path, "model: m\nsweep: {budgets: [1, 2]}\n") == [f"s.yaml:2:9: budgets: {message}"]
        assert errors(tmp_path, "model: m\nexperiments: [{gates: {}}]\n") == [f"s.yaml:2:16: gates: {message}"]


class TestGates:
    def test_study_without_gates_has_the_defaults(self, tmp_path: Path) -> None:
        study = load(tmp_path, "model: m\nn: 3\nsweep: {precision: [bf16]}\n")
        assert (study.gates.alpha, study.gates.family_of(None), study.gates.delta_of("seconds")) == (
            0.01,
            DEFAULT_FAMILY,
            DEFAULT_DELTA,
        )
        assert study.gates_line == 3
        assert load(tmp_path, "model: m\nn: 3\ngates:\n").gates == study.gates

    def test_gates_section_is_read(self, tmp_path: Path) -> None:
        study = load(
            tmp_path, f"{STUDY}gates: {{alpha: 0.05, delta: {{seconds: 0.1}}, metrics: [seconds, energy_j]}}\n"
        )
        gates = study.gates
        assert (gates.alpha, gates.family_of(None), study.gates_line) == (0.05, ("seconds", "energy_j"), 3)
        assert (gates.delta_of("seconds"), gates.delta_of("energy_j")) == (0.1, DEFAULT_DELTA)
        assert load(tmp_path, f"{STUDY}gates: {{delta: 0}}\n").gates.delta_of("seconds") == 0
        assert study.notes == ()

    @pytest.mark.parametrize(
        ("written", "message"),
        [
            ("7", "1: gates: must be a mapping (got 7)"),
            ("{alpha: 0}", "9: gates.alpha: must be greater than 0 (got 0)"),
            ("{alpha: 5%}", "9: gates.alpha: must be a number (got '5%')"),
            ("{delta: 1}", "9: gates.delta: must be less than 1 (got 1)"),
            ("{delta: x}", "9: gates.delta: must be a number (got 'x')"),
            ("{delta: [0.1]}", "9: gates.delta: must be a number (got [0.1])"),
            ("{delta: {seconds: -1}}", "17: gates.delta.seconds: must be at least 0 (got -1)"),
            ("{delta: {seconds: x}}", "17: gates.delta.seconds: must be a number (got 'x')"),
            (
                "{delta: {second: 0.1}}",
                "17: gates.delta.second: no metric of that name (did you mean 'seconds'?)",
            ),
            ("{metrics: seconds}", "9: gates.metrics: must be a list (got 'seconds')"),
            ("{metrics: []}", "9: gates.metrics: must not be empty (got [])"),
            ("{metrics: [7]}", "19: gates.metrics[0]: must be a string (got 7); put it in quotes"),
            (
                "{metrics: [seconds, second]}",
                "28: gates.metrics[1]: no metric of that name (did you mean 'seconds'?)",
            ),
            ("{metrics: [seconds, seconds]}", "28: gates.metrics[1]: seconds is given twice"),
            (
                "{metrics: [mean_power_w]}",
                "19: gates.metrics[0]: mean_power_w cannot be a gate: neither more nor less of it is better",
            ),
        ],
    )
    def test_invalid_gates_are_refused(self, tmp_path: Path, written: str, message: str) -> None:
        assert errors(tmp_path, f"{STUDY}gates: {written}\n") == [f"s.yaml:3:{message}"]

    @pytest.mark.parametrize("metric", CATALOGUE)
    def test_every_metric_with_a_better_direction_can_be_gated(self, tmp_path: Path, metric: str) -> None:
        text = f"model: m\ngates: {{metrics: [{metric}]}}\n"
        if CATALOGUE[metric].better:
            assert load(tmp_path, text).gates.family_of(None) == (metric,)
        else:
            assert len(errors(tmp_path, text)) == 1

    def test_delta_of_a_metric_not_compared_is_noted(self, tmp_path: Path) -> None:
        message = "has no effect: this metric is not compared; add it to gates.metrics"
        assert notes(tmp_path, f"{STUDY}gates: {{delta: {{ttft_p50_ms: 0.1, seconds: 0.1}}}}\n") == [
            f"s.yaml:3:35: gates.delta.seconds: {message}"
        ]


class TestUnreachableGates:
    @pytest.mark.parametrize(
        ("where", "message"),
        [
            (
                "{n: 3}",
                "37: budgets[0].where: matches only entries of experiments with their own budgets",
            ),
            (
                "",
                "12: budgets[0].metric: has no effect: all entries of experiments have their own budgets",
            ),
        ],
    )
    def test_budget_that_applies_to_no_point_is_noted(self, tmp_path: Path, where: str, message: str) -> None:
        sweep = "sweep: {n: [1, 2]}" if where else "# no sweep"
        text = f"model: m\n{sweep}\nbudgets: [{{metric: seconds, max: 4, where: {where}}}]\n"
        assert notes(tmp_path, f"{text}experiments: [{{n: 3, budgets: {{}}}}]\n") == [f"s.yaml:3:{message}"]

    def test_budget_for_another_experiment_is_noted(self, tmp_path: Path) -> None:
        text = "model: m\nexperiments: [{n: 1}, {n: 2, budgets: [{metric: seconds, max: 4, where: {n: 1}}]}]\n"
        assert notes(tmp_path, text) == [
            "s.yaml:2:66: experiments[1].budgets[0].where: does not match this entry of experiments"
        ]

    @pytest.mark.parametrize(
        ("setting", "metric", "reason"),
        [
            ("energy: {backend: null}", "energy_j", "energy.backend is null"),
            ("energy: {backend: null}", "tokens_per_joule", "energy.backend is null"),
            ("energy: {backend: null}", "gco2e_g", "energy.backend is null"),
            ("energy: {backend: null}", "peak_temperature_c", "energy.backend is null"),
            (
                "energy: {backend: estimate}",
                "wh_per_1000_requests",
                "energy.backend is 'estimate', and energy.allow_estimated false",
            ),
            ("baseline: {enabled: false}", "active_energy_j", "baseline.enabled is false"),
            (
                "energy: {backend: estimate, allow_estimated: true}",
                "active_energy_j",
                "energy.backend is 'estimate', and idle power is never estimated",
            ),
            ("n: 1", "prefill_seconds", "measurement.prefill_split is false"),
            ("n: 1", "energy_per_input_token_j", "measurement.prefill_split is false"),
        ],
    )
    def test_budget_that_can_never_be_judged_is_noted(
        self, tmp_path: Path, setting: str, metric: str, reason: str
    ) -> None:
        text = f"model: m\n{setting}\nbudgets: {{{metric}: 1}}\n"
        assert notes(tmp_path, text) == [f"s.yaml:3:11: budgets.{metric}: can never be judged: {reason}"]

    @pytest.mark.parametrize(
        ("setting", "metric"),
        [
            ("energy: {backend: null}", "seconds"),
            ("energy: {backend: null}", "output_tokens_per_second"),
            ("energy: {backend: null}", "model_memory_mb"),
            ("energy: {backend: null}", "mfu"),
            ("energy: {backend: estimate, allow_estimated: true}", "energy_j"),
            ("baseline: {enabled: false}", "energy_j"),
            ("measurement: {prefill_split: true}", "prefill_energy_j"),
        ],
    )
    def test_budget_that_can_be_judged_has_no_note(self, tmp_path: Path, setting: str, metric: str) -> None:
        assert notes(tmp_path, f"model: m\n{setting}\nbudgets: {{{metric}: 1}}\n") == []

    def test_note_names_points_that_are_not_skipped(self, tmp_path: Path) -> None:
        text = "model: m\nsweep: {energy.backend: [auto, null], n: [1, 2]}\nbudgets: {energy_j: 1}\n"
        assert notes(tmp_path, text) == [
            "s.yaml:3:11: budgets.energy_j: can never be judged for backend=null-n=1 and 1 more: "
            "energy.backend is null"
        ]
        assert notes(tmp_path, f"{text}skip: [{{where: {{energy.backend: null}}}}]\n") == []

    def test_named_metric_that_can_never_be_judged_is_noted(self, tmp_path: Path) -> None:
        text = "model: m\nenergy: {backend: null}\ngates: {metrics: [seconds, energy_j]}\n"
        assert notes(tmp_path, text) == [
            "s.yaml:3:28: gates.metrics[1]: can never be judged: energy.backend is null"
        ]
        assert notes(tmp_path, "model: m\nenergy: {backend: null}\ngates: {alpha: 0.05}\n") == []

    def test_metrics_named_in_code_are_in_the_catalogue(self) -> None:
        assert {*SIGNED, *PREFILL_METRICS, *_IDLE_POWER_METRICS} <= {*CATALOGUE}
