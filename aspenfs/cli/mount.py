"""`mount.aspen SPEC DIR [-sfnv] [-o OPTIONS]`: what mount(8) runs for `mount -t aspen`.

Belongs here: the command line, the refusals that can be had before anything is started, starting the
daemon and waiting until the mount answers. Not here: the daemon (`daemon.py`), the meaning of options
(`options.py`). mount.aspen(8) is the page for users.
"""

import argparse
import enum
import os
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from aspenfs import errors
from aspenfs.cli import ready
from aspenfs.cli.lock import StateLock, holder_pid, is_dying
from aspenfs.cli.options import MountOptions, parse_mount
from aspenfs.cli.paths import StateDirectory
from aspenfs.fuse import mounts
from aspenfs.runtime import identity, swap
from aspenfs.runtime.disk import RealDisk

FILE_SYSTEM_TYPE = "fuse.aspen"
FUSE_DEVICE = "/dev/fuse"
FUSE_CONFIGURATION = "/etc/fuse.conf"
LOG_BYTES_MAX = 16 << 20  # a longer log moves to daemon.log.1 at the next start
DYING_S = 0.7  # in which a killed daemon ends by itself, if its disk is not slow, or its mount answers
ABORTED_S = 5.0  # and after which it does without its connection
LOG_TAIL_LINES = 10
LOG_TAIL_BYTES = 4096

# glibc reads these before main(). Without them each buffer of 128 KiB and more is an mmap, a munmap
# and as many page faults as it has pages: writes of 1 MiB are 2.6 times slower.
MALLOC_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(512 << 20),
    "MALLOC_TOP_PAD_": str(16 << 20),
}
PATH_DEFAULT = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class ExitCode(enum.IntEnum):
    """mount(8), EXIT STATUS."""

    OK = 0
    USAGE = 1
    SYSTEM = 2
    MOUNT_FAILED = 32


class Refused(Exception):
    """The mount does not come to be; `code` is what mount(8) wants to hear."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code


class _ArgumentParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused(ExitCode.USAGE, f"{message}\n{self.format_usage().strip()}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code; with -f it does not return, but becomes the daemon."""
    try:
        return _mount(_parse_arguments(sys.argv[1:] if arguments is None else arguments))
    except Refused as refusal:
        code, text = refusal.code, str(refusal)
    except OSError as error:
        code, text = ExitCode.SYSTEM, str(error)
    print(f"mount.aspen: {text}", file=sys.stderr)
    return code


