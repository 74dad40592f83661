"""The segments of a chunk store as they change: opening, appending, syncing, sealing, removing.

Here belongs where a record goes and when it is durable; reading is in files.py. Which chunks are
alive is the business of store.py and collect.py.

A segment is written by one process life only: each life that puts something begins a new one, so
no place in a segment is ever used twice, whatever a crash has left behind the last whole record.
While it grows, its table is kept in memory; when it is full and synced the table is written beside
it and the segment is *sealed*. The table itself is never synced: it carries a checksum, and
without it the segment is scanned.

All methods belong to the event loop's thread, but `sync`. There is no lock between the two: the
loop alone appends, rolls and removes; `sync` alone raises `synced` and seals. Each looks at the
other's numbers through single reads and writes, in an order in which an old number only ever
means that less counts as durable than is.
"""

import contextlib
from collections.abc import Iterator
from typing import Final, NoReturn

from crc32c import crc32c

from aspenfs.blobs import format as fmt
from aspenfs.blobs.files import Segment, SegmentFiles, write_error
from aspenfs.blobs.scan import scan
from aspenfs.errors import Corrupt, NotSupported, StorageError, SyncFailed
from aspenfs.seams import Disk, DiskFile

_REMOVED_MAX: Final = 8
_JOIN_BYTES: Final = 16 << 10  # up to here copying into one buffer is cheaper than a second write


