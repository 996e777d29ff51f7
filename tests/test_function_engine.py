"""A function of the user's as an engine: ``backend: package.module:function``."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import Field

from pytest_llem import ExperimentConfig, StudyResult, run_experiment
from pytest_llem.engines.function import (
    SYNTHETIC_IDS,
    TEXT_TOKENS_UNKNOWN,
    FunctionEngine,
    is_function,
    load_engine,
)
from pytest_llem.engines.options import given_fields, needs_of_class, option_problems
from pytest_llem.engines.protocol import EngineContext, PreflightError
from pytest_llem.measurement.engine_imports import preload
from pytest_llem.results.experiment import ExperimentResult
from tests.conftest import Results, RunPytest
from tests.support.environments import ROOT, SITE_PACKAGES, Environment
from tests.support.narrow import not_none
from tests.support.pages import blocks, files, page

FIELDS: dict[str, Any] = {
    "n": 2,
    "warmup": {"enabled": False},
    "baseline": {"enabled": False},
    "energy": {"backend": "estimate"},
    "measurement": {"min_window_seconds": 0},
}
TEXTS = ["one two three", "four five six"]

calls: list[Any] = []


# ---- functions under test ----


def returns_text(prompt):  # type: ignore[no-untyped-def]
    calls.append(prompt)
    return prompt.upper()


def yields_text(prompt: str) -> Iterator[str]:
    for word in prompt.split():
        time.sleep(0.002)
        yield word


def returns_ids(prompt: list[int]) -> list[int]:
    return prompt[:2]


def yields_ids(prompt: Sequence[int]) -> Iterator[int]:
    for token in prompt[:3]:
        time.sleep(0.002)
        yield token


def returns_all(prompts):  # type: ignore[no-untyped-def]
    calls.append(prompts)
    return [list(one) for one in prompts]


def yields_all(prompts: list[list[int]]) -> Iterator[list[int]]:
    for prompt in prompts:
        time.sleep(0.005)
        yield prompt


def yields_streams(prompts: list[list[int]]) -> Iterator[Iterator[int]]:
    return (iter(prompt) for prompt in prompts)


class Array:
    """The part of a tensor or array that counts."""

    def __init__(self, values: Any) -> None:
        self._values = values

    def tolist(self) -> Any:
        return self._values


def yields_arrays(prompt: list[int]) -> Iterator[Array]:
    return (Array(token) for token in prompt)


def returns_arrays(prompts: list[list[int]]) -> list[Array]:
    return [Array(prompt) for prompt in prompts]


def returns_empty_text(prompt: str) -> str:
    return ""


def yields_halves(prompt: str) -> Iterator[str]:
    yield from ("\ud83d", "\ude00", "x", "\ud83d")


def yields_nothing(prompt: list[int]) -> Iterator[int]:
    return iter(())


def returns_bytes(prompt: str) -> bytes:
    return b"ab"


def returns_mapping(prompts: list[str]) -> dict[str, str]:
    return {prompt: prompt for prompt in prompts}


def returns_none(prompt):  # type: ignore[no-untyped-def]
    return None


def yields_both(prompt: str) -> Iterator[Any]:
    yield "one"
    yield 2


def returns_matrix(prompt: list[int]) -> Array:
    return Array([prompt])


def returns_list_of_text(prompt: str) -> list[str]:
    return [prompt]


def returns_one_too_few(prompts: list[list[int]]) -> list[list[int]]:
    return prompts[1:]


def returns_one_text(prompts: list[str]) -> str:
    return "all in one"


def takes_options(  # type: ignore[no-untyped-def]
    prompt: list[int],
    batch_size: int = 1,
    mode: Literal["fast", "slow"] = "fast",
    share: Annotated[float, Field(gt=0, le=1)] = 0.5,
    pair: tuple[int, int] = (1, 2),
    anything=None,
    dtype: str = "float32",
    unknown: types.ModuleType | None = None,
    copy: str = "a name that pydantic's models have",
) -> list[int]:
    calls.append((batch_size, mode, share, pair, anything, copy))
    return prompt


def takes_any_option(prompt: list[int], **options: Any) -> list[int]:
    calls.append(options)
    return prompt


def needs_option(prompt: list[int], *, level: int) -> list[int]:
    return prompt


def takes_study_fields(
    prompt: list[int],
    model: str,
    precision: str,
    max_output_tokens: int,
    random_seed: int,
    decoder: dict[str, Any],
) -> list[int]:
    calls.append((model, precision, max_output_tokens, random_seed, decoder))
    return prompt[:max_output_tokens]


def changes_its_arguments(prompt: list[int], decoder: dict[str, Any]) -> list[int]:
    calls.append((len(prompt), decoder.pop("top_k", None)))
    prompt.append(1)
    return prompt[-1:]


def changes_all_prompts(prompts: list[list[int]], decoder: dict[str, Any]) -> list[list[int]]:
    return [changes_its_arguments(prompts.pop(), decoder) for _ in range(len(prompts))]


def has_model(prompt: list[int], model: str = "of the function") -> list[int]:
    calls.append(model)
    return prompt


def without_prompt(question: str) -> str:
    return question


def without_parameter() -> str:
    return ""


def with_positional(prompt: str, level: int, /) -> str:
    return prompt


async def waits(prompt: str) -> str:
    return prompt


def measure(
    function: Callable[..., Any], changes: dict[str, Any] | None = None, *, texts: bool = False
) -> ExperimentResult:
    """Run an experiment of a function of this module in this process."""
    calls.clear()
    dataset: dict[str, Any] = {"dataset": "prompts.txt"} if texts else {"max_input_tokens": 4}
    return run_experiment({**FIELDS, **dataset, "backend": name_of(function), **(changes or {})})


def name_of(function: Callable[..., Any]) -> str:
    return f"{__name__}:{function.__name__}"


@pytest.fixture(autouse=True)
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of prompts in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("\n".join(TEXTS) + "\n")


# ---- prompts ----


def test_prompt_is_called_for_each_and_prompts_once_for_all() -> None:
    measure(returns_text, texts=True)
    assert calls == TEXTS
    measure(returns_all)
    (ids,) = calls
    assert [len(one) for one in ids] == [4, 4]
    assert {token for one in ids for token in one} <= {*SYNTHETIC_IDS}


@pytest.mark.parametrize(("function", "options"), [(changes_its_arguments, {5}), (changes_all_prompts, {5, None})])
def test_function_that_changes_its_arguments_gets_the_same_again(
    function: Callable[..., Any], options: set[int | None]
) -> None:
    result = measure(function, {"decoder": {"top_k": 5}, "measurement": {"min_window_seconds": 0.01}})
    assert len(calls) > 4, "several passes of two prompts"
    assert set(calls) == {(4, option) for option in options}
    assert result.metrics["input_tokens"].value == 8


def test_warm_up_prompts_are_other_words_of_the_same_length() -> None:
    measure(returns_text, {"warmup": {"n_warmup": 1, "convergence_detection": False}}, texts=True)
    warm_up, measured = calls[:-2], calls[-2:]
    assert measured == TEXTS
    assert warm_up
    assert not {*warm_up} & {*TEXTS}
    assert all(len(one.split()) == 3 and {*one.split()} <= {*" ".join(TEXTS).split()} for one in warm_up)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (without_prompt, "named prompt, to get one prompt in each call, or prompts, .* (got 'question')"),
        (without_parameter, "(it has none)"),
        (with_positional, "parameter 'level' must be one that can be given by name"),
        (waits, "an async function is not supported"),
    ],
)
def test_function_of_another_signature_is_refused(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(PreflightError) as refused:
        measure(function)
    assert str(refused.value).startswith(f"engine {name_of(function)!r} cannot be used: ")
    assert all(part in str(refused.value) for part in message.split(".*"))


@pytest.mark.parametrize(
    ("function", "texts", "message"),
    [
        (yields_text, False, "the function takes texts: give the study a dataset of texts"),
        (returns_one_text, False, "the function takes texts: "),
        (yields_ids, True, "the function takes token ids: leave dataset out"),
        (yields_all, True, "the function takes token ids: "),
    ],
)
def test_dataset_of_the_other_kind_is_refused(function: Callable[..., Any], texts: bool, message: str) -> None:
    with pytest.raises(PreflightError, match=message):
        measure(function, texts=texts)


# ---- outputs ----


def test_text_has_no_tokens_and_a_digest() -> None:
    result = measure(returns_text, texts=True)
    metrics = result.metrics
    for name in (
        "output_tokens",
        "output_tokens_per_second",
        "energy_per_output_token_j",
        "itl_p50_ms",
        "tpot_p50_ms",
    ):
        assert (metrics[name].value, metrics[name].reason) == (None, TEXT_TOKENS_UNKNOWN)
    for name in ("seconds", "energy_j", "energy_per_request_j", "requests_per_second", "e2e_p50_ms"):
        assert metrics[name].value is not None
    assert (metrics["ttft_p50_ms"].value, metrics["input_tokens"].value) == (None, None)
    assert result.tokens.output_digest == hashlib.sha256(";".join(TEXTS).upper().encode()).hexdigest()
    assert (result.tokens.output_tokens, result.tokens.batches, result.tokens.padding_waste) == (None, None, None)


def test_pieces_of_text_have_ttft_and_e2e_only() -> None:
    metrics = measure(yields_text, texts=True).metrics
    ttft, e2e = (not_none(metrics[name].value) for name in ("ttft_p50_ms", "e2e_p50_ms"))
    assert ttft >= 2
    assert ttft + 4 <= e2e
    assert metrics["itl_p50_ms"].reason == TEXT_TOKENS_UNKNOWN


def test_token_ids_are_counted_and_yielded_ones_have_times() -> None:
    metrics = measure(yields_ids).metrics
    assert metrics["output_tokens"].value == 6
    ttft, itl, e2e = (not_none(metrics[f"{name}_p50_ms"].value) for name in ("ttft", "itl", "e2e"))
    assert min(ttft, itl) >= 2
    assert e2e >= 6
    whole = measure(returns_ids).metrics
    assert whole["output_tokens"].value == 4
    assert whole["e2e_p50_ms"].value is not None
    assert "pieces that it yields have times" in not_none(whole["ttft_p50_ms"].reason)


def test_outputs_that_are_yielded_end_one_after_the_other() -> None:
    metrics = measure(yields_all, {"n": 20}).metrics
    first, last = (not_none(metrics[f"e2e_p{p}_ms"].value) for p in (50, 99))
    assert first + 20 <= last
    assert measure(yields_streams).metrics["itl_p50_ms"].value is not None


@pytest.mark.parametrize("function", [yields_arrays, returns_arrays])
def test_arrays_and_tensors_are_token_ids(function: Callable[..., Any]) -> None:
    result = measure(function)
    assert result.metrics["output_tokens"].value == 8
    assert result.tokens.output_digest == measure(returns_all).tokens.output_digest


def test_empty_text_is_a_failed_request() -> None:
    result = measure(returns_empty_text, texts=True)
    assert result.tokens.failed_requests == 2
    assert "the function returned an empty text" in not_none(result.metrics["seconds"].not_judged)


def test_text_with_half_a_character_is_measured() -> None:
    """JSON of a model's output may cut an emoji between its surrogates."""
    result = measure(yields_halves, texts=True)
    assert result.tokens.output_digest == hashlib.sha256(";".join(["\U0001f600x\ufffd"] * 2).encode()).hexdigest()


