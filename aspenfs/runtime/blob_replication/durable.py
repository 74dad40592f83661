"""One sync for all who wait for one: what was put before the wait began is on disk when it ends."""

from collections.abc import Callable

import trio


class GroupSync:
    """Runs a blocking sync in a thread, never twice at the same time. Called in the loop's thread.

    A sync that is under way when somebody comes may have begun before their bytes were written: they get
    the next one, together with everybody else who comes meanwhile.
    """

    def __init__(self, sync: Callable[[], object], is_dirty: Callable[[], bool]) -> None:
        """`sync` may run in any thread; `is_dirty` says whether there is anything for it to do."""
        self._sync, self._is_dirty = sync, is_dirty
        self._asked = self._covered = 0  # tickets
        self._ended = trio.Event()  # replaced after each sync
        self.busy = False
        self.syncs = 0

    async def __call__(self) -> None:
        """SyncFailed, and then it always does: the process must end."""
        if not self.busy and not self._is_dirty():
            return
        self._asked += 1
        ticket = self._asked
        while self._covered < ticket:
            if self.busy:
                await self._ended.wait()
            else:
                await self._run()

    async def _run(self) -> None:
        covers = self._asked
        self.busy = True
        try:
            await trio.to_thread.run_sync(self._sync)
            self._covered = covers
            self.syncs += 1
        finally:
            self.busy = False
            self._ended.set()
            self._ended = trio.Event()