class SegmentSet(SegmentFiles):
    """All segments of one directory, the current one among them once something was appended."""

    def __init__(self, disk: Disk, directory: str, segment_bytes: int) -> None:
        assert fmt.SEGMENT_HEADER_BYTES < segment_bytes < 1 << 32
        super().__init__(disk, directory)
        self.segment_bytes = segment_bytes
        self.dropped_bytes = 0
        self._current: Segment | None = None
        self._unsealed: dict[int, Segment] = {}  # the current one and full ones not yet sealed
        self._next_id = 1
        self._names_changed = 0  # how often; and how much of that is durable
        self._names_synced = 0
        # Unlinked, but a power failure may bring them back: id -> (`_names_changed` then, handle).
        self._removed: dict[int, tuple[int, DiskFile]] = {}
        self._failed = False

    # --- opening ---

    def load(self) -> Iterator[tuple[Segment, fmt.Table]]:
        """Each segment with its table, newest first; afterwards all of them are durable and sealed.

        Newest first, because the tombstones for a segment are in itself or in newer ones.
        """
        self._disk.make_directory(self._directory)
        self._sync_directory(self._directory.rpartition("/")[0])
        names = self._disk.list(self._directory)
        segments = {_id_of(name, fmt.SEGMENT_SUFFIX) for name in names} - {0}
        tables = {_id_of(name, fmt.TABLE_SUFFIX) for name in names} - {0}
        self._next_id = max(segments | tables, default=0) + 1
        for orphan in sorted(tables - segments):
            self._disk.unlink(self._path(fmt.table_name(orphan)))
        scanned = False
        for number in sorted(segments, reverse=True):
            segment = Segment(number, self._path(fmt.segment_name(number)))
            table = self._read_table(number) if number in tables else None
            if table is None:
                scanned = True
                table = self._scan(segment)
                if table is None:
                    self._unlink(segment, with_table=number in tables)
                    continue
            segment.end = segment.synced = table.end
            segment.full = segment.sealed = True
            self.segments[number] = segment
            yield segment, table
        if scanned:
            self._sync_directory(self._directory)

    def _scan(self, segment: Segment) -> fmt.Table | None:
        """The table of a segment that has none; None if the segment holds nothing."""
        file = self._file(segment)
        try:
            header = fmt.decode_segment_header(file.pread(fmt.SEGMENT_HEADER_BYTES, 0))
            if header is not None:
                self._check_header(segment, header)
            table, synced, dropped = scan(file, segment.id)
            self.dropped_bytes += dropped
        except OSError as error:
            raise StorageError(f"{segment.path}: {error.strerror}: can not be opened") from error
        if not any(table.counts()) and not table.damaged:
            return None
        if table.end > synced:
            try:
                file.datasync()
            except OSError as error:
                self._fail_sync(error)
        segment.table = table
        self._write_table(segment)
        return table

    def _check_header(self, segment: Segment, header: fmt.SegmentHeader) -> None:
        if header.version != fmt.VERSION:
            raise NotSupported(
                f"{segment.path}: format {header.version}, this program reads format {fmt.VERSION};"
                " start the version that wrote it, or a newer one"
            )
        if header.segment != segment.id:
            raise Corrupt(
                segment.path, 0, f"this is segment {header.segment:08x}, renamed", "give it its name back"
            )

    # --- appending ---

    def append_chunk(self, digest: bytes, data: bytes | bytearray | memoryview) -> int:
        """Into the page cache; the location. NoSpace leaves everything as it was."""
        length = len(data)
        segment = self._room_for(length)
        offset = segment.end
        self._write(segment, fmt.CHUNK, length, 0, digest, data)
        assert segment.table is not None
        segment.table.add_chunk(fmt.prefix_of(digest), offset, length)
        segment.live += segment.end - offset
        return segment.id << 32 | offset

    def append_tombstone(self, digest: bytes, target: int, length: int) -> None:
        payload = fmt.encode_tombstone(target, length)
        segment = self._room_for(len(payload))
        offset = segment.end
        self._write(segment, fmt.TOMBSTONE, len(payload), crc32c(payload), digest, payload)
        assert segment.table is not None
        segment.table.add_tombstone(fmt.Tombstone(offset, target, length))

    def _room_for(self, length: int) -> Segment:
        if self._failed:
            raise SyncFailed(f"{self._directory}: an earlier sync failed; restart the daemon")
        segment = self._current
        first = fmt.SEGMENT_HEADER_BYTES
        if segment is None or first < segment.end > self.segment_bytes - fmt.record_size(length):
            return self._begin()
        return segment

    def _write(
        self, segment: Segment, kind: int, length: int, check: int, digest: bytes,
        data: bytes | bytearray | memoryview,
    ) -> None:  # fmt: skip
        offset, file = segment.end, segment.file
        assert file is not None
        assert segment.table is not None
        location = segment.id << 32 | offset
        header = fmt.encode_record_header(location, kind, length, segment.synced, check, digest)
        try:
            if length <= _JOIN_BYTES:
                file.pwrite(b"".join((header, data)), offset)
            else:
                file.pwrite(data, offset + fmt.RECORD_HEADER_BYTES)
                file.pwrite(header, offset)
        except OSError as error:
            # What was written of it must not be found by a later scan, behind a shorter record.
            try:
                file.truncate(offset)
            except OSError:
                self._finish_current()  # never append behind it
            raise write_error(segment.path, error) from error
        segment.table.end = segment.end = offset + fmt.record_size(length)

    def _begin(self) -> Segment:
        segment = Segment(self._next_id, self._path(fmt.segment_name(self._next_id)))
        self._next_id += 1
        try:
            segment.file = self._disk.open(segment.path, create=True)
            segment.file.pwrite(fmt.encode_segment_header(segment.id), 0)
        except OSError as error:
            if segment.file is not None:
                segment.file.close()
                with contextlib.suppress(OSError):
                    self._disk.unlink(segment.path)
            raise write_error(segment.path, error) from error
        segment.table = fmt.Table()
        segment.synced = 0
        self._opened.append(segment)
        self.segments[segment.id] = segment
        self._names_changed += 1
        self._finish_current()
        self._current = self._unsealed[segment.id] = segment
        return segment

    def _finish_current(self) -> None:
        if self._current is not None:
            self._current.full = True
            self._current = None

    # --- durability ---

    @property
    def dirty(self) -> bool:
        if self._names_changed != self._names_synced or len(self._unsealed) > (self._current is not None):
            return True
        current = self._current
        return current is not None and current.synced < current.end

    def position(self) -> int:
        """Where the last record ends: what `is_durable` takes."""
        current = self._current
        return (self._next_id - 1) << 32 | (0xFFFFFFFF if current is None else current.end)

    def is_durable(self, position: int) -> bool:
        number, end = position >> 32, position & 0xFFFFFFFF
        return all(
            segment.id > number or segment.synced >= (end if segment.id == number else segment.end)
            for segment in list(self._unsealed.values())
        )

    def sync(self) -> None:
        """Blocking, from any thread: what was appended or removed before the call is durable.

        Any failure is for ever: the kernel may have thrown the pages away and will not say so twice.
        """
        if self._failed:
            self._fail_sync(None)
        # In this order: the end of a segment that was full already is its last. Names are counted
        # only after the data was written: both only grow.
        work = [(segment, segment.full, segment.end) for segment in list(self._unsealed.values())]
        try:
            for segment, _, end in work:
                if segment.synced < end:
                    self._datasync(segment, end)
            changed = self._names_changed
            if changed > self._names_synced:
                self._disk.sync_directory(self._directory)
        except OSError as error:
            self._fail_sync(error)
        self._names_synced = max(self._names_synced, changed)
        for segment, full, end in work:
            segment.synced = max(segment.synced, end)
            if full:
                self._write_table(segment)
                segment.sealed = True
                self._unsealed.pop(segment.id, None)
        for number, (change, file) in list(self._removed.items()):
            if change <= changed and self._removed.pop(number, None) is not None:
                file.close()  # the last handle: this is what frees the blocks, tens of ms at times

    def _datasync(self, segment: Segment, end: int) -> None:
        file = segment.file
        try:
            if file is not None:
                file.datasync()
        except OSError:
            # Another `sync` may have sealed it and the loop closed it since; then it is durable.
            if segment.synced < end:
                raise

    def _fail_sync(self, error: OSError | None) -> NoReturn:
        self._failed = True
        cause = error.strerror if error else "an earlier sync failed"
        raise SyncFailed(f"{self._directory}: {cause}; restart the daemon, then run `aspen check`") from error

    def _sync_directory(self, path: str) -> None:
        try:
            self._disk.sync_directory(path)
        except OSError as error:
            self._fail_sync(error)

    # --- removing ---

    def exists(self, number: int) -> bool:
        """Can a record of that segment still be found, now or after a power failure?"""
        return number in self.segments or number in self._removed

    @property
    def removed(self) -> int:
        """Segments removed since the last sync; each holds its blocks and a handle until the next."""
        return len(self._removed)

    def wants_sync(self) -> bool:
        """Should those be given back before anything else is done?"""
        if not self._removed:
            return False
        return len(self._removed) >= _REMOVED_MAX or self._disk.free_bytes() < 2 * self.segment_bytes

    def remove(self, segment: Segment) -> None:
        """Unlink a sealed segment; the caller has made durable what it still wants of it.

        The next `sync` frees its blocks: that takes long, and not from the event loop's time.
        """
        assert segment.sealed
        file = self._file(segment)
        self._opened.remove(segment)
        segment.file = None
        self._unlink(segment, with_table=True)
        del self.segments[segment.id]
        self._removed[segment.id] = (self._names_changed + 1, file)
        self._names_changed += 1

    def close(self) -> None:
        """Seals everything, unless a sync has failed, and closes the files."""
        self._finish_current()
        try:
            if not self._failed:
                self.sync()
        finally:
            for segment in self._opened:
                if segment.file is not None:
                    segment.file.close()
                    segment.file = None
            self._opened.clear()
            for _, file in self._removed.values():
                file.close()
            self._removed.clear()


def _id_of(name: str, suffix: str) -> int:
    """0 for names that are not ours."""
    stem = name.removesuffix(suffix)
    if stem == name or len(stem) != 8:
        return 0
    try:
        return int(stem, 16)
    except ValueError:
        return 0
