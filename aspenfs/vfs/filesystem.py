"""The mounted whole: trees side by side, inode numbers, lookup counts and open files, as FUSE speaks of them.

An inode number is `[16 bits tree][48 bits node id]`. Tree 0 is the root directory, which lists the
others; a subtree mount makes one directory of a tree the root instead. Number 1 is always the root.

Lookup counts (fuse(4), FUSE_FORGET): the kernel's knowledge of an inode is counted up by each reply that
carries an entry (lookup, mknod, mkdir, symlink, link, create, readdirplus) and down by forget. A tree
learns that a node is forgotten when the count is 0 and no handle is open on it. Directories have no
handles: the kernel knows one as long as anybody has it open.
"""

import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, Final, TypeVar

from aspenfs import errors
from aspenfs.kv.types import Event
from aspenfs.vfs.coherence import UNCACHED, Coherence, Validity
from aspenfs.vfs.listings import Listings
from aspenfs.vfs.tree import Attr, Caller, OpenFile, SetAttr, Touched, Tree, Usage

ROOT_INODE: Final = 1
NODE_BITS: Final = 48
NODE_MASK: Final = (1 << NODE_BITS) - 1
HELD_NAMES_A_STEP: Final = 512
KNOWN_KEPT: Final = 1 << 16  # inodes for which the table's memory is kept, whatever the kernel forgets
# What is answered from the state as it is here, and may be so only here.
REFUSALS: Final = (
    errors.NotFound,
    errors.AlreadyExists,
    errors.NotADirectory,
    errors.IsADirectory,
    errors.DirectoryNotEmpty,
    errors.InvalidArgument,  # a loop
    errors.TooManyLinks,
    errors.NoAttribute,
    errors.NotPermitted,
    errors.Stale,
)
Result = TypeVar("Result")


class RootTree(Tree):
    """The root directory of a whole mount: one entry per tree, nothing else, nothing to change."""

    root = ROOT_INODE
    entry_timeout_s = attr_timeout_s = 3600.0
    shared = False

    def __init__(self, trees: Sequence[Tree], now_ns: int) -> None:
        self.trees = {tree.name.encode(): tree for tree in trees}
        self.attr = Attr(
            ROOT_INODE, stat.S_IFDIR | 0o755, 2 + len(trees), 0, 0, 0, len(trees), 0, *[now_ns] * 3
        )

    async def getattr(self, node: int) -> Attr:
        return self.attr

    def list_names(self, node: int, behind: Any, limit: int) -> tuple[Sequence[bytes], Any]:
        return list(self.trees), None

    def listing_version(self, node: int) -> int | None:
        return 0

    async def statfs(self) -> Usage:
        return await next(iter(self.trees.values())).statfs()


class Handle:
    """An open file of the kernel's."""

    __slots__ = ("ino", "target", "tree")

    def __init__(self, tree: Tree, ino: int, target: OpenFile) -> None:
        self.tree, self.ino, self.target = tree, ino, target


