"""Which tensors a site trains and sends, and the smaller layouts that they travel as."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.codecs.payload import encode_payload, open_payload
from fedllm.errors import ConfigError, LayoutError
from fedllm.update import taken
from fedllm.work import ClientWork
from tests.unit.test_strategies import LAYOUT, random_arrays


def test_without_roles_everything_is_trained_and_sent() -> None:
    assert ClientWork().trained(LAYOUT) == ClientWork().sent(LAYOUT) == LAYOUT


def test_a_role_picks_its_tensors() -> None:
    assert ClientWork(trainable=("lora_B",)).sent(LAYOUT).names == ("b",)


def test_work_that_fits_no_tensor_is_refused_with_the_roles_there_are() -> None:
    with pytest.raises(ConfigError, match=r"lora_A, lora_B.*prompt"):
        ClientWork(trainable=("prompt",)).sent(LAYOUT)


@given(st.lists(st.sampled_from(LAYOUT.names), unique=True), st.randoms())
def test_a_part_of_a_layout_keeps_its_order_and_tensors(names: list[str], random: object) -> None:
    random.shuffle(names)  # type: ignore[attr-defined]
    part = LAYOUT.only(names)
    assert set(part.names) == set(names)
    assert list(part.tensors) == [spec for spec in LAYOUT.tensors if spec in part.tensors]
    assert (part == LAYOUT) == (len(names) == len(LAYOUT.names))


def test_a_part_with_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"no such tensor.*found c"):
        LAYOUT.only(["a", "c"])


@pytest.mark.parametrize(("sent", "expected"), [(("a", "b"), ("b",)), (("b",), ("a", "b")), (("a",), ("b",))])
def test_a_payload_of_other_tensors_than_asked_is_refused(
    sent: tuple[str, ...], expected: tuple[str, ...], tmp_path: Path
) -> None:
    part, path = LAYOUT.only(sent), tmp_path / "update"
    encode_payload(
        path, taken(random_arrays(1), part), part, kind="update", round_=1, base="b", pipeline="fp32", reference_id="r",
        is_difference=True,
    )  # fmt: skip
    with pytest.raises(LayoutError, match="another layout"):
        open_payload(path, layout=LAYOUT.only(expected), base="b")
