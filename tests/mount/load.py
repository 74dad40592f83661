"""A worker that changes a mounted tree at random and tells beforehand and afterwards what it did.

    python -m tests.mount.load JOB       (a pickled `Job`)

Belongs here: choosing operations, doing them with system calls and by the command line, the journal.
The journal is a file outside the mount, one JSON line each: ["start", operation], then ["done"], or
["lost"] if the daemon went away, or ["failed", text]. The worker ends at the first that is not done.
"""

import ctypes
import errno
import json
import os
import pickle
import random
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from aspenfs import errors
from aspenfs.cli.client import Client
from aspenfs.cli.output import EXIT_UNREACHABLE
from tests.mount.load_model import Model, Operation, Seen, pattern

GONE: Final = frozenset({errno.ENOTCONN, errno.ECONNABORTED})
FILES_MAX: Final = 24  # in each tree of a worker
FILE_BYTES_MAX: Final = 3 << 20
VALUE_BYTES_MAX: Final = 1 << 18
HELD_MAX: Final = 8
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_libc = ctypes.CDLL(None, use_errno=True)


class Job(NamedTuple):
    number: int
    seed: int
    model: Model
    mountpoint: str
    state: str
    aspen: str
    journal: str
    stop: str  # the worker ends when this file is there


class _OnceClient(Client):
    """Does not ask again: what a killed daemon has not answered is unknown."""

    def _reconnect(self, deadline: float | None) -> NoReturn:
        raise errors.Unreachable("the daemon has gone")


