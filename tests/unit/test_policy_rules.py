"""Each rule of a data owner, on both sides of its border."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client_app.gate import admit, check_base, check_examples
from client_app.policy.hours import DAYS, is_open, parse_hours, seconds_until_open
from client_app.policy.rounds import RoundBook, count_round
from client_app.policy.settings import PolicySection
from client_app.site import SiteConfig
from fedllm.errors import ConfigError, PolicyError
from fedllm.messages import EvaluateInstruction, Hello, Instruction, LocalOnlyInstruction, TrainInstruction
from tests.owned_sites import owned

SATURDAY_NOON = datetime(2026, 11, 21, 12, 0)
STATE = {"state_id": "s", "delivery": "initial", "layout": "l", "base": "b" * 64}


def hello(run: str = "study-7", **config: Any) -> Hello:
    return Hello(run=run, run_folder="/x", config={key.replace("__", "."): value for key, value in config.items()})


def train(round_: int = 1, run: str = "study-7", num_sites: int = 2, **config: Any) -> TrainInstruction:
    fields = {**STATE, "round": round_, "attempt": 1, "first_step": 0, "num_sites": num_sites}
    return TrainInstruction.model_validate({**hello(run, **config).model_dump(exclude={"kind"}), **fields})


def ask(owner: SiteConfig, instruction: Instruction, now: datetime = SATURDAY_NOON, app: str = "fedllm/fedllm") -> None:
    admit(owner, instruction, app, now)


PROMPT = {"adapter__kind": "prompt", "strategy__name": "fedprompt"}

BORDERS = [
    ('runs = ["study-*"]', hello("study-8"), hello("Study-8"), "policy.runs"),
    ('base_sources = ["hf:org/*"]', hello(model__source="hf:org/m"), hello(model__source="hf:other/m"), "base_sources"),
    (
        f'base_fingerprints = ["{"b" * 64}"]',
        train(),
        train().model_copy(update={"base": "c" * 64}),
        "base_fingerprints",
    ),
    ('adapter_kinds = ["lora"]', hello(), hello(**PROMPT), "policy.adapter_kinds"),
    ("max_rank = 16", hello(adapter__rank=16), hello(adapter__rank=17), "policy.max_rank"),
    ("", hello(adapter__rank=256), hello(adapter__rank=257), "policy.max_rank"),
    (
        "max_virtual_tokens = 30",
        hello(**PROMPT, adapter__num_virtual_tokens=20, adapter__num_personal_tokens=10),
        hello(**PROMPT, adapter__num_virtual_tokens=20, adapter__num_personal_tokens=11),
        "policy.max_virtual_tokens",
    ),
    ("min_sites = 3", hello(rounds__min_sites=3), hello(rounds__min_sites=2), "rounds.min_sites"),
    (
        "min_sites = 3",
        train(num_sites=3, rounds__min_sites=3),
        train(num_sites=2, rounds__min_sites=3),
        "asked in this round",
    ),
    ("", train(num_sites=2), train(num_sites=0), "does not say how many"),
    ("", hello(), hello(rounds__min_sites=1), "policy.min_sites"),
]


@pytest.mark.parametrize(("line", "allowed", "not_allowed", "words"), BORDERS)
def test_a_rule_allows_up_to_its_border_and_refuses_beyond(
    line: str, allowed: Instruction, not_allowed: Instruction, words: str, tmp_path: Path
) -> None:
    owner = owned(tmp_path, f"[policy]\n{line}\n")
    ask(owner, allowed)
    with pytest.raises(PolicyError, match=words) as refused:
        ask(owner, not_allowed)
    assert "expected" in str(refused.value)
    assert "found" in str(refused.value)
    assert "clinic.toml of clinic" in str(refused.value)
    assert "ask the site's data owner" in str(refused.value)
    assert refused.value.retry_s == 0


def test_the_adapter_that_the_site_chose_for_itself_counts(tmp_path: Path) -> None:
    bounds = "[policy]\nmax_rank = 8\nmax_virtual_tokens = 10\n"
    large = [hello(adapter__rank=64, adapter__min_rank=4), hello(**PROMPT, adapter__num_virtual_tokens=20)]
    owner = owned(tmp_path, f"{bounds}[adapter]\nrank = 8\nnum_virtual_tokens = 10\n")
    for instruction in large:
        ask(owner, instruction)
    for instruction in large:
        with pytest.raises(PolicyError, match=r"policy\.max_"):
            ask(owned(tmp_path, bounds), instruction)


def test_an_app_of_another_publisher_is_refused(tmp_path: Path) -> None:
    owner = owned(tmp_path, '[policy]\napps = ["fedllm/*"]\n')
    ask(owner, hello(), app="fedllm/fedllm")
    with pytest.raises(PolicyError, match=r"does not run this app.*found other/fedllm"):
        ask(owner, hello(), app="other/fedllm")


@pytest.mark.parametrize("protection", ["differential-privacy", "secure-aggregation"])
def test_a_run_without_the_protection_asked_for_is_refused_because_no_run_offers_any_yet(
    protection: str, tmp_path: Path
) -> None:
    owner = owned(tmp_path, f'[policy]\nprotections = ["{protection}"]\n')
    with pytest.raises(PolicyError, match=rf"expected {protection} \(policy.protections\); found none"):
        ask(owner, hello())


def test_a_refusal_names_everything_that_is_not_allowed(tmp_path: Path) -> None:
    owner = owned(tmp_path, '[policy]\nmax_rank = 4\nruns = ["a"]\n')
    with pytest.raises(PolicyError, match=r"policy\.runs.*policy\.max_rank"):
        ask(owner, hello())


def test_what_can_change_with_time_says_when_to_ask_again_and_what_cannot_does_not(tmp_path: Path) -> None:
    owner = owned(tmp_path, '[policy]\nhours = "20:00-06:00"\nmax_rank = 4\n')
    with pytest.raises(PolicyError, match="does not work at this time") as refused:
        ask(owner, hello(adapter__rank=4))
    assert refused.value.retry_s == 8 * 3600
    ask(owner, hello(adapter__rank=4), SATURDAY_NOON.replace(hour=20))
    with pytest.raises(PolicyError) as refused:
        ask(owner, hello(adapter__rank=5))
    assert refused.value.retry_s == 0


def test_the_base_that_was_loaded_is_held_against_the_file_too(tmp_path: Path) -> None:
    owner = owned(tmp_path, f'[policy]\nbase_fingerprints = ["{"b" * 64}"]\n')
    check_base(owner, "b" * 64)
    with pytest.raises(PolicyError, match="base model is not allowed"):
        check_base(owner, "c" * 64)


def test_a_refusal_for_want_of_examples_does_not_tell_how_many_there_are(tmp_path: Path) -> None:
    owner = owned(tmp_path, "[policy]\nmin_examples = 100\n")
    check_examples(owner, 100)
    with pytest.raises(PolicyError, match=r"at least 100 .*found fewer") as refused:
        check_examples(owner, 99)
    assert "99" not in str(refused.value)


def test_scores_and_words_that_do_not_leave_are_refused(tmp_path: Path) -> None:
    base = {**hello().model_dump(exclude={"kind"}), **STATE}
    evaluation = EvaluateInstruction.model_validate({**base, "round": 1})
    question = evaluation.model_copy(update={"prompt": "Who was it?"})
    alone = LocalOnlyInstruction.model_validate({**base, "num_steps": 1})
    silent, mute = owned(tmp_path, "[sharing]\nlosses = false\n"), owned(tmp_path, "[sharing]\nanswers = false\n")
    ask(silent, train())
    for instruction in (evaluation, alone):
        ask(mute, instruction)
        with pytest.raises(PolicyError, match=r"sharing\.losses"):
            ask(silent, instruction)
    with pytest.raises(PolicyError, match=r"sharing\.answers"):
        ask(mute, question)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('hours = "8-20"', r"policy.hours: .*expected times such as '20:00-06:00', found '8-20'"),
        ('hours = "24:00-06:00"', "no such time of day"),
        ('hours = "20:60-22:00"', "no such time of day"),
        ('days = ["monday"]', "policy.days"),
        ("days = []", "policy.days"),
        ("runs = []", "runs is empty, so nothing is allowed"),
        ('base_fingerprints = ["abc"]', "policy.base_fingerprints"),
        ('protections = ["hope"]', "'differential-privacy' or 'secure-aggregation'"),
        ("max_ranks = 4", r"Did you mean 'policy.max_rank'\?"),
        ("min_sites = 0", "policy.min_sites"),
    ],
)
def test_a_wrong_policy_is_named_with_its_key(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        owned(tmp_path, f"[policy]\n{text}\n")


@pytest.mark.parametrize(
    ("hours", "days", "time", "expected"),
    [
        ("20:00-06:00", "sat", "2026-11-21 20:00", True),
        ("20:00-06:00", "sat", "2026-11-21 19:59", False),
        ("20:00-06:00", "sat", "2026-11-22 05:59", True),
        ("20:00-06:00", "sat", "2026-11-22 06:00", False),
        ("20:00-06:00", "sat", "2026-11-21 05:59", False),
        ("20:00-06:00", "sun", "2026-11-23 00:30", True),
        ("08:00-12:00, 14:00-18:00", "sat", "2026-11-21 11:59", True),
        ("08:00-12:00, 14:00-18:00", "sat", "2026-11-21 12:00", False),
        ("08:00-12:00, 14:00-18:00", "sat", "2026-11-21 14:00", True),
        ("00:00-24:00", "sat", "2026-11-21 23:59", True),
        ("00:00-24:00", "sat", "2026-11-22 00:00", False),
    ],
)
def test_hours_open_and_close_to_the_minute(hours: str, days: str, time: str, expected: bool) -> None:
    assert is_open(parse_hours(hours), [days], datetime.fromisoformat(time)) is expected  # type: ignore[list-item]


minutes = st.integers(0, 24 * 60 - 1)
moments = st.datetimes(datetime(2026, 1, 1), datetime(2027, 1, 1)).map(lambda at: at.replace(second=0, microsecond=0))


@settings(deadline=None)
@given(minutes, minutes, st.sets(st.sampled_from(DAYS), min_size=1), moments)
def test_the_site_opens_when_it_says_and_not_before(start: int, end: int, days: set[Any], now: datetime) -> None:
    windows = parse_hours(f"{start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}")
    wait = timedelta(seconds=seconds_until_open(windows, days, now))
    assert is_open(windows, days, now + wait)
    assert wait < timedelta(days=7)
    for share in (0.0, 0.3, 0.9):
        assert wait == timedelta() or not is_open(windows, days, now + wait * share)


def test_rounds_are_counted_by_run_and_survive_a_restart(tmp_path: Path) -> None:
    text = "[policy]\nmax_rounds_per_run = 2\n"
    ask(owned(tmp_path, text), train(1))
    ask(owned(tmp_path, text), train(2))
    with pytest.raises(PolicyError, match=r"at most 2 \(policy.max_rounds_per_run\); found 2 done") as refused:
        ask(owned(tmp_path, text), train(3))
    assert refused.value.retry_s == 0
    ask(owned(tmp_path, text), train(3, run="study-8"))


def test_a_request_that_is_repeated_counts_once_and_another_for_the_same_round_counts_again(tmp_path: Path) -> None:
    owner = owned(tmp_path, "[policy]\nmax_rounds_per_run = 1\n")
    again = {"attempt": 2, "delivery": "full", "num_sites": 5}
    ask(owner, train(1))
    ask(owner, train(1).model_copy(update=again))
    with pytest.raises(PolicyError, match="max_rounds_per_run"):
        ask(owner, train(1).model_copy(update={"state_id": "another"}))


def test_rounds_of_a_day_are_counted_over_all_runs_and_the_next_day_begins_anew(tmp_path: Path) -> None:
    owner = owned(tmp_path, "[policy]\nmax_rounds_per_day = 2\n")
    ask(owner, train(1))
    ask(owner, train(1, run="other"))
    with pytest.raises(PolicyError, match=r"policy\.max_rounds_per_day") as refused:
        ask(owner, train(2))
    assert refused.value.retry_s == 12 * 3600
    ask(owner, train(2), SATURDAY_NOON + timedelta(days=1))


def test_a_refused_round_is_not_counted_and_a_greeting_is_none(tmp_path: Path) -> None:
    owner = owned(tmp_path, "[policy]\nmax_rounds_per_run = 1\nmax_rank = 8\n")
    ask(owner, hello())
    with pytest.raises(PolicyError, match=r"max_rank"):
        ask(owner, train(1, adapter__rank=9))
    assert not (tmp_path / "state" / "rounds.json").exists()
    ask(owner, train(1))


def test_a_damaged_count_stops_training_instead_of_beginning_anew(tmp_path: Path) -> None:
    owner = owned(tmp_path)
    ask(owner, train(1))
    (tmp_path / "state" / "rounds.json").write_text('{"days": {')
    with pytest.raises(PolicyError, match=r"count of rounds is damaged.*move the file away"):
        ask(owner, train(2))


def test_days_long_past_are_forgotten(tmp_path: Path) -> None:
    book = RoundBook()
    for ahead in range(40):
        book = book.with_round("run", f"{ahead}", SATURDAY_NOON + timedelta(days=ahead))
    assert len(book.days) == 31
    assert len(book.runs["run"]) == 40
    assert count_round(tmp_path, PolicySection(max_rounds_per_day=1), "run", "new", SATURDAY_NOON) == []
