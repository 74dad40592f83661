"""Digests of this node's state at checkpoints, computed beside everything else.

At a checkpoint the applier ends a batch, and what it has written is pinned. A thread walks over that, slowly.
So the digest is exactly that of one entry, alike on every node, and of what the database gives: it shows what
a disk, a bug of the database or an apply that is not deterministic has made of the state.

What is pinned keeps pages from being used again, and the file never shrinks. So a walk hurries when the file
grows, and is given up before that goes too far.

Belongs here: pins, pace, bounds, the digests of late. Not here: comparing them (`divergence.py`), what a
digest is (`snapshots/blocks.py`). All methods belong to the loop's thread but those that say otherwise.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Final, NamedTuple

import trio

from aspenfs.errors import Closed
from aspenfs.limits import (
    DIGEST_AGE_MAX_S,
    DIGEST_GROWTH_BYTES_MAX,
    DIGEST_HURRY_BYTES,
    DIGEST_HURRY_PERCENT,
    DIGEST_PERCENT,
    SNAPSHOT_FREE_BYTES_MIN,
)
from aspenfs.runtime.applier import Applier
from aspenfs.runtime.snapshots.blocks import StateDigest, digest_of
from aspenfs.runtime.statedb import StateDb

logger = logging.getLogger(__name__)

UNREADABLE: Final = b""  # in the place of a digest

_REPLACED: Final = "another state took its place"
_PAUSE_SECONDS_MAX: Final = 1.0
_KEPT: Final = 4  # digests, the newest ones


class Digest(NamedTuple):
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    digest: bytes  # of all rows, or UNREADABLE
    rows: int
    cpu_s: float  # that it took


class Checkpoints:
    """`run` beside the store."""

    def __init__(self, state: StateDb, applier: Applier, free_bytes: Callable[[], int], *,
                 percent: float = DIGEST_PERCENT, look_s: float = 1.0) -> None:  # fmt: skip
        """`percent` of one core is what a walk takes; its bounds are looked at every `look_s`."""
        self._state, self._applier, self._free_bytes = state, applier, free_bytes
        self._percent, self._look_s = percent, look_s
        self.digested: list[Callable[[Digest], object]] = []  # called with each new one
        self._digests: dict[int, Digest] = {}
        self._missed: dict[int, str] = {}  # checkpoints without a digest, and why
        self._next: _Pin | None = None  # to be walked over
        self._walked: _Pin | None = None  # by the thread
        self._came = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._running = False
        self._generation = 0  # of states: see `forget`

    async def run(self) -> None:
        """Looks at the state at each checkpoint, until cancelled."""
        self._token = trio.lowlevel.current_trio_token()
        self._running, self._applier.at_checkpoint = True, self._reached
        try:
            while True:
                await self._came.wait()
                self._came = trio.Event()
                pin, self._next = self._next, None
                if pin is not None:
                    await self._walk(pin)
        finally:
            self._running, self._applier.at_checkpoint = False, None
            self._drop_next("this node stops")

    def find(self, index: int) -> Digest | str | None:
        """At the checkpoint `index`; or why there is none; None: not yet."""
        found = self._digests.get(index) or self._missed.get(index)
        pinned = any(pin is not None and pin.index == index for pin in (self._walked, self._next))
        if found is None and not pinned and self._applier.told >= index:
            return "it did not look at its state there"
        return found

    def hurry(self, index: int) -> None:
        """Somebody waits for that one."""
        for pin in (self._walked, self._next):
            if pin is not None and pin.index == index:
                pin.hurry()

    def forget(self) -> None:
        """The state is another one: what was found out is out of date."""
        self._generation += 1
        self._digests.clear()
        self._drop_next(_REPLACED)
        if self._walked is not None:
            self._walked.give_up(_REPLACED)

    # --- pinning ---

    def _reached(self, index: int) -> None:
        """In the applier's thread, right behind the batch that ends with the checkpoint."""
        assert self._token is not None
        try:
            pin = _Pin(self._state, index, self._percent)
        except Closed:
            return
        try:
            self._token.run_sync_soon(self._take, pin)
        except trio.RunFinishedError:
            pin.end()

    def _take(self, pin: "_Pin") -> None:
        if not self._running:
            pin.end()
            return
        # Who compares asks for the newest one only.
        self._drop_next("a later one came")
        if self._walked is not None:
            self._walked.give_up("a later one came")
        self._next, pin.began_s = pin, trio.current_time()
        self._came.set()

    def _drop_next(self, why: str) -> None:
        pin, self._next = self._next, None
        if pin is not None:
            pin.end()
            self._miss(pin.index, why)

    # --- walking ---

    async def _walk(self, pin: "_Pin") -> None:
        self._walked, generation = pin, self._generation
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._look_after, pin)
                found = await trio.to_thread.run_sync(pin.walk)
                nursery.cancel_scope.cancel()
        finally:
            self._walked = None
            pin.end()
        if found is None or generation != self._generation:
            self._miss(pin.index, pin.why if found is None else _REPLACED)
            return
        self._digests[pin.index] = found
        while len(self._digests) > _KEPT:
            del self._digests[next(iter(self._digests))]
        logger.info("index=%d state digest=%s rows=%d cpu_ms=%d", found.index, found.digest.hex()[:16],
                    found.rows, found.cpu_s * 1000)  # fmt: skip
        for tell in self.digested:
            tell(found)

    async def _look_after(self, pin: "_Pin") -> None:
        try:
            while True:
                await trio.sleep(self._look_s)
                grown = self._state.size_bytes() - pin.file_bytes
                if grown > DIGEST_GROWTH_BYTES_MAX:
                    pin.give_up(f"the state's file grew by {grown} bytes meanwhile")
                elif trio.current_time() - pin.began_s > DIGEST_AGE_MAX_S:
                    pin.give_up(f"it took more than {DIGEST_AGE_MAX_S} s")
                elif self._free_bytes() < SNAPSHOT_FREE_BYTES_MIN:
                    pin.give_up("the disk is nearly full")
                elif grown > DIGEST_HURRY_BYTES:
                    pin.hurry()
        finally:
            pin.give_up("this node stops")  # of no effect on a walk that has ended

    def _miss(self, index: int, why: str) -> None:
        logger.info("index=%d state without a digest: %s", index, why)
        self._missed[index] = why
        while len(self._missed) > _KEPT:
            del self._missed[next(iter(self._missed))]


