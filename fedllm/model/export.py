"""A trained adapter as a folder that PEFT loads: `adapter_config.json` and `adapter_model.safetensors`.

The folder is what users take away, and PEFT reads it without fedllm: ``PeftModel.from_pretrained(base, folder)``. An
adapter with side factors becomes one of a larger rank and scale 1 (:mod:`fedllm.lora.joined`). Each of the folder's two
files is replaced whole, the config first, so a reader never meets weights without their scale.

LoRA's factors are saved under the names of the layout. A soft prompt is one tensor in PEFT's files; of P-tuning that is the
prompt which its network computes, so what was trained as P-tuning is read back as a prompt (:func:`served_as`).
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedllm.errors import ModelError, explain
from fedllm.files import atomic_write
from fedllm.lora.joined import joined
from fedllm.model.prompts.tensors import EXPORTED, exported
from fedllm.model.spec import AdapterSpec, LoraSpec, ModelSpec, PromptSpec, PtuningSpec, SoftPromptSpec, common_part
from fedllm.update import Arrays, Layout, check_arrays, taken

_PEFT_TYPES = {"prompt": "PROMPT_TUNING", "prefix": "PREFIX_TUNING", "ptuning": "P_TUNING"}

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def save_peft_adapter(
    folder: Path,
    layout: Layout,
    arrays: Arrays,
    spec: ModelSpec,
    target_modules: list[str],
    base_name_or_path: str,
) -> None:
    """Write an adapter for PEFT.

    Args:
        folder: Where; made if missing.
        layout: The adapter's tensors.
        arrays: Their values, checked before anything is written.
        spec: What PEFT has to know of the adapter is taken from it.
        target_modules: Names of the adapted modules, for LoRA.
        base_name_or_path: What the config says about the base, for people; PEFT does not check it.

    Raises:
        LayoutError: The arrays do not fit the layout.
        NonFiniteError: A value is NaN or infinite.
    """
    check_arrays(arrays, layout, f"the adapter for {folder}")
    if isinstance(spec.adapter, LoraSpec):
        adapter, layout, arrays = joined(spec.adapter, layout, arrays)
        tensors, config = taken(arrays, layout), _lora_config(adapter, target_modules)
    else:
        tensors = {EXPORTED: exported(arrays, layout)}
        config = _soft_prompt_config(spec.adapter, len(tensors[EXPORTED]))
    config |= {"task_type": "CAUSAL_LM", "base_model_name_or_path": base_name_or_path, "inference_mode": True}
    # PEFT asks the metadata for the framework that wrote the file and refuses none; "pt" is what it writes itself.
    weights = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, metadata={"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")
    atomic_write(folder / WEIGHTS_FILE, weights)


def served_as(adapter: AdapterSpec, folder: Path | None = None) -> AdapterSpec:
    """Return what an exported global adapter is read back as: P-tuning as the prompt that it computed, LoRA at its rank.

    Args:
        adapter: What was trained.
        folder: Where it was exported to, None where none is read.

    Raises:
        ModelError: The folder's config cannot be read.
    """
    if isinstance(adapter, PtuningSpec):
        return PromptSpec(num_virtual_tokens=adapter.num_virtual_tokens)
    return _as_exported(adapter, folder) if isinstance(adapter, LoraSpec) and folder else common_part(adapter)


def _as_exported(adapter: LoraSpec, folder: Path) -> LoraSpec:
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text())
        scale = {"rank": int(config["r"]), "alpha": float(config["lora_alpha"]), "rslora": bool(config["use_rslora"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        found = f"{type(error).__name__}: {error}"
        raise ModelError(explain("an adapter's config cannot be read", found=found, where=path)) from error
    return adapter.model_copy(update={**scale, "min_rank": 0, "side_rank": 0, "num_heads": 0, "personal_rank": 0})


def load_peft_adapter(folder: Path) -> Arrays:
    """Read an adapter's values as float32, under the names of PEFT's file.

    Those of a soft prompt become the tensors of a layout with :func:`fedllm.model.prompts.tensors.imported`.

    Raises:
        ModelError: The weights are missing or not safetensors.
    """
    path = folder / WEIGHTS_FILE
    try:
        tensors = load(path.read_bytes())
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise ModelError(
            explain("an adapter cannot be read", found=f"{type(error).__name__}: {error}", where=path)
        ) from error
    return {name: np.asarray(value, np.float32) for name, value in tensors.items()}


def _soft_prompt_config(adapter: SoftPromptSpec, num_virtual_tokens: int) -> dict[str, object]:
    return {
        "peft_type": _PEFT_TYPES[adapter.kind],
        "num_virtual_tokens": num_virtual_tokens,
        "num_transformer_submodules": 1,
    }


def _lora_config(adapter: LoraSpec, target_modules: list[str]) -> dict[str, object]:
    """Return the settings that decide what the adapter computes; PEFT fills in its defaults for the rest."""
    return {
        "peft_type": "LORA",
        "r": adapter.rank,
        "lora_alpha": int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha,
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rslora,
        "target_modules": sorted(target_modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }
