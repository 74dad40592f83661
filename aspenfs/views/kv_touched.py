"""What a change that this mount did not make leaves stale in the kernel.

The kernel can only know what the table of nodes knows: an entry in a directory whose node it has. A key
that comes or goes may bring or take the directories above it, and may turn a file into a directory and
back; those entries are stale too. An entry of a directory that was there and still is must not
be named: dropping it from the kernel would pull it from under every process that is in it.
"""

from collections.abc import Iterator

from aspenfs.kv.types import Event, Record
from aspenfs.vfs.tree import Touched
from aspenfs.views.kv_attributes import is_symlink
from aspenfs.views.kv_nodes import FileNode
from aspenfs.views.kv_paths import VALUE_NAME, levels, place_of
from aspenfs.views.kv_space import KEYS, MARKERS, KeySpace


def touched(space: KeySpace, event: Event) -> Iterator[Touched]:
    key, record, previous = event
    if key.startswith((KEYS, MARKERS)):
        space.changes += 1
    if key.startswith(KEYS):
        yield from _file(space, key, record, previous)
        if record is None or previous is None or is_symlink(record) is not is_symlink(previous):
            path = key[len(KEYS):]
            prefix, name = place_of(path)
            yield from _directories(space, prefix)
            directories = space.nodes.directories
            if prefix not in directories and path + b"/" not in directories:
                return  # the kernel knows nothing beside it
            if space.is_directory(path + b"/"):
                yield from _entry(space, path + b"/", VALUE_NAME)
            else:
                yield from _entry(space, prefix, name)
    elif key.startswith(MARKERS):
        prefix = key[len(MARKERS):]
        yield from _directories(space, prefix)
        node = space.nodes.directories.get(prefix)
        if node is not None:
            yield Touched(node.id)


def _file(space: KeySpace, key: bytes, record: Record | None, previous: Record | None) -> Iterator[Touched]:
    """The node under a key that was put, merged or deleted."""
    nodes = space.nodes
    node: FileNode | None = nodes.files.get(key)
    if node is None:
        return
    if record is None or record.create_revision != node.created or is_symlink(record) is not node.symlink:
        # The file that the kernel knows is gone, whatever is under the key now.
        nodes.orphan(key, previous)
    yield Touched(node.id, data=node.key is not None)


def _directories(space: KeySpace, prefix: bytes) -> Iterator[Touched]:
    """Entries on the way down to `prefix` that became directories, or stopped being any."""
    directories = space.nodes.directories
    for parent, name, directory in levels(prefix):
        above = directories.get(parent)
        if above is None:
            return  # the kernel knows nothing below
        node = directories.get(directory)
        there = space.is_directory(directory)
        if node is not None and there is not node.absent:
            continue  # as it was
        if node is not None:
            node.absent = not there
        space.moved_on(above)
        yield Touched(parent=above.id, name=name)


def _entry(space: KeySpace, prefix: bytes, name: bytes) -> Iterator[Touched]:
    directory = space.nodes.directories.get(prefix)
    if directory is not None:
        space.moved_on(directory)
        yield Touched(parent=directory.id, name=name)
        yield Touched(directory.id)
