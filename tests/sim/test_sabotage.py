"""The checks bite: a cluster that is broken in a way that somebody once got wrong is found out.

Each sabotage is run, seed after seed, until a check fails; and it must be one that is about that mistake. The
same seeds with the right parts pass (`test_seeds.py`).
"""


import pytest

from aspenfs.sim.sabotage import SABOTAGES, search

pytestmark = pytest.mark.timeout(600)  # up to a quarter of a minute of one core


@pytest.mark.parametrize("name", sorted(SABOTAGES))
def test_is_caught(name: str) -> None:
    sabotage = SABOTAGES[name]
    found = search(sabotage)
    assert found is not None, f"{sabotage.about}: not noticed in {sabotage.seeds} runs"
    assert found.result.check in sabotage.checks


# What finds it if the checks that are about the very mistake are switched off: its consequences.
BEHIND = [
    ("ack-before-sync", {"ack-durable", "vote-durable", "commit-durable", "applied-durable"}),
    ("forget-vote", {"vote-durable"}),
    ("commit-by-counting", {"commit-own-term"}),
    ("count-learners", {"commit-durable"}),
    ("count-removed", {"commit-durable"}),
    ("apply-uncommitted", {"applied-committed", "commit-durable", "commit-own-term"}),
    ("stale-leader-reads", {"stale-read", "lease-conflict"}),
    ("no-barrier", {"stale-read", "lease-conflict", "answers"}),
    ("take-repetitions", {"answers"}),
    ("no-dedup", {"answers"}),
    ("apply-by-node", {"state-machine-safety"}),
]


@pytest.mark.parametrize(("name", "ignored"), BEHIND, ids=[name for name, _ in BEHIND])
def test_its_consequences_are_caught_too(name: str, ignored: set[str]) -> None:
    found = search(SABOTAGES[name], frozenset(ignored))
    assert found is not None
    assert found.result.check not in ignored | {"exception", "unknown"}


def test_nothing_of_it_is_left_behind() -> None:
    for sabotage in SABOTAGES.values():
        before = [owner.__dict__[name] for owner, name, _ in sabotage.patches]
        with sabotage.applied():
            assert all(owner.__dict__[name] is value for owner, name, value in sabotage.patches)
        assert [owner.__dict__[name] for owner, name, _ in sabotage.patches] == before
