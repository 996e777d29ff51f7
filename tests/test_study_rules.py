"""``base``, ``runners``, ``skip``, ``xfail``, user-defined engines, and settings without effect."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pytest_llem.registry import ENGINE_GROUP, installed
from pytest_llem.study.design import StudyConfig
from pytest_llem.study.engines import ENGINES as GRAMMAR
from pytest_llem.study.loading import load_study
from pytest_llem.study.problems import StudyError
from tests.conftest import Results, WriteStudy
from tests.support.marks import slow

ENGINES = ", ".join(dict.fromkeys([*GRAMMAR, *installed(ENGINE_GROUP)]))


def load(folder: Path, text: str, name: str = "study.yaml") -> StudyConfig:
    (folder / name).write_text(text)
    return load_study(folder / name)


def errors(folder: Path, text: str) -> list[str]:
    with pytest.raises(StudyError) as caught:
        load(folder, text)
    return [str(problem.shown_from(folder)) for problem in caught.value.problems]


def notes(folder: Path, study: StudyConfig) -> list[str]:
    return [str(note.shown_from(folder)) for note in study.notes]


class TestBase:
    def test_study_inherits_fields_of_its_base(self, tmp_path: Path) -> None:
        (tmp_path / "common.yaml").write_text("model: m\nn: 7\ndecoder: {top_k: 3}\npytorch: {batch_size: 2}\n")
        text = "base: common.yaml\nn: 8\ndecoder: {top_p: 0.5}\nsweep: {pytorch.use_cache: [true, false]}\n"
        configs = [point.config for point in load(tmp_path, text).points]
        assert [(one.model, one.n) for one in configs] == [("m", 8)] * 2
        assert configs[0].decoder.top_k == 50  # sections are taken whole, as in LLenergyMeasure 2.0
        assert [one.pytorch.batch_size for one in configs if one.pytorch] == [2, 2]
        assert [one.pytorch.use_cache for one in configs if one.pytorch] == [True, False]

    def test_base_path_is_relative_to_the_study(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "studies").mkdir()
        (tmp_path / "common.yaml").write_text("model: m\n")
        monkeypatch.chdir("/")
        study = load(tmp_path / "studies", "base: ../common.yaml\n")
        assert study.points[0].config.model == "m"
        assert study.base_text == "model: m\n"

    def test_study_keys_in_a_base_are_ignored(self, tmp_path: Path) -> None:
        (tmp_path / "common.yaml").write_text(
            "model: m\nname: x\nversion: 2\nsweep: {n: [1, 2]}\nexperiments: [{n: 3}]\nexecution: {n_cycles: 9}\n"
            "skip: 7\nxfail: 7\nrunners: 7\nbudgets: 7\ngates: 7\n"
        )
        study = load(tmp_path, "base: common.yaml\n")
        assert (study.name, len(study.points), study.n_cycles) == ("study", 1, 1)
        keys = [note.where for note in study.notes]
        assert keys == ["sweep", "experiments", "runners", "execution", "budgets", "gates", "skip", "xfail"]

    def test_base_gives_the_same_design_as_explicit_fields(self, tmp_path: Path) -> None:
        (tmp_path / "common.yaml").write_text("model: m\nn: 7\n")
        whole = load(tmp_path, "model: m\nn: 7\nsweep: {precision: [bf16, fp16]}\n")
        assert (
            load(tmp_path, "base: common.yaml\nsweep: {precision: [bf16, fp16]}\n").design_hash
            == whole.design_hash
        )

    def test_errors_in_a_base_are_located_in_the_base(self, tmp_path: Path) -> None:
        (tmp_path / "common.yaml").write_text("model: m\nmodle: x\nn: 0\ndecoder:\n  top_k: no\n")
        assert errors(tmp_path, "base: common.yaml\nsweep: {precision: [bf16, fp17]}\n") == [
            "common.yaml:2:1: modle: unknown key (did you mean 'model'?)",
            "common.yaml:3:1: n: must be at least 1 (got 0)",
            "common.yaml:5:3: decoder.top_k: must be a whole number (got no, which YAML reads as false)",
            "study.yaml:2:27: precision: must be one of 'fp32', 'fp16' or 'bf16' (got 'fp17')",
        ]

    @pytest.mark.parametrize(
        ("base", "message"),
        [
            ("missing.yaml", "there is no such file, relative to this one (got 'missing.yaml')"),
            (".", "is not a file (got '.')"),
            ("study.yaml", "is this file itself (got 'study.yaml')"),
            ("./x/../study.yaml", "is this file itself (got './x/../study.yaml')"),
            ("round.yaml", "is circular: the base of round.yaml is study.yaml"),
            ("own.yaml", "is circular: the base of own.yaml is own.yaml"),
            ("7", "must be the path of a file (got 7)"),
            ("[a]", "must be the path of a file (got ['a'])"),
            ("''", "must be the path of a file (got '')"),
            ("x" * 300, f"cannot be read: File name too long (got '{'x' * 27}...{'x' * 28}')"),
        ],
    )
    def test_invalid_base_is_an_error(self, tmp_path: Path, base: str, message: str) -> None:
        (tmp_path / "x").mkdir()
        (tmp_path / "round.yaml").write_text("base: study.yaml\nmodel: m\n")
        (tmp_path / "own.yaml").write_text("base: own.yaml\nmodel: m\n")
        assert errors(tmp_path, f"model: m\nbase: {base}\n") == [f"study.yaml:2:1: base: {message}"]

    def test_missing_base_is_the_only_error(self, tmp_path: Path) -> None:
        message = "there is no such file, relative to this one (got 'missing.yaml')"
        assert errors(tmp_path, "base: missing.yaml\n") == [f"study.yaml:1:1: base: {message}"]

    def test_null_base_is_ignored(self, tmp_path: Path) -> None:
        assert load(tmp_path, "base:\nmodel: m\n").base_text is None

    def test_base_of_a_base_is_ignored_with_a_note(self, tmp_path: Path) -> None:
        (tmp_path / "common.yaml").write_text("base: deeper.yaml\nmodel: m\n")
        study = load(tmp_path, "base: common.yaml\n")
        assert notes(tmp_path, study) == [
            "common.yaml:1:1: base: is ignored in a base: only the study itself can set it"
        ]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "common.yaml:1:1: the file is empty"),
            ("- a", "common.yaml:1:1: a base must be a mapping (got ['a'])"),
            ("a: [", "common.yaml:1:5: not valid YAML: "),
        ],
    )
    def test_base_that_is_not_yaml_is_an_error(self, tmp_path: Path, content: str, message: str) -> None:
        (tmp_path / "common.yaml").write_text(content)
        [found] = errors(tmp_path, "base: common.yaml\n")
        assert found.startswith(message)

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
    def test_unreadable_base_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "common.yaml").write_text("model: m\n")
        (tmp_path / "common.yaml").chmod(0)
        assert errors(tmp_path, "base: common.yaml\n") == ["common.yaml:1:1: cannot be read: Permission denied"]

    def test_results_keep_the_study_file_and_its_base(
        self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results
    ) -> None:
        (pytester.path / "common.yaml").write_text("n: 2\n")
        path = write_study(base="common.yaml", n=None, sweep=None, execution={"n_cycles": 1})
        pytester.runpytest_inprocess(path, "-p", "llem").assert_outcomes(passed=1)
        assert (results.directory / "study.yaml").read_text() == path.read_text()
        assert (results.directory / "study.base.yaml").read_text() == "n: 2\n"


class TestRunners:
    def test_runner_local_is_the_default(self, tmp_path: Path) -> None:
        assert load(tmp_path, "model: m\nrunners: {pytorch: local, vllm: docker}").runners == {"vllm": "docker"}

    @pytest.mark.parametrize(
        ("runners", "message"),
        [
            ("local", "1: runners: must be a mapping of engines to runners (got 'local')"),
            ("{pytroch: local}", "11: runners.pytroch: no engine of that name (did you mean 'pytorch'?)"),
            (
                "{pytorch: 7}",
                "11: runners.pytorch: must be 'local' or the path of a Python interpreter (got 7)",
            ),
            (
                "{pytorch: }",
                "11: runners.pytorch: must be 'local' or the path of a Python interpreter (got nothing)",
            ),
            (
                "{pytorch: ''}",
                "11: runners.pytorch: must be 'local' or the path of a Python interpreter (got '')",
            ),
            ("{pytroch: /a/python}", "11: runners.pytroch: no engine of that name (did you mean 'pytorch'?)"),
            ("{model: /a/python}", f"11: runners.model: no engine of that name (there are: {ENGINES})"),
        ],
    )
    def test_invalid_runner_is_an_error(self, tmp_path: Path, runners: str, message: str) -> None:
        assert errors(tmp_path, f"model: m\nrunners: {runners}") == [f"study.yaml:2:{message}"]

    def test_runners_do_not_change_the_design(self, tmp_path: Path) -> None:
        plain = load(tmp_path, "model: m").design_hash
        for runner in ("docker", "/a/python"):
            assert load(tmp_path, f"model: m\nrunners: {{pytorch: {runner}}}").design_hash == plain

    @pytest.mark.parametrize(
        ("written", "path"),
        [
            ("/a/b/../python", "/a/b/../python"),
            ("env/bin/python", "{}/studies/env/bin/python"),
            ("../env/bin/python", "{}/studies/../env/bin/python"),
            ("python", "{}/studies/python"),
            ("~/env/bin/python", "/home/of/mine/env/bin/python"),
            ("~nobody-of-that-name/python", "{}/studies/~nobody-of-that-name/python"),
        ],
    )
    def test_an_interpreter_is_found_relative_to_the_study(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str, path: str
    ) -> None:
        (tmp_path / "studies").mkdir()
        monkeypatch.setenv("HOME", "/home/of/mine")
        monkeypatch.chdir(tmp_path)
        (tmp_path / "studies" / "study.yaml").write_text(f"model: m\nrunners: {{pytorch: '{written}'}}")
        study = load_study("studies/study.yaml")
        assert study.interpreter("pytorch") == Path(path.format(tmp_path))
        assert study.interpreter("vllm") is None

    def test_link_to_an_interpreter_is_not_followed(self, tmp_path: Path) -> None:
        """The interpreter of a virtual environment is a link to the base interpreter."""
        (tmp_path / "python").symlink_to("/bin/sh")
        study = load(tmp_path, "model: m\nrunners: {pytorch: python}")
        assert study.interpreter("pytorch") == tmp_path / "python"


class TestEnginesOfOtherEnvironments:
    TEXT = (
        "model: m\nbackend: {}\nmine: {{level: 3}}\nsweep: {{n: [1, 2], mine.depth.inner: [4, 5]}}\nrunners: {}\n"
    )

    @pytest.mark.parametrize("backend", ["mine", "[mine, pytorch]"])
    def test_engine_installed_only_in_its_runner_is_known(self, tmp_path: Path, backend: str) -> None:
        study = load(tmp_path, self.TEXT.format(backend, "{mine: /a/python}"))
        own = [point.config for point in study.points if point.config.backend == "mine"]
        assert [(one.n, one.engine_section) for one in own] == [
            (n, {"level": 3, "depth": {"inner": inner}}) for n in (1, 2) for inner in (4, 5)
        ]

    def test_engine_of_a_listed_experiment_is_known_by_its_runner(self, tmp_path: Path) -> None:
        text = "model: m\nexperiments: [{backend: mine, mine: {a: 1}}, {n: 3}]\nrunners: {mine: env/bin/python}\n"
        assert [point.config.backend for point in load(tmp_path, text).points] == ["mine", "pytorch"]

    @pytest.mark.parametrize("runner", ["local", "docker", "docker:image", "''", "7", "[a]"])
    def test_unknown_engine_without_a_python_runner_is_an_error(self, tmp_path: Path, runner: str) -> None:
        lines = errors(tmp_path, self.TEXT.format("mine", f"{{mine: {runner}}}"))
        assert f"study.yaml:2:1: backend: no engine of that name (got 'mine'; there are: {ENGINES})" in lines

    @pytest.mark.parametrize("name", ["precision", "sweep", "runners", "''"])
    def test_keys_of_the_grammar_cannot_be_engines(self, tmp_path: Path, name: str) -> None:
        lines = errors(tmp_path, f"model: m\nbackend: {name}\nrunners: {{{name}: /a/python}}\n")
        given = name.strip("'")
        assert lines == [
            f"study.yaml:2:1: backend: no engine of that name (got '{given}'; there are: {ENGINES})",
            f"study.yaml:3:11: runners.{name}: no engine of that name (there are: {ENGINES})",
        ]


class TestEngines:
    def test_engines_of_the_grammar_need_not_be_installed(self, tmp_path: Path) -> None:
        text = (
            "model: m\nbackend: [pytorch, vllm, tensorrt]\nsweep:\n  precision: [bf16, fp16]\n"
            "  pytorch.batch_size: [1, 8]\n  vllm.engine.block_size: [16, 32]\n  vllm.sampling.best_of: [2]\n"
        )
        configs = [point.config for point in load(tmp_path, text).points]
        assert [one.backend for one in configs] == ["pytorch"] * 4 + ["vllm"] * 4 + ["tensorrt"] * 2
        of_vllm = [one.vllm for one in configs if one.backend == "vllm"]
        assert [(one.engine, one.sampling) for one in of_vllm if one] == [
            ({"block_size": size}, {"best_of": 2}) for _ in range(2) for size in (16, 32)
        ]

    def test_user_defined_class_is_an_engine(self, tmp_path: Path) -> None:
        text = (
            "model: m\nbackend: [pytorch, my.engines:Fast]\nmy.engines:Fast: {level: 3}\n"
            "sweep: {n: [1, 2], my.engines:Fast.depth.inner: [4, 5]}\n"
        )
        study = load(tmp_path, text)
        own = [point.config for point in study.points if point.config.backend != "pytorch"]
        assert [(one.n, one.engine_section) for one in own] == [
            (n, {"level": 3, "depth": {"inner": inner}}) for n in (1, 2) for inner in (4, 5)
        ]
        assert [point.id for point in study.points][-1] == "backend=my.engines:Fast-n=2-inner=5"

    @pytest.mark.parametrize("name", ["my.engines", ":Fast", "my.engines:", "my engines:Fast", "a:b:c", "1a:B"])
    def test_malformed_class_name_is_an_error(self, tmp_path: Path, name: str) -> None:
        [message] = errors(tmp_path, f"model: m\nbackend: '{name}'\n")
        assert message.startswith(
            f"study.yaml:2:1: backend: no engine of that name (got '{name}'; there are: pytorch, "
        )

    def test_misspelt_engine_gets_a_suggestion(self, tmp_path: Path) -> None:
        [message] = errors(tmp_path, "model: m\nbackend: pytroch\n")
        assert message.startswith(
            "study.yaml:2:1: backend: no engine of that name (did you mean 'pytorch'?) (got 'pyt"
        )

    @pytest.mark.parametrize("meter", ["zeus", "codecarbon"])
    def test_former_meters_are_read_as_auto_with_a_note(self, tmp_path: Path, meter: str) -> None:
        study = load(tmp_path, f"model: m\nenergy: {{backend: {meter}}}\nsweep: {{n: [1, 2]}}\n")
        assert {point.config.energy.backend for point in study.points} == {"auto"}
        assert notes(tmp_path, study) == [
            f"study.yaml:2:10: energy.backend: '{meter}' is read as 'auto': the best meter available"
        ]


#: Two lines. 8 divides n, so that there is no note on a smaller last batch.
STUDY = "<<: {model: m, n: 96}\nsweep: {precision: [bf16, fp32], pytorch.batch_size: [1, 8]}\n"


class TestRules:
    @pytest.mark.parametrize("kind", ["skip", "xfail"])
    @pytest.mark.parametrize(
        ("where", "fitting"),
        [
            ("{precision: fp32}", [2, 3]),
            ("{batch_size: 8}", [1, 3]),
            ("{pytorch.batch_size: 8.0}", [1, 3]),
            ("{precision: fp32, batch_size: 1}", [2]),
            ("{precision: [bf16, fp32], batch_size: [8, 9]}", [1, 3]),
            ("{model: m}", [0, 1, 2, 3]),
            ("{decoder.do_sample: true}", [0, 1, 2, 3]),
            ("{decoder.do_sample: 1}", []),
            ("{batch_size: 80}", []),
            ("{pytorch: {batch_size: 8}, precision: bf16}", [1]),
            ("{decoder: {temperature: 1}}", [0, 1, 2, 3]),
        ],
    )
    def test_rules_match_by_axis_or_field(self, tmp_path: Path, kind: str, where: str, fitting: list[Any]) -> None:
        study = load(tmp_path, f"{STUDY}{kind}: [{{where: {where}, reason: because}}]\n")
        reasons = [getattr(point, kind) for point in study.points]
        assert [index for index, reason in enumerate(reasons) if reason == "because"] == fitting
        assert set(reasons) <= {None, "because"}
        expected = (
            [] if fitting else [f"study.yaml:3:{len(kind) + 5}: {kind}[0].where: matches no point of this study"]
        )
        assert notes(tmp_path, study) == expected

    def test_default_reason_is_the_where_of_the_rule(self, tmp_path: Path) -> None:
        study = load(tmp_path, f"{STUDY}skip: [{{where: {{precision: fp32, batch_size: 8}}}}]\n")
        assert study.points[3].skip == 'precision: "fp32", batch_size: 8'

    def test_rules_do_not_change_the_design(self, tmp_path: Path) -> None:
        plain = load(tmp_path, STUDY).design_hash
        assert load(tmp_path, f"{STUDY}xfail: [{{where: {{precision: fp32}}}}]\n").design_hash == plain

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            ("skip: fp32", "1: skip: must be a list of {where, reason} (got 'fp32')"),
            ("skip: [fp32]", "8: skip[0]: must be a mapping (got 'fp32')"),
            ("skip: [{}]", "8: skip[0].where: is required"),
            ("skip: [{where: {}}]", "9: skip[0].where: must not be empty (got {})"),
            ("skip: [{where: 7}]", "9: skip[0].where: must be a mapping (got 7)"),
            ("skip: [{wher: {}, where: {n: 1}}]", "9: skip[0].wher: unknown key (did you mean 'where'?)"),
            (
                "xfail: [{where: {n: 1}, reason: 7}]",
                "25: xfail[0].reason: must be a string (got 7); put it in quotes",
            ),
            (
                "skip: [{where: {precison: fp32}}]",
                "17: skip[0].where.precison: is neither an axis nor a field (did you mean",
            ),
            ("skip: [{where: {decoder: {x: 1}}}]", "17: skip[0].where.decoder.x: is neither an axis nor a field"),
            ("skip: [{where: {pytorch: 1}}]", "17: skip[0].where.pytorch: is neither an axis nor a field"),
            (
                "skip: [{precision: fp32}]",
                "9: skip[0].precision: unknown key: select points under where, as in where: {precision: ...}",
            ),
            ("skip: [{where: {decoder.x: 1}}]", "17: skip[0].where.decoder.x: is neither an axis nor a field"),
        ],
    )
    def test_invalid_rule_is_an_error(self, tmp_path: Path, rule: str, message: str) -> None:
        [found] = errors(tmp_path, f"{STUDY}{rule}\n")
        assert found.startswith(f"study.yaml:3:{message}")

    @pytest.mark.parametrize("workers", [[], slow(["-n", "2"])], ids=["serial", "xdist"])
    def test_pytest_skips_and_expects_failures(
        self, pytester: pytest.Pytester, write_study: WriteStudy, results: Results, workers: list[str]
    ) -> None:
        write_study(
            sweep={"noop.fault": ["raise", "none", "exit", "garbage"]},
            execution={"n_cycles": 1, "cycle_order": "sequential", "start_method": "forkserver"},
            skip=[{"where": {"fault": "exit"}, "reason": "no way"}],
            xfail=[{"where": {"fault": ["raise", "garbage"]}, "reason": "not yet"}],
        )
        result = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "-rxXs", *workers)
        result.assert_outcomes(passed=1, skipped=1, xfailed=1, xpassed=1)
        result.stdout.fnmatch_lines_random(
            [
                "SKIPPED [[]1[]] *: no way",
                "XFAIL study.yaml::experiment[[]fault=raise[]] - not yet",
                "XPASS study.yaml::experiment[[]fault=garbage[]] - not yet",
            ]
        )
        assert results.statuses() == {
            "fault=raise": "skipped",
            "fault=none": "completed",
            "fault=exit": "skipped",
            "fault=garbage": "completed",
        }
        manifest = results.manifest
        assert (manifest["status"], manifest["skipped"], manifest["failed"]) == ("completed", 2, 0)
        entries = {entry["experiment_id"]: entry for entry in manifest["experiments"]}
        assert entries["fault=exit"]["reason"] == "no way"
        assert entries["fault=raise"]["reason"] == "xfail: not yet"
        assert entries["fault=raise"]["error"]["message"] == "the engine says no"  # the error is kept
        assert entries["fault=none"]["reason"] is None


class TestWithoutEffect:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "decoder: {do_sample: false, top_k: 7}",
                "2:29: decoder.top_k: has no effect: the likeliest token ",
            ),
            (
                "decoder: {temperature: 0, min_p: 0.1}",
                "2:27: decoder.min_p: has no effect: the likeliest token ",
            ),
            (
                "decoder: {preset: deterministic}\nsweep: {decoder.temperature: [0.5, 0.8]}",
                "3:31: decoder.temperature: has no effect: the likeliest token is taken, nothing is sampled",
            ),
            (
                "decoder: {min_new_tokens: 3}",
                "2:11: decoder.min_new_tokens: has no effect with measurement.len",
            ),
            (
                "pytorch: {length_penalty: 2}",
                "2:11: pytorch.length_penalty: has no effect without num_beams ",
            ),
            (
                "pytorch: {early_stopping: true}",
                "2:11: pytorch.early_stopping: has no effect without num_beams above",
            ),
            ("dataset_order: grouped", "2:1: dataset_order: has no effect on synthetic prompts"),
        ],
    )
    def test_a_field_without_effect_is_noted(self, tmp_path: Path, text: str, message: str) -> None:
        [first, *_] = notes(tmp_path, load(tmp_path, f"model: m\n{text}\n"))
        assert first.startswith(f"study.yaml:{message}")

    @pytest.mark.parametrize(
        "text",
        [
            "decoder: {do_sample: false, temperature: 1.0}",
            "decoder: {temperature: 0}",
            "decoder: {preset: deterministic}",
            "decoder: {preset: factual}",
            "pytorch: {num_beams: 2, length_penalty: 2}",
            "decoder: {min_new_tokens: 3}\nmeasurement: {length_mode: natural}",
            "dataset: x.jsonl\ndataset_order: grouped",
        ],
    )
    def test_a_field_with_effect_is_not_noted(self, tmp_path: Path, text: str) -> None:
        assert notes(tmp_path, load(tmp_path, f"model: m\n{text}\n")) == []
