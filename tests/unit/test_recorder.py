import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedllm.errors import CheckpointError
from fedllm.runs import Event, RunFolder, read_metrics
from server_app import recorder as recorder_module
from server_app.events import Evaluation, read_events
from server_app.recorder import Recorder
from server_app.tensorboard import ScalarWriter
from tests.sample_runs import sample_events, write_sample

EVALUATION: Event = {"event": "evaluation", "time": 5.0, "round": 0, "sites": {"a": {"loss": 3.5}}, "loss": 3.5}


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "run")


def scalars(folder: RunFolder) -> dict[str, list[tuple[int, float, float]]]:
    """Read the TensorBoard files with TensorBoard's own reader, which checks every record's checksums."""
    accumulator = EventAccumulator(str(folder.tensorboard), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(one.step, one.value, one.wall_time) for one in accumulator.Scalars(tag)] for tag in tags}


def test_an_event_is_in_the_file_before_record_returns(folder: RunFolder) -> None:
    with Recorder(folder) as recorder:
        for number, event in enumerate(sample_events(2), start=1):
            recorder.record(event)
            assert len(read_metrics(folder.metrics)) == number
        assert recorder.events == read_metrics(folder.metrics)


def test_what_was_recorded_comes_back_with_keys_that_this_release_does_not_know(folder: RunFolder) -> None:
    event = EVALUATION | {"novelty": {"depth": [1, 2.5, None]}, "sites": {"a": {"loss": 3.5, "spread": 0.25}}}
    with Recorder(folder) as recorder:
        recorder.record(event)
    (back,) = read_metrics(folder.metrics)
    assert back["novelty"] == event["novelty"]
    assert back["sites"]["a"]["spread"] == 0.25
    assert back["time"] == 5.0


def test_the_time_is_filled_in(folder: RunFolder) -> None:
    with Recorder(folder) as recorder:
        recorder.record({"event": "end", "status": "finished"})
    (event,) = read_metrics(folder.metrics)
    assert event["time"] > 1.7e9


def test_a_loss_that_is_not_finite_is_valid_json_and_comes_back(folder: RunFolder) -> None:
    with Recorder(folder) as recorder:
        recorder.record(EVALUATION | {"loss": float("nan"), "worst_loss": float("inf")})

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    json.loads(folder.metrics.read_text(), parse_constant=refuse)
    (event,) = read_events(folder.metrics)
    assert isinstance(event, Evaluation)
    assert event.loss != event.loss
    assert event.worst_loss == float("inf")


@pytest.mark.parametrize(
    "event",
    [{"event": "surprise"}, {"event": "round"}, {"event": "end", "status": "tired"}, EVALUATION | {"loss": "low"}],
)
def test_an_event_that_is_not_what_its_kind_should_be_is_refused_and_leaves_no_trace(
    folder: RunFolder, event: Event
) -> None:
    with Recorder(folder) as recorder:
        with pytest.raises(ValidationError):
            recorder.record(event)
        assert recorder.events == []
    assert folder.metrics.read_bytes() == b""


def test_a_line_that_a_crash_cut_is_gone_before_the_next_event_is_written(folder: RunFolder) -> None:
    with Recorder(folder) as recorder:
        recorder.record(EVALUATION)
    whole = folder.metrics.read_bytes()
    folder.metrics.write_bytes(whole + b'{"event":"round","rou')
    with Recorder(folder) as recorder:
        recorder.record(EVALUATION | {"round": 1})
    assert folder.metrics.read_bytes().startswith(whole)
    assert [event["round"] for event in read_metrics(folder.metrics)] == [0, 1]


def test_rewinding_keeps_the_checkpoint_s_round_and_forgets_later_ones_and_the_end(tmp_path: Path) -> None:
    folder = write_sample(tmp_path)
    with Recorder(folder) as recorder:
        recorder.rewind(3)
        kinds = [(event["event"], event.get("round")) for event in recorder.events]
    assert kinds[-2:] == [("round", 3), ("evaluation", 3)]
    assert ("attempt", 2) in kinds
    assert ("left_out", None) in kinds
    assert not {"end", "answer", "local_only"} & {kind for kind, _ in kinds}
    assert [step for step, _, _ in scalars(folder)["heldout/loss"]] == [0, 1, 2, 3]


def test_events_of_a_later_release_survive_going_on_with_a_run(folder: RunFolder) -> None:
    strange = {"event": "weather", "round": 0, "mood": "fair"}
    folder.metrics.write_text(json.dumps(strange) + "\n" + json.dumps(EVALUATION) + "\n")
    with Recorder(folder) as recorder:
        recorder.rewind(0)
        recorder.record({"event": "end", "status": "finished"})
    assert read_metrics(folder.metrics)[:2] == [strange, EVALUATION]


def test_tensorboard_reads_the_same_numbers_that_the_metrics_hold(tmp_path: Path) -> None:
    folder = write_sample(tmp_path)
    events = read_metrics(folder.metrics)
    evaluations = [event for event in events if event["event"] == "evaluation"]
    rounds = [event for event in events if event["event"] == "round"]
    found = scalars(folder)
    expected = [(event["round"], pytest.approx(event["loss"], rel=1e-6), event["time"]) for event in evaluations]
    assert found["heldout/loss"] == expected
    politics = [event["sites"]["politics"]["loss"] for event in evaluations]
    assert [value for _, value, _ in found["heldout_loss/politics"]] == pytest.approx(politics, rel=1e-6)
    assert [value for _, value, _ in found["traffic/bytes_up"]] == [event["bytes_up"] for event in rounds]
    assert [value for _, value, _ in found["seconds/train"]] == pytest.approx([e["phases"]["train"] for e in rounds])
    assert len(found["train/loss"]) == len(rounds)  # the attempt in vain has none


def test_scalars_that_are_not_finite_are_left_out_and_large_steps_fit(tmp_path: Path) -> None:
    writer = ScalarWriter(tmp_path, started=1.0)
    writer.add({"a": float("nan"), "b": -2.5}, step=3_000_000_000, wall_time=7.25)
    writer.add({"a": float("inf")}, step=1, wall_time=8.0)
    writer.close()
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    assert accumulator.Tags()["scalars"] == ["b"]
    assert [(one.step, one.value, one.wall_time) for one in accumulator.Scalars("b")] == [(3_000_000_000, -2.5, 7.25)]


def test_recording_and_reporting_import_neither_torch_nor_matplotlib(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from tests.sample_runs import write_sample\n"
        "from server_app.report import build_report; build_report(write_sample(Path(sys.argv[1])))\n"
        "assert not {'torch', 'matplotlib', 'tensorboardX', 'flwr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True)


def test_a_disk_that_refuses_is_an_error_of_ours(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(folder)
    recorder.record(EVALUATION)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recorder_module.os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left"):
            recorder.sync()
    recorder.close()
    recorder.close()  # closing twice does no harm


def test_a_folder_that_cannot_take_the_files_is_an_error_of_ours(folder: RunFolder) -> None:
    folder.tensorboard.write_text("in the way")
    with Recorder(folder) as recorder, pytest.raises(CheckpointError, match="cannot be written"):
        recorder.record(EVALUATION)


def test_the_log_is_kept_beside_the_metrics_while_the_recorder_is_open(
    folder: RunFolder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with Recorder(folder) as recorder:
        recorder.record(EVALUATION)
        logging.getLogger("strategies.example").warning("odd")
    logging.getLogger("server_app.example").warning("later")
    first, *others = folder.log.read_text().splitlines()
    assert first.endswith("INFO    round 0  held-out  loss 3.500")
    assert others[-1].endswith("WARNING odd")
