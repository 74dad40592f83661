"""A file that is opened while its last name goes: its bytes stay for who holds it, or the open fails."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from aspenfs import errors
from tests.filesystem.volumes import CALLER, Setup, run

O_TRUNC = 0o1000


class Gate:
    """Transactions wait here, as under backpressure, and go on one at a time when told."""

    def __init__(self, setup: Setup) -> None:
        self.waiting: list[trio.Event] = []
        self._txn = setup.store.txn
        setup.store.txn = self.txn  # type: ignore[method-assign]
        self.shut = False

    async def txn(self, *arguments: Any, **named: Any) -> Any:
        if self.shut:
            event = trio.Event()
            self.waiting.append(event)
            await event.wait()
        return await self._txn(*arguments, **named)

    async def arrived(self, count: int) -> None:
        while len(self.waiting) < count:
            await trio.lowlevel.checkpoint()

    def open(self, *order: int) -> None:
        self.shut = False
        for index in order:
            self.waiting[index].set()


async def racing(setup: Setup, remove: Callable[[], Awaitable[None]], node: int, first: int) -> Any:
    """Opens `node` while `remove` is under way; the one whose number is `first` gets through first."""
    gate = Gate(setup)
    gate.shut = True
    opened: list[Any] = []

    async def opening() -> None:
        try:
            opened.append(await setup.tree.open(node, 2, CALLER))
        except errors.Stale as error:
            opened.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(remove)
        await gate.arrived(1)
        nursery.start_soon(opening)
        await gate.arrived(2)
        gate.open(first)
        for _ in range(5):
            await trio.lowlevel.checkpoint()
        gate.open(1 - first)
    return opened[0]


@pytest.mark.parametrize("first", [0, 1], ids=["removed first", "opened first"])
@pytest.mark.parametrize("how", ["unlink", "rename"])
def test_a_file_opened_while_its_name_goes_is_kept_or_refused(how: str, first: int) -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        attr, handle = await tree.create(1, b"f", 0o644, 2, CALLER)
        await handle.write(0, b"z" * 20_000)
        await handle.release()
        if how == "rename":
            await (await tree.create(1, b"other", 0o644, 2, CALLER))[1].release()

        async def remove() -> None:
            await (tree.unlink(1, b"f") if how == "unlink" else tree.rename(1, b"other", 1, b"f", 0))

        opened = await racing(setup, remove, attr.node, first)
        if first == 0:
            assert isinstance(opened, errors.Stale)
        else:
            assert await opened.read(0, 20_000) == b"z" * 20_000
            await opened.release()
        while await tree.reap():
            pass
        assert setup.volume.inode_count() == (2 if how == "rename" else 1)
        assert not tree.open_counts

    run(test)


def test_an_orphan_that_nobody_holds_cannot_be_opened_again() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        attr, handle = await tree.create(1, b"f", 0o644, 2, CALLER)
        await handle.write(0, b"z" * 100)
        await tree.unlink(1, b"f")
        again = await tree.open(attr.node, 2, CALLER)
        await handle.release()
        assert await again.read(0, 100) == b"z" * 100
        await again.release()
        for flags in (2, 2 | O_TRUNC):
            with pytest.raises(errors.Stale):
                await tree.open(attr.node, flags, CALLER)
        assert not tree.open_counts

    run(test)
