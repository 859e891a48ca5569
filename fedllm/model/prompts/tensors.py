"""What a soft prompt's tensors are called here, and how they become the one tensor that PEFT saves.

Kinds and tensors:

- ``prompt``: ``prompt_embeddings`` [M, H], role ``prompt``: the very tensor of PEFT's file.
- ``prefix``: ``prefix.<layer>`` [M, 2 D], role ``prefix``: one tensor a layer, its keys before its values, so that layers
  can be told apart; PEFT saves them side by side.
- what a site trains for itself of these two: ``personal_embeddings`` and ``personal.<layer>``, of role
  ``personal_prompt`` and ``personal_prefix``. Its virtual tokens come behind the shared ones.
- ``ptuning``: ``prompt_encoder.*``, role ``encoder_input`` for the embeddings [M, H] that enter the network and
  ``encoder`` for its weights. All of them travel and are averaged; PEFT saves what the network computes.

Shape legend: M virtual tokens, H hidden size, D width of one layer's keys, N layers, E width of the network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedllm.errors import LayoutError, explain
from fedllm.update import Arrays, Layout
from fedllm.work import PERSONAL

EXPORTED = "prompt_embeddings"
"""Name of the one tensor in PEFT's file of a soft prompt."""

PREFIX = "prefix."
PERSONAL_PROMPT = "personal_embeddings"
PERSONAL_PREFIX = "personal."
ENCODER = "prompt_encoder."
ENCODER_INPUT = f"{ENCODER}embedding.weight"
TOKEN_ROLES = ("prompt", "prefix", "encoder_input")
"""Roles of tensors with one row for each shared virtual token."""

_ROLES = {EXPORTED: "prompt", PERSONAL_PROMPT: "personal_prompt", ENCODER_INPUT: "encoder_input"}
_ROLES_OF_LAYERS = {PREFIX: "prefix", PERSONAL_PREFIX: "personal_prefix", ENCODER: "encoder"}
_ENCODER_LAYERS = (0, 2, 4)
"""Numbers of the linear layers in the network; ReLUs stand between them."""


def role_of(name: str) -> str:
    """Return the role of a soft prompt's tensor; ``other`` where the name is none's."""
    if name in _ROLES:
        return _ROLES[name]
    return next((role for start, role in _ROLES_OF_LAYERS.items() if name.startswith(start)), "other")


def with_first_tokens(arrays: Arrays, layout: Layout, count: int) -> tuple[Arrays, Layout]:
    """Return a soft prompt without the shared virtual tokens behind the first so many, and its layout."""
    shorter = {
        spec.name: arrays[spec.name][:count] if spec.role in TOKEN_ROLES else arrays[spec.name]
        for spec in layout.tensors
    }
    return shorter, Layout(tuple(replace(spec, shape=shorter[spec.name].shape) for spec in layout.tensors))


def exported(arrays: Arrays, layout: Layout) -> NDArray[np.float32]:
    """Return the tensor that PEFT saves: [M, H], for a prefix [M, N 2 D]. M counts a site's own tokens, if they are there.

    Args:
        arrays: A soft prompt of any kind.
        layout: Its layout.
    """
    if ENCODER_INPUT in layout:
        return _encoded(arrays)
    own = [spec.name for spec in layout.tensors if spec.role in PERSONAL]
    rows = [[name for name in layout.names if name not in own], own]
    return np.concatenate([np.concatenate([arrays[name] for name in row], axis=1) for row in rows if row], axis=0)


def imported(saved: Arrays, layout: Layout) -> Arrays:
    """Return the tensors of a layout from those of PEFT's file: the inverse of :func:`exported`; LoRA's stay as they are.

    Raises:
        LayoutError: The saved soft prompt does not fit the layout.
    """
    if EXPORTED not in saved or EXPORTED in layout:
        return saved
    whole, widths = saved[EXPORTED], [spec.shape[-1] for spec in layout.tensors]
    if whole.ndim != 2 or whole.shape[1] != sum(widths):
        expected = f"a prefix of width {sum(widths)}"
        raise LayoutError(explain("a saved soft prompt does not fit the layout", expected=expected, found=whole.shape))
    parts = np.split(whole, np.cumsum(widths)[:-1], axis=1)
    return {name: np.ascontiguousarray(part) for name, part in zip(layout.names, parts, strict=True)}


def _encoded(arrays: Arrays) -> NDArray[np.float32]:
    """Compute the prompt as PEFT's network does: linear [E, H], ReLU, linear [E, E], ReLU, linear [H, E]."""
    hidden: NDArray[Any] = arrays[ENCODER_INPUT].astype(np.float64)  # [M, H]
    for number in _ENCODER_LAYERS:
        if number:
            hidden = np.maximum(hidden, 0)
        layer = f"{ENCODER}mlp_head.{number}"
        hidden = hidden @ arrays[f"{layer}.weight"].T.astype(np.float64) + arrays[f"{layer}.bias"]
    return hidden.astype(np.float32)
