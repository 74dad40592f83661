"""Turns at the interpreter's lock: a thread works while the loop stands still for it, piece by piece.

Belongs here: handing over and giving back. Not here: what the thread does (`applier.py`).

Two threads that both want the interpreter's lock are slower than one after the other. Who waits is woken
each time that the loop lets go of the lock for a system call, every few µs, and mostly finds it taken again:
of 11 to 17 µs that the writing of one key's change cost the applier beside a busy loop 2 were its work, and
the loop made a futex call for every system call (ADR 0015). So the thread asks for a turn, and sleeps
until the loop comes to a place where it can wait; then it has the lock to itself for a bounded piece of work.
"""

import threading
from typing import Final

from aspenfs.runtime.syncer import Loop

_PATIENCE_S: Final = 0.1  # the thread's, with a loop that does not come: then it works beside it
_TURN_S_MAX: Final = 0.02  # the loop's, with a thread that stays: a page of the state may have to be read


class _Turn:
    __slots__ = ("begun", "ended")

    def __init__(self) -> None:
        self.begun, self.ended = threading.Lock(), threading.Lock()
        self.begun.acquire()
        self.ended.acquire()

    def give(self) -> None:
        """In the loop, which stands still until it has ended, also if that was before."""
        self.begun.release()
        self.ended.acquire(timeout=_TURN_S_MAX)


class LoopTurns:
    """One thread's turns. `begin`, and `end` before anything that blocks or takes more than a fraction of a
    millisecond; both are of that thread alone."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._turn: _Turn | None = None

    def begin(self) -> None:
        """Returns with the loop standing still; or with one that has not come for a while. Ends a turn that
        has begun: so this is what stands between two pieces."""
        self.end()
        self._turn = turn = _Turn()
        self._loop.run_sync_soon(turn.give)
        turn.begun.acquire(timeout=_PATIENCE_S)

    def end(self) -> None:
        """The loop goes on. Idempotent."""
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.ended.release()