def test_output_of_no_piece_was_not_returned_whole() -> None:
    config = ExperimentConfig.model_validate({**FIELDS, "backend": name_of(yields_nothing)})
    function = load_engine(name_of(yields_nothing))(config, EngineContext())
    function.load()
    function.requests([[1]], function.generate([[1]]))
    assert function.latency_unknown_reason is None


@pytest.mark.parametrize(
    ("function", "texts", "message"),
    [
        (returns_bytes, True, "must return a text, a list of token ids, or .* (got b'ab')"),
        (returns_mapping, True, "must return a sequence with an output for each prompt (got {"),
        (returns_none, False, "must return a text, a list of token ids, or an iterator of either, .* (got null)"),
        (
            yields_both,
            True,
            "must return a text, a list of token ids, or .* (got ['one', 2])",
        ),
        (returns_matrix, False, "must return a text, a list of token ids, or .* (got [["),
        (returns_list_of_text, True, "must return a text, a list of token ids, or an iterator of either, "),
        (returns_one_too_few, False, "must return an output for each prompt (got 1 for 2 prompts)"),
        (returns_one_text, True, "must return a sequence with an output for each prompt (got 'all in one')"),
    ],
)
def test_wrong_output_is_one_clear_error(function: Callable[..., Any], texts: bool, message: str) -> None:
    with pytest.raises(PreflightError) as refused:
        measure(function, texts=texts)
    assert str(refused.value).startswith(f"function {name_of(function)!r} ")
    assert all(part in str(refused.value) for part in message.split(".*"))


