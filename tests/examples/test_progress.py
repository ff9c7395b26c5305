import io
import sys

import pytest
from bert_finetune.reporting.log import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal, io.StringIO])
def test_a_bar_on_a_terminal_and_plain_lines_in_a_file(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream())
    with Progress(num_steps=10, start=4) as progress:
        for step in range(5, 11):
            progress.step({"loss": 0.25, "learning_rate": 1e-4})
            if step % 3 == 0:
                progress.line(step, {"loss": 0.5, "accuracy": 0.75})
    written = sys.stderr.getvalue()
    assert "step 6/10: loss 0.5, accuracy 0.75, " in written
    assert "step 9/10: " in written
    if stream is Terminal:
        assert "10/10" in written
        assert "loss=0.2500, lr=1.00e-04" in written
    else:
        assert "\r" not in written
        assert len(written.splitlines()) == 2
