"""The conformance suite: engines that pass it, and a fault that each of its checks finds."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest

from pytest_llem.machine.gpu_memory import Settled
from pytest_llem.results.experiment import ExperimentResult
from pytest_llem.results.manifest_records import ErrorRecord
from pytest_llem.testing import EngineConformance, conformance, experiments
from pytest_llem.testing.experiments import Run
from tests.conftest import ROOT, RunPytest
from tests.support import in_process, nonconforming  # here: pytester forgets what an inner run imports
from tests.support.pages import files, page

GOLDEN = Path(__file__).parent / "golden" / "1.0"

#: For each variant: the only check that fails, and its message.
FAULTS = {
    "FailsToLoad": (
        "test_experiment_completes",
        "the minimal experiment failed while loading (OSError: there is no such file)",
    ),
    "OneTokenLess": (
        "test_number_of_output_tokens_is_exact",
        "the engine generated 4 tokens where exactly 5 were asked for (measurement.length_mode: natural "
        "lets it end earlier), and length_mode: fixed asks "
        "for that number",
    ),
    "NoRecordOfTheLast": (
        "test_records_are_one_for_each_prompt_in_order",
        "the engine returned records for 0 of 5 prompts, and requests has to return one for each "
        "prompt of the batch",
    ),
    "RecordsReversed": (
        "test_records_are_one_for_each_prompt_in_order",
        "requests returned the records of prompts of [*] tokens in the order [*], and has to keep "
        "the order of the "
        "prompts",
    ),
    "CountsPadding": (
        "test_input_tokens_are_those_of_the_prompt",
        "the records of prompts of [*] tokens report [*] input tokens, and have to report the prompts' tokens "
        "without padding",
    ),
    "TooFewPositions": (
        "test_input_tokens_are_those_of_the_prompt",
        "the engine contradicts its input: it reports 5 positions for * tokens, and positions has to "
        "count each "
        "token of a batch, and padding",
    ),
    "OtherClock": (
        "test_times_are_in_order_and_within_the_window",
        "the engine contradicts the clock: its times are * after the start of the window, *, and "
        "times have to be "
        "from time.monotonic, one for each token",
    ),
    "DifferentPasses": (
        "test_every_pass_gives_the_same_output",
        "passes with the same seed gave different outputs, and seed, *, has to reset every random "
        "number generator",
    ),
    "DifferentProcesses": (
        "test_same_seed_gives_the_same_output_in_another_process",
        "two processes with the same random_seed gave different outputs, and the output has to "
        "follow from model, "
        "prompts and seed",
    ),
    "IgnoresSeed": (
        "test_sampling_is_honoured_or_refused",
        "with do_sample: true and temperature 2 the engine gave the same output for two seeds, and has to *",
    ),
    "IgnoresGreedy": (
        "test_greedy_decoding_is_honoured_or_refused",
        "with do_sample: false the engine gave different outputs for two seeds, and has to *",
    ),
    "DependsOnBatch": (
        "test_output_does_not_depend_on_the_batch_size",
        "batches of 1 and of 2 prompts gave different outputs, and the suite states batch_invariant",
    ),
    "EncodesNothing": (
        "test_texts_are_encoded",
        "encode returned no token ids for a text of several words, and has to return them",
    ),
    "EncodesDifferently": (
        "test_texts_are_encoded",
        "encode returned different token ids for the same text, and has to return the same",
    ),
    "RaisesInEncode": (
        "test_texts_are_encoded",
        "encode raised NotImplementedError: no tokenizer, and has to raise PreflightError if the "
        "engine takes no "
        "texts",
    ),
    "FailsWithTexts": (
        "test_texts_are_encoded",
        "the experiment failed while measuring (ValueError: prompts are too long)",
    ),
    "TakesAnyOption": (
        "test_unknown_option_is_refused_before_load",
        "an experiment with the option no_such_option: 1, which the engine does not have, gave a "
        "result, and has to "
        "be refused before the model is loaded",
    ),
    "TakesAnyValue": (
        "test_wrong_value_of_an_option_is_refused_before_load",
        "an experiment with the option batch_size: {'not': 'a value'}, which has a wrong type, gave "
        "a result, and "
        "has to be refused before the model is loaded",
    ),
    "IgnoresPrecision": (
        "test_precision_is_honoured_or_refused",
        "the model is as large with precision fp32 as with bf16 (4 MB), and the engine has to honour precision, *",
    ),
    "TooLongIfNatural": (
        "test_natural_length_is_honoured_or_refused",
        "with length_mode: natural the engine generated 6 tokens where at most 5 were asked for, and "
        "has to end at "
        "max_output_tokens or before",
    ),
    "IgnoresChat": (
        "test_chat_format_is_honoured_or_refused",
        "encode returned the same token ids for prompt_format raw and chat, and has to add the chat template, *",
    ),
    "ClosesWhatItHasNotLoaded": (
        "test_close_works_after_a_failure",
        "close raised AttributeError: 'Engine' object has no attribute 'model' after fetch had "
        "failed, and has to "
        "release what there is, so that the first error is reported",
    ),
    "LeavesAProcess": (
        "test_close_ends_all_processes",
        "* (pid *) still ran 0.2 s after close, which has to end every process that the engine started",
    ),
    "LeavesSharedMemory": (
        "test_host_memory_is_released",
        "the engine left /dev/shm/llem-left-* (0.0041 MB) in shared memory, and close has to remove "
        "what the engine "
        "created there",
    ),
    "TwoTokensForPrefill": (
        "test_prefill_only_generates_one_token",
        "measurement.prefill_split failed (ValueError: the engine returned 2 tokens for a request "
        "for one *), and "
        "generate_first has to generate one token for each prompt",
    ),
    "NoParameters": (
        "test_model_shape_is_plausible",
        "shape returned parameters 0, which has to be greater than 0",
    ),
    "ShapeLargerThanMemory": (
        "test_model_shape_is_plausible",
        "shape returned weight_bytes 5,000,000, and model_memory_bytes, which has to be at least "
        "that, is 2,000,000",
    ),
    "UsesMoreCacheThanThereIs": (
        "test_cache_memory_is_plausible",
        "cache_memory returned used_bytes 11, which has to be at most allocated_bytes 10",
    ),
    "CacheLargerThanMemory": (
        "test_cache_memory_is_plausible",
        "cache_memory returned allocated_bytes 1,000,000,000,000,000,000, which has to be at most "
        "the memory of its "
        "devices, *",
    ),
    "OnAnotherGpu": (
        "test_reported_gpus_are_leased",
        "gpus holds GPU-00000000-0000-0000-0000-000000000000, which were not leased for the "
        "experiment, and has to *",
    ),
}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hide GPUs, keep pytest from shortening its lines, and remove what engines leave."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("COLUMNS", "1000")
    yield
    for file in Path("/dev/shm").glob(f"{nonconforming.LEFT}*"):
        file.unlink()


def run_suite(pytester: pytest.Pytester, backend: str, *options: str) -> pytest.RunResult:
    """Run the suite in this process, its experiments included."""
    pytester.makepyfile(
        test_engine=f"""
        from {in_process.__name__} import InProcess

        class TestEngine(InProcess):
            experiment = {{"model": "none", "backend": "tests.support.{backend}"}}
            has_processes = {backend.endswith("LeavesAProcess")}
        """
    )
    return pytester.runpytest_inprocess("test_engine.py", "-rfEs", *options)


def failed(run: pytest.RunResult) -> dict[str, str]:
    """Return the message of each check that failed."""
    return dict(
        re.findall(r"^FAILED test_engine.py::TestEngine::(\w+)\S* - (.*)$", run.stdout.str(), re.MULTILINE)
    )


def assert_conforms(run: pytest.RunResult, passed: int, checks: int = 31) -> None:
    """Check how many checks passed; the one that compares passes is skipped if a slow window has one only."""
    output = run.stdout.str()
    passed -= "the window has one pass" in output
    assert run.parseoutcomes() == {"passed": passed, "skipped": checks - passed}, output


def test_suite_passes_for_an_engine_with_every_ability(pytester: pytest.Pytester) -> None:
    run = run_suite(pytester, "conforming:ConformingEngine")
    run.assert_outcomes(passed=28, skipped=3)
    assert sorted(re.findall(r"^SKIPPED \[(\d)\] \S+: (.*)$", run.stdout.str(), re.MULTILINE)) == [
        ("1", "the engine uses no GPU"),
        ("1", "the engine uses no GPU"),
        ("1", "would kill this process"),
    ]


@pytest.mark.parametrize("variant", FAULTS)
def test_each_fault_fails_the_check_for_it_only(pytester: pytest.Pytester, variant: str) -> None:
    run = run_suite(pytester, f"nonconforming:{variant}")
    check, message = FAULTS[variant]
    assert failed(run).keys() == {check}, run.stdout.str()
    run.stdout.fnmatch_lines([f"{message.replace('[*]', '[[]*[]]')}: see {experiments.PAGE}#*"])
    assert run.parseoutcomes().get("errors") is None


#: Engines that conform: fields of the experiment, and attributes of the suite.
BIGRAM = """
    experiment = {
        "model": "none",
        "backend": "my_engine:BigramEngine",
        "precision": "fp32",
        "decoder": {"do_sample": False},
    }
    batch_invariant = True
