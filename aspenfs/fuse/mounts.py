"""The mount table and the kernel's knobs of one FUSE mount: find, diagnose, recover, abort, tune.

Built so that a hung mount cannot hang the caller: the table is read from /proc, and the one question that
has to go through the mount itself is put by a child process with a deadline. All calls here block for
some ms at most (`probe` up to its deadline): from an event loop, call them in a thread.
"""

import ctypes
import enum
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final, NamedTuple

MOUNTINFO: Final = Path("/proc/self/mountinfo")
FUSECTL: Final = Path("/sys/fs/fuse/connections")
BDI: Final = Path("/sys/class/bdi")
OUR_TYPES: Final = frozenset({"fuse", "fuse.aspen"})
PROBE_S: Final = 2.0  # a live daemon answers within this, or counts as hung

_STACKED_MAX: Final = 16  # mounts one over the other that `recover_stale` takes away in one call
_MNT_FORCE, _MNT_DETACH, _UMOUNT_NOFOLLOW = 1, 2, 8  # umount2(2)
_OCTAL: Final = re.compile(rb"\\([0-3][0-7]{2})")


class Mount(NamedTuple):
    """One line of /proc/self/mountinfo, proc_pid_mountinfo(5). Paths with surrogates for odd bytes."""

    mount_id: int
    parent_id: int
    major: int
    minor: int  # of the superblock; for a FUSE mount also its connection number
    root: str  # the directory of the file system that is mounted, "/" but for bind mounts
    mountpoint: str
    options: tuple[str, ...]
    fs_type: str
    source: str
    super_options: tuple[str, ...]


class State(enum.Enum):
    ABSENT = "no FUSE mount of ours is there"
    SERVED = "a daemon answers"
    STALE = "mounted, but its daemon is gone"
    HUNG = "mounted, and its daemon does not answer"


# --- the table ---


def parse_mountinfo(text: bytes) -> list[Mount]:
    """The mounts in the kernel's order. Lines that are not understood are left out."""
    mounts = []
    for line in text.splitlines():
        fields = line.split(b" ")
        try:
            dash = fields.index(b"-", 6)  # after six fixed fields come any number of optional ones
            major, minor = fields[2].split(b":")
            fs_type, source, super_options = fields[dash + 1 : dash + 4]
            mounts.append(
                Mount(
                    int(fields[0]),
                    int(fields[1]),
                    int(major),
                    int(minor),
                    _unescaped(fields[3]),
                    _unescaped(fields[4]),
                    tuple(_unescaped(fields[5]).split(",")),
                    _unescaped(fs_type),
                    _unescaped(source),
                    tuple(_unescaped(super_options).split(",")),
                )
            )
        except ValueError:
            continue
    return mounts


def _unescaped(field: bytes) -> str:
    """Blank, tab, newline, backslash and # come as three octal digits, each of them one byte."""
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8)]), field))


def find_mount(directory: str | os.PathLike[str]) -> Mount | None:
    """The topmost mount exactly at `directory`, or None. Never goes through a mount at `directory`."""
    wanted = os.path.abspath(directory)
    mounts = parse_mountinfo(MOUNTINFO.read_bytes())
    found = _topmost(mounts, wanted)
    if found is None and wanted != "/":
        # The parents may be symbolic links, the mountpoint itself not: the table has real paths.
        parent, name = os.path.split(wanted)
        found = _topmost(mounts, os.path.join(os.path.realpath(parent), name))
    return found


def _topmost(mounts: list[Mount], mountpoint: str) -> Mount | None:
    here = [mount for mount in mounts if mount.mountpoint == mountpoint]
    covered = {mount.parent_id for mount in here}
    top = [mount for mount in here if mount.mount_id not in covered]
    return top[-1] if top else None


# --- is anybody there ---


def probe(directory: str | os.PathLike[str], *, timeout_s: float = PROBE_S) -> State:
    """What became of our mount at `directory`. Only SERVED and ABSENT leave the path safe to touch.

    A mount that its owner has not opened to the caller (no allow_other) counts as SERVED: the kernel
    answers for it.
    """
    mount = find_mount(directory)
    if mount is None or mount.fs_type not in OUR_TYPES:
        return State.ABSENT
    # statfs, since the kernel may answer a stat from its cache. In a child, since nothing can end a
    # thread that waits for an answer.
    status = _child_status(
        "import os, sys\ntry: os.statvfs(sys.argv[1])\nexcept OSError as e: sys.exit(e.errno % 256)",
        mount.mountpoint,
        timeout_s,
    )
    if status is None:
        return State.HUNG
    return State.STALE if status in (errno.ENOTCONN, errno.ECONNABORTED) else State.SERVED


def is_stale(directory: str | os.PathLike[str], *, timeout_s: float = PROBE_S) -> bool:
    """True if the daemon of our mount at `directory` is gone: every call on it gives ENOTCONN."""
    return probe(directory, timeout_s=timeout_s) is State.STALE


