"""The check before training: server and site must hold the same thing.

Before round 1, and for every site that joins later, a site states what it really holds. Sites that state the same can
train together; one that differs is left out, with both values in the message. Nothing here loads a model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from fedllm.errors import AgreementError, explain


class Agreement(BaseModel):
    """What one party holds; equal values can train together.

    Attributes:
        fedllm_version: Release of this package.
        flower_version: Release of flwr.
        base: Fingerprint of the base: its files and how it is quantized.
        tokenizer: Digest of the tokenizer and its chat template.
        quantization: How the base is held, for example ``nf4+double``.
        layout: Digest of the adapter's layout.
        initial: Digest of the values that the adapter starts from, which every party makes for itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fedllm_version: str
    flower_version: str
    base: str
    tokenizer: str
    quantization: str
    layout: str
    initial: str


def differences(expected: Agreement, found: Agreement) -> list[str]:
    """Return one clause for each field that differs, with both values; empty when they agree."""
    pairs = [(name, getattr(expected, name), getattr(found, name)) for name in Agreement.model_fields]
    return [
        f"{name}: the federation has {ours}, the site has {theirs}" for name, ours, theirs in pairs if ours != theirs
    ]


def check_agreement(expected: Agreement, found: Agreement, site: str) -> None:
    """Refuse a site that differs.

    Raises:
        AgreementError: With every differing field and both values.
    """
    clauses = differences(expected, found)
    if clauses:
        fix = "Bring the site to the federation's model and versions, or leave it out."
        raise AgreementError(explain(f"site {site!r} does not agree; " + "; ".join(clauses), fix=fix))


def common_ground(stated: Mapping[str, Agreement]) -> Agreement:
    """Return the agreement that most sites state; a tie goes to the one that comes first by its text.

    Args:
        stated: What each site states, by the site's name; not empty.
    """
    counts = Counter(stated.values())
    return min(counts, key=lambda agreement: (-counts[agreement], agreement.model_dump_json()))


def describe_quantization(quantization: str, double_quantization: bool) -> str:
    """Return the text that :attr:`Agreement.quantization` holds."""
    return "nf4+double" if quantization == "nf4" and double_quantization else quantization


def names_of(sites: Sequence[str], limit: int = 8) -> str:
    """Return sites' names for a sentence, cut after `limit`."""
    shown = ", ".join(sites[:limit])
    return shown if len(sites) <= limit else f"{shown} and {len(sites) - limit} more"
