"""What all parts of the file system share: the store, the blobs, the clock, and new inode ids.

Concurrency rule of this package: an operation reads state, checks it, and proposes one transaction
whose compares name what it relied on. On a node that accepts alone nothing can come in between; on
others a compare fails, and the operation reads again. So nothing here takes a lock.
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, Protocol

from aspenfs import errors, limits
from aspenfs.filesystem import layout, references
from aspenfs.kv.store import Store
from aspenfs.kv.types import Compare, Operation, TxnResult, absent, add, get, merge, put
from aspenfs.kv.watch import Signal
from aspenfs.seams import Clock

ATTEMPTS: Final = 64  # at a transaction whose compares fail, before Conflict
GARBAGE_MAX: Final = 50_000  # digests remembered, some 150 bytes each


class Blobs(Protocol):
    """What the file system needs of the chunk store."""

    def put(self, data: bytes) -> bytes: ...
    def get(self, digest: bytes, offset: int = 0, size: int | None = None) -> bytes | memoryview: ...
    def has(self, digest: bytes) -> bool: ...
    def delete(self, digests: Sequence[bytes]) -> None: ...


class Replicas(Protocol):
    """The same chunks on other nodes, and what they mean for those here (docs/design/blobs.md)."""

    @property
    def shared(self) -> bool:
        """Do other nodes collect what nothing names? Then who relies on a name compares the count."""

    @property
    def may_collect(self) -> bool:
        """Nothing may be deleted at the moment if not."""

    @property
    def removes_rows(self) -> bool:
        """Is it this node that takes away the rows of collected blobs?"""

    def is_pinned(self, digest: bytes) -> bool:
        """A node was promised that this chunk stays. Losing that makes it a candidate again."""

    async def fetch(self, digest: bytes, ahead: Sequence[bytes] = ()) -> bytes:
        """A chunk that can not be read here, from another node; it is kept here if there is room.
        Those `ahead` are fetched meanwhile, as far as they are not here. Unavailable."""


class NoReplicas:
    """A node that is alone."""

    shared, may_collect, removes_rows = False, True, True

    def is_pinned(self, digest: bytes) -> bool:
        return False

    async def fetch(self, digest: bytes, ahead: Sequence[bytes] = ()) -> bytes:
        advice = "`aspen check` names the files; restore them from a backup"
        raise errors.Unavailable(f"chunk {digest.hex()}, which a file names, can not be read: {advice}")


class Tasks(Protocol):
    """Work beside that of the caller. Without it (None) everything is done before a call returns."""

    def event(self) -> Signal:
        """A new one-shot event of the caller's loop."""

    async def pause(self) -> None:
        """Returns after a moment: about as long as the kernel takes from an answer to the next request."""

    def spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        """Runs `work` at once, beside everything else. It says itself what went wrong."""


class Volume:
    """One file system in one store."""

    def __init__(self, store: Store, blobs: Blobs, clock: Clock) -> None:
        self.store, self.blobs = store, blobs
        self.replicas: Replicas = NoReplicas()
        self.now, self.monotonic_ns = clock.time_ns, clock.monotonic_ns
        self.tasks: Tasks | None = None
        # Whether a node belongs to the cluster, as of what is applied here.
        self.is_member: Callable[[int], bool] = _anybody
        self._next_id = self._last_id = 0
        # Digests put but not yet named by an accepted transaction: not garbage.
        self.pinned: dict[bytes, int] = {}
        # Digests that lost a reference: candidates for collection, the first to come first, and the
        # revision at which that was noticed.
        self.unreferenced: dict[bytes, int] = {}
        self.garbage_max = GARBAGE_MAX
        self.overlooked = False  # some did not find room there: their counts of 0 tell
        # Whether collection leaves a blob alone though nothing names it: a backup has yet to read it.
        self.spares: Callable[[bytes], bool] = _nothing
        # Awaited between the steps of long work, so that others get their turn.
        self.breathe: Callable[[], Awaitable[None]] = _no_pause

    async def format(self, mode: int = 0o40755, uid: int = 0, gid: int = 0) -> None:
        """Makes the root directory if there is none."""
        if self.store.get(layout.inode_key(layout.ROOT)) is not None:
            return
        now = self.now()
        root = layout.INODE.pack(2, 0, 0, 0, now, now, now, mode, uid, gid, 0, layout.ROOT, layout.FORMAT, 0)
        await self.store.txn(
            [absent(layout.inode_key(layout.ROOT))],
            [
                put(layout.inode_key(layout.ROOT), root),
                put(layout.COUNTER_KEY, layout.I64(layout.FIRST_ID)),
                put(layout.USAGE_KEY, layout.I64(1)),
            ],
            origin=self,
        )

    @property
    def formatted(self) -> bool:
        """Whether there is a root directory."""
        return self.store.get(layout.inode_key(layout.ROOT)) is not None

    async def new_id(self) -> int:
        """An inode id, unique for ever: hosts reserve blocks of them in the log (ADR 0004)."""
        while self._next_id >= self._last_id:
            result = await self.store.txn(
                [],
                [merge(layout.COUNTER_KEY, add(0, limits.INODE_BLOCK)), get(layout.COUNTER_KEY)],
                origin=self,
            )
            self._last_id = int.from_bytes(result.responses[1].value[:8], "little", signed=True)
            self._next_id = self._last_id - limits.INODE_BLOCK
        self._next_id += 1
        return self._next_id

    def forget_ids(self) -> None:
        """Ids that were reserved are given up: the state that said so was a bad one."""
        self._next_id = self._last_id = 0

    def inode(self, node: int) -> layout.Inode:
        """NotFound if there is no such inode (any more)."""
        record = self.store.get(layout.INODE_PREFIX + node.to_bytes(8, "big"))
        if record is None:
            raise errors.NotFound(f"inode {node}")
        return layout.Inode._make(layout.INODE.unpack_from(record.value))

    def directory(self, node: int) -> layout.Inode:
        inode = self.inode(node)
        if inode.mode & 0o170000 != 0o040000:
            raise errors.NotADirectory(f"inode {node}")
        return inode

    def txn(self, compares: Sequence[Compare], then: Sequence[Operation]) -> Awaitable[TxnResult]:
        """A transaction that observers know to be this mount's own."""
        if self.replicas.shared:
            compares = [*compares, *references.guards(self.store, then)]
        return self.store.txn(compares, then, origin=self)

    def unreference(self, digests: Iterable[bytes]) -> None:
        """Notes candidates for collection. Their memory is bounded: see `overlooked`."""
        unreferenced, revision = self.unreferenced, self.store.revision
        for digest in digests:
            if len(unreferenced) < self.garbage_max:
                unreferenced[digest] = revision
            elif digest not in unreferenced:
                self.overlooked = True

    def inode_count(self) -> int:
        record = self.store.get(layout.USAGE_KEY)
        return 0 if record is None else int.from_bytes(record.value[:8], "little", signed=True)


async def _no_pause() -> None:
    """For those who have nobody to wait for."""


def _nothing(_: bytes) -> bool:
    return False


def _anybody(_: int) -> bool:
    return True


def conflict(what: str) -> errors.Conflict:
    return errors.Conflict(f"{what}: changed by others {ATTEMPTS} times in a row")
