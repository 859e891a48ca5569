"""What two parties compare to know that they hold the same base: a digest of its files and of how it is quantized.

The fingerprint covers the *contents* of the weight files and of `config.json`, and those settings that change the
weights held in memory. It does not cover where the files lie, the compute dtype or the attention kernel. Two parties
with the same fingerprint hold the same weights: quantization runs on the CPU everywhere and is deterministic (up to the
last bit of the mean of NF4's block scales, whose order of summation the processor decides).

Reading a model of many gigabytes to hash it takes long, so a file's digest is remembered by its real path, size and
time of change.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fedllm.errors import ModelError, explain
from fedllm.files import atomic_write
from fedllm.model.source import BaseFiles
from fedllm.model.spec import BaseSpec

SCHEME = "fedllm-base-1"
"""Changes when the same files and settings come to mean other weights."""

_CHUNK_BYTES = 1 << 22


def base_fingerprint(files: BaseFiles, spec: BaseSpec, *, cache_dir: Path | None = None) -> str:
    """Return the SHA-256 of the base's contents and quantization, 64 hexadecimal digits.

    Args:
        files: Weight and config files.
        spec: Only the settings that change the weights held count.
        cache_dir: Where digests of files are remembered; None remembers nothing.

    Raises:
        ModelError: A file cannot be read.
    """
    contents = [[_role(files, path), file_digest(path, cache_dir)] for path in _base_files(files)]
    return _digest_json({"scheme": SCHEME, "files": contents, "quantization": _quantization(spec)})


def tokenizer_source_digest(files: BaseFiles, *, cache_dir: Path | None = None) -> str:
    """Return the SHA-256 of the tokenizer's files as they lie on disk: the key under which it is cached."""
    contents = [[_role(files, path), file_digest(path, cache_dir)] for path in files.tokenizer]
    return _digest_json({"scheme": SCHEME, "tokenizer": contents})


def tokenizer_digest(
    tokenizer_json: str, chat_template: str | dict[str, str] | None, special_ids: dict[str, int | None]
) -> str:
    """Return the SHA-256 of what a tokenizer *does*, equal for every form in which it was stored.

    Args:
        tokenizer_json: The tokenizer in the JSON form of the `tokenizers` library.
        chat_template: Its Jinja chat template, or several by name.
        special_ids: Token ids by their use, for example `eos`; None where there is none.
    """
    body = json.loads(tokenizer_json)
    for passing in ("truncation", "padding"):  # state of the last call, not of the tokenizer
        body.pop(passing, None)
    return _digest_json({"tokenizer": body, "chat_template": chat_template, "special_ids": special_ids})


def file_digest(path: Path, cache_dir: Path | None = None) -> str:
    """Return a file's SHA-256, remembered while its real path, size and time of change stay the same.

    Raises:
        ModelError: It cannot be read.
    """
    real = path.resolve()
    try:
        stat = real.stat()
        identity = [str(real), stat.st_size, stat.st_mtime_ns]
        note = (
            cache_dir / "digests" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:32]}.json" if cache_dir else None
        )
        return _recall(note, identity) or _remember(note, identity, _sha256(real))
    except OSError as error:
        raise ModelError(explain("a base model's file cannot be read", found=error, where=path)) from error


def _base_files(files: BaseFiles) -> list[Path]:
    return [*files.weights, *([files.config] if files.config else [])]


def _role(files: BaseFiles, path: Path) -> str:
    """Name a file as it counts in the digest: a GGUF file may be renamed, the files of a folder may not."""
    return "gguf" if files.gguf_file else path.name


def _quantization(spec: BaseSpec) -> dict[str, object]:
    if spec.quantization == "nf4":
        return {"kind": "nf4", "double": spec.double_quantization}
    return {"kind": spec.quantization}


def _digest_json(value: object) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _recall(note: Path | None, identity: list[object]) -> str | None:
    try:
        stored = json.loads(note.read_text(encoding="utf-8")) if note else {}
        return str(stored["sha256"]) if stored.get("file") == identity else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None  # no note, or one that is not ours: hash again


def _remember(note: Path | None, identity: list[object], digest: str) -> str:
    if note:
        note.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(note, json.dumps({"file": identity, "sha256": digest}))
    return digest
