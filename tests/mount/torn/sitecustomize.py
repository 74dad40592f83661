"""Loaded by the Python of a daemon under test: notes which writes no finished sync has covered yet.

With ASPEN_TORN_TRACE set, every pwrite and fdatasync, also those of the kernel's workers (`KernelSync`), is
noted in that file, which is mapped, so that it outlives a SIGKILL. A write is noted before it is made, a sync
after it has ended, with the notes that it found when it began: what the notes call unsynced, a loss of power
could take. `tests/mount/tearing.py` reads them. Nothing else is changed.
"""

import mmap
import os
import struct
import threading
from typing import Any

SLOTS = 1 << 16  # far more than the writes between two syncs
RECORD = struct.Struct("<QQQQ")  # number, inode, offset or the number at which a sync began, length (0: sync)
HEAD = 64  # u64: the number of the last note


def _trace(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.ftruncate(descriptor, HEAD + SLOTS * RECORD.size)
    notes = mmap.mmap(descriptor, HEAD + SLOTS * RECORD.size)
    os.close(descriptor)
    lock = threading.Lock()
    last = int.from_bytes(notes[:8], "little")
    pwrite, fdatasync = os.pwrite, os.fdatasync

    def note(inode: int, value: int, length: int) -> None:
        nonlocal last
        with lock:
            number = last + 1
            RECORD.pack_into(notes, HEAD + number % SLOTS * RECORD.size, number, inode, value, length)
            notes[:8] = number.to_bytes(8, "little")
            last = number

    def traced_pwrite(fd: int, data: Any, offset: int, /) -> int:
        note(os.fstat(fd).st_ino, offset, len(data))
        return pwrite(fd, data, offset)

    def traced_fdatasync(fd: Any) -> None:
        began = last
        fdatasync(fd)
        note(os.fstat(fd).st_ino, began, 0)

    os.pwrite = traced_pwrite
    os.fdatasync = traced_fdatasync

    # Not before the two above are in place.
    from aspenfs.runtime.kernel_sync import KernelSync

    start = KernelSync.start

    def traced_start(self: KernelSync, files: Any, done: Any) -> None:
        began = last
        inodes = [os.fstat(file.fileno()).st_ino for file in files]

        def ended(error: OSError | None) -> None:
            if error is None:
                for inode in inodes:
                    note(inode, began, 0)
            done(error)

        start(self, files, ended)

    KernelSync.start = traced_start  # type: ignore[method-assign]


if os.environ.get("ASPEN_TORN_TRACE"):
    _trace(os.environ["ASPEN_TORN_TRACE"])
