"""The files of a chunk store: names, handles, tables, and reading records.

Here belongs what reads and what is the same for every segment. Where a new record goes and when
it is durable is in segments.py.
"""

import contextlib
import errno
from collections import deque
from typing import Final

from aspenfs import limits
from aspenfs.blobs import format as fmt
from aspenfs.blobs.scan import scan
from aspenfs.errors import AspenError, Corrupt, NoSpace, StorageError
from aspenfs.seams import Disk, DiskFile

_ADVICE: Final = "run `aspen check`; restore the chunk from a peer or a backup"


class Segment:
    """`end`: where the next record goes; `synced`: durable up to there; `live`: bytes of live records."""

    __slots__ = ("end", "file", "full", "id", "kept", "live", "path", "sealed", "synced", "table")

    def __init__(self, segment: int, path: str) -> None:
        self.id, self.path = segment, path
        self.file: DiskFile | None = None
        self.table: fmt.Table | None = None  # None: in the file beside the segment
        self.end = self.synced = fmt.SEGMENT_HEADER_BYTES
        self.live = 0
        self.full = False  # nothing is appended any more
        self.sealed = False  # and all of it is durable
        self.kept = False  # holds damage that only `verify(quarantine=True)` may clear away


class SegmentFiles:
    """The segments of one directory, by id, and what can be read of them."""

    def __init__(self, disk: Disk, directory: str) -> None:
        self.segments: dict[int, Segment] = {}
        self._disk, self._directory = disk, directory
        self._opened: deque[Segment] = deque()

    # --- tables ---

    def table(self, segment: Segment) -> fmt.Table:
        table = segment.table  # read once: `sync` may be sealing this segment
        if table is None:
            table = self._read_table(segment.id)
        if table is None:  # gone bad since it was opened: the segment still knows
            table = scan(self._file(segment), segment.id).table
        return table

    def _read_table(self, number: int) -> fmt.Table | None:
        try:
            file = self._disk.open(self._path(fmt.table_name(number)))
        except FileNotFoundError:
            return None
        try:
            return fmt.Table.decode(file.pread(file.size(), 0), number)
        except OSError:
            return None  # an unreadable table is no table
        finally:
            file.close()

    def _write_table(self, segment: Segment) -> None:
        """Only for segments whose bytes are durable. Without room the table stays in memory."""
        table = segment.table
        if table is None:
            return
        data = table.encode(segment.id)
        try:
            file = self._disk.open(self._path(fmt.table_name(segment.id)), create=True)
            try:
                file.pwrite(data, 0)
                file.truncate(len(data))
            finally:
                file.close()
        except OSError:
            return
        segment.table = None

    def replace_table(self, segment: Segment, table: fmt.Table) -> None:
        segment.table = table
        self._write_table(segment)

    # --- reading ---

    def header(self, location: int) -> fmt.RecordHeader:
        """The record's header; Corrupt if it is none."""
        segment, offset = self.segments[location >> 32], location & 0xFFFFFFFF
        data = self._pread(segment, fmt.RECORD_HEADER_BYTES, offset)
        header = fmt.decode_record_header(data, location)
        if header is None:
            raise Corrupt(segment.path, offset, "the record's header does not match its checksum", _ADVICE)
        return header

    def chunk(self, location: int, header: fmt.RecordHeader) -> bytes:
        """The chunk behind that header, compared with its digest; Corrupt if it differs."""
        segment, offset = self.segments[location >> 32], location & 0xFFFFFFFF
        chunk = self._pread(segment, header.length, offset + fmt.RECORD_HEADER_BYTES)
        if fmt.digest_of(chunk) != header.digest:
            name = header.digest.hex()
            raise Corrupt(segment.path, offset, f"the data of chunk {name} does not match it", _ADVICE)
        return chunk

    def raw(self, segment: Segment, offset: int, size: int) -> bytes:
        return self._pread(segment, size, offset)

    def _pread(self, segment: Segment, size: int, offset: int) -> bytes:
        try:
            return (segment.file or self._file(segment)).pread(size, offset)
        except OSError as error:
            if error.errno not in (errno.EIO, errno.ENOENT):  # out of handles or memory: try again
                raise StorageError(f"{segment.path}: {error.strerror}") from error
            raise Corrupt(segment.path, offset, f"can not be read: {error.strerror}", _ADVICE) from error

    def _file(self, segment: Segment) -> DiskFile:
        file = segment.file
        if file is None:
            while len(self._opened) >= limits.BLOB_OPEN_FILES_MAX:
                # Oldest first, not least recently used: the hot path then keeps no order at all.
                oldest = self._opened.popleft()
                if not oldest.sealed:  # `sync` needs its handle
                    self._opened.append(oldest)
                    if all(not other.sealed for other in self._opened):
                        break
                elif oldest.file is not None:
                    oldest.file.close()
                    oldest.file = None
            file = segment.file = self._disk.open(segment.path)
            self._opened.append(segment)
        return file

    # --- removing, saving ---

    def _unlink(self, segment: Segment, *, with_table: bool) -> None:
        if segment.file is not None:
            segment.file.close()
            segment.file = None
            self._opened.remove(segment)
        self._disk.unlink(segment.path)
        if with_table:
            with contextlib.suppress(FileNotFoundError):  # never written for want of room
                self._disk.unlink(self._path(fmt.table_name(segment.id)))

    def save_aside(self, name: str, data: bytes) -> None:
        """Into `quarantine/`, durable: bytes that nobody could read, for whoever wants to try."""
        home = self._path("quarantine")
        try:
            self._disk.make_directory(home)
            file = self._disk.open(f"{home}/{name}", create=True)
            try:
                file.pwrite(data, 0)
                file.datasync()
            finally:
                file.close()
            self._disk.sync_directory(home)
            self._disk.sync_directory(self._directory)
        except OSError as error:
            raise write_error(f"{home}/{name}", error) from error

    def _path(self, name: str) -> str:
        return f"{self._directory}/{name}" if self._directory else name


def write_error(path: str, error: OSError) -> AspenError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{path}: no space left; free some, or collect garbage")
    return StorageError(f"{path}: {error.strerror}")
