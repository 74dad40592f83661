"""HostBase: what the parts of a node's store share: engine, log, state, consensus; and what stops them.

Belongs here: fields, failing, what becomes durable and applied behind a transaction's back, a disk that is
full. Not here: the transaction itself (`host_writing.py`), the life of a store and its port (`host.py`).
"""

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import trio

from aspenfs import errors
from aspenfs.cluster.replica import Replica
from aspenfs.errors import AspenError, NoSpace
from aspenfs.kv.commands import Command
from aspenfs.kv.engine import Engine
from aspenfs.kv.types import Record
from aspenfs.limits import MIB, OVERLAY_BYTES_MAX
from aspenfs.runtime import quarantine
from aspenfs.runtime.applier import Applier
from aspenfs.runtime.consensus import Consensus
from aspenfs.runtime.identity import Identity
from aspenfs.runtime.quarantine import Quarantine
from aspenfs.runtime.reserve import Reserve
from aspenfs.runtime.statedb import StateDb
from aspenfs.runtime.syncer import Hook, Syncer
from aspenfs.runtime.wal import Wal
from aspenfs.seams import Clock, Disk, Entropy

logger = logging.getLogger(__name__)

STATE_DIRECTORY = "state"
FOUNDER = 1  # id of the node that made the cluster: identity.create
HURRY_BYTES = 8 * MIB  # logged, or in the overlay: sync and apply now, not at the next interval


