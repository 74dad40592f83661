"""What is here and not named: candidates for collection, on each node for its own disk.

The log says when a blob's count became 0; each node then deletes its own copy, once its log can not ask for
it again and nobody was promised it (`filesystem/content.py`). Belongs here: candidates that no entry of the
log speaks of. A chunk may have been pushed here by a node that died before it named it, or have lost its
last name while this node was away. Candidates only: whether they go is decided when they are collected.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Final

import trio

from aspenfs import errors
from aspenfs.blobs.store import BlobStore
from aspenfs.filesystem import references
from aspenfs.filesystem.volume import Volume
from aspenfs.kv.store import Store
from aspenfs.limits import BLOB_PIN_S
from aspenfs.runtime.blob_replication.pins import Pins

logger = logging.getLogger(__name__)

PERIOD_S: Final = 5.0
ROWS: Final = 200  # looked at in one turn of the loop: some 1 ms
PAUSE_S: Final = 0.01


class Garbage:
    """See the head of this file. `leads`: is this node the leader?"""

    def __init__(self, store: Store, blobs: BlobStore, pins: Pins, volume: Volume,
                 is_shared: Callable[[], bool], leads: Callable[[], bool]) -> None:  # fmt: skip
        self._store, self._blobs, self._pins, self._volume = store, blobs, pins, volume
        self._is_shared, self._leads = is_shared, leads
        self._led = False
        self._to_sweep = True
        self._walk: Iterator[list[bytes]] | None = None  # of the sweep under way
        # What the last life of this process promised is kept, though it is not known any more.
        self._sweep_at = trio.current_time() + BLOB_PIN_S

    def sweep(self) -> None:
        """Looks at all chunks, once pins that nobody remembers are over."""
        self._to_sweep = True

    @property
    def may_collect(self) -> bool:
        return not self._is_shared() or trio.current_time() >= self._sweep_at

    def unnamed(self, digest: bytes) -> None:
        """This blob's count was seen to be 0."""
        volume = self._volume
        if len(volume.unreferenced) >= volume.garbage_max:
            self._to_sweep = True
        volume.unreference((digest,))

    async def run(self) -> None:
        while True:
            await trio.sleep(PERIOD_S)
            if self._is_shared():
                try:
                    await self._once()
                except errors.ClusterError as error:
                    logger.info("looking for blobs without a name waits: %s", error)
                    self._walk, self._to_sweep = None, True

    async def _once(self) -> None:
        for some in _slices(self._pins.ended()):
            await self._look_at(some)
        if self._leads() and not self._led:
            # Rows of 0 that no leader has taken away yet: see `Content.find_garbage`.
            self._volume.overlooked = True
        self._led = self._leads()
        await self._sweep_on()

    async def _sweep_on(self) -> None:
        """Goes on with the sweep until there are enough candidates for now."""
        if self._to_sweep and self._walk is None and self.may_collect:
            self._to_sweep = False
            self._walk = _slices(self._blobs.digests())
        while self._walk is not None and len(self._volume.unreferenced) < self._volume.garbage_max // 2:
            some = next(self._walk, None)
            if some is None:
                self._walk = None
            else:
                await self._look_at(some)

    async def _look_at(self, digests: list[bytes]) -> None:
        for digest in digests:
            if references.count(self._store, digest) <= 0 and digest not in self._pins:
                self.unnamed(digest)
        await trio.sleep(PAUSE_S)


def _slices(digests: Iterable[bytes]) -> Iterator[list[bytes]]:
    some = []
    for digest in digests:
        some.append(digest)
        if len(some) == ROWS:
            yield some
            some = []
    if some:
        yield some
