"""Clients of one mount in a chaos run, each with a history of what it called and was told.

Belongs here: what all clients do alike, and those of kv/, which also watch. Not here: those of files/
(`chaos_files.py`), the process in which they run (`chaos_load.py`).

A call that failed counts as unknown unless it cannot have taken place. What is called lives for one
*epoch*, some seconds, which all clients take from the clock: short histories of few names are quick to
judge. Directories are held open: a path could lead to the empty directory below a mount that is gone.
"""

import contextlib
import os
import random
import threading
import time
from abc import ABC, abstractmethod
from typing import Any, Final, NamedTuple, NoReturn

from aspenfs import errors
from aspenfs.cli.client import Client
from aspenfs.kv.types import prefix_end
from aspenfs.sim.history import Call, History

KEYS: Final = 4  # of an epoch
PREFIX: Final = b"chaos/"
THE_END: Final = b"chaos/end"  # written when nothing else will be
_CALL_S: Final = 45.0  # a call on the control socket; the daemon gives up long before
_READ_BYTES: Final = 1 << 20  # more than any file here has: two calls could see two contents
_PAUSE_S: Final = 0.01  # between calls of a client: three daemons share the processors with this


class Job(NamedTuple):
    number: int  # of the node
    seed: int
    mountpoint: str
    socket: str  # the control socket
    output: str  # histories: OUTPUT-NAME
    began: float  # monotonic: when epoch 0 did
    epoch_s: float


class _OnceClient(Client):
    """Does not ask again: what was not answered is unknown."""

    def _reconnect(self, deadline: float | None) -> NoReturn:
        raise errors.Unreachable("the daemon has gone")


class Damage(Exception):
    """Something was read that nobody has written."""