class Worker:
    def __init__(self, job: Job) -> None:
        self.job = job
        self.model = job.model
        self.rng = random.Random(job.seed)
        self.journal = os.open(job.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.client = _OnceClient(f"{job.state}/ctl.sock")
        self.held: list[int] = []  # descriptors of files without a name
        self.serial = 0

    # --- the journal ---

    def run(self) -> None:
        os.chdir(self.job.mountpoint)
        os.umask(0o022)
        while not os.path.exists(self.job.stop):
            for operation in self.choose():
                self._tell("start", operation)
                try:
                    self.perform(operation)
                except OSError as error:
                    if error.errno in GONE:
                        self._tell("lost")
                    else:
                        self._tell("failed", f"{operation}: {error}")
                    return
                except errors.Unreachable:
                    self._tell("lost")
                    return
                except Exception as error:
                    self._tell("failed", f"{operation}: {error!r}")
                    return
                self.model.apply(operation)
                self._tell("done")

    def _tell(self, *words: object) -> None:
        os.write(self.journal, json.dumps(words).encode() + b"\n")

    # --- choosing ---

    def choose(self) -> Iterator[Operation]:
        """One operation, or a few that programs do in a row."""
        tree = "files" if self.rng.random() < 0.7 else "kv"
        own = f"{tree}/w{self.job.number}"
        if own not in self.model.names:
            yield ["mkdir", own]
            return
        files = sorted(self.model.files(tree + "/"))
        if len(files) < 3:
            yield from self._save(tree, self._fresh(own))
        elif len(files) > FILES_MAX:
            yield ["unlink", self.rng.choice(files)]
        else:
            choices = self._posix if tree == "files" else self._kv
            yield from choices(own, files)

    def _fresh(self, own: str) -> str:
        """A name that is free, in a directory of this worker's or in one that all workers share."""
        self.serial += 1
        name = f"w{self.job.number}-{self.job.seed % 100000}-{self.serial}"
        tree = own.split("/")[0]
        directories = [*sorted(self.model.directories(tree + "/")), tree + "/shared"]
        return f"{self.rng.choice(directories)}/{name}"

    def _size(self, most: int) -> int:
        draw = self.rng.random()
        limit = 300 if draw < 0.4 else 9000 if draw < 0.65 else 70_000 if draw < 0.9 else most
        return self.rng.randint(1, min(limit, most))

    def _seed(self) -> int:
        return self.rng.getrandbits(32)

    def _save(self, tree: str, target: str) -> Iterator[Operation]:
        """As editors do: a new file, written, synced, moved over the old one."""
        fresh = self._fresh(f"{tree}/w{self.job.number}")
        most = FILE_BYTES_MAX if tree == "files" else VALUE_BYTES_MAX
        yield ["create", fresh]
        yield ["write", fresh, 0, self._seed(), self._size(most)]
        if self.rng.random() < 0.5:
            yield ["sync", fresh]
        yield ["rename", fresh, target]

    def _posix(self, own: str, files: list[str]) -> Iterator[Operation]:
        path = self.rng.choice(files)
        size = len(self.model.file(path).data)
        match self.rng.randrange(16):
            case 0 | 1:
                yield from self._save("files", path)
            case 2 | 3 | 4:
                offset = self.rng.randint(0, min(size + 5000, FILE_BYTES_MAX))
                yield ["write", path, offset, self._seed(), self._size(1 << 20)]
            case 5 | 6:
                yield ["append", path, self._seed(), self._size(20_000)]
            case 7:
                yield ["truncate", path, self.rng.choice([0, self.rng.randint(0, size), size + 10_000])]
            case 8:
                yield ["unlink", path]
            case 9:
                yield ["unlink_open", path]
            case 10:
                yield ["link", path, self._fresh(own)]
            case 11:
                yield ["rename", path, self.rng.choice([self._fresh(own), self.rng.choice(files)])]
            case 12:
                yield ["exchange", path, self.rng.choice(files)]
            case 13:
                yield from self._around_directories(own)
            case 14:
                yield ["chmod", path, self.rng.choice([0o600, 0o644, 0o755, 0o711])]
                yield ["setxattr", path, f"user.{self.rng.randrange(3)}", self._seed(), self._size(5000)]
            case _:
                yield ["sync", path]

    def _around_directories(self, own: str) -> Iterator[Operation]:
        directories = [path for path in sorted(self.model.directories("files/")) if path != own]
        if len(directories) < 6:
            parent = self.rng.choice([own, *directories])
            yield ["mkdir", f"{parent}/w{self.job.number}-d{self._seed() % 1000000}"]
            return
        path = self.rng.choice(directories)
        if self.model.is_empty(path):
            yield ["rmdir", path]
        elif self.rng.random() < 0.7:
            parents = [other for other in (own, *directories) if not f"{other}/".startswith(f"{path}/")]
            parent = self.rng.choice(parents)
            yield ["rename", path, f"{parent}/w{self.job.number}-d{self._seed() % 1000000}"]
        else:
            yield ["symlink", path, self._fresh(own)]
            links = [p for p, node in self.model.names.items() if type(node).__name__ == "Symlink"]
            for link in sorted(links)[5:]:
                yield ["unlink", link]

    def _kv(self, own: str, files: list[str]) -> Iterator[Operation]:
        path = self.rng.choice(files)
        size = len(self.model.file(path).data)
        match self.rng.randrange(8):
            case 0:
                yield from self._save("kv", path)
            case 1 | 2:
                yield ["write", path, self.rng.randint(0, size), self._seed(), self._size(9000)]
            case 3:
                if size < VALUE_BYTES_MAX:
                    yield ["append", path, self._seed(), self._size(3000)]
            case 4:
                yield ["unlink", path]
            case 5:
                yield ["truncate", path, self.rng.choice([0, self.rng.randint(0, size)])]
            case 6 if self.rng.random() < 0.2:
                yield ["put", self._fresh(own), self._seed(), self._size(9000)]
            case _:
                puts = [[self._fresh(own), self._seed(), self._size(9000)] for _ in range(3)]
                yield ["txn", puts, [path] if self.rng.random() < 0.5 else []]

    # --- doing ---

    def perform(self, operation: Operation) -> None:
        kind, *arguments = operation
        getattr(self, "_do_" + kind)(*arguments)

    def _do_mkdir(self, path: str) -> None:
        os.mkdir(path)

    def _do_rmdir(self, path: str) -> None:
        os.rmdir(path)

    def _do_create(self, path: str) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))

    def _do_write(self, path: str, offset: int, seed: int, size: int) -> None:
        self._write_to(path, 0, pattern(seed, size), offset)

    def _do_append(self, path: str, seed: int, size: int) -> None:
        self._write_to(path, os.O_APPEND, pattern(seed, size), None)

    @staticmethod
    def _write_to(path: str, flags: int, data: bytes, offset: int | None) -> None:
        descriptor = os.open(path, os.O_WRONLY | flags)
        try:
            done = os.write(descriptor, data) if offset is None else os.pwrite(descriptor, data, offset)
            if done < len(data):
                # Right if the daemon died between two of its requests: then this fails too.
                os.write(descriptor, data[done:])
                raise AssertionError("a short write")
        finally:
            os.close(descriptor)

    def _do_truncate(self, path: str, size: int) -> None:
        if size:
            os.truncate(path, size)
        else:
            os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))

    def _do_rename(self, old: str, new: str) -> None:
        os.rename(old, new)

    def _do_exchange(self, one: str, other: str) -> None:
        if _libc.renameat2(_AT_FDCWD, one.encode(), _AT_FDCWD, other.encode(), _RENAME_EXCHANGE):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def _do_unlink(self, path: str) -> None:
        os.unlink(path)

    def _do_unlink_open(self, path: str) -> None:
        """The file lives on without a name until the worker closes it, or dies with the daemon."""
        self.held.append(os.open(path, os.O_RDWR))
        os.unlink(path)
        if len(self.held) > HELD_MAX:
            os.close(self.held.pop(0))

    def _do_link(self, old: str, new: str) -> None:
        os.link(old, new)

    def _do_symlink(self, target: str, path: str) -> None:
        os.symlink(target, path)

    def _do_chmod(self, path: str, mode: int) -> None:
        os.chmod(path, mode)

    def _do_setxattr(self, path: str, name: str, seed: int, size: int) -> None:
        os.setxattr(path, name, pattern(seed, size))

    def _do_sync(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _do_txn(self, puts: list[list[object]], deletes: list[str]) -> None:
        then = [{"op": "put", "key": key(path), "value": pattern(int(str(seed)), int(str(size)))}
                for path, seed, size in puts]  # fmt: skip
        self.client.txn([], [*then, *({"op": "delete", "key": key(path)} for path in deletes)])

    def _do_put(self, path: str, seed: int, size: int) -> None:
        """The command asks again by itself when the daemon is back; then it is done once all the same."""
        done = subprocess.run(
            [self.job.aspen, "--state-dir", self.job.state, "kv", "put", key(path).decode(), "-"],
            input=pattern(seed, size),
            capture_output=True,
            timeout=60,
            check=False,
        )
        if done.returncode == EXIT_UNREACHABLE:
            raise errors.Unreachable(done.stderr.decode())
        assert done.returncode == 0, done.stderr


def key(path: object) -> bytes:
    return str(path).removeprefix("kv/").encode()


def look(mountpoint: Path) -> dict[str, Seen]:
    """Everything in files/ and kv/ of a mount, but for the directories that all workers share."""
    found: dict[str, Seen] = {}
    first: dict[int, str] = {}
    pending = ["files", "kv"]
    while pending:
        directory = pending.pop()
        for name in os.listdir(mountpoint / directory):
            path = f"{directory}/{name}"
            status = os.lstat(mountpoint / path)
            if stat.S_ISDIR(status.st_mode):
                pending.append(path)
            if name not in ("shared", "lost+found"):
                found[path] = _seen(mountpoint / path, path, status)
    for path in sorted(found):
        inode = os.lstat(mountpoint / path).st_ino
        found[path] = found[path]._replace(same_as=first.setdefault(inode, path))
    return found


def _seen(real: Path, path: str, status: os.stat_result) -> Seen:
    posix = path.startswith("files/")
    if stat.S_ISDIR(status.st_mode):
        return Seen("directory", b"", 0, status.st_nlink if posix else 0, (), "")
    if stat.S_ISLNK(status.st_mode):
        return Seen("link", os.fsencode(os.readlink(real)), 0, 0, (), "")
    data = real.read_bytes()
    assert len(data) == status.st_size, f"{path}: st_size {status.st_size}, but {len(data)} bytes"
    if not posix:
        return Seen("file", data, 0, 0, (), "")
    attributes = tuple(sorted((name, os.getxattr(real, name)) for name in os.listxattr(real)))
    return Seen("file", data, stat.S_IMODE(status.st_mode), status.st_nlink, attributes, "")


if __name__ == "__main__":
    Worker(pickle.loads(Path(sys.argv[1]).read_bytes())).run()
