"""What numbers leave a site."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_app.policy.settings import SharingSection
from client_app.policy.sharing import disclosed, rounded_count
from fedllm.messages import (
    EvaluateReport,
    FirstStateReport,
    Introduction,
    LocalOnlyReport,
    PersonaliseReport,
    Score,
    TrainReport,
)
from tests.fake_federation import QuadraticSite

SCORE = Score(loss=1.23456, accuracy=0.98765, num_tokens=1234, num_examples=7)
ROUNDED = Score(loss=1.23, accuracy=0.99, num_tokens=1230, num_examples=10)
COARSE = SharingSection(decimals=2, count_multiple=10)
TRAINED = TrainReport(
    site="a",
    round=1,
    num_examples=104,
    num_tokens=1005,
    num_steps=3,
    loss=1.23456,
    loss_last=0.005,
    grad_norm=12.3456,
    residual_norm=0.98765,
    seconds=1.2345,
)


@settings(deadline=None)
@given(st.integers(0, 10**9), st.integers(1, 10**6))
def test_a_rounded_count_is_the_nearest_multiple_and_hides_only_how_many(count: int, multiple: int) -> None:
    rounded = rounded_count(count, multiple)
    assert rounded % multiple == 0
    assert (rounded == 0) == (count == 0)
    assert abs(rounded - count) <= multiple / 2 or 0 < count < rounded == multiple


def test_numbers_of_training_leave_rounded() -> None:
    sent = disclosed(TRAINED, COARSE)
    assert isinstance(sent, TrainReport)
    assert (sent.loss, sent.loss_last, sent.grad_norm, sent.residual_norm) == (1.23, 0.01, 12.35, 0.99)
    assert (sent.num_examples, sent.num_tokens, sent.num_steps) == (100, 1010, 3)


def test_losses_that_are_not_shared_do_not_leave() -> None:
    sent = disclosed(TRAINED, SharingSection(losses=False))
    assert isinstance(sent, TrainReport)
    assert (sent.loss, sent.loss_last, sent.grad_norm) == (None, None, None)
    assert sent.num_examples == 104


def test_scores_leave_rounded_wherever_they_are() -> None:
    evaluated = EvaluateReport(site="a", round=1, score=SCORE, seconds=1.0)
    alone = LocalOnlyReport(site="a", score=SCORE, num_steps=1, seconds=1.0)
    own = PersonaliseReport(site="a", federated=SCORE, personalised=SCORE, num_steps=1, seconds=1.0)
    for report in (evaluated, alone):
        sent = disclosed(report, COARSE)
        assert isinstance(sent, EvaluateReport | LocalOnlyReport)
        assert sent.score == ROUNDED
    sent = disclosed(own, COARSE)
    assert isinstance(sent, PersonaliseReport)
    assert sent.federated == sent.personalised == ROUNDED


@pytest.mark.parametrize("topics", [False, True])
def test_counts_of_the_greeting_leave_rounded_and_topics_only_where_they_are_shared(topics: bool) -> None:
    introduction = QuadraticSite("a", 1, 104).introduce()
    data = introduction.data.model_copy(update={"topics": {"law": 4, "art": 100}})
    full = introduction.model_copy(update={"data": data})
    sent = disclosed(full, SharingSection(count_multiple=10, topics=topics))
    assert isinstance(sent, Introduction)
    assert sent.data.num_train_examples == 100
    assert sent.data.num_dropped == 0
    assert sent.data.topics == ({"law": 10, "art": 100} if topics else {})
    assert sent.agreement == introduction.agreement


def test_rounding_what_was_rounded_changes_nothing_and_other_replies_pass() -> None:
    assert disclosed(disclosed(TRAINED, COARSE), COARSE) == disclosed(TRAINED, COARSE)
    assert disclosed(FirstStateReport(site="a"), COARSE) == FirstStateReport(site="a")
