"""Unusual models and prompt files: multimodal models, missing tokenizers, damaged files, other encodings."""

from __future__ import annotations

import errno
import os
import re
import socket
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from pytest_llem._plugin.shared_state import SharedState
from pytest_llem.engines import hub, tokenizer
from pytest_llem.engines.models import file_damage
from pytest_llem.engines.protocol import PreflightError
from pytest_llem.engines.tiny_llama import cache_note, model_folder, tiny_llama
from pytest_llem.execution.session_facts import hub_unreachable_reason
from pytest_llem.measurement.orchestrator import ExperimentOrchestrator
from pytest_llem.planning.model_files import from_config
from pytest_llem.planning.preflight import Preflight
from pytest_llem.study.loading import load_study
from pytest_llem.workload.datasets import read_file
from tests.conftest import Results, RunPytest, WriteStudy
from tests.support.tiny import GREEDY, PROMPTS, SIZES, config, decoder, engine, outputs

transformers = pytest.importorskip("transformers")

#: Configurations of models with several parts, one of which is the decoder.
IN_PARTS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**SIZES, "head_dim": 8, "sliding_window": 16},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        "image_token_id": 7,
    },
    "llama4": {
        "text_config": {**SIZES, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
    },
}


#: Content of a file that git-lfs has not fetched.
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.fixture
def plain_model(tmp_path: Path) -> str:
    """A folder of a model without a tokenizer."""
    decoder("llama").save_pretrained(tmp_path)
    return str(tmp_path)


class TestConfigurationsInParts:
    @pytest.mark.parametrize("kind", IN_PARTS)
    def test_multimodal_model_is_measured(self, kind: str, tmp_path: Path) -> None:
        decoder(kind, attn_implementation="sdpa", **IN_PARTS[kind]).save_pretrained(tmp_path)
        result = ExperimentOrchestrator(config(model=str(tmp_path), precision="fp32")).run().result
        assert (result.tokens.input_tokens, result.tokens.output_tokens) == (3 * 8, 3 * 6)
        assert result.engine.settings["attn_implementation"] == "sdpa"

    def test_synthetic_prompts_contain_no_image_placeholder(self) -> None:
        parts = transformers.AutoConfig.for_model("gemma3", **IN_PARTS["gemma3"])
        allowed = tokenizer.vocabulary(parts, None)
        assert set(range(97)) - set(allowed) == {0, 1, 2, 7}

    @pytest.mark.slow
    def test_every_causal_type_of_transformers_has_a_vocabulary(self) -> None:
        sizes = {}
        for kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING._model_mapping:
            if kind != "gemma4_assistant":  # its own defaults are invalid
                sizes[kind] = tokenizer.text_config(transformers.CONFIG_MAPPING[kind]()).vocab_size
        assert len(sizes) > 100
        assert [kind for kind, size in sizes.items() if type(size) is not int or size < 1] == []

    @pytest.mark.parametrize("part", ["text_config", "decoder", "generator"])
    def test_footprint_is_that_of_the_decoder(self, part: str) -> None:
        assert from_config({"model_type": "parts", part: SIZES}) == from_config(SIZES)


class TestMissingTokenizer:
    def test_synthetic_prompts_need_no_tokenizer(self, plain_model: str) -> None:
        result = ExperimentOrchestrator(config(model=plain_model)).run().result
        assert result.tokens.output_tokens == 3 * 6
        assert result.engine.settings["tokenizer"] == "none"

    def test_special_tokens_of_the_model_are_excluded_without_tokenizer(self, plain_model: str) -> None:
        made = engine(model=plain_model, **GREEDY)
        assert list(made.vocabulary()) == list(range(3, 97))
        assert [len(one) for one in outputs(made, PROMPTS)] == [6, 6, 6]

    def test_text_prompts_need_a_tokenizer(self, plain_model: str) -> None:
        with pytest.raises(PreflightError, match=f"^the tokenizer of model '{plain_model}' cannot be loaded: "):
            engine(model=plain_model, dataset="prompts.txt")

    def test_tokenizer_without_a_vocabulary_counts_as_missing(self, tmp_path: Path) -> None:
        decoder("gpt2", vocab_size=97).save_pretrained(tmp_path)
        assert len(transformers.AutoTokenizer.from_pretrained(tmp_path)) == 1, (
            "transformers creates an empty tokenizer"
        )
        assert len(engine(model=str(tmp_path)).vocabulary()) == 97 - 3
        with pytest.raises(PreflightError, match="cannot be loaded: it has no vocabulary"):
            engine(model=str(tmp_path), dataset="prompts.txt")

    def test_model_with_a_tokenizer_has_no_warning(self) -> None:
        assert "tokenizer" not in engine(model=str(tiny_llama())).describe().settings


