"""What tests of trees stand on: a clock, callers, and a tree driven by paths as a kernel would drive it."""

import os
from collections.abc import Awaitable, Callable, Sequence
from itertools import count

import trio

from aspenfs import errors
from aspenfs.kv.local import LocalStore
from aspenfs.kv.types import Event
from aspenfs.vfs.listings import Listings
from aspenfs.vfs.tree import Attr, OpenFile, SetAttr, Touched, Tree
from aspenfs.views.kv import KVTree

SECONDS_MAX = 60


class StepClock:
    """A clock that moves a microsecond with each look."""

    def __init__(self) -> None:
        self.now_ns = 1_700_000_000_000_000_000

    def time_ns(self) -> int:
        self.now_ns += 1000
        return self.now_ns

    def monotonic_ns(self) -> int:
        return self.time_ns()


class CountingEntropy:
    def __init__(self) -> None:
        self._numbers = count(1)

    def random_bytes(self, size: int) -> bytes:
        return next(self._numbers).to_bytes(size, "little")


class User:
    """A caller."""

    def __init__(self, uid: int = 0, gid: int = 0) -> None:
        self.uid, self.gid, self.pid, self.umask = uid, gid, 1, 0o022


ROOT = User()


class Mounted:
    """A tree by paths. Each call walks from the root, as a kernel that has cached nothing."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.listings = Listings()

    async def stat(self, path: bytes) -> Attr:
        attr = await self.tree.getattr(self.tree.root)
        for name in path.split(b"/") if path else ():
            attr = await self.tree.lookup(attr.node, name)
        return attr

    async def exists(self, path: bytes) -> bool:
        try:
            await self.stat(path)
        except errors.NotFound:
            return False
        return True

    async def place(self, path: bytes) -> tuple[int, bytes]:
        directory, _, name = path.rpartition(b"/")
        return (await self.stat(directory)).node, name

    async def create(self, path: bytes, data: bytes = b"", mode: int = 0o644, user: User = ROOT) -> Attr:
        """A new file with content; AlreadyExists."""
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        attr, file = await self.tree.create(*await self.place(path), mode, flags, user)
        if data:
            assert await file.write(0, data) == len(data)
        await file.release()
        return attr

    async def open(self, path: bytes, flags: int = os.O_RDWR) -> OpenFile:
        return await self.tree.open((await self.stat(path)).node, flags, ROOT)

    async def read(self, path: bytes) -> bytes:
        file = await self.open(path, os.O_RDONLY)
        data = await whole(file)
        await file.release()
        return data

    async def write(self, path: bytes, data: bytes) -> None:
        """As the shell's `>`."""
        flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY
        _, file = await self.tree.create(*await self.place(path), 0o644, flags, ROOT)
        assert await file.write(0, data) == len(data)
        await file.release()

    async def append(self, path: bytes, data: bytes) -> None:
        """As the shell's `>>`."""
        file = await self.open(path, os.O_WRONLY | os.O_APPEND)
        await file.write(0, data)
        await file.release()

    async def set(self, path: bytes, wanted: SetAttr) -> Attr:
        return await self.tree.setattr((await self.stat(path)).node, wanted, ROOT)

    async def mkdir(self, path: bytes, mode: int = 0o755, user: User = ROOT) -> Attr:
        return await self.tree.mkdir(*await self.place(path), mode, user)

    async def symlink(self, target: bytes, path: bytes) -> Attr:
        return await self.tree.symlink(*await self.place(path), target, ROOT)

    async def link(self, old: bytes, new: bytes) -> Attr:
        return await self.tree.link((await self.stat(old)).node, *await self.place(new))

    async def unlink(self, path: bytes) -> None:
        await self.tree.unlink(*await self.place(path))

    async def rmdir(self, path: bytes) -> None:
        await self.tree.rmdir(*await self.place(path))

    async def rename(self, old: bytes, new: bytes, flags: int = 0) -> None:
        await self.tree.rename(*await self.place(old), *await self.place(new), flags)

    async def names(self, path: bytes = b"", limit: int = 7) -> list[bytes]:
        return [name for name, _ in await self.entries(path, limit)]

    async def entries(self, path: bytes = b"", limit: int = 7) -> list[tuple[bytes, Attr]]:
        """A directory read to its end, in batches, without . and ..; in the tree's own order."""
        node = (await self.stat(path)).node
        found: dict[bytes, Attr] = {}
        position = 0
        while batch := await self.after(node, position, limit):
            assert len(batch) <= limit
            for name, _ in batch:
                assert name not in found
                found[name] = await self.tree.lookup(node, name)
            position = batch[-1][1]
        names, end = self.tree.list_names(node, None, 1 << 20)
        assert end is None
        assert set(names) == set(found)
        return [(name, found[name]) for name in names]

    async def after(self, node: int, position: int, limit: int) -> list[tuple[bytes, int]]:
        """Names in the directory `node` behind `position`, as READDIR has them."""
        return list(await self.listings.after(self.tree, node, position, limit))


async def whole(file: OpenFile, step: int = 65_536) -> bytes:
    data = b""
    while piece := await file.read(len(data), step):
        data += piece
    return data


class KVSetup:
    """kv/ over a store in memory, and what its observers told."""

    def __init__(self) -> None:
        self.clock = StepClock()
        self.store = LocalStore(self.clock, CountingEntropy(), trio.Event)
        self.tree = KVTree(self.store, self.clock, uid=1000, gid=1000)
        self.mounted = Mounted(self.tree)
        self.stale: list[Touched] = []
        self.events: list[Event] = []
        self.store.observe(self._observe)

    def _observe(self, revision: int, events: Sequence[Event], origin: object) -> None:
        self.events += events
        if origin is not self.tree.origin:
            for event in events:
                self.stale += self.tree.touched(event)

    def keys(self) -> dict[bytes, bytes]:
        """What is in the store, user keys only."""
        return {key[2:]: record.value for key, record in self.store.range(b"k/", b"k0")}


def run(test: Callable[[KVSetup], Awaitable[None]]) -> None:
    async def main() -> None:
        with trio.fail_after(SECONDS_MAX):
            await test(KVSetup())

    trio.run(main)
