"""A disk in memory that fails on request, in the ways in which real ones do, behind `seams.Disk`.

Two images are kept: what a process reads now (the page cache) and what is on the platters. They
differ by what was not synced: per file the sectors written and the sizes set since the last
datasync, and per directory the names made, moved and removed since the last `sync_directory`.

`crash()` is a power failure: of the unsynced part a random but legal subset stays. A sector of
512 bytes is atomic and shows any one of the versions it had since the last sync, each sector on
its own (so writes are lost, torn and reordered); sizes are journalled, so a prefix of the size
changes stays; of the names each change stays or not, on its own.
`kill()` is the end of the process alone: everything issued stays.
After either, every call raises `SimulatedCrash` until `restart()`, and handles opened before it
raise it for ever, as the process that held them is gone.

Faults can be planned at operation numbers: `operations` counts the calls that change something or
make it durable, so a test runs once, reads the counter, and then sweeps every number below it.
A `gate` makes datasyncs take time: it is called, with the file name and no lock held, between what a sync
covers being settled and its being durable.
All methods may be called from any thread; equal seeds and equal orders of calls give equal images.
"""

import errno
import os
import random
import threading
from collections.abc import Callable
from typing import Literal, NoReturn

from aspenfs.sim.disk_image import Directory, Inode, NameChange, resize_image

Operation = Literal[
    "open", "pread", "pwrite", "allocate", "truncate", "datasync",
    "rename", "unlink", "make_directory", "sync_directory",
]  # fmt: skip


class SimulatedCrash(BaseException):
    """The machine is down. Not an Exception, so that no handler of the code under test eats it."""


class _Fault:
    __slots__ = ("at", "errno", "operation", "times")

    def __init__(self, operation: Operation, at: int, errno_: int, times: int) -> None:
        self.operation, self.at, self.errno, self.times = operation, at, errno_, times


class SimFile:
    """An open file of a `SimDisk`; see `seams.DiskFile`."""

    __slots__ = ("_closed", "_disk", "_epoch", "_inode")

    def __init__(self, disk: "SimDisk", inode: Inode, epoch: int) -> None:
        self._disk, self._inode, self._epoch = disk, inode, epoch
        self._closed = False

    def _check(self) -> None:
        self._disk._check_up(self._epoch)
        if self._closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def pread(self, size: int, offset: int) -> bytes:
        with self._disk._lock:
            self._check()
            self._disk._raise_planned("pread")
            return bytes(self._inode.data[offset : offset + size])

    def pwrite(self, data: bytes | bytearray | memoryview, offset: int) -> None:
        disk, inode = self._disk, self._inode
        content = bytes(data)
        with disk._lock:
            self._check()
            if disk._down_now():
                # The machine died inside the call: some prefix had reached the page cache.
                disk._write(inode, content[: disk._rng.randint(0, len(content))], offset)
                disk._go_down()
            fault = disk._planned("pwrite")
            room = disk._room(inode, offset + len(content))
            if fault or room < len(content) + offset:
                part = disk._rng.randint(0, len(content)) if fault else max(0, room - offset)
                disk._write(inode, content[:part], offset)
                disk._fail(fault or errno.ENOSPC)
            disk._write(inode, content, offset)

    def allocate(self, size: int) -> None:
        disk, inode = self._disk, self._inode
        with disk._lock:
            self._check()
            end = len(inode.data)
            if disk._down_now():
                if size > end:
                    disk._write(inode, bytes(disk._rng.randint(0, size - end)), end)
                disk._go_down()
            fault = disk._planned("allocate")
            if size <= end:
                if fault:
                    disk._fail(fault)
                return
            room = disk._room(inode, size)
            target = disk._rng.randint(end, size) if fault else min(size, room)
            disk._write(inode, bytes(target - end), end)
            if fault or target < size:
                disk._fail(fault or errno.ENOSPC)

    def truncate(self, size: int) -> None:
        disk, inode = self._disk, self._inode
        with disk._lock:
            self._check()
            if disk._down_now():
                if disk._rng.random() < 0.5:
                    disk._resize(inode, size)
                disk._go_down()
            disk._raise_planned("truncate")
            if size > disk._room(inode, size):
                disk._fail(errno.ENOSPC)
            disk._resize(inode, size)

    def datasync(self) -> None:
        disk, inode = self._disk, self._inode
        with disk._lock:
            self._check()
            if disk._down_now():
                disk._go_down()
            fault = disk._planned("datasync")
            covered = len(inode.pending)
        if disk.gate is not None:
            disk.gate(inode.name)  # others may write meanwhile, which this sync does not cover
        with disk._lock:
            self._check()
            if fault:
                # As Linux does: what was not written back stays readable, counts as clean, and no
                # later sync will write it.
                inode.keep_some(disk._rng)
                disk._lose_size(inode)
                disk._fail(fault)
            inode.sync(covered)

    def size(self) -> int:
        with self._disk._lock:
            self._check()
            return len(self._inode.data)

    def close(self) -> None:
        self._closed = True


