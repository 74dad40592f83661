"""The real disk: a directory of the local file system behind the `seams.Disk` port.

Here belong plain system calls on files and directories below one root, and nothing that knows
what is in them. No caching, no retrying, no locking: errors of the kernel pass through as they
are, because only the caller knows whether a failed write may be repeated.

Every method may be called from any thread; all of them leave the interpreter lock while the
kernel works. Files are opened close-on-exec, so that a hook's child process never holds a log
segment open, and are readable by their owner only.
"""

import errno
import os
from typing import Final

_ZEROS: Final = bytes(1 << 20)


class RealFile:
    """One open file; see `seams.DiskFile` for what each method promises."""

    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pread(self, size: int, offset: int) -> bytes:
        data = os.pread(self._fd, size, offset)
        if len(data) == size or not data:
            return data
        # A large read may come back short (the kernel's cap, a signal); only the end of the file
        # may shorten the answer.
        parts = [data]
        got = len(data)
        while got < size:
            data = os.pread(self._fd, size - got, offset + got)
            if not data:
                break
            parts.append(data)
            got += len(data)
        return b"".join(parts)

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        written = os.pwrite(self._fd, data, offset)
        size = len(data)
        if written != size:
            self._write_rest(memoryview(data), written, offset)

    def _write_rest(self, view: memoryview, written: int, offset: int) -> None:
        # The next call after a short write is what tells the cause (ENOSPC, EIO).
        while written < len(view):
            step = os.pwrite(self._fd, view[written:], offset + written)
            if step == 0:
                raise OSError(errno.EIO, "the kernel accepted no bytes of a write")
            written += step

    def allocate(self, size: int) -> None:
        # Zeros are really written: posix_fallocate leaves unwritten extents, and turning those
        # into written ones costs a journal commit in every datasync that touches new ground.
        end = self.size()
        while end < size:
            step = min(size - end, len(_ZEROS))
            self.pwrite(memoryview(_ZEROS)[:step], end)
            end += step

    def truncate(self, size: int) -> None:
        os.ftruncate(self._fd, size)

    def datasync(self) -> None:
        os.fdatasync(self._fd)

    def fileno(self) -> int:
        """Not of the port: for `KernelSync`."""
        return self._fd

    def size(self) -> int:
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        """Idempotent; the second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class RealDisk:
    """The directory `root`; `make_directory("")` makes it when it is missing."""

    __slots__ = ("_root",)

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.path.abspath(os.fspath(root))

    def _path(self, path: str) -> str:
        assert path[:1] != "/", path
        assert ".." not in path.split("/"), path
        return os.path.join(self._root, path) if path else self._root

    def open(self, path: str, *, create: bool = False) -> RealFile:
        flags = os.O_RDWR | os.O_CLOEXEC
        if create:
            flags |= os.O_CREAT
        return RealFile(os.open(self._path(path), flags, 0o600))

    def rename(self, source: str, target: str) -> None:
        os.rename(self._path(source), self._path(target))

    def unlink(self, path: str) -> None:
        os.unlink(self._path(path))

    def list(self, directory: str) -> list[str]:
        return sorted(os.listdir(self._path(directory)))

    def make_directory(self, path: str) -> None:
        os.makedirs(self._path(path), mode=0o700, exist_ok=True)

    def remove_directory(self, path: str) -> None:
        """An empty one; not of the port, see `swap.py`."""
        os.rmdir(self._path(path))

    def sync_directory(self, path: str) -> None:
        sync_directory(self._path(path))

    def free_bytes(self) -> int:
        stat = os.statvfs(self._root)
        return stat.f_bavail * stat.f_frsize


def sync_directory(path: str | os.PathLike[str]) -> None:
    """The names in the directory are durable on return."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
