"""Moving names below `kv/`: one transaction for a file, a directory with all below it, or an exchange.

A directory has no record that could be re-hung: its keys are renamed one by one, all at once. What fits
into one transaction moves atomically (RENAME_KEYS_MAX keys and markers, TXN_BYTES_MAX bytes);
beyond that CrossTree, at which mv(1) copies. The transaction holds only if each key moved is as it was read
and no key has come between them.
"""

from collections.abc import Sequence
from functools import partial
from typing import Final, NamedTuple

from aspenfs import errors
from aspenfs.kv.types import (
    EQUAL,
    Compare,
    Operation,
    Record,
    absent,
    compare_mod_revision,
    delete,
    prefix_end,
    put,
    range_empty,
)
from aspenfs.limits import KEY_BYTES_MAX, TXN_OPS_MAX
from aspenfs.views.kv_attributes import CTIME, MTIME, times
from aspenfs.views.kv_names import Found, look, nothing_in
from aspenfs.views.kv_nodes import DirectoryNode, FileNode
from aspenfs.views.kv_paths import is_continuation, levels, place_of
from aspenfs.views.kv_space import (
    CONFLICTS_MAX,
    KEYS,
    MARKERS,
    Change,
    KeySpace,
    Move,
    no_directory,
    together,
)

RENAME_KEYS_MAX: Final = 58  # each takes up to two compares and two operations
NOREPLACE: Final = 1
EXCHANGE: Final = 2

assert 2 * RENAME_KEYS_MAX + 12 <= TXN_OPS_MAX


class Source(NamedTuple):
    """What is moved: (key in the store, record) of all of it, and compares that hold while that is all."""

    directory: bool
    old: bytes  # user key of a file, prefix of a directory
    new: bytes
    items: Sequence[tuple[bytes, Record]]
    compares: list[Compare]


async def rename(space: KeySpace, parent: int, name: bytes, new_parent: int, new_name: bytes,
                 flags: int) -> None:
    if flags not in (0, NOREPLACE, EXCHANGE):
        raise errors.InvalidArgument(f"flags of rename: {flags}")
    for _ in range(CONFLICTS_MAX):
        if await _rename(space, space.directory(parent), name, space.living_directory(new_parent), new_name,
                         flags):
            return
    raise errors.Conflict(name)


async def _rename(space: KeySpace, parent: DirectoryNode, name: bytes, new_parent: DirectoryNode,
                  new_name: bytes, flags: int) -> bool:
    found = look(space, parent, name)
    if found is None:
        raise errors.NotFound(name)
    victim = look(space, new_parent, new_name)
    if flags & NOREPLACE and victim is not None:
        raise errors.AlreadyExists(new_name)
    old, new = _path(space, parent, name, found), _path(space, new_parent, new_name, found)
    if old == new:
        return True
    if flags & EXCHANGE:
        if victim is None:
            raise errors.NotFound(new_name)
        sources = [_source(space, found, old, new),
                   _source(space, victim, _path(space, new_parent, new_name, victim),
                           _path(space, parent, name, victim))]
        change = Change([compare for source in sources for compare in source.compares], [])
    else:
        sources = [_source(space, found, old, new)]
        change = together(Change(sources[0].compares, []),
                          _replacing(space, found, victim, new, space.child(new_parent, new_name).directory))
    if sum(len(source.items) for source in sources) > RENAME_KEYS_MAX:
        raise errors.CrossTree(f"more than {RENAME_KEYS_MAX} keys do not move at once")
    now = space.clock.time_ns()
    replaced = None if flags & EXCHANGE else victim
    change = together(change, Change([], _moves(sources, replaced, now)),
                      _parents(space, parent, new_parent, sources[0], flags, now))
    witness = sources[0].items[0][0]
    move = Move(witness, moved(witness, sources[0]), partial(_follow, space, sources, replaced))
    space.moves.append(move)
    try:
        if await space.commit(change) is None:
            return False
    except errors.TxnTooLarge as error:
        raise errors.CrossTree(f"too much to move at once: {error}") from None
    finally:
        space.moves.remove(move)
    move.follow()
    return True


def _path(space: KeySpace, parent: DirectoryNode, name: bytes, found: Found) -> bytes:
    """The key or prefix that `found` has under a name."""
    key, prefix = space.child(parent, name)
    path = prefix if isinstance(found, DirectoryNode) else key
    if path is None:
        raise errors.InvalidArgument(f"{name!r} cannot name that")
    return path


