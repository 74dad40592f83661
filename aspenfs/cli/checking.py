"""Verification of a whole node: log, state database, blobs, and the invariants of files/.

Belongs here: the order of the checks and what each needs; offline (nobody else works on the state) and
online (beside a serving daemon). Not here: the invariants themselves (`filesystem/check.py`), printing.

Offline the log is verified by recovering from it, as the next mount would. Online it is not: the daemon
that appends to it has verified it when it started.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import trio

from aspenfs import errors
from aspenfs.blobs.store import BlobStore
from aspenfs.cli.lock import StateLock
from aspenfs.cli.paths import StateDirectory
from aspenfs.filesystem.check import Check, Problem, unnamed_blobs
from aspenfs.filesystem.layout import BLOB_PREFIX, named_digests
from aspenfs.filesystem.volume import NoReplicas, Replicas
from aspenfs.runtime import identity, swap
from aspenfs.runtime.control_command import Call
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.host import NodeStore
from aspenfs.runtime.system import SystemClock, SystemEntropy

BLOBS_A_TURN = 100  # looked for by the online check between two turns of others
APPLIED_WITHIN_S = 60.0  # a committed change is in the state database within a second as a rule
PASSES_MAX = 8  # a repair may uncover what it hid; each pass mends what the last one left


class Finding(NamedTuple):
    """`part` is log, state, blobs or files. `mended`: done; `mendable`: would be, with --repair."""

    part: str
    where: str
    text: str
    mendable: bool = False
    mended: bool = False


class Totals(NamedTuple):
    keys: int
    inodes: int
    chunks: int


def check_offline(
    directory: StateDirectory, *, repair: bool, done: Callable[[Totals], None]
) -> Iterator[Finding]:
    """Findings, worst part first; `done` gets the totals if the walk came to its end. Busy if in use."""
    with StateLock.acquire(directory):
        disk = RealDisk(directory.path)
        try:
            swap.recover(disk)  # before anything is opened: it may give way to something else
            identity.check_kept(directory.path)
            blobs = BlobStore.open(disk)
        except errors.StorageError as error:
            yield Finding("blobs", "", str(error))
            return
        except errors.IdentityLost as error:
            yield Finding("log", "", str(error))
            return
        try:
            store = NodeStore.open(
                directory.path,
                SystemClock(),
                SystemEntropy(),
                background=False,
                verify_entry=lambda command: all(map(blobs.has, named_digests(command))),
            )
        except errors.StorageError as error:
            blobs.close()
            yield Finding("log", "", str(error))
            return
        unnamed: list[bytes] = []
        try:
            yield from _verify_opened(store, blobs, repair, done, unnamed)
        finally:
            try:
                store.close()
                # Only now no start evaluates an entry again that may have named them.
                blobs.delete(unnamed)
            finally:
                blobs.close()


def _verify_opened(
    store: NodeStore, blobs: BlobStore, repair: bool, done: Callable[[Totals], None], unnamed: list[bytes]
) -> Iterator[Finding]:
    try:
        keys = store.verify().keys
    except errors.Corrupt as error:
        yield Finding("state", error.file, str(error))
        return
    chunks = 0
    for digest, damage in blobs.verify(quarantine=repair):
        chunks += 1
        if damage is not None:
            yield Finding("blobs", digest.hex() if digest else damage.file, str(damage), True, repair)
    check = Check(store, blobs.has)
    problems = list(check.problems())
    for _ in range(PASSES_MAX if repair else 0):
        mends = [problem.mend for problem in problems if problem.mend is not None]
        if not mends:
            break
        for problem in problems:
            if problem.mend is not None:
                yield Finding("files", problem.where, problem.text, True, True)
        trio.run(_mend, store, mends)
        check = Check(store, blobs.has)
        problems = list(check.problems())
    yield from map(_unmended, problems)
    if repair:
        # A crash between storing a chunk and naming it leaves bytes that nothing will ever delete.
        unnamed += unnamed_blobs(store, _digests(blobs))
    done(Totals(keys, check.inodes, chunks))


async def _mend(store: NodeStore, mends: list[Any]) -> None:
    for operations in mends:
        await store.txn([], operations)


def _digests(blobs: BlobStore) -> Iterator[bytes]:
    for digest, damage in blobs.verify():
        if digest is not None and damage is None:
            yield digest


def _unmended(problem: Problem) -> Finding:
    return Finding("files", problem.where, problem.text, problem.mend is not None)


class OnlineCheck:
    """The daemon's own answer to `aspen check`: walks a snapshot in a thread. What it mends are blobs that
    other nodes have and this one does not, or not in one piece."""

    def __init__(self, store: NodeStore, blobs: BlobStore, replicas: Replicas | None = None) -> None:
        self.store, self.blobs, self.replicas = store, blobs, replicas or NoReplicas()
        self._running = False

    async def handle(self, call: Call) -> dict[str, int]:
        """Sends each finding as an item, a list of the fields of Finding; the totals are the result. Busy."""
        if self._running:
            raise errors.Busy("a check is under way; wait for its end")
        self._running = True
        try:
            return await self._check(call)
        finally:
            self._running = False

    async def _check(self, call: Call) -> dict[str, int]:
        # What is looked at is the state database: what was written before this call must be in it.
        revision = await self.store.committed()
        with trio.move_on_after(APPLIED_WITHIN_S) as waiting:
            await self.store.applied(revision)
        if waiting.cancelled_caught:
            raise errors.Busy("the state does not follow the log: is the disk full? see aspen status")
        try:
            keys = (await trio.to_thread.run_sync(self.store.verify)).keys
        except errors.Corrupt as error:
            await call.item([*Finding("state", error.file, str(error))])
            return {"keys": 0, "inodes": 0, "chunks": 0}
        problems, named, inodes = await trio.to_thread.run_sync(self._walk)
        for problem in problems:
            await call.item([*_unmended(problem)])
        for count, digest in enumerate(named):
            if not self.blobs.has(digest) and self._is_named(digest):
                # In a cluster it may just be on its way here: that is no finding.
                lost = await self._fetched(digest, "bytes are lost: there is no such blob")
                if lost:
                    await call.item([*Finding("files", digest.hex(), lost)])
            if not count % BLOBS_A_TURN:
                await trio.lowlevel.checkpoint()
        chunks = 0
        for found, damage in self.blobs.verify():
            chunks += 1
            if damage is not None:
                lost = await self._fetched(found, "") if found and self._is_named(found) else "not named"
                where = found.hex() if found else damage.file
                await call.item([*Finding("blobs", where, str(damage), True, mended=not lost)])
            await trio.lowlevel.checkpoint()
        return {"keys": keys, "inodes": inodes, "chunks": chunks}

    async def _fetched(self, digest: bytes, otherwise: str) -> str:
        """Gets a blob from another node; if that fails, what is to be said about it: nothing if it works."""
        if not self.replicas.shared:
            return otherwise or "this node is alone"
        try:
            if not self.blobs.has(digest):  # a good copy may lie beside a damaged one
                await self.replicas.fetch(digest)
        except errors.Unavailable as error:
            return str(error)
        return "" if self.blobs.has(digest) else "there is no room to keep it"

    def _is_named(self, digest: bytes) -> bool:
        """Still: the snapshot is older than the index of blobs, and what nobody names may be gone."""
        row = self.store.get(BLOB_PREFIX + digest)
        return row is not None and any(row.value[:8])

    def _walk(self) -> tuple[list[Problem], Iterable[bytes], int]:
        """In a thread. Whether a blob is there is asked afterwards, in the loop, which owns the blobs."""
        with self.store.snapshot() as snapshot:
            check = Check(snapshot, None)
            problems = list(check.problems())
            return problems, check.references, check.inodes
