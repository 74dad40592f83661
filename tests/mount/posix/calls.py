"""System calls for the tests: those that `os` does not offer, calls as another user, and errnos by name."""

import ctypes
import errno
import os
import pickle
import signal
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

Result = TypeVar("Result")
Name = str | bytes | Path

libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD: Final = -100
UTIME_NOW: Final = (1 << 30) - 1
UTIME_OMIT: Final = (1 << 30) - 2
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4
USER, OTHER = 4321, 4322  # nobody that the machine knows
_NAMES: Final = {**errno.errorcode, errno.EOPNOTSUPP: "EOPNOTSUPP", errno.EAGAIN: "EAGAIN"}


def error(call: Callable[..., object], *arguments: Any, **named: Any) -> str:
    """The name of the errno that the call fails with; "" if it succeeds."""
    try:
        call(*arguments, **named)
    except OSError as failure:
        return _NAMES[failure.errno or 0]
    return ""


def as_user(uid: int, function: Callable[[], Result], *, gid: int = -1, groups: Sequence[int] = ()) -> Result:
    """What `function` returns in a child that runs as this user; its OSError is raised here."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the watchdog's thread is no matter
        pid = os.fork()
    if pid == 0:
        try:
            os.setgroups(list(groups))
            os.setgid(uid if gid < 0 else gid)
            os.setuid(uid)
            outcome: tuple[bool, object] = (True, function())
        except BaseException as failure:
            outcome = (False, failure)
        try:
            os.write(writer, pickle.dumps(outcome))
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(pid, 0)
    well, value = pickle.loads(answer)
    if not well:
        raise value
    return value  # type: ignore[no-any-return]


def in_child(function: Callable[[], Result]) -> Result:
    """What `function` returns in a child process."""
    return as_user(os.getuid(), function, gid=os.getgid(), groups=os.getgroups())


def _checked(result: int, *names: object) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), *[str(name) for name in names[:1]])
    return result


def renameat2(old: Name, new: Name, flags: int) -> None:
    _checked(
        libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), ctypes.c_uint(flags)), old
    )


class Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def utimensat(path: Name, atime: tuple[int, int] | None, mtime: tuple[int, int] | None) -> None:
    """Seconds and nanoseconds each, or UTIME_NOW and UTIME_OMIT as nanoseconds; both None: now."""
    if atime is None or mtime is None:
        _checked(libc.utimensat(AT_FDCWD, os.fsencode(path), None, 0), path)
        return
    times = (Timespec * 2)(Timespec(*atime), Timespec(*mtime))
    _checked(libc.utimensat(AT_FDCWD, os.fsencode(path), times, 0), path)


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    _checked(libc.fallocate64(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def sync_file_range(descriptor: int, offset: int, length: int, flags: int) -> None:
    _checked(libc.sync_file_range(descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), flags))


def syncfs(descriptor: int) -> None:
    _checked(libc.syncfs(descriptor))


class _Dirent(ctypes.Structure):
    _fields_ = (
        ("ino", ctypes.c_uint64),
        ("off", ctypes.c_int64),
        ("reclen", ctypes.c_uint16),
        ("type", ctypes.c_uint8),
        ("name", ctypes.c_char * 256),
    )


libc.opendir.restype = ctypes.c_void_p
libc.readdir64.restype = ctypes.POINTER(_Dirent)
libc.telldir.restype = ctypes.c_long
for _function in (libc.readdir64, libc.telldir, libc.rewinddir, libc.closedir):
    _function.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]


class Entry(NamedTuple):
    name: bytes
    ino: int
    kind: int


class Directory:
    """opendir(3) and its kin: an open directory that can be told where to go on."""

    def __init__(self, path: Name) -> None:
        self.stream = libc.opendir(os.fsencode(path))
        if not self.stream:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def __enter__(self) -> "Directory":
        return self

    def __exit__(self, *_: object) -> None:
        libc.closedir(self.stream)

    def read(self) -> Entry | None:
        entry = libc.readdir64(self.stream)
        if not entry:
            return None
        found = entry.contents
        return Entry(found.name, found.ino, found.type)

    def rest(self) -> list[bytes]:
        """The names from here to the end, without . and .."""
        names = []
        while (entry := self.read()) is not None:
            if entry.name not in (b".", b".."):
                names.append(entry.name)
        return names

    def tell(self) -> int:
        return int(libc.telldir(self.stream))

    def seek(self, position: int) -> None:
        libc.seekdir(self.stream, position)

    def rewind(self) -> None:
        libc.rewinddir(self.stream)


def touch(path: Name, data: bytes = b"", mode: int = 0o644) -> Name:
    """A regular file with these bytes and exactly this mode; its path again."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        if data:
            os.write(descriptor, data)
        os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)
    return path


def mode_of(path: Name) -> int:
    return os.lstat(path).st_mode & 0o7777


def no_limit_signal() -> None:
    """Writing beyond RLIMIT_FSIZE is EFBIG instead of a death."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
