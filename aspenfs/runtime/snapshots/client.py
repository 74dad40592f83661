"""Fetching a state from another node into `state.new`, and putting it in the place of `state`.

The rows come block by block; while one is written the next is under way. A connection that breaks costs
the block that was on it: the reading goes on behind the last key. A sender that has no such snapshot
any more, or is not to be reached for RESUME_SECONDS, costs all of it: then the leader of that time is
asked for another one. What is fetched counts for nothing before `install`.

Belongs here: fetching, checking, installing. Not here: what the running node does with its applier,
its readers and the Raft core meanwhile (`host.py`), the order of the swap (`swap.py`).
"""

import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import trio
from blake3 import blake3

from aspenfs.errors import AspenError, Corrupt, InvalidArgument
from aspenfs.kv import rows
from aspenfs.limits import SNAPSHOT_BLOCK_BYTES
from aspenfs.runtime import quarantine, swap
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.snapshots.blocks import finish_load
from aspenfs.runtime.snapshots.server import DIGEST
from aspenfs.runtime.statedb import MAP_BYTES, StateDb
from aspenfs.runtime.wal import Wal

logger = logging.getLogger(__name__)

STATE: Final = "state"  # in the state directory, as swap.PARTS has it

RESUME_SECONDS: Final = 20.0  # a sender that does not answer for so long is given up
_REQUEST_SECONDS: Final = 15.0
PAUSE_SECONDS: Final = 0.5  # before asking again
_CLOSE_SECONDS: Final = 0.5
_DAMAGED_MAX: Final = 3  # fetches in a row whose digests did not match


class Requests(Protocol):
    """The part of `Peers` with which others are asked."""

    async def request(self, to: int, kind: str, body: Any, *, timeout_s: float) -> Any: ...