# ---- options ----


def test_parameters_are_options_by_their_annotations() -> None:
    section = {
        "dtype": "float16",
        "batch_size": 8,
        "mode": "slow",
        "share": 1,
        "pair": [3, 4],
        "anything": {"a": [1]},
        "copy": "b",
    }
    result = measure(takes_options, {name_of(takes_options): section})
    assert calls[0] == (8, "slow", 1.0, (3, 4), {"a": [1]}, "b")
    assert result.engine.settings == {"arguments": section}
    assert (result.adjusted, result.tokens.batches) == ([], None)
    measure(takes_options)
    assert calls[0] == (1, "fast", 0.5, (1, 2), None, "a name that pydantic's models have")
    measure(takes_any_option, {name_of(takes_any_option): {"a": 1, "b": [2]}})
    assert calls[0] == {"a": 1, "b": [2]}


@pytest.mark.parametrize(
    ("function", "section", "message"),
    [
        (takes_options, {"batchsize": 8}, "batchsize: the engine has no such option (did you mean 'batch_size'?)"),
        (takes_options, {"batch_size": "8"}, "batch_size: must be a whole number (got '8')"),
        (takes_options, {"mode": "slo"}, "mode: must be one of 'fast' or 'slow' (got 'slo')"),
        (takes_options, {"share": 0}, "share: must be greater than 0 (got 0)"),
        (returns_ids, {"size": 1}, "size: the engine has no such option (there are: none)"),
        (needs_option, {}, "level: is required"),
        (has_model, {"model": "m"}, "model: the engine has no such option (there are: none)"),
    ],
)
def test_wrong_option_is_refused(function: Callable[..., Any], section: dict[str, Any], message: str) -> None:
    with pytest.raises(PreflightError) as refused:
        measure(function, {name_of(function): section})
    assert str(refused.value) == f"{name_of(function)}.{message}"


