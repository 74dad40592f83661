"""A backup of a serving node, piece by piece: all rows at one revision, then the chunks that they name.

The rows come from a snapshot that lasts no longer than the rows take: who reads too slowly for that gets
an error, because a snapshot keeps pages of the state from being used again. The chunks take as long as
they take: they are held back from collection, from the moment of the snapshot until each has been read.
They go in the order of their names, so one name tells which are still needed.

Belongs here: this order, and the pieces as the control socket sends them. Not here: bytes (`format.py`),
the file (`cli/backup.py`).
"""

import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Final, Protocol

import trio
from blake3 import blake3

from aspenfs import errors
from aspenfs.blobs.store import BlobStore
from aspenfs.filesystem.layout import BLOB_PREFIX
from aspenfs.filesystem.volume import Volume
from aspenfs.limits import BACKUP_DIGESTS_BYTES, SNAPSHOT_AGE_MAX_S, SNAPSHOT_BLOCK_BYTES
from aspenfs.runtime.backup import format as fmt
from aspenfs.runtime.backup.format import DIGEST_BYTES, FRAME_HEAD_BYTES, End, Header, Kind, Writer
from aspenfs.runtime.backup.reading import counted
from aspenfs.runtime.control_command import Call
from aspenfs.runtime.identity import Identity
from aspenfs.runtime.snapshots.blocks import next_block
from aspenfs.runtime.statedb import Snapshot
from aspenfs.seams import Clock

APPLIED_WITHIN_S: Final = 60.0  # a committed change is in the state database within a second as a rule
_DIGESTS_A_TURN: Final = 1_024


class Store(Protocol):
    """The part of a node's store that a backup needs."""

    identity: Identity

    async def barrier(self) -> int: ...

    async def committed(self, revision: int | None = None) -> int: ...

    async def applied(self, revision: int) -> None: ...

    def snapshot(self) -> AbstractContextManager[Snapshot]: ...


Send = Callable[[dict[str, Any]], Awaitable[None]]


class OnlineBackup:
    """Answers the control method `backup`, one at a time. All methods belong to the loop's thread."""

    def __init__(self, store: Store, volume: Volume, blobs: BlobStore, clock: Clock, directory: Path,
                 release: str) -> None:  # fmt: skip
        """`directory`: where names of chunks are put down that are too many for the memory."""
        self._store, self._volume, self._blobs, self._clock = store, volume, blobs, clock
        self._directory, self._release = directory, release
        self._needed_above: bytes | None = None  # chunks with greater names must stay; None: no backup runs
        volume.spares = self._needs

    def _needs(self, digest: bytes) -> bool:
        return self._needed_above is not None and digest > self._needed_above

    async def handle(self, call: Call) -> dict[str, Any]:
        """Sends {data, rows, rows_total, blobs, blobs_total} until all is said; the result counts it.

        `stale`: what this node has, without asking the others. `skip_damaged`: a chunk that cannot be
        read is told in its place, else it ends the backup. Busy; NoQuorum; Overloaded: the client reads
        too slowly.
        """
        stale, skip_damaged = call.params.get("stale") is True, call.params.get("skip_damaged") is True
        if self._needed_above is not None:
            raise errors.Busy("a backup is under way; wait for its end")
        self._needed_above = b""
        try:
            if not stale:
                await self._catch_up()
            return await _Run(self, call.item, skip_damaged).run()
        finally:
            self._needed_above = None

    async def _catch_up(self) -> None:
        """What was written anywhere before this call is in the state database afterwards."""
        await self._store.barrier()
        revision = await self._store.committed()
        with trio.move_on_after(APPLIED_WITHIN_S):
            await self._store.applied(revision)
            return
        raise errors.Busy("the state does not follow the log: is the disk full? see aspen status")


