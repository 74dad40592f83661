"""What exists below `kv/`: keys and directory markers of the store, seen as files and directories.

    k/<key>      a user key
    d/<prefix>   the marker of a directory that somebody made, with its attributes; never a key

A directory exists if it has a marker or if a key or marker is below it (then it is *implicit*). A name
that is a directory is never shown as a file; the key of the same name is `%value` inside it. What a
change through the mount empties stays: the directory gets a marker in the same transaction, so
that none vanishes under a shell. Not here: names (`kv_paths.py`), node ids (`kv_nodes.py`).
"""

import stat
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from aspenfs import errors
from aspenfs.kv.store import Store
from aspenfs.kv.types import (
    NO_ATTRIBUTES,
    Compare,
    Event,
    Operation,
    Record,
    TxnResult,
    absent,
    exists,
    merge,
    prefix_end,
    put,
    range_empty,
    set_attributes,
)
from aspenfs.limits import KEY_BYTES_MAX, NAME_BYTES_MAX
from aspenfs.seams import Clock
from aspenfs.vfs.tree import Attr, Caller
from aspenfs.views.kv_attributes import (
    DIRECTORY_MODE,
    GID,
    MODE,
    MTIME,
    UID,
    file_attr,
    number,
    stamp,
    times,
)
from aspenfs.views.kv_nodes import DirectoryNode, FileNode, Nodes
from aspenfs.views.kv_paths import Child, child, escaped_bytes, is_continuation, name_bytes_min
from aspenfs.views.kv_walk import components

KEYS: Final = b"k/"
MARKERS: Final = b"d/"
CONFLICTS_MAX: Final = 64  # a change that loses this many races in a row gives up with EAGAIN


class Change(NamedTuple):
    """Part of a transaction: what must hold, and what happens then."""

    compares: list[Compare]
    operations: list[Operation]


class Move:
    """A rename under way: `follow` takes the nodes along, once, when it is applied. `witness` is one of the
    keys that go, `target` where it goes."""

    __slots__ = ("_follow", "_followed", "target", "witness")

    def __init__(self, witness: bytes, target: bytes, follow: Callable[[], None]) -> None:
        self.witness, self.target, self._follow, self._followed = witness, target, follow, False

    def follow(self) -> None:
        if not self._followed:
            self._followed = True
            self._follow()


