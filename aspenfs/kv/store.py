"""The Store port: the one narrow interface between everything above floor 1 and the replicated state.

Names are etcd's. Reads are local and synchronous: a mount is a replica, so its applied state (with
this node's accepted transactions laid over it) is in the process; `barrier` makes them linearizable.
`txn` is the only way to change anything.

Two acknowledgement points (DESIGN §5): `txn` returns when the transaction is *accepted*: ordered, in
the log's page cache (it survives the death of this process), visible to reads here. `committed`
returns when it is durable on a majority and applied (it survives the loss of power).

Every implementation passes `tests/kv/conformance.py`.
"""

from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from typing import Protocol

from aspenfs.kv.types import Batch, Compare, Event, Operation, Record, TxnResult

Dedup = tuple[bytes, int]  # (client id of 16 bytes, sequence number from 1)
Observer = Callable[[int, Sequence[Event], object], None]


class Begun(Protocol):
    """A transaction that has its place, and so its outcome, and is not committed yet."""

    def hurry(self) -> None:
        """Somebody waits: it need not wait any longer for others to share its sync."""

    async def held(self) -> bool:
        """Waits until a majority has it in its log, on disk or not: whoever leads next has it, unless one of
        these loses what it had not synced while the others of them are out of reach. False: its outcome is
        known by now, or it failed."""

    async def outcome(self) -> TxnResult:
        """Waits until it is committed and applied here. NoQuorum, OutcomeUnknown, Closed."""


class Store(Protocol):
    @property
    def node_id(self) -> int:
        """Who this node is in its cluster; never anybody else's, and never 0."""

    @property
    def alone(self) -> bool:
        """The cluster is this node: `txn` accepts by itself and does not suspend. While it is false, `txn`
        returns when the transaction is committed and applied here, and others' come in between."""

    @property
    def revision(self) -> int:
        """The newest revision visible to reads here."""

    @property
    def replay_floor(self) -> int:
        """No start of this node, whatever happens before it, evaluates an entry up to this one again.
        Bytes beside the log that only such entries name may be destroyed. Never goes back."""

    def get(self, key: bytes, *, revision: int | None = None) -> Record | None:
        """The record as of now, or as of `revision` (Compacted, FutureRevision).

        Only keyspaces with history (`k/`, `c/`, `t/`) can be read at an old revision; others raise Compacted.
        """

    def range(self, start: bytes, end: bytes, *, limit: int = 0, revision: int | None = None,
              keys_only: bool = False, reverse: bool = False) -> list[tuple[bytes, Record]]:
        """Keys in [start, end) in byte order with their records; `end` b'' = no end; `limit` 0 = all.

        `reverse` starts at the greatest key. With `keys_only` the records carry empty values.
        """

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, Record]]:
        """As `range`, lazily, for long walks. Changes made meanwhile may or may not be seen."""

    async def txn(self, compares: Sequence[Compare], then: Sequence[Operation],
                  else_: Sequence[Operation] = (), *, dedup: Dedup | None = None,
                  origin: object = None) -> TxnResult:
        """Evaluates all compares; runs `then` if they hold, else `else_`. Returns when *accepted*.

        On a node that may accept on its own it does not suspend: between reading state and the
        return of this call no other transaction comes in between. `dedup` makes a retry apply once
        and return the first result. `origin` is handed to local observers. TxnTooLarge, NoSpace.
        """

    def begin(self, compares: Sequence[Compare], then: Sequence[Operation], *,
              origin: object = None) -> Begun | None:
        """On several nodes: a transaction that has its place at once, before anything that others propose.

        Only if that is so: this node leads, reads here are current, and nothing of others is under way.
        Then it does `then` if its compares hold by what is read here, as long as nothing of this node's own
        that is under way changes that, which only the caller can know; and other nodes' barriers wait for
        it. Only if this node ceases to lead before it is committed may others' come before it. It is not
        visible to reads before it is committed. It names no chunks.

        None if it is not so: `txn`. Always None alone, where `txn` does not suspend.
        """

    async def committed(self, revision: int | None = None) -> int:
        """Waits until `revision` (default: all accepted so far) is committed; the revision committed."""

    def observe(self, observer: Observer, keyspaces: Collection[bytes] = ()) -> Callable[[], None]:
        """Calls `observer(revision, events, origin)` in order for every change visible here, at
        once and synchronously; the returned function ends it. For cache coherence on this node.

        `keyspaces`, by the two bytes with which their keys begin: only for changes that have a key in one
        of them; it gets all events of those."""

    def watch(self, start: bytes, end: bytes, *, from_revision: int | None = None) -> AsyncIterator[Batch]:
        """Committed changes in [start, end), one batch per revision, never split, never a gap.

        `from_revision` is inclusive and replays history (Compacted carries the oldest left);
        None starts after what is committed now. A slow reader gets Lagged.
        """

    async def lease_grant(self, ttl_ms: int, lease: int = 0) -> int:
        """A new lease id (`lease` 0 = the store picks one); AlreadyExists if taken."""

    async def lease_keepalive(self, lease: int) -> int:
        """Restarts the lease's time; its ttl in ms. LeaseNotFound."""

    async def lease_revoke(self, lease: int) -> None:
        """Ends the lease and deletes its keys. LeaseNotFound."""

    def leases(self) -> list[tuple[int, int, int]]:
        """(id, ttl_ms, remaining_ms on log time) of every lease."""

    async def compact(self, revision: int) -> None:
        """Forgets history below `revision` (a replicated, deterministic entry)."""

    async def barrier(self) -> int:
        """Waits until reads here see everything committed anywhere before the call; the revision."""

    async def fence(self, revision: int) -> None:
        """Waits until `revision` is applied here."""


