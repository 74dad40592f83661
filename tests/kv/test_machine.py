"""What only the log's reader can do: entries far apart, expiries overtaken, states compared whole."""

from typing import Any

import pytest

from aspenfs import errors
from aspenfs.kv import commands, history, keys, leases
from aspenfs.kv.commands import Command
from aspenfs.kv.machine import evaluate
from aspenfs.kv.memory import MemoryState
from aspenfs.kv.state import Outcome
from aspenfs.kv.types import Operation, append, delete, delete_range, merge, prefix_end, put
from aspenfs.limits import COMPACT_EFFECTS_MAX, COMPACT_REVISIONS_MAX, DEDUP_REVISIONS, TXN_DELETED_KEYS_MAX

SECOND = 1_000_000_000
CLIENT, OTHER = b"c" * 16, b"o" * 16


class Log:
    """Applies entries to a state; indices may be skipped, as if other entries were there."""

    def __init__(self) -> None:
        self.state = MemoryState()
        self.index = 0

    def run(self, kind: int, *body: Any, time_ns: int = 0, dedup: tuple[bytes, int] | None = None) -> Outcome:
        self.index += 1
        outcome = evaluate(self.state, self.index, Command(kind, time_ns, dedup, body))
        self.state.apply(outcome.effects)
        return outcome

    def txn(self, *operations: Operation, dedup: tuple[bytes, int] | None = None) -> Outcome:
        return self.run(commands.TXN, (), operations, (), dedup=dedup)

    def keys(self, prefix: bytes) -> list[bytes]:
        return [key for key, _ in self.state.items(prefix, prefix_end(prefix))]


def test_a_client_is_forgotten_by_log_position() -> None:
    log = Log()
    log.txn(merge(b"f/a", append(b"x")), dedup=(CLIENT, 1))
    log.index = DEDUP_REVISIONS - 1
    log.txn(merge(b"f/a", append(b"x")), dedup=(CLIENT, 1))
    record = log.state.get(b"f/a")
    assert record is not None
    assert record.value == b"x", "the last index at which it is remembered"
    log.txn(merge(b"f/a", append(b"y")), dedup=(CLIENT, 1))
    record = log.state.get(b"f/a")
    assert record is not None
    assert record.value == b"xy"


def test_the_table_of_clients_shrinks_back() -> None:
    log = Log()
    for number in range(50):
        client = number.to_bytes(16, "big")
        for sequence in (1, 2, 3):
            log.txn(dedup=(client, sequence))
    assert len(log.keys(keys.CLIENT)) == len(log.keys(keys.CLIENT_AT)) == 50
    log.index += DEDUP_REVISIONS
    for sequence in range(1, 14):
        log.txn(dedup=(CLIENT, sequence))
    assert log.keys(keys.CLIENT) == [keys.CLIENT + CLIENT]
    assert log.keys(keys.CLIENT_AT) == [keys.CLIENT_AT + keys.number(log.index) + CLIENT]


def test_a_client_that_comes_back_after_its_expiry_is_remembered_again() -> None:
    log = Log()
    log.txn(dedup=(CLIENT, 9))
    log.txn(dedup=(OTHER, 1))
    log.index += DEDUP_REVISIONS
    first = log.txn(merge(b"f/a", append(b"x")), dedup=(CLIENT, 1))
    touched = [key for key, _ in first.effects]
    assert len(touched) == len(set(touched)), "one effect per key"
    assert log.txn(merge(b"f/a", append(b"x")), dedup=(CLIENT, 1)).result == first.result
    assert log.keys(keys.CLIENT) == [keys.CLIENT + CLIENT]


def test_an_expiry_spares_leases_kept_alive_before_it_and_unknown_ones() -> None:
    log = Log()
    for lease in (1, 2):
        log.run(commands.LEASE_GRANT, lease, 1_000, time_ns=10 * SECOND)
        log.txn(put(b"k/%d" % lease, b"", lease))
    log.run(commands.LEASE_KEEPALIVE, 2, time_ns=11 * SECOND)
    outcome = log.run(commands.LEASE_EXPIRE, 2, 1, 1, 3, time_ns=11 * SECOND)
    assert outcome.result == 1
    assert [(event.key, event.record) for event in outcome.events] == [(b"k/1", None)]
    assert [lease.lease for lease in leases.everyone(log.state)] == [2]
    assert log.run(commands.LEASE_EXPIRE, 2, time_ns=12 * SECOND).result == 1
    assert log.keys(b"k/") == log.keys(keys.LEASE) == log.keys(keys.ATTACHED) == []


