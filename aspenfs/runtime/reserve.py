"""Disk space that is kept back for the day on which the disk is full.

Then only deleting helps, and deleting needs space first: the bytes of a blob may go when no restart
evaluates what named them, so when the state has grown past that; and a log that cannot be applied
is not trimmed; and the chunks of a segment that are still needed move elsewhere before it goes. So a
file of allocated blocks lies beside the state. When what deletes finds no room the file gives its blocks
up, and writers are refused; when there is space again, the file takes its blocks back first. Most of
them: else writers would have what was given up for deleting, and the next time there were none.

Belongs here: the file. Not here: when it is given up, and who is refused until it is back (`host.py`).
"""

import os
from pathlib import Path

from aspenfs.limits import MIB, RESERVE_BYTES

FILE_NAME = "reserve"
_DISK_SHARE = 8  # of a small disk not more than one in so many bytes
_LEAST_SHARE = 3, 4  # of the whole: with so much, writers are served again


class Reserve:
    """The file in `directory`. All calls block, for less than a millisecond where fallocate(2) works."""

    def __init__(self, directory: Path, bytes_max: int = RESERVE_BYTES) -> None:
        self._path = directory / FILE_NAME
        self._bytes_max = bytes_max
        self.whole = False  # nothing is left to be taken

    def take(self) -> bool:
        """Takes what the disk can spare; whether that is enough to let writers go on."""
        status = os.statvfs(self._path.parent)
        total, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
        target = min(self._bytes_max, total // _DISK_SHARE)
        least = target * _LEAST_SHARE[0] // _LEAST_SHARE[1]
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            held = os.fstat(descriptor).st_size
            # The whole only from plenty: who has just made some room wants to use it.
            wanted = target if free > 2 * target else least
            if held < wanted and free > wanted - held + MIB:
                os.posix_fallocate(descriptor, 0, wanted)
                held = wanted
        except OSError:  # somebody else was quicker
            os.ftruncate(descriptor, held)
        finally:
            os.close(descriptor)
        self.whole = held >= target
        return held >= least

    def give_up(self) -> int:
        """Frees the blocks; how many bytes that were."""
        self.whole = False
        try:
            held = os.stat(self._path).st_size
            os.truncate(self._path, 0)
        except FileNotFoundError:
            return 0
        return held