class Gate:
    """Clients pass it before each call; closed, nobody is between calls."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._closed = False
        self._inside = 0

    def __enter__(self) -> None:
        with self._condition:
            self._condition.wait_for(lambda: not self._closed)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._condition:
            self._inside -= 1
            self._condition.notify_all()

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.wait_for(lambda: not self._inside)

    def open(self) -> None:
        with self._condition:
            self._closed = False
            self._condition.notify_all()


class Workload(ABC):
    """One client: a thread that makes one call after the other. Each has a history of its own."""

    name: str

    def __init__(self, job: Job, number: int, gate: Gate) -> None:
        self.job, self.gate = job, gate
        self.process = job.number * 100 + number
        self.rng = random.Random(job.seed * 1000 + self.process)
        self.history = History(time.monotonic)
        self.over = threading.Event()
        self.failure = ""
        self._written = 0
        self.thread = threading.Thread(target=self._run, daemon=True)

    def token(self) -> str:
        """A word that nobody else writes, as long as all others: see `read_whole`."""
        self._written += 1
        return f"t{self.process}-{self._written:06}"

    @property
    def epoch(self) -> int:
        return int((time.monotonic() - self.job.began) / self.job.epoch_s)

    def _run(self) -> None:
        try:
            while not self.over.is_set():
                with self.gate:
                    if not self.over.is_set():
                        self.step()
                time.sleep(_PAUSE_S * 2 * self.rng.random())
        except Exception as error:
            self.failure = f"{self.name} at node {self.job.number}: {error!r}"

    @abstractmethod
    def step(self) -> None:
        """One call, or none if the mount is not there."""

    @abstractmethod
    def read_all(self, epochs: int) -> None:
        """Reads once more whatever was written in any epoch. Raises what keeps it from that."""


class Directories:
    """Descriptors of directories below the mount that is there now, by path."""

    def __init__(self, mountpoint: str) -> None:
        self._mountpoint = mountpoint
        self._open: dict[str, int] = {}

    def get(self, path: str, *, make: bool = False) -> int | None:
        """None: it cannot be had now. `make`: and its last two parts are made if they are missing."""
        if path in self._open:
            return self._open[path]
        full = os.path.join(self._mountpoint, path)
        try:
            if make:
                # One level at a time: where nothing is mounted there is no files/, and none is made.
                for directory in (os.path.dirname(full), full):
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(directory)
            self._open[path] = os.open(full, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            time.sleep(0.05)
            return None
        return self._open[path]

    def find(self, path: str) -> int | None:
        """As `get`, of a mount that must be there: None means that there is no such directory."""
        if path not in self._open:
            os.stat(os.path.join(self._mountpoint, path.partition("/")[0]))
            try:
                found = os.open(os.path.join(self._mountpoint, path), os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                return None
            self._open[path] = found
        return self._open[path]

    def failed(self) -> None:
        """A call on one of them did: it may be of a mount that is gone."""
        for descriptor in self._open.values():
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._open.clear()
        time.sleep(0.05)


def read_whole(path: str | bytes, directory: int) -> bytes:
    """A file that others change in place, at one moment.

    A read(2) ends where the kernel believes that the file ends. While changes from elsewhere come in, that
    may be where it ended before the file was opened: the kernel drops an answer about attributes that a
    notice has overtaken. fstat(2) tells, for it gets the answer itself; then the file is read again. Of
    what changes in place and does not grow, all contents must be equally long.
    """
    while True:
        descriptor = os.open(path, os.O_RDONLY, dir_fd=directory)
        try:
            data = os.read(descriptor, _READ_BYTES)
            if len(data) == os.fstat(descriptor).st_size:
                return data
        finally:
            os.close(descriptor)


# --- kv/ by the control socket, and by the mount ---


class Keys(Workload):
    """Registers; what the control socket answers also says at which revision: `answers`."""

    name = "keys"

    def __init__(self, job: Job, number: int, gate: Gate) -> None:
        super().__init__(job, number, gate)
        self.client = _OnceClient(job.socket, timeout_s=_CALL_S)
        self.files = Directories(job.mountpoint)
        self.seen: dict[bytes, bytes | None] = {}  # what a cas may hope to find
        self.answers: list[tuple[float, float, int, bytes | None, bytes, bytes | None]] = []

    def step(self) -> None:
        key = b"%be%d/k%d" % (PREFIX, self.epoch, self.rng.randrange(KEYS))
        draw = self.rng.random()
        if draw < 0.30:
            self._attempt("read", key)
        elif draw < 0.45:
            self._read_by_mount(key)
        elif draw < 0.80:
            self._attempt("write", key, self.token().encode())
        elif draw < 0.95:
            self._attempt("cas", key, self.seen.get(key), self.token().encode())
        else:
            self._attempt("delete", key)

    def _attempt(self, name: str, key: bytes, *values: bytes | None) -> None:
        call = self.history.call(self.process, name, key, *values)
        try:
            result, revision = getattr(self, f"_{name}")(key, *values)
        except errors.AspenError:
            self.client.close()
            # Another identity: the store takes the numbers of one in order.
            self.client = _OnceClient(self.job.socket, timeout_s=_CALL_S)
            time.sleep(0.05)
            return
        self.history.returns(call, result)
        self._note(call, name, key, values, result, revision)

    def _note(self, call: Call, name: str, key: bytes, values: tuple[bytes | None, ...], result: Any,
              revision: int) -> None:  # fmt: skip
        if name == "read":
            self.seen[key] = result
            self.answers.append((call.called, call.returned, revision, None, key, result))
        elif name == "write" or (name == "cas" and result):
            self.seen[key] = values[-1]
            self.answers.append((call.called, call.returned, revision, values[-1], key, None))

    def _read(self, key: bytes) -> tuple[bytes | None, int]:
        answer = self.client.call("kv.range", start=key, end=key + b"\0")
        records = [record for item in answer.items for record in item["records"]]
        return (records[0][1] if records else None), answer.result["revision"]

    def _write(self, key: bytes, value: bytes) -> tuple[None, int]:
        done = self.client.txn([], [{"op": "put", "key": key, "value": value}]).result
        return None, done["revision"]

    def _cas(self, key: bytes, old: bytes | None, new: bytes) -> tuple[bool, int]:
        compare = (
            {"target": "absent", "key": key}
            if old is None
            else {"target": "value", "key": key, "operator": "=", "operand": old}
        )
        done = self.client.txn([compare], [{"op": "put", "key": key, "value": new}]).result
        return done["succeeded"], done["revision"]

    def _delete(self, key: bytes) -> tuple[bool, int]:
        done = self.client.txn([], [{"op": "delete", "key": key}]).result
        return bool(done["responses"][0]["count"]), done["revision"]

    def _read_by_mount(self, key: bytes) -> None:
        directory = self.files.get("kv")
        if directory is None:
            return
        call = self.history.call(self.process, "read", key)
        try:
            value: bytes | None = read_whole(key, directory)
        except FileNotFoundError:
            value = None
        except OSError:
            self.files.failed()
            return
        self.history.returns(call, value)

    def read_all(self, epochs: int) -> None:
        client = Client(self.job.socket, timeout_s=_CALL_S)
        keys = [b"%be%d/k%d" % (PREFIX, epoch, number) for epoch in range(epochs) for number in range(KEYS)]
        calls = [self.history.call(self.process, "read", key) for key in keys]
        answer = client.call("kv.range", start=PREFIX, end=prefix_end(PREFIX))
        found = {record[0]: record[1] for item in answer.items for record in item["records"]}
        for call, key in zip(calls, keys, strict=True):
            self.history.returns(call, found.get(key))
            self._note(call, "read", key, (), found.get(key), answer.result["revision"])


# --- watching ---


class Watcher:
    """Everything that happens to keys of the run, as one node tells it, through all its restarts."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.from_revision = 0
        self.upto = 0
        self.batches: list[tuple[int, list[tuple[bytes, bytes | None]]]] = []
        self.failure = ""
        self.begun = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            client = Client(self.job.socket, timeout_s=_CALL_S)
            for revision, events in client.watch(PREFIX, prefix_end(PREFIX)):
                if not events:
                    self.from_revision = revision + 1
                    self.begun.set()
                    continue
                changes = [(event.key, event.record.value if event.record else None) for event in events]
                self.batches.append((revision, changes))
                self.upto = revision
                if any(key == THE_END for key, _ in changes):
                    return
        except Exception as error:
            self.failure = f"watch at node {self.job.number}: {error!r}"
