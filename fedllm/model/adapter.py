"""An adapter on a loaded base: attach it, describe it, read and write its values.

The layout lists the tensors in the order of the model's modules, so the same base and spec give the same layout
everywhere. LoRA's factors have the names that PEFT gives them in its files; those of soft prompts are in
:mod:`fedllm.model.prompts.tensors`.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from transformers import PreTrainedModel

from fedllm.errors import LayoutError, ModelError, explain
from fedllm.model import dual
from fedllm.model.heads import fold_gains, gains_of, has_several_heads, put_heads, tensor_name
from fedllm.model.initial import initial_arrays
from fedllm.model.prompts import attach as prompts
from fedllm.model.prompts.tensors import role_of
from fedllm.model.quantize import linear_names
from fedllm.model.spec import AdapterSpec, LoraSpec, PrefixSpec, PromptSpec, SoftPromptSpec
from fedllm.update import Arrays, Layout, TensorSpec, check_arrays

if TYPE_CHECKING:
    from fedllm.model.build import LoadedBase

_ADAPTER = "default"


def attach_adapter(base: LoadedBase, adapter: AdapterSpec) -> PeftModel:
    """Put an adapter on a base, in place of the one that it carries; an equal one is taken again.

    The adapter has the first values of seed 0 until others are written; with LoRA's `B = 0` the model then computes what
    the base computes. Its parameters are float32 and all that is trainable.

    Raises:
        ModelError: The target modules are not in the model, or a prefix meets gradient checkpointing.
    """
    slot = base.attached
    if slot.adapter != adapter or slot.model is None:
        if isinstance(adapter, PrefixSpec) and base.spec.gradient_checkpointing:
            raise ModelError(explain("gradient checkpointing cannot recompute a prefix", fix="Turn one of them off."))
        detach_adapter(base)
        slot.model, slot.adapter = wrap(base.model, adapter), adapter
        if base.spec.gradient_checkpointing:
            enable_checkpointing(base.model)
    if isinstance(adapter, SoftPromptSpec):
        prompts.use_first(slot.model, adapter.num_virtual_tokens)
    layout = layout_of(slot.model)
    write_adapter(slot.model, layout, first_values(base, adapter, layout, seed=0))
    slot.model.eval()
    return slot.model


def detach_adapter(base: LoadedBase) -> None:
    """Take the adapter off a base that carries one."""
    if base.attached.model is not None:
        if not prompts.is_soft_prompt(base.attached.model):  # which leaves the base as it is
            base.attached.model.unload()
        base.attached.model = base.attached.adapter = None


def first_values(base: LoadedBase, adapter: AdapterSpec, layout: Layout, seed: int) -> Arrays:
    """Return the values that an adapter starts from, the same bits wherever base, layout and seed are the same.

    Those of a prompt are rows of the base's vocabulary; all others need no base (:func:`initial_arrays`).
    """
    return (
        prompts.first_prompt(base, adapter, seed) if isinstance(adapter, PromptSpec) else initial_arrays(layout, seed)
    )


def layout_of(model: PeftModel) -> Layout:
    """Describe the adapter's tensors: PEFT's names, shapes, dtypes, roles."""
    factors = "head_" if has_several_heads(model) else "lora_"
    return Layout(
        tuple(
            TensorSpec(name, tuple(value.shape), str(value.dtype).removeprefix("torch."), _role(name, factors))
            for name, value in _parameters(model)
        )
    )


def read_adapter(model: PeftModel, layout: Layout) -> Arrays:
    """Copy the adapter's values out of the model, as float32, in the layout's order.

    Raises:
        LayoutError: The model carries another adapter.
    """
    values = _matching(model, layout)
    fold_gains(model)
    return {name: values[name].detach().float().cpu().numpy().copy() for name in layout.names}


def write_adapter(model: PeftModel, layout: Layout, arrays: Arrays) -> None:
    """Copy values into the model's adapter; all are checked before the first is changed.

    Raises:
        LayoutError: The arrays do not fit the layout, or the model carries another adapter.
        NonFiniteError: A value is NaN or infinite.
    """
    values = _matching(model, layout)
    check_arrays(arrays, layout, "the adapter to load")
    fold_gains(model)
    with torch.no_grad():
        for name in layout.names:
            values[name].copy_(torch.from_numpy(np.ascontiguousarray(arrays[name])))


@contextlib.contextmanager
def only_trainable(model: PeftModel, part: Layout) -> Iterator[dict[str, torch.nn.Parameter]]:
    """Let gradients reach these tensors of the adapter only, and yield their parameters; afterwards all of them again.

    All else is frozen by hand: where an adapter was switched off and on, PEFT takes every active one for trainable.
    """
    parameters = dict(_parameters(model))
    wanted = {name: parameters[name] for name in part.names}
    try:
        model.requires_grad_(False)
        gains = gains_of(model) if any(spec.role == "head_M" for spec in part.tensors) else []
        for parameter in (*wanted.values(), *gains):
            parameter.requires_grad_(True)
        yield wanted
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(True)


def adapter_target_modules(model: PeftModel) -> list[str]:
    """Return the names of the adapted modules as PEFT's config wants them, sorted; a soft prompt adapts none."""
    if prompts.is_soft_prompt(model):
        return []
    config: Any = model.peft_config[_ADAPTER]
    targets = config.target_modules
    return [targets] if isinstance(targets, str) else sorted(targets)


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Have a model recompute activations in the backward pass."""
    # Without re-entrance the inputs need no gradient, and the first layers no backward pass.
    model.activation_checkpointing_enable({"use_reentrant": False})


def wrap(model: PreTrainedModel, adapter: AdapterSpec) -> PeftModel:
    """Put PEFT's modules for an adapter on a model that carries none, with whatever values.

    Raises:
        ModelError: The target modules are not in the model.
    """
    config = _lora_config(model, adapter) if isinstance(adapter, LoraSpec) else prompts.peft_config(adapter)
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5 for a property under its old name; can go when it asks for the new one.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped = get_peft_model(model, config)
    assert isinstance(wrapped, PeftModel), "PEFT's mixed models are not asked for"
    if isinstance(adapter, SoftPromptSpec):
        prompts.take_apart(wrapped, adapter)
    elif adapter.num_heads:
        put_heads(wrapped, adapter.num_heads, _ADAPTER)
    elif adapter.personal_rank:
        own = {"rank": adapter.personal_rank, "alpha": adapter.scale * adapter.personal_rank, "rslora": False}
        dual.add_own(wrapped, _lora_config(model, adapter.model_copy(update=own)))
    return wrapped


def _lora_config(model: PreTrainedModel, adapter: LoraSpec) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT divides it by r; a float is as good
        lora_dropout=adapter.dropout,
        use_rslora=adapter.rslora,
        target_modules=_targets(model, adapter.target_modules),
    )


def _targets(model: PreTrainedModel, wanted: str) -> str | list[str]:
    """Turn the spec's words into what PEFT understands: names, or a regular expression."""
    known = sorted({_last(name) for name in linear_names(model)})
    architecture = model.config.model_type
    if wanted == "all-linear":
        return _all_linear(model)
    if wanted == "auto" and architecture not in DEFAULT_TARGETS:
        raise ModelError(
            explain(
                f"PEFT has no default target modules for {architecture!r}",
                found=f"linear layers {', '.join(known)}",
                fix="Name some in adapter.target_modules, or set it to 'all-linear'.",
            )
        )
    if wanted == "auto":
        default = DEFAULT_TARGETS[architecture]
        return default if isinstance(default, str) else list(default)
    names = [name.strip() for name in wanted.split(",") if name.strip()]
    unknown = [name for name in names if not _matches_any(model, name)]
    if unknown or not names:
        raise ModelError(
            explain(
                "adapter.target_modules names modules that the base does not have",
                expected=f"some of {', '.join(known)}",
                found=", ".join(unknown) or repr(wanted),
                fix="Correct the names, or use 'auto' or 'all-linear'.",
            )
        )
    return names


