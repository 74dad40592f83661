"""Which blobs are named: the rows that count it, and how a transaction relies on one that is.

A transaction may name a blob for one of two reasons: its proposer has made sure that a majority holds the
bytes and spares them, or the blob is named already. The second costs nothing, but must still be so when
the transaction is applied: another host may take the last name away meanwhile, and then every host
collects the bytes. So such a transaction compares the count with 0 (docs/design/blobs.md, "Several nodes").
"""

from collections.abc import Sequence

from aspenfs.filesystem.layout import BLOB_PREFIX, named_by
from aspenfs.kv.commands import TXN, Command
from aspenfs.kv.store import Store
from aspenfs.kv.types import (
    FIELD,
    GREATER,
    Compare,
    Operation,
    Record,
    add,
    compare_field,
    merge,
    prefix_end,
)

_DIGEST_AT = len(BLOB_PREFIX)
_END = prefix_end(BLOB_PREFIX)
_AT_LEAST_ONE = (0, 0)  # offset 0, greater than 0


class References:
    """Changes of reference counts that a transaction makes. Of what it drops besides: `extents`, and of
    these the `inline_bytes`, which were read for it."""

    def __init__(self) -> None:
        self.deltas: dict[bytes, int] = {}
        self.extents = self.inline_bytes = 0

    def change(self, digest: bytes, delta: int) -> None:
        self.deltas[digest] = self.deltas.get(digest, 0) + delta

    def operations(self) -> list[Operation]:
        return [merge(BLOB_PREFIX + digest, add(0, delta)) for digest, delta in self.deltas.items() if delta]

    def lost(self) -> list[bytes]:
        return [digest for digest, delta in self.deltas.items() if delta < 0]


def digest_of(key: bytes) -> bytes | None:
    """The blob whose count `key` holds; None if it is another key."""
    return key[_DIGEST_AT:] if key.startswith(BLOB_PREFIX) else None


def count_in(row: Record | None) -> int:
    """How many extents name the blob of this row."""
    return 0 if row is None else int.from_bytes(row.value[:8], "little", signed=True)


def count(store: Store, digest: bytes) -> int:
    """How many extents name this blob, as reads here see it."""
    return count_in(store.get(BLOB_PREFIX + digest))


def rows(store: Store, after: bytes, limit: int) -> list[tuple[bytes, int]]:
    """Digests and counts of up to `limit` blobs behind the digest `after` (at first b""), in order."""
    start = BLOB_PREFIX + after + b"\0" if after else BLOB_PREFIX
    return [(key[_DIGEST_AT:], count_in(row)) for key, row in store.range(start, _END, limit=limit)]


def guards(store: Store, operations: Sequence[Operation]) -> list[Compare]:
    """One compare for each blob that these operations name and that is named already."""
    return [
        compare_field(BLOB_PREFIX + digest, 0, GREATER, 0)
        for digest in dict.fromkeys(named_by(operations))
        if count(store, digest) > 0
    ]


def unguarded(command: Command) -> list[bytes]:
    """The blobs that a transaction names without comparing their count: a majority must hold them."""
    if command.kind != TXN:
        return []
    compares, then, else_ = command.body
    digests = dict.fromkeys(named_by(then))
    if digests:
        for target, operator, key, operand in compares:
            if target == FIELD and operator == GREATER and tuple(operand) == _AT_LEAST_ONE:
                digests.pop(digest_of(key) or b"", None)
    digests.update(dict.fromkeys(named_by(else_)))  # runs when the compares do not hold
    return list(digests)
