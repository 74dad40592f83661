"""Fetching another node's state when the log alone does not lead there any more.

Belongs here: when it is done and what is told of it. Not here: the transfer (`snapshots/client.py`), putting
the state in place (`host.py`), when it is needed (`cluster/following.py`).
"""

import logging
from pathlib import Path
from typing import Any

import trio

from aspenfs.cluster.types import Snapshot
from aspenfs.errors import NoSpace, StorageError
from aspenfs.runtime.host import NodeStore
from aspenfs.runtime.snapshots.client import Progress, Requests, SnapshotClient

logger = logging.getLogger(__name__)


class CatchingUp:
    """`run` beside the store, while there may be a network."""

    def __init__(self, store: NodeStore, peers: Requests, directory: Path) -> None:
        self._store = store
        self._client = SnapshotClient(peers, directory)
        self._wanted: Snapshot | None = None
        self._asked = trio.Event()
        self.progress: Progress | None = None  # of the fetch under way
        store.consensus.snapshot_wanted = self._want

    def _want(self, snapshot: Snapshot, leader: int) -> None:
        self._wanted = snapshot
        self._asked.set()

    async def run(self) -> None:
        """Until cancelled. What this node's disk refuses ends the attempt; the leader offers again."""
        consensus = self._store.consensus
        while True:
            await self._asked.wait()
            self._asked = trio.Event()
            wanted = self._wanted
            assert wanted is not None
            logger.info("index=%d the log does not reach back: fetching the state", wanted.index)
            try:
                fetched = await self._client.fetch(
                    lambda: consensus.replica.raft.leader, wanted.index, self._note
                )
            except (NoSpace, StorageError) as error:
                logger.warning("index=%d the state could not be fetched: %s", wanted.index, error)
                consensus.replica.snapshot_failed()
                continue
            finally:
                self.progress = None
            await self._store.replace_state(fetched)
            logger.info("index=%d state fetched rows=%d bytes=%d", fetched.index, fetched.rows, fetched.bytes)

    def _note(self, progress: Progress) -> None:
        self.progress = progress

    def status(self) -> dict[str, Any] | None:
        """Of the fetch under way, in rows and bytes; None if there is none."""
        return None if self.progress is None else self.progress._asdict()