class TestPromptFiles:
    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("a.txt", b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),
            ("a.jsonl", b'\xef\xbb\xbf{"prompt": "one"}\n{"text": "two"}', ["one", "two"]),
            ("a.txt", "a\u2028b\n".encode(), ["a\u2028b"]),
            ("a.txt", "a\x85b\x0bc\x0cd\x1ce\n".encode(), ["a\x85b\x0bc\x0cd\x1ce"]),
            ("a.txt", b"a\rb\r\nc\r\n\r\n", ["a\rb", "c"]),
            ("a.jsonl", '{"prompt":\r"a\u2028b"}\r\n\r\n'.encode(), ["a\u2028b"]),
            ("a.jsonl", b'{"prompt": "\\ud83d\\ude00"}', ["\U0001f600"]),
        ],
    )
    def test_prompts_of_a_file_are_split_at_line_feeds_only(
        self, tmp_path: Path, name: str, content: bytes, expected: list[str]
    ) -> None:
        (tmp_path / name).write_bytes(content)
        assert [prompt.text for prompt in read_file(name, tmp_path)] == expected

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            (
                "a.jsonl",
                b'{"prompt": "a"}\n\n{"prompt": "b\\ud83d"}',
                r":3: the prompt holds the lone surrogate \\ud83d",
            ),
            ("a.txt", b"one\ntwo \xed\xa0\xbd\n", ":2: is not UTF-8 .*: save the file as UTF-8$"),
            ("a.jsonl", '{"prompt": "a"}'.encode("utf-16"), ":1: is not UTF-8 .*: save the file as UTF-8$"),
        ],
    )
    def test_text_that_tokenizers_refuse_is_reported_with_its_line(
        self, tmp_path: Path, name: str, content: bytes, reason: str
    ) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PreflightError, match=reason):
            read_file(name, tmp_path)


class TestDamagedFiles:
    @pytest.mark.parametrize(
        ("name", "content", "damage"),
        [
            (
                "model.safetensors",
                LFS_POINTER,
                "is a git-lfs pointer and not the file itself: run git lfs pull in ",
            ),
            ("tokenizer.json", LFS_POINTER, "is a git-lfs pointer and not the file itself: run git lfs pull in "),
            ("model.safetensors", -1, r"is truncated: it has [\d,]+ of [\d,]+ bytes: download or copy it again$"),
            ("model.safetensors", 20, "is truncated at 20 bytes, within its header: download or copy it again$"),
            ("model.safetensors", 0, "is truncated at 0 bytes, within its header: download or copy it again$"),
            ("model.safetensors", b"<!DOCTYPE html>", "is not a safetensors file: download or copy it again$"),
        ],
    )
    def test_damaged_model_file_is_a_preflight_error(
        self, plain_model: str, name: str, content: bytes | int, damage: str, write_study: WriteStudy
    ) -> None:
        file = Path(plain_model, name)
        file.write_bytes(file.read_bytes()[:content] if isinstance(content, int) else content)
        reason = f"^model '{plain_model}' cannot be loaded: {file} {damage}"
        with pytest.raises(PreflightError, match=reason):
            engine(model=plain_model)
        study = load_study(write_study(model=plain_model, backend="pytorch", sweep={"n": [1]}))
        preflight = Preflight(study, (), [])
        assert re.match(reason, preflight.refusal(study.points[0]) or "")

    def test_every_shard_is_checked(self, tmp_path: Path) -> None:
        decoder("llama").save_pretrained(tmp_path, max_shard_size="40KB")
        assert file_damage(tmp_path) is None
        *_, last = sorted(tmp_path.glob("*.safetensors"))
        last.write_bytes(last.read_bytes()[:-1])
        assert str(last) in (file_damage(tmp_path) or "")

    def test_index_without_file_names_is_left_to_the_library(self, plain_model: str) -> None:
        Path(plain_model, "model.safetensors").unlink()
        Path(plain_model, "model.safetensors.index.json").write_text('{"weight_map": {"a": 1, "b": "c"}}')
        assert file_damage(Path(plain_model)) is None

    def test_weights_that_are_not_loaded_may_be_lfs_pointers(self, plain_model: str) -> None:
        Path(plain_model, "consolidated.safetensors").write_bytes(LFS_POINTER)
        Path(plain_model, "pytorch_model.bin").write_bytes(LFS_POINTER)
        assert file_damage(Path(plain_model)) is None


