"""The pages of a mapped file that this process holds, and giving them back.

The state database is read through a shared mapping: what was read counts as this process's memory until the
kernel wants it for something else. Given back, the pages stay in the page cache; touching them again
costs a minor fault, not a read (madvise(2), MADV_DONTNEED on a shared file mapping).
"""

import ctypes
import os
from pathlib import Path
from typing import Final

_DONTNEED: Final = 4
_PAGE_BYTES: Final = os.sysconf("SC_PAGESIZE")


class MappedFile:
    """Where `path` is mapped in this process; nowhere if it is not."""

    __slots__ = ("_madvise", "_ranges")

    def __init__(self, path: str) -> None:
        wanted = os.path.realpath(path)
        self._ranges: list[tuple[int, int]] = []
        for line in Path("/proc/self/maps").read_text(errors="surrogateescape").splitlines():
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5] == wanted:
                start, end = (int(number, 16) for number in fields[0].split("-"))
                self._ranges.append((start, end - start))
        self._madvise = ctypes.CDLL(None, use_errno=True).madvise
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

    def give_back(self) -> None:
        """All its pages. In any thread, also while others read through the mapping."""
        for start, length in self._ranges:
            if self._madvise(start, length, _DONTNEED):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))


def mapped_bytes() -> int:
    """What this process holds of mapped files, all of them together (proc_pid_statm(5), shared)."""
    return int(Path("/proc/self/statm").read_text().split()[2]) * _PAGE_BYTES
