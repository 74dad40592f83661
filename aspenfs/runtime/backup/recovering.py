"""A cluster that lost its quorum for good goes on as a new one, with what one node has.

What that node has is its state and all entries of its log, those too of which nobody knows any more
whether a majority had them (as etcd's --force-new-cluster). What only the lost nodes had is lost. The
members of before must never meet the new cluster: so it gets a new id, and makes keys of its own.

Nothing of the node changes before all is made and the parts are put in place at once (`swap.py`): a
killed process leaves either the old cluster or the new one.

Belongs here: these steps. Not here: what is changed in the state (`refounding.py`).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from aspenfs import errors
from aspenfs.blobs.store import BlobStore
from aspenfs.cluster.types import Configuration
from aspenfs.filesystem.layout import BLOB_PREFIX
from aspenfs.limits import WAL_SEGMENT_BYTES
from aspenfs.runtime import identity, members, quarantine, swap
from aspenfs.runtime.backup import refounding
from aspenfs.runtime.backup.reading import counted
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.identity import CLUSTER_ID_BYTES, Identity
from aspenfs.runtime.snapshots.client import reset_log
from aspenfs.runtime.statedb import StateDb
from aspenfs.runtime.wal import Wal
from aspenfs.seams import Clock, Entropy

WAL: Final = "wal"
STATE: Final = "state"
_ADVICE: Final = "restore a backup, or recover another node"

# What other nodes were shown and trusted; the new cluster makes its own at its first ticket.
_CREDENTIALS: Final = (
    identity.NODE_CERTIFICATE_FILE, identity.NODE_KEY_FILE, identity.CA_BUNDLE_FILE, identity.CA_KEY_FILE,
)  # fmt: skip


class Found(NamedTuple):
    """What a node has. Of several nodes the one with the greatest (last_term, last_index) has the most."""

    node: Identity
    applied_index: int
    last_index: int  # of the log
    last_term: int  # of its last entry
    others: tuple[str, ...]  # the members that will be removed


class Recovered(NamedTuple):
    node: Identity  # the new one
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    missing_blobs: int  # chunks that files name and this node does not have


def inspect(directory: Path, *, segment_bytes: int = WAL_SEGMENT_BYTES) -> Found:
    """What is there to go on with. NotFound: no node here. Corrupt: it could not start either. Diverged:
    its state is known to be bad.

    The caller holds the lock on the directory, here and below.
    """
    node, wal = _opened(directory, segment_bytes)
    try:
        state = StateDb(directory / STATE)
        try:
            _check_continuous(wal, state)
            table = [members.unpack(record.value) for _, record in state.items(members.PREFIX, members.END)]
            others = tuple(sorted(f"{member.name} ({member.node})" for member in table
                                  if member.node != node.node_id and member.state != "removed"))  # fmt: skip
            with state.snapshot() as snapshot:
                term = snapshot.term
            for frame in wal.replay(max(wal.last_index, state.applied_index + 1)):
                term = frame.term
            return Found(node, state.applied_index, wal.last_index, term, others)
        finally:
            state.close()
    finally:
        wal.close()


def force_new_cluster(directory: Path, clock: Clock, entropy: Entropy,
                      progress: Callable[[str], object] = lambda _: None, *,
                      segment_bytes: int = WAL_SEGMENT_BYTES) -> Recovered:  # fmt: skip
    """Makes the node in `directory` the only member of a new cluster. Blocks.

    `progress` gets what is being done. Errors as of `inspect`, and NoSpace: a copy of the state needs
    room; then everything is as it was.
    """
    disk = RealDisk(directory)
    old, wal = _opened(directory, segment_bytes)
    try:
        progress("copying the state")
        index, term = _make_state(directory, old.node_id, wal, clock, entropy, progress)
    except BaseException:
        wal.close()
        swap.recover(disk)
        raise
    wal.close()
    new = Identity(entropy.random_bytes(CLUSTER_ID_BYTES), old.name, old.node_id)
    try:
        refounding.write_log(directory, new.cluster_id, term, index, segment_bytes)
        refounding.write_identity(directory, new)
        missing = _missing_blobs(directory)
        parts = (WAL, STATE, identity.FILE_NAME)
        for part in parts:
            swap.sync_tree(disk, part + swap.NEW)
        progress("putting it in place")
        swap.commit(disk, swap.Swap(parts, _CREDENTIALS))
    except BaseException:
        swap.recover(disk)
        raise
    swap.carry_out(disk)
    swap.finish(disk)
    return Recovered(new, index, missing)


def _opened(directory: Path, segment_bytes: int) -> tuple[Identity, Wal]:
    """Identity and log, after what a start does first."""
    disk = RealDisk(directory)
    index = swap.recover(disk)
    node = identity.read(directory)
    if node is None:
        raise errors.NotFound(f"no node here: {directory} holds no cluster")
    identity.check_kept(directory)
    marker = quarantine.read(directory)
    if marker is not None:
        raise errors.Diverged(
            f"the state of this node is known to be bad, since entry {marker.index} or before: recover "
            "another node, or restore a backup. If this is all that is left, remove "
            f"{directory / quarantine.FILE_NAME}, and check every file"
        )
    wal = Wal.open(disk, WAL, node.cluster_id, segment_bytes=segment_bytes, background=False)
    if index is not None:
        reset_log(directory, wal, index)
    return node, wal


def _check_continuous(wal: Wal, state: StateDb) -> None:
    applied = state.applied_index
    if not wal.first_index - 1 <= applied <= wal.last_index:
        cause = f"it has entries {wal.first_index} to {wal.last_index}, the state ends with entry {applied}"
        raise errors.Corrupt(WAL, 0, cause, _ADVICE)


def _make_state(directory: Path, node: int, wal: Wal, clock: Clock, entropy: Entropy,
                progress: Callable[[str], object]) -> tuple[int, int]:  # fmt: skip
    """`state.new`: the old one, the whole log, and what makes it a new cluster's; its index and term."""
    old = StateDb(directory / STATE)
    try:
        _check_continuous(wal, old)
        old.copy_to(directory / (STATE + swap.NEW))
    finally:
        old.close()
    state = StateDb(directory / (STATE + swap.NEW), syncing=False)
    try:
        with state.snapshot() as snapshot:
            last_term = snapshot.term
        entries = refounding.Entries(state, clock, entropy)
        progress("applying the log")
        for frame in wal.replay(state.applied_index + 1):
            entries.replay(frame.kind, frame.payload)
            last_term = frame.term
        refounding.refound(entries, node)
        # A vote that was given in a later term binds nobody in a new cluster, but terms never go back.
        term = max(last_term, (wal.hard_state or (0, b""))[0])
        index = entries.close(term, Configuration((node,)))
        state.sync()
        return index, term
    finally:
        state.close()


def _missing_blobs(directory: Path) -> int:
    """How many chunks the new state names that are not here. (A node fetches those it lacks from others.)"""
    blobs = BlobStore.open(RealDisk(directory))
    state = StateDb(directory / (STATE + swap.NEW))
    try:
        missing = 0
        with state.snapshot() as snapshot:
            for key, record in snapshot.rows(BLOB_PREFIX):
                if not key.startswith(BLOB_PREFIX):
                    break
                missing += counted(record) and not blobs.has(key[len(BLOB_PREFIX) :])
        return missing
    finally:
        state.close()
        blobs.close()
