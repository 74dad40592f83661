"""The state in LMDB: what readers see and when, what is durable, what a full disk and rot do."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest

from aspenfs.errors import Closed, Corrupt, InvalidArgument, NoSpace, StorageError
from aspenfs.kv import records
from aspenfs.kv.types import NO_ATTRIBUTES, Record
from aspenfs.limits import STORE_KEY_BYTES_MAX
from aspenfs.runtime.longkeys import CHUNK
from aspenfs.runtime.statedb import SLICE_KEYS, StateDb

T = TypeVar("T")


def record(value: bytes, revision: int = 1) -> Record:
    return Record(value, revision, revision, 1, 0, 0, NO_ATTRIBUTES)


def in_thread(work: Callable[[], T]) -> T:
    """As the applier does: LMDB binds a write transaction to its thread."""
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return results[0]


@pytest.fixture
def db(tmp_path: Path) -> Iterator[StateDb]:
    db = StateDb(tmp_path / "state")
    yield db
    db.close()


LONG = [b"k/" + bytes([65 + n]) * (CHUNK - 2 + n) for n in range(3)] + [b"k/" + b"z" * 4000]


def test_readers_see_a_batch_only_after_refresh(db: StateDb) -> None:
    items = [(key, record(key)) for key in [b"k/a", *LONG]]
    in_thread(lambda: db.apply(items, 7))
    assert db.get(b"k/a") is None
    assert db.applied_index == 0
    db.refresh()
    assert [db.get(key) for key, _ in items] == [record for _, record in items]
    assert db.applied_index == 7


def test_deleting_takes_a_key_and_its_empty_nodes_away(db: StateDb) -> None:
    db.apply([(key, record(b"v")) for key in LONG], 1)
    assert db.verify().nodes >= len(LONG)
    db.apply([(key, None) for key in [*LONG, b"k/never", LONG[0] + b"never", b"k/" + b"q" * 600]], 2)
    db.refresh()
    assert list(db.items(b"", b"")) == []
    assert db.verify() == (2, 0, 0, 0)


def test_a_node_is_kept_while_another_key_runs_through_it(db: StateDb) -> None:
    first, second = b"k/" + b"x" * 1200, b"k/" + b"x" * 1201
    db.apply([(first, record(b"1")), (second, record(b"2"))], 1)
    db.apply([(first, None)], 2)
    db.refresh()
    assert list(db.items(b"", b"")) == [(second, record(b"2"))]


def test_node_ids_are_never_used_again(db: StateDb) -> None:
    long = LONG[-1]
    db.apply([(long, record(b"1"))], 1)
    db.apply([(long, None)], 2)
    db.apply([(long, record(b"2"))], 3)
    db.refresh()
    assert db.get(long) == record(b"2")
    db.verify()


@pytest.mark.parametrize("size", [0, STORE_KEY_BYTES_MAX + 1])
def test_a_key_out_of_bounds_is_refused_and_changes_nothing(db: StateDb, size: int) -> None:
    with pytest.raises(InvalidArgument):
        db.apply([(b"k/a", record(b"v")), (b"x" * size, record(b"v"))], 1)
    db.refresh()
    assert db.get(b"k/a") is None
    assert db.get(b"x" * size) is None
    assert db.applied_index == 0


@pytest.mark.parametrize("reverse", [False, True])
def test_a_walk_goes_on_behind_its_key_after_a_refresh(db: StateDb, reverse: bool) -> None:
    keys = sorted([b"k/%02d" % n for n in range(10)] + LONG, reverse=reverse)
    db.apply([(key, record(b"old")) for key in keys], 1)
    db.refresh()
    walk = db.items(b"k/", b"k0", reverse=reverse)
    seen = [next(walk)[0] for _ in range(4)]
    db.apply([(key, record(b"new")) for key in keys[:-1]] + [(keys[-1], None)], 2)
    db.refresh()
    rest = list(walk)
    assert seen + [key for key, _ in rest] == keys[:-1]
    assert {item.value for _, item in rest} == {b"new"}


def test_a_walk_is_lazy(db: StateDb) -> None:
    db.apply([(b"k/a", record(b"v"))], 1)
    with db._env.begin(write=True, db=db._root) as txn:
        txn.put(b"k/b", b"not a record")
    db.refresh()
    walk = db.items(b"", b"")
    assert next(walk)[0] == b"k/a"
    with pytest.raises(Corrupt):
        next(walk)


class Paced:
    """Notes the turns, and what was in the file at their end."""

    def __init__(self, db: StateDb, fail_at: int = 0) -> None:
        self.db, self.fail_at = db, fail_at
        self.turns: list[str] = []

    def begin(self) -> None:
        self.turns.append("begin")
        if len(self.turns) == self.fail_at:
            raise RuntimeError("stop")

    def end(self) -> None:
        self.db.refresh()
        self.turns.append(f"end, applied {self.db.applied_index}")


def test_apply_takes_a_turn_for_each_slice_and_none_for_the_commit(db: StateDb) -> None:
    items = [(b"f/%06d" % n, record(b"v")) for n in range(SLICE_KEYS * 3 + 1)]
    paced = Paced(db)
    db.apply(items, 1, pace=paced)
    assert paced.turns == ["begin"] * 4 + ["end, applied 0"]
    db.refresh()
    assert db.applied_index == 1


def test_a_failure_in_the_middle_of_apply_changes_nothing(db: StateDb) -> None:
    items = [(b"k/%06d" % n, record(b"v")) for n in range(SLICE_KEYS + 1)]
    with pytest.raises(RuntimeError, match="stop"):
        db.apply(items, 1, {"term": b"1"}, pace=Paced(db, fail_at=2))
    db.refresh()
    assert (db.get(b"k/000000"), db.meta("term"), db.applied_index) == (None, None, 0)


def test_durable_index_lags_one_batch_until_sync(db: StateDb) -> None:
    assert db.durable_index == 0
    db.apply([(b"k/a", record(b"v"))], 5)
    assert db.durable_index == 0
    db.apply([(b"k/b", record(b"v"))], 9)
    assert db.durable_index == 5
    assert db.sync() == 9
    assert db.durable_index == 9


def test_everything_is_there_after_reopening(tmp_path: Path) -> None:
    db = StateDb(tmp_path / "state")
    items = [(key, record(key[:9])) for key in [b"k/a", *LONG]]
    db.apply(items, 3, {"term": b"\x02"})
    db.close()
    db.close()
    again = StateDb(tmp_path / "state")
    assert list(again.items(b"", b"")) == sorted(items)
    assert (again.applied_index, again.durable_index, again.meta("term")) == (3, 3, b"\x02")
    again.close()


def test_readonly_opens_and_verifies_without_writing(tmp_path: Path) -> None:
    db = StateDb(tmp_path / "state")
    db.apply([(key, record(b"v")) for key in LONG], 3)
    db.close()
    before = (tmp_path / "state" / "data.mdb").read_bytes()
    offline = StateDb(tmp_path / "state", readonly=True)
    assert offline.verify().keys == len(LONG)
    offline.close()
    assert (tmp_path / "state" / "data.mdb").read_bytes() == before
    with pytest.raises(Corrupt, match="no state"):
        StateDb(tmp_path / "elsewhere", readonly=True)


def test_a_full_map_is_no_space_and_keeps_what_was_there(tmp_path: Path) -> None:
    db = StateDb(tmp_path / "state", map_bytes=1 << 20)
    db.apply([(b"k/a", record(b"v"))], 1)
    with pytest.raises(NoSpace):
        db.apply([(b"k/%04d" % n, record(b"v" * 1000)) for n in range(2000)], 2)
    db.apply([(b"k/b", record(b"v"))], 2)
    db.refresh()
    assert [key for key, _ in db.items(b"", b"")] == [b"k/a", b"k/b"]
    db.close()


def test_a_full_disk_is_no_space_before_anything_is_written(tmp_path: Path) -> None:
    free = 1 << 30
    db = StateDb(tmp_path / "state", free_bytes=lambda: free)
    db.apply([(b"k/a", record(b"v"))], 1)
    size = db.size_bytes()
    free = 1 << 20
    with pytest.raises(NoSpace):
        db.apply([(b"k/b", record(b"v" * (1 << 20)))], 2)
    assert db.size_bytes() == size
    free = 1 << 30
    db.apply([(b"k/b", record(b"v" * (1 << 20)))], 2)
    db.refresh()
    assert [key for key, _ in db.items(b"", b"")] == [b"k/a", b"k/b"]
    db.close()


def test_another_format_is_refused(tmp_path: Path) -> None:
    db = StateDb(tmp_path / "state")
    with db._env.begin(write=True) as txn:
        txn.put(b"format", b"\x02", db=db._databases.meta)
    db.close()
    with pytest.raises(Corrupt, match="format"):
        StateDb(tmp_path / "state")


def test_a_file_that_is_not_lmdb_is_corrupt(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "data.mdb").write_bytes(b"\xa5" * 8192)
    with pytest.raises(Corrupt, match=r"data\.mdb"):
        StateDb(tmp_path / "state")


@pytest.mark.parametrize(("database", "key", "value", "cause"), [
    ("root", b"k/rot", b"\xff\xff", "does not decode"),
    ("root", b"k" * CHUNK, b"short", "not one's own"),
    ("root", b"k" * CHUNK, (1).to_bytes(8, "big"), "not one's own"),
    ("root", b"k" * CHUNK, (99).to_bytes(8, "big"), "without its node"),
    ("nodes", (99).to_bytes(8, "big") + b"x", records.pack(record(b"v")), "without a link"),
])  # fmt: skip
def test_verify_names_what_is_wrong(db: StateDb, database: str, key: bytes, value: bytes, cause: str) -> None:
    db.apply([(b"k/" + b"a" * CHUNK, record(b"v"))], 1)
    with db._env.begin(write=True) as txn:
        txn.put(key, value, db=getattr(db._databases, database))
    with pytest.raises(Corrupt, match=cause):
        db.verify()


def test_verify_refuses_a_node_newer_than_the_newest(db: StateDb) -> None:
    node = (99).to_bytes(8, "big")
    with db._env.begin(write=True) as txn:
        txn.put(b"k" * CHUNK, node, db=db._databases.root)
        txn.put(node + b"x", records.pack(record(b"v")), db=db._databases.nodes)
    with pytest.raises(Corrupt, match="newer"):
        db.verify()


def test_a_second_environment_in_one_process_is_refused(db: StateDb, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="already open"):
        StateDb(tmp_path / "state")


# --- another state in its place ---


def loaded(path: Path, items: list[tuple[bytes, Record]], index: int) -> StateDb:
    db = StateDb(path, syncing=False)
    for at in range(0, len(items), 3):
        assert db.load((key, records.pack(record)) for key, record in items[at : at + 3]) > 0
    db.apply([], index, {"term": (9).to_bytes(8, "big")})
    db.sync()
    db.refresh()
    return db


def test_rows_that_are_loaded_are_those_that_were_applied(tmp_path: Path, db: StateDb) -> None:
    items = [(key, record(key)) for key in sorted([b"f/%03d" % n for n in range(500)] + LONG)]
    db.apply(items, 7)
    db.refresh()
    copy = loaded(tmp_path / "copy", items, 7)
    assert list(copy.items(b"", b"")) == items == list(db.items(b"", b""))
    assert copy.verify() == db.verify()
    assert (copy.applied_index, copy.meta("term")) == (7, bytes(7) + b"\x09")
    copy.apply([(LONG[0], None), (b"f/250", record(b"changed"))], 8)
    copy.refresh()
    assert copy.get(b"f/250") == record(b"changed")
    copy.verify()
    copy.close()


@pytest.mark.parametrize("key", [b"f/1", b"f/2", b"a", b"", b"x" * (STORE_KEY_BYTES_MAX + 1)])
def test_rows_out_of_order_are_refused_and_change_nothing(tmp_path: Path, key: bytes) -> None:
    db = StateDb(tmp_path / "new", syncing=False)
    raw = records.pack(record(b"v"))
    db.load([(b"f/1", raw), (b"f/2", raw)])
    with pytest.raises(InvalidArgument):
        db.load([(b"f/3", raw), (key, raw)])
    db.refresh()
    assert [key for key, _ in db.items(b"", b"")] == [b"f/1", b"f/2"]
    db.close()


def test_a_load_without_room_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    free = [1 << 30]
    db = StateDb(tmp_path / "new", syncing=False, free_bytes=lambda: free[0])
    db.load([(b"f/1", b"x")])
    free[0] = 1000
    with pytest.raises(NoSpace):
        db.load([(b"f/2", b"x")])
    db.refresh()
    assert db.meta("applied") is None
    assert db._txn.stat(db._root)["entries"] == 1
    free[0] = 1 << 30
    assert db.load([(b"f/2", b"x")]) == 1
    db.close()


def test_readers_go_on_in_the_state_that_is_adopted(tmp_path: Path, db: StateDb) -> None:
    keys = [b"k/%02d" % n for n in range(10)]
    db.apply([(key, record(b"old")) for key in [*keys, *LONG]], 5)
    db.refresh()
    newer = loaded(tmp_path / "newer", [(key, record(b"new")) for key in [*keys, b"k/zz"]], 50)
    get, walk = db.get, db.items(b"k/", b"k0")
    assert next(walk) == (keys[0], record(b"old"))
    with db.snapshot() as snapshot:
        db.adopt(newer)
        assert snapshot.applied_index == 5
        assert {record.value for _, record in snapshot.scan(b"k/", b"k0")} == {b"old"}
    assert (db.applied_index, db.durable_index, db.meta("term")) == (50, 50, bytes(7) + b"\x09")
    assert get(b"k/zz") == record(b"new")
    assert list(walk) == [(key, record(b"new")) for key in [*keys[1:], b"k/zz"]]
    in_thread(lambda: db.apply([(b"k/zz", None)], 51))
    assert db.durable_index == 50
    db.refresh()
    assert get(b"k/zz") is None
    assert db.verify() == (51, 10, db.verify().value_bytes, 0)


def test_a_snapshot_in_a_thread_outlives_an_adoption_and_a_close(tmp_path: Path, db: StateDb) -> None:
    db.apply([(b"k/%04d" % n, record(b"old")) for n in range(2000)], 5)
    reading, go_on = threading.Event(), threading.Event()
    seen: list[bytes] = []

    def walk() -> None:
        with db.snapshot() as snapshot:
            for key, _ in snapshot.rows():
                seen.append(key)
                if len(seen) == 10:
                    reading.set()
                    go_on.wait(20)

    threads = [threading.Thread(target=walk)]
    threads[0].start()
    assert reading.wait(20)
    db.adopt(loaded(tmp_path / "newer", [(b"k/a", record(b"new"))], 50))
    with db.snapshot() as snapshot:
        db.close()
        go_on.set()
        threads[0].join()
        assert [key for key, _ in snapshot.rows()] == [b"k/a"]
    assert len(seen) == 2000
    with pytest.raises(Closed), db.snapshot():
        pass
    for name in ("state", "newer"):
        StateDb(tmp_path / name).close()  # LMDB would refuse a second environment
