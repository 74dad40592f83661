"""files/ without a kernel, over a log and blobs on a simulated disk: one life of it, op by op.

Used by test_power_loss_files.py. The operations and what they must lead to are those of the load on real
mounts (tests/mount/load_model.py); here `FilesTree` is called directly.
"""

import random
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from aspenfs.blobs.store import BlobStore
from aspenfs.filesystem import layout
from aspenfs.filesystem.check import Check
from aspenfs.filesystem.volume import Volume
from aspenfs.runtime.host import NodeStore
from aspenfs.sim.disk import SimDisk
from aspenfs.vfs.tree import SetAttr, Usage
from aspenfs.views.files import FilesTree
from tests.filesystem.volumes import CALLER
from tests.kv.subject import FakeClock, FakeEntropy
from tests.mount.load_model import Model, Operation, Seen, pattern
from tests.runtime.host_driver import hash_of

WAL_SEGMENT_BYTES = 1 << 16  # so that the log rolls over and is trimmed
BLOB_SEGMENT_BYTES = 1 << 18
O_RDWR, O_EXCL, O_APPEND = 0o2, 0o200, 0o2000


class Stack:
    """Blobs, store, volume and tree, as the daemon puts them together."""

    def __init__(self, directory: Path, disk: SimDisk) -> None:
        self.clock = FakeClock()
        self.blobs = BlobStore.open(disk, segment_bytes=BLOB_SEGMENT_BYTES)
        self.store = NodeStore.open(
            directory,
            self.clock,
            FakeEntropy(),
            disk=disk,
            pre_sync=[self.blobs.sync],
            verify_entry=lambda command: all(map(self.blobs.has, layout.named_digests(command))),
            segment_bytes=WAL_SEGMENT_BYTES,
            background=False,
        )
        self.volume = Volume(self.store, self.blobs, self.clock)
        self.tree = FilesTree(self.volume, lambda: Usage(4096, 100, 50, 0, 0))

    def close(self) -> None:
        self.store.close()
        self.blobs.close()

    # --- what the daemon does by itself now and then ---

    async def housekeeping(self) -> None:
        await self.tree.flush_atimes()
        while await self.tree.reap():
            pass
        self.store.apply()
        await self.tree.content.collect()
        for step in self.blobs.collect(step_bytes=1 << 16):
            if step.needs_sync:
                self.blobs.sync()

    # --- operations, by path ---

    async def perform(self, operation: Operation) -> None:
        kind, *arguments = operation
        await getattr(self, "_do_" + kind)(*arguments)

    async def _node(self, path: str) -> int:
        node = self.tree.root
        for name in path.split("/")[1:]:
            node = (await self.tree.lookup(node, name.encode())).node
        return node

    async def _place(self, path: str) -> tuple[int, bytes]:
        above, _, name = path.rpartition("/")
        return await self._node(above), name.encode()

    async def _do_mkdir(self, path: str) -> None:
        await self.tree.mkdir(*await self._place(path), 0o755, CALLER)

    async def _do_rmdir(self, path: str) -> None:
        await self.tree.rmdir(*await self._place(path))

    async def _do_create(self, path: str) -> None:
        _, file = await self.tree.create(*await self._place(path), 0o644, O_RDWR | O_EXCL, CALLER)
        await file.release()

    async def _do_write(self, path: str, offset: int, seed: int, size: int) -> None:
        file = await self.tree.open(await self._node(path), O_RDWR, CALLER)
        await file.write(offset, pattern(seed, size))
        await file.release()

    async def _do_append(self, path: str, seed: int, size: int) -> None:
        node = await self._node(path)
        file = await self.tree.open(node, O_RDWR | O_APPEND, CALLER)
        await file.write((await self.tree.getattr(node)).size, pattern(seed, size))
        await file.release()

    async def _do_truncate(self, path: str, size: int) -> None:
        await self.tree.setattr(await self._node(path), SetAttr(size=size), CALLER)

    async def _do_chmod(self, path: str, mode: int) -> None:
        await self.tree.setattr(await self._node(path), SetAttr(mode=mode), CALLER)

    async def _do_setxattr(self, path: str, name: str, seed: int, size: int) -> None:
        await self.tree.setxattr(await self._node(path), name.encode(), pattern(seed, size))

    async def _do_rename(self, old: str, new: str) -> None:
        await self.tree.rename(*await self._place(old), *await self._place(new), 0)

    async def _do_link(self, old: str, new: str) -> None:
        await self.tree.link(await self._node(old), *await self._place(new))

    async def _do_unlink(self, path: str) -> None:
        await self.tree.unlink(*await self._place(path))

    async def _do_unlink_open(self, path: str) -> None:
        """Nobody closes it: it stays an orphan until the next start."""
        await self.tree.open(await self._node(path), O_RDWR, CALLER)
        await self.tree.unlink(*await self._place(path))

    async def _do_sync(self, path: str) -> None:
        file = await self.tree.open(await self._node(path), O_RDWR, CALLER)
        await file.sync(False)
        await file.release()

    # --- looking ---

    async def look(self) -> dict[str, Seen]:
        found: dict[str, Seen] = {}
        first: dict[int, str] = {}
        nodes: dict[str, int] = {}
        pending = [("files", self.tree.root)]
        while pending:
            above, directory = pending.pop()
            for name in self.tree.list_names(directory, None, 1 << 20)[0]:
                attr = await self.tree.lookup(directory, name)
                path = f"{above}/{name.decode()}"
                nodes[path] = attr.node
                if stat.S_ISDIR(attr.mode):
                    pending.append((path, attr.node))
                    found[path] = Seen("directory", b"", 0, attr.nlink, (), "")
                    continue
                file = await self.tree.open(attr.node, O_RDWR, CALLER)
                data = bytes(await file.read(0, attr.size))
                await file.release()
                assert len(data) == attr.size
                names = await self.tree.listxattr(attr.node)
                pairs = [(name.decode(), await self.tree.getxattr(attr.node, name)) for name in names]
                mode, attributes = attr.mode & 0o7777, tuple(sorted(pairs))
                found[path] = Seen("file", data, mode, attr.nlink, attributes, "")
        for path in sorted(found):
            found[path] = found[path]._replace(same_as=first.setdefault(nodes[path], path))
        return found

    def assert_sound(self) -> None:
        """Every invariant holds, and every blob that an extent names is read and verified."""
        check = Check(self.store, self.blobs.has)
        assert list(check.problems()) == []
        for digest in check.references:
            assert self.blobs.get(digest)