class HostBase:
    def __init__(self, node: Identity, wal: Wal, state: StateDb, clock: Clock, entropy: Entropy,
                 pre_sync: Sequence[Hook], disk: Disk, reserve: Reserve | None) -> None:
        self.identity = node
        self._wal, self._state, self._disk, self._reserve = wal, state, disk, reserve
        self.engine = engine = Engine(state, clock, entropy, trio.Event, index=state.applied_index,
                                      observer_failed=_log_observer)
        self._overlay = engine.overlay
        self._applier = Applier(state, self._batch_applied, self._applier_stalled, self._fail, self._meta_at)
        self._syncer = Syncer(wal, pre_sync, self._synced, self._fail, clock.monotonic_ns,
                              lambda: self.consensus.ticket)  # fmt: skip
        self._clock, self._entropy = clock, entropy
        self._directory = Path()
        self._free_bytes: Callable[[], int] | None = None
        self._pre_sync_due: Callable[[], bool] | None = None
        self.replaced: list[Callable[[], object]] = []  # called when the state is another node's
        self.suspended: list[Callable[[], object]] = []  # called when it turned out to be a bad one
        self.quarantine: Quarantine | None = None  # as long as it is: see `suspend`
        self._well = trio.Event()
        self._well.set()
        self.consensus: Consensus
        self._replica: Replica
        # Awaited before a command is proposed to others: what it names must be with a majority.
        self.before_propose: Callable[[Command], Awaitable[object]] | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._failure: AspenError | None = None
        self._failed = trio.Event()
        self._room = trio.Event()  # replaced after each use
        self._stall: NoSpace | None = None  # why nothing is applied
        self._short: NoSpace | None = None  # why no space is given back
        self._refusal: NoSpace | None = None  # what writers get until the reserve is back
        self._unsynced_bytes = 0  # in the log since a sync was last asked for on their account
        self._to_settle: deque[int] = deque()
        self._serve()

    def _serve(self) -> None:
        """Reads go where they find what is true; so the hot path needs no check."""
        engine = self.engine
        self.get = engine.get
        self.range = engine.range
        self.scan: Callable[[bytes, bytes], Iterator[tuple[bytes, Record]]] = engine.scan
        self.leases = engine.leases
        if self.quarantine is not None:
            self.get, self.range, self.scan, self.leases = (
                quarantine.narrowed(read, self.quarantine)
                for read in (self.get, self.range, self.scan, self.leases)
            )

    # --- failing ---

    def _fail(self, error: BaseException) -> None:
        """The node stops: what the disk did or what the program did wrong must not be built upon."""
        if self._failure is not None:
            return
        if isinstance(error, AspenError):
            logger.error("revision=%d the store stops: %s", self.engine.revision, error)
            failure = error
        else:
            logger.error("revision=%d the store stops", self.engine.revision, exc_info=error)
            failure = errors.StorageError(f"the store has stopped: {error!r}")
            failure.__cause__ = error
        self._stop_serving(failure)

    def _stop_serving(self, failure: AspenError) -> None:
        self._failure = failure
        self.get = self.range = self.scan = self.leases = self._refuse  # so the hot path needs no check
        self.engine.close(failure)
        self._replica.stop(failure)
        self._failed.set()
        self._well.set()
        self._room.set()

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        self._raise_failure()

    def _raise_failure(self) -> NoReturn:
        assert self._failure is not None
        raise self._failure.with_traceback(None)

    def _check_well(self) -> None:
        if self.quarantine is not None:
            raise self.quarantine.error()

    # --- durable and applied; called in the loop by the threads ---

    def _synced(self, ticket: int, index: int) -> None:
        if self._failure is None:
            self.consensus.synced(ticket, index)
            if self._overlay.bytes > HURRY_BYTES:
                self._applier.request(index)

    def _flush_log(self) -> None:
        try:
            self._synced(*self._syncer.sync_now())
        except BaseException as error:
            self._fail(error)
            raise

    def apply(self) -> None:
        """Carries what is committed into the state, here: only while `run` does not. Blocks. NoSpace."""
        assert not self._syncer.running, "the applier's thread does this"
        steps = self._applier.apply_now(self.engine.committed_revision)
        if steps:
            self._batch_applied(steps[-1:])

    def _batch_applied(self, steps: list[int]) -> None:
        if self._failure is not None:
            return
        self._stall = None
        # No await from here to the first settle: readers see each effect in the overlay or below.
        self._state.refresh()
        self.consensus.state_is_at(self._state.applied_index)
        idle = bool(steps) and not self._to_settle
        self._to_settle.extend(steps)
        try:
            self._wal.trim(self._state.durable_index + 1)
        except BaseException as error:
            self._fail(error)
            return
        if idle:
            self._settle_step()

    def _settle_step(self) -> None:
        """Drops a part of what the state has; the rest in later turns of the loop."""
        if self._failure is not None or not self._to_settle:
            return
        self._overlay.settle(self._to_settle.popleft())
        if self._overlay.bytes <= OVERLAY_BYTES_MAX:
            self._room.set()
        if self._to_settle and self._token is not None:
            self._token.run_sync_soon(self._settle_step)

    # --- a full disk ---

    def _applier_stalled(self, reason: NoSpace) -> None:
        if self._stall is None:
            logger.warning("revision=%d the state does not grow: %s", self.engine.revision, reason)
        self._stall = reason
        self._give_up_reserve(reason)
        self._room.set()  # who waits for room is told

    def _give_up_reserve(self, reason: NoSpace) -> None:
        """What is to be deleted gets the last of the space; what writes is refused from now on."""
        if self._reserve is not None:
            given_up = self._reserve.give_up()
            if given_up:
                logger.warning("revision=%d reserve given up bytes=%d", self.engine.revision, given_up)
            self._refusal = reason

    def short_of_room(self, reason: NoSpace | None) -> None:
        """What gives space back needs some itself; None: not any more, or it has got it."""
        self._short = reason
        if reason is not None:
            self._give_up_reserve(reason)

    def _take_reserve(self) -> None:
        reserve = self._reserve
        if reserve is None or (reserve.whole and self._refusal is None):
            return
        if self._stall is not None or self._short is not None:
            return
        if reserve.take():
            if self._refusal is not None:
                logger.info("revision=%d there is space again", self.engine.revision)
            self._refusal = None
        elif self._refusal is None:
            self._refusal = NoSpace("the disk of the state directory is full")

    # --- looking at it ---

    @property
    def committing(self) -> bool:
        """Whether a sync or a proposal is under way: somebody waits for it."""
        return self._syncer.busy or self._replica.proposed_bytes > 0

    @property
    def node_id(self) -> int:
        return self.identity.node_id

    @property
    def revision(self) -> int:
        return self.engine.revision

    @property
    def alone(self) -> bool:
        """Whether transactions are accepted at once: no other node is a member, or about to be one."""
        return self._replica.alone

    @property
    def refusal(self) -> NoSpace | None:
        """Why nothing may be written now, beside the log neither; None if it may."""
        return self._refusal

    @property
    def replay_floor(self) -> int:
        """Entries up to this one are never evaluated again, come what may: only what they alone name
        (a chunk whose last reference was dropped at or below it) may be destroyed."""
        return self._state.durable_index

    def _meta_at(self, index: int) -> Mapping[str, bytes]:
        return self.consensus.meta_at(index)


def _log_observer(error: Exception) -> None:
    """An observer that fails misses a change; the store, whose entry stands, goes on."""
    logger.error("an observer of the store failed", exc_info=error)
