"""What must be true of a cluster at every moment, whoever has crashed, and who finds out when it is not.

Belongs here: a record of everything that nodes wrote, made durable, said, committed and applied, kept by
somebody who sees all of it and forgets nothing; and the checks of each new fact against that record (Raft
figure 3, §5-6). Not here: histories of clients (`linearizability.py`, `revisions.py`), causing trouble
(`faults.py`).

Nodes report facts in the order in which they become true; a report that contradicts the record raises
Violation, which names the check. What is durable is known from the syncs that ended, never from what a node
believes.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Final, NamedTuple

from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.types import Configuration, Entry, EntryKind, HardState, Role
from aspenfs.kv import records
from aspenfs.kv.state import Effect, State
from aspenfs.kv.types import Record
from aspenfs.limits import ELECTION_TICKS, TICK_MS
from aspenfs.sim.scheduler import MS

# A node that heard from its leader grants no vote for so long, by its own clock; a tick may be cut short.
_FROM_LEADER: Final = frozenset((MessageType.APP, MessageType.HEARTBEAT, MessageType.SNAP))
STICKY_NS: Final = (ELECTION_TICKS - 1) * TICK_MS * MS


class Violation(Exception):
    """The cluster broke a promise. `check` is a name for machines, the message says what happened."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(f"{check}: {message}")
        self.check = check


class Written(NamedTuple):
    """What an entry is, wherever it is found: (index, term) names it (log matching, Raft §5.3)."""

    term_before: int
    kind: int
    digest: bytes


class _Begun:
    """A proposal that has its place, and the oldest read elsewhere that was asked for behind it."""

    __slots__ = ("node", "seen_as_of", "succeeds", "term")

    def __init__(self, node: int, term: int, succeeds: bool | None) -> None:
        self.node, self.term, self.succeeds = node, term, succeeds
        self.seen_as_of = 1 << 63


class NodeRecord:
    """One node's log and promises, as they must be, across all its lives."""

    def __init__(self) -> None:
        self.terms: dict[int, int] = {}  # of the log's entries, by index; those before `base` may lack
        self.base = 0  # the log begins after it
        self.last = 0
        self.durable = 0  # entries up to this one are on the platters
        self.covered = 0  # those that the sync under way will make durable
        self.state_durable = 0  # and all up to this one are in the durable state
        self.hard = self.hard_durable = self.hard_covered = HardState(0, 0)
        self.commit = 0
        self.applied = 0
        self.role = Role.FOLLOWER
        self.voters = Configuration(())  # as it was when the commit index was last looked at
        # Of this life:
        self.started_ns = self.heard_ns = 0  # by its own clock; heard: from a leader of its term
        self.heard_term = 0
        self.committed_own_term = 0  # the last term in which it saw an entry of that term committed

    def holds_durably(self, index: int, term: int) -> bool:
        if index <= self.state_durable:
            return True
        return index <= self.durable and self.terms.get(index) == term


