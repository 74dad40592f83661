"""The applied state of this node in LMDB: what the log says up to the applied index, in key order.

Belongs here: the environment, the snapshot that readers see, the one transaction that writes a
batch with its applied index, and offline verification. Not here: how keys become LMDB keys
(`longkeys.py`), records as bytes (`kv/records.py`), when to apply and what to trim (`applier.py`).

Durability (docs/design/state-store.md): the environment is opened with metasync=False, so `apply`
syncs the pages of its transaction and leaves the meta page that points to them to the page cache.
Power loss may therefore undo the newest transaction, never more and never half; `sync` makes it
durable. `durable_index` is what survives in any case, and the only index below which the log may go.

Threads: reads and `refresh` belong to one thread (the loop's), `apply` and `sync` to another (LMDB
write transactions are bound to the thread that began them), a snapshot to whoever asked for it.
One process, one environment a file.
"""

import errno
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import lmdb

from aspenfs.errors import Closed, Corrupt, InvalidArgument, NoSpace, StorageError, SyncFailed
from aspenfs.kv import records
from aspenfs.kv.rows import Row
from aspenfs.kv.types import Record
from aspenfs.limits import MAPPED_BYTES_MAX, MIB, STORE_KEY_BYTES_MAX
from aspenfs.runtime import longkeys
from aspenfs.runtime.disk import sync_directory
from aspenfs.runtime.longkeys import CHUNK, Databases
from aspenfs.runtime.mapped import MappedFile, mapped_bytes

FORMAT = b"\x01"
MAP_BYTES = 1 << 40  # address space, not disk: the file is as large as what is in it
SLICE_KEYS = 256  # written by `apply` in one go: a third of a millisecond


class Pace(Protocol):
    """How `StateDb.apply` gets along with others who need the interpreter's lock: `LoopTurns`."""

    def begin(self) -> None:
        """Before each slice."""

    def end(self) -> None:
        """Before what waits for the disk."""

# What `apply` is handed as meta beside the applied index (docs/design/state-store.md).
TERM = "term"  # of the entry at the applied index, 8 bytes, big-endian
CONFIGURATION = "configuration"  # as of the applied index

_FORMAT_KEY, _APPLIED_KEY = b"format", b"applied"
_ADVICE = "restore the state directory from another node or a backup; the log alone may not reach back"

Items = Sequence[tuple[bytes, Record | None]]


class Summary(NamedTuple):
    """What `verify` has walked over."""

    applied_index: int
    keys: int
    value_bytes: int  # records as stored
    nodes: int  # of the trie of long keys


