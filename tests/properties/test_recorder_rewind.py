"""A run that was killed anywhere and resumed from its checkpoint has the same files as one that was not."""

from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.runs import Event, RunFolder
from server_app.recorder import Recorder
from tests.sample_runs import sample_events


def files_of(folder: RunFolder) -> dict[str, bytes]:
    paths = [folder.metrics, *folder.tensorboard.glob("*")]
    return {path.name: path.read_bytes() for path in paths}


def write(folder: RunFolder, events: list[Event]) -> None:
    with Recorder(folder) as recorder:
        for event in events:
            recorder.record(event)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), num_rounds=st.integers(1, 4), status=st.sampled_from(["finished", "failed", ""]))
def test_rewinding_and_going_on_gives_the_files_of_an_undisturbed_run(
    data: st.DataObject, num_rounds: int, status: str
) -> None:
    events = sample_events(num_rounds, {"north": 3.2, "s\u00fcd": 3.6}, status=status)
    killed_after = data.draw(st.integers(0, len(events)), "events written before the kill")
    done = max([event["round"] for event in events[:killed_after] if event["event"] == "round"], default=0)
    checkpoint = data.draw(st.integers(0, done), "round of the checkpoint")
    with TemporaryDirectory() as home:
        undisturbed, resumed = RunFolder.create(Path(home), "a"), RunFolder.create(Path(home), "b")
        write(undisturbed, events)
        write(resumed, events[:killed_after])
        size = resumed.metrics.stat().st_size
        cut = data.draw(st.integers(0, min(20, size)), "bytes of the last line that the kill took")
        content = resumed.metrics.read_bytes()
        last_line = len(content) - content.rfind(b"\n", 0, -1) - 1 if content else 0
        cut = cut if events[:killed_after] and _belongs_after(events[killed_after - 1], checkpoint) else 0
        resumed.metrics.write_bytes(content[: len(content) - min(cut, last_line)])
        with Recorder(resumed) as recorder:
            recorder.rewind(checkpoint)
            for event in events[len(recorder.events) :]:
                recorder.record(event)
        assert files_of(resumed) == files_of(undisturbed)


def _belongs_after(event: Event, round_: int) -> bool:
    """A checkpoint's own events are on the disk before it, so a kill cannot cut them."""
    return event.get("round", round_ + 1) > round_


@settings(max_examples=30, deadline=None)
@given(num_rounds=st.integers(0, 4), round_=st.integers(0, 5))
def test_rewinding_twice_is_rewinding_once(num_rounds: int, round_: int) -> None:
    with TemporaryDirectory() as home:
        folder = RunFolder.create(Path(home), "a")
        write(folder, sample_events(num_rounds, {"north": 3.2}))
        with Recorder(folder) as recorder:
            recorder.rewind(round_)
            once = list(recorder.events)
            recorder.rewind(round_)
            assert recorder.events == once
