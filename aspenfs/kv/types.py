"""The nouns of the store: records, compares, operations, results, events.

Belongs here: values that cross the Store port. Not here: how they are evaluated (`machine.py`).

Compares and operations are tagged tuples, because that is their wire form (a command is packed
as it stands) and because a request makes several of them: a frozen dataclass costs four times as
much to build (ADR 0002). Make them with the functions below, never by hand.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NewType

Revision = NewType("Revision", int)  # index of the log entry that made it; first entry is 1
LeaseId = NewType("LeaseId", int)
Attributes = Mapping[str, int | bytes | str]

NO_ATTRIBUTES: Attributes = {}


class Record(NamedTuple):
    """What a key holds. `ordinal` numbers the keys created by one transaction, from 0."""

    value: bytes
    create_revision: int
    mod_revision: int
    version: int  # 1 when created, +1 with each change
    lease: int  # 0 = none
    ordinal: int
    attributes: Attributes


# --- compares: (target, operator, key, operand) ---
EXISTS, CREATE_REVISION, MOD_REVISION, VERSION, VALUE, RANGE_EMPTY, FIELD = range(1, 8)
EQUAL, NOT_EQUAL, LESS, GREATER = range(1, 5)
Compare = tuple[int, int, bytes, Any]


def exists(key: bytes) -> Compare:
    return (EXISTS, EQUAL, key, True)


def absent(key: bytes) -> Compare:
    return (EXISTS, EQUAL, key, False)


def compare_create_revision(key: bytes, operator: int, revision: int) -> Compare:
    """An absent key has create and mod revision 0 and version 0, as in etcd."""
    return (CREATE_REVISION, operator, key, revision)


def compare_mod_revision(key: bytes, operator: int, revision: int) -> Compare:
    return (MOD_REVISION, operator, key, revision)


def compare_version(key: bytes, operator: int, version: int) -> Compare:
    return (VERSION, operator, key, version)


def compare_value(key: bytes, operator: int, value: bytes) -> Compare:
    """Bytewise order; false if the key is absent, whatever the operator."""
    return (VALUE, operator, key, value)


def range_empty(start: bytes, end: bytes) -> Compare:
    """No key in [start, end)."""
    return (RANGE_EMPTY, EQUAL, start, end)


def compare_field(key: bytes, offset: int, operator: int, number: int) -> Compare:
    """The signed 64-bit little-endian number at `offset` of the value; false if absent or short."""
    return (FIELD, operator, key, (offset, number))


# --- operations ---
PUT, DELETE, DELETE_RANGE, MERGE, GET, RANGE, UPDATE = range(1, 8)
Operation = tuple[Any, ...]

# edits of a MERGE, evaluated at apply in the order given
PATCH, APPEND, ADD, MAX, CUT, ATTRIBUTES = range(1, 7)
Edit = tuple[Any, ...]


def put(key: bytes, value: bytes, lease: int = 0, attributes: Attributes | None = None) -> Operation:
    """Sets value and lease; `attributes` None keeps those that the key has."""
    return (PUT, key, value, lease, attributes)


def update(key: bytes, value: bytes, lease: int, changes: Attributes) -> Operation:
    """Sets value and lease, and lays `changes` over the attributes that the key has (`set_attributes`)."""
    return (UPDATE, key, value, lease, changes)


def delete(key: bytes) -> Operation:
    return (DELETE, key)


def delete_range(start: bytes, end: bytes) -> Operation:
    """Every key in [start, end)."""
    return (DELETE_RANGE, start, end)


def merge(key: bytes, *edits: Edit) -> Operation:
    """Edits of the value in place, as it is at apply; an absent key starts as b''. Keeps the lease."""
    return (MERGE, key, edits)


def get(key: bytes) -> Operation:
    return (GET, key)


def range_(start: bytes, end: bytes, limit: int = 0) -> Operation:
    """`limit` 0 = all."""
    return (RANGE, start, end, limit)


def patch(offset: int, data: bytes) -> Edit:
    """Overwrites bytes at `offset`; a hole before it is zero-filled."""
    return (PATCH, offset, data)


def append(data: bytes) -> Edit:
    return (APPEND, data)


def add(offset: int, delta: int) -> Edit:
    """Adds to the signed 64-bit little-endian number at `offset` (zero-extended if short)."""
    return (ADD, offset, delta)


def max_(offset: int, number: int) -> Edit:
    return (MAX, offset, number)


def cut(size: int) -> Edit:
    """Makes the value exactly `size` bytes: cut off or zero-filled."""
    return (CUT, size)


def set_attributes(attributes: Attributes) -> Edit:
    """Merged into those that the key has; a value of b'' removes one."""
    return (ATTRIBUTES, attributes)


class TxnResult(NamedTuple):
    """`responses` has one item per operation of the branch that ran: GET a Record or None, RANGE a
    list of (key, Record), DELETE and DELETE_RANGE the number of keys removed, else None."""

    revision: int
    succeeded: bool  # all compares held, `then` ran
    responses: Sequence[Any]


class Event(NamedTuple):
    """One changed key. `record` is None for a deletion; `previous` is what it replaced."""

    key: bytes
    record: Record | None
    previous: Record | None


class Batch(NamedTuple):
    """All events of one revision, in the order in which the transaction made them."""

    revision: int
    events: Sequence[Event]


def prefix_end(prefix: bytes) -> bytes:
    """The least key greater than every key that begins with `prefix` (etcd's clientv3.WithPrefix).

    b'' means "no end": it is what a prefix of 0xff bytes only has.
    """
    stripped = prefix.rstrip(b"\xff")
    return stripped[:-1] + bytes([stripped[-1] + 1]) if stripped else b""