class StateDb:
    """The ordered map of the state machine, as of the last `refresh`; a `kv.machine.State`."""

    __slots__ = (
        "_databases", "_env", "_environment", "_free_bytes", "_generation", "_get", "_in_doubt",
        "_last_loaded", "_path", "_root", "_txn", "_written_index", "applied_index", "durable_index",
    )  # fmt: skip

    def __init__(self, path: str | os.PathLike[str], *, map_bytes: int = MAP_BYTES,
                 readonly: bool = False, syncing: bool = True,
                 free_bytes: Callable[[], int] | None = None) -> None:
        """Opens the environment in the directory `path`, made if missing (not if `readonly`).

        `free_bytes` tells what may still be written; by default the file system is asked. Without
        `syncing` nothing is durable before `sync`, and loss of power before it may leave anything: for
        a state that is being made (`load`).
        """
        self._path = os.fspath(path)
        self._free_bytes = free_bytes or self._free_bytes_of_file_system
        new = not os.path.exists(os.path.join(self._path, "data.mdb"))
        if new and readonly:
            raise Corrupt(self._path, 0, "there is no state here", "is this a state directory?")
        try:
            self._open(map_bytes, readonly, new, syncing)
        except lmdb.Error as error:
            raise _translated(error, self._path) from error

    def _open(self, map_bytes: int, readonly: bool, new: bool, syncing: bool) -> None:
        if not readonly:
            os.makedirs(self._path, mode=0o700, exist_ok=True)
        self._env = lmdb.Environment(
            self._path, map_size=map_bytes, metasync=False, sync=syncing, mode=0o600, max_dbs=3,
            max_readers=16, readonly=readonly, lock=not readonly, create=not readonly,
            lib_version=0)  # fmt: skip
        open_db = self._env.open_db
        self._databases = Databases(open_db(b"root"), open_db(b"nodes"), open_db(b"meta"))
        self._root = self._databases.root
        self._environment = _Environment(self._env, self._databases)
        if new:
            with self._env.begin(write=True) as txn:
                txn.put(_FORMAT_KEY, FORMAT, db=self._databases.meta)
            self._env.sync(True)
            sync_directory(self._path)
            sync_directory(os.path.dirname(os.path.abspath(self._path)))
        self._generation = 0
        self._in_doubt = False
        self._last_loaded = b""
        self._begin()
        stored = self.meta(_FORMAT_KEY.decode())
        if stored != FORMAT:
            raise Corrupt(self._path, 0, f"state format {stored!r} is not {FORMAT!r}",
                          "use the version of aspenfs that wrote it")  # fmt: skip
        # What was read may come from the page cache of a process that died before its sync.
        self._written_index = self.applied_index
        self.durable_index = 0
        if not readonly:
            self.sync()

    # --- reading; the loop's thread ---

    def _begin(self) -> None:
        self._txn = self._env.begin(db=self._root)
        self._get = self._txn.get
        self.applied_index = int.from_bytes(
            self._txn.get(_APPLIED_KEY, b"", db=self._databases.meta), "big")  # fmt: skip

    def refresh(self) -> None:
        """Moves readers to the newest applied batch. Walks that are under way go on from their key."""
        self._txn.abort()
        self._generation += 1
        self._begin()

    def get(self, key: bytes) -> Record | None:
        raw = self._get(key) if 0 < len(key) < CHUNK else self._get_long(key)
        return None if raw is None else records.unpack(raw)

    def _get_long(self, key: bytes) -> bytes | None:
        return longkeys.get(self._txn, self._databases, key) if key else None

    def items(self, start: bytes, end: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, Record]]:
        """Keys in [start, end) in byte order, `end` b'' = no end.

        Lazily; no snapshot is pinned: after a `refresh` the walk goes on behind the key it gave
        last, in the new state.
        """
        low, high = start, end or None
        walk = longkeys.backward if reverse else longkeys.forward
        unpack = records.unpack
        while True:
            generation = self._generation
            for key, raw in walk(self._txn, self._databases, low, high):
                yield key, unpack(raw)
                if generation != self._generation:
                    if reverse:
                        high = key
                    else:
                        low = key + b"\0"
                    break
            else:
                return

    def meta(self, name: str) -> bytes | None:
        """What `apply` was handed under `name`."""
        return self._txn.get(name.encode(), db=self._databases.meta)

    # --- writing; the applier's thread ---

    def apply(self, items: Items, applied_index: int, meta: Mapping[str, bytes] | None = None, *,
              pace: Pace | None = None) -> None:
        """Writes `items` (None deletes) with the applied index in one transaction: all or nothing.

        `pace` is for a thread beside the loop: every put needs the interpreter's lock. NoSpace changes
        nothing and may be retried; SyncFailed is fatal.
        """
        assert applied_index >= self._written_index
        need = record_bytes = 0
        try:
            with self._env.begin(write=True, db=self._root) as txn:
                for at in range(0, len(items), SLICE_KEYS):
                    if pace is not None:
                        pace.begin()
                    record_bytes += self._write(txn, items[at : at + SLICE_KEYS])
                database = self._databases.meta
                for name, value in (meta or {}).items():
                    txn.put(name.encode(), value, db=database)
                txn.put(_APPLIED_KEY, applied_index.to_bytes(8, "big"), db=database)
                need = self._bytes_to_write(txn, len(items), record_bytes)
                self._check_room(need)
                if pace is not None:
                    pace.end()  # what follows waits for the disk
        except lmdb.Error as error:
            if error.code == errno.EIO:
                # LMDB calls a write that a full disk cut short EIO, as it does a real one. Should
                # it have been a sync after all, the meta page before may be lost: trust a new one.
                self._in_doubt = True
                self._check_room(need)
            raise _translated(error, self._path) from error
        before, self._written_index = self._written_index, applied_index
        if self._in_doubt:
            self.sync()
        else:
            # This commit has synced the file, and with it the meta page of the one before.
            self.durable_index = before

    def _bytes_to_write(self, txn: longkeys.Transaction, keys: int, record_bytes: int) -> int:
        """At most so much goes to the file at commit: each path copied, and the records."""
        stat = txn.stat(self._root)
        pages = min(stat["branch_pages"] + stat["leaf_pages"], keys * (stat["depth"] + 1))
        return stat["psize"] * (pages + 16) + 2 * record_bytes

    def _check_room(self, need: int) -> None:
        free = self._free_bytes()
        if free < need:
            raise NoSpace(f"{self._path}: {need} bytes to write, {free} free")

    def _free_bytes_of_file_system(self) -> int:
        status = os.statvfs(self._path)
        return status.f_bavail * status.f_frsize

    def _write(self, txn: longkeys.Transaction, items: Items) -> int:
        """Into the open transaction; the bytes of the records."""
        put, delete, pack = txn.put, txn.delete, records.pack
        size = 0
        for key, record in items:
            if 0 < len(key) < CHUNK:
                if record is None:
                    delete(key)
                else:
                    raw = pack(record)
                    size += len(raw)
                    put(key, raw)
            elif not 0 < len(key) <= STORE_KEY_BYTES_MAX:
                raise InvalidArgument(f"a key of the store has 1..{STORE_KEY_BYTES_MAX} bytes: {len(key)}")
            elif record is None:
                longkeys.delete(txn, self._databases, key)
            else:
                raw = pack(record)
                size += len(raw) + len(key)
                longkeys.put(txn, self._databases, key, raw)
        return size

    def load(self, rows: Iterable[Row]) -> int:
        """Adds rows in one transaction, all of them behind those that are there, and their number.

        For a state that is being made: the applied index stays, for `apply` to set in the end. The file
        gets as small as it can be. InvalidArgument: a row out of order. NoSpace, StorageError.
        """
        size = count = 0
        last = self._last_loaded
        try:
            with self._env.begin(write=True, db=self._root) as txn:
                for key, raw in rows:
                    if not 0 < len(key) <= STORE_KEY_BYTES_MAX:
                        raise InvalidArgument(f"a key of {len(key)} bytes, at most {STORE_KEY_BYTES_MAX}")
                    if key <= last:
                        raise InvalidArgument(f"key {key[:80].hex()} does not come behind the one before")
                    last = key
                    if len(key) < CHUNK:
                        txn.put(key, raw, append=True)
                    else:
                        longkeys.put(txn, self._databases, key, raw)
                    size += len(key) + len(raw)
                    count += 1
                self._check_room(2 * size + MIB)
        except lmdb.Error as error:
            if error.code == errno.EIO:
                self._check_room(2 * size + MIB)  # as in `apply`
            raise _translated(error, self._path) from error
        self._last_loaded = last
        return count

    def sync(self) -> int:
        """Makes all that was applied durable; the index up to which that is so."""
        written = self._written_index
        try:
            self._env.sync(True)
        except lmdb.Error as error:
            raise SyncFailed(f"{self._path}: {error}") from error
        self.durable_index, self._in_doubt = written, False
        return written

    # --- looking after it ---

    def give_back_pages(self) -> None:
        """Keeps what this process holds of the map small; cheap when there is nothing to do."""
        if mapped_bytes() > MAPPED_BYTES_MAX:
            # Looked up anew: LMDB may have mapped the file elsewhere since.
            MappedFile(os.path.join(self._path, "data.mdb")).give_back()

    def size_bytes(self) -> int:
        """Bytes of the file that are in use or free for reuse; it never shrinks."""
        return (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]

    def copy_to(self, path: str | os.PathLike[str]) -> None:
        """What is applied, in a new environment in the directory `path`, made now and not yet durable;
        as small as it can be. NoSpace, StorageError."""
        os.mkdir(path, mode=0o700)
        try:
            self._env.copy(os.fspath(path), compact=True)
        except lmdb.Error as error:
            raise _translated(error, self._path) from error

    @contextmanager
    def snapshot(self) -> Iterator["Snapshot"]:
        """What is applied now, standing still, for a walk in any thread. It pins pages: end it soon.

        It stays what it is when the state goes on as another one (`adopt`). Closed.
        """
        environment = self._environment
        while not environment.take():
            if environment is self._environment:
                raise Closed(f"{self._path}: the state is closed")
            environment = self._environment  # another one was adopted in between
        try:
            with environment.lmdb.begin(db=environment.databases.root) as txn:
                yield Snapshot(txn, environment.databases)
        finally:
            environment.drop()

    def verify(self) -> Summary:
        """Walks over everything in a snapshot of its own; Corrupt names the first thing that is wrong.

        Checks that each record decodes, that each link leads to a node with entries which nobody
        else links, and that no node is without a link. Callable from any thread.
        """
        try:
            with self.snapshot() as snapshot:
                return self._verified(snapshot)
        except lmdb.Error as error:
            raise _translated(error, self._path) from error

    def _verified(self, snapshot: "Snapshot") -> Summary:
        txn, databases = snapshot.txn, snapshot.databases
        keys = value_bytes = 0
        linked: set[bytes] = set()
        entered: set[bytes] = set()
        for database, skip in ((databases.root, 0), (databases.nodes, longkeys.NODE_ID_BYTES)):
            with txn.cursor(database) as cursor:
                for key, raw in cursor.iternext():
                    if skip:
                        entered.add(key[:skip])
                    if len(key) - skip == CHUNK:
                        if len(raw) != longkeys.NODE_ID_BYTES or raw in linked:
                            raise self._corrupt(key, "a link to a node that is not one's own")
                        linked.add(raw)
                        continue
                    try:
                        records.unpack(raw)
                    except Corrupt as error:
                        raise self._corrupt(key, f"the record does not decode ({error})") from error
                    keys += 1
                    value_bytes += len(raw)
        if linked != entered:
            node = min(linked ^ entered)
            cause = "a link without its node" if node in linked else "a node without a link"
            raise self._corrupt(node, cause)
        if linked and int.from_bytes(max(linked), "big") > longkeys.last_node(txn, databases.meta):
            raise self._corrupt(max(linked), "a node newer than the newest one")
        return Summary(snapshot.applied_index, keys, value_bytes, len(linked))

    def _corrupt(self, key: bytes, cause: str) -> Corrupt:
        return Corrupt(os.path.join(self._path, "data.mdb"), 0, f"key {key[:80].hex()}: {cause}", _ADVICE)

    def adopt(self, newer: "StateDb") -> None:
        """Goes on as `newer`, which is of no use afterwards: a snapshot from another node has taken this
        state's place. The loop's thread; nothing may be applied meanwhile. Walks go on from their key
        in the new state. The files of the old one are closed once no snapshot of it is open.
        """
        self._txn.abort()
        self._environment.retire()
        self._env, self._databases, self._root = newer._env, newer._databases, newer._root
        self._environment, self._path = newer._environment, newer._path
        self._written_index, self._in_doubt = newer._written_index, newer._in_doubt
        self.durable_index = newer.durable_index
        newer._txn.abort()
        self._generation += 1
        self._begin()

    def close(self) -> None:
        """Ends reads; does not sync. The applier's thread must be done. Idempotent.

        The files are closed once no snapshot is open any more.
        """
        self._txn.abort()
        self._generation += 1
        self._environment.retire()


