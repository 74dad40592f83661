"""A `State` in memory: a sorted map, for tests and simulation."""

from collections.abc import Iterable, Iterator
from itertools import islice

from sortedcontainers import SortedDict

from aspenfs.kv.state import Effect
from aspenfs.kv.types import Record

_CHUNK = 64


class MemoryState:
    """An ordered map of keys to records. A walk follows changes made meanwhile."""

    def __init__(self) -> None:
        self._records: SortedDict = SortedDict()
        self.get = self._records.get

    def items(self, start: bytes, end: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, Record]]:
        records = self._records
        while True:
            # A chunk at a time: an iterator of the map must not outlive a change of it.
            keys = records.irange(start, end or None, (True, False), reverse=reverse)
            chunk = [(key, records[key]) for key in islice(keys, _CHUNK)]
            yield from chunk
            if len(chunk) < _CHUNK:
                return
            if reverse:
                end = chunk[-1][0]
            else:
                start = chunk[-1][0] + b"\x00"

    def apply(self, effects: Iterable[Effect]) -> None:
        """Takes in the effects of committed entries."""
        for key, record in effects:
            if record is None:
                self._records.pop(key, None)
            else:
                self._records[key] = record
