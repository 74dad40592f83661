"""The replica of this node over its real log, state machine and network; the loop that drives it.

Belongs here: what `cluster.replica.Owner` asks for, turned into WAL frames, evaluation and messages;
terms and configurations by index, which the state database keeps with what it applies; tasks that
pump and tick. Not here: the Store port, threads, failing (`host.py`), sockets (`peers/`).

All methods belong to the loop's thread, but `meta_at` and `ticket`, which read what the loop replaces
as a whole.
"""

import logging
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import msgpack
import outcome
import trio

from aspenfs import errors
from aspenfs.cluster.membership import read_configuration
from aspenfs.cluster.messages import Message
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.replica import Replica
from aspenfs.cluster.replica_base import HEADER, Done
from aspenfs.cluster.types import Configuration, Entry, EntryKind, HardState, Role, Snapshot
from aspenfs.kv import commands
from aspenfs.kv.commands import Command
from aspenfs.kv.engine import Engine
from aspenfs.kv.state import Outcome, nothing_changed
from aspenfs.kv.types import TxnResult
from aspenfs.limits import NOTICE_MS, TICK_MS
from aspenfs.runtime.applier import Applier
from aspenfs.runtime.syncer import Syncer
from aspenfs.runtime.wal import Kind, Wal

logger = logging.getLogger(__name__)

META_TERM, META_CONFIGURATION = "term", "configuration"

_IDLE_TICK_SECONDS = 0.25  # alone there is nobody to beat a heart for
_VOTE_BYTES = 8

Landmark = tuple[int, Any]  # from this index on, this


class Network(Protocol):
    """The way to the other members: `runtime.peers.PeerNetwork`."""

    def send(self, to: int, message: Message) -> None: ...

    def flush(self) -> None:
        """What was sent may leave now: `Consensus` says so after each turn."""


class _Alone:
    """Nobody else is there."""

    def send(self, to: int, message: Message) -> None:
        logger.debug("no network: message to=%d dropped", to)

    def flush(self) -> None:
        pass


class _Begun:
    """A `kv.store.Begun`."""

    def __init__(self, hurry: Callable[[], None], when_held: Callable[[Done], None]) -> None:
        self.hurry, self._when_held = hurry, when_held
        self._done, self._held = trio.Event(), trio.Event()
        self._result: object = None

    def resolve(self, result: object) -> None:
        self._result = result
        self._done.set()
        self._held.set()

    def _is_held(self, _: object) -> None:
        self._held.set()

    async def held(self) -> bool:
        if not self._held.is_set():
            self._when_held(self._is_held)
            self.hurry()
        await self._held.wait()
        return not self._done.is_set()

    async def outcome(self) -> TxnResult:
        await self._done.wait()
        result = self._result
        if isinstance(result, errors.AspenError):
            raise result.with_traceback(None)
        assert isinstance(result, TxnResult)
        return result


