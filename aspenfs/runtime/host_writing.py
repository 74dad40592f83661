"""Writing: the path of a transaction, on a node that is alone and among others, and when it must wait.

Belongs here: from a caller's compares and operations to the log, or to the consensus; backpressure. Not here:
what happens behind its back (`host_base.py`), the rest of the port (`host.py`).
"""

from collections.abc import Sequence

import trio

from aspenfs import errors
from aspenfs.errors import AspenError, NoSpace, SyncFailed
from aspenfs.kv import commands, types
from aspenfs.kv.commands import Command
from aspenfs.kv.state import Outcome
from aspenfs.kv.store import Begun, Dedup
from aspenfs.kv.types import Compare, Operation, TxnResult
from aspenfs.limits import OVERLAY_BYTES_MAX, PROPOSAL_TIMEOUT_MS, PROPOSALS_BYTES_MAX
from aspenfs.runtime.host_base import HURRY_BYTES, HostBase
from aspenfs.runtime.wal import Kind

_ENTRY = int(Kind.ENTRY)
_FREEING = frozenset((types.DELETE, types.DELETE_RANGE))


class Writing(HostBase):
    async def txn(self, compares: Sequence[Compare], then: Sequence[Operation],
                  else_: Sequence[Operation] = (), *, dedup: Dedup | None = None,
                  origin: object = None) -> TxnResult:
        engine = self.engine
        if not self._replica.alone:
            return await self._replicated(compares, then, else_, dedup, origin)
        if (self._overlay.bytes > OVERLAY_BYTES_MAX or self._wal.short_of_space or self._failure is not None
                or self._refusal is not None):  # fmt: skip
            await self._admitted(then)
            if not self._is_alone():
                return await self._replicated(compares, then, else_, dedup, origin)
        command, encoded = engine.txn_command(compares, then, else_, dedup)
        index, outcome = engine.prepare(command)
        result = outcome[0]
        if type(result) is not TxnResult:
            assert isinstance(result, AspenError)
            raise result
        self._accept(index, encoded, outcome, origin)
        return result

    def begin(self, compares: Sequence[Compare], then: Sequence[Operation], *,
              origin: object = None) -> Begun | None:
        replica = self._replica
        if (replica.alone or self._failure is not None or self.quarantine is not None
                or self._wal.short_of_space or self._refusal is not None
                or replica.proposed_bytes > PROPOSALS_BYTES_MAX
                or self._overlay.bytes > OVERLAY_BYTES_MAX):  # fmt: skip
            return None
        command, encoded = self.engine.txn_command(compares, then)
        return self.consensus.begin_proposal(command, encoded, origin)

    def _is_alone(self) -> bool:
        """After an await: it may have changed."""
        return self._replica.alone

    def _accept(self, index: int, encoded: bytes, outcome: Outcome, origin: object) -> None:
        """Into the log, then visible. NoSpace and an EIO of the write itself leave no trace."""
        term = self._replica.raft.term
        try:
            self._wal.append(_ENTRY, term, index, encoded)
        except SyncFailed as error:
            self._fail(error)
            raise
        try:
            self.consensus.note_term(index, term)
            self._replica.accept(_ENTRY, encoded)
            self.engine.accept(index, outcome, origin)
        except BaseException as error:
            self._fail(error)  # the log has the entry, the overlay has not
            raise
        self._applier.add(index, outcome[1])
        self._unsynced_bytes += len(encoded)
        if self._unsynced_bytes > HURRY_BYTES:
            self._unsynced_bytes = 0
            self._syncer.request()

    async def _replicated(self, compares: Sequence[Compare], then: Sequence[Operation],
                          else_: Sequence[Operation], dedup: Dedup | None, origin: object) -> TxnResult:
        command, encoded = self.engine.txn_command(compares, then, else_, dedup)
        freeing = any(operation[0] in _FREEING for operation in then)
        result = await self._proposed(command, encoded, freeing, origin)
        assert isinstance(result, TxnResult)
        return result

    async def _proposed(self, command: Command, encoded: bytes, freeing: bool, origin: object) -> object:
        """The result of a command that a majority has agreed on and that was evaluated here."""
        if self._failure is not None:
            self._raise_failure()
        self._check_well()
        if not freeing:
            if self._wal.short_of_space:
                raise NoSpace("no space for the log: free some on the file system of the state directory")
            if self._refusal is not None:
                raise self._refusal.with_traceback(None)
        if self._replica.proposed_bytes > PROPOSALS_BYTES_MAX or self._overlay.bytes > OVERLAY_BYTES_MAX:
            await self._room_to_propose()
        if self.before_propose is not None:
            await self.before_propose(command)
        result = await self.consensus.propose(command, encoded, origin)
        if isinstance(result, AspenError):
            raise result.with_traceback(None)
        return result

    async def _room_to_propose(self) -> None:
        """Waits until fewer bytes are under way. NoQuorum if they do not get less."""
        deadline = trio.current_time() + PROPOSAL_TIMEOUT_MS / 1000
        while self._replica.proposed_bytes > PROPOSALS_BYTES_MAX or self._overlay.bytes > OVERLAY_BYTES_MAX:
            if self._failure is not None:
                self._raise_failure()
            if self._stall is not None:
                raise self._stall.with_traceback(None)
            if trio.current_time() > deadline:
                raise errors.NoQuorum("what was proposed before is still under way: `aspen status` tells why")
            self._applier.request(self.engine.committed_revision)
            await trio.sleep(0.005)

    async def _admitted(self, then: Sequence[Operation]) -> None:
        """Waits until there is room for a transaction. NoSpace, when only space on the disk would help.

        What deletes may go on for a while on a full disk: it is how space comes back.
        """
        freeing = any(operation[0] in _FREEING for operation in then)
        while True:
            if self._failure is not None:
                self._raise_failure()
            if self._wal.short_of_space and not self._syncer.running:
                self._look_for_space()
                self._flush_log()
            if self._wal.short_of_space and not freeing:
                raise NoSpace("no space for the log: free some on the file system of the state directory")
            if self._refusal is not None and not freeing:
                raise self._refusal.with_traceback(None)
            held = self._overlay.bytes
            if held <= OVERLAY_BYTES_MAX:
                return
            if self._stall is not None:
                if freeing and held <= 2 * OVERLAY_BYTES_MAX:
                    return
                raise self._stall.with_traceback(None)
            if not self._syncer.running:
                self._flush_log()
                self.apply()
                continue
            self._syncer.request()
            self._applier.request(self.engine.committed_revision)
            if self._room.is_set():
                self._room = trio.Event()
            await self._room.wait()

    def _look_for_space(self) -> None:
        """The log tries to make its next segment after a sync that had something to do: here it is."""
        self._run_command(Command(commands.NOOP, 0, None, ()))

    def _run_command(self, command: Command) -> Outcome:
        """A command of ours, as `txn` does it."""
        if self._failure is not None:
            self._raise_failure()
        index, outcome = self.engine.prepare(command)
        if isinstance(outcome.result, AspenError):
            raise outcome.result
        self._accept(index, commands.encode(command), outcome, None)
        return outcome

    async def _command(self, command: Command) -> object:
        """The result of a command of ours."""
        if self._replica.alone:
            return self._run_command(command).result
        return await self._proposed(command, commands.encode(command), True, None)

    async def _number(self, command: Command) -> int:
        result = await self._command(command)
        assert isinstance(result, int)
        return result
