"""A LoRA on all linear layers of a Llama-7B-shaped model, and sites' updates of it in spooled files."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from fedllm import rng
from fedllm.agreement import Agreement
from fedllm.codecs.payload import encode_payload
from fedllm.config import RunConfig
from fedllm.lora.pairs import with_rank
from fedllm.messages import TrainReport
from fedllm.update import Arrays, Layout, TensorSpec
from fedllm.work import ClientWork
from server_app.arrivals import Arrivals
from server_app.broadcast import Broadcast, Start
from server_app.checkpoint import RunState
from server_app.folding import Accepted
from strategies.slots import OptimizerState, Strategy

HIDDEN, INNER = 4096, 11008
MODULES = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (INNER, HIDDEN)),
    "mlp.down_proj": (HIDDEN, INNER),
}
"""Rows and columns of a block's linear layers."""

STATE_ID, BASE = "0" * 64, "benchmark"
SIZE, STEP, DROPPED = 1e-2, 1e-3, 1e-5
"""Standard deviations: of the state's factors, of what a site changes, of what a lossy downlink dropped."""


def layout_of(num_blocks: int, rank: int, *, shrink: int = 1) -> Layout:
    """Return the layout of LoRA factors on so many blocks.

    Args:
        num_blocks: Blocks, 32 for a 7B model.
        rank: R.
        shrink: Divides every layer's rows and columns, for tests.
    """
    tensors = []
    for block in range(num_blocks):
        for module, (num_out, num_in) in MODULES.items():
            name = f"model.layers.{block}.{module}"
            tensors.append(TensorSpec(f"{name}.lora_A.weight", (rank, num_in // shrink), role="lora_A"))
            tensors.append(TensorSpec(f"{name}.lora_B.weight", (num_out // shrink, rank), role="lora_B"))
    return Layout(tuple(tensors))


def drawn(layout: Layout, seed: int, size: float) -> Arrays:
    """Draw Gaussian values."""
    draw = rng.generator(seed, purpose="benchmark")
    return {spec.name: np.float32(size) * draw.standard_normal(spec.shape, np.float32) for spec in layout.tensors}


def start_of(config: RunConfig, strategy: Strategy, layout: Layout) -> Start:
    """Return a state in mid-training, side factors included, and what sites decoded of it over a lossy downlink."""
    layout = with_rank(layout, config.adapter.rank, strategy.side_rank)
    params = drawn(layout, 0, SIZE)
    received = {name: value + np.float32(DROPPED) for name, value in params.items()}
    names = {"base": BASE, "tokenizer": "", "quantization": "", "layout": layout.digest, "initial": ""}
    agreement = Agreement(fedllm_version="", flower_version="", **names)
    state = RunState(0, params, received, OptimizerState(), layout, tuple(MODULES), agreement, STATE_ID)
    return Start(state, Broadcast(0, STATE_ID, received))


def spool(folder: Path, layout: Layout, num_sites: int, pipeline: str) -> list[Path]:
    """Return files with the updates of so many sites, written where they are not there yet."""
    folder = folder / f"updates-{layout.digest[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{site_name(number)}.payload" for number in range(num_sites)]
    reference = {spec.name: np.zeros(spec.shape, np.float32) for spec in layout.tensors}
    for number, path in enumerate(paths):
        if not path.exists():
            partial = path.with_suffix(".partial")
            encode_payload(
                partial,
                drawn(layout, 1 + number, STEP),
                layout,
                kind="update",
                round_=1,
                base=BASE,
                pipeline=pipeline,
                reference_id=STATE_ID,
                reference=reference,
                is_difference=True,
                site=site_name(number),
                site_index=number,
            )
            partial.rename(path)
    return paths


def accepted(config: RunConfig, start: Start, work: ClientWork, files: list[Path], folder: Path) -> dict[str, Accepted]:
    """Return updates as the round loop has them once it has taken them in; folding deletes their files in `folder`."""
    sites = [site_name(number) for number in range(len(files))]
    layout = work.sent(start.state.layout)
    arriving = Arrivals(config, layout, dict.fromkeys(sites, start), work, 1, dict.fromkeys(sites, 0))
    replies = {}
    for number, (site, file) in enumerate(zip(sites, files, strict=True)):
        path = folder / f"{site}.spooled"
        os.link(file, path)
        replies[site] = Accepted(site, _report(site, 100 + number), path, path.stat().st_size, arriving)
    return replies


def site_name(number: int) -> str:
    """Return a site's name; names sort as numbers do."""
    return f"site-{number:04d}"


def _report(site: str, num_examples: int) -> TrainReport:
    return TrainReport(
        site=site,
        round=1,
        num_examples=num_examples,
        num_tokens=1,
        num_steps=1,
        loss=1.0,
        loss_last=1.0,
        grad_norm=1.0,
        seconds=1.0,
    )