class Consensus:
    """Owner of this node's `Replica`. Made when the log and the state have been opened."""

    def __init__(self, wal: Wal, engine: Engine, applier: Applier, syncer: Syncer,
                 failed: Callable[[BaseException], object], terms: Iterable[Landmark],
                 configuration: Configuration) -> None:  # fmt: skip
        """`terms`: (first index, term) of what is known of the log. `failed` hears of what stops the node."""
        self._wal, self._engine, self._applier, self._syncer = wal, engine, applier, syncer
        self._failed = failed
        self._terms: tuple[Landmark, ...] = tuple(terms) or ((0, 0),)
        self._configurations: tuple[Landmark, ...] = ((0, configuration),)
        self.ticket = 0  # of the last write; a sync covers those that it found
        self.network: Network = _Alone()
        self.replica: Replica
        self._waiting: trio.lowlevel.Task | None = None
        self._awake = False
        self.snapshot_wanted: Callable[[Snapshot, int], object] = _no_snapshots
        self.configuration_changed: list[Callable[[Configuration], object]] = []
        self._sync_due = False  # at the end of this turn
        self._reminder = trio.Event()
        self.run_inline = True  # no task pumps: whoever wakes does

    def start(self, raft: Raft, monotonic_ns: Callable[[], int], incarnation: int) -> Replica:
        self.replica = Replica(raft, self, monotonic_ns, incarnation=incarnation)
        return self.replica

    # --- tasks ---

    async def run(self) -> None:
        """Pumps whenever something was put in, and ticks, until cancelled."""
        self.run_inline = False
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pump)
                nursery.start_soon(self._remind)
                nursery.start_soon(self._tick)
        finally:
            self.run_inline = True

    def wake(self) -> None:
        """Something was put in: the pump runs when all tasks that are ready have had their turn."""
        if self.run_inline:
            self.replica.pump()
            self.network.flush()
        elif not self._awake:
            self._awake = True
            if self._waiting is not None:
                trio.lowlevel.reschedule(self._waiting)
                self._waiting = None

    async def _pump(self) -> None:
        while True:
            if self._awake:
                await trio.lowlevel.checkpoint()
            else:
                self._waiting = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._not_waiting)
            self._awake = False
            self._guarded(self.replica.pump)

    async def _remind(self) -> None:
        while True:
            await self._reminder.wait()
            self._reminder = trio.Event()
            await trio.sleep(NOTICE_MS / 1000)
            self._guarded(self.replica.reminded)

    def _not_waiting(self, _: object) -> trio.lowlevel.Abort:
        self._waiting = None
        return trio.lowlevel.Abort.SUCCEEDED

    async def _tick(self) -> None:
        while True:
            if self.replica.alone:
                await trio.sleep(_IDLE_TICK_SECONDS)
            else:
                await trio.sleep(TICK_MS / 1000)
                self._guarded(self.replica.tick)

    def _guarded(self, act: Callable[[], object]) -> None:
        """A replica that fails must not go on: what it did may be half done."""
        try:
            act()
        except Exception as error:
            self._failed(error)
            return
        # First to the others: their disks are further away than ours.
        self.network.flush()
        if self._sync_due:
            self._sync_due = False
            self._syncer.request()

    def receive(self, sender: int, messages: Sequence[Message]) -> None:
        """From `sender`, which the link has proved. What it says in another's name is dropped."""
        try:
            for message in messages:
                if message.sender == sender:
                    self.replica.receive(message)
        except errors.EntriesLost as error:
            self._failed(error)
            return
        except errors.AspenError as error:
            logger.info("a message was refused: %s", error)
        except Exception as error:
            self._failed(error)
            return
        # At once: they came in one frame, and each turn of the loop is time that somebody waits.
        self._guarded(self.replica.pump)

    def unreachable(self, node: int) -> None:
        """Messages to `node` got lost."""
        self.replica.raft.report_unreachable(node)
        self.wake()

    def synced(self, ticket: int, index: int) -> None:
        """All writes up to `ticket` and entries up to `index` are durable."""
        self._guarded(lambda: self.replica.synced(ticket, index))

    # --- proposing ---

    async def propose(self, command: Command, encoded: bytes, origin: object) -> object:
        """The result of evaluating it here once it is committed, an AspenError among them.

        Cancelled, it may be applied all the same.
        """
        return await self._answer(lambda resolve: self.replica.propose(
            encoded, (command, origin), resolve, repeatable=command.dedup is not None))  # fmt: skip

    def begin_proposal(self, command: Command, encoded: bytes, origin: object) -> _Begun | None:
        """A proposal whose outcome is settled at once; None if it can not be: `Replica.begin`."""
        if self.run_inline:
            return None
        begun = _Begun(self.wake, self.replica.when_held)
        return begun if self.replica.begin(encoded, (command, origin), begun.resolve) else None

    async def read_index(self) -> int:
        """An index that was current after the call began, and is evaluated here. NoQuorum."""
        index = await self._answer(self.replica.read)
        if isinstance(index, errors.AspenError):
            raise index.with_traceback(None)
        assert isinstance(index, int)
        return index

    async def _answer(self, ask: Callable[[Done], object]) -> object:
        """What the replica resolves `ask`'s question with."""
        if self.run_inline:
            raise errors.NoQuorum("this node does not run: there is nobody to agree with")
        task = trio.lowlevel.current_task()
        waits = True

        def resolve(result: object) -> None:
            nonlocal waits
            if waits:
                waits = False
                trio.lowlevel.reschedule(task, outcome.Value(result))

        def give_up(_: object) -> trio.lowlevel.Abort:
            nonlocal waits
            waits = False
            return trio.lowlevel.Abort.SUCCEEDED

        ask(resolve)
        self.wake()
        return await trio.lowlevel.wait_task_rescheduled(give_up)

    # --- Owner ---

    @property
    def revision(self) -> int:
        return self._engine.revision

    def write(
        self, truncate_after: int | None, entries: Sequence[Entry], hard_state: HardState | None
    ) -> int:
        wal = self._wal
        if truncate_after is not None and truncate_after < wal.last_index:
            wal.truncate_after(truncate_after)
        frames: list[tuple[int, int, int, bytes]] = []
        if hard_state is not None:
            vote = hard_state.vote.to_bytes(_VOTE_BYTES, "little")
            frames.append((int(Kind.HARD_STATE), hard_state.term, 0, vote))
        frames += [(kind, term, index, data) for term, index, kind, data in entries]
        wal.append_many(frames)
        for entry in entries:
            self.note_term(entry.index, entry.term)
        self.ticket += 1
        return self.ticket

    def request_sync(self) -> None:
        if self.run_inline:
            return  # who runs no threads syncs by hand
        self._sync_due = True

    def send(self, to: int, message: Message) -> None:
        self.network.send(to, message)

    def apply(self, entry: Entry, context: object) -> object:
        data = entry.data
        if not data:
            self._accept(entry.index, nothing_changed(None))
            return None
        origin: object = None
        if context is None:
            try:
                command = commands.decode(data[HEADER.size:] if entry.kind == EntryKind.PROPOSAL else data)
            except errors.InvalidArgument as error:  # alike on all nodes of any release: it changes nothing
                logger.error("index=%d not a command: %s", entry.index, error)
                self._accept(entry.index, nothing_changed(error))
                return error
        else:
            command, origin = context  # type: ignore[misc]
        if command.kind == commands.CHECKPOINT:
            self._applier.checkpoint(entry.index)
        index, did = self._engine.submit(command, origin)
        assert index == entry.index, f"entry {entry.index} evaluated as {index}"
        self._applier.add(index, did.effects)
        return did.result

    def _accept(self, index: int, did: Outcome) -> None:
        self._engine.accept(index, did)
        self._applier.add(index, did.effects)

    def apply_configuration(self, entry: Entry, configuration: Configuration) -> None:
        self._configurations = (*self._configurations, (entry.index, configuration))
        self._accept(entry.index, nothing_changed(None))
        logger.info("index=%d configuration voters=%s outgoing=%s learners=%s", entry.index,
                    *map(list, configuration[:3]))  # fmt: skip
        for tell in self.configuration_changed:
            tell(configuration)

    def committed(self, index: int) -> None:
        self._engine.committed_to(index)

    def remind(self) -> None:
        self._reminder.set()

    def fetch_snapshot(self, snapshot: Snapshot, leader: int) -> None:
        self.snapshot_wanted(snapshot, leader)

    # --- terms and configurations by index ---

    def note_term(self, index: int, term: int) -> None:
        """The entry `index`, and those after it until told otherwise, are of `term`."""
        if self._terms[-1][0] < index and self._terms[-1][1] == term:
            return
        kept = tuple(landmark for landmark in self._terms if landmark[0] < index)
        self._terms = (*kept, (index, term))

    def term_at(self, index: int) -> int:
        return int(_at(self._terms, index))

    def meta_at(self, index: int) -> Mapping[str, bytes]:
        """What the state database keeps beside the entries up to `index`. From any thread."""
        return {
            META_TERM: self.term_at(index).to_bytes(8, "big"),
            META_CONFIGURATION: encode_configuration(_at(self._configurations, index)),
        }

    def state_is_at(self, index: int) -> None:
        """The state database has all up to `index`."""
        configuration: Configuration = _at(self._configurations, index)
        self._terms = _since(self._terms, index)
        self._configurations = _since(self._configurations, index)
        self.replica.state_is_at(Snapshot(index, self.term_at(index), configuration))

    def rebase(self, snapshot: Snapshot, *, keeps_log: bool) -> None:
        """The state is that of a snapshot now; `keeps_log`: of one that the log leads on from."""
        later = tuple(landmark for landmark in self._terms if landmark[0] > snapshot.index)
        self._terms = ((snapshot.index, snapshot.term), *(later if keeps_log else ()))
        self._configurations = ((snapshot.index, snapshot.configuration),)
        for tell in self.configuration_changed:
            tell(snapshot.configuration)

    # --- looking at it ---

    @property
    def leading(self) -> bool:
        return self.replica.raft.role is Role.LEADER

    def status(self) -> dict[str, int | str]:
        raft = self.replica.raft
        return {
            "role": raft.role.name.lower().replace("_", "-"),
            "term": raft.term,
            "leader": raft.leader,
            "log_last": raft.last_index,
            "log_committed": raft.commit,
        }


def _at(landmarks: Sequence[Landmark], index: int) -> Any:
    """What holds at `index`: the landmark at or before it; the first one for what is older."""
    return landmarks[max(0, bisect_right(landmarks, index, key=lambda landmark: landmark[0]) - 1)][1]


def _since(landmarks: tuple[Landmark, ...], index: int) -> tuple[Landmark, ...]:
    """Without those that are out of date at `index`."""
    first = max(0, bisect_right(landmarks, index, key=lambda landmark: landmark[0]) - 1)
    return landmarks[first:] if first else landmarks


def encode_configuration(configuration: Configuration) -> bytes:
    packed: bytes = msgpack.packb(tuple(configuration))
    return packed


def decode_configuration(data: bytes) -> Configuration:
    """Corrupt bytes: ValueError, InvalidArgument."""
    return read_configuration(msgpack.unpackb(data))


def _no_snapshots(snapshot: Snapshot, leader: int) -> NoReturn:
    raise AssertionError("nobody fetches snapshots here")
