"""A snapshot in blocks of rows, each a short piece of work for a thread, and the digest of it all.

Belongs here: cutting, and finishing a state that was loaded from blocks. Not here: who asks for blocks
(`server.py`, `backup/`), and how rows look (`kv/rows.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

from blake3 import blake3

from aspenfs.errors import Corrupt
from aspenfs.kv import rows
from aspenfs.limits import KIB, SNAPSHOT_BLOCK_BYTES
from aspenfs.runtime.statedb import CONFIGURATION, TERM, Snapshot, StateDb

_HASHED_BYTES = 64 * KIB  # between two chances for others, where no block is wanted: some 0.2 ms


class Block(NamedTuple):
    """`rows` as bytes, the last of them is that of the key `last`; `end`: none follow. May be empty."""

    rows: bytes
    row_count: int
    last: bytes
    end: bool


def next_block(snapshot: Snapshot, after: bytes, bytes_max: int = SNAPSHOT_BLOCK_BYTES) -> Block:
    """The rows above the key `after`: at most `bytes_max` bytes, or a single row that is larger."""
    parts: list[bytes] = []
    size, last = 0, after
    for key, record in snapshot.rows(after):
        size += len(key) + len(record) + rows.FRAMING_BYTES
        if size > bytes_max and parts:
            return Block(b"".join(parts), len(parts), last, False)
        parts.append(rows.pack(key, record))
        last = key
    return Block(b"".join(parts), len(parts), last, True)


class StateDigest(NamedTuple):
    """`digest` is that of `kv.machine.state_hash`, for what entries up to `index` made."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    digest: bytes
    rows: int


def digest_of(snapshot: Snapshot, breathe: Callable[[], object] | None = None) -> StateDigest:
    """Walks over everything, in any thread. `breathe` is called every few hundred µs."""
    hasher = blake3()
    after, count, end = b"", 0, False
    while not end:
        block = next_block(snapshot, after, _HASHED_BYTES)
        hasher.update(block.rows)
        after, count, end = block.last, count + block.row_count, block.end
        if breathe is not None:
            breathe()
    return StateDigest(snapshot.applied_index, hasher.digest(), count)


def finish_load(state: StateDb, index: int, term: int, configuration: bytes | None, digest: bytes) -> None:
    """Makes a state that was loaded the state at `index`, durably, once it was read back and compared.

    Corrupt: what is there is not what `digest` names.
    """
    meta = {TERM: term.to_bytes(8, "big")}
    if configuration is not None:
        meta[CONFIGURATION] = configuration
    state.apply([], index, meta)
    with state.snapshot() as snapshot:
        found = digest_of(snapshot)
    if found.digest != digest:
        raise Corrupt("the state just made", 0, "it reads back as another one", "try again; check the disk")
    state.sync()