def test_batch_size_is_the_number_of_sequences() -> None:
    engine = load_engine(name_of(takes_options))
    for section, sequences in (({"batch_size": 8}, 8), ({}, 1)):
        config = ExperimentConfig.model_validate({"backend": engine.name, engine.name: section})
        assert needs_of_class(engine, config, None).sequences == sequences
    other = load_engine(name_of(returns_ids))
    assert needs_of_class(other, ExperimentConfig(backend=other.name), None).sequences is None


# ---- fields of the study ----


def test_fields_of_the_study_are_passed_to_parameters_of_their_names() -> None:
    fields = {"model": "m", "precision": "fp16", "max_output_tokens": 3, "random_seed": 7}
    result = measure(takes_study_fields, {**fields, "decoder": {"top_k": 5}})
    (*plain, decoder) = calls[0]
    assert (plain, decoder["top_k"], decoder["do_sample"]) == ([*fields.values()], 5, True)
    assert {name: result.effective_config[name] for name in fields} == fields
    assert result.effective_config["measurement"]["length_mode"] == "fixed"
    with pytest.raises(PreflightError, match="the function needs a model: give model in the study"):
        measure(takes_study_fields)
    measure(has_model)
    assert calls[0] == "of the function"


def test_fixed_lengths_are_checked_only_if_they_reach_the_function() -> None:
    with pytest.raises(ValueError, match=r"4 tokens where exactly 6 .* \(measurement.length_mode: natural"):
        measure(takes_study_fields, {"model": "m", "max_output_tokens": 6})
    natural = {"length_mode": "natural", "min_window_seconds": 0}
    result = measure(takes_study_fields, {"model": "m", "max_output_tokens": 6, "measurement": natural})
    assert result.metrics["output_tokens"].value == 8


