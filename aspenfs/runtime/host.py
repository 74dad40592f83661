"""NodeStore: the Store port on one durable replica, where engine, log, state and consensus meet.

Belongs here: the path of a transaction, both acknowledgement points (DESIGN §5), backpressure, the
node's own chores, what happens when the disk fails. Not here: evaluation (`kv/`), the log's bytes
(`wal.py`), LMDB (`statedb.py`), what the threads do inside (`syncer.py`, `applier.py`), agreeing with
other nodes (`consensus.py`).

A transaction on a node that is alone, all without suspending: checked -> evaluated on the overlay ->
appended to the log -> staged on the overlay and told to observers. So an append that fails leaves no
trace, and what is visible is in the log. Then, behind its back: sync thread -> commit -> applier thread
-> settle. In a cluster of several nodes: checked -> proposed -> in the logs of a majority, durably ->
evaluated on every node, staged and told; the proposer's `txn` returns then.

All methods belong to the loop's thread. Three indices, each behind the one before:
accepted (`revision`) >= committed (durable on a majority) >= applied (in the state).
"""

import logging
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import trio

from aspenfs import errors
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.replica import Replica
from aspenfs.cluster.types import Configuration, HardState
from aspenfs.cluster.types import Snapshot as RaftSnapshot
from aspenfs.errors import AspenError, NoSpace, SyncFailed
from aspenfs.kv import commands, types
from aspenfs.kv.commands import Command
from aspenfs.kv.engine import Engine
from aspenfs.kv.state import Outcome
from aspenfs.kv.store import Begun, Dedup, Observer
from aspenfs.kv.types import Batch, Compare, Operation, Record, TxnResult
from aspenfs.limits import (
    GIVE_BACK_S,
    MIB,
    OVERLAY_BYTES_MAX,
    PROPOSAL_TIMEOUT_MS,
    PROPOSALS_BYTES_MAX,
    SYNC_INTERVAL_MS,
    TICK_MS,
    WAL_SEGMENT_BYTES,
)
from aspenfs.runtime import identity, quarantine, recovery, store_status, swap
from aspenfs.runtime.applier import Applier
from aspenfs.runtime.consensus import META_CONFIGURATION, META_TERM, Consensus, decode_configuration
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.identity import Identity
from aspenfs.runtime.kernel_sync import KernelSync
from aspenfs.runtime.quarantine import Quarantine
from aspenfs.runtime.recovery import VerifyEntry
from aspenfs.runtime.reserve import Reserve
from aspenfs.runtime.snapshots.client import Fetched, install, reset_log
from aspenfs.runtime.statedb import MAP_BYTES, Snapshot, StateDb, Summary
from aspenfs.runtime.store_status import WAL_DIRECTORY
from aspenfs.runtime.syncer import Hook, Syncer
from aspenfs.runtime.wal import Kind, Wal
from aspenfs.seams import Clock, Disk, Entropy

logger = logging.getLogger(__name__)

STATE_DIRECTORY = "state"

FOUNDER = 1  # id of the node that made the cluster: identity.create
_ENTRY = int(Kind.ENTRY)
_HURRY_BYTES = 8 * MIB  # logged, or in the overlay: sync and apply now, not at the next interval
_SWITCH_INTERVAL_SECONDS = 0.0005  # how long a thread of ours may keep the loop from running
_FREEING = frozenset((types.DELETE, types.DELETE_RANGE))


