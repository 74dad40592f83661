"""Reading directories without open directories: positions that mean the same to everybody, for ever.

The kernel keeps listings in its page cache and sends no OPENDIR (`fuse/requests.py`), so a reader is nobody
we know: all that comes is a directory and a position. readdir(3) wants the entries behind a position to be
given once each, however late it is asked and whatever has come and gone. So a position is made of the
name alone: entries are listed in the order of a hash of their names, as ext4 does, and a position can
neither be lost nor taken by another entry. Renames over a name do not move it.

Trees have their names in other orders. One pass over all names of a directory gathers the next ones behind a
position, which are kept as a *stretch* for whoever reads on there; a directory with more names than a stretch
has takes several passes. What is kept is a matter of speed only.

A reader who begins at the start must find what is there by then, in all that it reads. Nobody can
tell readers apart, so each start ends the older stretches of its directory for everyone.

Bits of a position, from above: 47 of the hash; 3 that count names of equal hashes (in byte order: only if
one of such a pair goes while another is being read, a reader may miss that other one); 12 that count
generations and say nothing about the place.

What the kernel keeps. It joins what several readers are given, wherever one goes on at the position at which
another has stopped, and takes the whole for the listing when a reader is told that it is at the end. The
times by which it tells that a listing is old may be newer than what it has joined. So all that is given out
of a directory while its names are the same has one *generation*; if anything else was given under that
number, or somebody comes with another one, the generation is *mixed*. At the end `ended` says whether
all that may have been joined is the listing of now. If not, the kernel must drop it before it hears of
the end, and the next generation begins. A reader that stops halfway leaves its generation open, for
the next one to complete what the kernel has begun.
"""

from array import array
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Sequence
from hashlib import blake2b
from typing import Final

from aspenfs.limits import LISTING_NAMES_MAX, LISTING_STEP_NAMES, LISTING_STRETCH_NAMES_MAX
from aspenfs.vfs.dirents import DOTS_BYTES, PAGE_BYTES, used_after
from aspenfs.vfs.tree import Tree

GENERATION_BITS: Final = 12
FIRST: Final = 1 << GENERATION_BITS  # positions below it are free, for . and ..
EQUAL_BITS: Final = 3
PLACE_BITS: Final = 47 + EQUAL_BITS
_GENERATION: Final = (1 << GENERATION_BITS) - 1
_HASH: Final = -1 << EQUAL_BITS  # the part of a place that the name determines
_BUCKET_SHIFT: Final = PLACE_BITS - 8  # names are sorted in 256 parts: none takes long
_STRETCH_COST: Final = 8  # names that take as much memory as a stretch without any
_DIRECTORY_COST: Final = 8  # and as a directory


def place_of(name: bytes) -> int:
    """Where a name is listed, in the order of all names: 8 to 2^50, the lowest 3 bits 0. 0 is the start."""
    return (int.from_bytes(blake2b(name, digest_size=6).digest(), "big") >> 1) + 1 << EQUAL_BITS


class _Stretch:
    """Names of a directory by place, without a gap from behind `low` to the last, or to the end."""

    __slots__ = ("ends", "low", "names", "places", "used", "version")

    def __init__(self, low: int, version: int | None) -> None:
        self.low = low
        self.version = version  # of the directory; None: it changed meanwhile, or nobody can tell
        self.ends = True  # no name of the directory lies behind it
        self.used = DOTS_BYTES  # of the last page, if the kernel keeps it
        self.places = array("q")
        self.names: list[bytes] = []

    def covers(self, place: int) -> bool:
        return self.low <= place and (self.ends or place < self.places[-1])

    @property
    def is_whole(self) -> bool:
        return self.low == 0 and self.ends


class _Directory:
    """What is known of one directory."""

    __slots__ = ("begun", "closed", "gathering", "generation", "mixed", "stretches", "version")

    def __init__(self) -> None:
        self.stretches: list[_Stretch] = []
        self.begun = 0  # number of the pass that last ended the older stretches
        self.gathering = 0  # passes under way
        self.begin(0, None)
        self.closed = True

    def begin(self, generation: int, version: int | None) -> None:
        self.generation, self.version = generation & _GENERATION, version
        self.mixed = self.closed = False  # closed: the kernel has all of it


