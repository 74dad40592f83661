"""A short life of trouble: every kind of fault once, under load. `tools/chaos` does more of it."""

import random

import pytest

from tests.mount.chaos import Chaos

SEED = 1
USABLE_S = 20.0  # twice what is promised: other tests may be at work on the same processors
KINDS = [
    "kill",
    "isolate",
    "torn tail",
    "pause",
    "one-way",
    "disk full",
    "slow",
    "shatter",
    "transfer",
    "kill all",
    "blackout",
    "bridge",
]


@pytest.mark.timeout(300)
def test_nothing_acknowledged_is_lost_and_every_history_is_linearizable_under_all_faults() -> None:
    with Chaos(SEED, hurry=3, usable_s=USABLE_S) as run:
        kinds = random.Random(SEED).sample(KINDS, len(KINDS))
        assert set(kinds) == set(run.nemesis.kinds)
        report = run.run(iter(kinds))
    assert report.states_compared >= 2
    assert report.revisions_watched > 100
    for name, calls in report.calls.items():
        assert calls["acknowledged"] > 100, (name, report)
