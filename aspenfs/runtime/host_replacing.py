"""Replacing: a state that turned out to be a bad one, and another node's that takes the place of this one's.

Belongs here: quarantine as the store lives it, and the swap under a running store. Not here: what is written
down about a quarantine (`quarantine.py`), fetching and installing (`snapshots/client.py`).
"""

import logging
from functools import partial

import trio

from aspenfs.cluster.types import Configuration
from aspenfs.cluster.types import Snapshot as RaftSnapshot
from aspenfs.limits import TICK_MS
from aspenfs.runtime.consensus import decode_configuration
from aspenfs.runtime.host_base import FOUNDER, STATE_DIRECTORY
from aspenfs.runtime.host_writing import Writing
from aspenfs.runtime.quarantine import Quarantine
from aspenfs.runtime.snapshots.client import Fetched, install
from aspenfs.runtime.statedb import StateDb

logger = logging.getLogger(__name__)


class Replacing(Writing):
    def suspend(self, marker: Quarantine) -> None:
        """The state is a bad one: nothing is answered from it or built upon it, until another one has taken
        its place (`replace_state`). The log goes on, this node's vote with it. Who waits gets Diverged."""
        if self._failure is not None or self.quarantine is not None:
            return
        logger.error("index=%d quarantine: the state of this node differs from that of the majority there "
                     "(%s here, %s at nodes %s): it serves nothing until it has fetched their state. If that "
                     "does not come to its end, look at aspen status", marker.index,
                     marker.found.hex()[:16] or "unreadable", marker.digest.hex()[:16],
                     " ".join(map(str, marker.sources)))  # fmt: skip
        self.quarantine, self._well = marker, trio.Event()
        self._serve()
        self._replica.suspend(marker.error())
        for tell in self.suspended:
            tell()

    async def well(self) -> None:
        """Returns when the state is not known to be a bad one."""
        while self.quarantine is not None and self._failure is None:
            await self._well.wait()

    async def replace_state(self, fetched: Fetched) -> None:
        """Goes on with a state that was fetched whole from another node, and lies in `state.new`.

        Nothing is evaluated meanwhile: the replica waits for it, or is suspended. Who waits for an earlier
        revision is told that it is committed; `replaced` is called, for all that was known may be wrong.
        """
        stored = fetched.configuration
        configuration = Configuration((FOUNDER,)) if stored is None else decode_configuration(stored)
        snapshot = RaftSnapshot(fetched.index, fetched.term, configuration)
        raft = self._replica.raft
        assert fetched.index >= self.engine.revision, "a state of the past"
        keeps_log = raft.keeps_log(snapshot)
        while keeps_log and raft.log.persisted < fetched.index:
            self._syncer.request()  # after a loss of power the log must still lead on from that state
            await trio.sleep(TICK_MS / 1000)
        put_in_place = partial(install, self._directory, self._wal, fetched.index, keeps_log=keeps_log)
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._applier.stop)
                await trio.to_thread.run_sync(put_in_place)
            # No await from here on: readers see the old state or the new one.
            self._state.adopt(StateDb(self._directory / STATE_DIRECTORY, free_bytes=self._free_bytes))
            self._applier.rebase(fetched.index)
            self._to_settle.clear()
            self.engine.rebase(fetched.index)
            self.consensus.rebase(snapshot, keeps_log=keeps_log)
            self._stall = None
            assert self._token is not None, "a store that does not run"
            self._applier.start(self._token)
            if self._failure is not None:
                self._raise_failure()
            self.quarantine = None
            self._serve()
            if keeps_log:
                self._replica.resume()
            else:
                self._replica.snapshot_installed(snapshot)
        except BaseException as error:
            self._fail(error)
            raise
        self.consensus.wake()  # what the replica has to send and to sync by now
        self._well.set()
        for tell in self.replaced:
            tell()
