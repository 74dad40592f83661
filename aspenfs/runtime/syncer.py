"""What makes the log durable: one fdatasync for all who wait (group commit).

Belongs here: when a sync starts, what runs before it, who makes it, how the loop hears of it. Not here:
what is committed then (`consensus.py`), how a log is synced (`wal.py`), how the kernel is asked to do it
without a thread (`kernel_sync.py`).

A sync covers what was accepted before it started; what those entries name (chunks of files) is made
durable before them, by hooks. Whoever asks while one is under way gets the next one, together with
everybody else who asked meanwhile. Nobody asks twice for the same sync, so at most one request waits.

Two ways: the kernel makes it while the loop goes on; or a thread does, where the kernel can not, and
whenever the hooks have something to do, because they block.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Protocol

from aspenfs.errors import Busy, SyncFailed
from aspenfs.runtime.kernel_sync import KernelSync
from aspenfs.runtime.wal import PendingSync, Wal

logger = logging.getLogger(__name__)

Hook = Callable[[], object]


class Loop(Protocol):
    """What a thread needs of the loop; `trio.lowlevel.TrioToken` fits."""

    def run_sync_soon(self, sync_fn: Callable[..., object], *args: object) -> None: ...


class Syncer:
    """Group commit. What has no other remark belongs to the loop's thread."""

    def __init__(self, wal: Wal, before: Sequence[Hook], synced: Callable[[int, int], object],
                 failed: Callable[[BaseException], object], clock: Callable[[], int],
                 ticket: Callable[[], int]) -> None:  # fmt: skip
        """`before` are run ahead of each sync, in order. In the loop's thread, `failed` gets an error, and
        `synced` what `ticket` said when a sync began, and the index up to which the log is durable."""
        self._wal, self._before, self._synced, self._failed = wal, before, synced, failed
        self._clock, self._ticket = clock, ticket
        self._kernel: KernelSync | None = None
        self._hooks_due: Callable[[], bool] = lambda: bool(before)
        self._queue: SimpleQueue[bool] = SimpleQueue()
        self._queued = 0  # syncs that the thread was asked for and has not reported
        self._requested = False
        self.busy = False  # a sync has been asked for or is under way
        self._loop: Loop | None = None
        self._accepts = False  # from `start` to `stop`
        self._thread: threading.Thread | None = None
        self._pending: tuple[PendingSync, int, int] | None = None  # the kernel's; ticket, clock
        self.syncs = 0
        self.last_ns = self.longest_ns = self.total_ns = 0

    def use_kernel(self, kernel: KernelSync | None, hooks_due: Callable[[], bool] | None) -> None:
        """Before `start`. `hooks_due`: whether the hooks have anything to do (without: always)."""
        self._kernel = kernel
        if hooks_due is not None:
            self._hooks_due = hooks_due

    def start(self, loop: Loop) -> None:
        self._loop, self._accepts = loop, True
        self._thread = threading.Thread(target=self._run, args=(loop,), name="wal-sync", daemon=True)
        self._thread.start()
        if self._requested:
            self._begin()

    async def run(self) -> None:
        """Between `start` and `stop`: hears what the kernel says."""
        if self._kernel is not None:
            await self._kernel.run()

    @property
    def running(self) -> bool:
        return self._thread is not None

    def request(self) -> None:
        """Everything accepted so far shall be durable soon; before `start`, then. Cheap when asked again."""
        if not self._requested:
            self._requested = self.busy = True
            if self._pending is None and self._accepts:
                self._begin()

    def _begin(self) -> None:
        if self._kernel is None or self._queued or self._hooks_due():
            self._ask_thread()
            return
        self._requested = False
        loop = self._loop
        assert loop is not None
        # Who asks is told later in either case, not while he is at it.
        try:
            ticket, pending = self._ticket(), self._wal.begin_sync()
        except SyncFailed as error:
            loop.run_sync_soon(self._failed, error)
            return
        except Busy:  # another state is put in place, and waits for the log: so does the thread
            self._requested = True
            self._ask_thread()
            return
        if pending is None:
            self.busy = False
            loop.run_sync_soon(self._synced, ticket, self._wal.synced_index)
            return
        self._pending = pending, ticket, self._clock()
        try:
            self._kernel.start(pending.files, self._kernel_ended)  # type: ignore[arg-type]
        except (OverflowError, SystemError, ValueError) as error:
            logger.warning("syncs are made by the thread from now on: the kernel refused one: %s", error)
            self._kernel = None
            self._pending = None
            self._wal.abandon_sync()
            self.request()

    def _ask_thread(self) -> None:
        self._queued += 1
        self._queue.put(True)

    def _kernel_ended(self, error: OSError | None) -> None:
        """In the loop, or in the thread that stops us."""
        assert self._pending is not None
        assert self._loop is not None
        pending, ticket, began = self._pending
        self._pending = None
        self._count(began)
        try:
            index = self._wal.end_sync(pending, error)
        except SyncFailed as failure:
            self._loop.run_sync_soon(self._failed, failure)
            return
        self.busy = self._requested
        if self._accepts:
            if self._requested:
                self._begin()  # first of all: the disk need not wait for what we do now
            self._synced(ticket, index)

    def _count(self, began: int) -> None:
        self.last_ns = self._clock() - began
        self.longest_ns = max(self.longest_ns, self.last_ns)
        self.total_ns += self.last_ns
        self.syncs += 1

    def stop(self) -> None:
        """After `run`: ends with the sync under way, and blocks until then. Idempotent."""
        if self._thread is not None:
            self._accepts = False
            if self._kernel is not None:
                self._kernel.wait()
            self._queue.put(False)
            self._thread.join()
            self._thread = None

    # --- in any thread ---

    def sync_now(self) -> tuple[int, int]:
        """One sync in the calling thread, while the kernel makes none: what `synced` gets."""
        self._requested = False  # before anything is read: who asks from here on gets another sync
        began = self._clock()
        ticket = self._ticket()  # before the sync begins: all writes up to it are covered
        index = self._wal.sync(self.run_hooks if self._before else None)
        self._count(began)
        self.busy = self._requested
        return ticket, index

    def run_hooks(self) -> None:
        """Makes durable what log entries name."""
        for hook in self._before:
            hook()

    def _run(self, loop: Loop) -> None:
        while self._queue.get():
            try:
                told = self.sync_now()
            except BaseException as error:
                loop.run_sync_soon(self._failed, error)
                return
            loop.run_sync_soon(self._thread_ended, *told)

    def _thread_ended(self, ticket: int, index: int) -> None:
        self._queued -= 1
        self._synced(ticket, index)
