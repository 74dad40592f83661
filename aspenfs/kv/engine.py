"""Everything of the Store port that does not depend on where the log is kept.

An engine lives over a base state, the applied one. It gives each command its index, evaluates it on the
overlay, shows it to reads and observers, and, once the owner says how far the log is committed, to
watchers and to those who wait. The owner does the input and output: it writes the entry to the log
between `prepare` and `accept`, calls `committed_to` when it is durable, applies `overlay.pending` to the
base, and calls `overlay.settle`.

All methods run in one thread. None suspends but the two marked async, so each is atomic.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import islice

from aspenfs import errors
from aspenfs.kv import commands, history, keys, leases
from aspenfs.kv.commands import TXN, Command
from aspenfs.kv.machine import evaluate
from aspenfs.kv.overlay import Overlay
from aspenfs.kv.state import Effect, Outcome, State
from aspenfs.kv.store import Dedup, Observer
from aspenfs.kv.types import Batch, Compare, Event, Operation, Record
from aspenfs.kv.watch import Hub, Signal, Watcher
from aspenfs.limits import HISTORY_REVISIONS, LEASE_EXPIRE_MAX
from aspenfs.seams import Clock, Entropy

_new = tuple.__new__
_NS_PER_MS = 1_000_000
_NEVER = 1 << 63
_COMPACT_EVERY = 1_000  # revisions of history above HISTORY_REVISIONS that make a compaction due


class _Waiter:
    __slots__ = ("error", "signal")

    def __init__(self, signal: Signal) -> None:
        self.signal = signal
        self.error: errors.AspenError | None = None


class Engine:
    """The store of one node, without its log. `index` is that of the last entry in `base`."""

    def __init__(
        self,
        base: State,
        clock: Clock,
        entropy: Entropy,
        event_factory: Callable[[], Signal],
        *,
        index: int = 0,
        observer_failed: Callable[[Exception], object] | None = None,
    ) -> None:
        """`observer_failed` hears of an observer that raised, and the entry stands; without it the error
        is raised from `accept`, after all observers were called (for tests)."""
        self.overlay = Overlay(base)
        self._clock, self._entropy, self._event_factory = clock, entropy, event_factory
        self._observer_failed = observer_failed
        self._last = index
        self._uncommitted: deque[Batch] = deque()
        self._hub = Hub(self.overlay, index, event_factory)
        self._observers: list[tuple[Observer, Collection[bytes]]] = []
        self._hearers: dict[bytes, list[Observer]] = {}  # by keyspace, as far as it was asked for
        self._waiters: list[tuple[int, int, _Waiter]] = []  # a heap; the number keeps order among equals
        self._waited = 0
        self._closed: errors.AspenError | None = None
        self._recall()

    # --- commands ---
    def txn_command(
        self,
        compares: Sequence[Compare],
        then: Sequence[Operation],
        else_: Sequence[Operation] = (),
        dedup: Dedup | None = None,
    ) -> tuple[Command, bytes]:
        """The checked command and its bytes. TxnTooLarge, NameTooLong, TooLarge, InvalidArgument."""
        command = _new(Command, (TXN, self._clock.time_ns(), dedup, (compares, then, else_)))
        encoded = commands.encode(command)
        commands.check_size(compares, then, else_, len(encoded))
        if dedup is not None:
            commands.check_dedup(dedup)
        return command, encoded

    def grant_command(self, ttl_ms: int, lease: int = 0) -> Command:
        """`lease` 0 picks a free id."""
        while not lease:
            lease = int.from_bytes(self._entropy.random_bytes(8), "big") >> 1
            if leases.find(self.overlay, lease) is not None:
                lease = 0
        commands.check_lease(lease, ttl_ms)
        return self._command(commands.LEASE_GRANT, lease, ttl_ms)

    def keepalive_command(self, lease: int) -> Command:
        commands.check_natural(lease)
        return self._command(commands.LEASE_KEEPALIVE, lease)

    def revoke_command(self, lease: int) -> Command:
        commands.check_natural(lease)
        return self._command(commands.LEASE_REVOKE, lease)

    def expire_command(self) -> Command | None:
        """Ends leases whose time is over, LEASE_EXPIRE_MAX at a time; None if there are none. Cheap."""
        due = self.expired_leases(self._clock.time_ns())[:LEASE_EXPIRE_MAX]
        return self._command(commands.LEASE_EXPIRE, *due) if due else None

    def compact_command(self, revision: int) -> Command:
        """To be repeated while the outcome's result is 1: each entry forgets a bounded part."""
        commands.check_natural(revision)
        return self._command(commands.COMPACT, revision)

    def checkpoint_command(self) -> Command:
        """Changes nothing; its index is the result. Every node has its state at that very index looked at."""
        return self._command(commands.CHECKPOINT)

    def compaction_due(self) -> int | None:
        """The revision to compact at so that HISTORY_REVISIONS are left; None while it is not worth it."""
        excess = len(self._history) - HISTORY_REVISIONS
        return self._history[excess] if excess >= _COMPACT_EVERY else None

    def _command(self, kind: int, *body: int) -> Command:
        return Command(kind, self._clock.time_ns(), None, body)

    # --- changing ---
    def prepare(self, command: Command) -> tuple[int, Outcome]:
        """What `command` would do as the next entry. Changes nothing.

        An outcome without effects need not be logged: raise or return its result and go on.
        """
        index = self._last + 1
        return index, evaluate(self.overlay, index, command)

    def accept(self, index: int, outcome: Outcome, origin: object = None) -> None:
        """Takes in what `prepare` gave, with nothing prepared or accepted in between."""
        assert index == self._last + 1, f"entry {index} after {self._last}"
        _, effects, events = outcome
        self._last = index
        if not effects:
            return
        self.overlay.stage(index, effects)
        if len(effects) != len(events):
            self._note(effects[len(events) :])
        if events:
            self._uncommitted.append(_new(Batch, (index, events)))
            if self._observers:
                self._notify(index, events, origin)

    def submit(self, command: Command, origin: object = None) -> tuple[int, Outcome]:
        """`prepare` and `accept` in one: for entries that are in the log already, or need none."""
        index = self._last + 1
        outcome = evaluate(self.overlay, index, command)
        self.accept(index, outcome, origin)
        return index, outcome

    def committed_to(self, index: int) -> None:
        """Everything up to `index` is durable: feeds watchers, wakes those who wait."""
        if index <= self._hub.committed:
            return
        assert index <= self._last, f"commit {index} beyond {self._last}"
        uncommitted = self._uncommitted
        batches = []
        while uncommitted and uncommitted[0][0] <= index:
            batches.append(uncommitted.popleft())
        self._hub.publish(index, batches)
        self._wake_waiters(index)

    def _wake_waiters(self, index: int) -> None:
        waiters = self._waiters
        while waiters and waiters[0][0] <= index:
            heappop(waiters)[2].signal.set()

    def discard_after(self, index: int) -> None:
        """Accepted entries above `index` are lost: shows what they hid, and fails who waits for them."""
        assert index >= self._hub.committed, "committed entries are never lost"
        if index >= self._last:
            return
        lost = self.overlay.discard_after(index)
        while self._uncommitted and self._uncommitted[-1].revision > index:
            self._uncommitted.pop()
        self._last = index
        self._recall()
        self._fail_waiters(index, errors.Lost(f"accepted work above revision {index} was lost"))
        self._notify(
            index,
            [Event(key, self.overlay.get(key), record) for key, record in lost if key >= keys.USER_START],
            None,
        )

    def rebase(self, index: int) -> None:
        """The base is another state now, that of entry `index`, not behind what was accepted here.

        What was accepted and is not in it is forgotten: its fate is not known here. Who waits for a
        revision up to `index` is told that it is committed; watchers get Lagged, and watch again from
        where they were. Observers are not called: the owner has them look at everything anew.
        """
        assert index >= self._last, f"a state of entry {index} after {self._last}"
        self.overlay.discard_after(-1)
        self._uncommitted.clear()
        self._last = index
        self._recall()
        self._hub.rebase(index)
        self._wake_waiters(index)

    def close(self, error: errors.AspenError) -> None:
        """Fails everybody who waits or watches, now and later, with `error`."""
        self._closed = error
        self._hub.close(error)
        self._fail_waiters(-1, error)

    def _fail_waiters(self, index: int, error: errors.AspenError) -> None:
        kept = []
        for entry in self._waiters:
            if entry[0] <= index:
                kept.append(entry)
            else:
                entry[2].error = error
                entry[2].signal.set()
        heapify(kept)
        self._waiters = kept

    def _notify(self, index: int, events: Sequence[Event], origin: object) -> None:
        failure = None
        for observer in self._heard_by(events):
            try:
                observer(index, events, origin)
            except Exception as error:  # the entry stands, and the others must hear of it
                failure = error
                if self._observer_failed is not None:
                    self._observer_failed(error)
        if failure is not None and self._observer_failed is None:
            raise failure

    def _heard_by(self, events: Sequence[Event]) -> Sequence[Observer]:
        """The observers who want to hear of these, in order."""
        spaces = {event[0][:2] for event in events}
        if len(spaces) == 1:
            (space,) = spaces
            heard = self._hearers.get(space)
            if heard is None:
                heard = self._hearers[space] = self._who_wants(spaces)
            return heard
        return self._who_wants(spaces)

    def _who_wants(self, spaces: Collection[bytes]) -> list[Observer]:
        return [observer for observer, wanted in self._observers
                if not wanted or any(space in wanted for space in spaces)]  # fmt: skip

    def _recall(self) -> None:
        """What is kept in memory beside the state, read from it again."""
        self._history: deque[int] = deque()  # revisions that changed a key with history
        self._expiry_ns = 0  # no lease ends before; 0 = look
        for key, _ in self.overlay.items(keys.CHANGED_AT, history.CHANGED_END):
            self._history.append(int.from_bytes(key[2:], "big"))

    def _note(self, effects: Sequence[Effect]) -> None:
        """Keeps what is held in memory true after effects on internal keys: those behind the events'."""
        for key, record in effects:
            kind = key[:2]
            if kind == keys.CHANGED_AT:
                if record is not None:
                    self._history.append(record.mod_revision)
                else:
                    self._history.popleft()  # compaction walks from the oldest
            elif kind == keys.LEASE:
                self._expiry_ns = 0

    # --- waiting ---
    async def committed(self, revision: int | None = None) -> int:
        """See Store.committed. Lost if the work was lost meanwhile."""
        if self._closed is not None:
            raise self._closed
        wanted = self._last if revision is None else revision
        if wanted > self._hub.committed:
            waiter = _Waiter(self._event_factory())
            self._waited += 1
            heappush(self._waiters, (wanted, self._waited, waiter))
            await waiter.signal.wait()
            if waiter.error is not None:
                raise waiter.error
        return self._hub.committed

    # --- reading ---
    @property
    def revision(self) -> int:
        return self._last

    @property
    def committed_revision(self) -> int:
        return self._hub.committed

    def get(self, key: bytes, *, revision: int | None = None) -> Record | None:
        if key < keys.USER_START:
            return None
        if revision is None:
            return self.overlay.get(key)
        if not self._is_old(revision, key[:2] in keys.HISTORY_KEYSPACES):
            return self.overlay.get(key)
        return history.get_at(self.overlay, key, revision)

    def range(
        self,
        start: bytes,
        end: bytes,
        *,
        limit: int = 0,
        revision: int | None = None,
        keys_only: bool = False,
        reverse: bool = False,
    ) -> list[tuple[bytes, Record]]:
        start = max(start, keys.USER_START)
        if limit < 0:
            raise errors.InvalidArgument(f"limit {limit}")
        if revision is not None and self._is_old(revision, keys.keyspace_with_history(start, end)):
            items = history.items_at(self.overlay, start, end, revision, reverse=reverse)
        elif end and start >= end:
            return []
        else:
            items = self.overlay.items(start, end, reverse=reverse)
        rows = list(islice(items, limit) if limit else items)
        if keys_only:
            return [(key, Record(b"", *record[1:])) for key, record in rows]
        return rows

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, Record]]:
        start = max(start, keys.USER_START)
        return iter(()) if end and start >= end else self.overlay.items(start, end)

    def _is_old(self, revision: int, kept: bool) -> bool:
        """Whether a read as of `revision` needs history; `kept`: the keyspace has it. Compacted."""
        if revision == self._last:
            return False
        history.check_readable(self.overlay, revision, self._last)
        if not kept:
            raise errors.Compacted(self._last)
        return True

    def watch(self, start: bytes, end: bytes, *, from_revision: int | None = None) -> Watcher:
        """See Store.watch. The watcher is registered when this returns; errors are raised at once.

        Revision 0 is before the first entry. A revision to come is waited for. `aclose` ends it early.
        """
        return self._hub.watch(start, end, from_revision)

    def observe(self, observer: Observer, keyspaces: Collection[bytes] = ()) -> Callable[[], None]:
        """See Store.observe. When accepted work is lost, observers get what is visible instead, with the
        revision that it fell back to. It must not submit commands."""
        entry = observer, keyspaces
        self._observers.append(entry)
        self._hearers.clear()

        def end() -> None:
            self._observers = [one for one in self._observers if one is not entry]
            self._hearers.clear()

        return end

    def leases(self) -> list[tuple[int, int, int]]:
        """(id, ttl_ms, remaining_ms) by id; the time left if log time went on to this clock's time."""
        now = max(leases.log_time(self.overlay), self._clock.time_ns())
        return [
            (lease.lease, lease.ttl_ms, max(0, lease.deadline_ns - now) // _NS_PER_MS)
            for lease in leases.everyone(self.overlay)
        ]

    def expired_leases(self, time_ns: int) -> list[int]:
        """The leases that would end if log time went on to `time_ns`."""
        now = max(leases.log_time(self.overlay), time_ns)
        if now < self._expiry_ns:
            return []
        due = []
        self._expiry_ns = _NEVER
        for lease in leases.everyone(self.overlay):
            if lease.deadline_ns <= now:
                due.append(lease.lease)
            self._expiry_ns = min(self._expiry_ns, lease.deadline_ns)
        return due
