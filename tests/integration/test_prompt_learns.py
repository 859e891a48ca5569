"""A soft prompt on the real 4-bit model and the demo's data: twenty virtual tokens learn in two dozen steps at one site."""

from __future__ import annotations

from pathlib import Path

import pytest

from client_app.training import TrainPlan, train
from fedllm.config import DataConfig, SimulationConfig
from fedllm.data.batches import batch_stream
from fedllm.data.partition import partition
from fedllm.data.prepare import SiteData, prepare_site
from fedllm.data.sources import load_examples
from fedllm.model.build import attach_adapter, first_values, layout_of, write_adapter
from fedllm.model.evaluate import evaluate_loss
from fedllm.model.generate import without_adapter
from fedllm.model.spec import PrefixSpec, PromptSpec, SoftPromptSpec
from tests.bases import smollm

SEED, NUM_STEPS, RATE = 42, 24, 0.01


def second_site() -> SiteData:
    """Return what the demo's second site of four holds, with all of its text."""
    data = DataConfig(max_holdout_examples=48)
    examples = list(load_examples(data.source, data.format, Path("."), deduplicate=data.deduplicate))
    indices = partition(examples, SimulationConfig(), 4, SEED)[1]
    return prepare_site([examples[index] for index in indices], smollm().tokenizer, data, SEED)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("adapter", [PromptSpec(), PrefixSpec()], ids=["prompt", "prefix"])
def test_twenty_virtual_tokens_lower_the_held_out_loss(adapter: SoftPromptSpec) -> None:
    """Measured: from 4.01 without and 3.88 with the untrained prompt to 3.52; a prefix from 4.22 to 3.49."""
    base, site = smollm(), second_site()
    model = attach_adapter(base, adapter)
    layout = layout_of(model)
    write_adapter(model, layout, first_values(base, adapter, layout, SEED))
    with without_adapter(model):
        before = evaluate_loss(model, site.holdout, 8).loss
    untrained = evaluate_loss(model, site.holdout, 8).loss
    plan = TrainPlan(
        steps=NUM_STEPS,
        first_step=0,
        total_steps=NUM_STEPS,
        batch_size=2,
        learning_rate=RATE,
        warmup_fraction=0.05,
        max_grad_norm=1.0,
    )
    train(model, batch_stream(site.train, plan.batch_size, 1), plan)
    after = evaluate_loss(model, site.holdout, 8).loss
    assert after < before - 0.25
    assert after < untrained - 0.2