def _source(space: KeySpace, found: Found, old: bytes, new: bytes) -> Source:
    if not isinstance(found, DirectoryNode):
        record = found[1]
        key = KEYS + old
        return Source(False, old, new, [(key, record)],
                      [compare_mod_revision(key, EQUAL, record.mod_revision)])
    if is_continuation(old) or is_continuation(new):
        raise errors.CrossTree("the directory of a long component cannot be renamed as a whole")
    if new.startswith(old):
        raise errors.InvalidArgument("a directory cannot go into itself")
    items, compares = [], []
    for space_prefix in (KEYS, MARKERS):
        start, end = space_prefix + old, prefix_end(space_prefix + old)
        position = start
        for key, record in space.store.range(start, end, limit=RENAME_KEYS_MAX + 1):
            if position < key:
                compares.append(range_empty(position, key))
            compares.append(compare_mod_revision(key, EQUAL, record.mod_revision))
            items.append((key, record))
            position = key + b"\0"
        compares.append(range_empty(position, end))
    own = KEYS + old[:-1]  # the key that the directory is besides
    record_or_none = space.store.get(own) if own != KEYS else None
    if record_or_none is not None:
        items.append((own, record_or_none))
        compares.append(compare_mod_revision(own, EQUAL, record_or_none.mod_revision))
    elif own != KEYS:
        compares.append(absent(own))
    return Source(True, old, new, items, compares)


def _replacing(space: KeySpace, found: Found, victim: Found | None, new: bytes,
               prefix: bytes | None) -> Change:
    """What must hold of the name moved to, and what goes with it."""
    if isinstance(found, DirectoryNode):
        if victim is None:
            assert prefix is not None  # _path said so
            return Change([*no_directory(prefix), absent(KEYS + prefix[:-1])]
                          if len(prefix) > 1 else [*no_directory(prefix)], [])
        if not isinstance(victim, DirectoryNode):
            raise errors.NotADirectory(victim[0].key)
        if not space.is_removable(victim.prefix):
            raise errors.DirectoryNotEmpty(victim.prefix)
        return Change(nothing_in(victim.prefix), [])
    if victim is None:
        return Change([absent(KEYS + new), *no_directory(prefix)], [])
    if isinstance(victim, DirectoryNode):
        raise errors.IsADirectory(victim.prefix)
    node, record = victim
    assert node.key is not None  # it was found under it
    return Change([compare_mod_revision(node.key, EQUAL, record.mod_revision), *no_directory(prefix)], [])


def _moves(sources: Sequence[Source], replaced: Found | None, now_ns: int) -> list[Operation]:
    """At most one operation for each key, however the sources and what they replace overlap."""
    puts, filled = [], set()
    for source in sources:
        for key, record in source.items:
            target = moved(key, source)
            if len(target) > KEY_BYTES_MAX + len(KEYS):
                raise errors.NameTooLong(target)
            attributes = dict(record.attributes)
            if key.startswith(KEYS):
                attributes[MTIME] = times(record)[1]  # or a time that came from the revision would change
                if not source.directory:
                    attributes[CTIME] = now_ns
            puts.append(put(target, record.value, record.lease, attributes))
            filled.add(target)
    gone = [key for source in sources for key, _ in source.items]
    if isinstance(replaced, DirectoryNode):
        gone.append(MARKERS + replaced.prefix)
    return [*(delete(key) for key in gone if key not in filled), *puts]


def moved(key: bytes, source: Source) -> bytes:
    """Where a key of the store goes. A directory's own key has its prefix without the slash."""
    tag, old, new = key[:2], source.old, source.new
    path = key[2:]
    if path == old:
        return tag + new
    return tag + (new + path[len(old):] if path.startswith(old) else new[:-1])


def _parents(space: KeySpace, parent: DirectoryNode, new_parent: DirectoryNode, source: Source, flags: int,
             now_ns: int) -> Change:
    arriving = space.arriving(new_parent, now_ns)
    if parent is new_parent:
        return arriving
    if flags & EXCHANGE:
        return together(arriving, space.arriving(parent, now_ns))
    old = source.old
    end = prefix_end(KEYS + old)[len(KEYS):] if source.directory else old + b"\0"
    return together(arriving, space.leaving(parent, old, end, now_ns))


def _follow(space: KeySpace, sources: Sequence[Source], replaced: Found | None) -> None:
    """The nodes that the kernel knows go along, with their ids."""
    nodes = space.nodes
    if isinstance(replaced, DirectoryNode):
        nodes.remove_directory(replaced.prefix)
    elif replaced is not None and replaced[0].key is not None:
        nodes.orphan(replaced[0].key, replaced[1])
    files: list[tuple[FileNode, bytes]] = []
    directories: list[tuple[DirectoryNode, bytes]] = []
    for source in sources:
        files += [(nodes.files[key], moved(key, source)) for key, _ in source.items if key in nodes.files]
        if source.directory:
            directories += [(nodes.directories[prefix], source.new + prefix[len(source.old):])
                            for prefix in _prefixes(source) if prefix in nodes.directories]
    for file, key in files:
        record = space.store.get(key)
        if record is not None:
            nodes.move(file, key, record.create_revision)
    for directory, prefix in directories:
        nodes.move_directory(directory, prefix)


def _prefixes(source: Source) -> set[bytes]:
    """All directories that the items of a directory make."""
    prefixes = {source.old}
    for key, _ in source.items:
        path = key[len(KEYS):]
        prefix = path if key.startswith(MARKERS) else place_of(path)[0]
        if prefix.startswith(source.old):
            prefixes.update(level.directory for level in levels(prefix))
    return {prefix for prefix in prefixes if prefix.startswith(source.old)}