class Listings:
    """The readers' side of directories. Awaited between the steps of long passes: `breathe`."""

    def __init__(
        self,
        breathe: Callable[[], Awaitable[None]] | None = None,
        *,
        names_max: int = LISTING_NAMES_MAX,
        stretch_max: int = LISTING_STRETCH_NAMES_MAX,
        step: int = LISTING_STEP_NAMES,
    ) -> None:
        assert step <= stretch_max < names_max
        self._breathe = breathe
        self._names_max, self._stretch_max, self._step = names_max, stretch_max, step
        self._directories: dict[tuple[Tree, int], _Directory] = {}  # the longest unused first
        self._passes = self._generations = 0
        self.names_kept = 0
        self.page_bytes = PAGE_BYTES  # of the kernel

    async def after(self, tree: Tree, node: int, position: int, limit: int) -> Sequence[tuple[bytes, int]]:
        """Up to `limit` names behind `position`, each with its own position; none: the end.

        Position 0 is the start; so are, for those who are there already, the others below FIRST. A name
        that is given may be gone: it was there when it was gathered.
        """
        key = tree, node
        known = self._directories.pop(key, None)
        if known is None:
            known = _Directory()
            self.names_kept += _DIRECTORY_COST
        self._directories[key] = known
        place = position >> GENERATION_BITS
        version = tree.listing_version(node)
        for stretch in known.stretches:
            if stretch.covers(place) and (position or (stretch.version == version is not None)):
                break
        else:
            stretch = await self._gather(key, known, place)
            version = tree.listing_version(node)
        if known.closed:
            if known.version != version or version is None:
                self._begin(known, version)
            elif position < FIRST:
                known.closed = False  # the kernel has lost it
        if known.version != version or stretch.version != version:
            known.mixed = True
        generation = known.generation
        if position >= FIRST and position & _GENERATION != generation:
            known.mixed = True
        first = bisect_left(stretch.places, place + 1)
        last = first + limit
        return [
            (name, number << GENERATION_BITS | generation)
            for name, number in zip(stretch.names[first:last], stretch.places[first:last], strict=True)
        ]

    def ended(self, tree: Tree, node: int, position: int) -> bool:
        """To be called when nothing is behind `position`. Whether the kernel may keep all that was given to
        those who come to this position; if not, it must drop it before it hears of the end.
        """
        known, version = self._directories.get((tree, node)), tree.listing_version(node)
        if known is None:
            return False
        keep = False
        if not known.mixed and known.version == version is not None:
            keep = known.closed and position & _GENERATION == known.generation
            for stretch in known.stretches:
                if stretch.is_whole and stretch.version == version and _leads_to(position, stretch, known):
                    keep = stretch.used < self.page_bytes  # see dirents.py
        if not keep:
            self._begin(known, version)
        known.closed = True
        self._drop(known)  # it is not read again soon: the kernel has it
        return keep

    def passed_over(self, tree: Tree, node: int) -> None:
        """Names of the directory were not passed on to a reader, because they are gone."""
        known = self._directories.get((tree, node))
        if known is not None:
            known.mixed = True

    def _begin(self, known: _Directory, version: int | None) -> None:
        self._generations += 1
        known.begin(self._generations, version)

    async def _gather(self, key: tuple[Tree, int], known: _Directory, place: int) -> _Stretch:
        """A new stretch behind `place`; kept, unless a reader began after this pass did."""
        tree, node = key
        self._passes += 1
        number = self._passes
        stretch = _Stretch(place, tree.listing_version(node))
        known.gathering += 1
        try:
            await self._fill(stretch, tree, node)
        finally:
            known.gathering -= 1
        if stretch.version != tree.listing_version(node):
            stretch.version = None
        if number > known.begun:
            if not place:
                known.begun = number
                self._drop(known)
            known.stretches.append(stretch)
            self.names_kept += len(stretch.names) + _STRETCH_COST
            self._trim()
        return stretch

    async def _fill(self, stretch: _Stretch, tree: Tree, node: int) -> None:
        """One pass over the names, in the tree's order, then the sorting. Short ones do not suspend."""
        buckets: dict[int, list[tuple[int, bytes]]] = {}
        low, below = stretch.low & _HASH, 1 << PLACE_BITS  # no bucket has so high a number
        count = 0
        names, behind = tree.list_names(node, None, self._step)
        if behind is None:
            self._take(stretch, [(place_of(name), name) for name in names])
            return
        while True:
            for name in names:
                place = place_of(name)
                if place >= low and (bucket := place >> _BUCKET_SHIFT) < below:
                    buckets.setdefault(bucket, []).append((place, name))
                    count += 1
            # Two are left at least: the first may hold no more than the name that has the position.
            while count > self._stretch_max and len(buckets) > 2:
                below = max(buckets)
                count -= len(buckets.pop(below))
                stretch.ends = False
            if behind is None:
                break
            if self._breathe is not None:
                await self._breathe()
            names, behind = tree.list_names(node, behind, self._step)
        taken = 0
        for bucket in sorted(buckets):
            if len(stretch.names) - taken > self._step and self._breathe is not None:
                taken = len(stretch.names)
                await self._breathe()
            self._take(stretch, buckets.pop(bucket))

    def _take(self, stretch: _Stretch, found: list[tuple[int, bytes]]) -> None:
        """Adds names that lie behind all that it has."""
        low, places, names = stretch.low, stretch.places, stretch.names
        last, had = 0, len(names)
        for place, name in sorted(found):
            last = place if place > last else last + 1
            if last > low:
                places.append(last)
                names.append(name)
        stretch.used = used_after(stretch.used, names[had:], self.page_bytes)

    # --- what is kept ---

    def _drop(self, known: _Directory) -> None:
        while known.stretches:
            self._drop_first(known)

    def _drop_first(self, known: _Directory) -> None:
        self.names_kept -= len(known.stretches.pop(0).names) + _STRETCH_COST

    def _trim(self) -> None:
        """The longest unused directory goes first, its oldest stretch before the others."""
        while self.names_kept > self._names_max:
            key, known = next(iter(self._directories.items()))
            if known.stretches:
                self._drop_first(known)
            if not known.stretches:
                del self._directories[key]
                if known.gathering:
                    self._directories[key] = known  # what it knows is needed yet
                else:
                    self.names_kept -= _DIRECTORY_COST


def _leads_to(position: int, stretch: _Stretch, known: _Directory) -> bool:
    """Whether those who were given a whole stretch in this generation are at this position."""
    if not stretch.names:
        return position < FIRST
    return position == stretch.places[-1] << GENERATION_BITS | known.generation


__all__ = ["FIRST", "Listings", "place_of"]
