"""Load a quantized base: from the cache in a second or two, or from its source once.

A base is read from its source, quantized on the CPU, stored in the cache, and then always loaded from there, so the first
load and every later one give the same bits. Weights stay mapped from the cache's file: processes of one machine share
them, and pages that are not used need no memory.

The tokenizer is cached beside it, because building one from a GGUF file takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedllm.errors import ModelError, explain
from fedllm.model import cache, fingerprint
from fedllm.model.adapter import (
    adapter_target_modules,
    attach_adapter,
    first_values,
    layout_of,
    only_trainable,
    read_adapter,
    write_adapter,
)
from fedllm.model.quantize import assemble, stored_tensors
from fedllm.model.source import BaseFiles, resolve
from fedllm.model.spec import AdapterSpec, BaseSpec

__all__ = [
    "LoadedBase",
    "adapter_target_modules",
    "attach_adapter",
    "cached_base",
    "first_values",
    "layout_of",
    "load_base",
    "load_tokenizer",
    "only_trainable",
    "read_adapter",
    "read_architecture",
    "write_adapter",
]

_WEIGHTS = "base.safetensors"
_FOREIGN_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError)
log = logging.getLogger(__name__)


@dataclass
class Slot:
    """The adapter that a base carries at the moment."""

    model: PeftModel | None = None
    adapter: AdapterSpec | None = None


@dataclass(frozen=True)
class LoadedBase:
    """A base in memory, frozen and in evaluation mode.

    Attributes:
        spec: What it was built from.
        model: The model; quantized as the spec says, on its device.
        tokenizer: With chat template.
        fingerprint: Of the weights held (:func:`fedllm.model.fingerprint.base_fingerprint`).
        tokenizer_digest: Of what the tokenizer does.
        seconds: Wall time of loading.
        from_cache: Whether the quantized weights were in the cache already.
        attached: The adapter on it; :func:`attach_adapter` keeps it.
    """

    spec: BaseSpec
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    tokenizer_digest: str
    seconds: float
    from_cache: bool
    attached: Slot = field(default_factory=Slot, repr=False, compare=False)


def load_base(spec: BaseSpec, *, home: Path, cache_dir: Path, device: str = "auto") -> LoadedBase:
    """Load a base, quantizing it first if the cache does not hold it.

    Args:
        spec: Which base and how it is held.
        home: Where relative `path:` sources start.
        cache_dir: Where quantized bases are kept.
        device: A torch device, or `auto`: CUDA if there is one, else the CPU.

    Raises:
        ModelError: The base cannot be found, read, quantized or stored.
    """
    start = time.perf_counter()
    files = resolve(spec.source, home)
    digest = fingerprint.base_fingerprint(files, spec, cache_dir=cache_dir)
    entry = cache.obtain(cache_dir / "bases", digest, lambda folder: _store_base(files, spec, folder))
    words = _tokenizer_entry(files, cache_dir)
    with _as_model_error(files.source, "assembled"), _quiet():
        config = AutoConfig.from_pretrained(entry.folder, local_files_only=True)
        model = assemble(config, load_file(entry.folder / _WEIGHTS), spec, _device(device))
        model.generation_config = GenerationConfig.from_pretrained(entry.folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(words.folder, local_files_only=True)
    seconds = time.perf_counter() - start
    log.info("base %s (%s) from %s in %.1f s", spec.source, digest[:12], "source" if entry.is_new else "cache", seconds)
    return LoadedBase(spec, model, tokenizer, digest, str(words.facts["digest"]), seconds, from_cache=not entry.is_new)


@lru_cache(maxsize=1)
def cached_base(spec: BaseSpec, *, home: Path, cache_dir: Path, device: str = "auto") -> LoadedBase:
    """Return the process's base, loading it on the first call; asking for another one lets the old one go.

    It is shared: whoever attaches an adapter to it replaces the one that it carries.
    """
    return load_base(spec, home=home, cache_dir=cache_dir, device=device)


def load_tokenizer(files: BaseFiles, *, cache_dir: Path) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer alone, as :func:`load_base` does.

    Raises:
        ModelError: It cannot be read or stored.
    """
    words = _tokenizer_entry(files, cache_dir)
    with _as_model_error(files.source, "assembled"), _quiet():
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(words.folder, local_files_only=True)
    return tokenizer


