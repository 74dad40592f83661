"""Core: what all parts of a Raft node share: its term, vote and role, its log and members, its outbox.

Raft is one state machine, cut into layers that build on each other; each file is one:

    raft.py         Raft          what its owner calls: step, tick, ready
    following.py    Following     appends, heartbeats and snapshots as they arrive
    election.py     Election      votes, campaigns, stickiness
    leading.py      Leading       proposals, reads, transfers, changes of the configuration
    replication.py  Replication   sending entries, counting answers, committing
    core.py         Core

A layer calls what is below it, never what is above. Names and algorithm are etcd's; docs/design/raft.md
says what is not.
"""

from collections.abc import Callable, Sequence
from typing import Final, NoReturn

from aspenfs import errors
from aspenfs.cluster.log import RaftLog
from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.progress import Inflights, Progress
from aspenfs.cluster.quorum import INFINITY, joint_committed
from aspenfs.cluster.readonly import ReadRounds
from aspenfs.cluster.types import NOBODY, Configuration, Entry, HardState, ReadState, Role, Snapshot

FOLLOWER: Final = Role.FOLLOWER
PRE_CANDIDATE: Final = Role.PRE_CANDIDATE
CANDIDATE: Final = Role.CANDIDATE
LEADER: Final = Role.LEADER

# What is to be done when entries were lost: `_stop`.
LOST_HERE: Final = (
    "This node has lost entries that it had promised to keep: it was started from an old copy of its state "
    "directory, or its disk lost what it had synced. It must not come back under its old id: remove the old "
    "member (`aspen member remove`), empty the directory, and join again with a new ticket (`aspen join`)"
)
LOST_ELSEWHERE: Final = (
    "Probably a node was started from an old copy of its state directory, or a disk lost what it had synced. "
    "Stop all nodes and keep their state directories. Then `aspen recover --force-new-cluster` on the node "
    "that has most, or restore a backup, and let the others join anew with empty directories"
)

_new = tuple.__new__


class Bounds:
    """How much may be under way, in bytes unless it says otherwise."""

    __slots__ = ("append", "inflight", "inflight_messages", "unapplied", "uncommitted")

    def __init__(
        self, append: int, inflight_messages: int, inflight: int, uncommitted: int, unapplied: int
    ) -> None:
        self.append, self.inflight_messages, self.inflight = append, inflight_messages, inflight
        self.uncommitted, self.unapplied = uncommitted, unapplied


