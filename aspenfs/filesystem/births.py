"""Files that are made and not committed yet: open(2) with O_CREAT has returned, the rest goes on behind it.

The first transaction of a new file says that it is there, the second one what was written to it. One after
the other they cost two rounds and two syncs. Where the first has its place in the log, and with it its
outcome, at once (`kv.store.Store.begin`), the program goes on, and when it closes the file both are with
the others by one sync. close(2) and fsync(2) return when both are committed, with the error if one is not.

Until then the file is known here by its birth. Everything else that asks for it, for its name or for its
directory on this host waits; other hosts' barriers wait by themselves. docs/design/coherence.md, "New files".
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from aspenfs import errors
from aspenfs.filesystem.layout import HAS_XATTRS, Inode, inode_key
from aspenfs.filesystem.namespace import Birth, Namespace
from aspenfs.filesystem.volume import Tasks, Volume
from aspenfs.kv.watch import Signal

Failed = Callable[[int, int, bytes, errors.AspenError], None]


class _Child:
    """A birth under way, and who waits for it."""

    __slots__ = ("birth", "failure", "name", "node", "parent", "waiters")

    def __init__(self, birth: Birth, node: int, parent: int, name: bytes) -> None:
        self.birth, self.node, self.parent, self.name = birth, node, parent, name
        self.failure: errors.AspenError | None = None
        self.waiters: list[Signal] = []


class Births:
    """Those of one mount. `failed(node, directory, name, error)` hears of a file that is not there after all,
    though it was open."""

    def __init__(self, volume: Volume, names: Namespace, failed: Failed) -> None:
        self.volume, self.names, self.failed = volume, names, failed
        self.children: Final[dict[int, _Child]] = {}  # by inode
        self._by_name: dict[tuple[int, bytes], _Child] = {}

    def begin(self, parent: int, name: bytes, mode: int, uid: int, gid: int, node: int) -> Inode | None:
        """Makes a regular file, to be waited for later; None where that is not possible: `Namespace.make`."""
        tasks = self.volume.tasks
        if tasks is None or (parent, name) in self._by_name:
            return None
        birth = self.names.begin(parent, name, mode, uid, gid, node)
        if birth is None:
            return None
        child = _Child(birth, node, parent, name)
        self.children[node] = self._by_name[parent, name] = child
        tasks.spawn(partial(self._see_to, child, uid, gid))
        return birth.inode

    async def _see_to(self, child: _Child, uid: int, gid: int) -> None:
        failure: errors.AspenError | None = None
        try:
            if not (await child.birth.begun.outcome()).succeeded:
                # Another host led in between. Perhaps it only changed the directory.
                inode = child.birth.inode
                await self.names.make(child.parent, child.name, inode.mode, uid, gid, node=child.node)
        except errors.AspenError as error:
            failure = error
        except BaseException as error:
            failure = errors.Lost(f"file {child.name!r} was given up: {error!r}")
            raise
        finally:
            child.failure = failure
            del self.children[child.node], self._by_name[child.parent, child.name]
            if failure is not None:
                self.failed(child.node, child.parent, child.name, failure)
            for waiter in child.waiters:
                waiter.set()

    def names_it(self, parent: int, name: bytes, node: int) -> bool:
        child = self._by_name.get((parent, name))
        return child is not None and child.node == node

    def has_no_attributes(self, node: int) -> bool:
        """Whether it is a file under way, and made without extended attributes."""
        child = self.children.get(node)
        return child is not None and not child.birth.inode.flags & HAS_XATTRS

    def inside(self, directory: int) -> tuple[int, int]:
        """How many files are being made in a directory, and the time of the last one."""
        get = self.volume.store.get
        times = [
            child.birth.inode.mtime
            for child in self.children.values()
            if child.parent == directory and get(inode_key(child.node)) is None
        ]
        return len(times), max(times, default=0)

    # --- waiting ---

    async def own(self, node: int) -> None:
        """Returns when a file that was begun is its maker's (`Begun.held`). Its error, if another was faster.
        """
        child = self.children.get(node)
        if child is not None and not await child.birth.begun.held():
            await self.settled(node)
            if child.failure is not None:
                raise child.failure

    async def settled(self, node: int) -> None:
        """Returns when this file, and those in this directory, are committed or failed."""
        some = [child for child in self.children.values() if node in (child.node, child.parent)]
        await self._all_over(some)

    async def named(self, parent: int, name: bytes) -> None:
        """The same for what has this name."""
        child = self._by_name.get((parent, name))
        if child is not None:
            await self._over(child)

    async def all_settled(self) -> None:
        await self._all_over(list(self.children.values()))

    async def _all_over(self, some: Sequence[_Child]) -> None:
        """Of those that come meanwhile nobody waits for any."""
        for child in some:
            if self.children.get(child.node) is child:
                await self._over(child)

    async def _over(self, child: _Child) -> None:
        tasks: Tasks | None = self.volume.tasks
        assert tasks is not None  # else nothing is ever under way
        signal = tasks.event()
        child.waiters.append(signal)
        child.birth.begun.hurry()
        await signal.wait()