class _Run:
    """One backup on its way."""

    def __init__(self, backup: OnlineBackup, send: Send, skip_damaged: bool) -> None:
        self._backup, self._send, self._skip_damaged = backup, send, skip_damaged
        self._writer, self._state = Writer(), blake3()
        self._rows = self._row_bytes = self._blobs = self._blob_bytes = self._lost = 0
        self._rows_total = self._blobs_total = 0

    async def run(self) -> dict[str, Any]:
        backup = self._backup
        with tempfile.SpooledTemporaryFile(BACKUP_DIGESTS_BYTES, dir=str(backup._directory)) as names:
            deadline = trio.current_time() + SNAPSHOT_AGE_MAX_S
            with backup._store.snapshot() as snapshot, trio.move_on_at(deadline) as patience:
                header = await self._write_rows(snapshot)
                self._blobs_total = await trio.to_thread.run_sync(_note_names, snapshot, names)
            if patience.cancelled_caught:
                raise errors.Overloaded(
                    f"the rows were not taken within {SNAPSHOT_AGE_MAX_S} s, and no longer must they wait: "
                    "write the backup to a faster disk first")  # fmt: skip
            await self._write_blobs(names)
        end = End(self._rows, self._row_bytes, self._state.digest(), self._blobs, self._blob_bytes,
                  self._lost)  # fmt: skip
        await self._write(self._writer.frame(Kind.END, fmt.pack(end)))
        return {**end._asdict(), "index": header.index, "cluster": header.cluster}

    async def _write(self, data: bytes) -> None:
        await self._send({"data": data, "rows": self._rows, "rows_total": self._rows_total,
                          "blobs": self._blobs + self._lost, "blobs_total": self._blobs_total})  # fmt: skip

    async def _write_rows(self, snapshot: Snapshot) -> Header:
        backup, who = self._backup, self._backup._store.identity
        self._rows_total, size = snapshot.size()
        header = Header(who.cluster_id, who.name, who.node_id, snapshot.applied_index, snapshot.term,
                        backup._clock.time_ns(), backup._release, self._rows_total, size)  # fmt: skip
        await self._write(fmt.file_head() + self._writer.frame(Kind.HEADER, fmt.pack(header)))
        after, end = b"", False
        while not end:
            data, count, after, end = await trio.to_thread.run_sync(self._rows_behind, snapshot, after)
            if count:
                self._rows += count
                await self._write(data)
        self._rows_total = self._rows
        return header

    def _rows_behind(self, snapshot: Snapshot, after: bytes) -> tuple[bytes, int, bytes, bool]:
        """In a thread: the frame of the next rows, how many, the last key, whether they were the last."""
        block = next_block(snapshot, after, SNAPSHOT_BLOCK_BYTES)
        self._state.update(block.rows)
        self._row_bytes += len(block.rows)
        return self._writer.frame(Kind.ROWS, block.rows), block.row_count, block.last, block.end

    async def _write_blobs(self, names: IO[bytes]) -> None:
        names.seek(0)
        parts: list[tuple[bytes, bytes]] = []
        size = 0
        while found := names.read(_DIGESTS_A_TURN * DIGEST_BYTES):
            for digest in _cut(found):
                data = await self._blob(digest)
                if parts and size + len(data) > SNAPSHOT_BLOCK_BYTES:
                    await self._write(await trio.to_thread.run_sync(self._framed, parts))
                    parts, size = [], 0
                parts.append((digest, data))
                size += len(data) + FRAME_HEAD_BYTES
                self._backup._needed_above = digest
        if parts:
            await self._write(await trio.to_thread.run_sync(self._framed, parts))

    async def _blob(self, digest: bytes) -> bytes:
        """The chunk, from here or from another node; empty if it is to be told as lost."""
        await trio.lowlevel.checkpoint()
        try:
            return self._backup._blobs.read(digest)
        except (errors.NotFound, errors.Corrupt):
            pass
        try:
            return await self._backup._volume.replicas.fetch(digest)
        except errors.Unavailable:
            if self._skip_damaged:
                return b""
            raise

    def _framed(self, parts: list[tuple[bytes, bytes]]) -> bytes:
        """In a thread: frames of chunks, and of those that are lost."""
        frames = []
        for digest, data in parts:
            if data:
                found = blake3(data).digest()
                if found != digest:
                    cause = f"{digest.hex()} became another one"
                    raise errors.Corrupt("a chunk in memory", 0, cause, "try again")
                frames.append(self._writer.frame(Kind.BLOB, data, found))
                self._blobs += 1
                self._blob_bytes += len(data)
            else:
                why = b"it could be read on no node that answered"
                frames.append(self._writer.frame(Kind.LOST, digest + why))
                self._lost += 1
        return b"".join(frames)


def _note_names(snapshot: Snapshot, names: IO[bytes]) -> int:
    """In a thread: puts down the names of all chunks that something names, in order; how many."""
    count = 0
    for key, record in snapshot.rows(BLOB_PREFIX):
        if not key.startswith(BLOB_PREFIX):
            break
        if counted(record):
            names.write(key[len(BLOB_PREFIX) :])
            count += 1
    return count


def _cut(names: bytes) -> Iterator[bytes]:
    for at in range(0, len(names), DIGEST_BYTES):
        yield names[at : at + DIGEST_BYTES]
