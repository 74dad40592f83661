"""Reading a backup: every frame checked as it comes, and that together they are a whole one.

Belongs here: what must hold of the frames of a backup, and handing out what is in them. Not here: bytes
(`format.py`), what becomes of the contents (`restoring.py`).

What is checked: the chain of digests, the order of the frames, rows in key order that decode, their
digest, and that each chunk which the rows count is there (or told to be lost), in order, and no other.
"""

from collections.abc import Callable
from typing import BinaryIO, NamedTuple, Protocol

from blake3 import blake3

from aspenfs.errors import Corrupt
from aspenfs.filesystem.layout import BLOB_PREFIX
from aspenfs.kv import records, rows
from aspenfs.kv.rows import Row
from aspenfs.limits import MIB
from aspenfs.runtime.backup import format as fmt
from aspenfs.runtime.backup.format import DIGEST_BYTES, End, Frame, Header, Kind


class Contents(Protocol):
    """What gets the contents of a backup, in this order."""

    def header(self, header: Header) -> None: ...

    def rows(self, block: list[Row]) -> None: ...

    def blob(self, digest: bytes, data: bytes) -> None: ...


class Nothing:
    """Contents that are only to be checked."""

    def header(self, header: Header) -> None: ...

    def rows(self, block: list[Row]) -> None: ...

    def blob(self, digest: bytes, data: bytes) -> None: ...


class Progress(NamedTuple):
    header: Header
    offset: int  # of the file, bytes
    rows: int
    blobs: int
    blob_bytes: int
    lost: tuple[tuple[bytes, str], ...]  # names of chunks that the backup could not have, and why


class Checker:
    """Takes a backup in pieces of any size: `feed` all of it, then `finish`. Corrupt, as soon as it shows."""

    def __init__(self, name: str, contents: Contents | None = None) -> None:
        self._reader = fmt.Reader(name)
        self._contents = contents or Nothing()
        self._header: Header | None = None
        self._end: End | None = None
        self._last_key = self._last_blob = b""
        self._state, self._named, self._found = blake3(), blake3(), blake3()
        self._rows = self._row_bytes = self._blobs = self._blob_bytes = 0
        self._lost: list[tuple[bytes, str]] = []

    def feed(self, data: bytes) -> None:
        for frame in self._reader.feed(data):
            self._take(frame)

    def finish(self) -> tuple[Header, End]:
        """There is no more. Corrupt unless that was a whole backup."""
        at, left = self._reader.offset, self._reader.left
        if self._header is None or self._end is None:
            if left:
                raise self._corrupt(at, f"the file is cut off: it ends {left} bytes behind this")
            raise self._corrupt(at, "the file is cut off here" if at else "the file is empty")
        if left:
            raise self._corrupt(at, "something follows the end of the backup")
        return self._header, self._end

    @property
    def progress(self) -> Progress | None:
        """None before the header has come."""
        if self._header is None:
            return None
        return Progress(self._header, self._reader.offset, self._rows, self._blobs, self._blob_bytes,
                        tuple(self._lost))  # fmt: skip

    # --- frames ---

    def _take(self, frame: Frame) -> None:
        kind, at = frame.kind, frame.offset
        if self._header is None:
            if kind != Kind.HEADER:
                raise self._corrupt(at, "the first frame is not the header")
            self._header = fmt.unpack_header(frame, self._reader.name)
            self._contents.header(self._header)
        elif self._end is not None:
            raise self._corrupt(at, "a frame behind the end")
        elif kind == Kind.ROWS and not self._last_blob:
            self._take_rows(frame)
        elif kind == Kind.BLOB:
            self._take_blob(frame)
        elif kind == Kind.LOST and len(frame.payload) >= DIGEST_BYTES:
            digest, why = frame.payload[:DIGEST_BYTES], frame.payload[DIGEST_BYTES:]
            self._note_blob(digest, at)
            self._lost.append((digest, why.decode("utf-8", "replace")))
        elif kind == Kind.END:
            self._take_end(frame)
        else:
            raise self._corrupt(at, f"a frame of kind {kind} has no place here")

    def _take_rows(self, frame: Frame) -> None:
        try:
            block = list(rows.unpack(frame.payload))
        except Corrupt as error:
            raise self._corrupt(frame.offset, str(error)) from error
        for key, record in block:
            if key <= self._last_key:
                raise self._corrupt(frame.offset, f"key {key[:80].hex()} does not come behind the one before")
            self._last_key = key
            if key.startswith(BLOB_PREFIX) and counted(record):
                self._named.update(key[len(BLOB_PREFIX) :])
        self._state.update(frame.payload)
        self._rows += len(block)
        self._row_bytes += len(frame.payload)
        self._contents.rows(block)

    def _take_blob(self, frame: Frame) -> None:
        self._note_blob(frame.payload_digest, frame.offset)
        self._blobs += 1
        self._blob_bytes += len(frame.payload)
        self._contents.blob(frame.payload_digest, frame.payload)

    def _note_blob(self, digest: bytes, at: int) -> None:
        if digest <= self._last_blob:
            raise self._corrupt(at, "the chunks are out of order")
        self._last_blob = digest
        self._found.update(digest)

    def _take_end(self, frame: Frame) -> None:
        end = fmt.unpack_end(frame, self._reader.name)
        seen = End(self._rows, self._row_bytes, self._state.digest(), self._blobs, self._blob_bytes,
                   len(self._lost))  # fmt: skip
        if end != seen:
            raise self._corrupt(frame.offset, f"it should have held {end}, and holds {seen}")
        if self._named.digest() != self._found.digest():
            raise self._corrupt(frame.offset, "the chunks in it are not those that its rows name")
        self._end = end

    def _corrupt(self, offset: int, cause: str) -> Corrupt:
        return fmt.corrupt(self._reader.name, offset, cause)


def counted(record: bytes) -> bool:
    """Whether the packed record of a blob's row says that something names the blob."""
    return int.from_bytes(records.unpack(record).value[:8], "little", signed=True) > 0


def read(file: BinaryIO, name: str, contents: Contents | None = None,
         progress: Callable[[Progress], object] = lambda _: None) -> tuple[Header, End]:  # fmt: skip
    """Reads a whole backup from `file`, from where it stands to its end. Corrupt; OSError passes through."""
    checker = Checker(name, contents)
    while data := file.read(MIB):
        checker.feed(data)
        if checker.progress is not None:
            progress(checker.progress)
    return checker.finish()