def _parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _ArgumentParser(
        prog="mount.aspen",
        description="Mounts an aspenfs cluster, as one of its members, and returns when the mount answers.",
        epilog="The options, and lines for fstab(5): man mount.aspen. Undone by: umount DIR.",
    )
    parser.add_argument("spec", metavar="NAME[:/SUBTREE]", help="the cluster, and what of it to mount")
    parser.add_argument("mountpoint", metavar="DIR", help="where")
    parser.add_argument(
        "-o",
        dest="options",
        metavar="OPTIONS",
        action="append",
        default=[],
        help="ro, noatime, sync, consistency=strict, …: a list with commas",
    )
    parser.add_argument(
        "-f", "--foreground", action="store_true", help="stay in the foreground, with the log on stderr"
    )
    parser.add_argument("-s", dest="sloppy", action="store_true", help="pass over unknown options")
    parser.add_argument(
        "-n", dest="no_mtab", action="store_true", help="ignored: there is no /etc/mtab to write"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is done")
    return parser.parse_intermixed_args(arguments)


def _mount(arguments: argparse.Namespace) -> int:
    # mount(8) hands -f on for *its* -f, "fake": do everything but the mount.
    fake = arguments.foreground and _called_by_mount()
    try:
        options = parse_mount(
            arguments.spec,
            os.path.abspath(arguments.mountpoint),
            arguments.options,
            environ=os.environ,
            uid=os.geteuid(),
            foreground=arguments.foreground and not fake,
            sloppy=arguments.sloppy,
        )
    except errors.InvalidArgument as error:
        raise Refused(ExitCode.USAGE, str(error)) from None
    options = _check_places(options)
    directory = _prepare_state(options)
    _check_fuse()
    if arguments.verbose:
        print(f"mount.aspen: {options.to_json()}", file=sys.stderr)
    if fake:
        return ExitCode.OK
    if options.foreground:
        os.execve(sys.executable, _daemon_command(), _daemon_environment(options))
    _start_daemon(options, directory)
    if arguments.verbose:
        print(f"mount.aspen: {options.fsname} mounted on {options.mountpoint}", file=sys.stderr)
    return ExitCode.OK


def check(options: MountOptions) -> MountOptions:
    """What can be refused before there is a node; the options with the mountpoint as resolved. Refused."""
    options = _check_places(options)
    _check_fuse()
    return options


def start(options: MountOptions, meanwhile: Callable[[], object] | None = None) -> None:
    """Mounts the node that is in the state directory, and returns when the mount answers. Refused.

    `meanwhile` is called some times a second until then; the daemon ends if it raises Refused. `options` are
    those that `check` returned.
    """
    _start_daemon(options, _prepare_state(options), meanwhile)


def _called_by_mount() -> bool:
    try:
        return Path(f"/proc/{os.getppid()}/comm").read_text(encoding="utf-8") == "mount\n"
    except OSError:
        return False


def _check_rights(options: MountOptions) -> None:
    """What only root may ask for."""
    if os.geteuid() == 0:
        return
    if options.allow_other and not user_allow_other(Path(FUSE_CONFIGURATION)):
        raise Refused(
            ExitCode.USAGE,
            f"option allow_other: {FUSE_CONFIGURATION} does not let users have it; "
            f"root can add the line user_allow_other there, or leave the option out",
        )
    for name, wanted in (("dev", options.dev), ("suid", options.suid)):
        if wanted:
            raise Refused(ExitCode.USAGE, f"option {name}: only root may mount with it")


def user_allow_other(configuration: Path) -> bool:
    """Whether fuse.conf lets users other than root have allow_other."""
    try:
        lines = configuration.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    return any(line.strip() == "user_allow_other" for line in lines)


def _check_fuse() -> None:
    try:
        os.close(os.open(FUSE_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        raise Refused(
            ExitCode.SYSTEM,
            f"{FUSE_DEVICE} is missing: load the kernel's module with `modprobe fuse`; "
            "a container must be given the device (--device /dev/fuse --cap-add SYS_ADMIN)",
        ) from None
    except PermissionError:
        raise Refused(
            ExitCode.SYSTEM,
            f"{FUSE_DEVICE} is not open to you: root can `chmod 666 {FUSE_DEVICE}`, as it is usual",
        ) from None
    except OSError as error:
        raise Refused(ExitCode.SYSTEM, f"{FUSE_DEVICE} cannot be opened: {error.strerror}") from None
    if os.geteuid() and shutil.which("fusermount3") is None:
        raise Refused(ExitCode.SYSTEM, "fusermount3 is missing: install it (Debian: apt-get install fuse3)")


def _prepare_mountpoint(path: str) -> str:
    """The resolved path, where one can mount now. What is not ours may be mounted over, as by mount(8)."""
    _clear(path)
    resolved = os.path.realpath(path)  # nothing hangs there, so it may be touched
    if resolved != path:
        _clear(resolved)
    try:
        is_directory = stat.S_ISDIR(os.stat(resolved).st_mode)
    except FileNotFoundError:
        raise Refused(
            ExitCode.MOUNT_FAILED, f"{path}: the mountpoint does not exist; `mkdir -p {path}` makes it"
        ) from None
    except OSError as error:
        raise Refused(ExitCode.MOUNT_FAILED, f"{path}: {error.strerror}") from None
    if not is_directory:
        raise Refused(ExitCode.MOUNT_FAILED, f"{path}: the mountpoint is not a directory")
    return resolved


def free_dying(path: str, directory: StateDirectory) -> None:
    """Lets a killed daemon of this node end, if it can not do so by itself.

    A thread of it may have been telling the kernel of a change in a directory, and wait for the lock of that
    directory; its holder waits for the answer to a request that nobody will give any more, for the
    connection ends with the daemon's last thread only. Aborting the connection frees both.
    """
    pid = holder_pid(directory)
    if pid is None or _ends(pid, DYING_S):
        return
    mounted = mounts.find_mount(path)
    if mounted is None or mounts.probe(path, timeout_s=DYING_S) is not mounts.State.HUNG:
        return
    try:
        mounts.abort(mounted.minor)
    except OSError as error:
        raise Refused(
            ExitCode.MOUNT_FAILED,
            f"{path}: the killed daemon with pid {pid} can not end: {error.strerror}; "
            f"as root: echo 1 > /sys/fs/fuse/connections/{mounted.minor}/abort",
        ) from None
    _ends(pid, ABORTED_S)


def _ends(pid: int, seconds: float) -> bool:
    """Whether the process is not dying, or has died within that time."""
    end = time.monotonic() + seconds
    while is_dying(pid):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _clear(path: str) -> None:
    """Removes what killed daemons have left at `path`; refuses if a daemon lives there, well or not."""
    try:
        recovered = mounts.recover_stale(path)
    except OSError as error:
        raise Refused(
            ExitCode.MOUNT_FAILED, f"{path}: the mount of a killed daemon cannot be removed: {error.strerror}"
        ) from None
    if recovered:
        print(f"mount.aspen: {path}: removed the mount that a killed daemon had left", file=sys.stderr)
    match mounts.probe(path):
        case mounts.State.HUNG:
            raise Refused(
                ExitCode.MOUNT_FAILED,
                f"{path}: mounted, but its daemon does not answer; end that daemon, or `umount -l {path}`",
            )
        case mounts.State.SERVED if (
            mounted := mounts.find_mount(path)
        ) and mounted.fs_type == FILE_SYSTEM_TYPE:
            raise Refused(
                ExitCode.MOUNT_FAILED,
                f"{path}: {mounted.source} is already mounted here; `umount {path}` ends that mount",
            )


def _check_places(options: MountOptions) -> MountOptions:
    """Rights, and a mountpoint that does not hide the state; the options with it as resolved."""
    _check_rights(options)
    free_dying(options.mountpoint, StateDirectory(Path(options.state_dir)))
    options = options.at(_prepare_mountpoint(options.mountpoint))
    if Path(os.path.realpath(options.state_dir)).is_relative_to(options.mountpoint):
        raise Refused(
            ExitCode.USAGE,
            f"{options.state_dir}: the state directory would be hidden under the mount itself; "
            "choose another one with -o state_dir=",
        )
    return options


def _check_only_ours(directory: StateDirectory, path: Path) -> None:
    """Who may change what is in there has the node's keys, and files that this process writes by name."""
    found = path.stat()
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Refused(
            ExitCode.SYSTEM,
            f"{directory.path}: others may change the state directory (owner {found.st_uid}, mode "
            f"{stat.S_IMODE(found.st_mode):o}); look who has been in there, then: chown {os.geteuid()} "
            f"{directory.path}; chmod 700 {directory.path}",
        )


def _prepare_state(options: MountOptions) -> StateDirectory:
    """The state directory: writable, and the home of the cluster that is asked for."""
    directory = StateDirectory(Path(options.state_dir))
    path = Path(os.path.realpath(directory.path))
    if options.create:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_dir() and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise Refused(ExitCode.SYSTEM, f"{directory.path}: the state directory is not writable for you")
    if path.is_dir():
        _check_only_ours(directory, path)
    try:
        _finish_swap(directory)
        home = identity.read(path)
    except (errors.Corrupt, errors.Busy) as error:
        raise Refused(ExitCode.MOUNT_FAILED, str(error)) from None
    if home is None and not options.create:
        # Never a new, empty cluster by accident, just because the disk with the old one is not there.
        raise Refused(
            ExitCode.MOUNT_FAILED,
            f"{directory.path}: holds no cluster; `aspen init` makes a new one (so does -o create), "
            "`aspen join` makes this host a member of one; else name the right place with -o state_dir=",
        )
    if home is not None and home.name != options.name:
        raise Refused(
            ExitCode.MOUNT_FAILED,
            f"{directory.path}: holds the cluster {home.name!r}, not {options.name!r}; "
            "mount that name, or name another place with -o state_dir=",
        )
    return directory


def _finish_swap(directory: StateDirectory) -> None:
    """What a restore or a recovery had decided when it was killed: which cluster this is depends on it."""
    disk = RealDisk(directory.path)
    if directory.path.is_dir() and swap.pending(disk):
        with StateLock.acquire(directory):
            swap.recover(disk)


def _daemon_command() -> list[str]:
    # -P: the current directory has no business in the module path of a daemon.
    return [sys.executable, "-P", "-m", "aspenfs.cli.daemon"]


def _daemon_environment(options: MountOptions) -> dict[str, str]:
    # An administrator's own malloc settings win; mount(8) may run us with no PATH.
    environment = {"PATH": PATH_DEFAULT, **MALLOC_ENVIRONMENT, **os.environ}
    environment.pop(ready.READY_FD_VARIABLE, None)
    environment[ready.OPTIONS_VARIABLE] = options.to_json()
    return environment


def _start_daemon(
    options: MountOptions, directory: StateDirectory, meanwhile: Callable[[], object] | None = None
) -> None:
    """Starts the daemon in a session of its own and returns when the mount answers."""
    environment = _daemon_environment(options)
    environment.pop("NOTIFY_SOCKET", None)  # it is not this service's main process
    reader, writer = os.pipe()
    environment[ready.READY_FD_VARIABLE] = str(writer)
    log = _open_log(directory.log)
    child = subprocess.Popen(
        _daemon_command(),
        env=environment,
        cwd="/",
        start_new_session=True,
        pass_fds=[writer],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
    )
    os.close(log)
    os.close(writer)
    try:
        report = ready.await_report(reader, meanwhile)
    except KeyboardInterrupt:
        child.terminate()
        child.wait()
        raise Refused(ExitCode.MOUNT_FAILED, "interrupted; the daemon was stopped") from None
    except Refused:
        child.terminate()
        child.wait()
        raise
    if report is None:
        raise Refused(ExitCode.MOUNT_FAILED, _death_of(child.wait(), directory.log))
    if not report.get("ready"):
        child.wait()
        raise Refused(report.get("exit", ExitCode.MOUNT_FAILED), report.get("error", "no cause given"))
    _check_mounted(options.mountpoint, directory.log)
    if "warning" in report:
        print(f"mount.aspen: warning: {report['warning']}", file=sys.stderr)


def _check_mounted(path: str, log: Path) -> None:
    """Trusts the mount table and an answer, not the daemon's word."""
    state = mounts.probe(path)
    if state is not mounts.State.SERVED:
        raise Refused(
            ExitCode.MOUNT_FAILED, f"{path}: the daemon was ready, but now: {state.value}; see {log}"
        )


def _open_log(path: Path) -> int:
    if path.exists() and path.stat().st_size > LOG_BYTES_MAX:
        path.rename(path.with_name(path.name + ".1"))
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)


def _death_of(status: int, log: Path) -> str:
    how = f"was killed by signal {-status}" if status < 0 else f"ended with exit code {status}"
    with log.open("rb") as lines:
        lines.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
        tail = lines.read().decode(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join([f"the daemon {how} before the mount answered; the end of {log}:", *tail])


if __name__ == "__main__":
    sys.exit(main())
