"""The same random calls in two directories, of which one is known to be right.

Every call is drawn with all its arguments first and then made in both places. Its outcome (what it
returned, or its errno) must be the same, and so must, now and then, the whole trees. A run is told by
its seed and number of steps alone, so a failure can be run again.

The directory that is tried may be there on several mounts: each call is made on one of them. That is for
mounts with consistency=strict, where no kernel knows anything but what it asks for. And the calls may be
those of several users, each made as one of them.
"""

import fcntl
import mmap
import os
import random
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from tests.mount.posix.calls import EXCHANGE, NOREPLACE, error, renameat2
from tests.mount.snapshot import Node, differences, snapshot

NAMES: Final = ["a", "b", "c", "d", "ä", "n" * 255]
# Who calls: user, group, other groups. Root does most, else nothing would come of anything.
USERS: Final = [(0, 0, []), (0, 0, []), (1000, 1000, [500]), (1001, 1001, [500, 7]), (1002, 7, [])]
MODES: Final = (0o644, 0o755, 0o2755, 0o4711, 0o1777, 0o000)
MODES_OF_USERS: Final = (*MODES, 0o666, 0o777, 0o2777, 0o6777)
HANDLES_MAX: Final = 6
WALK_EVERY: Final = 30  # steps after which it is seen anew which paths exist
LOOK_EVERY: Final = 150  # steps between comparisons of the whole trees
CLOCK_NS: Final = 20_000_000  # the kernel's own clock for times of files may be this much behind
Outcome = object
Call = Callable[[str], Outcome]  # what is done in one place, below its root


class Difference(AssertionError):
    """The two places have answered differently."""