def test_fields_that_do_not_reach_the_function_are_null() -> None:
    config = measure(returns_text, texts=True).effective_config
    unused = ("model", "precision", "decoder", "max_output_tokens", "max_input_tokens", "prompt_format")
    assert [config[name] for name in unused] == [None] * 6
    assert (config["n"], config["random_seed"], config["measurement"]["length_mode"]) == (2, 42, "natural")
    assert measure(returns_ids).effective_config["max_input_tokens"] == 4


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"model": "m"}, False),
        ({"precision": "bf16"}, False),  # the default
        ({"max_output_tokens": 128}, False),
        ({"decoder": {"do_sample": True}}, False),
        ({"measurement": {"length_mode": "fixed"}}, False),
        ({"max_input_tokens": 512}, True),
        ({"prompt_format": "raw"}, True),
    ],
)
def test_set_field_that_does_not_reach_the_function_is_refused(changes: dict[str, Any], texts: bool) -> None:
    engine = load_engine(name_of(returns_none))
    fields = {"backend": engine.name, "n": 2, **({"dataset": "prompts.txt"} if texts else {})}
    given, unset = (ExperimentConfig.model_validate(one) for one in ({**fields, **changes}, fields))
    (problem,) = option_problems(engine, given, given_fields(given))
    (name,) = changes
    assert problem.path[0] == name
    assert problem.message.startswith("the function ")
    assert option_problems(engine, unset, given_fields(unset)) == []


def test_value_that_is_not_the_default_is_refused_where_it_runs() -> None:
    with pytest.raises(PreflightError, match="precision: the function has no parameter 'precision': add one, or"):
        measure(returns_ids, {"precision": "fp32"})


@pytest.mark.parametrize("backend", ["pytorch", "vllm", "installed"])
def test_model_may_be_left_out_only_with_code_of_the_users(backend: str) -> None:
    with pytest.raises(ValueError, match="Field required"):
        ExperimentConfig(backend=backend)
    assert ExperimentConfig(backend="mine:Engine").model is None


# ---- load ----


def test_module_is_imported_when_the_function_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "late.py").write_text("import time; time.sleep(0.05)\ndef answer(prompt):\n    return prompt\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert is_function("late:answer")
    preload(ExperimentConfig(backend="late:answer"), ())
    assert "late" not in sys.modules
    result = run_experiment({**FIELDS, "backend": "late:answer"})
    assert not_none(result.metrics["load_seconds"].value) >= 0.05
    assert result.engine.name == "late:answer"
    del sys.modules["late"]


def test_only_a_function_in_the_source_is_imported_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "several.py").write_text(
        "from json import dumps\nclass Engine:\n    pass\nanswer = lambda prompt: 'a'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    names = (
        "several:Engine",
        "several:answer",
        "several:dumps",
        "several:nothing",
        "no_such_module:answer",
        "raising.module:answer",
        "noop",
    )
    (tmp_path / "raising").mkdir()
    (tmp_path / "raising" / "__init__.py").write_text("raise RuntimeError")
    assert not any(map(is_function, names))
    Path("prompts.txt").write_text("one\ntwo\n")
    result = run_experiment({**FIELDS, "backend": "several:answer", "dataset": "prompts.txt"})
    assert result.tokens.output_digest == hashlib.sha256(b"a;a").hexdigest()
    del sys.modules["several"]


# ---- GPUs ----


class Cuda:
    """The part of ``torch.cuda`` that is asked: two GPUs, of which the process uses the second."""

    def __init__(self) -> None:
        self.initialised = False
        self.synchronized: list[int] = []

    def is_initialized(self) -> bool:
        return self.initialised

    def device_count(self) -> int:
        return 2

    def memory_reserved(self, index: int) -> int:
        return index

    def get_device_properties(self, index: int) -> Any:
        return types.SimpleNamespace(uuid=f"uuid-{index}")

    def get_device_name(self, index: int) -> str:
        return f"Scripted {index}"

    def synchronize(self, index: int) -> None:
        self.synchronized.append(index)


