"""Orthonormal bases by Cholesky QR against LAPACK's Householder QR, over condition numbers."""

from __future__ import annotations

import numpy as np
import pytest

from fedllm import rng
from strategies.lowrank import span as module
from strategies.lowrank.product import Matrix
from strategies.lowrank.span import frame, span


def conditioned(num_rows: int, num_columns: int, condition: float) -> Matrix:
    """Draw a matrix with singular values from 1 down to 1 / condition, its columns of unequal lengths."""
    draw = rng.generator(0, purpose=f"conditioned {condition}")
    u, _ = np.linalg.qr(draw.standard_normal((num_rows, num_columns)))
    v, _ = np.linalg.qr(draw.standard_normal((num_columns, num_columns)))
    return np.asarray(u * np.geomspace(1, 1 / condition, num_columns) @ v.T * np.geomspace(1e-6, 1e6, num_columns))


def assert_near(found: Matrix, expected: Matrix) -> None:
    """Compare columns, each by its own length."""
    lengths = np.maximum(np.linalg.norm(expected, axis=0), 1e-300)
    np.testing.assert_allclose(found / lengths, expected / lengths, atol=1e-13)


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e5, 1e7, 1e9, 1e15])
def test_a_basis_is_orthonormal_and_gives_the_columns_back(condition: float) -> None:
    columns = conditioned(200, 30, condition)
    found = span(columns)
    basis = found.restored(np.eye(30))
    np.testing.assert_allclose(basis.T @ basis, np.eye(30), atol=1e-13)
    lengths = np.linalg.norm(columns, axis=0)
    assert_near(found.restored(found.coordinates), columns)
    gram, expected = found.coordinates.T @ found.coordinates, columns.T @ columns
    np.testing.assert_allclose(gram / np.outer(lengths, lengths), expected / np.outer(lengths, lengths), atol=1e-13)


def test_well_conditioned_columns_take_the_fast_way_and_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    householder = module._by_householder
    monkeypatch.setattr(module, "_by_householder", lambda columns: taken.append(True) or householder(columns))
    for condition, expected in ((1e4, 0), (1e12, 1)):
        taken.clear()
        span(conditioned(200, 30, condition))
        assert len(taken) == expected, condition
    equal = np.repeat(conditioned(200, 5, 10.0), 3, axis=1)
    taken.clear()
    assert_near(span(equal).restored(span(equal).coordinates), equal)
    assert taken, "columns that are there twice are dependent"


def test_columns_of_zeros_are_left_out_and_stay_zero() -> None:
    columns = conditioned(60, 10, 10.0)
    columns[:, [0, 4]] = 0.0
    found = span(columns)
    assert found.coordinates.shape == (8, 10)
    assert not found.coordinates[:, [0, 4]].any()
    assert_near(found.restored(found.coordinates), columns)
    assert span(np.zeros((7, 3))).restored(np.zeros((0, 2))).shape == (7, 2)


def test_a_wide_matrix_is_its_own_coordinates() -> None:
    columns = conditioned(40, 40, 10.0)
    found = span(columns)
    assert found.coordinates is columns
    assert not found.factors


def test_matrices_in_one_frame_keep_their_products() -> None:
    draw = rng.generator(0, purpose="frame")
    parts = {name: draw.standard_normal((90, size)) for name, size in (("a", 4), ("empty", 0), ("b", 7))}
    found = frame(parts)
    assert {name: part.shape for name, part in found.parts.items()} == {"a": (11, 4), "empty": (11, 0), "b": (11, 7)}
    np.testing.assert_allclose(found["a"].T @ found["b"], parts["a"].T @ parts["b"], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.restored(found["b"]), parts["b"], rtol=1e-12, atol=1e-12)
