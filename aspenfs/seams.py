"""What floors 0-3 need of the world: time, entropy and a disk, as ports.

Nothing here does anything; `runtime/system.py` and `runtime/disk.py` are the real world,
`sim/` the simulated one.
"""

from typing import Protocol


class Clock(Protocol):
    def time_ns(self) -> int:
        """Wall clock, ns since the epoch; may jump."""

    def monotonic_ns(self) -> int:
        """CLOCK_BOOTTIME, ns; never goes back, counts suspend."""


class Entropy(Protocol):
    def random_bytes(self, size: int) -> bytes:
        """Unpredictable bytes."""


class DiskFile(Protocol):
    """An open file. Offsets and sizes in bytes. OSError (EIO, ENOSPC) passes through as it is."""

    def pread(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes; short only at the end of the file."""

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        """All of `data`, or an OSError; after an error any prefix may have been written."""

    def allocate(self, size: int) -> None:
        """Zero-filled, really written blocks from the current end up to `size` bytes."""

    def truncate(self, size: int) -> None: ...

    def datasync(self) -> None:
        """Returns when all that was written before the call is durable. Callable from any thread.

        An OSError means that written data may be lost for good: never retry.
        """

    def size(self) -> int: ...

    def close(self) -> None: ...


class Disk(Protocol):
    """A directory on a disk. Paths are relative to it, with '/'."""

    def open(self, path: str, *, create: bool = False) -> DiskFile:
        """FileNotFoundError without `create`; with it the file is made when missing."""

    def rename(self, source: str, target: str) -> None:
        """Atomic; durable only after `sync_directory` of the target's directory."""

    def unlink(self, path: str) -> None: ...

    def list(self, directory: str) -> list[str]:
        """Names, sorted; FileNotFoundError if there is no such directory."""

    def make_directory(self, path: str) -> None:
        """With its parents; no error if it is there."""

    def sync_directory(self, path: str) -> None: ...

    def free_bytes(self) -> int:
        """Bytes that may still be written."""
