"""The state database of a simulated node: what `runtime/statedb.py` promises, and nothing beyond it.

A batch is written with its applied index and its meta in one transaction. Power loss may undo the newest
transaction, never more and never half; `sync` makes it stay. The end of the process alone undoes nothing. A
state that came in as a snapshot takes the place of the old one in one durable step.
"""

import random
from collections.abc import Iterator, Mapping, Sequence

from aspenfs.cluster.types import Configuration
from aspenfs.kv import machine
from aspenfs.kv.memory import MemoryState
from aspenfs.kv.state import Effect
from aspenfs.kv.types import Record
from aspenfs.runtime.consensus import (
    META_CONFIGURATION,
    META_TERM,
    decode_configuration,
    encode_configuration,
)


class Image:
    """A state standing still: what travels as a snapshot."""

    __slots__ = ("applied_index", "items", "meta")

    def __init__(
        self, items: Sequence[tuple[bytes, Record]], applied_index: int, meta: Mapping[str, bytes]
    ) -> None:
        self.items, self.applied_index, self.meta = items, applied_index, dict(meta)


class SimState:
    """A `kv.state.State` that outlives the process that uses it."""

    def __init__(self) -> None:
        self._memory = MemoryState()
        self._meta: dict[str, bytes] = {}
        self._undo: tuple[list[Effect], int, dict[str, bytes]] | None = None
        self.applied_index = 0
        self.durable_index = 0  # power loss does not go back behind it

    def get(self, key: bytes) -> Record | None:
        return self._memory.get(key)  # type: ignore[no-any-return]

    def items(self, start: bytes, end: bytes, *, reverse: bool = False) -> Iterator[tuple[bytes, Record]]:
        return self._memory.items(start, end, reverse=reverse)

    def meta(self, name: str) -> bytes | None:
        return self._meta.get(name)

    def apply(self, items: Sequence[Effect], applied_index: int, meta: Mapping[str, bytes]) -> None:
        assert applied_index >= self.applied_index
        before = [(key, self._memory.get(key)) for key, _ in items]
        self._undo = (before, self.applied_index, dict(self._meta))
        self.durable_index = self.applied_index  # the commit has synced the one before
        self._memory.apply(items)
        self._meta.update(meta)
        self.applied_index = applied_index

    def sync(self) -> int:
        self._undo = None
        self.durable_index = self.applied_index
        return self.durable_index

    def lose_power(self, rng: random.Random) -> None:
        if self._undo is not None and rng.random() < 0.5:
            before, self.applied_index, self._meta = self._undo
            self._memory.apply(before)
        self._undo = None
        self.durable_index = self.applied_index

    # --- snapshots ---

    def image(self) -> Image:
        return Image(list(self._memory.items(b"", b"")), self.applied_index, self._meta)

    def become(self, image: Image) -> None:
        """The old state is gone, this one is durable."""
        self._memory = MemoryState()
        self._memory.apply(image.items)
        self._meta = dict(image.meta)
        self._undo = None
        self.applied_index = self.durable_index = image.applied_index

    def digest(self) -> bytes:
        return machine.state_hash(self)


# --- its meta, as `runtime/consensus.py` writes it ---


def meta_of(term: int, configuration: Configuration) -> dict[str, bytes]:
    return {META_TERM: term.to_bytes(8, "big"), META_CONFIGURATION: encode_configuration(configuration)}


def term_of(state: SimState) -> int:
    """Of the entry at the applied index."""
    return int.from_bytes(state.meta(META_TERM) or b"", "big")


def configuration_of(state: SimState) -> Configuration:
    packed = state.meta(META_CONFIGURATION)
    assert packed is not None
    return decode_configuration(packed)
