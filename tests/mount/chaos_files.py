"""Clients of files/ in a chaos run: directory entries, whole files, one file that all append to.

Belongs here: the calls, and what their errors say of whether they took place. The rest: `chaos_clients.py`.
"""

import errno
import functools
import hashlib
import os
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Final

from aspenfs.sim.history import Call
from tests.mount.chaos_clients import Damage, Directories, Gate, Job, Workload, read_whole

NAMES: Final = 3  # of an epoch
FILES: Final = 3
FILE_BYTES_MAX: Final = 300_000


class InFiles(Workload):
    """A client of a directory of files/ that lives for an epoch."""

    letter: str

    def __init__(self, job: Job, number: int, gate: Gate) -> None:
        super().__init__(job, number, gate)
        self.directories = Directories(job.mountpoint)

    def path(self, epoch: int) -> str:
        return f"files/chaos/{self.letter}{epoch}"

    def step(self) -> None:
        epoch = self.epoch
        directory = self.directories.get(self.path(epoch), make=True)
        if directory is not None:
            self.act(directory, epoch)

    @abstractmethod
    def act(self, directory: int, epoch: int) -> None: ...

    def attempt(self, call: Call, act: Callable[[], object], *, result: object = True,
                refused: int = 0) -> None:  # fmt: skip
        """Makes a call of the history: its result is `result`, or False for the errno `refused`."""
        try:
            act()
        except OSError as error:
            if error.errno == refused:
                self.history.returns(call, False)
            else:
                self.directories.failed()
            return
        self.history.returns(call, result)

    def absent(self, name: str, path: str, result: Any) -> None:
        """Not even the directory of that path is there."""
        self.history.returns(self.history.call(self.process, name, path), result)


class Names(InFiles):
    """Directory entries. They are symbolic links, which are made in one call, and say what they are.

    What the kernel decides from two lookups is left out, for it is not one call to any network file system:
    link(2) looks its source up by itself, and rename(2) does nothing if both names led to one inode when
    it looked. Hence no hard links, and each client renames to and from a name of its own.
    """

    name = letter = "names"

    def act(self, directory: int, epoch: int) -> None:
        name, own = f"x{self.rng.randrange(NAMES)}", f"y{self.process}"
        path = f"{epoch}/{name}"
        call = functools.partial(self.history.call, self.process)
        draw = self.rng.random()
        if draw < 0.30:
            token = self.token()
            made = functools.partial(os.symlink, token, name, dir_fd=directory)
            self.attempt(call("create", path, token), made, refused=errno.EEXIST)
        elif draw < 0.45:
            unlinked = functools.partial(os.unlink, name, dir_fd=directory)
            self.attempt(call("unlink", path), unlinked, refused=errno.ENOENT)
        elif draw < 0.70:
            source, target = (name, own) if draw < 0.60 else (own, name)
            moved = functools.partial(os.rename, source, target, src_dir_fd=directory, dst_dir_fd=directory)
            self.attempt(
                call("rename", f"{epoch}/{source}", f"{epoch}/{target}"), moved, refused=errno.ENOENT
            )
        else:
            self._look(directory, path, name)

    def _look(self, directory: int, path: str, name: str) -> None:
        call = self.history.call(self.process, "lookup", path)
        try:
            found: str | None = os.readlink(name, dir_fd=directory)
        except FileNotFoundError:
            found = None
        except OSError:
            self.directories.failed()
            return
        self.history.returns(call, found)

    def read_all(self, epochs: int) -> None:
        for epoch in range(epochs):
            directory = self.directories.find(self.path(epoch))
            for number in range(NAMES):
                path = f"{epoch}/x{number}"
                if directory is None:
                    self.absent("lookup", path, None)
                else:
                    self._look(directory, path, f"x{number}")


