"""A node that lost its cluster becomes a new one with all that it has, and old members are shut out."""

import subprocess
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio

from aspenfs import errors
from aspenfs.cluster.types import Configuration, EntryKind
from aspenfs.filesystem.check import Check
from aspenfs.kv import commands
from aspenfs.kv.commands import TXN, Command
from aspenfs.kv.types import Operation, put
from aspenfs.runtime import identity, members, swap
from aspenfs.runtime.backup.recovering import Found, Recovered, force_new_cluster, inspect
from aspenfs.runtime.consensus import encode_configuration
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.peers import credentials
from aspenfs.runtime.statedb import CONFIGURATION, TERM, StateDb
from aspenfs.runtime.system import SystemEntropy
from aspenfs.runtime.wal import Wal
from tests.kv.subject import FakeClock
from tests.runtime.backed_up import FILES, OTHER_NODE, fill, read_file
from tests.runtime.killed import killed_at
from tests.runtime.test_blob_garbage import Node

SEGMENT_BYTES = 1 << 16
HARD_STATE = (9, OTHER_NODE.to_bytes(8, "little"))
LOGGED = {b"k/app": b"proposed there", b"k/app2": b"proposed here", b"k/last": b"of the log"}
VOTERS = Configuration((1, OTHER_NODE, 4713))


def command(*operations: Operation) -> bytes:
    return commands.encode(Command(TXN, FakeClock().time_ns(), None, ([], operations, [])))


def a_survivor(directory: Path) -> int:
    """One of three members, with entries above its state of which nobody knows whether they were
    committed; the last index of its log."""

    async def make() -> None:
        node = Node(directory)
        try:
            await fill(node)
        finally:
            node.close()

    directory.mkdir(exist_ok=True)
    trio.run(make)
    credentials.establish(directory, FakeClock(), SystemEntropy())
    (directory / "peer.json").write_text("{}")
    here = identity.read(directory)
    assert here is not None
    state = StateDb(directory / "state")
    state.apply([], state.applied_index, {
        TERM: (2).to_bytes(8, "big"), CONFIGURATION: encode_configuration(VOTERS)})  # fmt: skip
    state.sync()
    state.close()
    wal = Wal.open(RealDisk(directory), "wal", here.cluster_id, background=False)
    wal.save_hard_state(*HARD_STATE)
    header = OTHER_NODE.to_bytes(8, "little") + (1).to_bytes(8, "little")
    for kind, payload in (
        (EntryKind.NORMAL, b""),
        (EntryKind.PROPOSAL, header + command(put(b"k/app", LOGGED[b"k/app"]))),
        (EntryKind.CONFIGURATION, command(put(b"k/app", b"no command: the kind says so"))),
        (EntryKind.NORMAL, command(put(b"k/app2", LOGGED[b"k/app2"]))),
        (EntryKind.PROPOSAL, header + b"not a command"),
        (EntryKind.PROPOSAL, header + command(put(b"k/last", LOGGED[b"k/last"]))),
    ):
        wal.append(int(kind), 8, wal.last_index + 1, payload)
    last = wal.last_index
    wal.close()
    return last


def recovered(directory: Path) -> Recovered:
    return force_new_cluster(directory, FakeClock(), SystemEntropy(), segment_bytes=SEGMENT_BYTES)


def on(directory: Path, test: Callable[[Node], Awaitable[None]]) -> None:
    async def main() -> None:
        node = Node(directory)
        try:
            await test(node)
        finally:
            node.close()

    trio.run(main)


def test_a_survivor_tells_what_it_has(tmp_path: Path) -> None:
    last = a_survivor(tmp_path)
    here = identity.read(tmp_path)
    assert here is not None
    assert inspect(tmp_path) == Found(here, last - 6, last, 8, (f"node{OTHER_NODE} ({OTHER_NODE})",))
    assert inspect(tmp_path) == inspect(tmp_path)


def test_it_goes_on_as_a_new_cluster_with_all_of_its_log(tmp_path: Path) -> None:
    last = a_survivor(tmp_path)
    old = identity.read(tmp_path)
    assert old is not None
    made = recovered(tmp_path)
    assert made.node == identity.read(tmp_path)
    assert (made.node.name, made.node.node_id) == (old.name, old.node_id)
    assert made.node.cluster_id != old.cluster_id
    assert (made.index > last, made.missing_blobs) == (True, 0)

    async def test(node: Node) -> None:
        store = node.store
        assert store.alone
        assert store.revision >= made.index
        for key, value in LOGGED.items():
            record = store.get(key)
            assert record is not None
            assert record.value == value
        for name, data in FILES.items():
            assert await read_file(node, name) == data
        assert (await store.txn([], [put(b"k/app", b"goes on")])).revision > made.index
        await store.committed()
        other = store.get(members.key_of(OTHER_NODE))
        assert other is not None
        assert members.unpack(other.value).state == "removed"
        assert store.get(members.key_of(1)) is None
        while await node.tree.reap():
            pass
        assert list(Check(store, node.blobs.has).problems()) == []

    on(tmp_path, test)


