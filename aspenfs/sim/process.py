"""One life of a simulated node: the real replica, Raft core, state machine and log, and a loop around them.

Belongs here: starting from what the disk has, the loop, what the replica asks of its owner, applying, taking
over snapshots. What a process does is told to the cluster's `Invariants` as it becomes true. Not here: what
outlives it (`machine.py`), who sends what where (`network.py`), what clients are given (`serving.py`).

Every call into a process goes through `Process.do`, which stands for the loop of the real host: a process
that is stopped does it later, one that is dead never. An exception that the real host would end the process
for ends it here; one that nobody foresaw ends the simulation.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

from aspenfs.cluster.messages import CAMPAIGN_TRANSFER, Message, MessageType
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.types import Configuration, Entry, HardState, Role, Snapshot
from aspenfs.errors import AspenError, Corrupt, StorageError
from aspenfs.kv.engine import Engine
from aspenfs.kv.state import Effect
from aspenfs.kv.types import Event
from aspenfs.limits import NOTICE_MS, TICK_MS
from aspenfs.runtime import recovery
from aspenfs.runtime.applier import Applier
from aspenfs.runtime.consensus import META_TERM, Consensus
from aspenfs.runtime.statedb import StateDb
from aspenfs.runtime.syncer import Syncer
from aspenfs.runtime.wal import Wal
from aspenfs.sim.clock_exchange import ClockExchange
from aspenfs.sim.disk import SimulatedCrash
from aspenfs.sim.invariants import Violation
from aspenfs.sim.scheduler import MS
from aspenfs.sim.scheduler import Event as Planned
from aspenfs.sim.state import Image, configuration_of, term_of
from aspenfs.sim.threads import Signal, Task

if TYPE_CHECKING:
    from aspenfs.sim.machine import Machine

CLUSTER_ID: Final = bytes(range(16))
_IDLE_TICK_NS: Final = 250 * MS  # of a node alone, as `runtime/consensus.py`


class _Evaluated:
    """Stands for the applier of the host, and notes what each entry did until that was reported."""

    def __init__(self) -> None:
        self.effects: dict[int, Sequence[Effect]] = {}
        self.events: dict[int, Sequence[Event]] = {}

    def add(self, index: int, effects: Sequence[Effect]) -> None:
        """As `Applier.add`."""
        self.effects[index] = effects

    def checkpoint(self, index: int) -> None:
        """As `Applier.checkpoint`: states are compared at every entry here."""

    def changed(self, index: int, events: Sequence[Event], origin: object) -> None:
        """An observer of the engine."""
        self.events[index] = events


class Process(Consensus):
    """One life of a node: `runtime.consensus.Consensus` over simulated disk, network and time."""

    def __init__(self, machine: "Machine") -> None:
        self.machine, self.cluster, self.node = machine, machine.cluster, machine.node
        self.invariants, self.scheduler = self.cluster.invariants, self.cluster.scheduler
        self.settings = self.cluster.settings
        self.alive, self.paused = True, False
        self._deferred: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._sync_number = 0  # of the sync under way: what comes late from an earlier one is ignored
        self._sync_again = False
        self._platters: Planned | None = None  # when it is done
        self._when_committed: list[tuple[int, Callable[[], object]]] = []
        self.deaths: list[Callable[[], object]] = []  # called when the process ends
        self.tasks: list[Task] = []
        self.evaluated = _Evaluated()
        state = machine.state
        wal = Wal.open(machine.disk, "wal", CLUSTER_ID, segment_bytes=self.settings.segment_bytes,
                       background=False)  # fmt: skip
        if machine.reset_at is not None:
            self._reset_log(wal, machine.reset_at)
        applied = state.applied_index
        if not wal.first_index - 1 <= applied <= wal.last_index:
            cause = f"the log has {wal.first_index} to {wal.last_index}, the state is at {applied}"
            raise Corrupt("wal", 0, cause, "see runtime/recovery.py")
        entries = [Entry(one.term, one.index, one.kind, one.payload) for one in wal.replay(wal.first_index)]
        self.engine = engine = Engine(state, machine.clock, _Entropy(machine), Signal, index=applied)
        engine.observe(self.evaluated.changed)
        self.wal = wal
        configuration = configuration_of(state)
        super().__init__(wal, engine, cast(Applier, self.evaluated), cast(Syncer, self), self._stops,
                         [(applied, term_of(state))], configuration)  # fmt: skip
        self.run_inline = False
        self.snapshot_wanted = self._fetch
        self.invariants.started(self.node, wal.first_index - 1, entries, hard_state_of(wal), applied,
                                term_of(state), configuration,
                                0 if machine.incarnation == 1 else machine.clock.monotonic_ns())  # fmt: skip
        self.invariants.check_state(self.node, state, applied)
        self.alone_at_start = configuration == Configuration((self.node,))
        found = recovery.replay(wal, "wal", cast(StateDb, state), engine, cast(Applier, self.evaluated),
                                cast(Syncer, self), None, alone=self.alone_at_start,
                                note_term=self.note_term)  # fmt: skip
        self._decided([entry for entry in entries if applied < entry.index <= engine.revision])
        self.raft = self._make_raft(configuration, found.tail)
        self.replica = self.settings.make_replica(
            self.raft, self, machine.clock.monotonic_ns, incarnation=machine.incarnation,
            proposal_timeout_ms=self.settings.proposal_timeout_ms)  # fmt: skip
        self.clocks = ClockExchange(self)
        self.replica.leases_allowed = self.clocks.rates.leases_allowed
        self._quietly = not found.tail and not configuration.learners

    def _decided(self, entries: Sequence[Entry]) -> None:
        """A node alone says itself what is committed: all that its log still has."""
        if entries:
            self.invariants.decides(self.node, entries[-1].index)
        for entry in entries:
            self.report(entry)

    def _make_raft(self, configuration: Configuration, tail: Sequence[Entry]) -> Raft:
        """As `NodeStore` does it."""
        revision = self.engine.revision
        written, last_term = hard_state_of(self.wal), tail[-1].term if tail else self.term_at(revision)
        hard = HardState(max(written.term, last_term), written.vote if written.term >= last_term else 0)
        return self.settings.make_raft(
            self.node, configuration, hard_state=hard, entries=tail, base_index=revision,
            base_term=self.term_at(revision), applied=revision, random=self.machine.rng.randrange,
            fresh=self._fresh)  # fmt: skip

    @property
    def _fresh(self) -> bool:
        return self.machine.incarnation == 1

    def begin(self) -> None:
        self._plan_tick()
        self._plan_flush()
        self.clocks.begin()
        if self._only_voter():
            self.do(self._campaign)

    def _campaign(self) -> None:
        self.raft.campaign(quietly=self._quietly)
        self.look()
        self.replica.pump()

    def run_hooks(self) -> None:
        """As `Syncer.run_hooks`: nothing is named by entries here that must be durable before them."""

    def described(self) -> str:
        raft = self.raft
        return (f"term={raft.term} {raft.role.name} log={raft.last_index} commit={raft.commit} "
                f"revision={self.engine.revision} state={self.machine.state.applied_index}")  # fmt: skip

    # --- the loop ---

    def do(self, action: Callable[..., object], *arguments: Any) -> None:
        """`action` in this process, now or when it goes on."""
        if not self.alive:
            return
        if self.paused:
            self._deferred.append((action, arguments))
            return
        try:
            action(*arguments)
            if self.alive:
                self.look()
        except SimulatedCrash:
            self.machine.down(self.machine.power)
        except StorageError as error:
            self._stops(error)
        except (Violation, AssertionError):
            raise
        except AspenError as error:
            raise Violation("refused", f"node {self.node} refuses what was sent or done: {error}") from error

    def _stops(self, error: BaseException) -> None:
        """What the real host ends the process for."""
        if not isinstance(error, StorageError):
            raise error
        self.cluster.trace(f"node {self.node} stops: {error}")
        self.machine.down(power=False)

    def over(self) -> None:
        """The process has ended: whoever waits for it gets no answer any more."""
        for task in self.tasks:
            task.cancel()
        deaths, self.deaths = self.deaths, []
        for tell in deaths:
            tell()

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        """Goes on; what came meanwhile is done in order, and one tick in the place of many."""
        if not self.alive or not self.paused:
            return
        self.paused = False
        deferred, self._deferred = self._deferred, deque()
        for action, arguments in deferred:
            self.do(action, *arguments)

    def look(self) -> None:
        """Tells what the core is now."""
        raft = self.raft
        if self.invariants.looked_at(self.node, raft.role, raft.term, raft.commit, raft.configuration):
            self.cluster.elected(self)

    def _plan_tick(self) -> None:
        own = _IDLE_TICK_NS if self.replica.alone else TICK_MS * MS
        late = self.machine.rng.randrange(2 * MS)
        self.scheduler.after(self.machine.clock.virtual_ns(own) + late, self._tick_due, "tick")

    def _tick_due(self) -> None:
        if self.paused:
            # A timer of a stopped process is looked at when the process goes on.
            if all(one != self._tick_when_resumed for one, _ in self._deferred):
                self._deferred.append((self._tick_when_resumed, ()))
            return
        self._tick_when_resumed()

    def _tick_when_resumed(self) -> None:
        if not self.alive:
            return
        self.do(self._ticked)
        if self.alive:
            self._plan_tick()

    def _ticked(self) -> None:
        if not self.replica.alone:
            self.replica.tick()

    def deliver(self, sender: int, message: Message) -> None:
        self.do(self._take, message)

    def _take(self, message: Message) -> None:
        raft = self.raft
        term, vote = raft.term, raft._vote
        self.replica.receive(message)
        own_ns = self.machine.clock.monotonic_ns()
        self.invariants.received(self.node, message, raft.term, own_ns)
        if message.type == MessageType.VOTE and message.context != CAMPAIGN_TRANSFER:
            voted = (raft.term, raft._vote)
            if voted == (message.term, message.sender) and voted != (term, vote) and not self._only_voter():
                self.invariants.grants(self.node, message.sender, term, own_ns)
        if raft.role is Role.LEADER:  # a follower has not yet written what it was just told is committed
            self.look()
        self.replica.pump()

    def _only_voter(self) -> bool:
        return self.raft.configuration.voters == (self.node,) and not self.raft.configuration.outgoing

    # --- Owner: each of these is an effect, and the process may end in any of them ---

    def _effect(self) -> None:
        machine = self.machine
        if machine.crash_in is not None:
            machine.crash_in -= 1
            if machine.crash_in <= 0:
                raise SimulatedCrash

    def write(
        self, truncate_after: int | None, entries: Sequence[Entry], hard_state: HardState | None
    ) -> int:
        self._effect()
        if truncate_after is not None:
            self.invariants.truncates(self.node, truncate_after, self.raft.role)
        ticket = super().write(truncate_after, entries, hard_state)
        self.invariants.wrote(self.node, entries, hard_state, self.raft.role)
        self._effect()
        return ticket

    def request(self) -> None:
        """As `Syncer.request`."""
        if self.machine.thread.busy:
            self._sync_again = True
        else:
            self._sync_again = False
            self._sync_number += 1
            self.invariants.sync_started(self.node)
            self.machine.thread.begin(self.wal.sync)
            self._sync_goes_on(self._sync_number, self.ticket)

    def request_sync(self) -> None:
        self.request()

    def remind(self) -> None:
        self.scheduler.after(NOTICE_MS * MS, lambda: self.do(self.replica.reminded), "remind")

    def _sync_goes_on(self, number: int, ticket: int) -> None:
        machine = self.machine
        if machine.thread.busy:
            due = max(self.scheduler.now_ns + self.cluster.sync_ns(), machine.stall_until_ns)
            self._platters = self.scheduler.at(due, lambda: self._platters_done(number, ticket), "disk")
        else:
            self.scheduler.after(0, lambda: self.do(self._sync_ended, number, ticket), "synced")

    def end_stall(self) -> None:
        """A sync that hangs ends now."""
        if self._platters is not None and self._platters.action is not None:
            self.scheduler.at(self.scheduler.now_ns, self._platters.action, "disk")
            self._platters.cancel()

    def _platters_done(self, number: int, ticket: int) -> None:
        if self.alive and number == self._sync_number:
            self.machine.thread.go_on()
            self._sync_goes_on(number, ticket)

    def _sync_ended(self, number: int, ticket: int) -> None:
        if number != self._sync_number:
            return
        index = self.machine.thread.result()
        self._sync_number += 1
        self.invariants.sync_ended(self.node)
        self.replica.synced(ticket, index)
        if self._sync_again:
            self.request()

    def send(self, to: int, message: Message) -> None:
        self._effect()
        own_ns = self.machine.clock.monotonic_ns()
        if message.commit > self.invariants.node(self.node).commit:
            self.look()
        if message.type == MessageType.PRE_VOTE_RESP and not message.reject:
            given = (self.raft.term, self.raft._vote) == (message.term, to)  # what it promised, it may repeat
            if not given and not self._only_voter():
                self.invariants.grants(self.node, to, self.raft.term, own_ns)
        self.invariants.sent(self.node, message)
        self.cluster.network.send(self.node, to, message)

    def apply(self, entry: Entry, context: object) -> object:
        self._effect()
        self.look()
        result = super().apply(entry, context)
        self.report(entry)
        return result

    def report(self, entry: Entry, *, accepted: bool = False) -> None:
        """`entry` was just evaluated; `accepted`: ahead of its commit, by a node alone."""
        effects = self.evaluated.effects.pop(entry.index, ())
        events = self.evaluated.events.pop(entry.index, ())
        if self.invariants.applies(self.node, entry, effects, accepted=accepted):
            self.cluster.first_applied(entry, events)

    def apply_configuration(self, entry: Entry, configuration: Configuration) -> None:
        self._effect()
        self.look()
        super().apply_configuration(entry, configuration)
        self.report(entry)
        if self.invariants.configurations.setdefault(entry.index, configuration) != configuration:
            raise Violation("state-machine-safety", f"node {self.node}: {configuration} at {entry.index}")

    def committed(self, index: int) -> None:
        self._effect()
        super().committed(index)
        self._tell_committed()

    def _tell_committed(self) -> None:
        committed = self.engine.committed_revision
        due = [call for index, call in self._when_committed if index <= committed]
        self._when_committed = [one for one in self._when_committed if one[0] > committed]
        for call in due:
            call()

    def when_committed(self, index: int, call: Callable[[], object]) -> None:
        if index <= self.engine.committed_revision:
            call()
        else:
            self._when_committed.append((index, call))


    # --- the state behind the log ---

    def _plan_flush(self) -> None:
        self.scheduler.after(self.cluster.flush_ns(), lambda: self._flush_due(), "flush")

    def _flush_due(self) -> None:
        if self.alive:
            if not self.paused:
                self.do(self._flush)
            self._plan_flush()

    def _flush(self) -> None:
        """As applier and host: committed effects into the state, the log trimmed behind what is durable."""
        machine, state, engine = self.machine, self.machine.state, self.engine
        upto = engine.committed_revision
        if upto > state.applied_index:
            self._effect()
            state.apply(engine.overlay.pending(upto), upto, self.meta_at(upto))
            engine.overlay.settle(upto)
        elif state.durable_index < upto or machine.rng.random() < 0.3:
            state.sync()
        durable = state.durable_index
        self.invariants.state_synced(self.node, durable)
        self._effect()
        if durable:
            self.state_is_at(durable)
            self.wal.trim(durable + 1)
            keep = self.settings.keep_entries
            if durable - keep > self.raft.log.compacted:
                self.raft.compact(durable - keep)

    # --- snapshots ---

    def _fetch(self, snapshot: Snapshot, leader: int) -> None:
        delay = self.cluster.transfer_ns() // 4
        self.scheduler.after(delay, lambda: self.do(self._fetch_open, snapshot, leader), "snapshot")

    def _fetch_open(self, snapshot: Snapshot, leader: int) -> None:
        source = self.cluster.source(leader, self.node)
        if source is None or source.machine.state.applied_index < snapshot.index:
            self._fetch_failed()
            return
        image = source.machine.state.image()
        self.scheduler.after(self.cluster.transfer_ns(),
                             lambda: self.do(self._fetched, image, source), "snapshot")  # fmt: skip

    def _fetched(self, image: Image, source: "Process") -> None:
        if self.cluster.source(source.node, self.node) is source:
            self._install(image)
        else:
            self._fetch_failed()

    def _fetch_failed(self) -> None:
        self.replica.snapshot_failed()
        self.replica.pump()

    def _install(self, image: Image) -> None:
        """The state is replaced in one durable step, then the log; a start in between finishes it."""
        machine = self.machine
        index, term = image.applied_index, int.from_bytes(image.meta[META_TERM], "big")
        if index <= self.engine.revision:
            self._fetch_failed()
            return
        self._sync_number += 1
        while machine.thread.busy:  # a sync under way ends first; the one below covers it
            machine.thread.go_on()
        self._effect()
        machine.state.become(image)
        machine.reset_at = index
        self.invariants.check_state(self.node, machine.state, index)
        self.invariants.state_synced(self.node, index)
        self._effect()
        self._reset_log(self.wal, index)
        self.invariants.snapshot_installed(self.node, index, term)
        self._effect()
        self.engine.rebase(index)
        snapshot = Snapshot(index, term, configuration_of(machine.state))
        self.rebase(snapshot, keeps_log=False)
        self.cluster.trace(f"node {self.node} installs a snapshot of {index}")
        self.replica.snapshot_installed(snapshot)
        self._tell_committed()
        self.request()  # what waited for the sync under way waits for this one

    def _reset_log(self, wal: Wal, index: int) -> None:
        if (wal.first_index, wal.last_index) != (index + 1, index):
            wal.reset(index)
        self.invariants.sync_started(self.node)
        wal.sync()
        self.invariants.sync_ended(self.node)
        self.machine.reset_at = None


class _Entropy:
    def __init__(self, machine: "Machine") -> None:
        self._rng = machine.rng

    def random_bytes(self, size: int) -> bytes:
        return self._rng.randbytes(size)


def hard_state_of(wal: Wal) -> HardState:
    found = wal.hard_state
    return HardState(found[0], int.from_bytes(found[1], "little")) if found else HardState(0, 0)
