"""What a simulated disk holds: files and directories, each as seen now and as on the platters.

Here belongs the rule which images a power failure may leave; who calls when, faults and locking
are in `sim/disk.py`.
"""

import random
from typing import Final

SECTOR: Final = 512


class Inode:
    """A file: `data` is what is read now; `durable` plus some of `pending` is what a crash leaves.

    `pending` holds, in order, either (first sector, bytes of whole sectors) or a new size.
    """

    __slots__ = ("data", "durable", "links", "name", "pending")

    def __init__(self) -> None:
        self.data = bytearray()
        self.durable = bytearray()
        self.pending: list[tuple[int, bytes] | int] = []
        self.links = 0
        self.name = ""  # the last one given to it

    def write(self, data: bytes | memoryview, offset: int) -> None:
        end = offset + len(data)
        if end > len(self.data):
            self.resize(end)
        self.data[offset:end] = data
        first = offset // SECTOR
        last = -(-end // SECTOR)
        self.pending.append((first, bytes(self.data[first * SECTOR : last * SECTOR])))

    def resize(self, size: int) -> None:
        resize_image(self.data, size)
        self.pending.append(size)

    def flip(self, offset: int, bit: int) -> None:
        self.data[offset] ^= 1 << bit
        if offset < len(self.durable):
            self.durable[offset] ^= 1 << bit
        for at, change in enumerate(self.pending):
            if isinstance(change, tuple):
                first, data = change
                where = offset - first * SECTOR
                if 0 <= where < len(data):
                    flipped = bytearray(data)
                    flipped[where] ^= 1 << bit
                    self.pending[at] = (first, bytes(flipped))

    def sync(self, changes: int) -> None:
        """Make the first so many of `pending` durable."""
        for change in self.pending[:changes]:
            if isinstance(change, int):
                resize_image(self.durable, change)
            else:
                first, data = change
                self.durable[first * SECTOR : first * SECTOR + len(data)] = data
        del self.pending[:changes]
        assert self.pending or len(self.durable) == len(self.data)

    def keep_some(self, rng: random.Random) -> None:
        """Make a random legal subset of `pending` durable and forget the rest."""
        if not self.pending:
            return
        sizes = sum(isinstance(change, int) for change in self.pending)
        survive = rng.choice((0.0, 1.0, rng.random(), rng.random()))
        sizes_kept = sizes if survive == 1.0 else rng.randint(0, sizes) if survive else 0
        size, seen = len(self.durable), 0
        sectors: dict[int, bytes] = {}
        cut_at = size  # sectors at and beyond it that are not in `sectors` read as zeros
        lost_from = 1 << 62  # what is written beyond a truncation is lost if the truncation is
        for change in self.pending:
            if isinstance(change, int):
                seen += 1
                if seen <= sizes_kept:
                    if change < size:
                        _cut(sectors, change)
                        cut_at = min(cut_at, change)
                    size = change
                else:
                    lost_from = min(lost_from, change)
                continue
            first, data = change
            for sector in range(first, first + -(-len(data) // SECTOR)):
                if (sector + 1) * SECTOR > lost_from:
                    break
                if survive == 1.0 or rng.random() < survive:
                    at = (sector - first) * SECTOR
                    sectors[sector] = data[at : at + SECTOR]
        resize_image(self.durable, cut_at)
        resize_image(self.durable, size)
        for sector, content in sectors.items():
            room = min(len(content), size - sector * SECTOR)
            if room > 0:
                self.durable[sector * SECTOR : sector * SECTOR + room] = content[:room]
        self.pending.clear()


def resize_image(data: bytearray, size: int) -> None:
    if size < len(data):
        del data[size:]
    else:
        data.extend(bytes(size - len(data)))


def _cut(sectors: dict[int, bytes], size: int) -> None:
    """A durable truncation: what had been written beyond it can not come back."""
    for sector in [s for s in sectors if (s + 1) * SECTOR > size]:
        keep = size - sector * SECTOR
        if keep <= 0:
            del sectors[sector]
        else:
            sectors[sector] = sectors[sector][:keep].ljust(SECTOR, b"\0")


class Directory:
    """Names as seen now (`entries`) and as on the platters (`durable`)."""

    __slots__ = ("durable", "entries")

    def __init__(self) -> None:
        self.entries: dict[str, Inode | Directory] = {}
        self.durable: dict[str, Inode | Directory] = {}


class NameChange:
    """One atomic change of names: `removed` and `added`, durable when `home` is synced.

    A removal holds only for the node that it removed: another change may have put a newer one
    under that name and been synced first.
    """

    __slots__ = ("added", "home", "removed")

    def __init__(
        self,
        home: Directory,
        removed: tuple[Directory, str, Inode | Directory] | None,
        added: tuple[Directory, str, Inode | Directory] | None,
    ) -> None:
        self.home, self.removed, self.added = home, removed, added

    def persist(self) -> None:
        if self.removed is not None:
            directory, name, node = self.removed
            if directory.durable.get(name) is node:
                del directory.durable[name]
        if self.added is not None:
            directory, name, node = self.added
            directory.durable[name] = node