class TestCacheFolder:
    @pytest.fixture
    def temporary(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """This user's folder for models in a temporary folder; the cache folder is unusable."""
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        return tmp_path / f"pytest-llem-{os.geteuid()}"

    def test_builtin_model_is_kept_in_a_temporary_folder_without_a_cache(self, temporary: Path) -> None:
        folder = tiny_llama()
        assert folder == model_folder() == temporary / "tiny-llama-v1"
        assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
        assert tiny_llama() == folder

    def test_plan_notes_the_temporary_folder(
        self, temporary: Path, write_study: WriteStudy, pytester: pytest.Pytester
    ) -> None:
        write_study(model="builtin:tiny-llama", backend="pytorch", sweep={"n": [1]}, execution={"n_cycles": 1})
        found = pytester.runpytest_inprocess("study.yaml", "-p", "llem", "--collect-only")
        found.stdout.fnmatch_lines(
            [f"  note: */file/pytest-llem cannot be written: builtin:tiny-llama is kept in {temporary} (*"]
        )

    @pytest.mark.parametrize("home", ["unset", "read-only"])
    def test_model_folder_is_temporary_without_a_writable_home(
        self, temporary: Path, monkeypatch: pytest.MonkeyPatch, home: str
    ) -> None:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", _no_home if home == "unset" else lambda: temporary.parent / "home")
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != temporary.parent)
        assert model_folder() == temporary / "tiny-llama-v1"
        expected = (
            "there is no home directory" if home == "unset" else f"{temporary.parent}/home/.cache/pytest-llem"
        )
        assert (cache_note() or "").startswith(expected)

    def test_cache_that_links_to_nothing_is_replaced_by_a_temporary_folder(
        self, temporary: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        link = temporary.parent / "link"
        link.symlink_to("not/mounted")
        monkeypatch.setenv("XDG_CACHE_HOME", str(link))
        assert model_folder() == temporary / "tiny-llama-v1"

    def test_read_only_cache_is_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        (tmp_path / "pytest-llem" / "tiny-llama-v1").mkdir(parents=True)
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        assert model_folder() == tmp_path / "pytest-llem" / "tiny-llama-v1"
        assert cache_note() is None

    @pytest.mark.parametrize("spoil", [lambda path: path.symlink_to("/tmp"), lambda path: path.mkdir(mode=0o777)])
    def test_a_temporary_folder_that_others_can_write_is_refused(
        self, temporary: Path, spoil: Callable[[Path], object]
    ) -> None:
        before = os.umask(0)
        try:
            spoil(temporary)
        finally:
            os.umask(before)
        with pytest.raises(
            PreflightError, match=r"cannot be made: .* is not a folder of this user's alone: remove"
        ):
            engine(model="builtin:tiny-llama")

    def test_unwritable_hub_cache_is_reported(self) -> None:
        error = OSError(errno.EROFS, "Read-only file system", "/home/me/.cache")
        assert hub.refusal(error, None) == (
            "/home/me/.cache cannot be written (Read-only file system): set HF_HOME to a folder that can"
        )


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


class TestUnreachableHub:
    @pytest.fixture
    def connections(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[object]]:
        """Connections to a hub that closes every connection immediately."""
        seen: list[object] = []
        with socket.create_server(("127.0.0.1", 0)) as server:

            def close_all() -> None:
                with suppress(OSError):
                    while True:
                        connection, address = server.accept()
                        seen.append(address)
                        connection.close()

            thread = threading.Thread(target=close_all, daemon=True)
            thread.start()
            endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
            monkeypatch.delenv("HF_HUB_OFFLINE")
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
            monkeypatch.setattr(constants, "ENDPOINT", endpoint)
            for name, value in (("ENDPOINT", endpoint), ("HOME", str(tmp_path / "hf"))):
                monkeypatch.setenv(f"HF_{name}", value)
            yield seen
            server.shutdown(socket.SHUT_RDWR)
            thread.join()

    def test_unreachable_hub_is_asked_once_per_session(
        self, connections: list[object], write_study: WriteStudy
    ) -> None:
        study = load_study(write_study(model="owner/nowhere", backend="pytorch", sweep={"n": [1, 2, 3]}))
        shared_state, preflight = SharedState(), Preflight(study, (), [])
        found = {hub_unreachable_reason(shared_state, preflight, point.config) for point in study.points}
        assert len(connections) == len(found) == 1
        assert (found.pop() or "").startswith("the Hugging Face hub cannot be reached: ")

    @pytest.mark.slow
    def test_experiments_do_not_ask_an_unreachable_hub(
        self,
        connections: list[object],
        write_study: WriteStudy,
        run_pytest: RunPytest,
        results: Results,
    ) -> None:
        write_study(model="owner/nowhere", backend="pytorch", sweep={"n": [1, 2, 3]}, execution={"n_cycles": 1})
        run_pytest().assert_outcomes(failed=3)
        assert len(connections) == 1
        errors = {(entry["error"]["kind"], entry["error"]["message"]) for entry in results.manifest["experiments"]}
        [(kind, message)] = errors
        assert kind == "preflight"
        assert "not in the Hugging Face cache (the Hugging Face hub cannot be reached: " in message

    def test_a_run_without_the_hub_does_not_ask_it(
        self, connections: list[object], write_study: WriteStudy, run_pytest: RunPytest
    ) -> None:
        write_study(sweep={"n": [1]}, execution={"n_cycles": 1})
        run_pytest().assert_outcomes(passed=1)
        assert connections == []
