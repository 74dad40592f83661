"""Chunks that were read and verified lately, so that a chunk read in pieces is hashed once."""

from collections import OrderedDict


class ChunkCache:
    """Least recently used chunks go first; bounded by the bytes of the chunks."""

    __slots__ = ("_bytes", "_bytes_max", "_chunks")

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._chunks: OrderedDict[bytes, bytes] = OrderedDict()

    def get(self, digest: bytes) -> bytes | None:
        chunk = self._chunks.get(digest)
        if chunk is not None:
            self._chunks.move_to_end(digest)
        return chunk

    def add(self, digest: bytes, chunk: bytes) -> None:
        self.drop(digest)
        self._chunks[digest] = chunk
        self._bytes += len(chunk)
        while self._bytes > self._bytes_max:
            self._bytes -= len(self._chunks.popitem(last=False)[1])

    def drop(self, digest: bytes) -> None:
        chunk = self._chunks.pop(digest, None)
        if chunk is not None:
            self._bytes -= len(chunk)
