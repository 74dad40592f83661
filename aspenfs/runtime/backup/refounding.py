"""A state becomes the first state of a new cluster, whose only member is one node.

What a restored backup and a cluster that lost its quorum have in common: the members of before are
members no more, and nothing that only holds among them is kept. Everything else stays, and revisions go
on: the changes are entries like any other, evaluated here, behind those that made the state.

 - every member's row says "removed", but the own one goes: the node is a founder, and has none yet
 - join tickets and the CAs go: the new cluster makes its own
 - sessions of mounts end with their leases, and with them what they held of deleted files
 - every other lease starts its time anew, as on a new leader of etcd: its holder had no chance to renew it

Belongs here: these entries, and what a directory needs around the state. Not here: where the state comes
from (`restoring.py`, `recovering.py`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgpack
import trio

from aspenfs.cluster.types import Configuration, EntryKind
from aspenfs.errors import AspenError, InvalidArgument
from aspenfs.filesystem.layout import HOLD_PREFIX, SESSION_PREFIX
from aspenfs.kv import commands
from aspenfs.kv.commands import Command
from aspenfs.kv.engine import Engine
from aspenfs.kv.state import nothing_changed
from aspenfs.kv.types import Operation, delete, prefix_end, put
from aspenfs.limits import MIB, TXN_OPS_MAX
from aspenfs.runtime import identity, members, swap
from aspenfs.runtime.consensus import encode_configuration
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.identity import Identity
from aspenfs.runtime.members import Member
from aspenfs.runtime.peers import authority, tickets
from aspenfs.runtime.statedb import CONFIGURATION, TERM, StateDb
from aspenfs.runtime.wal import Wal
from aspenfs.seams import Clock, Entropy

PROPOSAL_HEADER_BYTES: Final = 16  # node id and number, before the command
_FLUSH_BYTES: Final = 16 * MIB  # in the overlay
_NO_VOTE: Final = bytes(8)


class Entries:
    """Entries evaluated on a state that nobody else has open. `close` writes what is left."""

    def __init__(self, state: StateDb, clock: Clock, entropy: Entropy) -> None:
        self._state, self._clock = state, clock
        self.engine = Engine(state, clock, entropy, trio.Event, index=state.applied_index)

    def replay(self, kind: int, payload: bytes) -> None:
        """The next entry of a log, as every node takes it (`runtime/consensus.py`, apply)."""
        engine, index = self.engine, self.engine.revision + 1
        data = payload[PROPOSAL_HEADER_BYTES:] if kind == EntryKind.PROPOSAL else payload
        if kind == EntryKind.CONFIGURATION or not data:
            engine.accept(index, nothing_changed(None))
        else:
            try:
                engine.submit(commands.decode(data))
            except InvalidArgument as error:
                engine.accept(index, nothing_changed(error))
        self._flush(_FLUSH_BYTES)

    def run(self, command: Command) -> None:
        """An entry more."""
        _, outcome = self.engine.submit(command)
        if isinstance(outcome.result, AspenError):
            raise outcome.result
        self._flush(_FLUSH_BYTES)

    def change(self, operations: Sequence[Operation]) -> None:
        """As many entries more as these operations need."""
        for at in range(0, len(operations), TXN_OPS_MAX):
            self.run(self.engine.txn_command([], operations[at : at + TXN_OPS_MAX])[0])

    def close(self, term: int, configuration: Configuration) -> int:
        """Writes all, with `term` and `configuration` as those of the last entry; its index."""
        index = self.engine.revision
        self._flush(0)
        self._state.apply([], index, {TERM: term.to_bytes(8, "big"),
                                      CONFIGURATION: encode_configuration(configuration)})  # fmt: skip
        self._state.refresh()
        return index

    def _flush(self, most: int) -> None:
        engine = self.engine
        if engine.overlay.bytes > most:
            index = engine.revision
            engine.committed_to(index)
            self._state.apply(engine.overlay.pending(index), index)
            self._state.refresh()
            engine.overlay.settle(index)


def refound(entries: Entries, node: int) -> None:
    """The entries that make the state that of a new cluster of `node`; see the head of this file."""
    engine = entries.engine
    gone = [
        authority.ROW_KEY,
        members.key_of(node),
        *(key for key, _ in engine.range(tickets.PREFIX, tickets.PREFIX_END)),
    ]
    entries.change([delete(key) for key in gone if engine.get(key) is not None])
    entries.change(list(_removals(engine)))
    sessions = _sessions(engine)
    for lease, _, _ in engine.leases():
        if lease in sessions:
            entries.run(engine.revoke_command(lease))
        else:
            entries.run(engine.keepalive_command(lease))
    entries.change([delete(key) for key, _ in _of_mounts(engine)])


def _removals(engine: Engine) -> Iterator[Operation]:
    for key, record in engine.range(members.PREFIX, members.END):
        try:
            member: Member = members.unpack(record.value)
        except (ValueError, TypeError, KeyError, msgpack.UnpackException):
            yield delete(key)  # who cannot be understood is certainly no member
            continue
        if member.state != "removed":
            yield put(key, members.pack(member._replace(state="removed", promote=False)))


def _of_mounts(engine: Engine) -> list[tuple[bytes, int]]:
    """Rows that belong to mounts, with their leases."""
    return [(key, record.lease) for prefix in (SESSION_PREFIX, HOLD_PREFIX)
            for key, record in engine.scan(prefix, prefix_end(prefix))]  # fmt: skip


def _sessions(engine: Engine) -> set[int]:
    return {lease for _, lease in _of_mounts(engine) if lease}


# --- around the state; all of it in parts that end in .new ---


def write_identity(directory: Path, node: Identity) -> None:
    """`cluster.json.new`, durable."""
    # It is written where no other file of that name is, and moved: only the swap may touch the real one.
    aside = directory / ("state" + swap.NEW)
    identity.write(aside, node)
    disk = RealDisk(directory)
    disk.rename(f"{aside.name}/{identity.FILE_NAME}", identity.FILE_NAME + swap.NEW)
    disk.sync_directory(aside.name)
    disk.sync_directory("")


def write_log(directory: Path, cluster_id: bytes, term: int, index: int, segment_bytes: int) -> None:
    """`wal.new`, durable: nobody was voted for in `term`, and the next entry is `index` + 1."""
    wal = Wal.open(RealDisk(directory), "wal" + swap.NEW, cluster_id, segment_bytes=segment_bytes,
                   background=False)  # fmt: skip
    try:
        wal.save_hard_state(term, _NO_VOTE)
        wal.reset(index)
        wal.sync()
    finally:
        wal.close()
