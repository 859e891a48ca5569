"""Server optimizers against torch.optim, and the FedAvg identities."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedllm.config import read_run_config
from strategies.fedavg import build_optimizer
from strategies.optimizers import Adagrad, Adam, Sgd
from strategies.slots import OptimizerState, ServerOptimizer
from tests.unit.test_strategies import random_arrays

Build = Callable[[list[torch.Tensor]], torch.optim.Optimizer]

TWINS: dict[str, tuple[ServerOptimizer, Build]] = {
    "sgd": (Sgd(0.7), lambda p: torch.optim.SGD(p, 0.7)),
    "momentum": (Sgd(0.7, 0.9), lambda p: torch.optim.SGD(p, 0.7, momentum=0.9)),
    "nesterov": (Sgd(0.7, 0.9, nesterov=True), lambda p: torch.optim.SGD(p, 0.7, momentum=0.9, nesterov=True)),
    "adagrad": (Adagrad(0.1, 1e-3), lambda p: torch.optim.Adagrad(p, 0.1, eps=1e-3)),
    "adam": (Adam(0.1, 0.9, 0.99, 1e-3), lambda p: torch.optim.Adam(p, 0.1, (0.9, 0.99), 1e-3)),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_server_optimizer_moves_as_torch_does(name: str) -> None:
    ours, build = TWINS[name]
    params = random_arrays(0)
    twins = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in params.values()]
    torch_optimizer = build(twins)
    state = OptimizerState()
    for round_ in range(1, 8):
        delta = random_arrays(round_, 0.1)
        params, state = ours.apply(state, params, delta)
        for twin, value in zip(twins, delta.values(), strict=True):
            twin.grad = -torch.tensor(value, dtype=torch.float64)
        torch_optimizer.step()
    for twin, value in zip(twins, params.values(), strict=True):
        np.testing.assert_allclose(value, twin.detach().numpy(), rtol=2e-5, atol=2e-6)


def test_rate_one_without_momentum_is_fedavg() -> None:
    params, delta = random_arrays(0), random_arrays(1)
    moved, state = Sgd().apply(OptimizerState(), params, delta)
    assert state == OptimizerState(step=1, counts=dict.fromkeys(params, 1))
    for name, value in moved.items():
        expected = (params[name].astype(np.float64) + delta[name]).astype(np.float32)
        np.testing.assert_array_equal(value, expected)


def test_yogi_follows_the_paper() -> None:
    optimizer = Adam(0.1, 0.9, 0.99, 1e-3, yogi=True)
    params, state = random_arrays(0), OptimizerState()
    theta = params["a"].astype(np.float64)
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    for round_ in range(1, 6):
        delta = random_arrays(round_, 0.1)
        params, state = optimizer.apply(state, params, delta)
        step = delta["a"].astype(np.float64)
        first = 0.9 * first + 0.1 * step
        second = second - 0.01 * step**2 * np.sign(second - step**2)
        theta = theta + 0.1 * (first / (1 - 0.9**round_)) / (np.sqrt(second / (1 - 0.99**round_)) + 1e-3)
    np.testing.assert_allclose(params["a"], theta, rtol=2e-5, atol=2e-6)


def test_applying_leaves_the_arguments_as_they_are() -> None:
    params, delta = random_arrays(0), random_arrays(1)
    copies = {name: value.copy() for name, value in params.items()}
    optimizer = Adam(0.1)
    _, state = optimizer.apply(OptimizerState(), params, delta)
    before = {name: value.copy() for name, value in state.moments["m"].items()}
    optimizer.apply(state, params, delta)
    for name in params:
        np.testing.assert_array_equal(params[name], copies[name])
        np.testing.assert_array_equal(state.moments["m"][name], before[name])


@pytest.mark.parametrize("name", ["sgd", "adagrad", "adam", "yogi"])
def test_every_configured_optimizer_can_be_built(name: str) -> None:
    config = read_run_config({"strategy.server_optimizer": name, "strategy.server_learning_rate": 0.5})
    built = build_optimizer(config)
    moved, _ = built.apply(OptimizerState(), random_arrays(0), random_arrays(1))
    assert any(not np.array_equal(moved[key], random_arrays(0)[key]) for key in moved)
    assert getattr(built, "yogi", False) == (name == "yogi")


@pytest.mark.parametrize("name", TWINS)
def test_a_tensor_that_is_not_sent_keeps_its_moments_and_its_count(name: str) -> None:
    """torch.optim passes over parameters without a gradient: moments, and the steps of the bias correction, stay."""
    ours, build = TWINS[name]
    params = random_arrays(0)
    twins = {key: torch.tensor(value, dtype=torch.float64, requires_grad=True) for key, value in params.items()}
    torch_optimizer = build(list(twins.values()))
    state = OptimizerState()
    for round_, sent in enumerate(["b", "a", "b", "b", "a", "ab", "a"], 1):
        delta = {key: value for key, value in random_arrays(round_, 0.1).items() if key in sent}
        before = params
        params, state = ours.apply(state, params, delta)
        assert all(np.array_equal(params[key], before[key]) for key in params if key not in sent)
        for key, twin in twins.items():
            twin.grad = -torch.tensor(delta[key], dtype=torch.float64) if key in sent else None
        torch_optimizer.step()
    assert (state.step, state.counts) == (7, {"a": 4, "b": 4})
    for key, twin in twins.items():
        np.testing.assert_allclose(params[key], twin.detach().numpy(), rtol=2e-5, atol=2e-6)
