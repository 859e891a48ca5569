"""Which tensors a site trains and sends, and the smaller layouts that they travel as."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.codecs.payload import encode_payload, open_payload
from fedllm.errors import ConfigError, LayoutError
from fedllm.update import Layout, TensorSpec, taken
from fedllm.work import ClientWork, adapter_of, control_of, layer_of
from tests.unit.test_strategies import LAYOUT, random_arrays

ROLES = ("lora_A", "lora_B")


def test_without_roles_everything_is_trained_and_sent() -> None:
    assert ClientWork().trained(LAYOUT) == ClientWork().sent(LAYOUT) == LAYOUT


def test_a_role_picks_its_tensors() -> None:
    assert ClientWork(trainable=("lora_B",)).sent(LAYOUT).names == ("b",)


DEEP = Layout(
    (
        TensorSpec("m.embed.lora_A.weight", (2, 2), role="lora_A"),
        *(TensorSpec(f"m.layers.{n}.q_proj.{role}.weight", (2, 2), role=role) for n in range(3) for role in ROLES),
    )
)


@pytest.mark.parametrize(("depth", "num_shared"), [(0.01, 1), (1 / 3, 1), (0.34, 2), (0.5, 2), (0.99, 3), (1.0, 3)])
def test_a_share_of_the_layers_from_the_bottom_is_shared_and_the_rest_kept(depth: float, num_shared: int) -> None:
    work = ClientWork(shared_depth=depth)
    sent, kept = work.sent(DEEP), work.kept(DEEP)
    assert [spec for spec in DEEP.tensors if spec in sent.tensors] == list(DEEP.tensors[: 1 + 2 * num_shared])
    assert kept.tensors == DEEP.tensors[1 + 2 * num_shared :]
    assert work.trained(DEEP) == DEEP


def test_private_roles_and_layers_add_up() -> None:
    work = ClientWork(shared_depth=0.5, private=("lora_B",), trainable=ROLES)
    assert [layer_of(name) for name in work.sent(DEEP).names] == [-1, 0, 1]
    assert {spec.role for spec in work.sent(DEEP).tensors} == {"lora_A"}


def test_every_trained_tensor_is_either_sent_or_kept() -> None:
    for work in (ClientWork(), ClientWork(private=("lora_A",)), ClientWork(trainable=("lora_B",), shared_depth=0.4)):
        sent, kept = set(work.sent(DEEP).names), set(work.kept(DEEP).names)
        assert sent | kept == set(work.trained(DEEP).names)
        assert not sent & kept


def test_control_variates_go_with_what_is_trained() -> None:
    work = ClientWork(control_variates=True, trainable=("lora_B",))
    state = work.state(LAYOUT)
    assert adapter_of(state) == LAYOUT
    assert control_of(state).names == ("control/b",)
    assert work.sent(state).names == ("b", "control/b")
    assert work.trained(state).names == ("b",)
    assert not work.kept(state).tensors


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
