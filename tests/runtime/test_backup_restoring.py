"""A backup becomes a new cluster: everything that was in the old one, and nothing that binds it to that."""

import io
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from aspenfs import errors
from aspenfs.blobs.store import BlobStore
from aspenfs.filesystem.check import Check
from aspenfs.kv.types import put
from aspenfs.runtime import identity, members, swap
from aspenfs.runtime.backup.restoring import Restored, restore
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.peers import authority, tickets
from aspenfs.runtime.statedb import StateDb
from aspenfs.runtime.system import SystemEntropy
from aspenfs.runtime.wal import Wal
from tests.kv.subject import FakeClock
from tests.runtime.backed_up import FILES, LEASE_MS, OTHER_NODE, a_backup, backup_of, read_file, taken
from tests.runtime.killed import killed_at
from tests.runtime.test_blob_garbage import Node

LATER_NS = FakeClock().time_ns() + 90 * 86_400 * 1_000_000_000


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("origin")


@pytest.fixture(scope="module")
def backup(origin: Path) -> bytes:
    return a_backup(origin)


def restored(backup: bytes, directory: Path, name: str | None = None, map_bytes: int = 1 << 30) -> Restored:
    clock = FakeClock()
    clock.now_ns = LATER_NS
    directory.mkdir(exist_ok=True)
    return restore(io.BytesIO(backup), "a.aspen", directory, name=name, clock=clock, entropy=SystemEntropy(),
                   map_bytes=map_bytes, segment_bytes=1 << 16)  # fmt: skip


def on(directory: Path, test: Callable[[Node], Awaitable[None]]) -> None:
    async def main() -> None:
        node = Node(directory)
        try:
            await test(node)
        finally:
            node.close()

    trio.run(main)


def test_what_was_in_the_old_cluster_is_in_the_new_one(tmp_path: Path, backup: bytes) -> None:
    made = restored(backup, tmp_path)

    async def test(node: Node) -> None:
        store = node.store
        assert store.revision >= made.index > made.header.index
        for name, data in FILES.items():
            assert await read_file(node, name) == data
        record = store.get(b"k/app")
        assert record is not None
        assert (record.value, record.version) == (b"4", 5)
        older = store.get(b"k/app", revision=record.mod_revision - 1)
        assert older is not None
        assert older.value == b"3"
        result = await store.txn([], [put(b"k/app", b"goes on")])
        assert result.revision > made.index
        while await node.tree.reap():
            pass
        assert list(Check(store, node.blobs.has).problems()) == []

    on(tmp_path, test)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blobs", "cluster.json", "state", "wal"]


def test_it_is_a_new_cluster_and_nothing_binds_it_to_the_old_one(tmp_path: Path, backup: bytes) -> None:
    made = restored(backup, tmp_path, "another")
    old = made.header
    assert made.node == identity.read(tmp_path)
    assert made.node.name == "another"
    assert made.node.cluster_id != old.cluster_id
    assert made.node.node_id not in (1, OTHER_NODE, 4712)

    async def test(node: Node) -> None:
        table = {member.node: member for member in map(members.unpack, (
            record.value for _, record in node.store.range(members.PREFIX, members.END)))}  # fmt: skip
        assert {number: member.state for number, member in table.items()} == dict.fromkeys(
            (1, OTHER_NODE, 4712), "removed")  # fmt: skip
        assert not any(member.promote for member in table.values() if member.node != 4712)
        assert node.store.get(authority.ROW_KEY) is None
        assert node.store.range(tickets.PREFIX, tickets.PREFIX_END) == []
        assert node.store.alone

    on(tmp_path, test)
    # The old cluster's log is refused, and so would this one be by an old member.
    with pytest.raises(errors.StorageError, match="belongs to cluster"):
        Wal.open(RealDisk(tmp_path), "wal", old.cluster_id, background=False)