"""
NOOP = f"""
from {in_process.__name__} import InProcess

class TestEngine(InProcess):
    experiment = {{"model": "none", "backend": "honest:Engine", "decoder": {{"do_sample": False}}}}
    batch_option = "size"
"""
PYTORCH = f"""
from {in_process.__name__} import InProcess
from pytest_llem.testing import EngineConformance

class TestEngine(InProcess):
    experiment = {{"model": "builtin:tiny-llama", "precision": "fp32"}}
    batch_invariant = False

class TestProcesses(EngineConformance):
    experiment = TestEngine.experiment
"""

#: The do-nothing engine ignores all settings, so this one refuses them.
HONEST = """
from noop_engine import NoopEngine
from pytest_llem.engines.protocol import PreflightError

class Engine(NoopEngine):
    def __init__(self, config, context):
        if config.decoder.do_sample or config.precision != "bf16" or config.prompt_format != "raw":
            raise PreflightError("needs do_sample: false, precision: bf16 and prompt_format: raw")
        super().__init__(config, context)
"""


@pytest.fixture
def run_real(pytester: pytest.Pytester, noop_engine: None) -> RunPytest:
    """Run the suite with experiments in processes of their own, for the text of a class's body."""

    def run(body: str, *options: str) -> pytest.RunResult:
        source = f"from pytest_llem.testing import EngineConformance\n\nclass TestEngine(EngineConformance):{body}"
        for name, text in files(page("how-to/own-engine.md")).items():
            (pytester.path / name).write_text(text)
        pytester.makepyfile(test_engine=source)
        start = "--llem-start-method=forkserver"
        return pytester.runpytest_inprocess("test_engine.py", "-rfEs", "-p", "llem", start, *options)

    return run


