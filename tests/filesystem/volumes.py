"""A file system on a LocalStore, for tests of the domain: real code, memory below."""

from collections.abc import Awaitable, Callable, Iterator, Sequence

import blake3
import trio

from aspenfs import errors
from aspenfs.filesystem.check import Check, Problem
from aspenfs.filesystem.volume import Volume
from aspenfs.kv.local import LocalStore
from aspenfs.vfs.tree import Usage
from aspenfs.views.files import FilesTree
from tests.views.subject import CountingEntropy, StepClock, User


class MemoryBlobs:
    """The Blobs port over a dict."""

    def __init__(self) -> None:
        self.chunks: dict[bytes, bytes] = {}

    def put(self, data: bytes) -> bytes:
        digest = blake3.blake3(data).digest()
        self.chunks[digest] = bytes(data)
        return digest

    def get(self, digest: bytes, offset: int = 0, size: int | None = None) -> bytes:
        data = self.chunks.get(digest)
        if data is None:
            raise errors.NotFound(f"chunk {digest.hex()}")
        return data[offset : len(data) if size is None else offset + size]

    def has(self, digest: bytes) -> bool:
        return digest in self.chunks

    def delete(self, digests: Sequence[bytes]) -> None:
        for digest in digests:
            self.chunks.pop(digest, None)


CALLER = User()


class Setup:
    def __init__(self) -> None:
        self.clock = StepClock()
        self.store = LocalStore(self.clock, CountingEntropy(), trio.Event)
        self.blobs = MemoryBlobs()
        self.volume = Volume(self.store, self.blobs, self.clock)
        self.tree = FilesTree(self.volume, lambda: Usage(4096, 100, 50, 0, 0))

    def problems(self) -> list[Problem]:
        return list(Check(self.store, self.blobs.has).problems())


def run(test: Callable[[Setup], Awaitable[None]]) -> None:
    """Runs `test` on a fresh, formatted file system and checks every invariant after it."""

    async def main() -> None:
        setup = Setup()
        await setup.volume.format()
        with trio.fail_after(60):
            await test(setup)
        while await setup.tree.reap():
            pass
        assert setup.problems() == []

    trio.run(main)


def everything(setup: Setup) -> Iterator[bytes]:
    for key, _ in setup.store.scan(b"f/", b"f0"):
        yield key