def script(seed: int, count: int) -> Iterator[Operation]:
    """A life: files of all sizes, overwritten, saved over, moved, dropped, and synced now and then."""
    rng, model, serial = random.Random(seed), Model(), 0

    def fresh() -> str:
        nonlocal serial
        serial += 1
        return f"{rng.choice(['files', *model.directories('files/')])}/n{serial}"

    for _ in range(count):
        files = model.files("files/")
        path = rng.choice(files) if files else ""
        draw = rng.randrange(14) if len(files) > 3 else rng.randrange(2)
        size = rng.choice([40, 700, 3000, 20_000, 70_000, 110_000])
        burst: list[Operation]
        match draw:
            case 0 | 1:
                new = fresh()
                burst = [["create", new], ["write", new, 0, rng.getrandbits(32), size]]
                if path and draw:
                    burst += [["sync", new], ["rename", new, path]]
            case 2 | 3:
                burst = [
                    ["write", path, rng.randint(0, len(model.file(path).data)), rng.getrandbits(32), size]
                ]
            case 4:
                burst = [["append", path, rng.getrandbits(32), 900]]
            case 5:
                burst = [
                    ["truncate", path, rng.choice([0, rng.randint(0, len(model.file(path).data)), 90_000])]
                ]
            case 6 | 7:
                burst = [["unlink" if draw == 6 else "unlink_open", path]]
            case 8:
                burst = [["link", path, fresh()]]
            case 9:
                burst = [["rename", path, fresh()]]
            case 10:
                directories = model.directories("files/")
                empty = [one for one in directories if model.is_empty(one)]
                burst = (
                    [["rmdir", rng.choice(empty)]] if empty and len(directories) > 2 else [["mkdir", fresh()]]
                )
            case 11:
                burst = [["setxattr", path, "user.x", rng.getrandbits(32), 50], ["chmod", path, 0o600]]
            case _:
                burst = [["sync", path]]
        for operation in burst:
            model.apply(operation)
            yield operation


