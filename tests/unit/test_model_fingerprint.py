"""What counts in a base's fingerprint, and what does not."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedllm.model.fingerprint import base_fingerprint, file_digest, tokenizer_digest, tokenizer_source_digest
from fedllm.model.source import BaseFiles, resolve
from fedllm.model.spec import BaseSpec
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def files_of(folder: Path) -> BaseFiles:
    return resolve(f"path:{folder}", folder)


def test_a_copy_elsewhere_has_the_same_fingerprint(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    assert base_fingerprint(files_of(tiny), BaseSpec()) == base_fingerprint(files_of(copy), BaseSpec())


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "change", "counts"),
    [
        ("model.safetensors", flip_a_bit, True),
        ("config.json", lambda path: path.write_text(path.read_text() + " "), True),
        ("generation_config.json", lambda path: path.write_text("{}"), False),
        ("chat_template.jinja", lambda path: path.write_text("other"), False),
    ],
)
def test_weights_and_config_count_and_the_tokenizer_does_not(
    tiny: Path, tmp_path: Path, name: str, change: Callable[[Path], object], counts: bool
) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    change(copy / name)
    assert (base_fingerprint(files_of(copy), BaseSpec()) != base_fingerprint(files_of(tiny), BaseSpec())) is counts


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"quantization": "nf4"}, {"quantization": "int8"}, False),
        ({"quantization": "nf4"}, {"quantization": "none"}, False),
        ({"double_quantization": True}, {"double_quantization": False}, False),
        (
            {"quantization": "int8", "double_quantization": True},
            {"quantization": "int8", "double_quantization": False},
            True,
        ),
        ({"compute_dtype": "float32"}, {"compute_dtype": "bfloat16"}, True),
        ({"attention": "sdpa"}, {"attention": "eager"}, True),
        ({"gradient_checkpointing": True}, {"gradient_checkpointing": False}, True),
    ],
)
def test_only_settings_that_change_the_weights_count(
    tiny: Path, one: dict[str, object], other: dict[str, object], same: bool
) -> None:
    digests = [base_fingerprint(files_of(tiny), BaseSpec.model_validate(values)) for values in (one, other)]
    assert (digests[0] == digests[1]) is same


def test_a_renamed_gguf_file_is_the_same_base(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF and so on")
    one, other = (resolve(f"path:{name}", tmp_path) for name in ("a.gguf", "b.gguf"))
    assert base_fingerprint(one, BaseSpec()) == base_fingerprint(other, BaseSpec())


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path, cache = tmp_path / "weights", tmp_path / "cache"
    path.write_bytes(b"first")
    assert file_digest(path, cache) == hashlib.sha256(b"first").hexdigest()
    stat = path.stat()
    path.write_bytes(b"other")  # same size; with the old time it cannot be told from the old file
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file_digest(path, cache) == hashlib.sha256(b"first").hexdigest(), "it was not remembered"
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert file_digest(path, cache) == hashlib.sha256(b"other").hexdigest()
    assert file_digest(path) == hashlib.sha256(b"other").hexdigest()


@pytest.mark.parametrize("garbage", ["", "{", "[]", '"text"', '{"file": 1}'])
def test_a_spoilt_note_is_ignored(tmp_path: Path, garbage: str) -> None:
    path, cache = tmp_path / "weights", tmp_path / "cache"
    path.write_bytes(b"content")
    file_digest(path, cache)
    [note] = (cache / "digests").iterdir()
    note.write_text(garbage)
    assert file_digest(path, cache) == hashlib.sha256(b"content").hexdigest()


def test_the_tokenizer_digest_ignores_form_and_passing_state() -> None:
    body = {"version": "1.0", "model": {"vocab": {"a": 0, "b": 1}}, "truncation": None, "padding": None}
    used = {"padding": {"length": 3}, "truncation": {"max": 2}, "model": body["model"], "version": "1.0"}
    ids = {"eos": 1}
    plain = tokenizer_digest(json.dumps(body), "template", ids)
    assert tokenizer_digest(json.dumps(used, indent=3), "template", ids) == plain
    assert tokenizer_digest(json.dumps(body), "other template", ids) != plain
    assert tokenizer_digest(json.dumps(body), "template", {"eos": 0}) != plain
    assert tokenizer_digest(json.dumps({**body, "version": "2"}), "template", ids) != plain


def test_the_tokenizer_source_digest_follows_the_chat_template(tiny: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    before = tokenizer_source_digest(files_of(copy))
    assert before == tokenizer_source_digest(files_of(tiny))
    (copy / "chat_template.jinja").write_text("other")
    assert tokenizer_source_digest(files_of(copy)) != before
