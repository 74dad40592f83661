"""Old versions of user keys: kept when replaced, read by revision, forgotten by compaction.

When a key of a keyspace with history changes, the record that it *had* is stored under (key, its mod
revision); the current one is only in its usual place. A deletion also leaves a tombstone (a record of
version 0) under (key, revision of the deletion). A row per revision names the keys that it changed,
for each the mod revision that it replaced: that is what a watch replays and compaction walks.

Compaction at C forgets each version whose successor is *below* C: what C and later revisions can show
stays, with the previous values of the events at C itself and the deletions made there.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import msgpack

from aspenfs import errors
from aspenfs.kv import keys
from aspenfs.kv.state import Effect, State, first, internal
from aspenfs.kv.types import NO_ATTRIBUTES, Batch, Event, Record, prefix_end
from aspenfs.limits import COMPACT_EFFECTS_MAX, COMPACT_REVISIONS_MAX

CHANGED_END = prefix_end(keys.CHANGED_AT)
_new = tuple.__new__
_packer = msgpack.Packer()  # one for all: a new one costs three times what there is to pack
_MANY = 100  # changes that are not packed by it: it would keep the memory


class Change(NamedTuple):
    """A key that a revision changed. `replaced` is the mod revision before, 0 = the key was absent."""

    key: bytes
    replaced: int
    deleted: bool


def recorded(index: int, events: Sequence[Event]) -> list[Effect]:
    """The history of `events`, all made by the entry `index`; those of other keyspaces are left out."""
    effects: list[Effect] = []
    changes: list[Change] = []
    for key, record, previous in events:
        if key[:2] not in keys.HISTORY_KEYSPACES:
            continue
        replaced = 0
        if previous is not None:
            replaced = previous.mod_revision
            effects.append((keys.version_key(key, replaced), previous))
        if record is None:
            effects.append((keys.version_key(key, index), Record(b"", 0, index, 0, 0, 0, NO_ATTRIBUTES)))
        changes.append(_new(Change, (key, replaced, record is None)))
    if changes:
        pack = _packer.pack if len(changes) < _MANY else msgpack.packb
        effects.append((keys.changed_key(index), internal(index, pack(changes))))
    return effects


def compacted(state: State) -> int:
    """The oldest revision that can be read and watched; 0 before the first compaction."""
    mark = state.get(keys.COMPACTED)
    return int.from_bytes(mark.value, "big") if mark is not None else 0


def compaction(state: State, index: int, revision: int) -> tuple[int, list[Effect]]:
    """Forgets what is below `revision`, a bounded part of it: (1 if more is left else 0, effects).

    The mark moves at once, so reads below it fail alike on all nodes; leftovers are never visible.
    """
    mark = compacted(state)
    if revision >= index:
        raise errors.FutureRevision(f"compaction at {revision}, the newest revision is {index - 1}")
    if revision < mark:
        raise errors.Compacted(mark)
    effects: list[Effect] = []
    if revision > mark:
        effects.append((keys.COMPACTED, internal(index, keys.number(revision))))
    rows = state.items(keys.CHANGED_AT, keys.changed_key(revision))
    for looked_at, (row_key, row) in enumerate(rows):
        if looked_at == COMPACT_REVISIONS_MAX or len(effects) >= COMPACT_EFFECTS_MAX:
            return 1, effects
        for change in _changes(row):
            if change.replaced:
                effects.append((keys.version_key(change.key, change.replaced), None))
            if change.deleted:
                effects.append((keys.version_key(change.key, row.mod_revision), None))
        effects.append((row_key, None))
    return 0, effects


def check_readable(state: State, revision: int, newest: int) -> None:
    """Raises unless the keyspaces with history can be read as of `revision`."""
    if revision < 0:
        raise errors.InvalidArgument(f"revision {revision}")
    if revision > newest:
        raise errors.FutureRevision(f"revision {revision}; the newest is {newest}")
    mark = compacted(state)
    if revision < mark:
        raise errors.Compacted(mark)


def get_at(state: State, key: bytes, revision: int) -> Record | None:
    """The record of `key` as of `revision`, which must be readable."""
    live = state.get(key)
    if live is not None and live.mod_revision <= revision:
        return live
    prefix = keys.versions_prefix(key)
    found = first(state, prefix, prefix + keys.number(revision + 1), reverse=True)
    return found[1] if found is not None and found[1].version else None


def items_at(
    state: State, start: bytes, end: bytes, revision: int, *, reverse: bool = False
) -> Iterator[tuple[bytes, Record]]:
    """The items of [start, end), within one keyspace with history, as of `revision`."""
    live = state.items(start, end, reverse=reverse)
    old = _versions_at(state, start, end, revision, reverse)
    here, there = next(live, None), next(old, None)
    while here is not None or there is not None:
        if there is None or (here is not None and here[0] != there[0] and (here[0] < there[0]) != reverse):
            key, record = here  # type: ignore[misc]  # one of the two is there
            here = next(live, None)
        else:
            key, record = there
            if here is not None and here[0] == key:
                if here[1].mod_revision <= revision:
                    record = here[1]
                here = next(live, None)
            there = next(old, None)
        if record.version and record.mod_revision <= revision:
            yield key, record


def _versions_at(
    state: State, start: bytes, end: bytes, revision: int, reverse: bool
) -> Iterator[tuple[bytes, Record]]:
    """For each key with stored versions the newest of them at or below `revision`."""
    best: tuple[bytes, Record] | None = None
    # A bound sorts as the first key of its kind does, so it is escaped like a key, without revision.
    escaped = [keys.versions_prefix(bound)[:-2] for bound in (start, end)]
    for stored, record in state.items(escaped[0], escaped[1], reverse=reverse):
        key, at = keys.split_version_key(stored)
        if best is not None and best[0] != key:
            yield best
            best = None
        if at <= revision and (best is None or not reverse):
            best = key, record
    if best is not None:
        yield best


def next_batch(
    state: State, start: bytes, end: bytes, from_revision: int, upto: int
) -> tuple[int, Batch | None]:
    """The first batch with events in [start, end) in revisions [from_revision, upto], and where to go on.

    None when there is none; then all of them have been looked at. Looks at a bounded number of rows.
    """
    rows = state.items(keys.changed_key(from_revision), keys.changed_key(upto + 1))
    for _, row in islice(rows, COMPACT_REVISIONS_MAX):
        at = row.mod_revision
        events = [_event(state, change, at) for change in _changes(row) if start <= change.key < end]
        if events:
            return at + 1, Batch(at, events)
        from_revision = at + 1
    return (upto + 1 if next(rows, None) is None else from_revision), None


def _event(state: State, change: Change, at: int) -> Event:
    record = None
    if not change.deleted:
        record = state.get(change.key)
        if record is None or record.mod_revision != at:
            record = state.get(keys.version_key(change.key, at))
    previous = state.get(keys.version_key(change.key, change.replaced)) if change.replaced else None
    return Event(change.key, record, previous)


def _changes(row: Record) -> list[Change]:
    return [_new(Change, fields) for fields in msgpack.unpackb(row.value)]