class Fetched(NamedTuple):
    """A state that lies complete and durable in `state.new`. `configuration` None: its node was alone."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    term: int
    configuration: bytes | None
    digest: bytes
    rows: int
    bytes: int  # of rows


class Progress(NamedTuple):
    """`rows_total` and `bytes_total` are estimates."""

    source: int
    index: int  # type: ignore[assignment]
    rows: int
    rows_total: int
    bytes: int
    bytes_total: int


class _Gone(Exception):
    """The snapshot that was being read cannot be read to its end."""


class _Source(NamedTuple):
    node: int
    id: bytes
    index: int  # type: ignore[assignment]
    term: int
    configuration: bytes | None
    rows: int
    bytes: int


class _Block(NamedTuple):
    rows: bytes
    last: bytes
    digest: bytes
    end: bool


_Outbox = trio.MemorySendChannel[_Block]


class SnapshotClient:
    """Fetches states for the node in `directory`. One fetch at a time."""

    def __init__(self, peers: Requests, directory: Path, *, map_bytes: int = MAP_BYTES,
                 block_bytes: int = SNAPSHOT_BLOCK_BYTES, resume_s: float = RESUME_SECONDS,
                 pause_s: float = PAUSE_SECONDS) -> None:  # fmt: skip
        self._peers, self._directory, self._map_bytes = peers, directory, map_bytes
        self._block_bytes, self._resume_s, self._pause_s = block_bytes, resume_s, pause_s
        self._path = directory / (STATE + swap.NEW)

    async def fetch(self, leader: Callable[[], int], min_index: int,
                    progress: Callable[[Progress], object] = lambda _: None) -> Fetched:  # fmt: skip
        """A state of at least `min_index`, from the node that `leader` names (0: nobody knows).

        Tries until it has one or is cancelled, and then leaves nothing. NoSpace, StorageError: of this
        node's disk. Corrupt: what came was damaged or made no sense, again and again.
        """
        damaged = 0
        try:
            while True:
                try:
                    source = await self._opened(leader, min_index)
                    return await self._pulled(source, leader, progress)
                except _Gone as error:
                    logger.info("a snapshot was lost on its way: %s", error)
                except Corrupt as error:
                    damaged += 1
                    logger.warning("a snapshot was damaged on its way: %s", error)
                    if damaged == _DAMAGED_MAX:
                        raise
                await trio.sleep(self._pause_s)
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self.discard)
            raise

    def discard(self) -> None:
        """Forgets what was fetched and is not to be installed. Blocks."""
        swap.remove_tree(RealDisk(self._directory), self._path.name)

    async def _opened(self, leader: Callable[[], int], min_index: int) -> _Source:
        while True:
            node = leader()
            if node:
                try:
                    answer = await self._peers.request(node, "snapshot.open", {"index": min_index},
                                                       timeout_s=_REQUEST_SECONDS)  # fmt: skip
                except AspenError as error:
                    why = str(error)
                else:
                    why = _said(answer, "refused")
                    if not why:
                        return _source(node, answer, min_index)
                logger.info("node=%d has no snapshot for us: %s", node, why)
            await trio.sleep(self._pause_s)

    async def _pulled(self, source: _Source, leader: Callable[[], int],
                      progress: Callable[[Progress], object]) -> Fetched:  # fmt: skip
        state = await trio.to_thread.run_sync(self._make)
        try:
            loader = _Loader(state)

            async def load(block: _Block) -> None:
                await trio.to_thread.run_sync(loader.add, block)
                progress(Progress(source.node, source.index, loader.rows, source.rows,
                                  loader.bytes, source.bytes))  # fmt: skip

            await _piped(lambda outbox: self._read_all(source, leader, outbox), load)
            digest = loader.digest
            await trio.to_thread.run_sync(
                finish_load, state, source.index, source.term, source.configuration, digest)  # fmt: skip
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(state.close)
                await self._close(source)
        await trio.to_thread.run_sync(swap.sync_tree, RealDisk(self._directory), self._path.name)
        return Fetched(source.index, source.term, source.configuration, digest, loader.rows, loader.bytes)

    def _make(self) -> StateDb:
        self.discard()
        return StateDb(self._path, map_bytes=self._map_bytes, syncing=False)

    async def _read_all(self, source: _Source, leader: Callable[[], int],
                        outbox: _Outbox) -> None:  # fmt: skip
        after, end = b"", False
        while not end:
            block = await self._read(source, after, leader)
            await outbox.send(block)
            after, end = block.last, block.end

    async def _read(self, source: _Source, after: bytes, leader: Callable[[], int]) -> _Block:
        """The block behind `after`, asked for again while there is hope."""
        body = {"id": source.id, "after": after, "max": self._block_bytes}
        deadline = trio.current_time() + self._resume_s
        while True:
            try:
                answer = await self._peers.request(source.node, "snapshot.read", body,
                                                   timeout_s=_REQUEST_SECONDS)  # fmt: skip
                break
            except AspenError as error:
                if trio.current_time() > deadline:
                    raise _Gone(str(error)) from error
                logger.info("node=%d snapshot interrupted: %s", source.node, error)
            await trio.sleep(self._pause_s)
        if why := _said(answer, "gone"):
            raise _Gone(why)
        return _block(source.node, answer)

    async def _close(self, source: _Source) -> None:
        """The sender need not keep it. If it does not hear that, it notices by itself."""
        with trio.move_on_after(_CLOSE_SECONDS):
            try:
                await self._peers.request(source.node, "snapshot.close", {"id": source.id},
                                          timeout_s=_CLOSE_SECONDS)  # fmt: skip
            except AspenError as error:
                logger.debug("node=%d was not told: %s", source.node, error)


async def _piped(produce: Callable[[_Outbox], Awaitable[None]],
                 consume: Callable[[_Block], Awaitable[None]]) -> None:  # fmt: skip
    """While one block is consumed the next is produced. Raises the first error of either, as it is."""
    failure: Exception | None = None
    outbox, inbox = trio.open_memory_channel[_Block](0)
    async with trio.open_nursery() as nursery:

        async def produce_all() -> None:
            nonlocal failure
            async with outbox:
                try:
                    await produce(outbox)
                except Exception as error:
                    failure = error

        nursery.start_soon(produce_all)
        try:
            async for block in inbox:
                await consume(block)
        except Exception as error:
            failure = error
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


class _Loader:
    """Blocks into a state, each checked first. `add` is for one thread at a time."""

    def __init__(self, state: StateDb) -> None:
        self._state, self._hasher = state, blake3()
        self.rows = self.bytes = 0

    @property
    def digest(self) -> bytes:
        return self._hasher.digest()

    def add(self, block: _Block) -> None:
        self._hasher.update(block.rows)
        if self._hasher.digest() != block.digest:
            raise self._corrupt("the rows are not those that the digest names")
        try:
            self.rows += self._state.load(rows.unpack(block.rows))
        except InvalidArgument as error:
            raise self._corrupt(str(error)) from error
        self.bytes += len(block.rows)

    def _corrupt(self, cause: str) -> Corrupt:
        return Corrupt("a snapshot on its way", self.bytes, cause, "it is fetched again")


def _said(answer: Any, name: str) -> str:
    """The reason that an answer gives under `name`, empty if it gives none."""
    return str(answer[name]) if isinstance(answer, dict) and name in answer else ""


def _source(node: int, answer: Any, min_index: int) -> _Source:
    match answer:
        case {"id": bytes(number), "index": int(index), "term": int(term), "digest": str(digest),
              "rows": int(count), "bytes": int(size), "configuration": bytes() | None as configuration}:
            if digest != DIGEST:
                raise _nonsense(node, f"it names states by {digest}, this release by {DIGEST}")
            if index < min_index:
                raise _nonsense(node, f"it offers a snapshot of entry {index}, asked for {min_index}")
            return _Source(node, number, index, term, configuration, count, size)
    raise _nonsense(node, "it offers what is no snapshot")


def _block(node: int, answer: Any) -> _Block:
    match answer:
        case {"rows": bytes(block), "last": bytes(last), "digest": bytes(digest), "end": bool(end)}:
            if not block and not end:
                raise _nonsense(node, "a block without rows is not the last one")
            return _Block(block, last, digest, end)
    raise _nonsense(node, "it sends what is no block of a snapshot")


def _nonsense(node: int, cause: str) -> Corrupt:
    return Corrupt(f"a snapshot of node {node}", 0, cause, "do all nodes run the same release?")


# --- installing ---


def install(directory: Path, wal: Wal, index: int, *, keeps_log: bool = False) -> None:
    """Puts `state.new`, complete and of entry `index`, in the place of `state`; the log goes on behind it.
    With `keeps_log` it does so already, that entry is durable in it, and it stays as it is.

    Whoever dies from here on, the next start goes on with it (`swap.recover`, `reset_log`). Blocks. Nothing
    may be applied before it returns, and nothing appended to a log that is not kept.
    """
    disk = RealDisk(directory)
    swap.commit(disk, swap.Swap((STATE,), (quarantine.FILE_NAME,), None if keeps_log else index))
    swap.carry_out(disk)
    if keeps_log:
        swap.finish(disk)
    else:
        reset_log(directory, wal, index)


def reset_log(directory: Path, wal: Wal, index: int) -> None:
    """The last step of `install`, also for a start that found it undone. Term and vote stay. Blocks."""
    wal.reset(index)
    wal.sync()
    swap.finish(RealDisk(directory))


assert STATE in swap.PARTS
