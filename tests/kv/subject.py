"""What the conformance suite runs on: an open store, a clock that the test sets, and how to expire leases."""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count
from typing import NamedTuple, TypeVar

import trio

from aspenfs.kv.store import Store
from aspenfs.kv.types import Batch

SECONDS_MAX = 30  # for one case; never waited out unless something hangs


class FakeClock:
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.now_ns = 1_700_000_000_000_000_000

    def time_ns(self) -> int:
        return self.now_ns

    def monotonic_ns(self) -> int:
        return self.now_ns

    def advance_ms(self, milliseconds: int) -> None:
        self.now_ns += milliseconds * 1_000_000


class FakeEntropy:
    """Bytes that are the same in each run and never repeat in one."""

    def __init__(self) -> None:
        self._numbers = count(1)

    def random_bytes(self, size: int) -> bytes:
        return next(self._numbers).to_bytes(size, "little")


class Subject(NamedTuple):
    store: Store
    clock: FakeClock
    expire: Callable[[], Awaitable[None]]  # ends what is over by the clock: what a node does now and then
    close: Callable[[], Awaitable[None]]


class Suite(ABC):
    """A class of cases; a test class gives `open`."""

    @abstractmethod
    async def open(self, nursery: trio.Nursery, clock: FakeClock) -> Subject:
        """An open, empty store on `clock`, whose tasks run in `nursery`."""


S = TypeVar("S", bound=Suite)


def case(body: Callable[[S, Subject], Awaitable[None]]) -> Callable[[S], None]:
    """A test that opens a store, runs `body` on it and closes it."""

    def test(self: S) -> None:
        async def main() -> None:
            with trio.fail_after(SECONDS_MAX):
                async with trio.open_nursery() as nursery:
                    subject = await self.open(nursery, FakeClock())
                    await body(self, subject)
                    await subject.close()
                    nursery.cancel_scope.cancel()

        trio.run(main)

    test.__name__, test.__doc__ = body.__name__, body.__doc__
    return test


async def take(batches: AsyncIterator[Batch], number: int) -> list[Batch]:
    """The next `number` batches of a watch."""
    return [await anext(batches) for _ in range(number)]


async def nothing_more(batches: AsyncIterator[Batch]) -> None:
    """The reader waits: there is no batch for it now."""
    with trio.move_on_after(0.02) as scope:
        await anext(batches)
    assert scope.cancelled_caught
