"""Making and removing names below `kv/`: each one transaction, tried again when it lost a race.

What was looked up holds in the transaction, by its compares, or nothing is done. Not here: moving
what exists (`kv_rename.py`), contents (`kv_files.py`).
"""

import os

from aspenfs import errors
from aspenfs.kv.merge import changed_attributes
from aspenfs.kv.types import (
    EQUAL,
    Compare,
    Record,
    absent,
    compare_mod_revision,
    delete,
    exists,
    prefix_end,
    put,
    range_empty,
)
from aspenfs.limits import SYMLINK_BYTES_MAX
from aspenfs.vfs.tree import Caller
from aspenfs.views.kv_attributes import SYMLINK, TYPE, is_symlink
from aspenfs.views.kv_nodes import DirectoryNode, FileNode
from aspenfs.views.kv_paths import VALUE_NAME, is_continuation
from aspenfs.views.kv_space import CONFLICTS_MAX, KEYS, MARKERS, Change, KeySpace, no_directory, together

Found = tuple[FileNode, Record] | DirectoryNode


def look(space: KeySpace, parent: DirectoryNode, name: bytes) -> Found | None:
    """What is under a name now: a directory before a key. None for a name that never stands for anything."""
    if parent.removed:
        return None
    child = space.try_child(parent, name)
    if child is None:
        return None
    key, prefix = child
    record = space.store.get(KEYS + key) if key is not None else None
    if prefix is not None and space.is_directory(prefix, likely=record is None):
        return space.directory_node(prefix)
    if key is None or (name == VALUE_NAME and not space.is_directory(parent.prefix)):
        return None  # where the directory is gone, its key has its own name again
    return None if record is None else (space.nodes.file(KEYS + key, record), record)


async def make_file(space: KeySpace, parent: int, name: bytes, mode: int, flags: int,
                    caller: Caller) -> tuple[FileNode, Record, bool]:
    """An existing one is given as it is, unless O_EXCL. The last item: it was made."""
    for _ in range(CONFLICTS_MAX):
        directory = space.living_directory(parent)
        found = look(space, directory, name)
        if isinstance(found, DirectoryNode):
            raise errors.AlreadyExists(name) if flags & os.O_EXCL else errors.IsADirectory(name)
        if found is not None:
            if flags & os.O_EXCL:
                raise errors.AlreadyExists(name)
            if is_symlink(found[1]):
                raise errors.LoopDetected(name)  # the kernel follows links, and looked before this one came
            return *found, False
        made = await _make(space, directory, name, b"", space.owner(directory, mode, caller))
        if made is not None:
            return *made, True
    raise errors.Conflict(name)


async def make_symlink(space: KeySpace, parent: int, name: bytes, target: bytes,
                       caller: Caller) -> tuple[FileNode, Record]:
    if len(target) > SYMLINK_BYTES_MAX:
        raise errors.NameTooLong(target)
    for _ in range(CONFLICTS_MAX):
        directory = space.living_directory(parent)
        if look(space, directory, name) is not None:
            raise errors.AlreadyExists(name)
        attributes = space.owner(directory, 0o777, caller) | {TYPE: SYMLINK}
        made = await _make(space, directory, name, target, attributes)
        if made is not None:
            return made
    raise errors.Conflict(name)


async def _make(space: KeySpace, directory: DirectoryNode, name: bytes, value: bytes,
                attributes: dict[str, int | bytes | str]) -> tuple[FileNode, Record] | None:
    """A new key, or None if anything came in between."""
    user_key, prefix = space.child(directory, name)
    if user_key is None:
        raise errors.InvalidArgument(f"{name!r} can only be a directory")
    key = KEYS + user_key
    change = Change([absent(key), *no_directory(prefix)], [put(key, value, 0, attributes)])
    result = await space.commit(together(change, space.arriving(directory, space.clock.time_ns())))
    if result is None:
        return None
    record = space.store.get(key)
    if record is not None and record.create_revision == result.revision:
        return space.nodes.file(key, record), record
    # Others have removed it since: it was there, and the caller has it open.
    ours = Record(value, result.revision, result.revision, 1, 0, 0, changed_attributes({}, attributes))
    return space.nodes.vanished(ours), ours


async def make_directory(space: KeySpace, parent: int, name: bytes, mode: int,
                         caller: Caller) -> DirectoryNode:
    for _ in range(CONFLICTS_MAX):
        directory = space.living_directory(parent)
        if look(space, directory, name) is not None:
            raise errors.AlreadyExists(name)
        key, prefix = space.child(directory, name)
        if prefix is None:
            raise errors.InvalidArgument(name) if name == VALUE_NAME else errors.NameTooLong(name)
        compares: list[Compare] = [*no_directory(prefix)]
        if key is not None:
            compares.append(absent(KEYS + key))
        attributes = space.owner(directory, mode, caller, directory=True)
        change = Change(compares, [put(MARKERS + prefix, b"", 0, attributes)])
        now = space.clock.time_ns()
        if await space.commit(together(change, space.arriving(directory, now))) is not None:
            node = space.directory_node(prefix)
            node.changed_ns, node.absent = 0, False  # its times are those of the marker
            return node
    raise errors.Conflict(name)


async def unlink(space: KeySpace, parent: int, name: bytes) -> None:
    for _ in range(CONFLICTS_MAX):
        directory = space.directory(parent)
        found = look(space, directory, name)
        if found is None:
            raise errors.NotFound(name)
        if isinstance(found, DirectoryNode):
            raise errors.IsADirectory(name)
        node, record = found
        key = node.key
        assert key is not None  # it was found under it
        change = Change([compare_mod_revision(key, EQUAL, record.mod_revision)], [delete(key)])
        start = key[len(KEYS):]
        stays = space.leaving(directory, start, start + b"\0", space.clock.time_ns())
        if await space.commit(together(change, stays)) is not None:
            # What it held is kept as long as the kernel knows the node: it may be open.
            if space.nodes.files.get(key) is node:
                space.nodes.orphan(key, record)
            return
    raise errors.Conflict(name)


async def rmdir(space: KeySpace, parent: int, name: bytes) -> None:
    for _ in range(CONFLICTS_MAX):
        directory = space.directory(parent)
        found = look(space, directory, name)
        if found is None:
            raise errors.NotFound(name)
        if not isinstance(found, DirectoryNode):
            raise errors.NotADirectory(name)
        prefix = found.prefix
        if not space.is_removable(prefix):
            raise errors.DirectoryNotEmpty(name)
        change = Change(nothing_in(prefix), [delete(MARKERS + prefix)])
        end = prefix_end(KEYS + prefix)[len(KEYS):]
        stays = space.leaving(directory, prefix, end, space.clock.time_ns())
        if await space.commit(together(change, stays)) is not None:
            if space.nodes.directories.get(prefix) is found:
                space.nodes.remove_directory(prefix)
            return
    raise errors.Conflict(name)


def nothing_in(prefix: bytes) -> list[Compare]:
    """Compares that hold while a directory has a marker and nothing else."""
    marker = MARKERS + prefix
    if is_continuation(prefix):
        # Short names of the directory above share its range. If a long one came in between, it is
        # not lost: the directory stays, implicit.
        return [exists(marker)]
    compares = [
        exists(marker),
        range_empty(KEYS + prefix, prefix_end(KEYS + prefix)),
        range_empty(marker + b"\0", prefix_end(marker)),
    ]
    if len(prefix) > 1:
        compares.append(absent(KEYS + prefix[:-1]))
    return compares
