"""Accepted changes laid over the applied state, until that state has them itself.

A transaction is visible to this node's reads from the moment it is accepted; the applied state follows
later, in batches. The overlay holds the difference. It is a `State`: the machine evaluates on it.

All methods run in one thread, and each is atomic for the others. The base may be changed by another
thread: it must show an entry before `settle` is called for it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice

from sortedcontainers import SortedList

from aspenfs.kv.state import Effect, State
from aspenfs.kv.types import Record

_ENTRY_BYTES = 200  # what the objects around a key and a value take, about
_CHUNK = 64  # staged keys that a walk fetches at a time
_STALE_KEYS_MAX = 1_024


class Overlay:
    """A `State` made of a base and the effects staged on it. Each record that is staged under a key is an
    object of its own: by that it is known again."""

    __slots__ = ("_base", "_base_get", "_entries", "_fresh", "_order", "_settles", "_staged", "bytes")

    def __init__(self, base: State) -> None:
        self._base = base
        self._base_get = base.get
        self._staged: dict[bytes, Record | int] = {}  # newest effect per key; a deletion is its index
        self._entries: deque[tuple[int, Sequence[Effect], int]] = deque()  # (index, effects, bytes)
        # Keys in order, made when a walk needs them: `_fresh` are not yet in it, and it may hold keys
        # that are no longer staged.
        self._order: SortedList = SortedList()
        self._fresh: list[bytes] = []
        self._settles = 0
        self.bytes = 0  # held, an estimate

    def get(self, key: bytes) -> Record | None:
        staged = self._staged.get(key)
        if staged is None:
            return self._base_get(key)
        return None if type(staged) is int else staged  # type: ignore[return-value]

    def items(self, start: bytes, end: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, Record]]:
        """As State.items. What is there throughout the walk is given once, whatever happens meanwhile."""
        if not self._staged or not self._staged_keys(start, end, reverse, 1):
            return self._base.items(start, end, reverse=reverse)
        return self._merged(start, end, reverse)

    def stage(self, index: int, effects: Sequence[Effect]) -> None:
        """Lays the effects of entry `index`, greater than all before, over the state."""
        staged = self._staged
        size = 0
        for key, record in effects:
            if key not in staged:
                self._fresh.append(key)
            size += len(key) + _ENTRY_BYTES
            if record is None:
                staged[key] = index
            else:
                staged[key] = record
                size += len(record[0])
        self._entries.append((index, effects, size))
        self.bytes += size

    def settle(self, index: int) -> None:
        """Drops what was staged at or below `index`: the base has it now."""
        entries, staged = self._entries, self._staged
        while entries and entries[0][0] <= index:
            at, effects, size = entries.popleft()
            self.bytes -= size
            for key, record in effects:
                if record is None:
                    newest = staged.get(key)
                    if type(newest) is int and newest <= at:
                        del staged[key]
                elif staged.get(key) is record:
                    del staged[key]
        self._settles += 1
        self._trim_order()

    def discard_after(self, index: int) -> list[Effect]:
        """Drops what was staged above `index` and shows what it hid; the newest lost effect per key."""
        lost: dict[bytes, Record | None] = {}
        entries = self._entries
        while entries and entries[-1][0] > index:
            _, effects, size = entries.pop()
            self.bytes -= size
            for key, record in effects:
                lost.setdefault(key, record)
        self._staged.clear()
        for at, effects, _ in entries:
            for key, record in effects:
                self._staged[key] = at if record is None else record
        self._settles += 1
        self._trim_order()
        return sorted(lost.items(), key=_key_of)

    def pending(self, upto: int) -> list[Effect]:
        """The newest staged effect of each key at or below `upto`, sorted by key."""
        newest: dict[bytes, Record | None] = {}
        for index, effects, _ in self._entries:
            if index > upto:
                break
            newest.update(effects)
        return sorted(newest.items(), key=_key_of)

    def _trim_order(self) -> None:
        if not self._staged:
            self._order.clear()
            self._fresh.clear()
        elif len(self._order) + len(self._fresh) > 2 * len(self._staged) + _STALE_KEYS_MAX:
            self._order.clear()
            self._fresh = list(self._staged)

    def _staged_keys(self, start: bytes, end: bytes, reverse: bool, limit: int) -> list[bytes]:
        """Up to `limit` keys of the order in [start, end), some perhaps twice or no longer staged."""
        if self._fresh:
            self._order.update(self._fresh)
            self._fresh.clear()
        keys = self._order.irange(start, end or None, (True, False), reverse=reverse)
        return list(islice(keys, limit))

    def _merged(self, start: bytes, end: bytes, reverse: bool) -> Iterator[tuple[bytes, Record]]:
        staged = self._staged
        while True:  # again after each settle: the base iterator may not show what the base has since
            settles = self._settles
            base = self._base.items(start, end, reverse=reverse)
            over = self._walk(start, end, reverse)
            there, mine = next(base, None), next(over, None)
            while settles == self._settles:
                if there is None and mine is None:
                    return
                if mine is None or (there is not None and there[0] != mine and (there[0] < mine) != reverse):
                    assert there is not None
                    key, record = there
                    found: Record | None = record
                    there = next(base, None)
                else:
                    key = mine
                    if there is not None and there[0] == key:
                        found = there[1]
                        there = next(base, None)
                    else:
                        found = None
                    newest = staged.get(key)
                    if newest is not None:
                        found = None if type(newest) is int else newest  # type: ignore[assignment]
                    mine = next(over, None)
                if reverse:
                    end = key
                else:
                    start = key + b"\x00"
                if found is not None:
                    yield key, found
            if end and start >= end:
                return

    def _walk(self, start: bytes, end: bytes, reverse: bool) -> Iterator[bytes]:
        """The keys of the order in [start, end), each once, in chunks: the order may change between two."""
        while chunk := self._staged_keys(start, end, reverse, _CHUNK):
            for key in chunk:
                if reverse:
                    if not end or key < end:
                        end = key
                        yield key
                elif key >= start:
                    start = key + b"\x00"
                    yield key


def _key_of(item: Effect) -> bytes:
    return item[0]
