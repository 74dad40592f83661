"""A fetched state takes the place of the old one, and the log goes on behind it, wherever the node dies."""

from collections.abc import Callable
from pathlib import Path

import pytest

from aspenfs.runtime import swap
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.snapshots.client import install, reset_log
from aspenfs.runtime.statedb import StateDb
from aspenfs.runtime.wal import Kind, Wal
from tests.runtime.killed import killed_at
from tests.runtime.snapshot_wire import filled, record

CLUSTER = b"cluster-id-of-16"
OLD, SNAPSHOT = 20, 100
VOTE = (7).to_bytes(8, "little")


def opened_log(place: Path) -> Wal:
    return Wal.open(RealDisk(place), "wal", CLUSTER, segment_bytes=1 << 14, background=False)


def a_node(place: Path, log_first: int = 1, log_last: int = 30) -> None:
    """A state of entry OLD, and a log that goes on beyond it; `state.new` of entry SNAPSHOT."""
    wal = opened_log(place)
    wal.save_hard_state(5, VOTE)
    if log_first > 1:
        wal.reset(log_first - 1)
    for index in range(log_first, log_last + 1):
        wal.append(1, 5, index, b"entry %d" % index * 50)
    wal.close()
    filled(place / "state", OLD, count=50).close()
    filled(place / "state.new", SNAPSHOT, seed=1, count=60).close()


def start(place: Path) -> tuple[int, int, int]:
    """What a start does; the applied index, and the first and the last index of the log."""
    index = swap.recover(RealDisk(place))
    wal = opened_log(place)
    if index is not None:
        reset_log(place, wal, index)
    state = StateDb(place / "state")
    try:
        assert state.verify().applied_index == state.applied_index
        assert wal.first_index - 1 <= state.applied_index <= wal.last_index
        assert wal.hard_state == (5, VOTE)
        wal.append(int(Kind.ENTRY), 6, wal.last_index + 1, b"it goes on")
        wal.sync()
        return state.applied_index, wal.first_index, wal.last_index
    finally:
        state.close()
        wal.close()


def install_it(place: Path) -> None:
    wal = opened_log(place)
    install(place, wal, SNAPSHOT)
    wal.close()


@pytest.mark.parametrize("log_last", [30, 100, 140])
def test_the_log_goes_on_behind_the_state_that_was_installed(tmp_path: Path, log_last: int) -> None:
    a_node(tmp_path, log_last=log_last)
    install_it(tmp_path)
    assert start(tmp_path) == (SNAPSHOT, SNAPSHOT + 1, SNAPSHOT + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state", "wal"]


def test_a_node_killed_at_any_step_starts_with_the_old_state_or_the_new_one(tmp_path: Path) -> None:
    outcomes = []
    for number in range(1, 100):
        place = tmp_path / str(number)
        place.mkdir()
        a_node(place)
        if not killed_at(number, lambda: install_it(place)):  # noqa: B023 – it is called at once
            break
        # The start that follows may be killed as well.
        killed_at(number % 7 + 1, lambda: start(place))  # noqa: B023
        outcomes.append(start(place)[0])
        assert sorted(path.name for path in place.iterdir()) == ["state", "wal"]
    else:
        pytest.fail("it never comes to its end")
    assert len(outcomes) > 8
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {OLD, SNAPSHOT}


def test_the_swap_is_over_only_when_the_log_was_reset_durably(tmp_path: Path) -> None:
    a_node(tmp_path)
    wal = opened_log(tmp_path)
    under_way = []

    def noted(call: Callable[..., object]) -> Callable[..., object]:
        def noting(*arguments: int) -> object:
            under_way.append((tmp_path / swap.MARKER).exists())
            return call(*arguments)

        return noting

    for name in ("reset", "sync"):
        setattr(wal, name, noted(getattr(wal, name)))
    install(tmp_path, wal, SNAPSHOT)
    assert under_way == [True, True]
    assert not (tmp_path / swap.MARKER).exists()
    wal.close()


def test_readers_see_the_old_state_until_the_new_one_is_adopted(tmp_path: Path) -> None:
    a_node(tmp_path)
    state = StateDb(tmp_path / "state")
    wal = opened_log(tmp_path)
    walk = state.items(b"f/", b"f0")
    first = next(walk)
    install(tmp_path, wal, SNAPSHOT)
    assert state.get(first[0]) == first[1]
    assert state.applied_index == OLD
    newer = StateDb(tmp_path / "state")
    state.adopt(newer)
    assert (state.applied_index, state.durable_index) == (SNAPSHOT, SNAPSHOT)
    assert state.get(first[0]) != first[1]
    wal.append(1, 6, SNAPSHOT + 1, b"entry")
    state.apply([(b"f/more", record(b"1"))], SNAPSHOT + 1)
    state.refresh()
    state.close()
    wal.close()
    assert start(tmp_path) == (SNAPSHOT + 1, SNAPSHOT + 1, SNAPSHOT + 2)
