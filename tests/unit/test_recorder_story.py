import logging
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.text import clean, width
from server_app.events import AnyEvent, parse_event
from server_app.recorder import Recorder
from server_app.results import Results
from server_app.story import Story, final_table
from tests.sample_runs import SITES, sample_events, write_sample


def story_of(events: list[dict[str, object]], num_rounds: int | None = 6) -> list[tuple[AnyEvent, list[str]]]:
    """Return each event with its lines."""
    parsed = [parse_event(event) for event in events]
    story = Story(Path("/data/runs/sample"), num_rounds)
    return [(event, story.lines(event, Results.of(parsed[:number]))) for number, event in enumerate(parsed)]


def lines_of(events: list[dict[str, object]]) -> list[str]:
    return [line for _, lines in story_of(events) for line in lines]


@pytest.mark.parametrize("num_sites", [1, 2, 7, 40, 400])
def test_a_round_takes_at_most_five_lines_of_at_most_a_hundred_columns(num_sites: int) -> None:
    sites = {f"hospital-{number}": 3.0 + number % 7 / 9 for number in range(num_sites)}
    told = [
        (event.round, lines)
        for event, lines in story_of(sample_events(12, sites), num_rounds=12)
        if event.event in ("round", "evaluation")
    ]
    for round_ in range(13):
        lines = [line for number, lines in told if number == round_ for line in lines]
        assert 1 <= len(lines) <= 5
        assert all(re.match(rf"round {round_:>2}/12  ", line) for line in lines)
    assert max(width(line) for _, lines in told for line in lines) <= 100


def test_a_round_s_story_names_who_took_part_who_was_rejected_and_why() -> None:
    lines = [line for line in lines_of(sample_events()) if line.startswith("round 3/6")]
    assert "6 of 7 sites" in lines[0]
    assert re.search(r"rejected  trivia \(NonFiniteError: tensor 'q_proj", lines[1])
    assert "train 36" in lines[2]
    assert re.search(r"loss 3\.0\d\d \(-0\.5\d\d on the base, -0\.10\d on round 2\)", lines[3])


def test_an_attempt_in_vain_is_told_as_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        write_sample(tmp_path)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert any("too few, nothing changed" in message for message in warnings)
    assert any("food, movies (no reply before the round closed)" in message for message in warnings)
    assert any(message.startswith("left out weather") for message in warnings)


def test_the_final_table_has_every_site_and_marks_the_lowest_loss_of_each_row() -> None:
    results = Results.of(parse_event(event) for event in sample_events())
    lines = final_table(results)
    body = {line.split("  ")[0]: line for line in lines}
    assert set(SITES) | {"all sites"} <= set(body)
    for row in results.rows():
        losses = {"base": row.base, "local_only": row.local_only, "federated": row.federated}
        lowest = min(losses, key=lambda name: losses[name] or 0)
        cells = re.findall(r"(\d\.\d{3}) \([\d.]+\)( \*)?", body[row.name])
        assert [bool(mark) for _, mark in cells] == [name == lowest for name in losses]
        assert [float(loss) for loss, _ in cells] == pytest.approx(list(losses.values()), abs=5e-4)
    assert max(map(width, lines)) <= 88


def test_a_long_federation_s_table_is_cut_and_says_so() -> None:
    sites = {f"site-{number}": 3.0 for number in range(100)}
    lines = final_table(Results.of(parse_event(event) for event in sample_events(1, sites)))
    assert len(lines) < 50
    assert "(60 more sites: see the report)" in lines
    assert any(line.startswith("all sites") for line in lines)


def test_the_ending_tells_reason_best_round_answers_and_folder() -> None:
    events = sample_events(reason="enough", status="finished")
    told = "\n".join(story_of(events)[-1][1])
    for words in ("Finished after 6 rounds", "enough", "Best round: 6", "Every mass attracts", "/data/runs/sample"):
        assert words in told


@pytest.mark.parametrize("status", ["failed", "stopped"])
def test_a_run_that_ends_before_anything_was_measured_is_told_too(status: str) -> None:
    (lines,) = [lines for _, lines in story_of([{"event": "end", "status": status, "reason": "no site joined"}])]
    assert any(line.startswith(status.capitalize()) for line in lines)
    assert "no site joined" in lines


def test_a_resumed_run_goes_on_with_the_story_where_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        folder = write_sample(tmp_path)
        whole = [record.getMessage() for record in caplog.records]
        caplog.clear()
        with Recorder(folder) as recorder:
            recorder.rewind(4)
            for event in sample_events()[len(recorder.events) :]:
                recorder.record(event)
    assert [record.getMessage() for record in caplog.records] == whole[-len(caplog.records) :] != []


HOSTILE = st.text(max_size=40) | st.sampled_from(
    ["\x1b[2Jgone", "a\nround 9/9  all is well", "\u202eevil", "\U0001f600" * 30]
)


@settings(deadline=None)
@given(name=HOSTILE, reason=HOSTILE, answer=HOSTILE)
def test_what_sites_send_cannot_steer_the_terminal_or_forge_a_line(name: str, reason: str, answer: str) -> None:
    events = sample_events(3, {name: 3.0, "other": 3.2})
    events.insert(0, {"event": "left_out", "time": 1.0, "site": name, "reason": reason})
    events.insert(
        -1, {"event": "answer", "time": 1.0, "prompt": name, "site": name, "base": answer, "federated": reason}
    )
    for line in lines_of(events):
        assert line == "" or clean(line).split() == line.split()
        assert not re.match("round 9/9", line)


@pytest.mark.parametrize(("share", "told"), [(0.0123, True), (1e-9, False), (None, False)])
def test_energy_that_did_not_fit_is_told_unless_it_is_rounding(share: float | None, told: bool) -> None:
    event = {"event": "round", "round": 1, "participants": ["a"], "discarded_energy": share}
    (lines,) = [lines for _, lines in story_of([event])]
    assert any("1.23% discarded" in line for line in lines) == told
