"""Progress and Inflights: what a leader may send, state by state (etcd's `tracker`)."""

import pytest

from aspenfs.cluster.progress import Inflights, Progress, ProgressState


def progress(state: ProgressState, *, match: int = 3, next_index: int = 8, snapshot: int = 0) -> Progress:
    made = Progress(next_index, Inflights(2, 1000))
    made.match = match
    made.state = state
    made.pending_snapshot = snapshot
    return made


def test_inflights_are_full_by_number() -> None:
    inflights = Inflights(3, 1000)
    full = []
    for index in (1, 2, 3):
        inflights.add(index, 10)
        full.append(inflights.full)
    inflights.free_to(2)
    assert full == [False, False, True]
    assert len(inflights) == 1
    assert not inflights.full


def test_inflights_are_full_by_bytes_and_the_last_may_go_beyond() -> None:
    inflights = Inflights(3, 100)
    full = []
    for index, size in ((4, 99), (9, 500)):
        inflights.add(index, size)
        full.append(inflights.full)
    for index in (3, 8, 9):
        inflights.free_to(index)
        full.append(inflights.full)
    assert full == [False, True, True, True, False]
    assert len(inflights) == 0


def test_more_than_is_allowed_is_a_mistake() -> None:
    inflights = Inflights(1, 1000)
    inflights.add(1, 1)
    with pytest.raises(AssertionError):
        inflights.add(2, 1)


def test_a_probe_waits_for_its_answer() -> None:
    probe = progress(ProgressState.PROBE)
    paused = [probe.is_paused]
    probe.sent_entries(1, 10)
    paused.append(probe.is_paused)
    assert probe.next == 8
    assert probe.maybe_update(5)
    paused.append(probe.is_paused)
    assert paused == [False, True, False]


def test_replication_runs_ahead_until_it_is_full() -> None:
    replicate = progress(ProgressState.REPLICATE)
    paused = []
    for count in (5, 1):
        replicate.sent_entries(count, 100)
        paused.append(replicate.is_paused)
    replicate.inflights.free_to(12)
    replicate.sent_entries(0, 0)
    paused.append(replicate.is_paused)
    assert paused == [False, True, False]
    assert replicate.next == 14


def test_nothing_is_sent_to_who_fetches_a_snapshot() -> None:
    assert progress(ProgressState.SNAPSHOT).is_paused


@pytest.mark.parametrize(
    ("state", "snapshot", "expected"),
    [
        (ProgressState.REPLICATE, 0, 4),
        (ProgressState.SNAPSHOT, 10, 11),  # as if it had arrived
        (ProgressState.SNAPSHOT, 2, 4),
    ],
)
def test_probing_begins_behind_what_is_known(state: ProgressState, snapshot: int, expected: int) -> None:
    made = progress(state, snapshot=snapshot)
    made.sent_commit = 99
    made.become_probe()
    assert (made.state, made.next, made.pending_snapshot) == (ProgressState.PROBE, expected, 0)
    assert made.sent_commit == expected - 1


def test_replicating_begins_behind_the_match() -> None:
    made = progress(ProgressState.PROBE)
    made.sent_entries(1, 1)
    made.become_replicate()
    assert (made.next, made.is_paused) == (4, False)


@pytest.mark.parametrize(
    ("index", "expected", "match", "next_index"),
    [(2, False, 3, 8), (3, False, 3, 8), (5, True, 5, 8), (8, True, 8, 9), (9, True, 9, 10)],
)
def test_an_answer_moves_match_and_next(index: int, expected: bool, match: int, next_index: int) -> None:
    made = progress(ProgressState.REPLICATE)
    assert made.maybe_update(index) is expected
    assert (made.match, made.next) == (match, next_index)


@pytest.mark.parametrize(
    ("state", "rejected", "hint", "expected", "next_index"),
    [
        (ProgressState.REPLICATE, 3, 3, False, 8),  # old news
        (ProgressState.REPLICATE, 7, 7, True, 4),
        (ProgressState.PROBE, 6, 5, False, 8),  # not to the append of now
        (ProgressState.PROBE, 7, 5, True, 6),
        (ProgressState.PROBE, 7, 99, True, 7),
        (ProgressState.PROBE, 7, 0, True, 4),  # what matched, matches
    ],
)
def test_a_refusal_moves_next_back(
    state: ProgressState, rejected: int, hint: int, expected: bool, next_index: int
) -> None:
    made = progress(state)
    assert made.maybe_decrement(rejected, hint) is expected
    assert made.next == next_index


@pytest.mark.parametrize(
    ("sent", "commit", "expected"), [(5, 6, True), (6, 6, False), (7, 9, False), (9, 9, False), (6, 99, True)]
)
def test_a_commit_index_is_news_as_far_as_the_members_log_goes(
    sent: int, commit: int, expected: bool
) -> None:
    made = progress(ProgressState.REPLICATE)  # it has been sent up to 7
    made.sent_commit = sent
    assert made.could_use_commit(commit) is expected
