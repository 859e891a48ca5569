"""RoLoRA against FFA-LoRA where the truth is known: federated linear regression of rank one (arXiv 2502.01755, section 4).

Every site holds ``y = W x`` with one ``W = b a^T`` of rank one. With A frozen at random, the best B leaves a floor that no
round removes; training both in turn converges exponentially. The strategies' own work plans, aggregator and optimizer are
used; the sites are a few lines of NumPy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedllm import rng
from fedllm.config import read_run_config
from fedllm.model.initial import initial_arrays
from fedllm.update import Arrays, Contribution, Layout, TensorSpec
from strategies.registry import build_strategy
from strategies.slots import ArraySource, OptimizerState, Origin

NUM_IN, NUM_OUT, NUM_SITES, NUM_SAMPLES, LOCAL_STEPS, RATE = 12, 8, 4, 60, 60, 0.05
LAYOUT = Layout((TensorSpec("A", (1, NUM_IN), role="lora_A"), TensorSpec("B", (NUM_OUT, 1), role="lora_B")))

Matrix = NDArray[np.float64]
_draw = rng.generator(3, purpose="regression")
A_TRUE = _draw.standard_normal((1, NUM_IN))
W_TRUE: Matrix = _draw.standard_normal((NUM_OUT, 1)) @ A_TRUE / np.linalg.norm(A_TRUE)
INPUTS: list[Matrix] = [_draw.standard_normal((NUM_SAMPLES, NUM_IN)) for _ in range(NUM_SITES)]


def loss(state: Arrays) -> float:
    error = state["B"].astype(np.float64) @ state["A"].astype(np.float64) - W_TRUE
    return float(np.mean([np.sum((inputs @ error.T) ** 2) / NUM_SAMPLES for inputs in INPUTS]))


def train(state: Arrays, inputs: Matrix, trained: Layout) -> Arrays:
    """Take local gradient steps on the trained factors only; return `trained - received`."""
    local = {name: value.astype(np.float64) for name, value in state.items()}
    covariance = inputs.T @ inputs / NUM_SAMPLES
    for _ in range(LOCAL_STEPS):
        slope = (local["B"] @ local["A"] - W_TRUE) @ covariance
        gradient = {"A": local["B"].T @ slope, "B": slope @ local["A"].T}
        size = {"A": float(np.sum(local["B"] ** 2)), "B": float(np.sum(local["A"] ** 2))}
        for name in trained.names:
            local[name] -= RATE / max(size[name], 1e-12) * gradient[name]
    return {name: (local[name] - state[name]).astype(np.float32) for name in trained.names}


def course(name: str, num_rounds: int) -> list[float]:
    """Return the loss before every round and after the last."""
    strategy = build_strategy(read_run_config({"strategy.name": name}))
    state, optimizer = initial_arrays(LAYOUT, 0), OptimizerState()
    losses = [loss(state)]
    for round_ in range(1, num_rounds + 1):
        work = strategy.work.at(round_)
        aggregation = strategy.aggregator.start(work.sent(LAYOUT), Origin(round_, LAYOUT, state, state))
        for index, inputs in enumerate(INPUTS):
            delta = train(state, inputs, work.trained(LAYOUT))
            aggregation.fold(ArraySource(delta), Contribution(f"site-{index}", 1.0, {}))
        delta, _ = aggregation.finish()
        state, optimizer = strategy.optimizer.apply(optimizer, state, delta)
        losses.append(loss(state))
    return losses


def floor() -> float:
    """Return the least loss that any B reaches with the first A, by least squares over all sites at once."""
    features = np.concatenate(INPUTS) @ initial_arrays(LAYOUT, 0)["A"].astype(np.float64).T
    targets = np.concatenate(INPUTS) @ W_TRUE.T
    solution, *_ = np.linalg.lstsq(features, targets, rcond=None)
    return float(np.sum((features @ solution - targets) ** 2) / len(targets))


def test_ffa_lora_stays_at_its_floor() -> None:
    losses = course("ffa-lora", 60)
    assert floor() > 0.5 * losses[0]
    assert losses[30] >= floor()
    np.testing.assert_allclose(losses[30:], losses[30], rtol=1e-5)
    assert losses[-1] < 1.02 * floor()


def test_rolora_converges_exponentially() -> None:
    """The loss falls by more than a factor of ten in every six rounds, down to float32's own error."""
    losses = course("rolora", 48)
    reached = losses[0] * 1e-10
    for earlier, later in zip(losses[2:], losses[8:], strict=False):
        assert later < max(earlier / 10, reached)
    assert losses[-1] < reached
