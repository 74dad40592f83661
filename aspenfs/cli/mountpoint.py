"""What is at the place where we shall mount: missing, free, taken, dead or hung.

A mountpoint may be the root of a FUSE file system whose daemon hangs; whoever touches such a path
hangs with it, and SIGKILL does not help (fuse(4)). So the mount table is read first, and the path is
only ever touched by a child that is waited for with a deadline.
"""

import errno
import os
import re
import select
import signal
import stat
import subprocess
from typing import NamedTuple

from aspenfs import errors

FILE_SYSTEM_TYPE = "fuse.aspen"
PROBE_DEADLINE_S = 5.0  # a live mount answers within milliseconds; a busy disk below may take longer
MOUNT_TABLE = "/proc/self/mountinfo"


class Mounted(NamedTuple):
    """A line of proc_pid_mountinfo(5)."""

    mountpoint: str
    file_system_type: str
    source: str


def mount_table() -> list[Mounted]:
    """All that is mounted here, oldest first."""
    with open(MOUNT_TABLE, "rb") as lines:
        return [_parse_line(os.fsdecode(line)) for line in lines]


def topmost(path: str) -> Mounted | None:
    """What one sees at the resolved `path`, if it is a mountpoint: the last of those mounted there."""
    return next((mounted for mounted in reversed(mount_table()) if mounted.mountpoint == path), None)


def probe(path: str, deadline_s: float = PROBE_DEADLINE_S) -> int:
    """0 if `path` is a directory that answers; else the errno, ETIMEDOUT after the deadline."""
    child = os.fork()
    if child == 0:
        try:
            status = 0 if stat.S_ISDIR(os.stat(path).st_mode) else errno.ENOTDIR
        except OSError as error:
            status = error.errno or errno.EIO
        finally:
            os._exit(status)
    ended = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        if not poll.poll(deadline_s * 1000):
            os.kill(child, signal.SIGKILL)  # not waited for: it may not be able to die
            return errno.ETIMEDOUT
    finally:
        os.close(ended)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def prepare(path: str) -> tuple[str, bool]:
    """Makes sure that one can mount at `path`; (the resolved path, whether a dead mount was removed).

    NotFound, NotADirectory, AccessDenied, and Busy if a live aspenfs is there or nothing answers. What
    is not ours may be mounted over, as mount(8) does.
    """
    recovered = False
    while True:
        failure = probe(path)
        if failure == errno.ETIMEDOUT:
            raise errors.Busy(
                f"{path}: does not answer within {PROBE_DEADLINE_S:.0f} s; something hangs there: "
                f"see `grep {path} {MOUNT_TABLE}`, and detach it with `umount -l {path}`"
            )
        resolved = os.path.realpath(path)
        mounted = topmost(resolved)
        if mounted is None or mounted.file_system_type != FILE_SYSTEM_TYPE:
            break
        if failure != errno.ENOTCONN:
            raise errors.Busy(
                f"{path}: {mounted.source} is already mounted here; `umount {path}` ends that mount"
            )
        _detach(resolved)
        recovered = True
    match failure:
        case 0:
            return resolved, recovered
        case errno.ENOENT:
            raise errors.NotFound(f"{path}: the mountpoint does not exist; `mkdir -p {path}` makes it")
        case errno.ENOTDIR:
            raise errors.NotADirectory(f"{path}: the mountpoint is not a directory")
        case errno.ENOTCONN:
            raise errors.Busy(f"{path}: a mount whose daemon has died is in the way; `umount -l {path}`")
        case _:
            raise errors.AccessDenied(f"{path}: {os.strerror(failure)}")


def _detach(path: str) -> None:
    """Removes what a killed daemon left. The file system is gone, so nothing can be lost by it."""
    command = ["umount", "-l", path] if os.geteuid() == 0 else ["fusermount3", "-u", "-z", path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise errors.Busy(f"{path}: the mount of a killed daemon cannot be removed: {done.stderr.strip()}")


def _parse_line(line: str) -> Mounted:
    before, _, after = line.partition(" - ")
    file_system_type, source = after.split(" ")[:2]
    return Mounted(_unescape(before.split(" ")[4]), file_system_type, _unescape(source))


def _unescape(text: str) -> str:
    r"""The kernel writes space, tab, newline and backslash as \040, \011, \012 and \134."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
