"""The nouns of consensus: ids, entries, what must be on disk, what a turn of the core asks for.

Names are etcd's. Belongs here: values alone. Messages between nodes are in `messages.py`, sets of
voters in `quorum.py`, changes of them in `membership.py`.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple, NewType

if TYPE_CHECKING:
    from aspenfs.cluster.messages import Message

NodeId = NewType("NodeId", int)  # 1..2**63-1, never used twice; 0 is nobody
Term = NewType("Term", int)
Index = NewType("Index", int)

NOBODY = NodeId(0)


class EntryKind(IntEnum):
    """What the payload of an entry is; the kinds of frames in the WAL."""

    NORMAL = 1  # a command, or nothing
    CONFIGURATION = 2
    PROPOSAL = 3  # node id and number of the proposal, then a command


class Entry(NamedTuple):
    term: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    kind: int
    data: bytes


class HardState(NamedTuple):
    """What a node must not forget. `vote` NOBODY: none in this term."""

    term: int
    vote: int


class Configuration(NamedTuple):
    """Who votes and who listens, etcd's ConfState; ids sorted. Joint while `outgoing` is not empty."""

    voters: tuple[int, ...]
    outgoing: tuple[int, ...] = ()
    learners: tuple[int, ...] = ()
    learners_next: tuple[int, ...] = ()  # voters of the outgoing half that become learners on leaving
    auto_leave: bool = False


class Snapshot(NamedTuple):
    """Where a state stands in the log; the state itself goes another way (docs/design/cluster.md)."""

    index: int  # type: ignore[assignment]
    term: int
    configuration: Configuration


class Role(IntEnum):
    FOLLOWER = 1
    PRE_CANDIDATE = 2
    CANDIDATE = 3
    LEADER = 4


class ReadState(NamedTuple):
    """Who asked with `context` may answer once everything up to `index` is applied."""

    context: bytes
    index: int  # type: ignore[assignment]


class Ready(NamedTuple):
    """What a turn of the core asks of its owner, to be carried out in this order (docs/design/cluster.md)."""

    truncate_after: int | None  # entries of the log above it are void, before `entries` are appended
    entries: Sequence[Entry]  # to append
    hard_state: HardState | None  # to append, if changed
    must_sync: bool  # a sync is wanted for what stands above
    messages: "Sequence[Message]"  # to send now
    messages_after_sync: "Sequence[Message]"  # to send when what stands above is on disk
    snapshot: Snapshot | None  # to fetch and install; nothing is applied until `snapshot_installed`
    committed: Sequence[Entry]  # to apply
    reads: Sequence[ReadState]
