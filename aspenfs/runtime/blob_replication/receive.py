"""The answers to what other nodes ask about chunks: take these, have you those, give me that.

A chunk counts as taken when it is compared with its digest, on disk, and spared by collection for as long
as the other node was promised. A node without room says so, and is not counted.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import trio

from aspenfs import errors
from aspenfs.blobs.format import digest_of
from aspenfs.blobs.store import BlobStore
from aspenfs.runtime.blob_replication import wire
from aspenfs.runtime.blob_replication.pins import Pins
from aspenfs.runtime.blob_replication.wire import BATCH_BYTES_MAX, CHUNK_OVERHEAD, Peers, Verdict

logger = logging.getLogger(__name__)


class Receiver:
    """See the head of this file."""

    def __init__(self, blobs: BlobStore, pins: Pins, sync: Callable[[], Awaitable[None]],
                 has_room: Callable[[], bool], damaged: Callable[[bytes], object]) -> None:  # fmt: skip
        """`damaged` hears of chunks that turn out to be unreadable here."""
        self._blobs, self._pins, self._sync = blobs, pins, sync
        self._has_room, self._damaged = has_room, damaged
        self.received_bytes = self.served_bytes = 0

    def serve(self, peers: Peers) -> None:
        peers.handle(wire.PUT, self.put)
        peers.handle(wire.HAVE, self.have)
        peers.handle(wire.GET, self.get)

    async def put(self, node: int, body: Any) -> list[int]:
        verdicts = []
        for digest, data in wire.chunks_of(body):
            verdicts.append(int(self._put(node, digest, data)))
            await trio.lowlevel.checkpoint()  # each one takes some 0.4 ms
        if Verdict.STORED in verdicts:
            await self._sync()
        return verdicts

    def _put(self, node: int, digest: bytes, data: bytes) -> Verdict:
        if digest_of(data) != digest:
            logger.error("node=%d sent bytes that are not chunk %s", node, digest.hex())
            return Verdict.DAMAGED
        if not self._has_room():
            return Verdict.FULL
        if not self._pins.add(digest):  # before it is there: nothing may take it away in between
            return Verdict.BUSY
        try:
            # A copy that was here before may have gone bad since somebody looked.
            if not self._blobs.add(digest, data) and self._read(digest) is None:
                self._blobs.add(digest, data)
        except errors.NoSpace:
            return Verdict.FULL
        self.received_bytes += len(data)
        return Verdict.STORED

    async def have(self, node: int, body: Any) -> bytes:
        flags = bytearray()
        for digest in wire.digests_of(body):
            # Read, not looked up: who asks will rely on this copy as on one that it has just sent.
            flags.append(self._pins.add(digest) and self._read(digest) is not None)
            await trio.lowlevel.checkpoint()
        if any(flags):
            await self._sync()  # it may be in the page cache only
        return bytes(flags)

    async def get(self, node: int, body: Any) -> list[bytes | None]:
        answer: list[bytes | None] = []
        size = 0
        for digest in wire.digests_of(body):
            data = self._read(digest)
            size += CHUNK_OVERHEAD + len(data or b"")
            if size > BATCH_BYTES_MAX and answer:
                break
            answer.append(data)
            await trio.lowlevel.checkpoint()
        self.served_bytes += size
        return answer

    def _read(self, digest: bytes) -> bytes | None:
        try:
            return self._blobs.read(digest)
        except errors.NotFound:
            return None
        except errors.Corrupt as error:
            logger.warning("a chunk is damaged here: %s", error)
            self._damaged(digest)
            return None
