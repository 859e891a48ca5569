"""What the benchmark of a deployment reads out of a site's log."""

from __future__ import annotations

from datetime import datetime

import pytest

from benchmarks.deployment import moments, parts_of

LOG = """\
2026-11-21 21:40:34,000 INFO :      Receiving: evaluate message (ID: 25)
2026-11-21 21:40:34,100 INFO :      Received successfully
2026-11-21 21:40:34,200 INFO :      Start `flwr-clientapp` process
2026-11-21 21:40:36,000 INFO :      Sending: evaluate message (ID: e7)
2026-11-21 21:40:39,250 INFO :      Receiving: train message (ID: a1)
2026-11-21 21:40:39,500 INFO :      Start `flwr-clientapp` process
2026-11-21 21:40:39,750 INFO :      Received successfully
2026-11-21 21:40:41,000 INFO    base path:base.gguf (861a8a627c0f) from cache in 0.8 s
2026-11-21 21:40:43,500 INFO :      Sending: train message (ID: e7)
2026-11-21 21:40:44,000 INFO :      Sent successfully
2026-11-21 21:40:50,000 INFO :      Receiving: train message (ID: a2)
"""


def test_only_trainings_that_were_answered_count() -> None:
    [found] = moments(LOG)
    assert found["replied"] - found["asked"] == pytest.approx(4.25)


def test_the_parts_of_a_round_at_a_site_add_up_to_what_the_server_waited() -> None:
    [found] = moments(LOG)
    sent = datetime(2026, 11, 21, 21, 40, 38).timestamp()
    phases = {"fetch": 0.1, "train": 1.0, "encode": 0.2, "push": 0.3}
    parts = parts_of(found, phases, sent, taken=sent + 6.0)
    assert sum(parts.values()) + phases["train"] == pytest.approx(6.0)
    assert parts["wait"] == pytest.approx(1.25)
    assert parts["start"] == pytest.approx(0.25)
    assert parts["hand_in"] == pytest.approx(0.5)
    assert parts["reply"] == pytest.approx(0.5)
    assert all(seconds >= 0 for seconds in parts.values())