@pytest.mark.slow
def test_bigram_engine_of_the_page_conforms(run_real: RunPytest) -> None:
    run = run_real(BIGRAM)
    assert_conforms(run, passed=20)
    run.stdout.fnmatch_lines(["SKIPPED * the engine refuses sampling: needs precision: fp32 and decoder: *"])


def test_engine_that_refuses_all_settings_conforms(pytester: pytest.Pytester, noop_engine: None) -> None:
    pytester.makepyfile(test_engine=NOOP, honest=HONEST)
    assert_conforms(pytester.runpytest_inprocess("test_engine.py", "-rfEs"), passed=21)


@pytest.mark.slow
def test_pytorch_engine_conforms(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what needs several processes runs in them: the rest shares one import of torch."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makepyfile(test_engine=PYTORCH)
    of_processes = (
        "test_same_seed_gives_the_same_output_in_another_process",
        "test_no_process_is_left_after_sigkill",
    )
    run = pytester.runpytest_subprocess(
        "test_engine.py::TestEngine",
        *(f"test_engine.py::TestProcesses::{name}" for name in of_processes),
        *("-rfEs", "-p", "llem", "--llem-start-method=forkserver"),
    )
    assert_conforms(run, passed=27, checks=33)


def _fake(note: dict[str, Any], error: ErrorRecord | None = None) -> Any:
    """Return experiments that all have the note, and that fail with the error if they have a fault."""
    result = ExperimentResult.read(next((GOLDEN / "experiments").glob("*.json")))
    completed = Run(result, None, [note], None)

    class Fake:
        def __call__(self, fault: str | None = None) -> Run:
            return Run(None, error, [note], completed) if fault else completed

        fresh = __call__

    return Fake()


def test_process_that_survives_sigkill_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The supervisor leaves none, so this one is not of an experiment."""
    monkeypatch.setattr(experiments, "_GONE_SECONDS", 0.1)
    killed = ErrorRecord(kind="crash", type="SIGKILL", message="the process was ended by SIGKILL")
    with subprocess.Popen([sys.executable, "-ISc", "import time; time.sleep(60)"]) as child:
        created = psutil.Process(child.pid).create_time()
        suite = _fake({"call": "processes", "processes": [[child.pid, created]], "files": []}, killed)
        with pytest.raises(pytest.fail.Exception, match=f"processes {child.pid} still ran after the experiment"):
            EngineConformance().test_no_process_is_left_after_sigkill(suite)
        child.kill()
        child.wait()
    EngineConformance().test_no_process_is_left_after_sigkill(suite)


@pytest.mark.parametrize("left", [{}, {"GPU-1": 512.0}])
def test_gpu_memory_that_is_not_released_is_found(monkeypatch: pytest.MonkeyPatch, left: dict[str, float]) -> None:
    class Memory:
        def settle(self, uuids: Collection[str], before: Mapping[str, int]) -> Settled:
            return Settled(1.0, left if before else None, dict.fromkeys(uuids, 10))

    monkeypatch.setattr(conformance, "GpuMemory", Memory)
    experiments = _fake({"call": "load", "gpus": ["GPU-1"]})
    with pytest.raises(pytest.fail.Exception, match="512 MB on GPU-1 is still") if left else nullcontext():
        EngineConformance().test_gpu_memory_is_released(experiments)


def test_suite_without_an_experiment_fails_with_one_sentence(run_real: RunPytest) -> None:
    run = run_real(" pass", "-k", "completes")
    run.assert_outcomes(errors=1)
    run.stdout.fnmatch_lines([f"TestEngine needs the attribute experiment: see {experiments.PAGE}"])


def test_suite_imports_no_torch_and_the_plugin_does_not_import_it() -> None:
    code = (
        "import sys, pytest_llem.plugin, pytest_llem.session\n"
        "assert 'pytest_llem.testing' not in sys.modules\n"
        "import pytest_llem.testing\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_check_has_a_fault_that_it_finds() -> None:
    checks = {name for name in vars(EngineConformance) if name.startswith("test_")}
    others = {"test_gpu_memory_is_released", "test_no_process_is_left_after_sigkill"}  # which have tests below
    assert {check for check, _ in FAULTS.values()} == checks - others
    variants = {
        name
        for name, one in vars(nonconforming).items()
        if isinstance(one, type) and one.__module__ == nonconforming.__name__ and not name.startswith("_")
    }
    assert variants == FAULTS.keys()


FUNCTION = """
    experiment = {"backend": "functions:answer", "max_output_tokens": 4}
    batch_option = "batch_size"
"""

ANSWER = """
import time


def answer(prompts, max_output_tokens, batch_size: int = 1):
    for prompt in prompts:
        time.sleep(0.001)
        yield iter([sum(prompt) % 97] * max_output_tokens)
"""


@pytest.mark.slow
def test_function_conforms(pytester: pytest.Pytester, run_real: RunPytest) -> None:
    pytester.makepyfile(functions=ANSWER)
    run = run_real(FUNCTION)

    assert_conforms(run, passed=18)