def test_a_deletion_of_too_many_keys_is_refused_whole() -> None:
    log = Log()
    for number in range(0, TXN_DELETED_KEYS_MAX + 1, 100):
        log.txn(
            *(put(b"f/%d" % at, b"") for at in range(number, min(number + 100, TXN_DELETED_KEYS_MAX + 1)))
        )
    refused = log.txn(put(b"f/other", b""), delete_range(b"f/", b"f0"))
    assert isinstance(refused.result, errors.TxnTooLarge)
    assert (refused.effects, refused.events) == ((), ())
    outcome = log.txn(delete(b"f/0"), delete_range(b"f/", b"f0"))
    assert len(outcome.events) == TXN_DELETED_KEYS_MAX + 1
    assert log.keys(b"f/") == []


def test_compaction_of_everything_leaves_the_current_records_only() -> None:
    log = Log()
    for number in range(30):
        log.txn(put(b"k/%d" % (number % 4), b"%d" % number), delete(b"k/%d" % ((number + 1) % 4)))
    current = {key: log.state.get(key) for key in log.keys(b"k/")}
    log.txn(put(b"f/last", b""))
    assert log.run(commands.COMPACT, log.index).result == 0
    assert {key: log.state.get(key) for key in log.keys(b"k/")} == current
    assert log.keys(keys.VERSION_OF) == log.keys(keys.CHANGED_AT) == []


def test_compaction_takes_a_bounded_part_at_a_time() -> None:
    log = Log()
    for number in range(COMPACT_REVISIONS_MAX + 1):
        log.txn(put(b"k/a", b"%d" % number))
    first = log.run(commands.COMPACT, log.index)
    assert first.result == 0, "the newest revision itself stays"
    log = Log()
    for _ in range(300):
        log.txn(*(put(b"k/%d" % number, b"") for number in range(100)))
    mark = log.index
    rounds = 1
    while (outcome := log.run(commands.COMPACT, mark)).result:
        assert len(outcome.effects) < COMPACT_EFFECTS_MAX + 200
        rounds += 1
    assert rounds == 3
    assert len(log.keys(keys.VERSION_OF)) == 100, "what the revision of the mark replaced"


def test_other_keyspaces_have_no_internal_keys_at_all() -> None:
    """They are the hot path: an effect more for each transaction of a file system would show."""
    log = Log()
    outcome = log.txn(put(b"f/a", b"1"), put(b"s/a", b"1"), put(b"g/a", b"1"))
    assert [key for key, _ in outcome.effects] == [b"f/a", b"s/a", b"g/a"]
    assert log.keys(b"\x00") == []


def test_replay_of_history_looks_at_its_range_only() -> None:
    log = Log()
    log.txn(put(b"k/a", b""), put(b"k/b", b""), put(b"k/c", b""), put(b"t/b", b""))
    log.txn(put(b"k/c", b""))
    log.txn(put(b"k/b", b""))
    following, batch = history.next_batch(log.state, b"k/b", b"k/c", 1, 3)
    assert batch is not None
    assert [event.key for event in batch.events] == [b"k/b"]
    following, batch = history.next_batch(log.state, b"k/b", b"k/c", following, 3)
    assert batch is not None
    assert (batch.revision, following) == (3, 4)
    assert history.next_batch(log.state, b"k/b", b"k/c", following, 3) == (4, None)


@pytest.mark.parametrize(
    ("first", "second"),
    [(b"a", b"a\x00"), (b"a", b"a\x00\xff"), (b"a\x00", b"a\x01"), (b"", b"\x00"), (b"a", b"b")],
)
def test_history_keys_keep_the_order_of_user_keys_and_never_mix_them(first: bytes, second: bytes) -> None:
    newest = (1 << 63) - 1
    assert keys.version_key(first, newest) < keys.version_key(second, 0)
    assert keys.version_key(first, 1) < keys.version_key(first, 256)
    for key in (first, second):
        assert keys.split_version_key(keys.version_key(key, 77)) == (key, 77)
        assert keys.version_key(key, 77).startswith(keys.versions_prefix(key))
    assert not keys.version_key(second, 0).startswith(keys.versions_prefix(first))


@pytest.mark.parametrize("stored", [b"k/a", b"\x00hshort", b"\x00h" + b"x" * 12])
def test_what_is_no_history_key_is_corrupt(stored: bytes) -> None:
    with pytest.raises(errors.Corrupt):
        keys.split_version_key(stored)
