import io
import struct
import sys

import pytest
from bert_finetune.reporting.log import Log


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_bar_on_a_terminal_and_plain_lines_in_a_file(monkeypatch, tmp_path, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    with Log(tmp_path, 4, 10, 5, 3, False, {}) as log:
        for step in range(5, 11):
            log.step(step, {"loss": 0.25, "accuracy": 0.75, "learning_rate": 1e-4})
    written = sys.stderr.getvalue()
    assert "step 6/10: loss 0.25, accuracy 0.75, " in written
    assert "step 9/10: " in written
    if stream is Terminal:
        assert "10/10" in written
        assert "loss=0.2500, lr=1.00e-04" in written
    else:
        assert "\r" not in written
        assert len(written.splitlines()) == 3


def read_events(path):
    """Reads the events of a file: length, its checksum, event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content, events = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[12 + length + 4 :]
    return events


def read_scalars(path):
    return {
        (event.step, value.tag): value.simple_value
        for event in read_events(path)
        for value in event.summary.value
    }


def test_tensorboard_has_the_values_of_the_lines(tmp_path):
    with Log(tmp_path, 0, 4, 2, 2, True, {}) as log:
        for step in (1, 2):
            log.step(step, {"loss": step / 4, "learning_rate": 0.25})
        log.evaluation(2, {"eval_loss": 0.5, "eval_f1": 0.25, "other": 1.0})
    (path,) = (tmp_path / "runs").iterdir()
    assert read_scalars(path) == {
        (1, "train/epoch"): 0.5,
        (1, "train/loss"): 0.25,
        (1, "train/learning_rate"): 0.25,
        (2, "train/epoch"): 1.0,
        (2, "train/loss"): 0.5,
        (2, "train/learning_rate"): 0.25,
        (2, "eval/loss"): 0.5,
        (2, "eval/f1"): 0.25,
    }


def test_tensorboard_hides_the_steps_that_a_resumed_run_repeats(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog

    # Within a second; by default the library would overwrite the first file.
    for start in (0, 3):
        with Log(tmp_path, start, 9, 3, 1, True, {}) as log:
            for step in (start + 1, start + 2):
                log.step(step, {"loss": float(step)})
    starts, steps = [], []
    for path in sorted((tmp_path / "runs").iterdir()):
        starts += [
            event.step
            for event in read_events(path)
            if event.session_log.status == SessionLog.START
        ]
        steps.append(sorted({step for step, _ in read_scalars(path)}))
    assert starts == [1, 4]
    assert steps == [[1, 2], [4, 5]]


def test_tensorboard_is_closed_by_an_error(tmp_path):
    def fail():
        with Log(tmp_path, 0, 9, 3, 1, True, {}) as log:
            log.step(1, {"loss": 0.5})
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    (path,) = (tmp_path / "runs").iterdir()
    assert read_scalars(path)[1, "train/loss"] == 0.5