@pytest.mark.parametrize("initialised", [True, False])
def test_used_gpus_are_asked_of_torch_once_it_has_them(monkeypatch: pytest.MonkeyPatch, initialised: bool) -> None:
    cuda = Cuda()
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    leased = ("GPU-uuid-0", "GPU-uuid-1")
    engine: FunctionEngine = load_engine(name_of(returns_ids), defer=True)(
        ExperimentConfig(backend=name_of(returns_ids)), EngineContext(gpus=leased)
    )
    assert tuple(engine.gpus) == leased
    cuda.initialised = initialised
    engine.load()
    engine.synchronize()
    assert list(engine.gpus) == (["GPU-uuid-1"] if initialised else [*leased])
    assert cuda.synchronized == ([1] if initialised else [])
    record = engine.describe()
    assert (record.device, record.device_names) == ("cuda", ["Scripted 1"] if initialised else [])


# ---- in a study ----

SLOW = """
import time

def answer(prompt: str, size: int = 1):
    {sleep}
    return prompt.upper() * size
"""

STUDY: dict[str, Any] = {
    **FIELDS,
    "backend": "mine:answer",
    "dataset": "prompts.txt",
    "execution": {"n_cycles": 3},
    "gates": {"metrics": ["seconds"], "delta": 0.5},
}


@pytest.fixture
def write(pytester: pytest.Pytester) -> Callable[..., None]:
    """Return a function that writes the module and a study with changed fields."""

    def write(sleep: float = 0.002, **changes: Any) -> None:
        (pytester.path / "mine.py").write_text(SLOW.format(sleep=f"time.sleep({sleep})"))
        (pytester.path / "prompts.txt").write_text("\n".join(TEXTS) + "\n")
        (pytester.path / "study.yaml").write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))

    return write


def test_preflight_refuses_what_the_function_does_not_take(
    pytester: pytest.Pytester, write: Callable[..., None], run_pytest: RunPytest
) -> None:
    write(precision="bf16", **{"mine:answer": {"sizes": 2}}, execution={"n_cycles": 1})
    study = (pytester.path / "study.yaml").read_text()
    (pytester.path / "field.yaml").write_text(study.replace("sizes: 2", "size: 2"))
    (pytester.path / "ids.yaml").write_text(study.replace("dataset: prompts.txt\n", ""))
    run = run_pytest(files=["study.yaml", "field.yaml", "ids.yaml"])
    lines = {name: str(study.splitlines().index(name) + 1) for name in ("precision: bf16", "  sizes: 2")}
    run.stdout.fnmatch_lines_random(
        [
            f"preflight: study.yaml:{lines['  sizes: 2']}:3: mine:answer.sizes: the engine has no such option*",
            f"preflight: field.yaml:{lines['precision: bf16']}:*: the function has no parameter 'precision'*",
            "preflight: ids.yaml:*the engine has no such option*",
        ]
    )


def test_study_of_a_function_is_named_and_resumed(
    write: Callable[..., None], run_pytest: RunPytest, results: Results
) -> None:
    write(execution={"n_cycles": 1})
    run_pytest("--llem-run-id=one").assert_outcomes(passed=1)
    assert results.statuses() == {"backend=mine:answer": "completed"}
    (point,) = StudyResult.load(results.directory).points
    assert (point.config["model"], point.config["precision"], point.config["decoder"]) == (None, None, None)
    run = run_pytest("--llem-resume")
    run.assert_outcomes(passed=1)
    run.stdout.fnmatch_lines(["*replay*"])


@pytest.mark.slow
def test_added_sleep_is_a_regression_by_default_gates(write: Callable[..., None], run_pytest: RunPytest) -> None:
    write(gates={"delta": 0.5})
    run_pytest("--llem-save=main").assert_outcomes(passed=3)
    write(gates={"delta": 0.5}, sleep=0.02)
    run = run_pytest("--llem-baseline=main")
    assert run.ret == pytest.ExitCode.TESTS_FAILED
    run.assert_outcomes(passed=3, failed=1, skipped=2)
    run.stdout.fnmatch_lines(["  requests_per_second *REGRESSION"])


