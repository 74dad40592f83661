"""Whose turn it is to read requests: the rules that take the place of pyfuse3's worker hand-over.

Nouns. A *worker* is one `_session_loop` task of pyfuse3. One worker is the *holder*: it alone reads
requests, and it keeps reading until a handler of its own really suspends; then another one becomes the
holder. A *visit* is the holder's trip through trio's scheduler, which lets the other tasks run. When to
visit is decided in `idle.py`; how all this gets into pyfuse3, in `loop.py`.

A holder that has waited for DOZE_S *dozes*: trio waits for the descriptor, as for any other, until a request
comes. Else each turn of the loop of a daemon that does other work, such as following a leader, would pass
through the holder (ADR 0003 has what that costs).
"""

import errno
import os
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from time import monotonic
from typing import Any, Final, cast

import trio

from aspenfs.fuse.idle import Runnable, Waiter, private_parts_missing

SessionLoop = Callable[..., Coroutine[Any, Any, None]]
DOZE_S: Final = 0.01
_SETTLING_VISITS: Final = 2
_NO_STEPS: Final = cast("Generator[Any, Any, None]", iter(()))  # exhausted for good, so it can be shared


class _Done:
    """An awaitable that never suspends; cheaper than a coroutine, and reusable."""

    __slots__ = ()

    def __await__(self) -> Generator[Any, Any, None]:
        return _NO_STEPS


_DONE: Final = _Done()


class _Worker:
    """One task of pyfuse3's, by identity. `task` and `coroutine` are set from its first step on."""

    __slots__ = ("coroutine", "task")

    task: trio.lowlevel.Task
    coroutine: Coroutine[Any, Any, None]