def _child_status(code: str, argument: str, timeout_s: float) -> int | None:
    """Exit status of a Python child; None if it did not end in time. Such a child is killed, not awaited.

    posix_spawn and waitpid rather than subprocess, which waits without a limit for what it has killed.
    """
    child = os.posix_spawn(sys.executable, [sys.executable, "-I", "-S", "-c", code, argument], os.environ)
    deadline_s = time.monotonic() + timeout_s
    pause_s = 0.001
    while time.monotonic() < deadline_s:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.05)
    os.kill(child, signal.SIGKILL)
    time.sleep(pause_s)
    os.waitpid(child, os.WNOHANG)  # reaps it if the request was not yet read; else init does, in the end
    return None


def recover_stale(directory: str | os.PathLike[str]) -> int:
    """Takes away stale mounts of ours at `directory`, one over the other; how many there were.

    A mount that is served, hung or not ours stays. OSError if the kernel or fusermount3 refuses.
    """
    for count in range(_STACKED_MAX):
        mount = find_mount(directory)
        if mount is None or not is_stale(directory):
            return count
        _detach(mount.mountpoint)
    raise OSError(errno.ELOOP, "too many stale mounts one over the other", os.fspath(directory))


def _detach(mountpoint: str) -> None:
    if os.geteuid() == 0:
        _umount2(mountpoint, _MNT_DETACH | _UMOUNT_NOFOLLOW)
        return
    run = subprocess.run(
        ["fusermount3", "-u", "-z", "--", mountpoint], capture_output=True, text=True, check=False
    )
    if run.returncode != 0:
        raise OSError(errno.EPERM, f"fusermount3: {run.stderr.strip()}", mountpoint)


def _umount2(mountpoint: str, flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), mountpoint)


# --- the connection ---


def dev_fuse_fds() -> list[int]:
    """This process's descriptors of /dev/fuse; one per mount that it serves."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.append(int(name))
        except FileNotFoundError:
            continue  # the one that listed the directory
    return sorted(found)


def connection_number(dev_fuse_fd: int) -> int:
    """The number of the connection behind a descriptor of /dev/fuse of this process.

    OSError ENXIO if the descriptor is no mounted connection, or the kernel does not tell. The same number
    is the `minor` of the mount in `find_mount`.
    """
    for line in Path(f"/proc/self/fdinfo/{dev_fuse_fd}").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "fuse_connection":
            return int(value)
    raise OSError(errno.ENXIO, f"descriptor {dev_fuse_fd} shows no fuse connection")


def abort(connection: int, *, fusectl: Path = FUSECTL) -> None:
    """Ends a wedged mount: every request in flight fails with ECONNABORTED, later ones with ENOTCONN.

    Through fusectl where it is mounted (the owner of the mount may do this), else by a forced umount
    (root), which may take the mount away as well. OSError if there is no such connection or right.
    """
    control = fusectl / str(connection) / "abort"
    if control.exists():
        control.write_text("1\n")
        return
    for mount in parse_mountinfo(MOUNTINFO.read_bytes()):
        if mount.major == 0 and mount.minor == connection and mount.fs_type.split(".")[0] == "fuse":
            try:
                _umount2(mount.mountpoint, _MNT_FORCE | _UMOUNT_NOFOLLOW)
            except OSError as error:
                if error.errno != errno.EBUSY:  # still in use, but aborted
                    raise
            return
    raise OSError(errno.ENXIO, f"no fuse connection {connection}")


def set_read_ahead(directory: str | os.PathLike[str], kib: int) -> None:
    """Sets how far the kernel reads ahead on the mount at `directory`. For root; OSError where refused.

    1024 makes one READ of 1 MiB out of eight, and cold sequential reads about a third faster. Call it
    when the mount has answered something: the daemon's reply to INIT lowers it to the kernel's default.
    """
    mount = find_mount(directory)
    if mount is None:
        raise OSError(errno.ENOENT, "nothing is mounted here", os.fspath(directory))
    (BDI / f"{mount.major}:{mount.minor}" / "read_ahead_kb").write_text(f"{kib}\n")


def raise_background_limits(
    connection: int, max_background: int, congestion_threshold: int, *, fusectl: Path = FUSECTL
) -> bool:
    """More read-aheads and asynchronous requests at once than the kernel's 12; never lowers. For root.

    False, with nothing changed, where fusectl is not mounted or does not show the connection.
    """
    control = fusectl / str(connection)
    wanted = {"max_background": max_background, "congestion_threshold": congestion_threshold}
    if not all((control / name).exists() for name in wanted):
        return False
    for name, value in wanted.items():
        if int((control / name).read_text()) < value:
            (control / name).write_text(f"{value}\n")
    return True
