"""What the nodes of a cluster say to each other, and how it is read from bytes that anybody may have sent.

Belongs here: the kinds of message, their fields, checking of decoded msgpack. Not here: what a message
means to who gets it (`raft.py`), framing and links (`runtime/peers/`). Names are etcd's.

    kind            from -> to           fields in use, beside to, sender and term
    APP             leader -> all        index, log_term: of the entry before; entries; commit;
                                         context: TELL_HELD, if HELD is to be the first answer
    APP_RESP        -> leader            index: all up to it are on disk here; or reject: index is the one
                                         refused, reject_hint and log_term an entry that may agree
    HELD            -> leader            index: all up to it are in the log here, perhaps not yet on disk
    VOTE, PRE_VOTE  candidate -> voters  index, log_term: of its last entry; context: CAMPAIGN_TRANSFER or b""
    …_RESP          -> candidate         reject, and then commit, and log_term of that entry
    SNAP            leader -> all        snapshot: to be fetched
    HEARTBEAT       leader -> all        commit; context: a round of reads, or nothing
    HEARTBEAT_RESP  -> leader            context as asked; index: of the snapshot being fetched, or 0
    READ_INDEX      -> leader            context: the asker's own
    READ_INDEX_RESP leader -> asker      context as asked; index
    TRANSFER_LEADER -> leader            index: the id of the node that shall lead
    TIMEOUT_NOW     leader -> follower   stand for election at once
    PROP, PROP_RESP for `replica.py`: entries whose index is the proposal's number; index, reject, reject_hint

The term of a PRE_VOTE, and of its grant, is the one that would follow; that of a refusal the refuser's own.
"""

from enum import IntEnum
from typing import Final, NamedTuple

from aspenfs import errors
from aspenfs.cluster.membership import read_configuration
from aspenfs.cluster.types import Entry, Snapshot
from aspenfs.limits import RAFT_APPEND_ENTRIES_MAX, RAFT_CONTEXT_BYTES_MAX, WAL_FRAME_BYTES_MAX

CAMPAIGN_TRANSFER: Final = b"transfer"  # the leader wants it: stickiness does not hold against this vote
TELL_HELD: Final = b"held"
NUMBER_MAX: Final = (1 << 63) - 1

_FIELDS: Final = 12
_KIND_MAX: Final = 15  # of an entry: the kinds above are frames of the WAL that are no entries
_new = tuple.__new__


class MessageType(IntEnum):
    APP = 1
    APP_RESP = 2
    VOTE = 3
    VOTE_RESP = 4
    PRE_VOTE = 5
    PRE_VOTE_RESP = 6
    SNAP = 7
    HEARTBEAT = 8
    HEARTBEAT_RESP = 9
    READ_INDEX = 10
    READ_INDEX_RESP = 11
    TRANSFER_LEADER = 12
    TIMEOUT_NOW = 13
    PROP = 14
    PROP_RESP = 15
    HELD = 16


class Message(NamedTuple):
    """msgpack packs it as it is, an array of 12; `from_wire` reads it back."""

    type: MessageType
    to: int
    sender: int
    term: int
    log_term: int = 0
    index: int = 0  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    commit: int = 0
    entries: tuple[Entry, ...] | list[Entry] = ()
    reject: bool = False
    reject_hint: int = 0
    context: bytes = b""
    snapshot: Snapshot | None = None


_TYPES: Final = {int(each): each for each in MessageType}


def from_wire(value: object) -> Message:
    """The message in what msgpack made of some bytes; InvalidArgument if it is not one.

    Whether `sender` is who sent it, the link knows.
    """
    if not isinstance(value, (tuple, list)) or len(value) != _FIELDS:
        raise errors.InvalidArgument(f"a message is an array of {_FIELDS}")
    number, to, sender, term, log_term, index, commit, entries, reject, reject_hint, context, snapshot = value
    for field in (number, to, sender, term, log_term, index, commit, reject_hint):
        if type(field) is not int or not 0 <= field <= NUMBER_MAX:
            raise errors.InvalidArgument("a number in a message is not one, or out of range")
    kind = _TYPES.get(number)
    if kind is None:
        raise errors.InvalidArgument(f"no message is of type {number}")
    if not to or not sender or not term:
        raise errors.InvalidArgument("a message needs to, sender and term")
    if type(reject) is not bool or type(context) is not bytes or len(context) > RAFT_CONTEXT_BYTES_MAX:
        raise errors.InvalidArgument("a message with a bad reject or context")
    if not isinstance(entries, (tuple, list)):
        raise errors.InvalidArgument("entries are an array")
    entries = _read_entries(kind, entries, index, log_term, term) if entries else ()
    if (snapshot is not None) is not (kind is MessageType.SNAP):
        raise errors.InvalidArgument("SNAP has a snapshot, and nothing else has")
    if snapshot is not None:
        snapshot = _read_snapshot(snapshot)
    return Message(kind, to, sender, term, log_term, index, commit, entries, reject, reject_hint, context,
                   snapshot)  # fmt: skip


def _read_entries(kind: MessageType, values: tuple[object, ...] | list[object], index: int, log_term: int,
                  term: int) -> list[Entry]:  # fmt: skip
    """In APP they follow `index` without a gap, terms never fall, and none is of a term to come."""
    if kind is not MessageType.APP and kind is not MessageType.PROP:
        raise errors.InvalidArgument(f"{kind.name} has no entries")
    if len(values) > RAFT_APPEND_ENTRIES_MAX:
        raise errors.InvalidArgument(f"{len(values)} entries; the most is {RAFT_APPEND_ENTRIES_MAX}")
    appends = kind is MessageType.APP
    expected, least = index, log_term
    entries = []
    for value in values:
        if not isinstance(value, (tuple, list)) or len(value) != 4:
            raise errors.InvalidArgument("an entry is an array of 4")
        entry_term, entry_index, entry_kind, data = value
        if type(entry_term) is not int or type(entry_index) is not int or type(entry_kind) is not int:
            raise errors.InvalidArgument("a number in an entry is not one")
        if type(data) is not bytes or len(data) > WAL_FRAME_BYTES_MAX or not 1 <= entry_kind <= _KIND_MAX:
            raise errors.InvalidArgument("an entry of a bad kind, or with bad data")
        if appends:
            expected += 1
            if entry_index != expected or not least <= entry_term <= term or not entry_term:
                raise errors.InvalidArgument("entries are not in order")
            least = entry_term
        elif not 0 < entry_index <= NUMBER_MAX or not 0 <= entry_term <= term:
            raise errors.InvalidArgument("a number in an entry is out of range")
        entries.append(_new(Entry, (entry_term, entry_index, entry_kind, data)))
    if expected > NUMBER_MAX:
        raise errors.InvalidArgument("entries out of range")
    return entries


def _read_snapshot(value: object) -> Snapshot:
    if not isinstance(value, (tuple, list)) or len(value) != 3:
        raise errors.InvalidArgument("a snapshot is an array of 3")
    index, term, configuration = value
    for number in (index, term):
        if type(number) is not int or not 0 < number <= NUMBER_MAX:
            raise errors.InvalidArgument("a number in a snapshot is not one, or out of range")
    return Snapshot(index, term, read_configuration(configuration))