class Session:
    """Who reads, who waits for a turn, who is not born yet. One per run of `pyfuse3.main`.

    True between awaits: if `_holder` is None, then nobody is parked. `_serving` says that the holder is
    inside a request, so a suspension of its task is a handler's.
    """

    def __init__(self, spin_us: int, hush: Callable[[], bool], doze_s: float = DOZE_S) -> None:
        self.spin_us, self.hush, self.doze_s = spin_us, hush, doze_s
        self.nursery: trio.Nursery | None = None
        self._running: _Worker | None = None  # whose code runs now
        self._holder: _Worker | None = None
        self._serving = False
        self._parked: list[_Worker] = []  # a stack: the last one's read buffer is the warmest
        self._unborn: list[tuple[SessionLoop, tuple[object, ...], str | None]] = []
        self._closing = False
        self._runnable = Runnable()
        self._waiter: Waiter | None = None
        self._watching = False  # the instrument is there
        self._settling = 0  # visits until it has seen every task that is runnable
        self.direct = False
        self.cause: str | None = None  # why not `direct`
        self._fd = -1
        self.hand_overs = self.visits = self.dozes = self.empty_reads = 0

    async def open(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery
        self.cause = private_parts_missing()
        if self.cause is not None:
            return
        self.direct = True

    def close(self) -> None:
        self._unborn.clear()
        if self._waiter is not None:
            self._waiter.close()
        self._watch(watching=False)

    # --- workers ---

    def spawn(self, loop: SessionLoop, args: tuple[object, ...], name: str | None) -> None:
        """pyfuse3 wants one more worker. Only the first is started now, the others when one is needed."""
        if self._holder is None:
            self._start(loop, args, name)
        else:
            self._unborn.append((loop, args, name))

    def _start(self, loop: SessionLoop, args: tuple[object, ...], name: str | None) -> None:
        assert self.nursery is not None
        self._holder = worker = _Worker()
        self.nursery.start_soon(self._work, worker, loop, args, name=name)

    async def _work(self, worker: _Worker, loop: SessionLoop, args: tuple[object, ...]) -> None:
        worker.task = trio.lowlevel.current_task()
        # Without the wrapper that makes a trio task of it, which `_steps` is: this one is in sight of
        # `requests.py`, and a frame less to go through.
        loop = getattr(loop, "__wrapped__", loop)
        try:
            while True:
                try:
                    worker.coroutine = loop(*args)
                    await self._steps(worker, worker.coroutine)
                except OSError as error:
                    if not _is_empty_read(error):
                        raise
                    # A fatal signal to the caller withdrew the request between our poll and the read.
                    # Begin this worker's loop anew; pyfuse3 still counts it as running.
                    self.empty_reads += 1
                else:
                    return
        finally:
            if self._holder is worker:
                self._pass_on(born=False)

    @types.coroutine
    def _steps(self, worker: _Worker, coroutine: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        """Drives one worker, so that we see each of its suspensions and nothing else has a cost."""
        step: Callable[[Any], Any] = coroutine.send
        argument: Any = None
        while True:
            self._running = worker
            try:
                trap = step(argument)
            except StopIteration:
                return
            if self._serving and self._holder is worker:
                self._pass_on(born=True)
            try:
                argument = yield trap
                step = coroutine.send
            except BaseException as error:  # goes into the worker, like in `yield from`
                argument = error
                step = coroutine.throw

    def _pass_on(self, *, born: bool) -> None:
        """The holder stops reading: the last parked worker takes over, else a new one, else nobody."""
        self._serving = False
        if self._parked:
            self.hand_overs += 1
            self._holder = self._parked.pop()
            trio.lowlevel.reschedule(self._holder.task)
        elif born and self._unborn and not self._closing:
            self.hand_overs += 1
            self._start(*self._unborn.pop())
        else:
            self._holder = None

    def serving(self) -> Coroutine[Any, Any, None] | None:
        """The worker inside a request whose code runs now."""
        return self._running.coroutine if self._serving and self._running is not None else None

    # --- the lock that pyfuse3 reads under ---

    def acquire(self) -> Awaitable[None]:
        worker = self._running
        if self._holder is worker or self._closing:
            self._serving = False
            return _DONE
        if self._holder is None:
            self._holder = worker
            return _DONE
        return self._park()

    async def _park(self) -> None:
        worker = self._running
        assert worker is not None
        self._parked.append(worker)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._parked.remove(worker)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def release(self) -> Awaitable[None]:
        # Wakes nobody: whoever read a request goes on to serve it, and most handlers never suspend.
        self._serving = self._holder is self._running
        return _DONE

    # --- waiting ---

    def wait_readable(self, fd: int) -> Awaitable[None]:
        if self._fd != fd:
            self._adopt(fd)
        waiter = self._waiter
        if waiter is None:
            return trio.lowlevel.wait_readable(fd)  # noqa: ASYNC105 – pyfuse3 awaits it
        worker = self._holder
        assert worker is not None
        if waiter.readable(worker.task, settling=self._settling > 0):
            return _DONE
        return self._visit(waiter, worker.task)

    def _adopt(self, fd: int) -> None:
        self._fd = fd
        os.set_blocking(fd, False)  # a read must never stop the whole process, see `_is_empty_read`
        if self.direct:
            self._waiter = Waiter(fd, self._runnable.tasks, self.spin_us, self.hush)
            self._watch(watching=True)

    def _watch(self, *, watching: bool) -> None:
        """Tasks that were scheduled before the instrument was there get their step within two passes; from
        then on an empty set means that nothing is runnable."""
        if watching and not self._watching:
            trio.lowlevel.add_instrument(self._runnable)
            self._settling = _SETTLING_VISITS
        elif self._watching and not watching:
            trio.lowlevel.remove_instrument(self._runnable)
            self._runnable.tasks.clear()
        self._watching = watching

    async def _visit(self, waiter: Waiter, task: trio.lowlevel.Task) -> None:
        doze_s = monotonic() + self.doze_s
        while True:
            self.visits += 1
            await trio.lowlevel.checkpoint()
            waiter.visited_s = monotonic()
            if self._closing:
                raise trio.ClosedResourceError("the FUSE session ends")
            if self._settling:
                self._settling -= 1
            if waiter.readable(task, settling=self._settling > 0):
                return
            if waiter.visited_s > doze_s and not self._settling:
                await self._doze(waiter)
                return

    async def _doze(self, waiter: Waiter) -> None:
        """Until a request comes."""
        self.dozes += 1
        self._watch(watching=False)
        await trio.lowlevel.wait_readable(self._fd)
        waiter.visited_s = monotonic()
        self._watch(watching=True)

    def notify_closing(self, fd: int) -> None:
        """`pyfuse3.terminate` was called: the holder finds the session ended, and so do its successors."""
        self._closing = True
        trio.lowlevel.notify_closing(fd)


class ReadLock:
    """What pyfuse3 takes for a `trio.Lock`: the session's turn taking."""

    def __init__(self, session: Session) -> None:
        self._acquire = session.acquire
        self._release = session.release

    def __aenter__(self) -> Awaitable[None]:
        return self._acquire()

    def __aexit__(self, *_: object) -> Awaitable[None]:
        return self._release()


class SessionNursery:
    """A nursery for one session: `start_soon` goes to the session, the rest is trio's."""

    def __init__(self, session: Session) -> None:
        self._manager = trio.open_nursery()
        self._session = session

    async def __aenter__(self) -> "SessionNursery":
        nursery = await self._manager.__aenter__()
        await self._session.open(nursery)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> bool | None:
        try:
            return await self._manager.__aexit__(kind, error, traceback)
        finally:
            self._session.close()

    def start_soon(self, loop: SessionLoop, *args: object, name: str | None = None) -> None:
        self._session.spawn(loop, args, name)


def _is_empty_read(error: OSError) -> bool:
    """pyfuse3 found the queue of /dev/fuse empty: the request it was woken for has been withdrawn.

    The descriptor is non-blocking for this case: a blocking read would hold the interpreter lock, and
    with it every thread of the daemon, until the next request arrives.
    """
    return error.errno == errno.EAGAIN and "fuse_session_receive_buf" in str(error)
