"""The thread that makes the log durable: one fdatasync for all who wait (group commit).

Belongs here: when a sync starts, what runs before it, how the loop hears of it. Not here: what is
committed then (`host.py`), how a log is synced (`wal.py`).

A sync covers what was accepted before it started; what those entries name (chunks of files) is made
durable before them, by hooks. Whoever asks while one is under way gets the
next one, together with everybody else who asked meanwhile. Nobody asks twice for the same sync, so
at most one request is queued.
"""

import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Protocol

Hook = Callable[[], object]
Sync = Callable[[Hook | None], int]


class Loop(Protocol):
    """What a thread needs of the loop; `trio.lowlevel.TrioToken` fits."""

    def run_sync_soon(self, sync_fn: Callable[..., object], *args: object) -> None: ...


class Syncer:
    """Group commit. `request` and `statistics` belong to the loop's thread."""

    def __init__(self, sync: Sync, before: Sequence[Hook], synced: Callable[[int], object],
                 failed: Callable[[BaseException], object], clock: Callable[[], int]) -> None:
        """`sync` is as `Wal.sync`; `before` are run by it, in order, in the syncing thread. `synced`
        gets the index up to which the log is durable and `failed` an error, in the loop's thread."""
        self._sync, self._before, self._synced, self._failed = sync, before, synced, failed
        self._clock = clock
        self._queue: SimpleQueue[bool] = SimpleQueue()
        self._requested = False
        self.busy = False  # a sync has been asked for or is under way
        self._thread: threading.Thread | None = None
        self.syncs = 0
        self.last_ns = self.longest_ns = self.total_ns = 0

    def start(self, loop: Loop) -> None:
        self._thread = threading.Thread(target=self._run, args=(loop,), name="wal-sync", daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread is not None

    def request(self) -> None:
        """Everything accepted so far shall be durable soon. Cheap when it has been asked for already."""
        if not self._requested:
            self._requested = self.busy = True
            self._queue.put(True)

    def stop(self) -> None:
        """Ends the thread after the sync under way; blocks until then. Idempotent."""
        if self._thread is not None:
            self._queue.put(False)
            self._thread.join()
            self._thread = None

    def sync_now(self) -> int:
        """One sync in the calling thread; the index up to which the log is durable."""
        self._requested = False  # before anything is read: who asks from here on gets another sync
        started = self._clock()
        index = self._sync(self.run_hooks if self._before else None)
        self.last_ns = self._clock() - started
        self.longest_ns = max(self.longest_ns, self.last_ns)
        self.total_ns += self.last_ns
        self.syncs += 1
        self.busy = self._requested
        return index

    def run_hooks(self) -> None:
        """Makes durable what log entries name."""
        for hook in self._before:
            hook()

    def _run(self, loop: Loop) -> None:
        while self._queue.get():
            try:
                index = self.sync_now()
            except BaseException as error:
                loop.run_sync_soon(self._failed, error)
                return
            loop.run_sync_soon(self._synced, index)
