"""A backup becomes a new cluster of one node, in an empty state directory: all of it or nothing.

The parts are made beside each other under names that end in `.new`, while the file is read once from its
beginning to its end and verified; then they are put in place at once (`swap.py`). A damaged file, a full
disk or a killed process leave nothing that a start would take for a node.

Belongs here: these steps. Not here: what is changed in the state (`refounding.py`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from aspenfs import errors
from aspenfs.blobs.store import BlobStore
from aspenfs.cluster.types import Configuration
from aspenfs.kv.rows import Row
from aspenfs.limits import WAL_SEGMENT_BYTES
from aspenfs.runtime import identity, members, swap
from aspenfs.runtime.backup import refounding
from aspenfs.runtime.backup.format import End, Header
from aspenfs.runtime.backup.reading import Progress, read
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.identity import CLUSTER_ID_BYTES, Identity
from aspenfs.runtime.snapshots.blocks import finish_load
from aspenfs.runtime.statedb import MAP_BYTES, StateDb
from aspenfs.seams import Clock, Entropy

# What may lie in a directory that counts as empty: files of the command itself, and of mkfs.
_NO_MATTER: Final = frozenset(("lock", "daemon.pid", "daemon.log", "daemon.log.1", "ctl.sock", "lost+found"))


class Restored(NamedTuple):
    """What was made. `index`: the newest revision; the backup's is in `header`."""

    node: Identity
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    header: Header
    end: End
    lost: tuple[tuple[bytes, str], ...]  # chunks that the backup could not have, and why


def restore(file: BinaryIO, file_name: str, directory: Path, *, name: str | None, clock: Clock,
            entropy: Entropy, progress: Callable[[Progress], object] = lambda _: None,
            map_bytes: int = MAP_BYTES, segment_bytes: int = WAL_SEGMENT_BYTES) -> Restored:  # fmt: skip
    """Makes the backup in `file` a new cluster, called `name` or as it was. Blocks.

    AlreadyExists: the directory is not empty. Corrupt: the file is damaged or cut off; says where.
    NoSpace, StorageError: of the disk. After an error there is nothing in the directory. The caller
    holds the lock on it.
    """
    disk = RealDisk(directory)
    swap.recover(disk)  # an earlier attempt, which was killed
    _refuse_inhabited(directory)
    if name is not None:
        identity.check_name(name)
    try:
        contents = _Contents(directory, progress, map_bytes)
        try:
            header, end = read(file, file_name, contents, contents.note)
            node = Identity(entropy.random_bytes(CLUSTER_ID_BYTES), name or header.cluster, 0)
            node, index = _complete(contents, header, end, directory, node, clock, entropy, segment_bytes)
        finally:
            contents.close()
        parts = ("blobs", "wal", "state", "cluster.json")
        for part in parts:
            swap.sync_tree(disk, part + swap.NEW)
        swap.commit(disk, swap.Swap(parts))
    except BaseException:
        swap.recover(disk)
        raise
    swap.carry_out(disk)
    swap.finish(disk)
    return Restored(node, index, header, end, contents.lost)


def _refuse_inhabited(directory: Path) -> None:
    found = sorted(entry.name for entry in directory.iterdir() if entry.name not in _NO_MATTER)
    if identity.FILE_NAME in found:
        node = identity.read(directory)
        assert node is not None
        raise errors.AlreadyExists(f"{directory} holds a node of the cluster {node.name!r} already")
    if found:
        raise errors.AlreadyExists(f"{directory} is not empty: it has {', '.join(found[:5])}")


class _Contents:
    """Where the contents go: `state.new` and `blobs.new`."""

    def __init__(self, directory: Path, progress: Callable[[Progress], object], map_bytes: int) -> None:
        self._progress = progress
        self.lost: tuple[tuple[bytes, str], ...] = ()
        self.state = StateDb(directory / ("state" + swap.NEW), syncing=False, map_bytes=map_bytes)
        self.blobs = BlobStore.open(RealDisk(directory), "blobs" + swap.NEW)

    def note(self, progress: Progress) -> None:
        self.lost = progress.lost
        self._progress(progress)

    def header(self, header: Header) -> None: ...

    def rows(self, block: list[Row]) -> None:
        self.state.load(block)

    def blob(self, digest: bytes, data: bytes) -> None:
        self.blobs.add(digest, data)

    def close(self) -> None:
        try:
            self.state.close()
        finally:
            self.blobs.close()


def _complete(contents: _Contents, header: Header, end: End, directory: Path, node: Identity, clock: Clock,
              entropy: Entropy, segment_bytes: int) -> tuple[Identity, int]:  # fmt: skip
    """State, log and identity of the new cluster: `node` with its id, and the index of the newest entry."""
    state = contents.state
    finish_load(state, header.index, header.term, None, end.state_digest)
    contents.blobs.sync()
    state.refresh()
    node = node._replace(node_id=_new_node(state, entropy))
    entries = refounding.Entries(state, clock, entropy)
    refounding.refound(entries, node.node_id)
    index = entries.close(header.term, Configuration((node.node_id,)))
    state.sync()
    refounding.write_log(directory, node.cluster_id, header.term, index, segment_bytes)
    refounding.write_identity(directory, node)
    return node, index


def _new_node(state: StateDb, entropy: Entropy) -> int:
    """An id that no member of the old cluster had."""
    while True:
        node = int.from_bytes(entropy.random_bytes(8), "big") >> 1
        if node and state.get(members.key_of(node)) is None:
            return node
