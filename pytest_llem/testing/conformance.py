"""The checks of the conformance suite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, get_args

import psutil
import pytest

from pytest_llem.execution.session_facts import import_path
from pytest_llem.hardware.gpus import visible_gpus
from pytest_llem.isolation.engine_probe import ConfigQuestion, EngineAnswer, probe_engines
from pytest_llem.machine.gpu_memory import GpuMemory
from pytest_llem.measurement import observed_engine
from pytest_llem.measurement.observed_engine import FAULT
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.study.config import Precision
from pytest_llem.testing.experiments import (
    PAGE,
    Experiments,
    Run,
    RunExperiment,
    digest,
    fail,
    fail_if_alive,
    fail_if_reported,
    first_line,
    input_tokens,
    require_refusal,
    skip_if_refused,
)

#: Time of a window that has several passes of a fast engine, in s.
_PASSES_SECONDS = 0.05

_MB = 1_000_000

#: Fields of a ModelShape that have to be greater than 0.
_POSITIVE = (
    "parameters",
    "head_parameters",
    "attention_width",
    "kv_values_per_token",
    "kv_bytes_per_value",
    "weight_bytes",
)

_EXPERIMENTS = pytest.StashKey[Experiments]()


class EngineConformance:
    """Tests of an engine. A subclass whose name begins with ``Test`` names the engine and a minimal experiment.

    Every experiment runs in a fresh process, as in a study, with a few prompts and tokens and, in most checks, a
    window of one pass. A check that does not apply to the engine is skipped, with the reason.

    Example:
        >>> class TestBigram(EngineConformance):
        ...     experiment = {
        ...         "model": "none",
        ...         "backend": "my_engine:BigramEngine",
        ...         "precision": "fp32",
        ...         "decoder": {"do_sample": False},
        ...     }

    Attributes:
        experiment: Fields of an experiment that the engine supports, at least ``model`` and ``backend``.
        batch_option: The engine's option for the number of prompts in a batch. Checks that need it are skipped if
            the engine has no such option.
        batch_invariant: Whether the same prompt has the same output in a batch of any size.
    """

    experiment: ClassVar[Mapping[str, Any]] = {}
    batch_option: ClassVar[str] = "batch_size"
    batch_invariant: ClassVar[bool] = False

    # ---- fixtures ----

    @pytest.fixture
    def experiments(
        self,
        request: pytest.FixtureRequest,
        isolated_experiment: RunExperiment,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Experiments:
        """The runner of the class's experiments, one for all tests of the class."""
        suite = request.node.getparent(pytest.Class)
        if not self.experiment:
            pytest.fail(f"{suite.name} needs the attribute experiment: see {PAGE}", pytrace=False)
        if _EXPERIMENTS not in suite.stash:
            folder = tmp_path_factory.mktemp("conformance")
            suite.stash[_EXPERIMENTS] = Experiments(isolated_experiment, self.experiment, folder)
        experiments: Experiments = suite.stash[_EXPERIMENTS]
        return experiments

    @pytest.fixture
    def engine_answer(self, experiments: Experiments, pytestconfig: pytest.Config) -> EngineAnswer:
        """The options and optional abilities that the engine states, from a process that has imported it."""
        if experiments.answer is None:
            asked = {experiments.backend: [ConfigQuestion(experiments.config())]}
            answers = probe_engines(None, asked, [str(folder) for folder in import_path(pytestconfig)])
            experiments.answer = answers.get(experiments.backend, EngineAnswer())
        return experiments.answer

    @pytest.fixture
    def batches(self, engine_answer: EngineAnswer, experiments: Experiments) -> Callable[[int], dict[str, Any]]:
        """Returns changes that make batches of a given size; no changes if the engine has no such option."""
        if self.batch_option not in _properties(engine_answer):
            return lambda size: {}
        return lambda size: {experiments.backend: {self.batch_option: size}}

    @pytest.fixture
    def pairs(self, experiments: Experiments, batches: Callable[[int], dict[str, Any]]) -> Run:
        """The minimal experiment with batches of two prompts, the last of one."""
        return experiments(**batches(2))

    # ---- records ----

    def test_experiment_completes(self, experiments: Experiments) -> None:
        run = experiments()
        if run.error is not None and run.reported_by is None:
            phase = run.error.phase or "checking it before the run"
            fail(f"the minimal experiment failed while {phase} ({first_line(run.error)})", "experiments")

    @pytest.mark.parametrize("tokens", [1, 5])
    def test_number_of_output_tokens_is_exact(self, experiments: Experiments, pairs: Run, tokens: int) -> None:
        runs = [experiments(max_output_tokens=tokens), *([pairs] if tokens > 1 else [])]
        for run in runs:
            fail_if_reported(
                run, "test_number_of_output_tokens_is_exact", "length_mode: fixed asks for that number"
            )
            if run.require_result(run.reported_by).tokens.output_tokens is None:
                pytest.skip("the engine does not report the number of output tokens")

    def test_records_are_one_for_each_prompt_in_order(self, experiments: Experiments, pairs: Run) -> None:
        for run in (experiments(), pairs):
            check = "test_records_are_one_for_each_prompt_in_order"
            fail_if_reported(run, check, "requests has to return one for each prompt of the batch")
            lengths, reported = input_tokens(run)
            if reported != lengths and Counter(reported) == Counter(lengths):
                fail(
                    f"requests returned the records of prompts of {lengths} tokens in the order {reported}, and "
                    "has to keep the order of the prompts",
                    "records",
                )

    def test_input_tokens_are_those_of_the_prompt(self, experiments: Experiments, pairs: Run) -> None:
        for run in (experiments(), pairs):
            lengths, reported = input_tokens(run)
            if None in reported:
                pytest.skip("the engine does not report input tokens")
            if len(reported) == len(lengths) and Counter(reported) != Counter(lengths):
                fail(
                    f"the records of prompts of {lengths} tokens report {reported} input tokens, and have to "
                    "report the prompts' tokens without padding",
                    "records",
                )
            if reported == lengths:
                check = "test_input_tokens_are_those_of_the_prompt"
                fail_if_reported(run, check, "positions has to count each token of a batch, and padding")

    def test_times_are_in_order_and_within_the_window(self, experiments: Experiments, pairs: Run) -> None:
        for run in (experiments(), pairs):
            check = "test_times_are_in_order_and_within_the_window"
            fail_if_reported(run, check, "times have to be from time.monotonic, one for each token")
            metric = run.require_result(run.reported_by).metrics["e2e_p50_ms"]
            if metric.value is None:
                pytest.skip(f"there are no times to check: {metric.reason}")

    # ---- seeds ----

    def test_every_pass_gives_the_same_output(self, experiments: Experiments) -> None:
        result = experiments(measurement={"min_window_seconds": _PASSES_SECONDS}).require_result()
        if result.tokens.deterministic is None:
            pytest.skip("the window has one pass, or the engine does not return its output")
        if not result.tokens.deterministic:
            fail(
                "passes with the same seed gave different outputs, and seed, which is called at the start of "
                "each pass, has to reset every random number generator",
                "seeds",
            )

    def test_same_seed_gives_the_same_output_in_another_process(self, experiments: Experiments) -> None:
        first = digest(experiments())
        if first != digest(experiments(measurement={"min_window_seconds": _PASSES_SECONDS})):
            fail(
                "two processes with the same random_seed gave different outputs, and the output has to follow "
                "from model, prompts and seed",
                "seeds",
            )

    def test_sampling_is_honoured_or_refused(self, experiments: Experiments) -> None:
        """Another seed gives another output."""
        sampling = {"do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 1.0}
        run = experiments(decoder=sampling, max_output_tokens=16)
        skip_if_refused(run, "sampling")
        if _is_adjusted(run.require_result(), "decoder", "random_seed"):
            return
        if digest(run) == digest(
            experiments(decoder=sampling, max_output_tokens=16, random_seed=experiments.other_seed)
        ):
            fail(
                "with do_sample: true and temperature 2 the engine gave the same output for two seeds, and has "
                "to sample with the seed, to refuse sampling, or to report decoder as adjusted in describe",
                "settings",
            )

    def test_greedy_decoding_is_honoured_or_refused(self, experiments: Experiments) -> None:
        """The seed has no effect on the output."""
        greedy = {"do_sample": False}
        run = experiments(decoder=greedy)
        skip_if_refused(run, "greedy decoding")
        if _is_adjusted(run.require_result(), "decoder"):
            return
        if digest(run) != digest(experiments(decoder=greedy, random_seed=experiments.other_seed)):
            fail(
                "with do_sample: false the engine gave different outputs for two seeds, and has to take the "
                "likeliest token, to refuse greedy decoding, or to report decoder as adjusted in describe",
                "settings",
            )

    def test_output_does_not_depend_on_the_batch_size(
        self, experiments: Experiments, batches: Callable[[int], dict[str, Any]], pairs: Run
    ) -> None:
        if not self.batch_invariant:
            pytest.skip("the suite does not state batch_invariant = True")
        if not batches(2):
            pytest.skip(f"the engine has no option {self.batch_option!r}")
        if digest(experiments(**batches(1))) != digest(pairs, pairs.reported_by):
            fail(
                "batches of 1 and of 2 prompts gave different outputs, and the suite states batch_invariant",
                "seeds",
            )

    # ---- settings ----

    def test_texts_are_encoded(self, experiments: Experiments) -> None:
        run = experiments(**experiments.of_texts())
        if run.refusal is not None and not run.notes:
            pytest.skip(f"the engine takes no texts of a limited number of tokens: {run.refusal}")
        encoded = [*run.noted("encode")]
        refused = next((note["refused"] for note in encoded if "refused" in note), None)
        if refused is not None and run.refusal is not None:
            pytest.skip(f"the engine takes no texts: {run.refusal}")
        if refused is not None:
            fail(f"encode raised {refused}, and has to raise PreflightError if the engine takes no texts", "texts")
        if [] in [note["ids"] for note in encoded]:
            fail("encode returned no token ids for a text of several words, and has to return them", "texts")
        if any(note["ids"] != note["again"] for note in encoded):
            fail("encode returned different token ids for the same text, and has to return the same", "texts")
        run.require_result()

    def test_unknown_option_is_refused_before_load(self, experiments: Experiments) -> None:
        name = "no_such_option"
        run = experiments.directly(**{experiments.backend: {name: 1}})
        require_refusal(run, f"the option {name}: 1, which the engine does not have")

    def test_wrong_value_of_an_option_is_refused_before_load(
        self, experiments: Experiments, engine_answer: EngineAnswer
    ) -> None:
        properties = _properties(engine_answer)
        typed = [name for name, schema in properties.items() if not _takes_mapping(schema)]
        if not typed:
            pytest.skip("the engine has no option whose type is stated")
        name = self.batch_option if self.batch_option in typed else typed[0]
        wrong = {"not": "a value"}
        run = experiments.directly(**{experiments.backend: {name: wrong}})
        require_refusal(run, f"the option {name}: {wrong}, which has a wrong type")

    @pytest.mark.parametrize("precision", get_args(Precision))
    def test_precision_is_honoured_or_refused(self, experiments: Experiments, precision: str) -> None:
        first, run = experiments(), experiments(precision=precision)
        skip_if_refused(run, precision)
        known, other = first.require_result(), run.require_result()
        if _is_adjusted(other, "precision") or "dtype" in other.engine.settings:
            return  # the measurement compares settings["dtype"] with precision
        sizes = [one.metrics["model_memory_mb"].value for one in (known, other)]
        if None in sizes:
            pytest.skip("the engine reports neither settings['dtype'] nor the model's memory")
        given = known.effective_config["precision"]
        if "fp32" in (given, precision) and given != precision and sizes[0] == sizes[1]:
            fail(
                f"the model is as large with precision {precision} as with {given} ({sizes[0]:g} MB), and the "
                "engine has to honour precision, to refuse it, or to report it as adjusted in describe",
                "settings",
            )

    def test_natural_length_is_honoured_or_refused(self, experiments: Experiments) -> None:
        run = experiments(measurement={"length_mode": "natural"})
        skip_if_refused(run, "length_mode: natural")
        if run.error is not None and (run.reported_by or "").startswith("test_number"):
            fail(
                f"with length_mode: natural {run.error.message}, and has to end at max_output_tokens or before",
                "settings",
            )
        run.require_result()

    def test_chat_format_is_honoured_or_refused(self, experiments: Experiments) -> None:
        raw = experiments(**experiments.of_texts())
        skip_if_refused(raw, "texts")
        chat = experiments(**experiments.of_texts(prompt_format="chat"))
        skip_if_refused(chat, "prompt_format: chat")
        raw.require_result("test_texts_are_encoded")
        if _is_adjusted(chat.require_result(), "prompt_format"):
            return
        ids = [[note.get("ids") for note in run.noted("encode")] for run in (raw, chat)]
        if ids[0] == ids[1]:
            fail(
                "encode returned the same token ids for prompt_format raw and chat, and has to add the chat "
                "template, to refuse chat, or to report prompt_format as adjusted in describe",
                "settings",
            )

    # ---- failures ----

    @pytest.mark.parametrize("method", ["fetch", "load", "generate"])
    def test_close_works_after_a_failure(self, experiments: Experiments, method: str) -> None:
        experiments().require_result()
        run = experiments(fault=method)
        for note in run.noted("close"):
            if note["error"] is not None:
                fail(
                    f"close raised {note['error'].splitlines()[0]} after {method} had failed, and has to release "
                    "what there is, so that the first error is reported",
                    "close",
                )
        error = run.error
        if error is None or (error.type, error.message) != ("RuntimeError", FAULT.format(method)):
            ended = "a result" if error is None else first_line(error)
            fail(f"{method} failed and the experiment ended with {ended}, and has to report that error", "close")

    # ---- processes and memory ----

    @pytest.mark.parametrize("fault", [None, "generate"], ids=["success", "exception"])
    def test_close_ends_all_processes(self, experiments: Experiments, fault: str | None) -> None:
        experiments().require_result()
        run = experiments(fault=fault)
        left = [name for note in run.noted("close") for name in note["left"]]
        if left:
            fail(
                f"{', '.join(left)} still ran {observed_engine.END_SECONDS:g} s after close, which has to end "
                "every process that the engine started",
                "processes",
            )
        fail_if_alive(run)

    def test_no_process_is_left_after_sigkill(self, experiments: Experiments) -> None:
        experiments().require_result()
        run = experiments(fault="kill")
        if run.error is None or (run.error.kind, run.error.type) != ("crash", "SIGKILL"):
            ended = "a result" if run.error is None else first_line(run.error)
            fail(f"the process was killed in generate and the experiment ended with {ended}", "processes")
        fail_if_alive(run)

    def test_host_memory_is_released(self, experiments: Experiments) -> None:
        run = experiments()
        run.require_result()
        files = [name for note in run.noted("processes") for name in note["files"] if Path(name).exists()]
        if files:
            size = sum(Path(name).stat().st_size for name in files) / _MB
            fail(
                f"the engine left {', '.join(files)} ({size:.3g} MB) in shared memory, and close has to remove "
                "what the engine created there",
                "memory",
            )

    def test_gpu_memory_is_released(self, experiments: Experiments) -> None:
        experiments().require_result()
        gpus = {uuid for note in experiments().noted("load") for uuid in note["gpus"]}
        if not gpus:
            pytest.skip("the engine uses no GPU")
        memory = GpuMemory()
        before = memory.settle(gpus, {}).used
        if not before:
            pytest.skip("NVML does not report the memory in use")
        experiments.fresh()
        left = memory.settle(gpus, before).left_mb
        if left:
            shown = ", ".join(f"{size:g} MB on {uuid}" for uuid, size in left.items())
            fail(f"{shown} is still in use 30 s after the experiment, and has to be free", "memory")

    # ---- optional abilities, and devices ----

    def test_prefill_only_generates_one_token(self, experiments: Experiments, engine_answer: EngineAnswer) -> None:
        if "prefill_only" not in (engine_answer.supports or ()):
            pytest.skip("the engine has no generate_first")
        experiments().require_result()
        run = experiments.directly(measurement={"prefill_split": True})
        if run.error is not None:
            fail(
                f"measurement.prefill_split failed ({first_line(run.error)}), and generate_first has "
                "to generate one token for each prompt",
                "abilities",
            )

    def test_model_shape_is_plausible(self, experiments: Experiments) -> None:
        experiments().require_result()
        note = _memory(experiments())
        if "shape" not in note:
            pytest.skip(f"the engine reports no shape: {note.get('shape_unknown', 'it has no method shape')}")
        shape, weights = note["shape"], note["weights"]
        wrong = [name for name in _POSITIVE if shape[name] <= 0]
        if wrong:
            fail(f"shape returned {wrong[0]} {shape[wrong[0]]}, which has to be greater than 0", "abilities")
        if weights is not None and shape["weight_bytes"] > weights:
            fail(
                f"shape returned weight_bytes {shape['weight_bytes']:,}, and model_memory_bytes, which has to be "
                f"at least that, is {weights:,}",
                "abilities",
            )

    def test_cache_memory_is_plausible(self, experiments: Experiments) -> None:
        experiments().require_result()
        note = _memory(experiments())
        if "cache" not in note:
            pytest.skip("the engine has no method cache_memory")
        allocated, used = note["cache"]["allocated_bytes"], note["cache"]["used_bytes"]
        if used is not None and not 0 <= used <= allocated:
            fail(
                f"cache_memory returned used_bytes {used:,}, which has to be at most allocated_bytes "
                f"{allocated:,}",
                "abilities",
            )
        gpus = {uuid for load in experiments().noted("load") for uuid in load["gpus"]}
        sizes = [gpu.memory_bytes or 0 for gpu in visible_gpus().all if gpu.uuid in gpus]
        available = sum(sizes) if gpus else psutil.virtual_memory().total
        if available and allocated > available:
            fail(
                f"cache_memory returned allocated_bytes {allocated:,}, which has to be at most the memory of its "
                f"devices, {available:,}",
                "abilities",
            )

    def test_reported_gpus_are_leased(self, experiments: Experiments) -> None:
        run = experiments()
        gpus = {uuid for call in ("new", "load") for note in run.noted(call) for uuid in note["gpus"]}
        if not gpus:
            run.require_result()
            pytest.skip("the engine uses no GPU")
        others = gpus - {gpu.uuid for gpu in visible_gpus().all}
        not_leased = run.error is not None and "reports GPUs that are not leased" in run.error.message
        if others or not_leased:
            named = ", ".join(sorted(others or gpus))
            fail(
                f"gpus holds {named}, which were not leased for the experiment, and has to hold UUIDs of the "
                "GPUs of CUDA_VISIBLE_DEVICES only",
                "devices",
            )


def _is_adjusted(result: ExperimentResult, *settings: str) -> bool:
    """Return whether the engine says that one of *settings* did not run as given."""
    return any(one.setting.partition(".")[0] in settings for one in result.adjusted)


def _memory(run: Run) -> Mapping[str, Any]:
    return next(run.noted("memory"), {})


def _properties(answer: EngineAnswer) -> Mapping[str, Any]:
    """Return the JSON Schema of each of an engine's options."""
    found: Mapping[str, Any] = (answer.options or {}).get("properties", {})
    return found


def _takes_mapping(schema: Mapping[str, Any]) -> bool:
    """Return whether an option may be a mapping, as far as its JSON Schema says."""
    kinds = schema.get("anyOf", [schema])
    return not all(kind.get("type") in ("integer", "number", "boolean", "string", "null") for kind in kinds)