class NodeStore:
    """A durable `kv.store.Store`. Made by `open`; durable in the background while `run` runs."""


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

    @classmethod
    def open(cls, state_directory: str | Path, clock: Clock, entropy: Entropy, *, name: str = "aspen",
             disk: Disk | None = None, pre_sync: Sequence[Hook] = (), verify_entry: VerifyEntry | None = None,
             segment_bytes: int = WAL_SEGMENT_BYTES, map_bytes: int = MAP_BYTES, background: bool = True,
             free_bytes: Callable[[], int] | None = None, reserve: Reserve | None = None,
             incarnation: int = 1, pre_sync_due: Callable[[], bool] | None = None) -> "NodeStore":
        """The store in `state_directory`, recovered; a new cluster `name` if there is none yet.

        Blocks. `pre_sync` runs in the sync thread before each sync of the log: what log entries name
        must be durable before they are. `pre_sync_due` tells, in the loop, whether it has anything to do
        (without: always). `verify_entry` tells whether what an entry names is here.
        `disk` holds the log (default: the directory itself), `free_bytes` limits the state,
        `reserve` is used up when that finds no room. `incarnation` is greater with each start.
        Corrupt, NoSpace, SyncFailed; the caller holds the lock on the directory.
        """
        directory = Path(state_directory)
        reset_to = swap.recover(RealDisk(directory)) if directory.exists() else None
        marker = quarantine.read(directory)
        node = identity.read(directory) or identity.create(directory, name, entropy)
        log = RealDisk(directory) if disk is None else disk
        wal = Wal.open(log, WAL_DIRECTORY, node.cluster_id, segment_bytes=segment_bytes,
                       background=background, claim=False)  # fmt: skip
        try:
            if reset_to is not None:
                reset_log(directory, wal, reset_to)
            state = StateDb(directory / STATE_DIRECTORY, map_bytes=map_bytes, free_bytes=free_bytes)
            try:
                store = cls(node, wal, state, clock, entropy, pre_sync, log, reserve)
                store._directory, store._free_bytes = directory, free_bytes
                store._pre_sync_due = pre_sync_due
                replayed = store._recover(verify_entry, incarnation, marker)
            except BaseException:
                state.close()
                raise
        except BaseException:
            wal.close()
            raise
        store._take_reserve()
        logger.info("store opened cluster=%s revision=%d replayed=%d", node.name, store.revision, replayed)
        return store

    def _recover(self, verify_entry: VerifyEntry | None, incarnation: int, marker: Quarantine | None) -> int:
        """Brings engine and replica to where the log and the state are; the entries evaluated."""
        wal, state, node = self._wal, self._state, self.identity.node_id
        stored = state.meta(META_CONFIGURATION)
        # A log that is read from its beginning starts with its founder alone, on whatever node.
        configuration = Configuration((FOUNDER,)) if stored is None else decode_configuration(stored)
        if marker is not None:
            quarantine.check_others(marker, configuration, node)
        applied = state.applied_index
        term = state.meta(META_TERM)
        terms = [(applied, int.from_bytes(term, "big") if term is not None else min(1, applied))]
        self.consensus = Consensus(wal, self.engine, self._applier, self._syncer, self._fail, terms,
                                   configuration)  # fmt: skip
        found = recovery.replay(wal, WAL_DIRECTORY, state, self.engine, self._applier, self._syncer,
                                verify_entry, alone=configuration == Configuration((node,)),
                                note_term=self.consensus.note_term)  # fmt: skip
        revision = self.engine.revision
        written_term, vote = wal.hard_state or (0, b"")
        last_term = found.tail[-1].term if found.tail else self.consensus.term_at(revision)
        voted = int.from_bytes(vote, "little") if written_term >= last_term else 0
        hard_state = HardState(max(written_term, last_term), voted)
        raft = Raft(node, configuration, hard_state=hard_state, entries=found.tail, base_index=revision,
                    base_term=self.consensus.term_at(revision), applied=revision,
                    random=self._random_below)  # fmt: skip
        self._replica = self.consensus.start(raft, self._clock.monotonic_ns, incarnation)
        self.consensus.state_is_at(state.applied_index)
        if marker is not None:
            self.suspend(marker)
        if configuration.voters == (node,) and not configuration.outgoing:
            raft.campaign(quietly=not found.tail and not configuration.learners)
            self._replica.pump()
        return found.evaluated

    def _random_below(self, bound: int) -> int:
        return int.from_bytes(self._entropy.random_bytes(8), "big") % bound

    def _meta_at(self, index: int) -> Mapping[str, bytes]:
        return self.consensus.meta_at(index)

    # --- running ---

    async def run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Keeps the store durable, applied, expired and compacted until cancelled; raises what stops it."""
        interval = sys.getswitchinterval()
        sys.setswitchinterval(min(interval, _SWITCH_INTERVAL_SECONDS))
        self._token = trio.lowlevel.current_trio_token()
        if isinstance(self._disk, RealDisk):
            self._syncer.use_kernel(KernelSync.open(self._directory), self._pre_sync_due)
        self._syncer.start(self._token)
        self._applier.start(self._token)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._chores)
                nursery.start_soon(self._proposed_chores)
                nursery.start_soon(self.consensus.run)
                nursery.start_soon(self._syncer.run)
                task_status.started()
                await self._failed.wait()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._stop_threads)
            self._token = None
            sys.setswitchinterval(interval)
            if self._to_settle:
                self._overlay.settle(self._to_settle[-1])
                self._to_settle.clear()
            if self._failure is not None:
                self._raise_failure()  # even if cancelled meanwhile: it decides how the process ends
            self._flush_log()  # whoever waits for a commit gets it
            self._replica.stop(errors.Closed("the store is closed"))

    def _stop_threads(self) -> None:
        self._syncer.stop()
        self._applier.stop()

    async def _chores(self) -> None:
        """What nobody asks for: commits nobody waits for, applying, leases, history."""
        engine = self.engine
        turns = 0
        while self._failure is None:
            await trio.sleep(SYNC_INTERVAL_MS / 1000)
            if engine.revision > engine.committed_revision:
                self._syncer.request()
            self._applier.request(engine.committed_revision)
            self._take_reserve()
            turns += 1
            if turns * SYNC_INTERVAL_MS % (GIVE_BACK_S * 1000) == 0:
                self._state.give_back_pages()
            if self._state.durable_index < self._state.applied_index == engine.committed_revision:
                self._applier.request_sync()  # nothing comes that would do it
            if not self._replica.alone:
                continue
            try:
                if self._wal.short_of_space:
                    self._look_for_space()
                self.expire_leases()
                revision = engine.compaction_due()
                while revision is not None and self._run_command(engine.compact_command(revision)).result:
                    await trio.lowlevel.checkpoint()
            except (NoSpace, errors.Compacted) as error:
                logger.debug("revision=%d a chore waits: %s", engine.revision, error)
            except Exception as error:
                self._fail(error)

    async def _proposed_chores(self) -> None:
        """The same chores in a cluster of several nodes, where the leader does them for all."""
        engine = self.engine
        while self._failure is None:
            await trio.sleep(SYNC_INTERVAL_MS / 1000)
            if self._replica.alone or not self.consensus.leading or self.quarantine is not None:
                continue
            try:
                expire, revision = engine.expire_command(), engine.compaction_due()
                if expire is not None:
                    await self._command(expire)
                if revision is not None:
                    await self.compact(revision)
            except AspenError as error:
                logger.debug("revision=%d a chore waits: %s", engine.revision, error)

    def expire_leases(self) -> None:
        """Ends the leases whose time is over by the clock. `run` does it now and then."""
        command = self.engine.expire_command()
        if command is not None:
            self._run_command(command)

    def close(self) -> None:
        """Makes everything durable and applied, then lets go of all files. After `run` has ended. Blocks.

        Waiters and watchers get Closed. After a failure nothing is written any more. Idempotent.
        """
        if isinstance(self._failure, errors.Closed):
            return
        assert not self._syncer.running, "close while the store runs"
        try:
            if self._failure is None:
                self._flush_log()
                self._flush_state()
        finally:
            self._stop_serving(errors.Closed("the store is closed"))
            self._state.close()
            self._wal.close()

    def _flush_log(self) -> None:
        try:
            self._synced(*self._syncer.sync_now())
        except BaseException as error:
            self._fail(error)
            raise

    def _flush_state(self) -> None:
        """Applies what is committed and trims the log. NoSpace: the next start applies it from the log."""
        try:
            self.apply()
            self._wal.trim(self._state.sync() + 1)
        except NoSpace as error:
            logger.warning("revision=%d closing with a full disk: %s", self.revision, error)

    def suspend(self, marker: Quarantine) -> None:
        """The state is a bad one: nothing is answered from it or built upon it, until another one has taken
        its place (`replace_state`). The log goes on, this node's vote with it. Who waits gets Diverged."""
        if self._failure is not None or self.quarantine is not None:
            return
        logger.error("index=%d quarantine: the state of this node differs from that of the majority there "
                     "(%s here, %s at nodes %s): it serves nothing until it has fetched their state. If that "
                     "does not come to its end, look at aspen status", marker.index,
                     marker.found.hex()[:16] or "unreadable", marker.digest.hex()[:16],
                     " ".join(map(str, marker.sources)))  # fmt: skip
        self.quarantine, self._well = marker, trio.Event()
        self._serve()
        self._replica.suspend(marker.error())
        for tell in self.suspended:
            tell()

    async def well(self) -> None:
        """Returns when the state is not known to be a bad one."""
        while self.quarantine is not None and self._failure is None:
            await self._well.wait()

    async def replace_state(self, fetched: Fetched) -> None:
        """Goes on with a state that was fetched whole from another node, and lies in `state.new`.

        Nothing is evaluated meanwhile: the replica waits for it, or is suspended. Who waits for an earlier
        revision is told that it is committed; `replaced` is called, for all that was known may be wrong.
        """
        stored = fetched.configuration
        configuration = Configuration((FOUNDER,)) if stored is None else decode_configuration(stored)
        snapshot = RaftSnapshot(fetched.index, fetched.term, configuration)
        raft = self._replica.raft
        assert fetched.index >= self.engine.revision, "a state of the past"
        keeps_log = raft.keeps_log(snapshot)
        while keeps_log and raft.log.persisted < fetched.index:
            self._syncer.request()  # after a loss of power the log must still lead on from that state
            await trio.sleep(TICK_MS / 1000)
        put_in_place = partial(install, self._directory, self._wal, fetched.index, keeps_log=keeps_log)
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._applier.stop)
                await trio.to_thread.run_sync(put_in_place)
            # No await from here on: readers see the old state or the new one.
            self._state.adopt(StateDb(self._directory / STATE_DIRECTORY, free_bytes=self._free_bytes))
            self._applier.rebase(fetched.index)
            self._to_settle.clear()
            self.engine.rebase(fetched.index)
            self.consensus.rebase(snapshot, keeps_log=keeps_log)
            self._stall = None
            assert self._token is not None, "a store that does not run"
            self._applier.start(self._token)
            if self._failure is not None:
                self._raise_failure()
            self.quarantine = None
            self._serve()
            if keeps_log:
                self._replica.resume()
            else:
                self._replica.snapshot_installed(snapshot)
        except BaseException as error:
            self._fail(error)
            raise
        self.consensus.wake()  # what the replica has to send and to sync by now
        self._well.set()
        for tell in self.replaced:
            tell()

    def apply(self) -> None:
        """Carries what is committed into the state, here: only while `run` does not. Blocks. NoSpace."""
        assert not self._syncer.running, "the applier's thread does this"
        steps = self._applier.apply_now(self.engine.committed_revision)
        if steps:
            self._batch_applied(steps[-1:])

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

    # --- durable and applied; called in the loop by the threads ---

    def _synced(self, ticket: int, index: int) -> None:
        if self._failure is None:
            self.consensus.synced(ticket, index)
            if self._overlay.bytes > _HURRY_BYTES:
                self._applier.request(index)

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

    def _take_reserve(self) -> None:
        reserve = self._reserve
        if reserve is None or self._stall is not None or (reserve.whole and self._refusal is None):
            return
        if reserve.take():
            if self._refusal is not None:
                logger.info("revision=%d there is space again", self.engine.revision)
            self._refusal = None
        elif self._refusal is None:
            self._refusal = NoSpace("the disk of the state directory is full")

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

    # --- the Store port ---

    async def applied(self, revision: int) -> None:
        """Waits until the state database has everything up to `revision`, which is committed."""
        if not self._syncer.running:
            self.apply()
        while self._state.applied_index < revision:
            if self._failure is not None:
                self._raise_failure()
            await trio.sleep(0.02)

    @property
    def syncing(self) -> bool:
        """Whether a sync is under way: somebody waits for it."""
        return self._syncer.busy

    @property
    def node_id(self) -> int:
        return self.identity.node_id

    @property
    def revision(self) -> int:
        return self.engine.revision

    @property
    def replay_floor(self) -> int:
        """Entries up to this one are never evaluated again, come what may: only what they alone name
        (a chunk whose last reference was dropped at or below it) may be destroyed."""
        return self._state.durable_index

    async def txn(self, compares: Sequence[Compare], then: Sequence[Operation],
                  else_: Sequence[Operation] = (), *, dedup: Dedup | None = None,
                  origin: object = None) -> TxnResult:
        engine = self.engine
        if not self._replica.alone:
            return await self._replicated(compares, then, else_, dedup, origin)
        if (self._overlay.bytes > OVERLAY_BYTES_MAX or self._wal.short_of_space or self._failure is not None
                or self._refusal is not None):  # fmt: skip
            await self._admitted(then)
            if not self._is_alone():
                return await self._replicated(compares, then, else_, dedup, origin)
        command, encoded = engine.txn_command(compares, then, else_, dedup)
        index, outcome = engine.prepare(command)
        result = outcome[0]
        if type(result) is not TxnResult:
            assert isinstance(result, AspenError)
            raise result
        self._accept(index, encoded, outcome, origin)
        return result

    def begin(self, compares: Sequence[Compare], then: Sequence[Operation], *,
              origin: object = None) -> Begun | None:
        replica = self._replica
        if (replica.alone or self._failure is not None or self.quarantine is not None
                or self._wal.short_of_space or self._refusal is not None
                or replica.proposed_bytes > PROPOSALS_BYTES_MAX
                or self._overlay.bytes > OVERLAY_BYTES_MAX):  # fmt: skip
            return None
        command, encoded = self.engine.txn_command(compares, then)
        return self.consensus.begin_proposal(command, encoded, origin)

    def _is_alone(self) -> bool:
        """After an await: it may have changed."""
        return self._replica.alone

    def _accept(self, index: int, encoded: bytes, outcome: Outcome, origin: object) -> None:
        """Into the log, then visible. NoSpace and an EIO of the write itself leave no trace."""
        term = self._replica.raft.term
        try:
            self._wal.append(_ENTRY, term, index, encoded)
        except SyncFailed as error:
            self._fail(error)
            raise
        try:
            self.consensus.note_term(index, term)
            self._replica.accept(_ENTRY, encoded)
            self.engine.accept(index, outcome, origin)
        except BaseException as error:
            self._fail(error)  # the log has the entry, the overlay has not
            raise
        self._applier.add(index, outcome[1])
        self._unsynced_bytes += len(encoded)
        if self._unsynced_bytes > _HURRY_BYTES:
            self._unsynced_bytes = 0
            self._syncer.request()

    async def _replicated(self, compares: Sequence[Compare], then: Sequence[Operation],
                          else_: Sequence[Operation], dedup: Dedup | None, origin: object) -> TxnResult:
        command, encoded = self.engine.txn_command(compares, then, else_, dedup)
        freeing = any(operation[0] in _FREEING for operation in then)
        result = await self._proposed(command, encoded, freeing, origin)
        assert isinstance(result, TxnResult)
        return result

    async def _proposed(self, command: Command, encoded: bytes, freeing: bool, origin: object) -> object:
        """The result of a command that a majority has agreed on and that was evaluated here."""
        if self._failure is not None:
            self._raise_failure()
        self._check_well()
        if not freeing:
            if self._wal.short_of_space:
                raise NoSpace("no space for the log: free some on the file system of the state directory")
            if self._refusal is not None:
                raise self._refusal.with_traceback(None)
        if self._replica.proposed_bytes > PROPOSALS_BYTES_MAX or self._overlay.bytes > OVERLAY_BYTES_MAX:
            await self._room_to_propose()
        if self.before_propose is not None:
            await self.before_propose(command)
        result = await self.consensus.propose(command, encoded, origin)
        if isinstance(result, AspenError):
            raise result.with_traceback(None)
        return result

    async def _room_to_propose(self) -> None:
        """Waits until fewer bytes are under way. NoQuorum if they do not get less."""
        deadline = trio.current_time() + PROPOSAL_TIMEOUT_MS / 1000
        while self._replica.proposed_bytes > PROPOSALS_BYTES_MAX or self._overlay.bytes > OVERLAY_BYTES_MAX:
            if self._failure is not None:
                self._raise_failure()
            if self._stall is not None:
                raise self._stall.with_traceback(None)
            if trio.current_time() > deadline:
                raise errors.NoQuorum("what was proposed before is still under way: `aspen status` tells why")
            self._applier.request(self.engine.committed_revision)
            await trio.sleep(0.005)

    async def _command(self, command: Command) -> object:
        """The result of a command of ours."""
        if self._replica.alone:
            return self._run_command(command).result
        return await self._proposed(command, commands.encode(command), True, None)

    async def _admitted(self, then: Sequence[Operation]) -> None:
        """Waits until there is room for a transaction. NoSpace, when only space on the disk would help.

        What deletes may go on for a while on a full disk: it is how space comes back.
        """
        freeing = any(operation[0] in _FREEING for operation in then)
        while True:
            if self._failure is not None:
                self._raise_failure()
            if self._wal.short_of_space and not self._syncer.running:
                self._look_for_space()
                self._flush_log()
            if self._wal.short_of_space and not freeing:
                raise NoSpace("no space for the log: free some on the file system of the state directory")
            if self._refusal is not None and not freeing:
                raise self._refusal.with_traceback(None)
            held = self._overlay.bytes
            if held <= OVERLAY_BYTES_MAX:
                return
            if self._stall is not None:
                if freeing and held <= 2 * OVERLAY_BYTES_MAX:
                    return
                raise self._stall.with_traceback(None)
            if not self._syncer.running:
                self._flush_log()
                self.apply()
                continue
            self._syncer.request()
            self._applier.request(self.engine.committed_revision)
            if self._room.is_set():
                self._room = trio.Event()
            await self._room.wait()

    def _look_for_space(self) -> None:
        """The log tries to make its next segment after a sync that had something to do: here it is."""
        self._run_command(Command(commands.NOOP, 0, None, ()))

    def _run_command(self, command: Command) -> Outcome:
        """A command of ours, as `txn` does it."""
        if self._failure is not None:
            self._raise_failure()
        index, outcome = self.engine.prepare(command)
        if isinstance(outcome.result, AspenError):
            raise outcome.result
        self._accept(index, commands.encode(command), outcome, None)
        return outcome

    async def _number(self, command: Command) -> int:
        result = await self._command(command)
        assert isinstance(result, int)
        return result

    async def committed(self, revision: int | None = None) -> int:
        engine = self.engine
        wanted = engine.revision if revision is None else revision
        if wanted > engine.committed_revision and self._failure is None:
            if self._syncer.running:
                self._syncer.request()
            else:
                self._flush_log()
        return await engine.committed(wanted)

    def _check_well(self) -> None:
        if self.quarantine is not None:
            raise self.quarantine.error()

    async def barrier(self) -> int:
        if self._failure is not None:
            self._raise_failure()
        self._check_well()
        if not self._replica.read_now():
            await self.consensus.read_index()
        return self.engine.revision

    @property
    def alone(self) -> bool:
        """Whether transactions are accepted at once: no other node is a member, or about to be one."""
        return self._replica.alone

    async def fence(self, revision: int) -> None:
        await self.committed(revision)

    def observe(self, observer: Observer) -> Callable[[], None]:
        return self.engine.observe(observer)

    def watch(self, start: bytes, end: bytes, *, from_revision: int | None = None) -> AsyncIterator[Batch]:
        if not start.startswith(quarantine.OWN_ROWS):
            self._check_well()
        return self.engine.watch(start, end, from_revision=from_revision)

    async def lease_grant(self, ttl_ms: int, lease: int = 0) -> int:
        return await self._number(self.engine.grant_command(ttl_ms, lease))

    async def lease_keepalive(self, lease: int) -> int:
        return await self._number(self.engine.keepalive_command(lease))

    async def lease_revoke(self, lease: int) -> None:
        await self._command(self.engine.revoke_command(lease))

    async def compact(self, revision: int) -> None:
        while await self._number(self.engine.compact_command(revision)):
            await trio.lowlevel.checkpoint()

    async def checkpoint(self) -> int:
        """Has every node look at its state at one and the same entry; the index of that."""
        return await self._number(self.engine.checkpoint_command())

    # --- looking at it ---

    @property
    def directory(self) -> Path:
        return self._directory

    @property
    def applier(self) -> Applier:
        """For who looks at the state at checkpoints: `checkpoints.Checkpoints`."""
        return self._applier

    @property
    def state(self) -> StateDb:
        """What is applied, for those who hand it out whole: `snapshots.SnapshotServer`."""
        return self._state

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """What is applied, standing still: for a walk in a thread (`aspen check`). Diverged."""
        self._check_well()
        return self._state.snapshot()

    def verify(self) -> Summary:
        """Walks the state database; Corrupt names the first thing that is wrong. In any thread."""
        return self._state.verify()

    def status(self) -> dict[str, int | str]:
        """Figures for `cluster/` and `aspen status`: see `store_status.py`."""
        if isinstance(self._failure, errors.Closed):
            self._raise_failure()
        figures = store_status.figures(self.identity, self.engine, self._wal, self._disk, self._state,
                                       self._syncer, self._applier, self._condition())  # fmt: skip
        return figures | self.consensus.status()

    def _condition(self) -> str:
        if self._failure is not None:
            return "failed"
        if self.quarantine is not None:
            return "quarantine"
        full = self._stall is not None or self._refusal is not None or self._wal.short_of_space
        return "full" if full else "ok"

    @property
    def refusal(self) -> NoSpace | None:
        """Why nothing may be written now, beside the log neither; None if it may."""
        return self._refusal


def _log_observer(error: Exception) -> None:
    """An observer that fails misses a change; the store, whose entry stands, goes on."""
    logger.error("an observer of the store failed", exc_info=error)
