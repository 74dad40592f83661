"""Where each chunk lies: from the first 64 bits of a digest to locations, in few bytes of memory.

The index knows no digests, only their prefixes; whoever asks compares the digest in the record's
header, which has to be read anyway. One prefix may have several locations: the same chunk twice
while a segment is being collected, or two chunks whose digests begin alike.
"""

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import Final, Protocol


class BlobIndex(Protocol):
    """A multimap from prefix (64 bits) to location (64 bits); it is filled anew at each open."""

    def add(self, prefix: int, location: int) -> None: ...

    def find(self, prefix: int) -> Sequence[int]:
        """The locations of a prefix; a snapshot, usually of none or one."""

    def contains(self, prefix: int, location: int) -> bool: ...

    def remove(self, prefix: int, location: int) -> bool:
        """Was it there?"""

    def __len__(self) -> int:
        """Distinct prefixes: the chunks, each counted once."""


_SHARD_BITS: Final = 12
_SHIFT: Final = 64 - _SHARD_BITS


class PrefixIndex:
    """Sorted arrays in 4096 shards: 17 to 19 bytes a chunk from a million chunks on.

    Digests are uniform, so the shards fill evenly. At a million chunks an insertion moves 2 KiB,
    at a hundred million 200 KiB (about 10 µs), and nothing is ever rehashed: no call is long.
    """

    __slots__ = ("_distinct", "_locations", "_prefixes")

    def __init__(self) -> None:
        self._prefixes = [array("Q") for _ in range(1 << _SHARD_BITS)]
        self._locations = [array("Q") for _ in range(1 << _SHARD_BITS)]
        self._distinct = 0

    def add(self, prefix: int, location: int) -> None:
        shard = prefix >> _SHIFT
        prefixes = self._prefixes[shard]
        at = bisect_left(prefixes, prefix)
        if at == len(prefixes) or prefixes[at] != prefix:
            self._distinct += 1
        prefixes.insert(at, prefix)
        self._locations[shard].insert(at, location)

    def find(self, prefix: int) -> Sequence[int]:
        shard = prefix >> _SHIFT
        prefixes = self._prefixes[shard]
        first = bisect_left(prefixes, prefix)
        last = first
        while last < len(prefixes) and prefixes[last] == prefix:
            last += 1
        return self._locations[shard][first:last] if first < last else ()

    def contains(self, prefix: int, location: int) -> bool:
        return location in self.find(prefix)

    def remove(self, prefix: int, location: int) -> bool:
        shard = prefix >> _SHIFT
        prefixes, locations = self._prefixes[shard], self._locations[shard]
        first = at = bisect_left(prefixes, prefix)
        while at < len(prefixes) and prefixes[at] == prefix:
            if locations[at] == location:
                del prefixes[at], locations[at]
                if first == len(prefixes) or prefixes[first] != prefix:
                    self._distinct -= 1
                return True
            at += 1
        return False

    def __len__(self) -> int:
        return self._distinct
