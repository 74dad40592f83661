"""NodeStore: the Store port on one durable replica, where engine, log, state and consensus meet.

Belongs here: opening and closing, the node's own chores, the port as others see it. In files of their own:
what the parts share and what stops them (`host_base.py`), the path of a transaction (`host_writing.py`),
another state in place of this one (`host_replacing.py`). Not here: evaluation (`kv/`), the log's bytes
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
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import trio

from aspenfs import errors
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.types import Configuration, HardState
from aspenfs.errors import AspenError, NoSpace
from aspenfs.kv.store import Observer
from aspenfs.kv.types import Batch
from aspenfs.limits import GIVE_BACK_S, SYNC_INTERVAL_MS, WAL_SEGMENT_BYTES
from aspenfs.runtime import identity, quarantine, recovery, store_status, swap
from aspenfs.runtime.applier import Applier
from aspenfs.runtime.consensus import META_CONFIGURATION, META_TERM, Consensus, decode_configuration
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.host_base import FOUNDER, STATE_DIRECTORY
from aspenfs.runtime.host_replacing import Replacing
from aspenfs.runtime.kernel_sync import KernelSync
from aspenfs.runtime.quarantine import Quarantine
from aspenfs.runtime.recovery import VerifyEntry
from aspenfs.runtime.reserve import Reserve
from aspenfs.runtime.snapshots.client import reset_log
from aspenfs.runtime.statedb import MAP_BYTES, Snapshot, StateDb, Summary
from aspenfs.runtime.store_status import WAL_DIRECTORY
from aspenfs.runtime.syncer import Hook
from aspenfs.runtime.wal import Wal
from aspenfs.seams import Clock, Disk, Entropy

logger = logging.getLogger(__name__)

_SWITCH_INTERVAL_SECONDS = 0.0005  # how long a thread of ours may keep the loop from running


class NodeStore(Replacing):
    """A durable `kv.store.Store`. Made by `open`; durable in the background while `run` runs."""

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
            sound = self._failure is None
            self._stop_serving(errors.Closed("the store is closed"))
            self._state.close()
            self._wal.close(sync=sound)

    def _flush_state(self) -> None:
        """Applies what is committed and trims the log. NoSpace: the next start applies it from the log."""
        try:
            self.apply()
            self._wal.trim(self._state.sync() + 1)
        except NoSpace as error:
            logger.warning("revision=%d closing with a full disk: %s", self.revision, error)

    # --- the Store port ---

    async def applied(self, revision: int) -> None:
        """Waits until the state database has everything up to `revision`, which is committed."""
        if not self._syncer.running:
            self.apply()
        while self._state.applied_index < revision:
            if self._failure is not None:
                self._raise_failure()
            await trio.sleep(0.02)

    async def committed(self, revision: int | None = None) -> int:
        engine = self.engine
        wanted = engine.revision if revision is None else revision
        if wanted > engine.committed_revision and self._failure is None:
            if self._syncer.running:
                self._syncer.request()
            else:
                self._flush_log()
        return await engine.committed(wanted)

    async def barrier(self) -> int:
        if self._failure is not None:
            self._raise_failure()
        self._check_well()
        if not self._replica.read_now():
            await self.consensus.read_index()
        return self.engine.revision

    async def fence(self, revision: int) -> None:
        await self.committed(revision)

    def observe(self, observer: Observer, keyspaces: Collection[bytes] = ()) -> Callable[[], None]:
        return self.engine.observe(observer, keyspaces)

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
