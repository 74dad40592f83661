"""Reading a directory of `kv/`: its names in the order of components, from any position.

First `%value`, if the directory is a key too; then the components in byte order, unescaped; the
continuation directory of a long component directly behind the name that is its first piece. A position
depends on the name alone, not on what the name is, so an entry that stays is given exactly once
whatever becomes of it or its neighbours. Not here: what exists (`kv_space.py`).
"""

from collections.abc import Iterator

from aspenfs.kv.types import Record
from aspenfs.limits import NAME_BYTES_MAX
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


def list_names(space: KeySpace, directory: DirectoryNode, behind: Position | None,
               limit: int) -> tuple[list[bytes], Position | None]:
    """As `Tree.list_names`: what to go on from is the last position."""
    names: list[bytes] = []
    if directory.removed:
        return names, None
    if behind is None and _is_key(space, directory.prefix):
        names.append(VALUE_NAME)
        behind = (b"", _VALUE)
    if len(names) < limit:
        for position, _ in entries(space, directory, behind):
            raw, stage = behind = position
            names.append(escape(raw) + CONTINUED if stage == _CONTINUED else escape(raw))
            if len(names) == limit:
                break
    return names, behind if len(names) == limit else None


def _is_key(space: KeySpace, prefix: bytes) -> bool:
    """Whether the directory is a key besides."""
    if len(prefix) < 2 or is_continuation(prefix):
        return False
    return space.store.get(KEYS + prefix[:-1]) is not None and space.is_directory(prefix)