class _GivenUp(Exception):
    """Of a walk that is not to go on."""


class _Pin:
    """The state at one checkpoint, standing still. Made in the applier's thread, walked over in another."""

    def __init__(self, state: StateDb, index: int, percent: float) -> None:
        self.index, self._percent = index, percent
        self._stack = ExitStack()
        self._snapshot = self._stack.enter_context(state.snapshot())
        assert self._snapshot.applied_index == index, "a batch that does not end at the checkpoint"
        self.file_bytes = state.size_bytes()
        self.began_s = 0.0
        self.why = ""  # it was given up
        self._stop = threading.Event()
        self._resumed_s = 0.0  # of the thread's time

    def hurry(self) -> None:
        self._percent = DIGEST_HURRY_PERCENT

    def give_up(self, why: str) -> None:
        self.why = self.why or why
        self._stop.set()

    def end(self) -> None:
        self._stack.close()

    def walk(self) -> Digest | None:
        """In a thread of its own; None if it was given up."""
        began_s = self._resumed_s = time.thread_time()
        try:
            found = digest_of(self._snapshot, self._pause)
        except _GivenUp:
            return None
        except Exception:
            # Whatever stands in the way of reading it: this is not the state that the others have.
            logger.exception("index=%d the state can not be read", self.index)
            found = StateDigest(self.index, UNREADABLE, 0)
        return Digest(self.index, found.digest, found.rows, time.thread_time() - began_s)

    def _pause(self) -> None:
        """Gives way, in proportion to the time that was spent since it last did.

        The thread has no lower priority: it could be left without the processor while it holds the
        interpreter's lock, and the loop with it.
        """
        if self._stop.is_set():
            raise _GivenUp
        worked_s = time.thread_time() - self._resumed_s
        self._stop.wait(min(worked_s * (100 - self._percent) / self._percent, _PAUSE_SECONDS_MAX))
        self._resumed_s = time.thread_time()
