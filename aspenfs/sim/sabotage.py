"""Ways to break the cluster on purpose, to see that the checks notice: mistakes that somebody once made.

Belongs here: the broken parts, put in the place of the right ones while a run lasts, and the search for a
seed that shows it. `tests/sim/test_sabotage.py` has each caught; `tools/simulate --sabotage` shows it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from aspenfs.cluster import core, election, leading, replication
from aspenfs.cluster.clock_rates import ClockRates
from aspenfs.cluster.log import RaftLog
from aspenfs.cluster.messages import Message
from aspenfs.cluster.proposing import Proposing
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.reading import Reading
from aspenfs.cluster.replica import Replica
from aspenfs.cluster.replica_base import Done
from aspenfs.cluster.taking import Taking
from aspenfs.cluster.types import Entry, EntryKind, HardState, Ready, Role
from aspenfs.kv import once
from aspenfs.kv.watch import Hub
from aspenfs.runtime.consensus import META_CONFIGURATION, Consensus
from aspenfs.sim import machine
from aspenfs.sim.faults import Swarm
from aspenfs.sim.process import Process
from aspenfs.sim.scheduler import MS
from aspenfs.sim.simulation import Plan, Result, plan, run
from aspenfs.sim.workload import Mix

Patch = tuple[Any, str, Any]  # (owner, name of its attribute, what is there meanwhile)

_TROUBLE: Final = ("crash", "crash_in_effect", "blackout", "pause", "partition", "lossy", "reset", "transfer")
_READERS: Final = Mix(clients=3, read=500, think_ns=30 * MS)
_WRITERS: Final = Mix(clients=6, names=2, dedup=0.0, create=40, unlink=40, rename=40, think_ns=5 * MS)
_MEMBERS: Final = ("add", "promote", "demote", "remove", "replace")


@dataclass(frozen=True, slots=True)
class Sabotage:
    """`checks`: by which of them it may be caught. Runs are as the seeds say, but with these faults."""

    name: str
    about: str
    patches: Sequence[Patch]
    checks: frozenset[str]
    kinds: tuple[str, ...] = _TROUBLE
    gap_ns: int = 250 * MS
    nodes: int = 3
    seeds: int = 60
    steps: int = 4_000
    mix: Mix | None = None

    @contextmanager
    def applied(self) -> Iterator[None]:
        before = [(owner, name, owner.__dict__[name]) for owner, name, _ in self.patches]
        try:
            for owner, name, value in self.patches:
                setattr(owner, name, value)
            yield
        finally:
            for owner, name, value in before:
                setattr(owner, name, value)


class Found(NamedTuple):
    result: Result
    runs: int  # until it was found


def search(sabotage: Sabotage, ignored: frozenset[str] = frozenset()) -> Found | None:
    """The first seed that shows it, to the checks that are not `ignored`; None if no seed does."""
    with sabotage.applied():
        for number in range(1, sabotage.seeds + 1):
            chosen = adjusted(plan(number, sabotage.steps, sabotage.nodes), sabotage)
            settings = replace(chosen.settings, ignored_checks=ignored)
            result = run(replace(chosen, settings=settings))
            if result.failed:
                return Found(result, number)
    return None


def adjusted(chosen: Plan, sabotage: Sabotage) -> Plan:
    mix = sabotage.mix or chosen.mix
    return replace(chosen, swarm=Swarm(sabotage.kinds, sabotage.gap_ns), mix=mix)


# --- the broken parts ---


def _acknowledge_before_sync(self: Raft) -> Ready:
    ready = _right_ready(self)
    return ready._replace(messages=[*ready.messages, *ready.messages_after_sync], messages_after_sync=[])


def _count_what_is_written(self: Raft) -> Ready:
    ready = _right_ready(self)
    if ready.entries:
        self.persisted(ready.entries[-1].index, ready.entries[-1].term)
    return ready


def _count_what_is_accepted(self: Raft, kind: int, data: bytes) -> Entry:
    entry = _right_append_alone(self, kind, data)
    self.persisted(entry.index, entry.term)
    return entry


def _forget_vote(self: Raft) -> Ready:
    ready = _right_ready(self)
    if ready.hard_state is None:
        return ready
    return ready._replace(hard_state=HardState(ready.hard_state.term, 0))


def _no_sync_for_votes(self: Raft) -> Ready:
    ready = _right_ready(self)
    if ready.hard_state is not None and not ready.entries:
        return ready._replace(messages=[*ready.messages, *ready.messages_after_sync], messages_after_sync=[])
    return ready


def _no_pre_vote(self: Raft) -> None:
    self.role = Role.PRE_CANDIDATE
    self._campaign()


def _commit_by_counting(self: Raft) -> bool:
    index = self._quorum_of(replication.match)
    if index <= self.log.committed:
        return False
    self.log.commit_to(index)
    self.committed_in_term = self._append_due = True
    return True


def _count_learners(self: Raft, figure: Callable[[Any], int]) -> int:
    progress, configuration = self._progress, self.configuration
    figures = [figure(progress[one]) for one in (*configuration.voters, *configuration.learners)]
    return sorted(figures, reverse=True)[len(configuration.voters) // 2]


def _count_those_who_left(self: Raft, figure: Callable[[Any], int]) -> int:
    """The majority is that of the voters that are left, but anybody's disk will do."""
    configuration = self.configuration
    seen: dict[int, int] = self.__dict__.setdefault("_ever_seen", {})
    for member, progress in self._progress.items():
        seen[member] = figure(progress)
    for member in seen.keys() - self._progress.keys():
        seen[member] = self.log.last_index  # it has always been fast
    return sorted(seen.values(), reverse=True)[len(configuration.voters) // 2]


def _apply_what_is_not_committed(self: RaftLog, bytes_max: int) -> list[Entry]:
    if self.applying >= self.persisted:
        return []
    entries = self.slice(self.applying + 1, self.persisted, bytes_max)
    self.applying = entries[-1].index
    self.committed = max(self.committed, self.applying)
    return entries


def _apply_what_is_not_on_disk(self: RaftLog, bytes_max: int) -> list[Entry]:
    if self.applying >= self.committed:
        return []
    entries = self.slice(self.applying + 1, self.committed, bytes_max)
    self.applying = entries[-1].index
    return entries


def _truncate_whatever_comes(
    self: RaftLog, index: int, log_term: int, entries: Sequence[Entry], term: int
) -> int | None:
    """An old append that arrives late cuts off what came after it."""
    if not self.matches(index, log_term):
        return None
    if index < self.last_index:
        self.committed = min(self.committed, index)  # or the log itself would object
        self.applied = self.applying = min(self.applied, index)
        self._truncate(index, term)
    if entries:
        self.append(entries)
    return index + len(entries)


def _forgotten_promise(self: Raft) -> bool:
    return self.role is Role.LEADER


def _change_at_once(self: Raft, change: Any) -> int:
    committed, self.committed_in_term = self.committed_in_term, True
    try:
        return _right_propose_configuration(self, change)
    finally:
        self.committed_in_term = committed


def _transfer_keeps_lease(self: Raft, to: int) -> None:
    _right_transfer(self, to)
    self.transferred_in_term = False


def _any_leader_reads(self: Replica) -> bool:
    return self.raft.role is Role.LEADER


def _anybody_reads(self: Replica) -> bool:
    return True


def _lease_too_long(self: Replica) -> bool:
    raft = self.raft
    return (raft.role is Role.LEADER and self._lease_term == raft.term and raft.committed_in_term
            and self._now() < self._lease_until_ns + 400 * MS)  # fmt: skip


def _any_clock_will_do(self: ClockRates) -> bool:
    return True


def _propose_again_at_once(self: Replica, message: Message) -> None:
    """A new leader is known: what was sent under the old one is lost, surely."""
    _right_receive(self, message)
    if self.raft.leader and self.raft.term != self._count_term:
        self._term_began(self.raft.term)


def _take_repetitions(self: Replica, message: Message) -> None:
    last = self._taken.get(message.sender, 0)
    repeated = [(int(EntryKind.PROPOSAL), one.data) for one in message.entries if one.index <= last]
    if repeated and self.raft.role is Role.LEADER and message.term == self.raft.term:
        self.raft.propose(repeated)
    _right_take_proposals(self, message)


def _begin_behind_others(self: Replica, command: bytes, context: object, done: Done) -> bool:
    """Whatever others have under way."""
    self._foreign_queued = self._foreign = 0
    return _right_begin(self, command, context, done)


def _forget_configuration(self: Consensus, index: int) -> dict[str, bytes]:
    meta = dict(_right_meta_at(self, index))
    del meta[META_CONFIGURATION]
    return meta


def _keep_log_with_snapshot(self: Process, wal: Any, index: int) -> None:
    """Only the state is replaced."""
    self.machine.reset_at = None


def _by_node(self: Process, entry: Entry, context: object) -> object:
    """Evaluation that depends on where it takes place."""
    if entry.index % 50 == 0 and self.node == 2:
        entry = entry._replace(data=b"")
    return _right_apply(self, entry, context)


def _lose_batches(self: Hub, committed: int, batches: Sequence[Any]) -> None:
    _right_publish(self, committed, batches[1:] if len(batches) > 1 else batches)


_right_ready = Raft.ready
_right_propose_configuration = leading.Leading.propose_configuration
_right_append_alone = leading.Leading.append_alone
_right_transfer = leading.Leading.transfer_leader
_right_receive = Replica.receive
_right_take_proposals = Taking._take_proposals
_right_begin = Proposing.begin
_right_meta_at = Consensus.meta_at
_right_apply = Consensus.apply
_right_publish = Hub.publish

_ALL: Final = (
    Sabotage("ack-before-sync", "acknowledge entries and votes before they are on disk (etcd #14370)",
             [(Raft, "ready", _acknowledge_before_sync)], frozenset({"ack-durable", "vote-durable"})),
    Sabotage("count-unsynced", "a leader counts its own disk before the sync (etcd #14370)",
             [(Raft, "ready", _count_what_is_written),
              (leading.Leading, "append_alone", _count_what_is_accepted)],
             frozenset({"commit-durable", "applied-durable"}), nodes=1),
    Sabotage("forget-vote", "the term is written, the vote is not (Raft §5.2)",
             [(Raft, "ready", _forget_vote)], frozenset({"vote-durable"})),
    Sabotage("vote-before-sync", "no sync for a turn that has but a vote",
             [(Raft, "ready", _no_sync_for_votes)], frozenset({"vote-durable"})),
    Sabotage("no-pre-vote", "a node that was cut off raises its term and deposes the leader (Raft §9.6)",
             [(election.Election, "_pre_campaign", _no_pre_vote)], frozenset({"pre-vote"})),
    Sabotage("commit-by-counting", "an entry of an earlier term is committed by counting (Raft §5.4.2)",
             [(replication.Replication, "_maybe_commit", _commit_by_counting)],
             frozenset({"commit-own-term"}), gap_ns=120 * MS, seeds=400),
    Sabotage("count-learners", "a learner's disk counts for a majority",
             [(core.Core, "_quorum_of", _count_learners)], frozenset({"commit-durable"}),
             kinds=("add", "promote", "demote", "stall", "partition", "slow")),
    Sabotage("count-removed", "a member that left counts for a majority",
             [(core.Core, "_quorum_of", _count_those_who_left)], frozenset({"commit-durable"}),
             kinds=("add", "remove", "stall", "partition", "slow"), nodes=5),
    Sabotage("apply-uncommitted", "what is on this disk is applied",
             [(RaftLog, "take_committed", _apply_what_is_not_committed)],
             frozenset({"applied-committed", "commit-durable", "state-machine-safety", "commit-own-term"})),
    Sabotage("apply-before-disk", "what is committed is applied before it is on this disk",
             [(RaftLog, "take_committed", _apply_what_is_not_on_disk),
              (RaftLog, "has_next_committed", property(lambda self: self.applying < self.committed))],
             frozenset({"applied-durable"})),
    Sabotage("truncate-committed", "a late append truncates what came after it (redis-raft)",
             [(RaftLog, "maybe_append", _truncate_whatever_comes)],
             frozenset({"committed-kept", "commit-monotone", "commit-durable", "applied-in-order",
                        "assertion"}),
             kinds=("lossy", "slow", "reset")),
    Sabotage("no-stickiness", "a node that hears its leader votes for another (Raft §4.2.3)",
             [(election.Election, "_loyal", property(_forgotten_promise))], frozenset({"stickiness"})),
    Sabotage("promise-dies-with-process", "a node that was started again votes at once",
             [(Process, "_fresh", property(lambda self: True))], frozenset({"stickiness"})),
    Sabotage("early-configuration", "a new configuration before a commit of the own term (Ongaro, 2015)",
             [(leading.Leading, "propose_configuration", _change_at_once)],
             frozenset({"configuration-after-commit", "one-configuration"}),
             kinds=("transfer", "transfer", *_MEMBERS), gap_ns=15 * MS),
    Sabotage("lease-through-transfer", "a leader that hands over trusts its lease (braft #366)",
             [(leading.Leading, "transfer_leader", _transfer_keeps_lease)],
             frozenset({"lease-conflict", "stale-read"}), kinds=("transfer", "partition", "slow", "pause")),
    Sabotage("stale-leader-reads", "who believes to lead reads without asking (etcd 0.4, Consul 2014)",
             [(Reading, "read_now", _any_leader_reads)], frozenset({"stale-read"})),
    Sabotage("no-barrier", "everybody reads what is there", [(Reading, "read_now", _anybody_reads)],
             frozenset({"stale-read"})),
    Sabotage("lease-too-long", "the lease outlives the promise that it rests on",
             [(Reading, "_has_lease", _lease_too_long)], frozenset({"lease-conflict", "stale-read"}),
             kinds=("partition", "pause", "transfer")),
    Sabotage("clock-beyond-bound", "clocks run at half or more than their speed, and nobody looks",
             [(machine, "DRIFT_PPM_MAX", 500_000), (ClockRates, "leases_allowed", _any_clock_will_do)],
             frozenset({"lease-conflict", "stale-read"}),
             kinds=("partition",), gap_ns=900 * MS, steps=10_000, mix=_READERS),
    Sabotage("begin-behind-others", "a proposal has its place though others' are before it",
             [(Proposing, "begin", _begin_behind_others)], frozenset({"begun-outcome"}), mix=_WRITERS),
    Sabotage("begun-unseen", "readers elsewhere are answered without what has begun",
             [(Taking, "_begun_index", property(lambda self: 0))], frozenset({"begun-unseen"})),
    Sabotage("held-alone", "a leader says that others have what only its own log has",
             [(replication.Replication, "held", property(lambda self: self.log.last_index))],
             frozenset({"held-by-majority", "held-kept"})),
    Sabotage("propose-again-at-once", "a retry under a new leader, though the first try may yet be applied",
             [(Replica, "receive", _propose_again_at_once)],
             frozenset({"answers", "violation", "assertion"})),
    Sabotage("take-repetitions", "the leader takes a proposal as often as it comes",
             [(Taking, "_take_proposals", _take_repetitions)], frozenset({"answers", "violation"}),
             kinds=("lossy", "slow", "pause")),
    Sabotage("no-dedup", "a client's retry is applied again",
             [(once, "first_result", lambda *_: None)], frozenset({"answers", "violation"})),
    Sabotage("forget-configuration", "the state does not keep the configuration (etcd #14571)",
             [(Consensus, "meta_at", _forget_configuration)], frozenset({"configuration-kept"}),
             kinds=("crash", *_MEMBERS)),
    Sabotage("keep-log-with-snapshot", "a snapshot replaces the state and not the log",
             [(Process, "_reset_log", _keep_log_with_snapshot)],
             frozenset({"assertion", "log-contiguous", "snapshot-log", "start"}),
             kinds=("add", "partition", "pause", "crash")),
    Sabotage("apply-by-node", "applying the same entry does not do the same everywhere",
             [(Consensus, "apply", _by_node)], frozenset({"state-machine-safety"})),
    Sabotage("lose-watch-batches", "a watch leaves out revisions without saying so (etcd #17529)",
             [(Hub, "publish", _lose_batches)], frozenset({"watch"})),
)  # fmt: skip

SABOTAGES: Final[dict[str, Sabotage]] = {one.name: one for one in _ALL}