class FileSystem:
    """Routes operations on inode numbers to trees. Errors are those of `aspenfs.errors`."""

    def __init__(
        self,
        trees: Sequence[Tree],
        now_ns: int,
        coherence: Coherence | None = None,
        breathe: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`coherence` (default: a node alone) says when to wait for others, and tells the kernel of them.
        `breathe` is awaited between the steps of long work, so that others get their turn."""
        self.coherence = coherence or Coherence()
        self.coherence.govern(trees)
        self.listings, self._breathe = Listings(breathe), breathe
        self.root_tree = RootTree(trees, now_ns)
        self.trees: list[Tree] = [self.root_tree, *trees]
        self.concerned: dict[bytes, list[Tree]] = {}  # by keyspace of the store
        for tree in trees:
            for keyspace in tree.keyspaces:
                self.concerned.setdefault(keyspace, []).append(tree)
        self.keyspaces = tuple(self.concerned)
        self.numbers = {id(tree): index << NODE_BITS for index, tree in enumerate(self.trees)}
        self.root: tuple[Tree, int] = (self.root_tree, ROOT_INODE)
        self.root_number = ROOT_INODE  # what the root would be called, were it not the root
        self.known: dict[int, int] = {}  # inode number -> lookup count
        self._most_known = 0  # since it was last made anew
        self.open_counts: dict[int, int] = {}
        self.handles: dict[int, Handle] = {}
        self.next_handle = 1
        for tree in trees:
            tree.is_known = partial(self._knows, self.numbers[id(tree)])  # type: ignore[method-assign]
            tree.displaced = partial(self._displaced, tree)  # type: ignore[method-assign]
            tree.misnamed = partial(self._misnamed, tree)  # type: ignore[method-assign]
            tree.fresh = self.coherence.barrier  # type: ignore[method-assign]

    def _knows(self, base: int, node: int) -> bool:
        return base | node in self.known

    def _displaced(self, tree: Tree, node: int) -> None:
        self.coherence.touched(self.ino_of(tree, node), True)

    def _misnamed(self, tree: Tree, parent: int, name: bytes) -> None:
        self.coherence.renamed(self.ino_of(tree, parent), name, None)

    def knows(self, ino: int) -> bool:
        """Whether the kernel may hold anything about an inode. The root it knows without having asked."""
        return ino in self.known or ino == ROOT_INODE

    async def use_subtree(self, path: bytes) -> None:
        """Makes the directory at `path` (from the whole mount's root) the root. NotFound, NotADirectory."""
        parts = [part for part in path.split(b"/") if part]
        tree, node = self.root
        shown = path.decode(errors="replace")
        for part in parts:
            try:
                tree, attr = await self._walk(tree, node, part)
            except errors.NotFound:
                missing = part.decode(errors="replace")
                raise errors.NotFound(f"the subtree {shown} does not exist: no {missing!r}") from None
            node = attr.node
            if not stat.S_ISDIR(attr.mode):
                raise errors.NotADirectory(f"the subtree {shown} is not a directory")
        self.root = (tree, node)
        self.root_number = self.numbers[id(tree)] | node

    async def _walk(self, tree: Tree, node: int, name: bytes) -> tuple[Tree, Attr]:
        if tree is self.root_tree:
            below = self.root_tree.trees.get(name)
            if below is None:
                raise errors.NotFound(name)
            return below, await below.getattr(below.root)
        return tree, await tree.lookup(node, name)

    # --- numbers ---

    def locate(self, ino: int) -> tuple[Tree, int]:
        """The tree and node of an inode number."""
        if ino == ROOT_INODE:
            return self.root
        return self.trees[ino >> NODE_BITS], ino & NODE_MASK

    def ino_of(self, tree: Tree, node: int) -> int:
        ino = self.numbers[id(tree)] | node
        return ROOT_INODE if ino == self.root_number else ino

    def remember(self, ino: int) -> None:
        """A reply that carries this entry is about to be sent."""
        known = self.known
        known[ino] = known.get(ino, 0) + 1

    def forget(self, ino: int, count: int) -> None:
        left = self.known.get(ino, 0) - count
        if left > 0:
            self.known[ino] = left
            return
        self._most_known = max(self._most_known, len(self.known))
        self.known.pop(ino, None)
        self.coherence.forgotten(ino)
        if self._most_known > KNOWN_KEPT and len(self.known) < self._most_known >> 2:
            self.known = dict(self.known)  # a dict gives no memory back by itself
            self._most_known = len(self.known)
        if ino not in self.open_counts:
            tree, node = self.locate(ino)
            tree.forgotten(node)

    # --- entries ---

    async def lookup(self, parent: int, name: bytes) -> tuple[int, Validity, Attr]:
        tree, node = self.locate(parent)
        if tree.shared:
            await self.coherence.barrier()
        try:
            if tree is self.root_tree:
                tree, attr = await self._walk(tree, node, name)
            else:
                attr = await tree.lookup(node, name)
        except errors.NotFound:
            if tree.negative_timeout_s:
                self.coherence.absent(parent, name)
            raise
        return self._entry(tree, attr)

    def _entry(self, tree: Tree, attr: Attr) -> tuple[int, Validity, Attr]:
        ino = self.ino_of(tree, attr.node)
        self.remember(ino)
        return ino, tree, attr

    def _made(self, tree: Tree, parent: int, name: bytes, attr: Attr) -> tuple[int, Validity, Attr]:
        """The entry that our own transaction has made: it may be another one's by now."""
        ino, validity, attr = self._entry(tree, attr)
        if not self.coherence.alone and not tree.names_it(parent, name, attr.node):
            validity = UNCACHED
        return ino, validity, attr

    async def _sure(self, operation: Callable[[], Awaitable[Result]]) -> Result:
        """What is done is right, for it is checked when it applies. What is refused may be refused by a
        state that lags behind: then it is looked at again behind a barrier."""
        coherence = self.coherence
        revision = coherence.store.revision
        try:
            return await operation()
        except REFUSALS:
            if not await coherence.has_newer(revision):
                raise
        return await operation()

    async def getattr(self, ino: int) -> tuple[Validity, Attr]:
        tree, node = self.locate(ino)
        if tree.shared:
            await self.coherence.strict_barrier()
        attr = await tree.getattr(node)
        if tree.shared and self.asks_anew(attr.mode):
            await self.coherence.barrier()
            attr = await tree.getattr(node)
        return UNCACHED if tree.is_under_way(node) else tree, attr

    def asks_anew(self, mode: int) -> bool:
        """Whether the kernel must ask for the attributes of such an inode each time: it opens directories
        without asking, and keeps their listings as long as their times stand."""
        coherence = self.coherence
        return coherence.opendir_unasked and coherence.asks_for_directories() and stat.S_ISDIR(mode)

    async def setattr(self, ino: int, wanted: SetAttr, caller: Caller) -> tuple[Validity, Attr]:
        tree, node = self.locate(ino)
        try:
            attr = await self._sure(partial(tree.setattr, node, wanted, caller))
            return UNCACHED if tree.is_under_way(node) else tree, attr
        except errors.AspenError:
            self.coherence.touched(ino, True)  # some of it may have happened
            raise

    async def readlink(self, ino: int) -> bytes:
        tree, node = self.locate(ino)
        return await tree.readlink(node)

    async def mknod(
        self, parent: int, name: bytes, mode: int, rdev: int, caller: Caller
    ) -> tuple[int, Validity, Attr]:
        tree, node = self.locate(parent)
        attr = await self._sure(partial(tree.mknod, node, name, mode, rdev, caller))
        return self._made(tree, node, name, attr)

    async def mkdir(self, parent: int, name: bytes, mode: int, caller: Caller) -> tuple[int, Validity, Attr]:
        tree, node = self.locate(parent)
        attr = await self._sure(partial(tree.mkdir, node, name, mode, caller))
        return self._made(tree, node, name, attr)

    async def symlink(
        self, parent: int, name: bytes, target: bytes, caller: Caller
    ) -> tuple[int, Validity, Attr]:
        tree, node = self.locate(parent)
        attr = await self._sure(partial(tree.symlink, node, name, target, caller))
        return self._made(tree, node, name, attr)

    async def link(self, ino: int, parent: int, name: bytes) -> tuple[int, Validity, Attr]:
        tree, node = self.locate(ino)
        new_tree, new_parent = self.locate(parent)
        if tree is not new_tree:
            raise errors.CrossTree("a link cannot point into another tree")
        attr = await self._sure(partial(tree.link, node, new_parent, name))
        return self._made(tree, new_parent, name, attr)

    async def unlink(self, parent: int, name: bytes) -> None:
        tree, node = self.locate(parent)
        await self._sure(partial(tree.unlink, node, name))

    async def rmdir(self, parent: int, name: bytes) -> None:
        tree, node = self.locate(parent)
        await self._sure(partial(tree.rmdir, node, name))

    async def rename(self, parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int) -> None:
        tree, node = self.locate(parent)
        new_tree, new_node = self.locate(new_parent)
        if tree is not new_tree:
            raise errors.CrossTree("a rename cannot cross trees")
        await self._sure(partial(tree.rename, node, name, new_node, new_name, flags))

    # --- extended attributes ---

    async def getxattr(self, ino: int, name: bytes) -> bytes:
        tree, node = self.locate(ino)
        await self.coherence.strict_barrier()
        return await tree.getxattr(node, name)

    async def listxattr(self, ino: int) -> Sequence[bytes]:
        tree, node = self.locate(ino)
        await self.coherence.strict_barrier()
        return await tree.listxattr(node)

    async def setxattr(
        self, ino: int, name: bytes, value: bytes, caller: Caller | None = None
    ) -> None:
        tree, node = self.locate(ino)
        await self._sure(partial(tree.setxattr, node, name, value, caller))

    async def removexattr(self, ino: int, name: bytes, caller: Caller | None = None) -> None:
        tree, node = self.locate(ino)
        await self._sure(partial(tree.removexattr, node, name, caller))

    # --- handles ---

    def _add_handle(self, tree: Tree, ino: int, target: OpenFile) -> int:
        fh = self.next_handle
        self.next_handle = fh + 1
        self.handles[fh] = Handle(tree, ino, target)
        self.open_counts[ino] = self.open_counts.get(ino, 0) + 1
        return fh

    def _drop_handle(self, fh: int) -> Handle | None:
        handle = self.handles.pop(fh, None)
        if handle is not None:
            ino = handle.ino
            left = self.open_counts[ino] - 1
            if left:
                self.open_counts[ino] = left
            else:
                del self.open_counts[ino]
        return handle

    async def open(self, ino: int, flags: int, caller: Caller) -> tuple[int, OpenFile, bool]:
        """The last item: whether the kernel's pages of the file are right."""
        tree, node = self.locate(ino)
        if tree.shared:
            await self.coherence.barrier()
            await self.coherence.told(ino)
        return self._opened(tree, ino, await tree.open(node, flags, caller))

    def _opened(self, tree: Tree, ino: int, target: OpenFile) -> tuple[int, OpenFile, bool]:
        if self.coherence.reads_past_pages(tree):
            target.direct_io = True
        keeps = self.coherence.opened(ino) and target.keep_cache
        return self._add_handle(tree, ino, target), target, keeps

    async def create(
        self, parent: int, name: bytes, mode: int, flags: int, caller: Caller
    ) -> tuple[int, OpenFile, bool, int, Validity, Attr]:
        tree, node = self.locate(parent)
        attr, target = await self._sure(partial(tree.create, node, name, mode, flags, caller))
        ino, validity, attr = self._made(tree, node, name, attr)
        return *self._opened(tree, ino, target), ino, validity, attr

    def file(self, fh: int) -> OpenFile:
        handle = self.handles.get(fh)
        if handle is None:
            raise errors.BadHandle(f"no open file {fh}")
        return handle.target

    async def release(self, fh: int) -> None:
        handle = self._drop_handle(fh)
        if handle is None:
            return
        await handle.target.release()
        if handle.ino not in self.known and handle.ino not in self.open_counts:
            tree, node = self.locate(handle.ino)
            tree.forgotten(node)

    # --- directories ---

    async def opendir(self, ino: int) -> None:
        """For the kernel that asks: what was committed anywhere before is in the listing that follows."""
        if self.locate(ino)[0].shared:
            await self.coherence.barrier()

    async def names(self, ino: int, position: int, limit: int) -> Sequence[tuple[bytes, int]]:
        """Up to `limit` names behind `position`, without . and .., see `Listings.after`."""
        tree, node = self.locate(ino)
        await tree.settled(node)
        return await self.listings.after(tree, node, position, limit)

    def ended(self, ino: int, position: int) -> bool:
        """Whether the kernel may keep what it was given up to `position`, the end: `Listings.ended`. Not with
        other hosts: all that it asks before it uses a listing are the directory's times, which may be set."""
        keep = self.listings.ended(*self.locate(ino), position)
        return keep and not self.coherence.asks_for_directories()

    def passed_over(self, ino: int) -> None:
        self.listings.passed_over(*self.locate(ino))

    async def listed(self, ino: int, names: Sequence[bytes]) -> list[tuple[int, Tree, Attr] | None]:
        """What names that were listed are now, None: gone; not yet lookups, see `remember`."""
        tree, node = self.locate(ino)
        if tree is self.root_tree:
            below = [await self._walk(tree, node, name) for name in names]
            return [(self.ino_of(tree, attr.node), tree, attr) for tree, attr in below]
        base = self.numbers[id(tree)]
        return [
            None if attr is None else (base | attr[0], tree, attr) for attr in await tree.listed(node, names)
        ]

    async def dots(self, ino: int) -> list[tuple[int, Tree, bytes, Attr]]:
        """The entries . and .. of a directory; none if it is gone."""
        tree, node = self.locate(ino)
        try:
            here = ino, tree, b".", await tree.getattr(node)
            if ino == ROOT_INODE:
                return [here, (*here[:2], b"..", here[3])]
            if node == tree.root:
                above, up = self.root_tree, ROOT_INODE
            else:
                above, up = tree, tree.parent_of(node)  # type: ignore[assignment]
            return [here, (self.ino_of(above, up), above, b"..", await above.getattr(up))]
        except errors.NotFound:
            return []

    # --- the rest ---

    async def statfs(self, ino: int) -> Usage:
        tree, _ = self.locate(ino)
        return await tree.statfs()

    async def sync(self) -> None:
        for tree in self.trees:
            await tree.sync()

    # --- changes ---

    def noticed(self, events: Iterable[Event], *, own: bool) -> None:
        """Changes of the store, at apply. Those that are not this mount's `own` leave the kernel with
        something out of date: it is told."""
        if own and self.coherence.store.alone:
            return
        for event in events:
            for tree in self.concerned.get(event[0][:2], ()):
                tree.noticed(event, own)
                if not own:
                    for touched in tree.touched(event):
                        self._tell(tree, touched)

    def _tell(self, tree: Tree, touched: Touched) -> None:
        node, data, parent, name, child = touched
        coherence = self.coherence
        if node is not None:
            ino = self.ino_of(tree, node)
            if self.knows(ino):
                coherence.touched(ino, data)
        if parent is not None:
            above = self.ino_of(tree, parent)
            if self.knows(above):  # else it knows no names in it
                known = None if child is None else bool(child) and self.knows(self.ino_of(tree, child))
                coherence.renamed(above, name, known)

    def look(self) -> bool:
        """To be called often: notices whether this node is alone. True if others have come: the kernel may
        hold what it was given for an hour (`names_held`)."""
        if not self.coherence.look() or self.coherence.alone:
            return False
        self.coherence.everything(self.known)
        return True

    def replaced(self) -> None:
        """The state is another one: nobody knows what has changed."""
        for tree in self.trees:
            tree.replaced()
        self.coherence.everything(self.known)

    async def names_held(self) -> AsyncIterator[tuple[int, bytes]]:
        """(directory, name) of all names of stored inodes that the kernel may know, for kernels that can not
        be told to doubt all of them at once."""
        for ino in list(self.known):
            tree, node = self.locate(ino)
            behind: Any = None
            while True:
                try:
                    names, behind = tree.list_names(node, behind, HELD_NAMES_A_STEP)
                    for name, entry in zip(names, await self.listed(ino, names), strict=True):
                        if entry is not None and self.knows(entry[0]):
                            yield ino, name
                except errors.AspenError:
                    break  # no directory, or none any more
                if self._breathe is not None:
                    await self._breathe()
                if behind is None:
                    break


__all__ = ["ROOT_INODE", "FileSystem", "Handle", "RootTree"]
