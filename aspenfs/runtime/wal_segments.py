"""Segment files coming and going: made ahead of need, recycled when the log is trimmed.

Here belongs everything that makes, renames and removes files of the log, so that the append path
never does. One segment is always kept ready: zero-filled, with its header and its name on disk.
It is also the log's reserve when the file system is full.

Order of the steps matters, because names and contents reach the disk separately:
 - a segment's header is synced before the file gets its name, and the name before it is used;
 - a trimmed segment loses its name durably before its header is rewritten (else a power failure
   could bring the old name back over new contents), oldest first (else it could leave a hole).

With `background` a thread of ours does the work; without, the calling thread does (simulation).
"""

import contextlib
import errno
import threading
from typing import Final

from aspenfs.errors import NoSpace, StorageError, SyncFailed
from aspenfs.limits import MIB
from aspenfs.runtime.wal_format import encode_header, segment_tag
from aspenfs.runtime.wal_recovery import SPARE, Segment
from aspenfs.seams import Disk, DiskFile

_FILL_BYTES: Final = 4 * MIB  # written and synced at a time, so that a commit's sync never queues behind more


def storage_error(error: OSError, doing: str) -> NoSpace | StorageError:
    """Our word for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{doing}: no space left on the file system of the state directory")
    return StorageError(f"{doing}: {error.strerror or error}")


class SegmentPool:
    """Hands out prepared segments (`take`) and takes trimmed ones back (`retire`). Thread-safe."""

    def __init__(
        self,
        disk: Disk,
        directory: str,
        cluster_id: bytes,
        segment_bytes: int,
        *,
        next_number: int,
        has_spare: bool,
        background: bool,
    ) -> None:
        self._disk, self._directory = disk, directory
        self._cluster_id = cluster_id
        self.segment_bytes = segment_bytes
        self._next_number = next_number
        self._has_spare = has_spare
        self._ready: Segment | None = None
        self._retired: list[str] = []
        self._failure: NoSpace | StorageError | None = None
        self._broken: BaseException | None = None  # what ended the helper thread unexpectedly
        self._work = threading.Lock()  # held while files are made or renamed
        self._wanted = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, name="wal-segments", daemon=True)
            self._thread.start()

    @property
    def failure(self) -> NoSpace | StorageError | None:
        """Why there is no segment ready, if preparing one failed. A SyncFailed is final."""
        return self._failure

    def take(self) -> Segment:
        """A segment ready for its first frame; waits if it is still being made.

        Raises NoSpace or StorageError when none can be made now, SyncFailed when none ever will.
        """
        # The log takes from one thread at a time, and the helper fills `_ready` only when it is
        # None: so the usual case needs no lock and never waits for the helper's directory syncs.
        if self._ready is None:
            with self._work:
                if self._broken is not None:
                    raise self._broken
                if self._ready is None:
                    self._prepare()
        segment, self._ready = self._ready, None
        assert segment is not None
        return segment

    def retire(self, names: list[str]) -> None:
        """Give back files whose frames are needed no more, oldest first."""
        self._retired.extend(names)
        self.stir()

    def stir(self) -> None:
        """See to it that a segment gets ready; costs nothing when one is."""
        if self._ready is not None and not self._retired:
            return
        if self._thread is not None:
            self._wanted.set()
        else:
            self._tidy()

    def retire_now(self, names: list[str]) -> None:
        """As `retire`, but done when this returns; raises what went wrong."""
        with self._work:
            for name in names:
                self._retire_one(name)

    def close(self) -> None:
        self._closing = True
        if self._thread is not None:
            self._wanted.set()
            self._thread.join()
        if self._ready is not None:
            self._ready.file.close()
            self._ready = None

    # --- the work ---

    def _run(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._closing:
                return
            try:
                self._tidy()
            except BaseException as error:
                self._broken = error  # raised again by the next `take`
                return

    def _tidy(self) -> None:
        with self._work:
            try:
                while self._retired:
                    self._retire_one(self._retired[0])
                    del self._retired[0]
                if self._ready is None:
                    self._prepare()
            except (NoSpace, StorageError):
                pass  # kept in `failure`; whoever needs a segment is told

    def _fail(self, error: NoSpace | StorageError) -> NoSpace | StorageError:
        if not isinstance(self._failure, SyncFailed):
            self._failure = error
        return error

    def _retire_one(self, name: str) -> None:
        try:
            if self._has_spare:
                self._disk.unlink(self._path(name))
            else:
                self._disk.rename(self._path(name), self._path(SPARE))
        except FileNotFoundError:
            pass  # done before, and then the directory sync failed
        except OSError as error:
            raise self._fail(storage_error(error, f"retiring log segment {name}")) from error
        self._sync_directory()
        self._has_spare = True

    def _prepare(self) -> None:
        if isinstance(self._failure, SyncFailed):
            raise self._failure
        number = self._next_number
        try:
            segment = self._fill(number)
        except OSError as error:
            raise self._fail(storage_error(error, "making the next log segment")) from error
        self._next_number = number + 1
        self._has_spare = False
        try:
            self._disk.rename(self._path(SPARE), self._path(segment.name))
        except OSError as error:
            segment.file.close()
            self._has_spare = True
            raise self._fail(storage_error(error, "making the next log segment")) from error
        try:
            self._sync_directory()
        except SyncFailed:
            segment.file.close()
            raise
        self._failure = None
        self._ready = segment

    def _fill(self, number: int) -> Segment:
        """The spare file, full size, with the header of segment `number`, all durable."""
        size = self.segment_bytes
        path = self._path(SPARE)
        if not self._has_spare and self._disk.free_bytes() < size:
            # Checked first: filling up the last free blocks only to give them back hurts everyone.
            raise OSError(errno.ENOSPC, "no space left")
        file = self._disk.open(path, create=True)
        try:
            here = file.size()
            if here and not self._has_spare:
                # A file of that name with unknown contents: they must not become part of a segment.
                file.truncate(0)
            elif here > size:
                file.truncate(size)
            here = file.size()
            while here < size:
                here = min(size, here + _FILL_BYTES)
                file.allocate(here)
                self._datasync(file)
            file.pwrite(encode_header(self._cluster_id, number, size), 0)
            self._datasync(file)
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(0)  # half a segment is of no use to us, and its space may be to others
            file.close()
            raise
        except BaseException:
            file.close()
            raise
        return Segment(number, size, segment_tag(self._cluster_id, number), file)

    def _datasync(self, file: DiskFile) -> None:
        try:
            file.datasync()
        except OSError as error:
            raise self._fail(SyncFailed(f"fdatasync of a new log segment failed: {error}")) from error

    def _sync_directory(self) -> None:
        try:
            self._disk.sync_directory(self._directory)
        except OSError as error:
            raise self._fail(SyncFailed(f"fsync of the log directory failed: {error}")) from error

    def _path(self, name: str) -> str:
        return f"{self._directory}/{name}"