def test_leases_begin_anew_and_sessions_of_mounts_are_over(tmp_path: Path, backup: bytes) -> None:
    restored(backup, tmp_path)
    state = StateDb(tmp_path / "state")
    assert list(state.items(b"f/s", b"f/t")) == []
    state.close()

    async def test(node: Node) -> None:
        clock: FakeClock = node.volume.now.__self__  # type: ignore[attr-defined]
        clock.now_ns = LATER_NS + LEASE_MS * 1_000_000 - 1
        leases = {lease: ttl for lease, ttl, _ in node.store.leases()}
        assert leases == {7: LEASE_MS}
        assert node.store.get(b"k/leased") is not None

    on(tmp_path, test)


def test_a_damaged_or_cut_file_leaves_nothing(tmp_path: Path, backup: bytes) -> None:
    draw = random.Random(3)
    for number in range(12):
        at = draw.randrange(len(backup))
        damaged = backup[:at] if number % 2 else backup[:at] + bytes([backup[at] ^ 4]) + backup[at + 1 :]
        with pytest.raises(errors.Corrupt, match=r"^a\.aspen: corrupt at offset \d+: "):
            restored(damaged, tmp_path)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing(tmp_path: Path, backup: bytes) -> None:
    with pytest.raises(errors.NoSpace):
        restored(backup, tmp_path, map_bytes=1 << 14)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("inhabitant", ["cluster.json", "wal", "state", "node.crt", "somebody's.txt"])
def test_a_directory_with_something_in_it_is_left_alone(
    tmp_path: Path, backup: bytes, inhabitant: str
) -> None:
    if inhabitant == "cluster.json":
        identity.create(tmp_path, "there", SystemEntropy())
    elif "." in inhabitant:
        (tmp_path / inhabitant).write_text("mine")
    else:
        (tmp_path / inhabitant).mkdir()
    with pytest.raises(errors.AlreadyExists):
        restored(backup, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [inhabitant]


def test_a_lock_and_a_log_of_the_command_do_not_count(tmp_path: Path, backup: bytes) -> None:
    for name in ("lock", "daemon.pid", "daemon.log", "lost+found"):
        (tmp_path / name).mkdir()
    restored(backup, tmp_path)
    assert identity.read(tmp_path) is not None


@pytest.mark.parametrize("name", ["", "a b", "x" * 65, "a:b"])
def test_a_name_that_cannot_be_one_is_refused(tmp_path: Path, backup: bytes, name: str) -> None:
    with pytest.raises(errors.InvalidArgument):
        restored(backup, tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_a_restore_killed_anywhere_leaves_all_or_nothing(tmp_path: Path, backup: bytes) -> None:
    outcomes = []
    number = 1
    while True:
        place = tmp_path / str(number)
        place.mkdir()
        if not killed_at(number, lambda: restored(backup, place)):  # noqa: B023 – it is called at once
            break
        assert swap.recover(RealDisk(place)) is None
        left = sorted(path.name for path in place.iterdir())
        outcomes.append(bool(left))
        if left:
            assert left == ["blobs", "cluster.json", "state", "wal"]
        else:
            restored(backup, place)
        node = identity.read(place)
        assert node is not None
        blobs = BlobStore.open(RealDisk(place))
        assert blobs.stats().chunks == 4
        blobs.close()
        state = StateDb(place / "state")
        wal = Wal.open(RealDisk(place), "wal", node.cluster_id, background=False)
        assert (wal.first_index - 1, wal.last_index) == (state.applied_index, state.applied_index)
        state.close()
        wal.close()
        number += 5 if number < 60 else 1
        assert number < 200
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}


def test_a_backup_of_a_restored_cluster_is_one_again(tmp_path: Path, backup: bytes) -> None:
    (tmp_path / "first").mkdir()
    made = restored(backup, tmp_path / "first")
    again = []

    async def test(node: Node) -> None:
        again.append((await taken(backup_of(node, tmp_path)))[0])

    on(tmp_path / "first", test)
    (tmp_path / "second").mkdir()
    second = restored(again[0], tmp_path / "second")
    assert second.header.cluster_id == made.node.cluster_id
    assert (second.end.blobs, second.index > made.index) == (4, True)