class _Environment:
    """An LMDB environment that stays open until it is retired and no snapshot needs it. Thread-safe."""

    __slots__ = ("_lock", "_retired", "_snapshots", "databases", "lmdb")

    def __init__(self, environment: lmdb.Environment, databases: Databases) -> None:
        self.lmdb, self.databases = environment, databases
        self._lock = threading.Lock()
        self._snapshots = 0
        self._retired = False

    def take(self) -> bool:
        """For one snapshot more; False once it is retired."""
        with self._lock:
            if not self._retired:
                self._snapshots += 1
            return not self._retired

    def drop(self) -> None:
        with self._lock:
            self._snapshots -= 1
            if self._retired and not self._snapshots:
                self.lmdb.close()

    def retire(self) -> None:
        with self._lock:
            self._retired = True
            if not self._snapshots:
                self.lmdb.close()


class Snapshot:
    """The applied state at one moment. To be used by one thread at a time."""

    __slots__ = ("databases", "txn")

    def __init__(self, txn: longkeys.Transaction, databases: Databases) -> None:
        self.txn, self.databases = txn, databases

    @property
    def applied_index(self) -> int:
        return int.from_bytes(self.txn.get(_APPLIED_KEY, b"", db=self.databases.meta), "big")

    @property
    def term(self) -> int:
        """Of the entry at the applied index; 0 in an empty state."""
        raw = self.meta(TERM)
        # A node of the releases that knew no other node wrote none: its log has term 1 throughout.
        return int.from_bytes(raw, "big") if raw is not None else min(1, self.applied_index)

    def meta(self, name: str) -> bytes | None:
        """As `StateDb.meta`."""
        return self.txn.get(name.encode(), db=self.databases.meta)

    def get(self, key: bytes) -> Record | None:
        raw = self.txn.get(key) if 0 < len(key) < CHUNK else longkeys.get(self.txn, self.databases, key)
        return None if raw is None else records.unpack(raw)

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, Record]]:
        for key, raw in longkeys.forward(self.txn, self.databases, start, end or None):
            yield key, records.unpack(raw)

    def rows(self, after: bytes = b"") -> Iterator[Row]:
        """Keys above `after` with their packed records, in order."""
        return longkeys.forward(self.txn, self.databases, after + b"\0" if after else b"", None)

    def size(self) -> tuple[int, int]:
        """(rows, bytes), both about: parts of long keys count as rows, space within pages as bytes."""
        entries = pages = 0
        for database in (self.databases.root, self.databases.nodes):
            stat = self.txn.stat(database)
            entries += stat["entries"]
            pages += stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        return entries, pages * stat["psize"]


def _translated(error: lmdb.Error, path: str) -> Exception:
    """LMDB's error as one of ours."""
    code = getattr(error, "code", 0)
    if isinstance(error, lmdb.MapFullError) or code in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{path}: {error}")
    if isinstance(error, (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError,
                          lmdb.VersionMismatchError)):  # fmt: skip
        return Corrupt(os.path.join(path, "data.mdb"), 0, str(error), _ADVICE)
    if isinstance(error, (lmdb.PanicError, lmdb.DiskError)) or code == errno.EIO:
        return SyncFailed(f"{path}: {error}")
    return StorageError(f"{path}: {error}")