class KeySpace:
    """The store as the tree sees it. `origin` marks our own changes to the store's observers."""

    def __init__(self, store: Store, clock: Clock, uid: int, gid: int) -> None:
        self.store, self.clock, self.uid, self.gid = store, clock, uid, gid
        self.nodes = Nodes()
        self.moves: list[Move] = []
        self.origin: object = self
        self.started_ns = clock.time_ns()
        self.changes = 0  # of keys and markers, by whomever, and attempts; counted once they are there

    # --- nodes ---

    def directory(self, node: int) -> DirectoryNode:
        """Stale: a node never given out or forgotten. NotADirectory."""
        found = self.nodes.by_id.get(node)
        if found is None:
            raise errors.Stale(node)
        if not isinstance(found, DirectoryNode):
            raise errors.NotADirectory(node)
        return found

    def directory_node(self, prefix: bytes) -> DirectoryNode:
        return self.nodes.directories.get(prefix) or self.nodes.directory(prefix, name_bytes_min(prefix))

    def file(self, node: int) -> FileNode:
        """Stale. IsADirectory."""
        found = self.nodes.by_id.get(node)
        if found is None:
            raise errors.Stale(node)
        if not isinstance(found, FileNode):
            raise errors.IsADirectory(node)
        return found

    def living_directory(self, node: int) -> DirectoryNode:
        """A directory in which a name can be made. NotFound if it is gone (as in a removed cwd)."""
        found = self.directory(node)
        if found.removed or not self.is_directory(found.prefix):
            raise errors.NotFound(found.prefix)
        return found

    def record(self, node: FileNode) -> Record | None:
        """What the file's key holds; None if this file is not in the store any more.

        Another file under the same key is another node: what was opened before never sees it.
        """
        key = node.key
        if key is None:
            return None
        record = self.store.get(key)
        if record is not None and record.create_revision == node.created:
            return record
        if self.nodes.files.get(key) is node:
            del self.nodes.files[key]
        node.key = None
        return None

    def content(self, node: FileNode) -> Record:
        """As `record`, or what an unlinked file held last. Stale if nobody saw it go."""
        record = self.record(node) or node.orphan
        if record is None:
            raise errors.Stale(node.id)
        return record

    # --- what exists ---

    def try_child(self, parent: DirectoryNode, name: bytes) -> Child | None:
        """What `name` would stand for; None: nothing ever. NameTooLong."""
        if parent.name_bytes_min == 0 and b"%" not in name and name not in (b".", b".."):
            # The usual name, without its detour.
            key = parent.prefix + name
            if len(name) <= NAME_BYTES_MAX and len(key) < KEY_BYTES_MAX:
                return Child(key, key + b"/")
        return child(parent.prefix, name)

    def child(self, parent: DirectoryNode, name: bytes) -> Child:
        """As `try_child`, for making it. InvalidArgument: it can stand for nothing."""
        found = self.try_child(parent, name)
        if found is None:
            raise errors.InvalidArgument(f"{name!r} is not the name of a key (docs/design/kv-paths.md)")
        return found

    def marker(self, prefix: bytes) -> Record | None:
        return self.store.get(MARKERS + prefix)

    def is_directory(self, prefix: bytes, *, likely: bool = True) -> bool:
        """`likely` looks at the marker alone first."""
        if not prefix or (likely and self.store.get(MARKERS + prefix) is not None):
            return True
        if is_continuation(prefix):
            return self.store.get(MARKERS + prefix) is not None or self._is_continued(prefix)
        for space in (KEYS, MARKERS):
            base = space + prefix
            if self.store.range(base, prefix_end(base), limit=1, keys_only=True):
                return True
        return False

    def _is_continued(self, prefix: bytes) -> bool:
        """Whether anything is in a continuation, its own marker aside.

        That is a component too long for one name; shorter ones are in the directory above.
        """
        least = name_bytes_min(prefix)
        for space in (KEYS, MARKERS):
            for raw, record, _ in components(self.store, space + prefix, None):
                marker = space is MARKERS and record is not None  # of a continuation of this one
                if raw and (marker or escaped_bytes(raw) >= least):
                    return True
        return False

    def is_removable(self, prefix: bytes) -> bool:
        """It has a marker, nothing below it, and is no key besides."""
        return (
            self.store.get(MARKERS + prefix) is not None
            and self._is_empty(prefix)
            and (len(prefix) < 2 or is_continuation(prefix) or self.store.get(KEYS + prefix[:-1]) is None)
        )

    def _is_empty(self, prefix: bytes) -> bool:
        if is_continuation(prefix):
            return not self._is_continued(prefix)
        keys, markers = KEYS + prefix, MARKERS + prefix
        return not (
            self.store.range(keys, prefix_end(keys), limit=1, keys_only=True)
            or self.store.range(markers + b"\0", prefix_end(markers), limit=1, keys_only=True)
        )

    # --- attributes ---

    def file_attr(self, node: FileNode, record: Record) -> Attr:
        return file_attr(node.id, record, self.uid, self.gid, 0 if node.key is None else 1)

    def directory_attr(self, node: DirectoryNode) -> Attr:
        """stat(2) of a directory. NotFound if it is gone without having been removed here."""
        marker = self.store.get(MARKERS + node.prefix) if not node.removed else None
        if marker is not None:
            node.absent = False
            return self._directory_attr(node, marker, 1)
        if node.removed or not node.prefix:
            return self._directory_attr(node, None, 0 if node.removed else 1)
        if is_continuation(node.prefix):
            if not self._is_continued(node.prefix):
                node.absent = True
                raise errors.NotFound(node.prefix)
            node.absent = False
            return self._directory_attr(node, None, 1)
        for space in (KEYS, MARKERS):
            base = space + node.prefix
            found = self.store.range(base, prefix_end(base), limit=1, keys_only=True)
            if found:
                node.absent = False
                # Implicit: nobody stored a time for it. That of the first thing in it is one that
                # stays and costs one seek.
                return self._directory_attr(node, None, 1, times(found[0][1])[1])
        node.absent = True
        raise errors.NotFound(node.prefix)

    def _directory_attr(self, node: DirectoryNode, marker: Record | None, nlink: int,
                        mtime: int | None = None) -> Attr:
        # One link, as btrfs has it: "unknown" to find(1), since counting the directories below
        # would cost a walk.
        if marker is not None:
            attributes = marker.attributes
            atime, mtime, ctime = times(marker)
        else:
            attributes = NO_ATTRIBUTES
            atime = mtime = ctime = self.started_ns if mtime is None else mtime
        if node.changed_ns > ctime:
            mtime = ctime = node.changed_ns  # later than whatever was set
        elif node.changed_ns > mtime and MTIME not in attributes:
            mtime = node.changed_ns
        mode = stat.S_IFDIR | (number(attributes, MODE, DIRECTORY_MODE) & 0o7777)
        return Attr(node.id, mode, nlink, number(attributes, UID, self.uid),
                    number(attributes, GID, self.gid), 0, 0, 0, atime, mtime, ctime)

    def owner(self, parent: DirectoryNode, mode: int, caller: Caller,
              directory: bool = False) -> dict[str, int | bytes | str]:
        """Attributes of something new: a setgid directory gives its group (and the bit to directories)."""
        now = self.clock.time_ns()
        marker = self.marker(parent.prefix)
        gid, mode = caller.gid, mode & 0o7777
        if marker is not None and number(marker.attributes, MODE, 0) & stat.S_ISGID:
            gid = number(marker.attributes, GID, self.gid)
            if directory:
                mode |= stat.S_ISGID
        return {MODE: mode, UID: caller.uid, GID: gid, MTIME: now}

    def moved_on(self, node: DirectoryNode) -> None:
        """Others changed names in it: its times move on, also if the clock does not, or theirs is ahead.

        By them the kernel tells that a listing is old which it was given just before the change.
        """
        marker = self.marker(node.prefix)
        shown = max(node.changed_ns, 0 if marker is None else times(marker)[2])
        node.changed_ns = max(self.clock.time_ns(), shown + 1)

    # --- changes ---

    def arriving(self, parent: DirectoryNode, now_ns: int) -> Change:
        """What goes along when a name is made in `parent`: it still is there, and changed now."""
        parent.changed_ns = now_ns
        key = MARKERS + parent.prefix
        if self.store.get(key) is None:
            return Change([], [])
        return Change([exists(key)], [merge(key, set_attributes(stamp(now_ns)))])

    def leaving(self, parent: DirectoryNode, start: bytes, end: bytes, now_ns: int) -> Change:
        """What goes along when [start, end), user keys, goes out of `parent`: it stays, if only empty."""
        change = self.arriving(parent, now_ns)
        prefix = parent.prefix
        if change.operations or not prefix or self._remains(prefix, start, end):
            return change
        key = MARKERS + prefix
        return Change([absent(key)], [put(key, b"", 0, {MTIME: now_ns})])

    def _remains(self, prefix: bytes, start: bytes, end: bytes) -> bool:
        if is_continuation(prefix):
            return False  # its neighbours share the range: better a marker too many
        for space in (KEYS, MARKERS):
            base = space + prefix
            for low, high in ((base, min(space + start, prefix_end(base))),
                              (max(space + end, base), prefix_end(base))):
                if low < high and self.store.range(low, high, limit=1, keys_only=True):
                    return True
        return False

    def applied(self, event: Event) -> None:
        """A change of our own, at apply. On several nodes whoever asked for it goes on some time later, and
        others look meanwhile: what the kernel knows must fit at once."""
        key, record, previous = event
        if not key.startswith(KEYS):
            return
        for move in self.moves:
            target = self.store.get(move.target) if key == move.witness else None
            if target is not None and target.mod_revision == self.store.revision:
                move.follow()
                return
        if record is None:
            self.nodes.orphan(key, previous)

    async def commit(self, change: Change) -> TxnResult | None:
        """The result, or None if a compare did not hold (look again, then try again)."""
        try:
            result = await self.store.txn(change.compares, change.operations, origin=self.origin)
        finally:
            self.changes += 1
        return result if result.succeeded else None


def no_directory(prefix: bytes | None) -> Iterator[Compare]:
    """Compares that hold if nothing is at or below `prefix`."""
    if prefix is not None and not is_continuation(prefix):
        for space in (KEYS, MARKERS):
            yield range_empty(space + prefix, prefix_end(space + prefix))
    elif prefix is not None:
        yield absent(MARKERS + prefix)


def together(*changes: Change | Sequence[Change]) -> Change:
    """One transaction of several parts, in their order."""
    joined = Change([], [])
    for change in changes:
        for part in [change] if isinstance(change, Change) else change:
            joined.compares.extend(part.compares)
            joined.operations.extend(part.operations)
    return joined
