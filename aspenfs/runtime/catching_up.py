"""Fetching another node's state: when the log alone does not lead there any more, or this one is a bad one.

Belongs here: when it is done, from whom, and what is told of it. Not here: the transfer
(`snapshots/client.py`), putting the state in place (`host.py`), when it is needed (`cluster/following.py`,
`divergence.py`).
"""

import logging
from collections.abc import Awaitable, Callable, Set
from pathlib import Path
from typing import Any, Final, Protocol

import trio

from aspenfs.cluster.types import Snapshot
from aspenfs.errors import NoSpace, StorageError
from aspenfs.runtime.host import NodeStore
from aspenfs.runtime.snapshots.client import Progress, SnapshotClient

logger = logging.getLogger(__name__)

_AGAIN_S: Final = 5.0  # after this node's disk has refused


class Peers(Protocol):
    """The part of the port by which others are asked."""

    def connected(self) -> Set[Any]: ...

    async def request(self, to: Any, kind: str, body: Any, *, timeout_s: float) -> Any: ...


class CatchingUp:
    """`run` beside the store, while there may be a network."""

    def __init__(self, store: NodeStore, peers: Peers, directory: Path) -> None:
        self._store, self._peers = store, peers
        self._client = SnapshotClient(peers, directory)
        self._asked = trio.Event()
        self._asks = 0  # of sources of a node in quarantine
        self._getting_well = trio.CancelScope()
        self.progress: Progress | None = None  # of the fetch under way
        store.consensus.snapshot_wanted = self._want
        store.suspended.append(self._ask)
        if store.quarantine is not None:
            self._ask()

    def _want(self, snapshot: Snapshot, leader: int) -> None:
        self._getting_well.cancel()  # that state is as good, and newer
        self._ask()

    def _ask(self) -> None:
        self._asked.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            if self._store.consensus.replica.installing is not None:
                await self._guarded(self._follow)
            elif self._store.quarantine is not None:
                await self._guarded(self._get_well)

    async def _guarded(self, fetch: Callable[[], Awaitable[None]]) -> None:
        """What this node's disk refuses ends the attempt; a leader offers again, a bad state stays one."""
        try:
            await fetch()
        except (NoSpace, StorageError) as error:
            logger.warning("the state could not be fetched: %s", error)
            if self._store.consensus.replica.installing is not None:
                self._store.consensus.replica.snapshot_failed()
                self._store.consensus.wake()
            if self._store.quarantine is not None:
                await trio.sleep(_AGAIN_S)
                self._ask()
        finally:
            self.progress = None

    async def _follow(self) -> None:
        """The leader's log does not reach back to where this node is."""
        replica = self._store.consensus.replica
        wanted = replica.installing
        assert wanted is not None
        logger.info("index=%d the log does not reach back: fetching the state", wanted.index)
        fetched = await self._client.fetch(lambda: replica.raft.leader, wanted.index, self._note)
        await self._store.replace_state(fetched)
        logger.info("index=%d state fetched rows=%d bytes=%d", fetched.index, fetched.rows, fetched.bytes)

    async def _get_well(self) -> None:
        """The state here is a bad one: that of a node that was found to have a good one takes its place."""
        store = self._store
        with trio.CancelScope() as self._getting_well:
            fetched = await self._client.fetch(self._next_source, store.revision, self._note)
            if store.consensus.replica.installing is not None:
                return  # the leader has offered a newer one in this very moment
            await store.replace_state(fetched)
            logger.warning("index=%d the quarantine is over: the state was fetched rows=%d bytes=%d",
                           fetched.index, fetched.rows, fetched.bytes)  # fmt: skip

    def _next_source(self) -> int:
        """In turn, so that one that has nothing to give does not hold it up; 0: none is there."""
        quarantine = self._store.quarantine
        assert quarantine is not None
        there = [node for node in quarantine.sources if node in self._peers.connected()]
        self._asks += 1
        return there[self._asks % len(there)] if there else 0

    def _note(self, progress: Progress) -> None:
        self.progress = progress
