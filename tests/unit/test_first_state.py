"""The first global state: drawn by the server, or made by a site and checked against all others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from flwr.app import Message as FlowerMessage

import tests.fake_federation as fakes
from client_app.transports import build_transport
from fedllm.codecs.payload import encode_payload
from fedllm.errors import AgreementError
from fedllm.messages import AnyMessage, FirstStateInstruction, FirstStateReport
from fedllm.runs import RunFolder
from fedllm.update import Arrays, Layout, TensorSpec, digest_arrays
from fedllm.wire.transport import Envelope
from server_app.checkpoint import load_latest
from tests.fake_federation import InProcessGrid, QuadraticSite, flower_error
from tests.unit.test_loop import events, run

PROMPT = Layout((TensorSpec("prompt_embeddings", (4, 6), role="prompt"),))
ROWS: Arrays = {"prompt_embeddings": np.arange(24, dtype=np.float32).reshape(4, 6) / 8}
SETTINGS = {"adapter.kind": "prompt", "adapter.num_virtual_tokens": 4, "strategy.name": "fedprompt"}


class PromptSite(QuadraticSite):
    """A site whose adapter is a prompt that starts from its base's vocabulary."""

    handed_in: ClassVar[Arrays] = ROWS

    def answer(self, instruction: AnyMessage, envelope: Envelope) -> tuple[AnyMessage, Envelope | None]:
        if not isinstance(instruction, FirstStateInstruction):
            return super().answer(instruction, envelope)
        path = self.folder / "first"
        encode_payload(path, self.handed_in, PROMPT, kind="state", round_=0, base="b" * 64, pipeline="fp32")
        return FirstStateReport(site=self.name), build_transport(envelope, None).push(envelope, path)


class Liar(PromptSite):
    """Hands in another first state than it stated."""

    handed_in: ClassVar[Arrays] = {"prompt_embeddings": ROWS["prompt_embeddings"] + 1}


class Broken(PromptSite):
    """Dies when it is asked for the first state."""

    def __call__(self, message: FlowerMessage) -> FlowerMessage | None:
        reply = super().__call__(message)
        return flower_error(message) if isinstance(self.seen[-1], FirstStateInstruction) else reply


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PromptSite]:
    """Make sites whose adapter is the prompt; `initial_arrays` is their base's vocabulary."""
    initial = digest_arrays(ROWS, PROMPT)
    agreement = fakes.AGREEMENT.model_copy(update={"layout": PROMPT.digest, "initial": initial})
    monkeypatch.setattr(fakes, "LAYOUT", PROMPT)
    monkeypatch.setattr(fakes, "initial_arrays", lambda *_: ROWS)

    def make(name: str, kind: type[PromptSite] = PromptSite) -> PromptSite:
        return kind(name, int(name[-1]), 10, agreement)

    return make


def asked_for_first(*sites: PromptSite) -> list[bool]:
    return [any(isinstance(message, FirstStateInstruction) for message in site.seen) for site in sites]


def params(folder: RunFolder) -> Arrays:
    state = load_latest(folder.checkpoints)
    assert state is not None
    return state.params


@pytest.mark.parametrize("transport", ["flower", "grpc"])
def test_one_site_hands_in_the_first_prompt_and_all_start_from_it(
    tmp_path: Path, site: Callable[..., PromptSite], transport: str
) -> None:
    sites = [site("site-1"), site("site-2")]
    changes: dict[str, Any] = {**SETTINGS, "transport.kind": transport, "transport.insecure": transport == "grpc"}
    folder = run(tmp_path, InProcessGrid({1: sites[0], 2: sites[1]}), num_rounds=1, **changes)
    assert asked_for_first(*sites) == [True, False]
    assert all(one.deliveries[0] == "initial" for one in sites)
    mean = (sites[0].optimum["prompt_embeddings"] + sites[1].optimum["prompt_embeddings"]) / 2
    expected = ROWS["prompt_embeddings"] + 0.5 * (mean - ROWS["prompt_embeddings"])
    np.testing.assert_allclose(params(folder)["prompt_embeddings"], expected, rtol=1e-5)
    assert len(events(folder, "local_only")[0]["sites"]) == 2


@pytest.mark.parametrize("kind", [Liar, Broken])
def test_a_site_that_hands_in_something_else_or_nothing_is_passed_over(
    tmp_path: Path, site: Callable[..., PromptSite], kind: type[PromptSite]
) -> None:
    sites = [site("site-1", kind), site("site-2")]
    folder = run(tmp_path, InProcessGrid({1: sites[0], 2: sites[1]}), num_rounds=1, **SETTINGS)
    assert asked_for_first(*sites) == [True, True]
    assert events(folder, "end")[0]["status"] == "finished"


def test_a_run_whose_sites_all_hand_in_something_else_ends_with_their_reasons(
    tmp_path: Path, site: Callable[..., PromptSite]
) -> None:
    grid = InProcessGrid({1: site("site-1", Liar), 2: site("site-2", Liar)})
    with pytest.raises(AgreementError, match=r"no site handed in the first state.*site-1: .*site-2: "):
        run(tmp_path, grid, **SETTINGS)


def test_sites_whose_vocabularies_differ_do_not_train_together(tmp_path: Path, site: Callable[..., PromptSite]) -> None:
    sites = {number: site(f"site-{number}") for number in (1, 2, 3)}
    sites[3].agreement = sites[3].agreement.model_copy(update={"initial": "0" * 64})
    folder = run(tmp_path, InProcessGrid(dict(sites)), num_rounds=1, **SETTINGS)
    assert [event["site"] for event in events(folder, "left_out")] == ["site-3"]
    assert "initial: the federation has" in events(folder, "left_out")[0]["reason"]


def test_a_resumed_run_asks_for_no_first_state_again(tmp_path: Path, site: Callable[..., PromptSite]) -> None:
    first = {1: site("site-1"), 2: site("site-2")}
    run(tmp_path / "cut", InProcessGrid(dict(first)), num_rounds=1, **SETTINGS)
    again = {1: site("site-1"), 2: site("site-2")}
    resumed = run(tmp_path / "cut", InProcessGrid(dict(again)), name="", resume="test", num_rounds=3)
    assert asked_for_first(*again.values()) == [False, False]
    clean = run(tmp_path / "clean", InProcessGrid({1: site("site-1"), 2: site("site-2")}), num_rounds=3, **SETTINGS)
    np.testing.assert_array_equal(params(resumed)["prompt_embeddings"], params(clean)["prompt_embeddings"])


def test_a_server_that_draws_another_first_state_than_the_sites_says_so(tmp_path: Path) -> None:
    agreement = fakes.AGREEMENT.model_copy(update={"initial": "0" * 64})
    grid = InProcessGrid({index: QuadraticSite(f"site-{index}", index, 10, agreement) for index in (1, 2)})
    with pytest.raises(AgreementError, match="the first state of the server is not the sites'"):
        run(tmp_path, grid)
