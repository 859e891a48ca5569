"""The estimate of training's memory against what training takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from fedllm.config import RunConfig
from fedllm.model.allocations import LiveBytes
from fedllm.model.build import attach_adapter, read_architecture
from fedllm.model.footprint import Footprint, estimate
from fedllm.model.source import resolve
from fedllm.model.spec import AdapterSpec, BaseSpec, LoraSpec, ModelSpec, PrefixSpec, PromptSpec, PtuningSpec
from tests.bases import SMOLLM, load_tiny
from tests.training_memory import LENGTH, ROWS, train_fully

ROOT = Path(__file__).parents[2]


def estimated(config: Any, spec: BaseSpec, adapter: AdapterSpec | None = None, optimizer: str = "adamw") -> Footprint:
    model = ModelSpec(base=spec, adapter=adapter or LoraSpec())
    return estimate(config, model, batch_size=ROWS, max_length=LENGTH, optimizer=optimizer)


@pytest.mark.parametrize(
    ("settings", "adapter"),
    [
        ({}, LoraSpec()),
        ({"gradient_checkpointing": True}, LoraSpec()),
        ({"quantization": "int8"}, LoraSpec(rank=32, target_modules="all-linear")),
        ({"quantization": "none", "attention": "eager"}, LoraSpec(dropout=0.1)),
        ({}, PromptSpec(num_virtual_tokens=8)),
        ({}, PrefixSpec(num_virtual_tokens=8)),
        ({}, PtuningSpec(num_virtual_tokens=8)),
    ],
    ids=lambda value: value.kind if not isinstance(value, dict) else "-".join(map(str, value.values())) or "defaults",
)
def test_a_rehearsed_step_takes_what_a_real_one_takes(
    tmp_path: Path, settings: dict[str, Any], adapter: AdapterSpec
) -> None:
    base = load_tiny(tmp_path, **settings)
    model = attach_adapter(base, adapter)
    expected = estimated(base.model.config, base.spec, adapter)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with LiveBytes([*model.parameters(), *model.buffers()]) as live:
        train_fully(base, adapter, steps=1)
    assert expected.step == pytest.approx(live.peak, rel=0.1)
    assert (expected.adapter, expected.optimizer) == (4 * trained, 8 * trained)


@pytest.mark.parametrize(
    "settings",
    [
        {"double_quantization": True},
        {"double_quantization": False},
        {"quantization": "int8"},
        {"quantization": "none"},
        {"compute_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_the_bytes_of_a_base_are_those_that_it_holds(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = load_tiny(tmp_path, tie_embeddings=False, **settings)
    assert estimated(base.model.config, base.spec).base == pytest.approx(held_bytes(base.model), rel=0.01)


def held_bytes(model: nn.Module) -> int:
    """Count every tensor that a model and its quantized weights hold, once."""
    found: dict[int, int] = {}
    todo: list[Any] = [*model.parameters(), *model.buffers()]
    while todo:
        item = todo.pop()
        if isinstance(item, torch.Tensor):
            found[item.data_ptr()] = item.numel() * item.element_size()
        inner = [getattr(item, name, None) for name in ("quant_state", "state2", "absmax", "code", "offset", "SCB")]
        todo += [each for each in inner if each is not None]
    return sum(found.values())


def test_what_saves_memory_saves_it(tmp_path: Path) -> None:
    config = load_tiny(tmp_path).model.config
    plain = estimated(config, BaseSpec())
    assert estimated(config, BaseSpec(gradient_checkpointing=True)).step < 0.7 * plain.step
    assert estimated(config, BaseSpec(quantization="none")).base > 2 * plain.base
    assert estimated(config, BaseSpec(compute_dtype="bfloat16")).step < 0.8 * plain.step
    assert estimated(config, BaseSpec(), optimizer="sgd").optimizer == 0
    assert estimated(config, BaseSpec(), optimizer="adamw-8bit").optimizer < 0.3 * plain.optimizer


def test_an_estimate_changes_nothing_for_who_computes_afterwards(tmp_path: Path) -> None:
    config = load_tiny(tmp_path).model.config
    query = torch.ones(1, 1, 2, 4)
    before = nn.functional.scaled_dot_product_attention
    estimated(config, BaseSpec())
    assert nn.functional.scaled_dot_product_attention is before
    assert torch.equal(before(query, query, query), query)


def test_a_model_far_too_large_for_this_machine_is_estimated_from_its_config_alone() -> None:
    config = AutoConfig.for_model(
        "llama",
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=4,  # of 80, to be quick
        num_attention_heads=64,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    found = estimated(config, BaseSpec(compute_dtype="bfloat16"))
    layer = 8192 * (8192 * 2 + 1024 * 2 + 28672 * 3)
    assert found.base == pytest.approx(4 * layer * 4.127 / 8 + 2 * 128256 * 8192 * 2, rel=0.01)


SMALL = {"gradient_checkpointing": True}


@pytest.mark.parametrize(
    ("settings", "keeps_freed_blocks"),
    [
        pytest.param({}, True, id="plain"),
        pytest.param({}, False, id="plain-trimmed", marks=pytest.mark.slow),
        pytest.param(SMALL, True, id="checkpointed", marks=pytest.mark.slow),
        pytest.param(SMALL, False, id="checkpointed-trimmed", marks=pytest.mark.slow),
    ],
)
def test_the_demos_training_takes_what_was_estimated(settings: dict[str, Any], keeps_freed_blocks: bool) -> None:
    """The demo's base, batch and length, as the doctor assumes them; a process of its own, and its resident memory."""
    sizes = RunConfig()
    assert (sizes.train.batch_size, sizes.data.max_length) == (ROWS, LENGTH), "what is measured is what the demo does"
    found = estimated(read_architecture(resolve(SMOLLM, ROOT)), BaseSpec(**settings))
    peak = measured_peak(settings, keeps_freed_blocks=keeps_freed_blocks)
    assert found.peak - (0 if keeps_freed_blocks else found.reserve) == pytest.approx(peak, rel=0.2)


def measured_peak(settings: dict[str, Any], *, keeps_freed_blocks: bool) -> int:
    """Train SmolLM2 in a process of its own and return its peak; glibc can be told to keep no freed block."""
    blocks = {} if keeps_freed_blocks else {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "tests.training_memory", json.dumps(settings)]
    environment = os.environ | blocks | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=True)
    return int(json.loads(done.stdout)["peak"])