@pytest.mark.slow
@pytest.mark.parametrize("options", [("-n", "2"), ()], ids=["xdist", "spawn"])
def test_budget_on_a_function(
    pytester: pytest.Pytester, write: Callable[..., None], options: tuple[str, ...]
) -> None:
    execution = {"n_cycles": 1}
    write(sweep={"mine:answer.size": [1, 2]}, budgets=[{"metric": "e2e_p50_ms", "max": 0.1}], execution=execution)
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", *options)
    run.assert_outcomes(passed=2, failed=2)


@pytest.mark.slow
def test_against_another_interpreter(
    pytester: pytest.Pytester, write: Callable[..., None], run_pytest: RunPytest, tmp_path: Path
) -> None:
    write(sleep=0.02)
    environment = Environment(tmp_path / "env", ROOT, *SITE_PACKAGES)
    environment.add("mine", "1.0", mine=SLOW.format(sleep="time.sleep(0.002)"))
    run = run_pytest(f"--llem-against={environment.python}")
    run.assert_outcomes(passed=6, failed=1)
    run.stdout.fnmatch_lines(["*1 REGRESSION*"])


REAL = """
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = {folder!r}
tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype="float32")

def answer(prompt, max_output_tokens):
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=max_output_tokens, do_sample=False)
    return output[0, inputs["input_ids"].shape[1]:]
"""


@pytest.mark.slow
def test_function_with_real_weights(pytester: pytest.Pytester, results: Results, smollm2: Path) -> None:
    folder = smollm2 / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    (pytester.path / "real.py").write_text(REAL.format(folder=str(folder)))
    (pytester.path / "prompts.txt").write_text("The capital of France is\n")
    natural = {"measurement": {"min_window_seconds": 0, "length_mode": "natural"}}
    study = {
        **FIELDS,
        **natural,
        "n": 1,
        "backend": "real:answer",
        "dataset": "prompts.txt",
        "max_output_tokens": 3,
    }
    (pytester.path / "study.yaml").write_text(yaml.safe_dump(study))
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem")
    run.assert_outcomes(passed=1)
    result = ExperimentResult.model_validate(results.read(results.manifest["experiments"][0]["result_file"]))
    assert result.tokens.output_tokens == 3
    assert result.effective_config["max_output_tokens"] == 3
    assert {"torch", "transformers"} <= {*result.engine.versions}
    assert not_none(result.metrics["load_seconds"].value) > 0.1


#: The function's module is imported with each load, so the forkserver imports what it needs only here.
SITECUSTOMIZE = """
import sys

if "pytest_llem.isolation.forkserver" in sys.orig_argv:
    from transformers import LlamaForCausalLM
"""


@pytest.mark.slow
def test_tutorial_runs_and_its_sleep_is_a_regression(
    pytester: pytest.Pytester, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytester.makepyfile(sitecustomize=SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", str(pytester.path))
    tutorial = page("tutorials/own-function.md")
    for name, text in files(tutorial).items():
        # Contention by other tests, which is detected from 1 s on, would leave the gate undecided.
        (pytester.path / name).write_text(text.replace("min_window_seconds: 1}", "min_window_seconds: 0.5}"))
    (prompts,) = (line for line in blocks(tutorial, "bash") if line.startswith("printf"))
    subprocess.run(["bash", "-c", prompts], cwd=pytester.path, check=True)
    start = "--llem-start-method=forkserver"
    options = ("answers.yaml", "-p", "llem", start, "--llem-cycles=3", "-k", "batch_size=8")
    pytester.runpytest_subprocess(*options, "--llem-save=main", "--llem-save-partial").assert_outcomes(
        passed=3, deselected=3
    )
    script, loop = pytester.path / "my_script.py", "    for start in range(0, len(prompts), batch_size):\n"
    (added,) = (block for block in blocks(tutorial, "python") if "time.sleep" in block)
    assert loop in script.read_text()
    slower = script.read_text().replace(loop, textwrap.indent(added, "    "))
    script.write_text(slower.replace("import torch", "import time\n\nimport torch", 1))
    run = pytester.runpytest_subprocess(*options, "--llem-baseline=main")
    run.assert_outcomes(passed=3, failed=1, deselected=4)
    run.stdout.fnmatch_lines(["*1 REGRESSION*"])