class Core:
    """Attributes without an underscore are for others to read."""

    def __init__(self, node_id: int, configuration: Configuration, log: RaftLog, hard_state: HardState, *,
                 election_ticks: int, heartbeat_ticks: int, random: Callable[[int], int], bounds: Bounds,
                 promised: bool) -> None:  # fmt: skip
        """`promised`: an earlier life of this node may have promised a leader its loyalty."""
        self.node_id = node_id
        self.log = log
        self.role = FOLLOWER
        self.term, self._vote = hard_state
        self.leader: int = NOBODY
        self._hard_state = hard_state  # as the owner knows it
        self._bounds = bounds

        self._election_ticks, self._heartbeat_ticks, self._random = election_ticks, heartbeat_ticks, random
        self._election_elapsed = (
            0  # ticks: since a leader was heard or a vote given; a leader's: since a check
        )
        self._heartbeat_elapsed = 0
        self._election_timeout = election_ticks  # this attempt's, drawn anew for each
        # Ticks since a leader was last heard, whatever happened to term and role since: until an election
        # timeout is over, the leader counts on this node not to vote for another (its lease).
        self._contact_elapsed = 0 if promised else election_ticks

        self.configuration = configuration
        self._progress: dict[int, Progress] = {}
        self._votes: dict[int, bool] = {}
        self._restore(configuration)

        # As a leader, in its term:
        self.committed_in_term = False
        self.transferred_in_term = False  # it began a transfer: it must not count on any lease any more
        self._term_start = 0  # index of its first entry
        self._term_unsynced = False  # it was elected by its own vote alone, which is not yet on disk
        self._transferee: int = NOBODY
        self._leaving = 0  # it is no voter any more, and leads until this index is committed
        self._pending_change = 0  # no change of the configuration before this index is applied
        self._reads = ReadRounds()
        self._alone = False  # the only member, and leader
        self._quietly = False  # if so, its term needs no entry of its own
        self._append_due = False  # somebody may be sent something
        # As a leader, until the owner says `tell`: what is committed goes with the next append only, and what
        # is appended does not go to those who can wait for it.
        self.tells_late = False
        self.can_wait: Sequence[int] = ()
        self._held_wanted = 0  # up to this entry somebody wants to know of it before it is on disk: `held`
        self._cuts: dict[int, list[Entry]] = {}  # entries of this turn's appends, by the index of the first
        self._snapshot: Snapshot | None = None  # which the owner offers to others

        # As a follower:
        self._acknowledgement = 0  # due to the leader
        self._acknowledged = 0  # the highest one that the leader got in this term
        self._wanted: Snapshot | None = None  # is being fetched
        self._wanted_due = False  # the owner does not know yet
        self.suspended = False  # set by the owner: its state is not to be built upon, nothing is handed out
        self.stopped: errors.EntriesLost | None = None  # if so, nothing is taken in or handed out any more

        self._messages: list[Message] = []
        self._messages_after_sync: list[Message] = []
        self._read_states: list[ReadState] = []
        self._reset(self.term)

    # --- members ---

    def _restore(self, configuration: Configuration) -> None:
        """Takes `configuration` as it is, with nothing known of its members."""
        self.configuration = configuration
        self._progress = {node: self._new_progress() for node in sorted(set().union(*configuration[:4]))}

    def _new_progress(self) -> Progress:
        """A new member's: active at first, so that a check of the quorum gives it time to answer."""
        inflights = Inflights(self._bounds.inflight_messages, self._bounds.inflight)
        return Progress(max(self.log.last_index, 1), inflights, recently_active=True)

    @property
    def _is_voter(self) -> bool:
        return self.node_id in self.configuration.voters or self.node_id in self.configuration.outgoing

    @property
    def _is_only_voter(self) -> bool:
        """Its own word is a quorum; learners may be there."""
        configuration, alone = self.configuration, (self.node_id,)
        return configuration.voters == alone and configuration.outgoing in ((), alone)

    def _quorum_of(self, figure: Callable[[Progress], int]) -> int:
        """The highest value of `figure` that a quorum has reached."""
        progress, configuration = self._progress, self.configuration
        reached = joint_committed(
            [figure(progress[node]) for node in configuration.voters],
            [figure(progress[node]) for node in configuration.outgoing],
        )
        return reached if reached != INFINITY else 0

    def _look_if_alone(self) -> None:
        self._alone = self.role is LEADER and self.configuration == Configuration((self.node_id,))

    # --- roles ---

    def _reset(self, term: int) -> None:
        """Whatever role comes next begins like this."""
        if term != self.term:
            self.term = term
            self._vote = NOBODY
        self.leader = NOBODY
        self._election_elapsed = self._heartbeat_elapsed = 0
        self._draw_timeout()
        self._votes = {}
        self._transferee = NOBODY
        self._leaving = 0
        self._pending_change = 0
        self.committed_in_term = self.transferred_in_term = self._term_unsynced = False
        self._reads.clear()
        self._append_due = False
        self._acknowledgement = self._acknowledged = 0

    def _draw_timeout(self) -> None:
        self._election_timeout = self._election_ticks + self._random(self._election_ticks)

    def _become_follower(self, term: int, leader: int) -> None:
        self._reset(term)
        self.role = FOLLOWER
        self.leader = leader
        self._alone = False

    def _stop(self, cause: str) -> NoReturn:
        """Committed entries are lost, here or elsewhere: this node says and does nothing any more."""
        self.stopped = errors.EntriesLost(cause)
        raise self.stopped

    # --- outbox ---

    def _send(
        self, kind: MessageType, to: int, *, index: int = 0, commit: int = 0, reject: bool = False,
        context: bytes = b"", snapshot: Snapshot | None = None,
    ) -> None:  # fmt: skip
        """A message of this term, sent with the next Ready, at once."""
        self._messages.append(
            _new(
                Message,
                (kind, to, self.node_id, self.term, 0, index, commit, (), reject, 0, context, snapshot),
            )
        )
