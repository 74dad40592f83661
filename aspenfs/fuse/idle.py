"""Waiting for the FUSE descriptor in trio's place, when nothing is runnable in trio.

The only file that looks at trio's private parts; `private_parts_missing` tells whether they are where
this file expects them. Who waits, and what happens between waits, is `loop.py`.
"""

import os
import select
from collections.abc import Callable
from time import monotonic
from typing import Any, Final

import trio

SPIN_US: Final = 50  # default bound of the spin before a blocking wait

_SLICE_S: Final = 0.000_25  # serve this long between visits while trio has something to run
_VISIT_S: Final = 0.004  # visit at least this often while requests keep coming
_BLOCK_S_MAX: Final = 5.0  # then look again, should anything have escaped the checks below
_SPIN_BACKOFF_MAX: Final = 255  # waits without a spin after a row of spins in vain


class Runnable(trio.abc.Instrument):
    """The tasks that trio owes a step, kept through trio's public instrument interface.

    trio's own run queue would not do: it is empty while the tasks of the current batch still wait for
    their step, and to block then would keep them waiting.
    """

    def __init__(self) -> None:
        self.tasks: set[trio.lowlevel.Task] = set()
        # Bound methods of the set itself: no Python frame on either event.
        self.task_scheduled = self.tasks.add  # type: ignore[assignment, method-assign]
        self.before_task_step = self.tasks.discard  # type: ignore[assignment, method-assign]


class Waiter:
    """Says whether the FUSE descriptor is readable, or whether trio must run first.

    Blocks in place of trio, on the FUSE descriptor and trio's own epoll together, when nothing is
    runnable. Uses trio's private parts: make one only where `private_parts_missing` found nothing amiss.
    """

    def __init__(
        self, fd: int, runnable: set[trio.lowlevel.Task], spin_us: int, hush: Callable[[], bool]
    ) -> None:
        runner: Any = getattr(trio.lowlevel.current_task(), "_runner")  # noqa: B009 – private
        self._runnable = runnable
        self._next_deadline = runner.deadlines.next_deadline
        self._sleep_time = runner.clock.deadline_to_sleep_time
        self._spin_s = spin_us / 1e6 if (os.cpu_count() or 1) > 1 else 0.0
        self._hush = hush
        self._spins_to_skip = 0
        self._spin_backoff = 0
        self._fd = fd
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLIN)
        self._epoll.register(runner.io_manager._epoll.fileno(), select.EPOLLIN)
        self._poll = self._epoll.poll
        self.visited_s = monotonic()

    def close(self) -> None:
        self._epoll.close()

    def readable(self, task: Any, *, settling: bool = False) -> bool:
        """True: read now. False: visit trio, then ask again. May block when trio has nothing to do.

        `task` is the caller's trio task. `settling`: what is runnable is not all known, so do not block.
        Atomic for trio; other threads run while it blocks or spins.
        """
        now_s = monotonic()
        if self._runnable or settling:
            if now_s - self.visited_s > _SLICE_S:
                return False
            ready = self._poll(0, 2)
            return bool(ready) and (ready[0][0] == self._fd or ready[-1][0] == self._fd)
        sleep_s = self._sleep_time(self._next_deadline())
        if sleep_s <= 0.0 or now_s - self.visited_s > _VISIT_S:
            return False
        # A handler of the caller's may just have cancelled it: then nothing would end the wait.
        if task._cancel_status.effectively_cancelled:
            return False
        ready = self._spin(now_s) if self._spin_s and not self._hush() else []
        if not ready:
            ready = self._poll(min(sleep_s, _BLOCK_S_MAX), 2)
            woken_s = monotonic()
            if woken_s - now_s > _SLICE_S:
                self.visited_s = woken_s  # asleep, not serving: trio was owed nothing meanwhile
        fuse_ready = trio_ready = False
        for fd, _ in ready:
            if fd == self._fd:
                fuse_ready = True
            else:
                trio_ready = True
        return fuse_ready and (not trio_ready or monotonic() - self.visited_s <= _SLICE_S)

    def _spin(self, now_s: float) -> list[tuple[int, int]]:
        """Polls for a bounded time; after misses, skips up to `_SPIN_BACKOFF_MAX` waits.

        A sleeping CPU takes tens of µs to wake up, so a spin pays when requests follow one another
        closely. The backoff keeps it from costing anything when they do not, and `hush` from holding up
        a thread of ours that somebody waits for: the two would fight for the interpreter's lock.
        """
        if self._spins_to_skip:
            self._spins_to_skip -= 1
            return []
        poll, end_s = self._poll, now_s + self._spin_s
        while monotonic() < end_s:
            ready = poll(0, 2)
            if ready:
                self._spin_backoff = 0
                return ready
        self._spin_backoff = min(2 * self._spin_backoff + 1, _SPIN_BACKOFF_MAX)
        self._spins_to_skip = self._spin_backoff
        return []


def private_parts_missing() -> str | None:
    """Looks for each private part of trio that `Waiter` uses, in the running loop. None: all there."""
    task = trio.lowlevel.current_task()
    runner = getattr(task, "_runner", None)
    if getattr(runner, "is_guest", None) is not False:
        return "not trio's own run loop (guest mode)"
    if not isinstance(getattr(getattr(runner, "io_manager", None), "_epoll", None), select.epoll):
        return "trio does not wait by epoll"
    clock = getattr(runner, "clock", None)
    if type(clock).__name__ != "SystemClock" or not hasattr(clock, "deadline_to_sleep_time"):
        return "trio does not run on the system clock"
    if not callable(getattr(getattr(runner, "deadlines", None), "next_deadline", None)):
        return "trio keeps its deadlines elsewhere"
    if not isinstance(getattr(getattr(task, "_cancel_status", None), "effectively_cancelled", None), bool):
        return "trio keeps its cancel status elsewhere"
    return None