def _all_linear(model: PreTrainedModel) -> list[str]:
    """Name every linear layer but the head: by the last part of the name where that is enough, else in full."""
    layers = set(linear_names(model))
    last = {_last(name) for name in layers}
    catches_others = any(_last(name) in last and name not in layers for name, _ in model.named_modules())
    return sorted(layers if catches_others else last)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _matches_any(model: PreTrainedModel, name: str) -> bool:
    return any(layer == name or layer.endswith(f".{name}") for layer in linear_names(model))


def _parameters(model: PeftModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the adapter's parameters by tensor name."""
    if prompts.is_soft_prompt(model):
        yield from prompts.parameters(model)
        return
    for name, parameter in model.named_parameters():
        if "lora_" not in name or name.endswith(".gains"):
            continue
        if f".{_ADAPTER}." in name:
            yield tensor_name(name.replace(f".{_ADAPTER}.", ".")), parameter  # PEFT's files leave its own name out
        elif f".{dual.OWN}." in name:
            yield dual.tensor_name(name), parameter


def _role(name: str, factors: str) -> str:
    """Return a tensor's role; those of LoRA are the last part but one of its name, with another start for heads."""
    part = name.split(".")[-2] if "." in name else ""
    if part in ("personal_A", "personal_B"):
        return part
    return part.replace("lora_", factors) if part in ("lora_A", "lora_B", "lora_M") else role_of(name)


def _matching(model: PeftModel, layout: Layout) -> dict[str, torch.nn.Parameter]:
    """Return the adapter's parameters by name, refusing a layout that is not the model's."""
    found = layout_of(model)
    if found != layout:
        raise LayoutError(
            explain(
                "the model carries an adapter of another layout",
                expected=f"{len(layout.tensors)} tensors, digest {layout.digest[:12]}",
                found=f"{len(found.tensors)} tensors, digest {found.digest[:12]}",
            )
        )
    return dict(_parameters(model))