class SimDisk:
    """See the head of this file. `capacity_bytes` may be changed at any time (space freed, used up)."""

    def __init__(self, seed: int = 0, *, capacity_bytes: int = 1 << 40) -> None:
        self.capacity_bytes = capacity_bytes
        self.operations = 0
        self.gate: Callable[[str], object] | None = None
        self._rng = random.Random(seed)
        self._lock = threading.RLock()
        self._root = Directory()
        self._names: list[NameChange] = []
        self._used = 0
        self._epoch = 0
        self._down = False
        self._down_at: tuple[int, bool] | None = None
        self._faults: list[_Fault] = []

    # --- planning and causing faults ---

    def fail(self, operation: Operation, errno_: int, *, at: int = 0, times: int = 1) -> None:
        """The first `times` calls of `operation` from operation number `at` on raise OSError.

        A failed pwrite or allocate has written some prefix; a failed datasync has lost some of
        the unsynced data for good; the other calls change nothing. Negative `times`: until `heal()`.
        """
        with self._lock:
            self._faults.append(_Fault(operation, at, errno_, times))

    def crash_at(self, operation: int) -> None:
        """Power fails inside the call that would be number `operation` (the first is 1)."""
        with self._lock:
            self._down_at = (operation, True)

    def kill_at(self, operation: int) -> None:
        """The process is killed inside the call that would be number `operation`."""
        with self._lock:
            self._down_at = (operation, False)

    def crash(self) -> None:
        """Power fails now: keep a legal subset of what was not synced."""
        with self._lock:
            self._lose_unsynced()
            self._epoch += 1
            self._down = True
            self._down_at = None

    def kill(self) -> None:
        """The process ends now: all that it had written is in the page cache and stays."""
        with self._lock:
            self._epoch += 1
            self._down = True
            self._down_at = None

    def restart(self) -> None:
        """The machine is up again: planned faults are forgotten, old handles stay dead."""
        with self._lock:
            self._down = False
            self.heal()

    def heal(self) -> None:
        """Forget the planned faults."""
        with self._lock:
            self._down_at = None
            self._faults.clear()

    def flip(self, path: str, offset: int, bit: int) -> None:
        """Invert one bit of a file, in both images: what silent corruption of the medium does."""
        with self._lock:
            inode = self._file(path)
            assert 0 <= offset < len(inode.data), (path, offset, len(inode.data))
            inode.flip(offset, bit)

    @property
    def used_bytes(self) -> int:
        """Of the capacity; also while the machine is down."""
        return self._used

    # --- the port ---

    def open(self, path: str, *, create: bool = False) -> SimFile:
        with self._lock:
            self._check_up(self._epoch)
            directory, name = self._parent(path)
            node = directory.entries.get(name)
            if isinstance(node, Directory):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
            if node is None:
                if not create:
                    self._raise_planned("open", count=False)
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
                node = Inode()
                down = self._down_now()
                if not down:
                    self._raise_planned("open")
                self._change_names(NameChange(directory, None, (directory, name, node)), down)
            else:
                self._raise_planned("open", count=False)
            return SimFile(self, node, self._epoch)

    def rename(self, source: str, target: str) -> None:
        with self._lock:
            self._check_up(self._epoch)
            old_directory, old_name = self._parent(source)
            node = old_directory.entries.get(old_name)
            if node is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), source)
            directory, name = self._parent(target)
            replaced = directory.entries.get(name)
            if replaced is node:
                return
            if isinstance(replaced, Directory) and (isinstance(node, Inode) or replaced.entries):
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), target)
            if isinstance(replaced, Inode) and isinstance(node, Directory):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), target)
            down = self._down_now()
            if not down:
                self._raise_planned("rename")
            removed = (old_directory, old_name, node)
            self._change_names(NameChange(directory, removed, (directory, name, node)), down)

    def unlink(self, path: str) -> None:
        with self._lock:
            self._check_up(self._epoch)
            node = self._file(path)
            directory, name = self._parent(path)
            down = self._down_now()
            if not down:
                self._raise_planned("unlink")
            self._change_names(NameChange(directory, (directory, name, node), None), down)

    def remove_directory(self, path: str) -> None:
        """As `RealDisk.remove_directory`."""
        with self._lock:
            self._check_up(self._epoch)
            node = self._directory(path)
            if node.entries:
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
            directory, name = self._parent(path)
            down = self._down_now()
            if not down:
                self._raise_planned("unlink")
            self._change_names(NameChange(directory, (directory, name, node), None), down)

    def list(self, directory: str) -> list[str]:
        with self._lock:
            self._check_up(self._epoch)
            return sorted(self._directory(directory).entries)

    def make_directory(self, path: str) -> None:
        with self._lock:
            self._check_up(self._epoch)
            here = self._root
            for name in _parts(path):
                node = here.entries.get(name)
                if node is None:
                    node = Directory()
                    down = self._down_now()
                    if not down:
                        self._raise_planned("make_directory")
                    self._change_names(NameChange(here, None, (here, name, node)), down)
                if isinstance(node, Inode):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
                here = node

    def sync_directory(self, path: str) -> None:
        with self._lock:
            self._check_up(self._epoch)
            directory = self._directory(path)
            if self._down_now():
                self._go_down()
            self._raise_planned("sync_directory")
            rest = []
            for change in self._names:
                if change.home is directory:
                    change.persist()
                else:
                    rest.append(change)
            self._names = rest

    def free_bytes(self) -> int:
        with self._lock:
            self._check_up(self._epoch)
            return max(0, self.capacity_bytes - self._used)

    # --- inside; the lock is held ---

    def _check_up(self, epoch: int) -> None:
        if self._down or epoch != self._epoch:
            raise SimulatedCrash

    def _down_now(self) -> bool:
        """Is the operation that starts now the one in which the machine goes down? Counts nothing."""
        return self._down_at is not None and self.operations + 1 >= self._down_at[0]

    def _go_down(self) -> NoReturn:
        assert self._down_at is not None
        self.operations += 1
        if self._down_at[1]:
            self.crash()
        else:
            self.kill()
        raise SimulatedCrash

    def _planned(self, operation: Operation, *, count: bool = True) -> int:
        """Count the operation; the errno of the fault planned for it, or 0."""
        if count:
            self.operations += 1
        for fault in self._faults:
            if fault.operation == operation and self.operations >= fault.at:
                fault.times -= 1
                if not fault.times:
                    self._faults.remove(fault)
                return fault.errno
        return 0

    def _raise_planned(self, operation: Operation, *, count: bool = True) -> None:
        fault = self._planned(operation, count=count and operation != "pread")
        if fault:
            self._fail(fault)

    def _fail(self, errno_: int) -> NoReturn:
        raise OSError(errno_, os.strerror(errno_))

    def _room(self, inode: Inode, size: int) -> int:
        """The largest size up to `size` that the file can have."""
        return min(size, max(len(inode.data), len(inode.data) + self.capacity_bytes - self._used))

    def _resize(self, inode: Inode, size: int) -> None:
        if inode.links:
            self._used += size - len(inode.data)
        inode.resize(size)

    def _write(self, inode: Inode, content: bytes, offset: int) -> None:
        if content:
            if offset + len(content) > len(inode.data):
                self._resize(inode, offset + len(content))
            inode.write(content, offset)

    def _lose_size(self, inode: Inode) -> None:
        # The cached size outlives a failed sync; make the durable one catch up with zeros, so that
        # the next sync, which has nothing pending to say about it, leaves both images equal in size.
        resize_image(inode.durable, len(inode.data))

    def _change_names(self, change: NameChange, down: bool) -> None:
        if down and self._rng.random() < 0.5:
            self._go_down()
        if change.removed is not None:
            directory, name, node = change.removed
            del directory.entries[name]
            if change.added is None:
                self._unlinked(node)
        if change.added is not None:
            directory, name, node = change.added
            replaced = directory.entries.get(name)
            if replaced is not None:
                self._unlinked(replaced)
            directory.entries[name] = node
            if isinstance(node, Inode):
                node.links, node.name = 1, name
        self._names.append(change)
        if down:
            self._go_down()

    def _unlinked(self, node: Inode | Directory) -> None:
        if isinstance(node, Inode) and node.links:
            node.links = 0
            self._used -= len(node.data)

    def _lose_unsynced(self) -> None:
        survive = self._rng.choice((0.0, 1.0, 0.5, self._rng.random()))
        for change in self._names:
            if self._rng.random() < survive:
                change.persist()
        self._names.clear()
        self._used = 0
        directories = [self._root]
        for directory in directories:
            directory.entries = dict(directory.durable)
            for node in directory.entries.values():
                if isinstance(node, Directory):
                    directories.append(node)
                else:
                    node.keep_some(self._rng)
                    node.data = bytearray(node.durable)
                    node.links = 1
                    self._used += len(node.data)

    def _parent(self, path: str) -> tuple[Directory, str]:
        parts = _parts(path)
        assert parts, path
        return self._directory("/".join(parts[:-1])), parts[-1]

    def _directory(self, path: str) -> Directory:
        here: Directory = self._root
        for name in _parts(path):
            node = here.entries.get(name)
            if node is None:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            if isinstance(node, Inode):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
            here = node
        return here

    def _file(self, path: str) -> Inode:
        directory, name = self._parent(path)
        node = directory.entries.get(name)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if isinstance(node, Directory):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        return node


def _parts(path: str) -> list[str]:
    parts = path.split("/")
    assert path[:1] != "/", path
    assert ".." not in parts, path
    return [part for part in parts if part]
