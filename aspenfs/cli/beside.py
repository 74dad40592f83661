"""What a mount does for being one of several: its session, orphans, and what the kernel must not rely on.

Runs beside the mount, alone or not: a node may become part of a cluster at any time. Nothing here may
end the mount: what fails for want of a quorum is tried again, and the rest is logged.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from aspenfs import errors
from aspenfs.fuse import epoch
from aspenfs.fuse.notifier import Notifier
from aspenfs.vfs.filesystem import FileSystem
from aspenfs.views.files import FilesTree

log = logging.getLogger(__name__)

LOOK_S: Final = 0.1  # is this node alone?
TICK_S: Final = 2.0  # twice the longest that the kernel keeps anything with other hosts
ROUND_S: Final = 0.5  # orphans: see filesystem/orphans.py
AFTER_FAILURE_S: Final = 5.0
MOMENT_S: Final = 0.001
START_S: Final = 10.0  # how long a mount waits for its session before it serves
END_S: Final = 5.0  # and at the end for what is not committed
# What may go well the next time.
_PASSING: Final = (errors.ClusterError, errors.StoreError, errors.NoSpace)


async def pause() -> None:
    await trio.sleep(MOMENT_S)


class Tasks:
    """The Tasks port of a volume."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery

    def event(self) -> trio.Event:
        return trio.Event()

    async def pause(self) -> None:
        await pause()

    def spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        self._nursery.start_soon(self._run, work)

    @staticmethod
    async def _run(work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except Exception:
            log.exception("work in the background failed")


class Beside:
    """The housekeeping of a mount that may have others beside it."""

    def __init__(self, files: FilesTree, filesystem: FileSystem, notifier: Notifier) -> None:
        self.files, self.filesystem, self.notifier = files, filesystem, notifier
        self._scope = trio.CancelScope()

    async def start(self) -> None:
        """Before anything is served: other hosts know from now on that this one may hold files."""
        with trio.move_on_after(START_S) as waiting:
            try:
                await self.files.orphans.round()
            except _PASSING as error:
                log.warning("served without a session yet: %s", error)
        if waiting.cancelled_caught:
            log.warning("served without a session yet: no answer within %g s", START_S)

    async def run(self) -> None:
        """Until `end`."""
        with self._scope:
            await self._run()

    async def _run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._again, LOOK_S, self._look)
            nursery.start_soon(self._again, TICK_S, self._tick)
            nursery.start_soon(self._again, ROUND_S, self.files.orphans.round)

    async def _again(self, period_s: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await trio.sleep(period_s)
            try:
                await work()
            except _PASSING as error:
                log.info("tried again: %s", error)
            except errors.Closed:
                raise
            except Exception:
                log.exception("housekeeping failed, and goes on in %g s", AFTER_FAILURE_S)
                await trio.sleep(AFTER_FAILURE_S)

    async def _look(self) -> None:
        if not self.filesystem.look():
            return
        log.info("other nodes have come: the kernel keeps nothing for longer than a second from now on")
        if not await trio.to_thread.run_sync(epoch.doubt_names):
            async for parent, name in self.filesystem.names_held():
                self.notifier.entry(parent, name)

    async def _tick(self) -> None:
        self.filesystem.coherence.tick()

    async def end(self) -> None:
        """After the mount: what was written is committed, and nothing is held here any more."""
        self._scope.cancel()  # or a round would make the session anew
        files = self.files
        orphans = files.orphans
        orphans.unmounted()
        for work in (files.births.all_settled, files.writes.all_settled, orphans.session.close):
            with trio.move_on_after(END_S):
                try:
                    await work()
                except _PASSING as error:
                    log.info("left to the end of the session: %s", error)
