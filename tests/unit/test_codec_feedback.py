"""Error feedback: its algebra, and that it pays (a heterogeneous quadratic, ALGORITHMS section 15.8)."""

import io

import numpy as np
import pytest

from fedllm.codecs.feedback import ErrorFeedback, norm, relative_norm
from fedllm.codecs.payload import encode_payload
from fedllm.errors import ConfigError
from fedllm.update import Layout, TensorSpec

SIZE, NUM_SITES, LOCAL_STEPS, NUM_ROUNDS = 200, 8, 5, 300
LAYOUT = Layout((TensorSpec("theta", (SIZE,)),))


def roundtrip(pipeline: str, values: np.ndarray, round_: int) -> np.ndarray:
    info = encode_payload(
        io.BytesIO(), {"theta": values.astype(np.float32)}, LAYOUT, kind="update", round_=round_, base="b",
        pipeline=pipeline, reference_id="r", is_difference=True, want_decoded=True,
    )  # fmt: skip
    assert info.decoded is not None
    return info.decoded["theta"]


def relative_error_after_training(pipeline: str, feedback: ErrorFeedback | None) -> float:
    """Federated local gradient descent on site losses 1/2 sum_i h_i (x_i - c_i)^2, with an annealed server rate."""
    rng = np.random.default_rng(0)
    curvature = rng.uniform(0.1, 1.0, (NUM_SITES, SIZE))
    centre = rng.standard_normal((NUM_SITES, SIZE)) + 2.0
    local_rate = 0.05

    # Where averaged local descent stops: each site contracts towards its centre by its own factor per round.
    pull = 1 - (1 - local_rate * curvature) ** LOCAL_STEPS
    optimum = (pull * centre).sum(0) / pull.sum(0)
    theta, residuals = np.zeros(SIZE), [None] * NUM_SITES
    for round_ in range(NUM_ROUNDS):
        mean = np.zeros(SIZE)
        for site in range(NUM_SITES):
            update = {"theta": (pull[site] * (centre[site] - theta)).astype(np.float32)}
            if feedback is not None:
                update = feedback.compensate(update, residuals[site])
            decoded = {"theta": roundtrip(pipeline, update["theta"], round_)}
            if feedback is not None:
                residuals[site] = feedback.residual(update, decoded)
            mean += decoded["theta"] / NUM_SITES
        theta += (1 - round_ / NUM_ROUNDS) * mean
    return float(np.linalg.norm(theta - optimum) / np.linalg.norm(optimum))


def test_feedback_lowers_the_error_of_top_ten_percent_at_least_fivefold() -> None:
    pipeline = "delta|topk:0.1|fp32|rice"
    without = relative_error_after_training(pipeline, None)
    with_feedback = relative_error_after_training(pipeline, ErrorFeedback())
    assert with_feedback * 5 < without, (with_feedback, without)


def test_nothing_is_lost_because_decoded_and_residual_add_up_to_what_was_meant() -> None:
    rng = np.random.default_rng(1)
    feedback = ErrorFeedback()
    total_meant, total_sent = np.zeros(SIZE), np.zeros(SIZE)
    residual = None
    for round_ in range(20):
        update = {"theta": rng.standard_normal(SIZE).astype(np.float32)}
        compensated = feedback.compensate(update, residual)
        decoded = {"theta": roundtrip("topk:0.1|nf4|rice", compensated["theta"], round_)}
        residual = feedback.residual(compensated, decoded)
        total_meant += update["theta"]
        total_sent += decoded["theta"]
    np.testing.assert_allclose(total_sent + residual["theta"], total_meant, atol=1e-5)


def test_feedback_leaves_its_arguments_alone() -> None:
    update, residual = {"a": np.ones(3, np.float32)}, {"a": np.full(3, 2, np.float32)}
    compensated = ErrorFeedback(beta=0.5).compensate(update, residual)
    assert compensated["a"].tolist() == [2, 2, 2]
    first = ErrorFeedback().compensate(update, None)
    first["a"][0] = 7
    assert update["a"].tolist() == [1, 1, 1]
    assert residual["a"].tolist() == [2, 2, 2]


def test_a_residual_is_dropped_when_it_is_too_old() -> None:
    residual = {"a": np.ones(1, np.float32)}
    assert ErrorFeedback(max_age=3).carried(residual, 3) is residual
    assert ErrorFeedback(max_age=3).carried(residual, 4) is None
    assert ErrorFeedback(max_age=0).carried(residual, 1000) is residual


@pytest.mark.parametrize(("beta", "max_age"), [(0.0, 0), (1.1, 0), (float("nan"), 0), (1.0, -1)])
def test_impossible_settings_are_refused(beta: float, max_age: int) -> None:
    with pytest.raises(ConfigError, match="beta"):
        ErrorFeedback(beta, max_age)


def test_norms_are_over_all_tensors() -> None:
    arrays = {"a": np.full(4, 3, np.float32), "b": np.full((2, 2), 4, np.float32)}
    assert norm(arrays) == 10
    assert relative_norm(arrays, {"a": np.full(1, 5, np.float32)}) == 2
    assert relative_norm(arrays, {"a": np.zeros(1, np.float32)}) == float("inf")
    assert relative_norm({"a": np.zeros(1, np.float32)}, {"a": np.zeros(1, np.float32)}) == 0
