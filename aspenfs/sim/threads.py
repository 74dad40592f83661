"""What takes time beside the loop of a node, made part of virtual time.

A sync of the log runs in a thread of its own, as in the real host, because the code under test does so: it
settles what it covers, waits for the disk, and notes what is durable then, while the loop goes on writing.
Here such a thread runs only while the simulation waits for it, so chance has no part in who is first.

Coroutines of the code under test (watches) are driven by `Task`: they wait for a `Signal`, for nothing else.
"""

import threading
from collections.abc import Callable, Coroutine
from typing import Any


class SyncThread:
    """One thread that works in steps. Between two of them it stands in `gate`."""

    def __init__(self) -> None:
        self._turn, self._back = threading.Lock(), threading.Lock()
        self._turn.acquire()
        self._back.acquire()
        self._work: Callable[[], int] | None = None
        self._thread: threading.Thread | None = None
        self._result = 0
        self._error: BaseException | None = None
        self.busy = False

    def begin(self, work: Callable[[], int]) -> None:
        """Runs `work` up to its first gate, or its end. Then, if it is `busy`, it stands in a gate."""
        assert not self.busy
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="sim-sync", daemon=True)
            self._thread.start()
        self._work, self.busy, self._error = work, True, None
        self.go_on()

    def go_on(self) -> None:
        """From one gate to the next, or to the end."""
        self._turn.release()
        self._back.acquire()

    def result(self) -> int:
        """Of work that ended; or what it raised."""
        assert not self.busy
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._result

    def gate(self) -> None:
        """Where the work waits for the disk. In any other thread it does nothing."""
        if threading.current_thread() is self._thread:
            self._back.release()
            self._turn.acquire()

    def close(self) -> None:
        """The thread ends. It must not be busy."""
        assert not self.busy
        if self._thread is not None:
            self._work = None
            self._turn.release()
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while True:
            self._turn.acquire()
            if self._work is None:
                return
            try:
                self._result = self._work()
            except BaseException as error:
                self._error = error
            self.busy = False
            self._back.release()


class Signal:
    """A one-shot event, as the engine wants them (`kv.watch.Signal`)."""

    __slots__ = ("_is_set", "_waiting")

    def __init__(self) -> None:
        self._is_set = False
        self._waiting: list[Task] = []

    def set(self) -> None:
        self._is_set = True
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            task.wake()

    async def wait(self) -> None:
        if not self._is_set:
            await _Wait(self)

    def add(self, task: "Task") -> None:
        self._waiting.append(task)


class _Wait:
    __slots__ = ("_signal",)

    def __init__(self, signal: Signal) -> None:
        self._signal = signal

    def __await__(self) -> Any:
        yield self._signal


class Task:
    """A coroutine that waits for signals. `soon` plans its next step, `ended` gets what it raised."""

    def __init__(
        self,
        coroutine: Coroutine[Signal, None, None],
        soon: Callable[[Callable[[], object]], object],
        ended: Callable[[Exception | None], object],
    ) -> None:
        self._coroutine, self._soon, self._ended = coroutine, soon, ended
        self._over = False
        self.wake()

    def wake(self) -> None:
        self._soon(self._step)

    def cancel(self) -> None:
        """Its process is gone: it takes no further step."""
        self._over = True
        self._coroutine.close()

    def _step(self) -> None:
        if self._over:
            return
        try:
            signal = self._coroutine.send(None)
        except StopIteration:
            self._over = True
            self._ended(None)
        except Exception as error:
            self._over = True
            self._ended(error)
        else:
            signal.add(self)