class Differential:
    """A run: random calls in `right` and in `tried`, two empty directories; `again` are other mounts' paths
    of the latter. With `users` not all of them are root's."""

    def __init__(
        self, right: Path, tried: Path, seed: int, again: Sequence[Path] = (), *, users: bool = False
    ) -> None:
        self.roots = (str(right), str(tried))
        self.mounts = [str(tried), *map(str, again)]
        self.rng = random.Random(seed)
        self.seed = seed
        self.step = 0
        self.history: list[str] = []
        self.paths: list[str] = []
        # Open files: the descriptors in both places, in step, and the mount where the second one is open.
        self.handles: list[tuple[int, int, str]] = []
        self.actions: list[tuple[int, Callable[[], None]]] = [
            (10, self.open), (4, self.close), (12, self.write), (8, self.read), (4, self.truncate_handle),
            (3, self.truncate), (4, self.stat_handle), (4, self.map), (8, self.mkdir), (4, self.rmdir),
            (8, self.unlink), (12, self.rename), (6, self.link), (4, self.symlink), (2, self.mkfifo),
            (4, self.chmod), (2, self.chown), (3, self.utime), (4, self.set_xattr), (2, self.remove_xattr),
            (3, self.list), (4, self.read_whole), (3, self.stat), (2, self.readlink), (1, self.fsync),
            (1, self.allocate), (2, self.copy), (2, self.create_and_rename),
        ]  # fmt: skip
        self.modes = MODES_OF_USERS if users else MODES
        self.owners = (-1, 0, 7, 1000, 1001) if users else (-1, 0, 7)
        self.groups = (-1, 0, 500, 7, 1000) if users else (-1, 0, 500)
        self.users = USERS if users else None
        if users:
            self.actions += [(4, self.access), (3, self.touch), (6, self.chmod), (4, self.chown)]
            for root in (right, tried):
                root.chmod(0o777)
        if again:
            self.actions.remove((4, self.map))  # ENODEV on strict mounts

    def run(self, steps: int) -> None:
        """Makes `steps` calls in both places; Difference tells where they part."""
        weights = [weight for weight, _ in self.actions]
        try:
            for _ in range(steps):
                if self.step % WALK_EVERY == 0:
                    self._walk()
                self.step += 1
                if len(self.mounts) > 1:
                    self._go(self.rng.choice(self.mounts))
                self.rng.choices(self.actions, weights)[0][1]()
                if self.step % LOOK_EVERY == 0:
                    self.compare_trees()
            while self.handles:
                self.close()
            self.compare_trees()
        finally:
            for *pair, _ in self.handles:
                for descriptor in pair:
                    os.close(descriptor)

    def _go(self, mount: str) -> None:
        """The next call is made there. What open files of the last one were given is committed first: until
        then only that mount shows it."""
        right, last = self.roots
        if mount != last:
            for _, descriptor, at in self.handles:
                if at == last:
                    os.fsync(descriptor)
            self.history.append(f"{self.step}: on mount {self.mounts.index(mount) + 1}")
            self.roots = (right, mount)

    # --- both places ---

    def both(self, what: str, call: Call) -> tuple[Outcome, Outcome]:
        if self.users is not None:
            uid, gid, groups = self.rng.choice(self.users)
            what, call = f"{what} by {uid}", partial(_as_user, call, uid, gid, groups)
        self.history.append(f"{self.step}: {what.replace(NAMES[-1], 'N')}")
        outcomes = tuple(self._outcome(call, root) for root in self.roots)
        if outcomes[0] != outcomes[1]:
            self._fail(f"right: {outcomes[0]!r:.300}\ntried: {outcomes[1]!r:.300}")
        return outcomes[0], outcomes[1]

    @staticmethod
    def _outcome(call: Call, root: str) -> Outcome:
        result: list[Outcome] = []
        failed = error(lambda: result.append(call(root)))
        return failed or result[0]

    def _fail(self, text: str) -> None:
        history = "\n".join(self.history[-40:])
        raise Difference(f"seed {self.seed}, step {self.step}:\n{history}\n{text}")

    def on_handle(self, what: str, call: Callable[[int], Outcome]) -> None:
        """The same on both descriptors of one open file."""
        if not self.handles:
            return
        right, tried, mount = self.rng.choice(self.handles)
        self._go(mount)
        by_root = {self.roots[0]: right, mount: tried}
        self.both(f"handle {tried} {what}", lambda root: call(by_root[root]))

    def _walk(self) -> None:
        root = self.roots[0]
        self.paths = []
        for above, directories, files in os.walk(root):
            directories.sort()
            self.paths += [f"{above}/{name}"[len(root) :] for name in sorted(directories + files)]

    def compare_trees(self) -> None:
        for mount in self.mounts:
            self._go(mount)
            self._compare_trees()

    def _compare_trees(self) -> None:
        right, tried = (snapshot(Path(root)) for root in self.roots)
        found = differences(
            {path: node.lasting() for path, node in right.items()},
            {path: node.lasting() for path, node in tried.items()},
        )
        if found:
            self._fail("\n".join(found))
        self._compare_order(right, tried)

    def _compare_order(self, right: dict[bytes, Node], tried: dict[bytes, Node]) -> None:
        """What was changed earlier there was not changed later here."""
        latest, latest_path = 0, b""
        waiting: list[tuple[int, int, bytes]] = []
        for path, node in sorted(right.items(), key=lambda item: item[1].mtime_ns):
            while waiting and waiting[0][0] < node.mtime_ns - CLOCK_NS:
                _, time, earlier = waiting.pop(0)
                if time > latest:
                    latest, latest_path = time, earlier
            if tried[path].mtime_ns < latest - CLOCK_NS:
                self._fail(f"mtime of {path!r} is before that of {latest_path!r}")
            waiting.append((node.mtime_ns, tried[path].mtime_ns, path))

    # --- arguments ---

    def path(self, existing: float = 0.0) -> str:
        """A path of one to three components; with the chance `existing` one that was there lately."""
        if self.paths and self.rng.random() < existing:
            return self.rng.choice(self.paths)
        depth = self.rng.choice((1, 1, 2, 2, 3))
        return "/" + "/".join(self.rng.choice(NAMES) for _ in range(depth))

    def data(self) -> bytes:
        size = self.rng.choice((1, 10, 100, 4096, 5000, 16_384, 20_000, 70_000))
        if self.rng.random() < 0.01:
            size = 1_500_000
        return self.rng.randbytes(min(size, 1000)) * (size // min(size, 1000))

    def offset(self) -> int:
        return self.rng.choice((0, 0, 1, 4095, 4096, 10_000, 65_536, 100_000, self.rng.randrange(300_000)))

    # --- open files ---

    def open(self) -> None:
        path, flags = self.path(), self.rng.choice((os.O_RDWR, os.O_RDWR, os.O_RDONLY, os.O_WRONLY))
        for flag, chance in [(os.O_CREAT, 0.7), (os.O_EXCL, 0.2), (os.O_TRUNC, 0.2), (os.O_APPEND, 0.2)]:
            if self.rng.random() < chance:
                flags |= flag
        if flags & os.O_CREAT == 0:
            flags &= ~os.O_EXCL
        flags |= os.O_NONBLOCK | os.O_NOFOLLOW * (self.rng.random() < 0.1)
        mode = self.rng.choice((0o644, 0o600, 0o777, 0o4755))
        descriptors: list[int] = []

        def call(root: str) -> Outcome:
            descriptor = os.open(root + path, flags, mode)
            if stat.S_ISFIFO(os.fstat(descriptor).st_mode) or len(self.handles) == HANDLES_MAX:
                os.close(descriptor)
            else:
                descriptors.append(descriptor)
            return None

        self.both(f"open {path} {flags:o} {mode:o}", call)
        if descriptors:
            self.handles.append((descriptors[0], descriptors[1], self.roots[1]))

    def close(self) -> None:
        if self.handles:
            *pair, mount = self.handles.pop(self.rng.randrange(len(self.handles)))
            self._go(mount)
            self.history.append(f"{self.step}: close {pair[1]}")
            for descriptor in pair:
                os.close(descriptor)

    def write(self) -> None:
        data, offset = self.data(), self.offset()
        if self.rng.random() < 0.5:
            self.on_handle(f"pwrite {len(data)} at {offset}", lambda fd: os.pwrite(fd, data, offset))
        else:
            self.on_handle(f"write {len(data)}", lambda fd: os.write(fd, data))

    def read(self) -> None:
        size, offset = self.rng.choice((1, 100, 5000, 200_000)), self.offset()

        def call(fd: int) -> bytes:
            if len(self.mounts) > 1:
                os.fstat(fd)  # waits for the newest state; a read of an open file does not
            return os.pread(fd, size, offset)

        self.on_handle(f"pread {size} at {offset}", call)

    def truncate_handle(self) -> None:
        size = self.offset()
        self.on_handle(f"ftruncate {size}", lambda fd: os.ftruncate(fd, size))

    def stat_handle(self) -> None:
        self.on_handle("fstat", lambda fd: _fields(os.fstat(fd)))

    def fsync(self) -> None:
        self.on_handle("fsync", os.fsync)

    def allocate(self) -> None:
        size, offset = self.rng.randrange(1, 20_000), self.offset()

        def call(fd: int) -> Outcome:
            os.posix_fallocate(fd, offset, size)
            os.utime(fd)  # where all is allocated already, glibc's way changes nothing, so neither the times
            return os.fstat(fd).st_size

        # glibc's way of doing it without the kernel reads too, and on a file opened to append it appends.
        self.on_handle(
            f"fallocate {size} at {offset}", lambda fd: call(fd) if _open_flags(fd) == os.O_RDWR else None
        )

    def map(self) -> None:
        data, offset = self.rng.randbytes(50), self.offset()

        def call(fd: int) -> Outcome:
            found = os.fstat(fd)
            size = found.st_size
            if not stat.S_ISREG(found.st_mode) or size <= offset + 50:
                return "too short"
            with mmap.mmap(fd, size) as mapped:
                before = mapped[offset : offset + 50]
                mapped[offset : offset + 50] = data
                mapped.flush()
            return before

        self.on_handle(f"write through a mapping at {offset}", call)

    # --- names ---

    def mkdir(self) -> None:
        path, mode = self.path(), self.rng.choice((0o755, 0o777, 0o700))
        self.both(f"mkdir {path} {mode:o}", lambda root: os.mkdir(root + path, mode))

    def rmdir(self) -> None:
        path = self.path(existing=0.6)
        self.both(f"rmdir {path}", lambda root: os.rmdir(root + path))

    def unlink(self) -> None:
        path = self.path(existing=0.6)
        self.both(f"unlink {path}", lambda root: os.unlink(root + path))

    def rename(self) -> None:
        old, new, flags = self.path(0.7), self.path(0.2), self.rng.choice((0, 0, 0, NOREPLACE, EXCHANGE))
        self.both(f"rename {old} {new} {flags}", lambda root: renameat2(root + old, root + new, flags))

    def create_and_rename(self) -> None:
        """As an editor saves."""
        path, data = self.path(), self.data()

        def call(root: str) -> None:
            temporary = f"{os.path.dirname(root + path)}/.save"
            # A rename may have put a fifo there: never wait for its reader.
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NONBLOCK
            with os.fdopen(os.open(temporary, flags, 0o644), "wb") as file:
                file.write(data)
            os.rename(temporary, root + path)

        self.both(f"save {path} {len(data)}", call)

    def link(self) -> None:
        old, new = self.path(0.7), self.path()
        self.both(f"link {old} {new}", lambda root: os.link(root + old, root + new, follow_symlinks=False))

    def symlink(self) -> None:
        target, path = self.rng.choice([*NAMES[:4], "../a", "a/b", ".", "t" * 300]), self.path()
        self.both(f"symlink {target:.9} {path}", lambda root: os.symlink(target, root + path))

    def readlink(self) -> None:
        path = self.path(existing=0.6)
        self.both(f"readlink {path}", lambda root: os.readlink(root + path))

    def mkfifo(self) -> None:
        path = self.path()
        self.both(f"mkfifo {path}", lambda root: os.mkfifo(root + path, 0o644))

    def list(self) -> None:
        path = self.rng.choice(("", self.path(0.6)))
        self.both(f"list {path}", lambda root: sorted(os.listdir(root + path)))

    # --- attributes and whole files ---

    def stat(self) -> None:
        path, follow = self.path(0.6), self.rng.random() < 0.5
        self.both(f"stat {path}", lambda root: _fields(os.stat(root + path, follow_symlinks=follow)))

    def chmod(self) -> None:
        path, mode = self.path(0.6), self.rng.choice(self.modes)
        self.both(f"chmod {path} {mode:o}", lambda root: os.chmod(root + path, mode))

    def chown(self) -> None:
        path, uid, gid = self.path(0.6), self.rng.choice(self.owners), self.rng.choice(self.groups)
        self.both(f"chown {path} {uid} {gid}", lambda root: os.lchown(root + path, uid, gid))

    def utime(self) -> None:
        path, times = self.path(0.6), (self.rng.randrange(10**18), self.rng.randrange(10**18))

        def call(root: str) -> Outcome:
            os.utime(root + path, ns=times, follow_symlinks=False)
            return os.lstat(root + path).st_mtime_ns

        self.both(f"utime {path} {times}", call)

    def touch(self) -> None:
        path = self.path(0.7)
        self.both(f"touch {path}", lambda root: os.utime(root + path))

    def access(self) -> None:
        path, mode = self.path(0.7), self.rng.choice((os.R_OK, os.W_OK, os.X_OK, os.R_OK | os.W_OK | os.X_OK))
        self.both(f"access {path} {mode}", lambda root: os.access(root + path, mode, effective_ids=True))

    def set_xattr(self) -> None:
        path, name, value = self.path(0.6), f"user.{self.rng.choice('xyz')}", self.rng.randbytes(20)
        flags = self.rng.choice((0, 0, os.XATTR_CREATE, os.XATTR_REPLACE))
        self.both(f"setxattr {path} {name} {flags}", lambda root: _set(root + path, name, value, flags))

    def remove_xattr(self) -> None:
        path, name = self.path(0.6), f"user.{self.rng.choice('xyz')}"
        self.both(
            f"removexattr {path} {name}",
            lambda root: os.removexattr(root + path, name, follow_symlinks=False),
        )

    def truncate(self) -> None:
        path, size = self.path(0.6), self.offset()
        self.both(f"truncate {path} {size}", lambda root: os.truncate(root + path, size))

    def read_whole(self) -> None:
        path = self.path(0.6)

        def call(root: str) -> Outcome:
            descriptor = os.open(root + path, os.O_RDONLY | os.O_NONBLOCK)
            try:  # fdopen leaves the descriptor of a directory open, and raises
                with os.fdopen(descriptor, "rb", closefd=False) as file:
                    return file.read()
            finally:
                os.close(descriptor)

        self.both(f"read {path}", call)

    def copy(self) -> None:
        """copy_file_range(2) between two names."""
        old, new, offset = self.path(0.7), self.path(), self.offset()

        def call(root: str) -> Outcome:
            source = os.open(root + old, os.O_RDONLY | os.O_NONBLOCK)
            try:
                target = os.open(root + new, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o644)
                try:
                    return os.copy_file_range(source, target, 50_000, 0, offset)
                finally:
                    os.close(target)
            finally:
                os.close(source)

        self.both(f"copy {old} {new} to {offset}", call)


def _fields(found: os.stat_result) -> tuple[int, ...]:
    size = 0 if stat.S_ISDIR(found.st_mode) else found.st_size
    return found.st_mode, found.st_nlink, found.st_uid, found.st_gid, size


def _as_user(call: Call, uid: int, gid: int, groups: list[int], root: str) -> Outcome:
    before = os.getgroups()
    os.setgroups(groups)
    os.setegid(gid)
    os.seteuid(uid)
    try:
        return call(root)
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(before)


def _set(path: str, name: str, value: bytes, flags: int) -> None:
    os.setxattr(path, name, value, flags, follow_symlinks=False)


def _open_flags(descriptor: int) -> int:
    """The access mode of an open file, and whether it appends."""
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND)
