"""BlobReplicator: the chunk store of a node among others.

It stands where the file system expects its `Blobs` and its `Replicas`, where the store asks before it
proposes, and where observers hear of what was applied. While the node is alone it passes everything
through. Which rules make the parts safe together is in docs/design/blobs.md, "Several nodes".
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, Final, NamedTuple

import trio

from aspenfs.blobs.format import digest_of
from aspenfs.blobs.store import BlobStore
from aspenfs.cluster.types import Configuration, NodeId
from aspenfs.errors import ClusterError, NoSpace
from aspenfs.filesystem import references
from aspenfs.filesystem.volume import Volume
from aspenfs.kv.commands import Command
from aspenfs.kv.store import Store
from aspenfs.kv.types import Event
from aspenfs.runtime.blob_replication import wire
from aspenfs.runtime.blob_replication.fetch import Fetcher
from aspenfs.runtime.blob_replication.garbage import Garbage
from aspenfs.runtime.blob_replication.pins import Pins
from aspenfs.runtime.blob_replication.push import Pusher
from aspenfs.runtime.blob_replication.receive import Receiver
from aspenfs.runtime.blob_replication.repair import DELAY_S, Repair
from aspenfs.runtime.blob_replication.wire import Peers
from aspenfs.seams import Clock

LACKS_TIMEOUT_S: Final = 5.0
_BUSY_NS: Final = 10**9  # since somebody read or wrote


class ReplicationStatus(NamedTuple):
    """`missing` chunks are named and not here, as far as is known: all of them once `walked` is 1.
    Of those `unavailable` are on no node that answers, `waiting_for_room` wait for this node's disk.
    Counters count since the start."""

    missing: int
    unavailable: int
    waiting_for_room: int
    walked: float  # 0 to 1: how far the search for missing chunks is
    repaired: int
    fetching: int
    pinned: int
    pushing_bytes: int
    pushed_bytes: int
    received_bytes: int
    fetched_bytes: int
    served_bytes: int

    @property
    def is_complete(self) -> bool:
        """Is everything that is named here? Then this node may count as a copy."""
        return not self.missing and self.walked == 1.0


class BlobReplicator:
    """See the head of this file. All methods run in the loop's thread."""

    def __init__(self, blobs: BlobStore, store: Store, peers: Peers,
                 configuration: Callable[[], Configuration], node: NodeId, clock: Clock, *,
                 sync: Callable[[], Awaitable[None]], leads: Callable[[], bool],
                 refusal: Callable[[], NoSpace | None] = lambda: None) -> None:  # fmt: skip
        """`configuration` is the one in force here, the same object until it changes. `sync` returns when
        what was put before is on disk (`GroupSync`). `refusal` says why nothing may be written now."""
        self.blobs, self.store, self.node = blobs, store, node
        self._configuration, self._refusal, self._leads = configuration, refusal, leads
        self._known: Configuration | None = None  # what `_shared` was derived from
        self._shared = True
        self._now = clock.monotonic_ns
        self.pins = Pins(self._now)
        self.pusher = Pusher(blobs, peers, configuration, node, sync, self._now)
        self.fetcher = Fetcher(blobs, peers, self._now, self._has_room, self._kept)
        self.receiver = Receiver(blobs, self.pins, sync, self._has_room, self.damaged)
        self.repair = Repair(store, blobs, self.fetcher, peers.connected, self._is_busy)
        self._garbage: Garbage | None = None
        self.receiver.serve(peers)
        peers.handle(wire.LACKS, self._lacks)
        self._peers = peers
        self.get, self.has, self.delete = blobs.get, blobs.has, blobs.delete

    def bind(self, volume: Volume) -> None:
        """The file system over these chunks; before `run`, inside the loop."""
        self._garbage = Garbage(
            self.store, self.blobs, self.pins, volume, lambda: self.shared, lambda: self._leads()
        )
        volume.replicas = self

    # --- the file system's: Blobs and Replicas ---

    @property
    def shared(self) -> bool:
        configuration = self._configuration()
        if configuration is not self._known:
            self._known = configuration
            alone = Configuration(voters=(self.node,))
            self._shared = configuration._replace(auto_leave=False) != alone
        return self._shared

    def put(self, data: bytes) -> bytes:
        """The digest of a chunk of 1 byte to 1 MiB, stored here and on its way to the others. NoSpace."""
        refusal = self._refusal()
        if refusal is not None:
            raise refusal.with_traceback(None)
        if not self.shared:
            return self.blobs.put(data)
        digest = digest_of(data)
        is_new = self.blobs.add(digest, data)
        self.pins.add(digest)
        # What is named already needs no push: who names it again compares the count. And what was here,
        # but is not named, may be on the others too: they are asked before it is proposed.
        if is_new and references.count(self.store, digest) <= 0:
            self.pusher.push(digest, data)
        return digest

    @property
    def may_collect(self) -> bool:
        assert self._garbage is not None
        return self._garbage.may_collect

    @property
    def removes_rows(self) -> bool:
        return not self.shared or self._leads()

    def is_pinned(self, digest: bytes) -> bool:
        return digest in self.pins

    async def fetch(self, digest: bytes, ahead: Sequence[bytes] = ()) -> bytes:
        return await self.fetcher.fetch(digest, ahead)

    # --- the store's ---

    async def before_propose(self, command: Command) -> None:
        """Returns when the blobs that this transaction names are on disk on a majority, or are named
        already. To be awaited before each proposal of a command of this node. NoQuorum, NoSpace."""
        if self.shared:
            digests = references.unguarded(command)
            if digests:
                await self.pusher.ensure(digests)

    def observe(self, revision: int, events: Sequence[Event], origin: object) -> None:
        """An observer of the store: what each applied change means for the chunks here."""
        if not self.shared:
            return
        for key, record, _ in events:
            digest = references.digest_of(key)
            if digest is None:
                continue
            if references.count_in(record) <= 0:
                if self._garbage is not None:
                    self._garbage.unnamed(digest)
            elif not self.blobs.has(digest):
                self.repair.miss(digest, DELAY_S)

    # --- the daemon's ---

    async def run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Serves until cancelled. SyncFailed ends it, and must end the node."""
        assert self._garbage is not None, "bind comes first"
        async with trio.open_nursery() as nursery:
            self.pusher.start(nursery)
            self.fetcher.start(nursery)
            try:
                nursery.start_soon(self.repair.run)
                nursery.start_soon(self._garbage.run)
                if self.shared:
                    self.repair.walk()
                task_status.started()
                await trio.sleep_forever()
            finally:
                self.pusher.stop()
                self.fetcher.stop()

    def state_replaced(self) -> None:
        """A snapshot was installed: what it names may be missing here, what is here may be unnamed."""
        self.repair.walk()
        assert self._garbage is not None
        self._garbage.sweep()

    def damaged(self, digest: bytes) -> None:
        """A copy here can not be read: another one is fetched, if it is still named."""
        self.repair.miss(digest)

    async def lacking(self, node: NodeId, *, timeout_s: float = LACKS_TIMEOUT_S) -> tuple[int, bool]:
        """Chunks that are known to be missing on a node, and whether these are all: a learner that lacks
        (0, True) may become a voter without making the cluster poorer. PeerUnreachable, PeerRefused."""
        if node == self.node:
            return await self._lacks(node, None)
        return wire.lack_of(await self._peers.request(node, wire.LACKS, None, timeout_s=timeout_s))

    async def _lacks(self, node: int, body: Any) -> tuple[int, bool]:
        status = self.status()
        return status.missing, status.walked == 1.0

    def status(self) -> ReplicationStatus:
        pusher, fetcher, repair = self.pusher, self.fetcher, self.repair
        return ReplicationStatus(
            missing=repair.missing,
            unavailable=repair.unavailable,
            waiting_for_room=repair.waiting_for_room,
            walked=repair.walked,
            repaired=repair.repaired,
            fetching=fetcher.under_way,
            pinned=len(self.pins),
            pushing_bytes=pusher.held_bytes,
            pushed_bytes=pusher.pushed_bytes,
            received_bytes=self.receiver.received_bytes,
            fetched_bytes=fetcher.fetched_bytes,
            served_bytes=self.receiver.served_bytes,
        )

    # --- the parts' ---

    def _has_room(self) -> bool:
        return self._refusal() is None

    def _is_busy(self) -> bool:
        return self._now() - max(self.pusher.active_ns, self.fetcher.active_ns) < _BUSY_NS

    def _kept(self, digest: bytes) -> None:
        """It may have lost its last name while it was fetched."""
        with suppress(ClusterError):  # a state that is not answered from: what comes in its place is swept
            if self._garbage is not None and references.count(self.store, digest) <= 0:
                self._garbage.unnamed(digest)
