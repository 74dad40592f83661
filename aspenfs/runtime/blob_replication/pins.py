"""What other nodes were promised to find here: chunks that collection spares for BLOB_PIN_S.

A node that is about to name a chunk has asked a majority to keep it, and may be answered by a log entry
only seconds later. Pins are kept in a few generations, so that they cost one set entry each and end many
at a time. They are not written down: a node that has just started spares everything for so long.
"""

from collections.abc import Callable
from typing import Final

from aspenfs.limits import BLOB_PIN_S, BLOB_PINS_MAX

_PARTS: Final = 4  # a pin lasts one to one and a quarter times as long as was promised
_NS: Final = 10**9


class Pins:
    """Digests that are spared. `now_ns` is CLOCK_BOOTTIME: a machine that slept has kept its promise."""

    def __init__(
        self, now_ns: Callable[[], int], *, pin_s: float = BLOB_PIN_S, most: int = BLOB_PINS_MAX
    ) -> None:
        self._now, self._most = now_ns, most
        self._part_ns = int(pin_s * _NS) // _PARTS
        self._began = now_ns()  # of the newest generation
        self._generations: list[set[bytes]] = [set() for _ in range(_PARTS + 1)]  # the newest first
        self._ended: set[bytes] = set()

    def add(self, digest: bytes) -> bool:
        """False if there is no room for it: then nothing was promised."""
        self._turn()
        newest = self._generations[0]
        if digest not in newest and len(self) >= self._most:
            return False
        newest.add(digest)
        return True

    def __contains__(self, digest: bytes) -> bool:
        self._turn()
        return any(digest in generation for generation in self._generations)

    def __len__(self) -> int:
        """One that was renewed counts again."""
        return sum(map(len, self._generations))

    def ended(self) -> set[bytes]:
        """Those whose time went by since this was last asked; some may have been pinned again."""
        self._turn()
        ended, self._ended = self._ended, set()
        return ended

    def _turn(self) -> None:
        parts = (self._now() - self._began) // self._part_ns
        if parts > 0:
            self._began += parts * self._part_ns
            for _ in range(min(parts, _PARTS + 1)):
                self._generations.insert(0, set())
                self._ended |= self._generations.pop()
