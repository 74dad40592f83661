"""What the parts of a replica share: the core, the world around it, who waits, and the words for it.

Belongs here: `Owner`, the state that several parts use. Not here: what they do with it.
"""

from collections.abc import Callable, Sequence
from struct import Struct
from typing import Final, NamedTuple, Protocol

from aspenfs import errors
from aspenfs.cluster.messages import Message
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.types import Configuration, Entry, HardState, Ready, Snapshot

HEADER: Final = Struct("<QQ")  # of a PROPOSAL's payload: node id, number; the command follows
INCARNATION_SHIFT: Final = 40  # a number is incarnation << 40 | count
NS_PER_MS: Final = 1_000_000

Done = Callable[[object], object]  # gets the result of `Owner.apply`, or an AspenError


class Owner(Protocol):
    """What a replica needs of the world. Called by `pump` and `tick` only."""

    @property
    def revision(self) -> int:
        """The last entry that the state machine has evaluated."""

    def write(
        self, truncate_after: int | None, entries: Sequence[Entry], hard_state: HardState | None
    ) -> int:
        """Into the log, in that order, all or nothing: a ticket for `synced`, greater than all before.
        NoSpace: nothing was written, it will be tried again."""

    def request_sync(self) -> None:
        """What was written shall be durable soon; `Replica.synced` tells."""

    def send(self, to: int, message: Message) -> None: ...

    def apply(self, entry: Entry, context: object) -> object:
        """Evaluates an entry of kind NORMAL or PROPOSAL as revision `entry.index`; its result. `context`
        is what `propose` was given if it was proposed here, in this life of the node; else None."""

    def apply_configuration(self, entry: Entry, configuration: Configuration) -> None:
        """`entry` changed the configuration to this, as revision `entry.index`."""

    def committed(self, index: int) -> None:
        """All entries up to this one are committed and evaluated; called once a batch."""

    def remind(self) -> None:
        """Call `Replica.reminded` soon: when others may have been told of a commit by something else."""

    def fetch_snapshot(self, snapshot: Snapshot, leader: int) -> None:
        """Fetch a state of at least that index; then `snapshot_installed`, or `snapshot_failed`."""


class Settings(NamedTuple):
    """Of one life of a node. `now`: CLOCK_BOOTTIME in ns; `batch_bytes`: of proposals that are sent, or go
    into the log, at once."""

    now: Callable[[], int]
    incarnation: int
    timeout_ns: int
    batch_bytes: int


class Base:
    def __init__(self, raft: Raft, owner: Owner, settings: Settings) -> None:
        self.raft, self._owner, self._settings = raft, owner, settings
        self._now = settings.now
        self._incarnation = settings.incarnation << INCARNATION_SHIFT
        self._ticks = 0
        self._written = self._synced = 0  # tickets
        self._stalled: Ready | None = None  # a disk without room: its entries are not yet in the log
        self._done: list[tuple[Done, object]] = []  # to be called at the end of a pump
        self.alone = False

    def _no_quorum(self) -> errors.NoQuorum:
        leader = self.raft.leader
        voters = len(self.raft.configuration.voters)
        seconds = self._settings.timeout_ns // (1000 * NS_PER_MS)
        who = f"leader {leader} does not get it through" if leader else "there is no leader"
        return errors.NoQuorum(
            f"no majority of {voters} voters within {seconds} s: {who}; "
            "`aspen status` shows who is missing"
        )