def read_architecture(files: BaseFiles) -> PretrainedConfig:
    """Return a base's config, and read no weight.

    Raises:
        ModelError: It cannot be read.
    """
    gguf = {"gguf_file": files.gguf_file} if files.gguf_file else {}
    with _as_model_error(files.source, "read"), _quiet():
        config: PretrainedConfig = AutoConfig.from_pretrained(
            files.folder, **gguf, local_files_only=True, trust_remote_code=False
        )
    vars(config).pop("quantization_config", None)
    return config


def _device(wanted: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _store_base(files: BaseFiles, spec: BaseSpec, folder: Path) -> cache.Facts:
    """Read the dense model, quantize it and write what :func:`load_base` reads."""
    log.info("quantizing %s to %s; this is done once", files.source, spec.quantization)
    with _as_model_error(files.source, "read"), _quiet(), torch.no_grad():
        dense = _read_dense(files)
        tensors = stored_tensors(dense, spec)
    (folder / "config.json").write_text(dense.config.to_json_string(), encoding="utf-8")
    (folder / "generation_config.json").write_text(dense.generation_config.to_json_string(), encoding="utf-8")
    try:
        save_file(tensors, folder / _WEIGHTS)
    except SafetensorError as error:
        raise OSError(error) from error  # a full disk: the cache says what to do about it
    return {"source": files.source, "quantization": spec.quantization, "num_tensors": len(tensors)}


def _read_dense(files: BaseFiles) -> PreTrainedModel:
    """Read the model as its source has it; safetensors stay mapped, so this needs little memory."""
    gguf = {"gguf_file": files.gguf_file, "dtype": torch.float32} if files.gguf_file else {"dtype": "auto"}
    if files.config:
        _refuse_quantized(files.config)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        files.folder,
        **gguf,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    model: PreTrainedModel
    model, report = loaded
    if absent := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        raise ModelError(
            explain(
                "a base's weights are incomplete",
                expected="a value for every parameter",
                found=f"{len(absent)} missing or of another shape, such as {absent[0]}",
                where=files.folder,
            )
        )
    vars(model.config).pop("quantization_config", None)  # what a GGUF file leaves behind; the weights are dense now
    model.config.name_or_path = ""
    return model


def _refuse_quantized(config: Path) -> None:
    method = json.loads(config.read_text(encoding="utf-8")).get("quantization_config")
    if method:
        raise ModelError(
            explain(
                "the base is quantized already",
                expected="float weights, or a GGUF file",
                found=method.get("quant_method", method),
                where=config,
                fix="Name the original model; fedllm quantizes it itself, so that all parties hold the same weights.",
            )
        )


def _tokenizer_entry(files: BaseFiles, cache_dir: Path) -> cache.Entry:
    key = fingerprint.tokenizer_source_digest(files, cache_dir=cache_dir)
    return cache.obtain(cache_dir / "tokenizers", key, lambda folder: _store_tokenizer(files, folder))


def _store_tokenizer(files: BaseFiles, folder: Path) -> cache.Facts:
    gguf = {"gguf_file": files.gguf_file} if files.gguf_file else {}
    with _as_model_error(files.source, "read"), _quiet():
        tokenizer = AutoTokenizer.from_pretrained(files.folder, **gguf, local_files_only=True, trust_remote_code=False)
        digest = _digest(tokenizer)
    tokenizer.save_pretrained(folder)
    return {"digest": digest}


def _digest(tokenizer: Any) -> str:
    """Return the digest of what a tokenizer does."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise ModelError(explain("the base has no fast tokenizer", found=type(tokenizer).__name__))
    ids = {use: getattr(tokenizer, f"{use}_token_id") for use in ("bos", "eos", "pad", "unk")}
    return fingerprint.tokenizer_digest(tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template, ids)


@contextlib.contextmanager
def _as_model_error(source: str, action: str) -> Iterator[None]:
    """Turn whatever the libraries raise into a :class:`ModelError` that names the base."""
    try:
        yield
    except ModelError:
        raise
    except _FOREIGN_ERRORS as error:
        raise ModelError(
            explain(f"a base model cannot be {action}", found=f"{type(error).__name__}: {error}", where=source)
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and advice of the libraries off the terminal while a model loads."""
    advice = transformers.utils.logging
    level, has_bars = advice.get_verbosity(), advice.is_progress_bar_enabled()
    advice.set_verbosity_error()
    advice.disable_progress_bar()
    try:
        # The progress bar of the GGUF reader knows no switch.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        advice.set_verbosity(level)
        if has_bars:
            advice.enable_progress_bar()
