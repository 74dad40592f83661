"""One daemon per state directory: the lock that says so, and the pid file that says who.

The lock is flock(2) on the file `lock`: the kernel drops it when the process ends, however it ends,
so there is no stale lock to clean up. `daemon.pid` only informs; nothing is decided by it.
"""

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from aspenfs import errors
from aspenfs.cli.paths import StateDirectory


class StateLock:
    """The right to work on a state directory. Use as a context manager, or call `release`."""

    __slots__ = ("_descriptor", "_directory")

    def __init__(self, directory: StateDirectory, descriptor: int) -> None:
        self._directory = directory
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, directory: StateDirectory) -> Self:
        """Takes the lock and writes `daemon.pid`; Busy, with the holder's pid in its text, if taken.

        The directory must exist; an OSError of the disk passes through.
        """
        descriptor = os.open(directory.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write_pid(directory)
        except BlockingIOError:
            os.close(descriptor)
            pid = holder_pid(directory)
            holder = "another daemon" if pid is None else f"the daemon with pid {pid}"
            raise errors.Busy(
                f"{directory.path}: this state directory is in use by {holder}; "
                "unmount that one first, or name another directory with -o state_dir="
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        return cls(directory, descriptor)

    def release(self) -> None:
        """Removes `daemon.pid` and gives up the lock. Twice is once."""
        if self._descriptor < 0:
            return
        # The pid file goes first: once the lock is free, a file of that name is the next daemon's.
        self._directory.pid.unlink(missing_ok=True)
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def holder_pid(directory: StateDirectory) -> int | None:
    """The pid in `daemon.pid`; None if there is none. After a kill it may name a dead process."""
    try:
        return int(directory.pid.read_text(encoding="ascii"))
    except (FileNotFoundError, ValueError):
        return None


def is_dying(pid: int) -> bool:
    """Whether that process was killed, but one of its threads has not ended: it waits in the kernel, and
    the files of the process, locks and connections among them, stay open until it has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        return state == b"Z" and len(os.listdir(f"/proc/{pid}/task")) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def _write_pid(directory: StateDirectory) -> None:
    """Whole or not at all for a reader, hence the rename."""
    fresh = directory.pid.with_name("daemon.pid.new")
    fresh.write_text(f"{os.getpid()}\n", encoding="ascii")
    fresh.replace(directory.pid)