class Invariants:
    """The record of a whole cluster; see the head of this file.

    Checks named in `ignored` find nothing, to see whether those behind them find what they would have."""

    def __init__(self, ignored: frozenset[str] = frozenset()) -> None:
        self._ignored = ignored
        self.nodes: dict[int, NodeRecord] = {}
        self.leaders: dict[int, int] = {}  # term -> node
        self.written: dict[tuple[int, int], Written] = {}
        self.told: set[tuple[int, int]] = set()  # those of `written` that were sent to anybody
        self.committed: dict[int, int] = {}  # index -> term
        self.commit = 0
        self._committed_in: list[int] = []  # by index, from 1: the term of the leader that committed it
        self.applied: dict[int, bytes] = {}  # index -> digest of entry and effects
        self.applied_index = 0
        self.configurations: dict[int, Configuration] = {}  # index -> as of that entry
        self.votes: dict[tuple[int, int], int] = {}  # (term, voter) -> candidate
        self.pre_votes: dict[tuple[int, int], set[int]] = {}  # (term to come, candidate) -> voters
        self.called: set[tuple[int, int]] = set()  # (term, node) that was told to stand for election at once
        self._accepting = 0  # who last evaluated ahead of its disk
        self.acknowledged = 0  # the highest revision of which any client was told
        self._begun: dict[int, _Begun] = {}  # proposals that have their place, by number
        self._begun_count = 0
        self._held: dict[int, int] = {}  # index -> term of entries that a majority had, as somebody was told
        self._state_sums: list[int] = [0]  # by index: sum of the hashes of all rows of the state
        self._state: dict[bytes, int] = {}  # key -> hash of its row
        self._undo: list[list[tuple[bytes, int]]] = []  # by index, from 1: keys and the hashes they had

    def _wrong(self, check: str, message: str) -> None:
        if check not in self._ignored:
            raise Violation(check, message)

    def node(self, node: int) -> NodeRecord:
        return self.nodes.setdefault(node, NodeRecord())

    # --- the log and the disk ---

    def wrote(self, node: int, entries: Sequence[Entry], hard_state: HardState | None, role: Role) -> None:
        """Into the log of `node`; nothing of it is durable yet."""
        record = self.node(node)
        if hard_state is not None:
            self._voted(node, record, hard_state)
        for entry in entries:
            self._appended(node, record, entry)
        if role is Role.LEADER and any(entry.kind == EntryKind.CONFIGURATION for entry in entries):
            self._configuration_proposed(node, record)

    def truncates(self, node: int, after: int, role: Role) -> None:
        """It is about to: from here on, nothing above `after` needs to be found there."""
        record = self.node(node)
        if after >= record.last:
            return
        if role is Role.LEADER:
            self._wrong("leader-append-only", f"leader {node} truncates its log after {after}")
        for index in range(max(after, record.base) + 1, min(record.last, self.commit) + 1):
            if record.terms.get(index) == self.committed[index]:
                self._wrong("committed-kept", f"node {node} truncates committed entry {index}")
        for index in range(after + 1, record.last + 1):
            record.terms.pop(index, None)
        record.last = after
        record.durable = min(record.durable, after)
        record.covered = min(record.covered, after)

    def _voted(self, node: int, record: NodeRecord, hard: HardState) -> None:
        before = record.hard
        if hard.term < before.term:
            self._wrong("term-monotone", f"node {node} goes from term {before.term} to {hard.term}")
        if hard.term == before.term and before.vote and hard.vote != before.vote:
            self._wrong("vote-kept", f"node {node} changes its vote in term {hard.term}")
        record.hard = hard

    def _vote(self, node: int, term: int, candidate: int) -> None:
        earlier = self.votes.setdefault((term, node), candidate)
        if earlier != candidate:
            both = f"{earlier} and {candidate}"
            self._wrong("one-vote-a-term", f"node {node} votes for {both} in term {term}")

    def _appended(self, node: int, record: NodeRecord, entry: Entry) -> None:
        index = entry.index
        if index != record.last + 1:
            self._wrong("log-contiguous", f"node {node} writes entry {index} behind {record.last}")
        before = record.terms.get(index - 1, 0)
        if entry.term < before:
            self._wrong("log-terms", f"node {node}: term {entry.term} at {index} follows term {before}")
        digest = blake2b(entry.data, digest_size=8).digest()
        written = Written(before, entry.kind, digest)
        known = self.written.setdefault((index, entry.term), written)
        # What precedes the first entry after a snapshot may not be known here.
        if known != written and not (index - 1 == record.base and known[1:] == written[1:]):
            self._wrong("log-matching", f"node {node} has another entry {index} of term {entry.term}")
        record.terms[index] = entry.term
        record.last = index

    def _configuration_proposed(self, node: int, record: NodeRecord) -> None:
        pending = [index for index in range(self.commit + 1, record.last + 1)
                   if self.written[index, record.terms[index]].kind == EntryKind.CONFIGURATION]  # fmt: skip
        if len(pending) > 1:
            self._wrong("one-configuration", f"leader {node} has uncommitted configurations at {pending}")
        term = record.terms[record.last]
        alone = record.voters.voters == (node,) and not record.voters.outgoing
        if pending and record.committed_own_term != term and not alone:
            self._wrong("configuration-after-commit",
                            f"leader {node} changes it before it committed in term {term}")  # fmt: skip

    def sync_started(self, node: int) -> None:
        record = self.node(node)
        record.covered, record.hard_covered = record.last, record.hard

    def sync_ended(self, node: int) -> None:
        record = self.node(node)
        record.durable = max(record.durable, record.covered)
        record.hard_durable = max(record.hard_durable, record.hard_covered)

    def state_synced(self, node: int, index: int) -> None:
        self.node(node).state_durable = index

    def snapshot_installed(self, node: int, index: int, term: int) -> None:
        """The state is durably that of `index`, and the log begins behind it, durably."""
        record = self.node(node)
        if self.committed.get(index) != term:
            self._wrong("snapshot-committed", f"node {node} takes a snapshot of {index} in term {term}")
        for after in range(index + 1, min(record.last, self.commit) + 1):
            if record.terms.get(after) == self.committed[after]:
                self._wrong("committed-kept",
                                f"node {node} drops committed {after} for a snapshot of {index}")  # fmt: skip
        record.terms = {index: term}
        record.base = record.last = record.durable = record.covered = index
        record.state_durable = index
        record.applied = max(record.applied, index)

    # --- lives ---

    def started(self, node: int, base: int, entries: Sequence[Entry], hard: HardState, applied: int,
                applied_term: int, configuration: Configuration, own_ns: int) -> None:  # fmt: skip
        """A life begins with what was found on the disk: the log's `entries`, which begin behind `base`,
        and a state. All that was durable must be there. `own_ns` 0: no life before could have promised
        anybody anything."""
        record = self.node(node)
        if hard < record.hard_durable:
            self._wrong("term-monotone", f"node {node} forgot {record.hard_durable}, it has {hard}")
        if applied < record.state_durable:
            self._wrong("state-durable", f"node {node} lost its state of {record.state_durable}")
        before, durable = record.terms, record.durable
        # What the log does not go back to is in the state, or the check of that says so.
        record.terms = {index: its for index, its in before.items() if index <= base}
        if base == applied:
            record.terms[base] = applied_term
        record.base = record.last = base
        for entry in entries:
            self._appended(node, record, entry)
        if self._accepting == node:
            self._forget_accepted(record.last)
        for index, its in before.items():
            if index > record.last and (index, its) not in self.told:
                # Nobody else ever knew of it, nor of that term, perhaps: it may come again, as another.
                self.written.pop((index, its), None)
        if record.last < durable:
            self._wrong("log-durable", f"node {node} lost entries {record.last + 1} to {durable}")
        for index in range(base + 1, min(durable, record.last) + 1):
            if record.terms[index] != before.get(index):
                self._wrong("log-durable", f"node {node} has another entry {index} than the durable one")
        if applied > record.last:
            self._wrong("applied-in-log", f"node {node}: state of {applied}, log up to {record.last}")
        expected = self.configuration_at(applied)
        if configuration != expected:
            self._wrong("configuration-kept", f"node {node} starts at {applied} with {configuration}, "
                                                  f"it was {expected}")  # fmt: skip
        record.durable = record.covered = record.last
        record.hard = record.hard_durable = record.hard_covered = hard
        record.commit, record.applied, record.role = applied, applied, Role.FOLLOWER
        record.voters = configuration
        record.started_ns, record.heard_ns, record.heard_term = own_ns, 0, 0
        record.committed_own_term = 0

    def decides(self, node: int, upto: int) -> None:
        """The only voter starts, and calls committed what its log has, durably."""
        record = self.node(node)
        for index in range(record.commit + 1, upto + 1):
            if index > self.commit:
                self._newly_committed(index, record.terms[index], record.hard.term, record.voters)
            elif self.committed[index] != record.terms[index]:
                self._wrong("state-machine-safety", f"node {node} decides on another {index}")
        record.commit = upto

    def configuration_at(self, index: int) -> Configuration:
        """As of that entry."""
        return self.configurations[max(at for at in self.configurations if at <= index)]

    # --- saying ---

    def sent(self, node: int, message: Message) -> None:
        """What `node` says is a promise: it must be true of its disk."""
        kind = message.type
        record = self.node(node)
        if kind == MessageType.APP_RESP and not message.reject and message.term >= record.hard.term:
            # To a leader of an earlier term it tells what was on the disk, and may be void by now. That does
            # no harm: the one that made it void could not have been elected, had a majority written it.
            if message.index > max(record.durable, record.state_durable):
                self._wrong("ack-durable", f"node {node} acknowledges {message.index}, "
                                               f"durable is {record.durable}")  # fmt: skip
        elif kind == MessageType.VOTE_RESP and not message.reject:
            if record.hard_durable < (message.term, message.to):
                self._wrong("vote-durable", f"node {node} votes for {message.to} in term {message.term}, "
                                                f"durable is {record.hard_durable}")  # fmt: skip
            self._vote(node, message.term, message.to)
        elif kind == MessageType.VOTE:
            if record.hard_durable < (message.term, node):
                self._wrong("vote-durable", f"node {node} stands in term {message.term}, "
                                                f"durable is {record.hard_durable}")  # fmt: skip
            self._vote(node, message.term, node)
        elif kind == MessageType.APP:
            self.told.update((entry.index, entry.term) for entry in message.entries)
        elif kind == MessageType.PRE_VOTE_RESP and not message.reject:
            self.pre_votes.setdefault((message.term, message.to), set()).add(node)

    def grants(self, node: int, candidate: int, own_term: int, own_ns: int) -> None:
        """`node`, in `own_term` until now, grants a vote or pre-vote that no leader asked for: no lease
        may rest on it (Raft §6.4.1)."""
        record = self.node(node)
        since = own_ns - record.heard_ns
        if record.heard_term == own_term and since < STICKY_NS:
            self._wrong("stickiness", f"node {node} grants {candidate} a vote "
                                          f"{since // MS} ms after it heard of its leader")  # fmt: skip
        since = own_ns - record.started_ns
        if record.started_ns and since < STICKY_NS:
            self._wrong("stickiness", f"node {node} grants {candidate} a vote "
                                          f"{since // MS} ms after it started")  # fmt: skip

    def received(self, node: int, message: Message, term: int, own_ns: int) -> None:
        """`term` is that of the node after it took the message in."""
        record = self.node(node)
        if message.type == MessageType.TIMEOUT_NOW:
            self.called.add((message.term, node))
        elif message.term == term and message.type in _FROM_LEADER:
            record.heard_ns, record.heard_term = own_ns, term

    def conflict(self, node: int, term: int, leader: int, later: int) -> None:
        """`node` could read under a lease of `term` when `leader` was elected in a later one."""
        self._wrong("lease-conflict", f"node {node} has a lease in term {term} when node {leader} "
                                      f"is elected in term {later}")  # fmt: skip

    # --- roles, commits ---

    def looked_at(self, node: int, role: Role, term: int, commit: int, configuration: Configuration) -> bool:
        """What a node is after something happened to it; True if it has just become leader."""
        record = self.node(node)
        elected = False
        if role is not record.role:
            if role is Role.CANDIDATE or (role is Role.LEADER and record.role is not Role.CANDIDATE):
                self._stands(node, term, configuration)
            if role is Role.LEADER:
                self._elected(node, record, term)
                elected = True
            record.role = role
        if role is not Role.LEADER:
            commit = min(commit, record.last)  # a full disk: it knows of entries that it could not write
        if commit != record.commit:
            self._commits(node, record, role, term, commit, configuration)
        record.voters = configuration
        return elected

    def _stands(self, node: int, term: int, configuration: Configuration) -> None:
        if (term - 1, node) in self.called:
            return
        for_it = self.pre_votes.get((term, node), set()) | {node}
        if not majority(configuration, for_it):
            self._wrong("pre-vote", f"node {node} stands for election in term {term}, "
                                        f"for it were {sorted(for_it)}")  # fmt: skip

    def _elected(self, node: int, record: NodeRecord, term: int) -> None:
        other = self.leaders.setdefault(term, node)
        self._vote(node, term, node)
        if other != node:
            self._wrong("one-leader-a-term", f"nodes {other} and {node} lead in term {term}")
        # What leaders of earlier terms committed. A late leader of an old term may lack later ones.
        last = bisect_left(self._committed_in, term)
        if last > record.base and record.terms.get(last) != self.committed[last]:
            self._wrong("leader-completeness", f"leader {node} of term {term} lacks committed {last}")
        for index, its in self._held.items():
            if its < term and index > record.base and record.terms.get(index) != its:
                # Unless a majority has lost what was not on its disks.
                have = {one for one, other in self.nodes.items() if other.terms.get(index) == its}
                if majority(record.voters, have):
                    self._wrong("held-kept", f"leader {node} of term {term} lacks entry {index}, which "
                                             f"{sorted(have)} hold, as a client was told")  # fmt: skip

    def _commits(self, node: int, record: NodeRecord, role: Role, term: int, commit: int,
                 configuration: Configuration) -> None:  # fmt: skip
        if commit < record.commit:
            self._wrong("commit-monotone", f"node {node} goes back from {record.commit} to {commit}")
        for index in range(max(record.commit, record.base) + 1, commit + 1):
            its = record.terms.get(index)
            if its is None:
                self._wrong("commit-in-log", f"node {node} commits {index}, its log ends with {record.last}")
                break
            known = self.committed.get(index)
            if known is None:
                self._newly_committed(index, its, term, record.voters, configuration)
            elif known != its:
                self._wrong("state-machine-safety", f"{index} is committed in terms {known} and {its}")
        if role is Role.LEADER and record.terms.get(commit) != term:
            self._wrong("commit-own-term", f"leader {node} of term {term} commits {commit} "
                                               f"of term {record.terms.get(commit)} by counting")  # fmt: skip
        record.commit = commit
        record.committed_own_term = max(record.committed_own_term, record.terms.get(commit, 0))

    def _newly_committed(self, index: int, term: int, in_term: int, *configurations: Configuration) -> None:
        """An entry of `term`, by a leader of `in_term`."""
        have = {one for one, record in self.nodes.items() if record.holds_durably(index, term)}
        # The configuration may have changed in the very event in which this was committed.
        if not any(majority(configuration, have) for configuration in configurations):
            self._wrong("commit-durable", f"{index} is committed, on the disks of {sorted(have)} "
                                              f"of {configurations[-1]}")  # fmt: skip
        if index != self.commit + 1:
            self._wrong("commit-contiguous", f"{index} is committed after {self.commit}")
        self.committed[index] = term
        self.commit = index
        self._held.pop(index, None)
        self._committed_in.append(max(in_term, self._committed_in[-1] if self._committed_in else 0))

    # --- applying ---

    def applies(self, node: int, entry: Entry, effects: Sequence[Effect], *, accepted: bool = False) -> bool:
        """`node` evaluated `entry`; True if it was the first one. `accepted`: alone, ahead of its disk."""
        record = self.node(node)
        index = entry.index
        if index != record.applied + 1:
            self._wrong("applied-in-order", f"node {node} applies {index} after {record.applied}")
        if not accepted:
            if self.committed.get(index) != entry.term:
                self._wrong("applied-committed", f"node {node} applies {index} of term {entry.term}, "
                                                     "which is not committed")  # fmt: skip
            if index > max(record.durable, record.state_durable):
                self._wrong("applied-durable",
                                f"node {node} applies {index}, durable is {record.durable}")  # fmt: skip
        else:
            self._accepting = node
        record.applied = index
        digest = blake2b(b"%d %d " % (entry.term, entry.kind), digest_size=16)
        digest.update(entry.data)
        for key, row in effects:
            digest.update(_row_hash(key, row))
        known = self.applied.get(index)
        if known is None:
            self._first(index, digest.digest(), effects)
            return True
        if known != digest.digest():
            self._wrong("state-machine-safety", f"node {node} does something else at {index}")
        return False

    def _first(self, index: int, digest: bytes, effects: Sequence[Effect]) -> None:
        assert index == self.applied_index + 1
        self.applied[index] = digest
        self.applied_index = index
        total = self._state_sums[-1]
        replaced = []
        for key, row in effects:
            before = self._state.pop(key, 0)
            replaced.append((key, before))
            total -= before
            if row is not None:
                self._state[key] = after = int.from_bytes(_row_hash(key, row), "big")
                total += after
        self._state_sums.append(total)
        self._undo.append(replaced)

    def _forget_accepted(self, after: int) -> None:
        """What the only voter had evaluated ahead of its disk, and lost with it."""
        while self.applied_index > max(after, self.commit):
            del self.applied[self.applied_index]
            self.configurations.pop(self.applied_index, None)
            self.applied_index -= 1
            self._state_sums.pop()
            for key, before in reversed(self._undo.pop()):
                if before:
                    self._state[key] = before
                else:
                    self._state.pop(key, None)

    def check_state(self, node: int, state: State, index: int) -> None:
        """A whole state, as it is found on a disk or in a snapshot, is what the log makes up to `index`."""
        total = sum(int.from_bytes(_row_hash(key, row), "big") for key, row in state.items(b"", b""))
        if total != self._state_sums[index]:
            self._wrong("state-hash", f"node {node}: its state of {index} is not what the log says")

    # --- clients ---

    def answered(self, revision: int) -> None:
        """A client was told of this revision."""
        self.acknowledged = max(self.acknowledged, revision)

    def begins(self, node: int, term: int, succeeds: bool | None) -> int:
        """`node`, leader of `term`, has told a client that a proposal has its place; `succeeds`: whether its
        compares hold, if that is known. A number for `begun_applied`, `begun_lost`."""
        self._begun_count += 1
        self._begun[self._begun_count] = _Begun(node, term, succeeds)
        return self._begun_count

    def held(self, index: int, term: int, configuration: Configuration) -> None:
        """A client of the leader of `term` was told that a majority has the log up to `index`."""
        have = {one for one, record in self.nodes.items() if record.terms.get(index) == term}
        if index > self.commit:
            if not majority(configuration, have):
                self._wrong("held-by-majority", f"entry {index} is in the logs of {sorted(have)} only")
            self._held[index] = term

    def begun_lost(self, number: int) -> None:
        """It never was, or nobody knows what became of it."""
        del self._begun[number]

    def begun_applied(self, number: int, revision: int, term: int, succeeded: bool) -> None:
        """It is entry `revision`, of `term`. Under a later term it came again, and promised nothing."""
        begun = self._begun.pop(number)
        if term != begun.term:
            return
        if begun.seen_as_of < revision:
            self._wrong("begun-unseen", f"entry {revision} had its place at node {begun.node}, and a read "
                                        f"elsewhere that came later is as of {begun.seen_as_of}")  # fmt: skip
        if begun.succeeds not in (None, succeeded):
            self._wrong("begun-outcome", f"entry {revision} was to succeed: {begun.succeeds}, and did not so")

    def reads(self) -> int:
        """A client asks for something: the number of what has begun before that."""
        return self._begun_count

    def may_read(self, node: int, revision: int, at_call: int, how: str, begun: int = 0) -> None:
        """`node` answers a linearizable read at `revision`; `at_call` had been acknowledged before it, and
        what has a number up to `begun` had begun."""
        for number, one in self._begun.items():
            if number <= begun and one.node != node:
                one.seen_as_of = min(one.seen_as_of, revision)
        if revision < at_call:
            self._wrong("stale-read", f"{how} at node {node} is answered as of {revision}; "
                                          f"{at_call} had been acknowledged before")  # fmt: skip


def _row_hash(key: bytes, row: Record | None) -> bytes:
    packed = b"" if row is None else records.pack(row)
    return blake2b(key + packed, digest_size=16, key=b"%d" % len(key)).digest()


def majority(configuration: Configuration, nodes: Iterable[int]) -> bool:
    """Whether `nodes` have a majority of each half. Written anew: what is checked must not check itself."""
    some = set(nodes)
    halves = [set(configuration.voters), set(configuration.outgoing)]
    return all(2 * len(half & some) > len(half) for half in halves if half)
