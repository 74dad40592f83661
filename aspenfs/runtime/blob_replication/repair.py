"""What is named and not here: found out from what is applied, and fetched from other nodes.

Two ways lead here. Each transaction that names a chunk is looked at when it is applied: this node may not
have been among those who got it, or have deleted it a moment before. And a walk over all references finds
what was named while this node was away: at its start, after a snapshot, and when memory ran out. The walk
needs no notes on disk: what was fetched stays, and looking for it again takes microseconds.

It gives way to readers and writers: while they are at work, it rests as long as it works.
"""

import logging
import math
from collections.abc import Awaitable, Callable, Set
from typing import Final

import trio

from aspenfs import errors
from aspenfs.blobs.store import BlobStore
from aspenfs.filesystem import references
from aspenfs.kv.store import Store
from aspenfs.limits import BLOB_MISSING_MAX
from aspenfs.runtime.blob_replication.fetch import Fetcher

logger = logging.getLogger(__name__)

DELAY_S: Final = 1.0  # what was named just now may still be on its way here
NO_ROOM_S: Final = 1.0  # what was refused by this node's disk is fetched again, if there is room by then
RETRY_S: Final = 30.0  # what nobody has is asked for again, or when a node comes
LOOK_S: Final = 0.5  # who is connected is looked at so often, while something is missing
BATCH: Final = 32  # chunks fetched at a time
WALK_ROWS: Final = 200  # looked at in one turn of the loop: some 1 ms
WALK_PAUSE_S: Final = 0.01
WALK_AHEAD: Final = 1_024  # the walk waits while so many are to be fetched
AFTER_FAILURE_S: Final = 5.0


class Repair:
    """See the head of this file. All methods run in the loop's thread."""

    def __init__(self, store: Store, blobs: BlobStore, fetcher: Fetcher,
                 connected: Callable[[], Set[int]], is_busy: Callable[[], bool]) -> None:  # fmt: skip
        """`is_busy`: somebody reads or writes through this node."""
        self._store, self._blobs, self._fetcher = store, blobs, fetcher
        self._connected, self._is_busy = connected, is_busy
        self._missing: dict[bytes, float] = {}  # when to fetch it, trio's time; the first to come first
        self._unavailable: dict[bytes, None] = {}  # nobody who was asked has it
        self._retry_at = 0.0
        self._no_room = False  # the last batch was more than the disk takes
        self._seen: Set[int] = frozenset()
        self._position: bytes | None = None  # of the walk: behind this digest; None: not walking
        self._overlooked = False
        self._wake = trio.Event()  # replaced when set
        self.missing_max = BLOB_MISSING_MAX
        self.walks = self.repaired = 0

    # --- what others call ---

    @property
    def missing(self) -> int:
        """Known to be named and not here."""
        return len(self._missing) + len(self._unavailable)

    @property
    def unavailable(self) -> int:
        return len(self._unavailable)

    @property
    def waiting_for_room(self) -> int:
        """Missing, and not fetched as long as this node's disk is full."""
        return len(self._missing) if self._no_room or not self._fetcher.has_room() else 0

    @property
    def walked(self) -> float:
        """How far the walk is, 0 to 1: digests are evenly spread."""
        position = self._position
        return 1.0 if position is None else int.from_bytes(position[:4].ljust(4, b"\0"), "big") / (1 << 32)

    def walk(self) -> None:
        """Looks at all references, from the beginning."""
        self._position, self._overlooked = b"", False
        self._wake.set()

    def miss(self, digest: bytes, delay_s: float = 0.0) -> None:
        """This chunk is named, and not here or not readable."""
        if digest in self._missing or digest in self._unavailable:
            return
        if self.missing >= self.missing_max:
            self._overlooked = True
            return
        self._missing[digest] = trio.current_time() + delay_s
        self._wake.set()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._for_ever, self._walk_on)
            nursery.start_soon(self._for_ever, self._fetch_some)

    # --- walking and fetching ---

    async def _for_ever(self, step: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await step()
            except (errors.SyncFailed, errors.Closed):
                raise
            except errors.ClusterError as error:
                logger.info("repair of blobs waits: %s", error)
                await trio.sleep(AFTER_FAILURE_S)
            except Exception:
                logger.exception("repair of blobs failed, and goes on in %g s", AFTER_FAILURE_S)
                await trio.sleep(AFTER_FAILURE_S)

    async def _walk_on(self) -> None:
        position = self._position
        if position is None:
            await self._woken()
            return
        if len(self._missing) < WALK_AHEAD:
            rows = references.rows(self._store, position, WALK_ROWS)
            for digest, count in rows:
                if count > 0 and not self._blobs.has(digest):
                    self.miss(digest)
            if len(rows) == WALK_ROWS:
                self._position = rows[-1][0]
            else:
                self._position = None
                self.walks += 1
                logger.info("blobs are looked through missing=%d", self.missing)
        await trio.sleep(WALK_PAUSE_S)

    async def _fetch_some(self) -> None:
        self._try_again()
        batch = self._due()
        if not batch or not self._connected() or not self._fetcher.has_room():
            with trio.move_on_after(LOOK_S if self.missing else math.inf):
                await self._woken()
            return
        began = trio.current_time()
        nowhere, no_room = await self._fetcher.fill(batch)
        for digest in batch:
            self._missing.pop(digest, None)
        if nowhere:
            logger.info("blobs=%d are on no node that is connected", len(nowhere))
            self._unavailable.update(dict.fromkeys(nowhere))
            self._retry_at = trio.current_time() + RETRY_S
        self._missing.update(dict.fromkeys(no_room, trio.current_time() + NO_ROOM_S))
        self._no_room = bool(no_room)
        self.repaired += len(batch) - len(nowhere) - len(no_room)
        if self._overlooked and not self._missing:
            self.walk()
        if self._is_busy():
            await trio.sleep(trio.current_time() - began)

    async def _woken(self) -> None:
        event = self._wake
        await event.wait()
        if self._wake is event:  # the other task may have been first
            self._wake = trio.Event()

    def _due(self) -> list[bytes]:
        """The next to fetch; those that came by another way, or are named no more, are forgotten."""
        now = trio.current_time()
        batch: list[bytes] = []
        gone = []
        for digest, at in self._missing.items():
            if at > now or len(batch) == BATCH:
                break
            if self._blobs.has(digest) or references.count(self._store, digest) <= 0:
                gone.append(digest)
            else:
                batch.append(digest)
        for digest in gone:
            del self._missing[digest]
        return batch

    def _try_again(self) -> None:
        """Those that nobody had, once somebody came, or after a while."""
        if not self._fetcher.has_room():
            return
        connected = frozenset(self._connected())
        if self._unavailable and (connected - self._seen or trio.current_time() >= self._retry_at):
            self._missing.update(dict.fromkeys(self._unavailable, trio.current_time()))
            self._unavailable.clear()
        self._seen = connected
