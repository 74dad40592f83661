"""What a mounted node does unasked: access times, orphans, garbage; in small steps between requests.

Nothing here may end the mount: what fails is logged and tried again later. Only a failed sync is passed on,
because after it nothing may be built upon what was written.
"""

import logging
from collections.abc import Callable
from typing import Final

import trio

from aspenfs import errors
from aspenfs.blobs.store import BlobStore
from aspenfs.filesystem.volume import Volume
from aspenfs.views.files import FilesTree

log = logging.getLogger(__name__)

PERIOD_S: Final = 2.0  # access times are written and garbage is collected this often
IDLE_S: Final = 0.5
BUSY_S: Final = 0.05  # while there are orphans
AFTER_FAILURE_S: Final = 30.0
COLLECTIONS_MAX: Final = 20  # of a hundred blobs, each time
GARBAGE_ROWS: Final = 200  # looked at in one turn of the loop, some 1 ms
GARBAGE_PAUSE_S: Final = 0.01
TIDY_S: Final = 5.0  # for orphans at the end; the next start goes on with the others


class Upkeep:
    """Runs beside a mount: `run` until cancelled, `tidy` when it is unmounted."""

    def __init__(
        self,
        files: FilesTree,
        volume: Volume,
        blobs: BlobStore,
        short_of_room: Callable[[errors.NoSpace | None], object],
    ) -> None:
        self.files, self.volume, self.blobs, self.short_of_room = files, volume, blobs, short_of_room
        self._period_began = 0.0
        self._to_compact = True
        self._reaping = False
        self._looking_at: bytes | None = b""  # the next row, None when all have been seen

    async def run(self) -> None:
        while True:
            pause = (
                GARBAGE_PAUSE_S if self._looking_at is not None else BUSY_S if self._reaping else IDLE_S
            )
            await trio.sleep(pause)
            try:
                await self.once()
            except errors.NoSpace as error:
                log.warning("housekeeping waits for space: %s", error)
                await trio.sleep(PERIOD_S)
            except errors.ClusterError as error:
                log.info("housekeeping waits for a quorum: %s", error)
                await trio.sleep(PERIOD_S)
            except errors.SyncFailed:
                raise
            except Exception:
                log.exception("housekeeping failed, and goes on in %g s", AFTER_FAILURE_S)
                await trio.sleep(AFTER_FAILURE_S)

    async def once(self) -> None:
        """One round; most of it only if PERIOD_S has gone by since the last time."""
        # Those that are held somewhere are looked at again only now and then.
        orphans = self.files.orphans
        self._reaping = bool(await self.files.reap()) or (self.volume.store.alone and bool(orphans.doomed))
        self._find_garbage()
        now = trio.current_time()
        if now - self._period_began < PERIOD_S:
            return
        self._period_began = now
        # Garbage first: it is what gives space back when there is none to write access times.
        for _ in range(COLLECTIONS_MAX if self.volume.unreferenced else 0):
            if not await self.files.content.collect():
                break
            self._to_compact = True
            await trio.lowlevel.checkpoint()
        if self._to_compact:
            await self._compact_blobs()
        await self.files.flush_atimes()

    async def _compact_blobs(self) -> None:
        """Gives back the space of deleted blobs; after NoSpace again in the next round."""
        try:
            for step in self.blobs.collect():
                if step.needs_sync:
                    await trio.to_thread.run_sync(self.blobs.sync)
                await trio.lowlevel.checkpoint()
        except errors.NoSpace as error:
            self.short_of_room(error)
            raise
        self.short_of_room(None)
        self._to_compact = False

    def _find_garbage(self) -> None:
        """A step of looking for what earlier lives had not collected when they ended, and for what found
        no room in memory."""
        if self._looking_at is None and self.volume.overlooked and not self.volume.unreferenced:
            self.volume.overlooked = False
            self._looking_at = b""
        if self._looking_at is not None:
            self._looking_at = self.files.content.find_garbage(self._looking_at, GARBAGE_ROWS)

    async def tidy(self) -> None:
        """After the mount. What does not work now is left to the next start, which finds it."""
        try:
            with trio.move_on_after(TIDY_S):
                while await self.files.reap():
                    pass
            await self.files.sync()
        except (errors.NoSpace, errors.ClusterError) as error:
            log.warning("left to the next start: %s", error)
