"""What a site remembers: whole or absent, by round, and never more than it needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client_app.memory import KEPT_ROUNDS, Memory
from fedllm.codecs.payload import encode_payload
from fedllm.update import Arrays, Layout, digest_arrays, taken
from tests.unit.test_strategies import LAYOUT, random_arrays

BASE = "b" * 64


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "site", LAYOUT, BASE)


def finish_round(memory: Memory, round_: int, update: Arrays, residual: Arrays, part: Layout = LAYOUT) -> None:
    encode_payload(
        memory.update_path(round_),
        taken(update, part),
        part,
        kind="update",
        round_=round_,
        base=BASE,
        pipeline="fp32",
        reference_id="r",
        is_difference=True,
    )
    memory.keep_residual(round_, part, taken(residual, part))
    memory.finish(round_, f"request-{round_}", f"report-{round_}")


def assert_equal(found: Arrays | None, expected: Arrays) -> None:
    assert found is not None
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_held_state_is_found_by_its_name_only(memory: Memory) -> None:
    state = random_arrays(1)
    name = digest_arrays(state, LAYOUT)
    assert memory.held(name) is None
    memory.hold(name, state, 1)
    assert_equal(memory.held(name), state)
    assert memory.held("another") is None
    memory.hold("next", random_arrays(2), 2)
    assert memory.held(name) is None


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-1] + b"\1", lambda _: b""])
def test_a_damaged_state_is_not_held(memory: Memory, damage: object) -> None:
    memory.hold("name", random_arrays(1), 1)
    path = memory.folder / "held.payload"
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert memory.held("name") is None


def test_a_finished_round_answers_the_same_request_and_no_other(memory: Memory) -> None:
    finish_round(memory, 3, random_arrays(1), random_arrays(2))
    found = memory.finished(3, "request-3")
    assert found is not None
    assert found[1] == "report-3"
    assert memory.finished(3, "another") is None
    assert memory.finished(4, "request-3") is None


def test_an_update_that_is_being_rewritten_is_not_finished(memory: Memory) -> None:
    finish_round(memory, 3, random_arrays(1), random_arrays(2))
    memory.update_path(3)
    assert memory.finished(3, "request-3") is None


def test_a_folded_round_leaves_its_residual(memory: Memory) -> None:
    residual = random_arrays(2)
    finish_round(memory, 3, random_arrays(1), residual)
    found = memory.residual(5, LAYOUT, last_folded=3)
    assert found is not None
    assert found[1] == 2
    assert_equal(found[0], residual)


def test_a_round_that_was_not_folded_leaves_everything(memory: Memory) -> None:
    update, residual = random_arrays(1), random_arrays(2)
    finish_round(memory, 3, update, residual)
    found = memory.residual(4, LAYOUT, last_folded=2)
    assert found is not None
    assert_equal(found[0], {name: residual[name] + update[name] for name in update})


def test_a_repeated_round_starts_from_the_residual_before_it(memory: Memory) -> None:
    first = random_arrays(10)
    finish_round(memory, 2, random_arrays(1), first)
    finish_round(memory, 3, random_arrays(2), random_arrays(11))
    found = memory.residual(3, LAYOUT, last_folded=2)
    assert found is not None
    assert_equal(found[0], first)


def test_a_first_round_has_no_residual(memory: Memory) -> None:
    assert memory.residual(1, LAYOUT, last_folded=0) is None


def test_old_rounds_are_forgotten(memory: Memory) -> None:
    for round_ in range(1, 8):
        finish_round(memory, round_, random_arrays(1), random_arrays(2))
    rounds = {int(path.stem.removeprefix("round-")) for path in memory.folder.glob("round-*")}
    assert rounds == set(range(8 - KEPT_ROUNDS, 8))


def test_a_part_of_the_adapter_has_residuals_of_its_own(memory: Memory) -> None:
    """As when two factors are sent in turn: each finds what it left two rounds ago."""
    a, b = LAYOUT.only(["a"]), LAYOUT.only(["b"])
    for round_ in range(1, 7):
        finish_round(memory, round_, random_arrays(round_), random_arrays(10 + round_), a if round_ % 2 else b)
    for part, left in ((a, 5), (b, 6)):
        found = memory.residual(7, part, last_folded=left)
        assert found is not None
        assert found[1] == 7 - left
        assert_equal(found[0], taken(random_arrays(10 + left), part))
        unsent = memory.residual(7, part, last_folded=left - 2)
        assert unsent is not None
        names = part.names
        assert_equal(unsent[0], {n: random_arrays(10 + left)[n] + random_arrays(left)[n] for n in names})
    assert memory.residual(7, LAYOUT, last_folded=6) is None


def test_a_round_that_a_server_comes_back_to_finds_the_residual_of_its_part(memory: Memory) -> None:
    a, b = LAYOUT.only(["a"]), LAYOUT.only(["b"])
    for round_ in range(1, 8):
        finish_round(memory, round_, random_arrays(round_), random_arrays(10 + round_), a if round_ % 2 else b)
    found = memory.residual(6, b, last_folded=4)
    assert found is not None
    assert_equal(found[0], taken(random_arrays(14), b))