def test_keys_and_certificates_of_the_old_cluster_are_gone_and_its_log_too(tmp_path: Path) -> None:
    a_survivor(tmp_path)
    old = identity.read(tmp_path)
    assert old is not None
    mark = identity.born(tmp_path)
    assert mark is not None
    recovered(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "blobs", "cluster.json", "peer.json", "state", "wal"]  # fmt: skip
    assert identity.born(tmp_path) != mark
    with pytest.raises(errors.StorageError, match="belongs to cluster"):
        Wal.open(RealDisk(tmp_path), "wal", old.cluster_id, background=False)
    made = credentials.establish(tmp_path, FakeClock(), SystemEntropy())
    assert made.name.cluster_id != old.cluster_id
    here = identity.read(tmp_path)
    assert here is not None
    wal = Wal.open(RealDisk(tmp_path), "wal", here.cluster_id, background=False)
    assert wal.hard_state == (HARD_STATE[0], bytes(8))  # terms never fall
    wal.close()


def test_chunks_that_are_not_here_are_counted(tmp_path: Path) -> None:
    a_survivor(tmp_path)
    for path in (tmp_path / "blobs").iterdir():
        path.unlink()
    assert recovered(tmp_path).missing_blobs == 4


def test_no_node_no_recovery(tmp_path: Path) -> None:
    for act in (inspect, recovered):
        with pytest.raises(errors.NotFound):
            act(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_does_not_fit_its_state_is_not_built_upon(tmp_path: Path) -> None:
    a_survivor(tmp_path)
    swap.remove_tree(RealDisk(tmp_path), "state")
    wal = Wal.open(RealDisk(tmp_path), "wal", _cluster_id(tmp_path), background=False)
    wal.reset(1000)
    wal.close()
    for act in (inspect, recovered):
        with pytest.raises(errors.Corrupt, match="the state ends with entry 0"):
            act(tmp_path)
    assert not list(tmp_path.glob("*.new"))


def _cluster_id(directory: Path) -> bytes:
    here = identity.read(directory)
    assert here is not None
    return here.cluster_id


def everything(directory: Path) -> dict[str, bytes]:
    """All files but those of LMDB's lock and the log, whose tail an opening marks."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*"))
            if path.is_file() and path.parent.name != "wal" and path.name != "lock.mdb"}  # fmt: skip


def test_a_recovery_killed_anywhere_leaves_the_old_node_or_the_new_one(tmp_path: Path) -> None:
    last = a_survivor(tmp_path / "made")
    origin = tmp_path / "origin"
    _copy(tmp_path / "made", origin)
    old, outcomes, number = _cluster_id(origin), [], 1
    while True:
        place = tmp_path / "place"
        swap.remove_tree(RealDisk(tmp_path), "place")
        subprocess.run(["cp", "-a", origin, place], check=True)
        if not killed_at(number, lambda: recovered(place)):  # noqa: B023 – it is called at once
            break
        assert swap.recover(RealDisk(place)) is None
        names = {path.name for path in place.iterdir()}
        assert not any(name.endswith(".new") for name in names)
        new = _cluster_id(place) != old
        outcomes.append(new)
        if new:
            assert names == {"blobs", "cluster.json", "peer.json", "state", "wal"}
            state = StateDb(place / "state")
            wal = Wal.open(RealDisk(place), "wal", _cluster_id(place), background=False)
            assert wal.last_index == state.applied_index > last
            state.close()
            wal.close()
        else:
            assert {"node.crt", "node.key", "ca.crt", "ca.key"} <= names
            assert inspect(place, segment_bytes=SEGMENT_BYTES).last_index == last
            assert everything(place)["state/data.mdb"] == everything(origin)["state/data.mdb"]
        number += 9 if number < 30 else 1
        assert number < 200
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {False, True}
    assert outcomes.count(True) > 5, outcomes


def _copy(source: Path, target: Path) -> None:
    """With holes: a log is mostly zeros."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            content = path.read_bytes()
            with open(target / path.name, "wb") as file:
                file.write(content.rstrip(b"\0"))
                file.truncate(len(content))
