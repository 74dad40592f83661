"""What the tests of NodeStore share: opening and running one, a load, and the model of that load."""

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from aspenfs.errors import NoSpace
from aspenfs.kv.machine import state_hash
from aspenfs.kv.types import Operation, append, delete, merge, put
from aspenfs.runtime.host import NodeStore
from tests.kv.subject import FakeClock, FakeEntropy

SEGMENT_BYTES = 1 << 16
SECONDS_MAX = 30


def open_store(directory: Path, **options: Any) -> NodeStore:
    """A store with small log segments on a clock that stands still."""
    options.setdefault("segment_bytes", SEGMENT_BYTES)
    return NodeStore.open(directory, FakeClock(), FakeEntropy(), **options)


@asynccontextmanager
async def running(store: NodeStore) -> AsyncIterator[None]:
    """`store` with its threads; they have ended afterwards. What `run` raises is raised."""
    ended = trio.Event()
    failures: list[BaseException] = []

    async def run(task_status: Any) -> None:
        try:
            await store.run(task_status)
        except Exception as error:
            failures.append(error)
        finally:
            ended.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel()
            with trio.CancelScope(shield=True):
                await ended.wait()
    if failures:
        raise failures[0]


async def fill(store: NodeStore, value: bytes) -> None:
    """Puts `value` under f/0, f/1, … until that is refused."""
    number = 0
    while True:
        await store.txn([], [put(b"f/%d" % number, value)])
        number += 1


async def until_it_accepts(store: NodeStore) -> None:
    """Tries to write until that works."""
    with trio.fail_after(SECONDS_MAX):
        while True:
            try:
                await store.txn([], [put(b"f/again", b"x" * 3000)])
                return
            except NoSpace:
                await trio.sleep(0.01)


async def until(condition: Any) -> None:
    """Waits until `condition()` holds."""
    with trio.fail_after(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 – most conditions are figures without an event
            await trio.sleep(0.001)


def hash_of(store: NodeStore) -> bytes:
    """Of everything that is visible, internal keys too."""
    return state_hash(store.engine.overlay)


def load(number: int) -> list[Operation]:
    """The operations of transaction `number`: hot keys, fresh ones, history, deletions, long keys."""
    draw = random.Random(number)
    operations: list[Operation] = [merge(b"f/log", append(b"%d," % number))]
    operations.append(put(b"k/app/%d" % draw.randrange(8), b"%d" % number))
    operations.append(put(b"f/n%06d" % number, draw.randbytes(draw.randrange(300))))
    if number % 3 == 0:
        operations.append(delete(b"f/n%06d" % draw.randrange(max(1, number))))
    if number % 5 == 0:
        operations.append(put(b"f/" + b"x" * (490 + draw.randrange(600)), b"long"))
    return operations
