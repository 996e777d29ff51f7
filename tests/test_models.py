"""Where models are found, and the errors if a model is not available."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pytest_llem.engines.models import ModelSource, resolve_model
from pytest_llem.engines.protocol import ModelNotFoundError
from tests.conftest import Results
from tests.support import torch_forks

#: Of the weights that builtin:tiny-llama has everywhere. A change here breaks comparisons with older results:
#: raise tiny_llama.VERSION with it.
TINY_LLAMA_WEIGHTS = "8b850b5b425f69219e38313c0ae635ca4e1f4b39b7563bcd9edb48c9fada4204"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "cache"


#: Prints where each of its arguments is from, a line each; the model path comes first, in JSON.
RESOLVE = """
import json, sys
from pathlib import Path
from pytest_llem.engines.models import resolve_model, ModelNotFoundError
for model_path, name in json.loads(sys.argv[1]):
    try:
        print(resolve_model(name, [Path(one) for one in model_path]))
    except ModelNotFoundError as error:
        print(error)
assert "torch" not in sys.modules
"""


def resolve(*asked: tuple[list[str], str]) -> list[str]:
    """Resolve a model, given a model path and a name, in a process that reads Hugging Face's variables again."""
    command = [sys.executable, "-c", RESOLVE, json.dumps(asked)]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()


def test_existing_folder_takes_precedence(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    source = resolve_model(str(tmp_path / "mine"), [tmp_path])
    assert (source.location, source.kind, source.random_weights) == (str(tmp_path / "mine"), "local", False)


@pytest.mark.parametrize(("config", "random"), [('{"random_weights": true}', True), ("{}", False), ("[", False)])
def test_models_config_declares_random_weights_for_every_engine(config: str, random: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(config)
    assert resolve_model(str(tmp_path), []).random_weights is random


def test_folder_under_the_model_path_is_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "second" / "owner" / "name").mkdir(parents=True)
    source = resolve_model("owner/name", [tmp_path / "first", tmp_path / "second"])
    assert (source.location, source.kind) == (str(tmp_path / "second" / "owner" / "name"), "model_path")


def test_hub_is_last_and_the_error_lists_the_searched_places(cache: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hf" / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    offline = "not in the Hugging Face cache (HF_HUB_OFFLINE is set, so the hub was not asked)"
    assert resolve(([], "owner/name"), ([], "owner/none"), (folders, "owner/none"), ([], "/no/such/folder")) == [
        "ModelSource(location='owner/name', kind='hub', revision=None)",
        f"model 'owner/none' not found: no folder owner/none; llem_model_path is not set; {offline}",
        "model 'owner/none' not found: no folder owner/none; none of that name under llem_model_path "
        f"({folders[0]}, {folders[1]}); {offline}",
        "model '/no/such/folder' not found: no folder /no/such/folder; llem_model_path is not set; "
        "not the name of a model on the hub either (expected owner/name)",
    ]


def test_unknown_builtin_model_is_refused() -> None:
    with pytest.raises(ModelNotFoundError, match="the only builtin is builtin:tiny-llama"):
        resolve_model("builtin:huge-llama", [])


def test_missing_model_is_a_preflight_failure_of_the_item(pytester: pytest.Pytester, results: Results) -> None:
    (pytester.path / "study.yaml").write_text("model: owner/name\nsweep: {n: [1]}\nexecution: {n_cycles: 1}\n")
    run = pytester.runpytest_subprocess("study.yaml", "-p", "llem", "-o", "llem_model_path=models")
    run.assert_outcomes(failed=1)
    run.stdout.fnmatch_lines(
        [f"preflight: model 'owner/name' not found: *({pytester.path / 'models'}); not in the*"]
    )
    assert "Traceback" not in run.stdout.str()
    assert results.manifest["experiments"][0]["error"]["kind"] == "preflight"


def test_tiny_llama_is_the_same_everywhere(cache: Path) -> None:
    folder = Path(resolve_model("builtin:tiny-llama", []).location)
    assert folder == cache / "pytest-llem" / "tiny-llama-v1"
    weights = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8 : 8 + size])
    header.pop("__metadata__", None)
    tensors = b"".join(
        name.encode() + weights[8 + size + start : 8 + size + end]
        for name, entry in sorted(header.items())
        for start, end in [entry["data_offsets"]]
    )
    assert hashlib.sha256(tensors).hexdigest() == TINY_LLAMA_WEIGHTS
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing half made is left"


@pytest.mark.slow
def test_tiny_llama_may_be_created_by_several_processes_at_once(cache: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(torch_forks.call, [torch_forks.make_tiny_llama] * 2))
    assert made == [str(cache / "pytest-llem" / "tiny-llama-v1")] * 2
    assert len(list((cache / "pytest-llem").iterdir())) == 1


class TestFingerprint:
    """The fingerprint, which distinguishes local folders."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        (tmp_path / "model.safetensors").write_bytes(b"12345")
        return tmp_path

    def test_fingerprint_covers_configuration_and_sizes_of_weights(self, folder: Path) -> None:
        text = b'{"model_type": "llama"}\nmodel.safetensors 5'
        found = ModelSource(str(folder), "local").fingerprint()
        assert found == hashlib.sha256(text).hexdigest()
        (folder / "README.md").touch()
        assert ModelSource(str(folder), "model_path").fingerprint() == found
        (folder / "model.safetensors").write_bytes(b"123456")
        larger = ModelSource(str(folder), "local").fingerprint()
        (folder / "config.json").write_text("{}")
        assert len({found, larger, ModelSource(str(folder), "local").fingerprint()}) == 3

    def test_model_without_a_folder_has_no_fingerprint(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        assert ModelSource(str(folder), "local").fingerprint() is None
        assert ModelSource("owner/name", "hub").fingerprint() is None
