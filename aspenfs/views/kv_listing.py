"""Reading a directory of `kv/`: its entries in the order of components, from any position.

First `%value`, if the directory is a key too; then the components in byte order, unescaped; the
continuation directory of a long component directly behind the name that is its first piece. A position
depends on the name alone, not on what the name is, so an entry that stays is given exactly once
whatever becomes of it or its neighbours. Not here: what exists (`kv_space.py`).
"""

from collections.abc import Iterator, Sequence
from typing import Final

from aspenfs import errors
from aspenfs.kv.types import Record
from aspenfs.limits import NAME_BYTES_MAX
from aspenfs.vfs.tree import Attr
from aspenfs.views.kv_nodes import DirectoryNode
from aspenfs.views.kv_paths import (
    CONTINUED,
    PIECE_BYTES,
    PIECE_RAW_BYTES_MIN,
    VALUE_NAME,
    escape,
    escaped_bytes,
    first_piece,
    is_continuation,
)
from aspenfs.views.kv_space import KEYS, MARKERS, KeySpace
from aspenfs.views.kv_walk import components

Position = tuple[bytes, int]  # component and one of:
_VALUE, _WHOLE, _CONTINUED = -1, 0, 1

BATCH: Final = 32
BATCH_MAX: Final = 512


def entries(space: KeySpace, directory: DirectoryNode,
            position: Position | None) -> Iterator[tuple[Position, Record | None]]:
    """Positions behind `position`; the record of a file, None for a directory."""
    prefix, least = directory.prefix, directory.name_bytes_min
    after = None if position is None or position[1] == _VALUE else position[0]
    keys = components(space.store, KEYS + prefix, after)
    markers = components(space.store, MARKERS + prefix, after)
    key, marker = next(keys, None), next(markers, None)
    while key is not None or marker is not None:
        record: Record | None = None
        below = continued = False
        if marker is None or (key is not None and key[0] <= marker[0]):
            assert key is not None  # the loop's condition
            raw, record, below = key
        else:
            raw = marker[0]
        if marker is not None and marker[0] == raw:
            # A marker that ends with its component, not with "/", is that of a continuation.
            continued = marker[1] is not None and raw != b""
            below = below or marker[2]
            marker = next(markers, None)
        if key is not None and key[0] == raw:
            key = next(keys, None)
        size = escaped_bytes(raw) if least or len(raw) >= PIECE_RAW_BYTES_MIN else 0
        if size >= PIECE_BYTES and (piece := first_piece(raw)) != raw:
            # The first of those whose names begin with `piece`, long or not.
            here = (piece, _CONTINUED)
            if (position is None or position < here) and space.is_directory(prefix + piece):
                yield here, None
                position = here
        if least <= size <= NAME_BYTES_MAX and (below or record is not None):
            position = (raw, _WHOLE)
            yield position, None if below else record
        if continued and first_piece(raw) == raw:
            position = (raw, _CONTINUED)
            yield position, None


class KVListing:
    """An open directory. Cookies count the entries given, and stay good until the start is read again."""

    def __init__(self, space: KeySpace, directory: DirectoryNode) -> None:
        self.space, self.directory = space, directory
        self.positions: list[Position] = []
        # As many entries at a time as the kernel's buffer has lately taken: what does not fit is
        # asked for again, and must be fresh then.
        self.batch = BATCH
        self.last = 0  # cookie of the last entry given

    async def after(self, cookie: int, limit: int) -> Sequence[tuple[bytes, Attr, int]]:
        given: list[tuple[bytes, Attr, int]] = []
        positions = self.positions
        taken = self.batch - (self.last - cookie)
        self.batch = min(2 * self.batch, BATCH_MAX) if taken == self.batch else max(taken, 1)
        limit = min(limit, self.batch)
        if cookie == 0:
            positions.clear()
            self._add_value(given)
            position = None
        elif cookie <= len(positions):
            position = positions[cookie - 1]
        else:
            raise errors.InvalidArgument(f"no such position in the directory: {cookie}")
        if self.directory.removed or len(given) >= limit:
            return given
        for at, record in entries(self.space, self.directory, position):
            name, attr = self._entry(at, record)
            positions.append(at)
            given.append((name, attr, len(positions)))
            if len(given) >= limit:
                break
        self.last = len(positions)
        return given

    def _add_value(self, given: list[tuple[bytes, Attr, int]]) -> None:
        """The key that the directory is besides."""
        space, prefix = self.space, self.directory.prefix
        if self.directory.removed or len(prefix) < 2 or is_continuation(prefix):
            return
        key = KEYS + prefix[:-1]
        record = space.store.get(key)
        if record is not None:
            self.positions.append((b"", _VALUE))
            given.append((VALUE_NAME, space.file_attr(space.nodes.file(key, record), record), 1))

    def _entry(self, position: Position, record: Record | None) -> tuple[bytes, Attr]:
        space = self.space
        raw, stage = position
        path = self.directory.prefix + raw
        if record is not None:
            node = space.nodes.file(KEYS + path, record)
            return escape(raw), space.file_attr(node, record)
        if stage == _CONTINUED:
            return escape(raw) + CONTINUED, space.directory_attr(space.directory_node(path))
        return escape(raw), space.directory_attr(space.directory_node(path + b"/"))
