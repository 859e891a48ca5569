"""Sites that lie about how much they have, through the whole round loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message as FlowerMessage

from fedllm.errors import TransportError
from fedllm.messages import AnyMessage, TrainInstruction, TrainReport, parse_message
from fedllm.model.initial import initial_arrays
from fedllm.update import Arrays
from tests.fake_federation import LAYOUT, InProcessGrid, QuadraticSite
from tests.unit.test_loop import assert_close, events, params, run, sites

BILLION = 10**9


def with_liar(claim: int = BILLION) -> InProcessGrid:
    """Return three honest sites of 10, 20 and 30 examples, and one that says it has so many."""
    return InProcessGrid({**sites(3), 109: QuadraticSite("site-9", 9, claim)})


def moved_along(shares: dict[str, float]) -> Arrays:
    """Return the state after one round in which sites count these shares, in plain float64."""
    members = [QuadraticSite(name, int(name.removeprefix("site-"))) for name in shares]
    start = initial_arrays(LAYOUT, 42)
    return {
        name: (
            value
            + 0.5 * sum(share * (s.optimum[name] - value) for s, share in zip(members, shares.values(), strict=True))
        ).astype(np.float32)
        for name, value in start.items()
    }


HELD = {"site-0": 10 / 120, "site-1": 20 / 120, "site-2": 30 / 120, "site-9": 0.5}


@pytest.mark.parametrize("weighting", ["examples", "tokens"])
def test_a_liar_counts_no_more_than_all_others_together_and_is_named(
    weighting: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        grid = with_liar() if weighting == "examples" else InProcessGrid({**sites(3), 109: ManyTokens("site-9", 9)})
        folder = run(tmp_path, grid, num_rounds=1, **{"strategy.weighting": weighting})
    held = HELD if weighting == "examples" else {**dict.fromkeys(HELD, 0.5 / 3), "site-9": 0.5}
    assert_close(params(folder), moved_along(held))
    [event] = events(folder, "round")
    [cut] = event["cut"]
    assert cut["site"] == "site-9"
    assert cut["claimed"] > 0.99
    assert cut["counted"] == pytest.approx(0.5)
    assert "site-9 (claims 100.0% of the weight, counts 50.0%)" in caplog.text


class ManyTokens(QuadraticSite):
    """A site that says it trained on a billion tokens."""

    def report(self, instruction: TrainInstruction, state: Arrays, **changes: Any) -> TrainReport:
        return super().report(instruction, state, **{"num_tokens": BILLION, **changes})


def test_an_operator_who_believes_every_claim_gets_what_is_claimed(tmp_path: Path) -> None:
    folder = run(tmp_path, with_liar(), num_rounds=1, **{"strategy.max_weight_share": 1.0})
    assert_close(params(folder), moved_along({"site-9": 1.0}))
    assert events(folder, "round")[0]["cut"] == []


def test_a_smaller_bound_holds_honest_sites_too(tmp_path: Path) -> None:
    folder = run(tmp_path, InProcessGrid(sites(3)), num_rounds=1, **{"strategy.max_weight_share": 0.4})
    assert_close(params(folder), moved_along({"site-0": 0.2, "site-1": 0.4, "site-2": 0.4}))
    assert [cut["site"] for cut in events(folder, "round")[0]["cut"]] == ["site-2"]


def test_a_buffer_holds_its_updates_to_the_same_bound(tmp_path: Path) -> None:
    folder = run(tmp_path, with_liar(), num_rounds=1, **{"rounds.buffer_size": 4})
    assert_close(params(folder), moved_along(HELD))
    assert [cut["site"] for cut in events(folder, "round")[0]["cut"]] == ["site-9"]


def test_rules_that_ask_for_no_weights_report_none(tmp_path: Path) -> None:
    folder = run(tmp_path, with_liar(), num_rounds=1, **{"strategy.aggregator": "median"})
    assert events(folder, "round")[0]["cut"] == []


class Boundless(QuadraticSite):
    """A site that says it has more examples than a float can hold."""

    def __call__(self, message: FlowerMessage) -> FlowerMessage | None:
        reply = super().__call__(message)
        if reply is not None and message.metadata.message_type == "train":
            for record in reply.content.config_records.values():
                for key, value in record.items():
                    if isinstance(value, str):
                        record[key] = value.replace('"num_examples":10,', f'"num_examples":1{"0" * 400},')
        return reply


def test_a_claim_beyond_all_numbers_is_rejected_and_ends_nothing(tmp_path: Path) -> None:
    folder = run(tmp_path, InProcessGrid({**sites(2), 109: Boundless("site-9", 9)}), num_rounds=1)
    [event] = events(folder, "round")
    [rejected] = event["rejected"]
    assert rejected["site"] == "site-9"
    assert "num_examples" in rejected["reason"]
    assert event["participants"] == ["site-0", "site-1"]


def test_a_message_cannot_claim_more_than_a_float_holds() -> None:
    def claim(count: int) -> AnyMessage:
        fields = '"site":"a","round":1,"num_tokens":1,"num_steps":1,"loss":null,"loss_last":null,"grad_norm":null'
        return parse_message(f'{{"kind":"trained",{fields},"seconds":1,"num_examples":{count}}}', "test")

    assert claim(1 << 53).kind == "trained"
    with pytest.raises(TransportError, match="num_examples"):
        claim((1 << 53) + 1)
