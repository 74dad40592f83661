"""The bytes of a backup file (docs/design/snapshots.md, format 1): frames in a chain of digests.

    file    magic "ASPENBAK", version u32, zero u32, then frames
    frame   length of the payload u32, kind u8, three zeros, digest 32 bytes, payload

All numbers are little-endian. A frame's digest is BLAKE3 over the digest before (of the first frame: over
the 16 bytes at the file's head), its own first 8 bytes, and BLAKE3 of its payload: so none can be changed,
exchanged, left out or added, and the last one names the whole file.

Belongs here: frames and the nouns in them. Not here: which frames make a backup (`reading.py`,
`writing.py`). Pure: bytes in, bytes out.
"""

from collections.abc import Iterator
from enum import IntEnum
from struct import Struct
from typing import Any, Final, NamedTuple

import msgpack
from blake3 import blake3

from aspenfs.errors import Corrupt
from aspenfs.limits import BACKUP_FRAME_BYTES_MAX

MAGIC: Final = b"ASPENBAK"
VERSION: Final = 1
FILE_HEAD: Final = Struct("<8sII")
_FRAME: Final = Struct("<IB3x")
DIGEST_BYTES: Final = 32
FRAME_HEAD_BYTES: Final = _FRAME.size + DIGEST_BYTES

_ADVICE: Final = "this backup cannot be used; take another one"


class Kind(IntEnum):
    HEADER = 1  # the first frame: a msgpack map, see Header
    ROWS = 2  # rows (kv/rows.py), all in key order
    BLOB = 3  # a chunk; its name is BLAKE3 of the payload. In the order of the names
    LOST = 4  # the name of a chunk that could not be read, and why: 32 bytes, then text
    END = 5  # the last frame: a msgpack map, see End


class Header(NamedTuple):
    """What a backup is of. `index` and `term`: the entry of the log up to which it goes."""

    cluster_id: bytes
    cluster: str
    node: int  # which wrote it
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    term: int
    created_ns: int  # wall clock
    release: str
    rows: int  # an estimate
    row_bytes: int  # an estimate


class End(NamedTuple):
    """What a backup holds."""

    rows: int
    row_bytes: int  # of ROWS payloads
    state_digest: bytes  # BLAKE3 of all of them, as kv.machine.state_hash has it
    blobs: int
    blob_bytes: int
    lost: int


class Frame(NamedTuple):
    """`offset` in the file; `payload_digest` is BLAKE3 of `payload`."""

    offset: int
    kind: int
    payload: bytes
    payload_digest: bytes


def file_head() -> bytes:
    return FILE_HEAD.pack(MAGIC, VERSION, 0)


def pack(value: Header | End) -> bytes:
    packed: bytes = msgpack.packb(value._asdict())
    return packed


def unpack_header(frame: Frame, name: str) -> Header:
    match _unpacked(frame, name):
        case {"cluster_id": bytes(cluster_id), "cluster": str(cluster), "node": int(node),
              "index": int(index), "term": int(term), "created_ns": int(created_ns),
              "release": str(release), "rows": int(rows), "row_bytes": int(row_bytes)}:  # fmt: skip
            return Header(cluster_id, cluster, node, index, term, created_ns, release, rows, row_bytes)
    raise corrupt(name, frame.offset, "the header lacks what it should have")


def unpack_end(frame: Frame, name: str) -> End:
    match _unpacked(frame, name):
        case {"rows": int(rows), "row_bytes": int(row_bytes), "state_digest": bytes(state_digest),
              "blobs": int(blobs), "blob_bytes": int(blob_bytes), "lost": int(lost)}:  # fmt: skip
            return End(rows, row_bytes, state_digest, blobs, blob_bytes, lost)
    raise corrupt(name, frame.offset, "the end lacks what it should have")


def _unpacked(frame: Frame, name: str) -> Any:
    try:
        return msgpack.unpackb(frame.payload)
    except (ValueError, msgpack.UnpackException) as error:
        raise corrupt(name, frame.offset, f"not msgpack: {error}") from error


def corrupt(name: str, offset: int, cause: str) -> Corrupt:
    return Corrupt(name, offset, cause, _ADVICE)


class Writer:
    """Frames, one after another."""

    def __init__(self) -> None:
        self._digest = file_head()

    def frame(self, kind: Kind, payload: bytes, payload_digest: bytes | None = None) -> bytes:
        """The next frame. `payload_digest`, if it is known already, spares computing it."""
        assert len(payload) <= BACKUP_FRAME_BYTES_MAX, len(payload)
        head = _FRAME.pack(len(payload), kind)
        if payload_digest is None:
            payload_digest = blake3(payload).digest()
        self._digest = blake3(self._digest + head + payload_digest).digest()
        return b"".join((head, self._digest, payload))


class Reader:
    """Frames out of bytes as they come, in pieces of any size."""

    def __init__(self, name: str) -> None:
        """`name` is what errors call the file."""
        self.name = name
        self._buffer = bytearray()
        self.offset = 0  # in the file, of the buffer's first byte
        self._digest = b""  # of the frame before; empty before the file's head

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that `data` completes. Corrupt at the first one that is not what was written."""
        buffer = self._buffer
        buffer += data
        if not self._digest:
            if len(buffer) < FILE_HEAD.size:
                return
            self._take_head()
        while len(buffer) >= FRAME_HEAD_BYTES:
            length, kind = _FRAME.unpack_from(buffer)
            if length > BACKUP_FRAME_BYTES_MAX:
                raise corrupt(self.name, self.offset, f"a frame of {length} bytes")
            size = FRAME_HEAD_BYTES + length
            if len(buffer) < size:
                return
            yield self._take(size, kind)

    def _take_head(self) -> None:
        head = bytes(self._buffer[: FILE_HEAD.size])
        magic, version, _ = FILE_HEAD.unpack(head)
        if magic != MAGIC:
            raise corrupt(self.name, 0, "this is no backup of aspenfs")
        if version != VERSION:
            advice = "use the version of aspenfs that wrote it, or a newer one"
            raise Corrupt(self.name, 8, f"format {version}, this program reads format {VERSION}", advice)
        self._digest = head
        self._drop(FILE_HEAD.size)

    def _take(self, size: int, kind: int) -> Frame:
        with memoryview(self._buffer) as view:
            head, digest = bytes(view[: _FRAME.size]), bytes(view[_FRAME.size : FRAME_HEAD_BYTES])
            payload = bytes(view[FRAME_HEAD_BYTES:size])
        payload_digest = blake3(payload).digest()
        self._digest = blake3(self._digest + head + payload_digest).digest()
        if self._digest != digest:
            raise corrupt(self.name, self.offset, "the frame here is not what was written")
        frame = Frame(self.offset, kind, payload, payload_digest)
        self._drop(size)
        return frame

    def _drop(self, size: int) -> None:
        del self._buffer[:size]
        self.offset += size

    @property
    def left(self) -> int:
        """Bytes that make no whole frame (yet)."""
        return len(self._buffer)
