"""LocalStore: the Store port in one process, in memory, every transaction committed at once.

For tests and simulation. It passes the same conformance suite as the stores with a log.
"""

from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence

from aspenfs import errors
from aspenfs.kv import commands
from aspenfs.kv.commands import Command
from aspenfs.kv.engine import Engine
from aspenfs.kv.memory import MemoryState
from aspenfs.kv.state import Outcome
from aspenfs.kv.store import Begun, Dedup, Observer
from aspenfs.kv.types import Batch, Compare, Operation, Record, TxnResult
from aspenfs.kv.watch import Signal
from aspenfs.seams import Clock, Entropy

Journal = Callable[[int, bytes], None]


class LocalStore:
    """A Store without a log. `event_factory` makes one-shot events of the caller's loop (trio.Event);
    `journal`, if given, gets the index and the bytes of each entry before it is accepted."""

    node_id = 1
    alone = True

    def __init__(
        self,
        clock: Clock,
        entropy: Entropy,
        event_factory: Callable[[], Signal],
        journal: Journal | None = None,
    ) -> None:
        self.state = MemoryState()
        self.engine = Engine(self.state, clock, entropy, event_factory)
        self._journal = journal
        self.get = self.engine.get
        self.range = self.engine.range

    @property
    def revision(self) -> int:
        return self.engine.revision

    @property
    def replay_floor(self) -> int:
        return self.engine.revision  # nothing is left after its end

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, Record]]:
        return self.engine.scan(start, end)

    async def txn(
        self,
        compares: Sequence[Compare],
        then: Sequence[Operation],
        else_: Sequence[Operation] = (),
        *,
        dedup: Dedup | None = None,
        origin: object = None,
    ) -> TxnResult:
        command, encoded = self.engine.txn_command(compares, then, else_, dedup)
        result = self._run(command, encoded, origin).result
        assert isinstance(result, TxnResult)
        return result

    def begin(
        self, compares: Sequence[Compare], then: Sequence[Operation], *, origin: object = None
    ) -> Begun | None:
        return None

    async def committed(self, revision: int | None = None) -> int:
        return await self.engine.committed(revision)

    def observe(self, observer: Observer, keyspaces: Collection[bytes] = ()) -> Callable[[], None]:
        return self.engine.observe(observer, keyspaces)

    def watch(self, start: bytes, end: bytes, *, from_revision: int | None = None) -> AsyncIterator[Batch]:
        return self.engine.watch(start, end, from_revision=from_revision)

    async def lease_grant(self, ttl_ms: int, lease: int = 0) -> int:
        return self._number(self.engine.grant_command(ttl_ms, lease))

    async def lease_keepalive(self, lease: int) -> int:
        return self._number(self.engine.keepalive_command(lease))

    async def lease_revoke(self, lease: int) -> None:
        self._run_command(self.engine.revoke_command(lease))

    def leases(self) -> list[tuple[int, int, int]]:
        return self.engine.leases()

    async def compact(self, revision: int) -> None:
        while self._number(self.engine.compact_command(revision)):
            pass

    async def barrier(self) -> int:
        return self.engine.revision

    async def fence(self, revision: int) -> None:
        await self.engine.committed(revision)

    # --- not of the port ---
    async def expire_leases(self) -> None:
        """Ends the leases whose time is over by the clock: what a node does now and then."""
        command = self.engine.expire_command()
        if command is not None:
            self._run_command(command)

    def close(self) -> None:
        """Ends watches and waits with Closed."""
        self.engine.close(errors.Closed("the store is closed"))

    def _number(self, command: Command) -> int:
        result = self._run_command(command).result
        assert isinstance(result, int)
        return result

    def _run_command(self, command: Command) -> Outcome:
        return self._run(command, commands.encode(command), None)

    def _run(self, command: Command, encoded: bytes, origin: object) -> Outcome:
        engine = self.engine
        index, outcome = engine.prepare(command)
        if isinstance(outcome.result, errors.AspenError):
            raise outcome.result
        if self._journal is not None:
            self._journal(index, encoded)
        engine.accept(index, outcome, origin)
        engine.committed_to(index)
        self.state.apply(engine.overlay.pending(index))
        engine.overlay.settle(index)
        return outcome