class Files(InFiles):
    """Whole files, written as editors do: beside the old one, synced, moved over it. A register each."""

    name = letter = "files"

    def act(self, directory: int, epoch: int) -> None:
        name = f"f{self.rng.randrange(FILES)}"
        if self.rng.random() < 0.5:
            self._look(directory, epoch, name)
        else:
            self._save(directory, epoch, name)

    def _save(self, directory: int, epoch: int, name: str) -> None:
        token = self.token()
        limit = 1_000 if self.rng.random() < 0.5 else FILE_BYTES_MAX
        data = content(token, self.rng.randrange(limit))
        call = self.history.call(self.process, "write", f"{epoch}/{name}", token)
        draft = f".{token}"
        try:
            descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644, dir_fd=directory)
            try:
                if os.write(descriptor, data) != len(data):
                    raise OSError(errno.EIO, "a short write")
                if self.rng.random() < 0.5:
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError:
            self.history.refused(call)  # it has no name that counts, and never gets one
            self.directories.failed()
            return
        moved = functools.partial(os.rename, draft, name, src_dir_fd=directory, dst_dir_fd=directory)
        self.attempt(call, moved, result=None)

    def _look(self, directory: int, epoch: int, name: str) -> None:
        call = self.history.call(self.process, "read", f"{epoch}/{name}")
        try:
            descriptor = os.open(name, os.O_RDONLY, dir_fd=directory)
            with os.fdopen(descriptor, "rb", buffering=0) as file:
                data = file.readall()
        except FileNotFoundError:
            self.history.returns(call, None)
        except OSError:
            self.directories.failed()
        else:
            self.history.returns(call, token_of(data))

    def read_all(self, epochs: int) -> None:
        for epoch in range(epochs):
            directory = self.directories.find(self.path(epoch))
            for number in range(FILES):
                if directory is None:
                    self.absent("read", f"{epoch}/f{number}", None)
                else:
                    self._look(directory, epoch, f"f{number}")


class Appends(InFiles):
    """Lines appended to one file from every mount."""

    name = letter = "appends"
    _FILE = "log"

    def act(self, directory: int, epoch: int) -> None:
        if self.rng.random() < 0.3:
            self._look(directory, epoch)
            return
        token = self.token()
        call = self.history.call(self.process, "append", str(epoch), token)
        self.attempt(call, lambda: self._append(directory, token.encode() + b"\n"), result=None)

    def _append(self, directory: int, line: bytes) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        descriptor = os.open(self._FILE, flags, 0o644, dir_fd=directory)
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError(errno.EIO, "a short write")
            if self.rng.random() < 0.3:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _look(self, directory: int, epoch: int) -> None:
        call = self.history.call(self.process, "read", str(epoch))
        try:
            data = read_whole(self._FILE, directory)
        except FileNotFoundError:
            data = b""
        except OSError:
            self.directories.failed()
            return
        if data and not data.endswith(b"\n"):
            raise Damage(f"the log of epoch {epoch} ends in half a line: {data[-40:]!r}")
        self.history.returns(call, tuple(data.decode().split()))

    def read_all(self, epochs: int) -> None:
        for epoch in range(epochs):
            directory = self.directories.find(self.path(epoch))
            if directory is None:
                self.absent("read", str(epoch), ())
            else:
                self._look(directory, epoch)


def content(token: str, size: int) -> bytes:
    """Bytes that say what they are, and show it if any of them is not theirs."""
    head = f"{token} {size}\n".encode()
    return head + hashlib.shake_128(head).digest(size)


def token_of(data: bytes) -> str:
    """Damage unless it is all of some `content`."""
    head, _, _ = data.partition(b"\n")
    try:
        token, size = head.decode().split(" ")
        whole = content(token, int(size))
    except ValueError:
        raise Damage(f"a file begins with {data[:60]!r}, which nobody wrote") from None
    if data != whole:
        raise Damage(f"a file of {len(data)} bytes is not the {len(whole)} bytes of {token}")
    return token