class Life:
    """One life under a script, and what is known of it from outside."""

    def __init__(self, directory: Path, disk: SimDisk, seed: int, count: int) -> None:
        self.directory, self.disk, self.seed, self.count = directory, disk, seed, count
        self.rng = random.Random(seed)
        self.hashes: dict[int, bytes] = {}  # by revision: all rows that were visible then
        self.seen: dict[int, dict[str, Seen]] = {}  # by revision: the files, between two operations
        self.model = Model()
        self.pending: Operation | None = None
        self.synced = 0  # the revision that the last fsync has made durable
        self.copies: list[tuple[int, Path]] = []  # (applied index, where): what LMDB may be found to hold
        self.stack: Stack | None = None

    async def live(self) -> None:
        """Raises SimulatedCrash when the disk goes down."""
        self.stack = stack = Stack(self.directory, self.disk)
        store = stack.store
        self._copy()
        store.observe(lambda revision, events, origin: self._remember(revision))
        await stack.volume.format()
        self._between()
        for operation in script(self.seed, self.count):
            self.pending = operation
            before = store.revision
            await stack.perform(operation)
            if operation[0] == "sync":
                self.synced = before
            self.model.apply(operation)
            self.pending = None
            self._between()
            if self.rng.random() < 0.12:
                await stack.housekeeping()
                self._copy()
                self._between()

    def _remember(self, revision: int) -> None:
        assert self.stack is not None
        self.hashes[revision] = hash_of(self.stack.store)

    def _between(self) -> None:
        assert self.stack is not None
        revision = self.stack.store.revision
        self._remember(revision)
        self.seen[revision] = self.model.seen()

    def _copy(self) -> None:
        assert self.stack is not None
        place = self.directory / f"copy-{len(self.copies)}"
        shutil.copytree(self.directory / "state", place)
        applied = self.stack.store.status()["applied"]
        assert isinstance(applied, int)
        self.copies.append((applied, place))

    def die(self, *, power: bool) -> None:
        """The process is gone; with the power also what LMDB had not synced: any copy since then is found."""
        assert self.stack is not None
        floor = self.stack.store.replay_floor
        self.stack.store._state.close()
        if power:
            candidates = [place for applied, place in self.copies if applied >= floor]
            shutil.rmtree(self.directory / "state")
            shutil.copytree(self.rng.choice(candidates), self.directory / "state")

    async def come_back(self, *, power: bool) -> None:
        """What is found is a prefix of what was done, with all that was promised; it goes on from there."""
        stack = Stack(self.directory, self.disk)
        revision = stack.store.revision
        last = max(self.hashes, default=0)
        assert revision >= (self.synced if power else last)
        assert revision <= last + 1
        stack.assert_sound()
        if revision in self.hashes:
            assert hash_of(stack.store) == self.hashes[revision]
        await stack.volume.format()
        stack.tree.orphans.recover()
        found = await stack.look()
        if revision in self.seen:
            assert found == self.seen[revision]
        elif revision > last and self.pending is not None:
            assert found in [model.seen() for model in self.model.possible(self.pending)]
        await self._go_on(stack)

    async def _go_on(self, stack: Stack) -> None:
        await stack.perform(["create", "files/after"])
        await stack.perform(["write", "files/after", 0, 1, 50_000])
        await stack.housekeeping()
        await stack.perform(["sync", "files/after"])
        stack.assert_sound()
        expected = await stack.look()
        stack.close()
        again = Stack(self.directory, self.disk)
        again.assert_sound()
        assert await again.look() == expected
        again.close()
