"""Several hosts over one replicated store, without Raft: one log, and a replica of the state on each host.

What a host may see differently from another one is what a real cluster lets differ: how far it has applied
the log, when its own proposals come back to it, and whether it reaches the others at all. All of it is
decided by a seed, in virtual time (`trio.testing.MockClock`), so a run that fails fails again.

    Log         what is agreed: one order of commands
    HostStore   the Store port of one host: an engine of its own that is fed from the log
    Host        what is mounted there: volume, trees
    Hosts       the log and the hosts; `run` makes one and runs a test in it
"""

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import trio
import trio.testing

from aspenfs import errors
from aspenfs.filesystem.check import Check, Problem
from aspenfs.filesystem.volume import Volume
from aspenfs.kv import commands
from aspenfs.kv.commands import Command
from aspenfs.kv.engine import Engine
from aspenfs.kv.memory import MemoryState
from aspenfs.kv.state import Outcome
from aspenfs.kv.store import Dedup, Observer
from aspenfs.kv.types import Batch, Compare, Event, Operation, Record, TxnResult
from aspenfs.limits import PROPOSAL_TIMEOUT_MS
from aspenfs.vfs.tree import Usage
from aspenfs.views.files import FilesTree
from tests.filesystem.volumes import MemoryBlobs
from tests.views.subject import Mounted

EPOCH_NS = 1_700_000_000_000_000_000
TIMEOUT_S = PROPOSAL_TIMEOUT_MS / 1000


class VirtualClock:
    """The time of the virtual clock; no two looks give the same."""

    def __init__(self) -> None:
        self._last = EPOCH_NS

    def time_ns(self) -> int:
        self._last = max(self._last + 1, EPOCH_NS + int(trio.current_time() * 1e9))
        return self._last

    def monotonic_ns(self) -> int:
        return self.time_ns()


class Entry(NamedTuple):
    command: Command
    proposer: int  # node id
    origin: object


class HostBegun:
    """A `kv.store.Begun`: entry `index`, unless the leader was deposed meanwhile (`Hosts.depose`)."""

    def __init__(self, store: "HostStore", index: int) -> None:
        self.store, self.index = store, index
        self.hurried = False
        self.known = False  # to others: who leads next has it
        self.lost: Command | None = None  # and is to be proposed again
        self.origin: object = None

    def hurry(self) -> None:
        self.hurried = True

    async def held(self) -> bool:
        self.hurry()
        await trio.sleep(self.store.delay())
        if self.lost is None and self.store.revision < self.index and not self.store.cut:
            self.known = True
            return True
        return False

    async def outcome(self) -> TxnResult:
        store = self.store
        while self.lost is None:
            if store.revision >= self.index:
                result = store.outcomes.pop(self.index).result
                break
            moved = store._moved
            with trio.move_on_after(TIMEOUT_S) as waited:
                await moved.wait()
            if waited.cancelled_caught:
                raise errors.NoQuorum("the entry did not come back in time")
        else:
            while store.paused:  # noqa: ASYNC110 – virtual time costs nothing
                await trio.sleep(0.0005)
            result = await store._run(self.lost, self.origin)
        if isinstance(result, errors.AspenError):
            raise result
        assert isinstance(result, TxnResult)
        return result


class HostStore:
    """The Store port on one host. `delay` gives how long an entry takes to get here, in virtual seconds."""

    def __init__(self, hosts: "Hosts", node_id: int, delay: Callable[[], float]) -> None:
        self.hosts, self.node_id, self.delay = hosts, node_id, delay
        self.state = MemoryState()
        self.engine = Engine(self.state, hosts.clock, hosts, trio.Event)
        self.get, self.range, self.scan = self.engine.get, self.engine.range, self.engine.scan
        self.outcomes: dict[int, Outcome] = {}  # of entries that somebody here waits for
        self.paused = False  # applies nothing: a slow host
        self.cut = False  # and reaches nobody: a partition
        self.leads = False
        self.begun: list[HostBegun] = []
        self._moved = trio.Event()

    @property
    def alone(self) -> bool:
        return self.hosts.alone

    @property
    def revision(self) -> int:
        return self.engine.revision

    @property
    def replay_floor(self) -> int:
        return self.engine.revision

    # --- applying ---

    def apply_next(self) -> None:
        """One more entry, as the replica does it: evaluated, shown, told to observers."""
        entry = self.hosts.log[self.revision]
        origin = entry.origin if entry.proposer == self.node_id else None
        index, outcome = self.engine.submit(entry.command, origin)
        self.engine.committed_to(index)
        self.state.apply(self.engine.overlay.pending(index))
        self.engine.overlay.settle(index)
        if index in self.outcomes:
            self.outcomes[index] = outcome
        self._moved.set()
        self._moved = trio.Event()

    def catch_up(self) -> None:
        while self.revision < len(self.hosts.log):
            self.apply_next()

    async def pump(self) -> None:
        while True:
            if not self._has_work():
                await self.hosts.changed.wait()
                continue
            await trio.sleep(self.delay())
            if self._has_work():
                self.apply_next()

    def _has_work(self) -> bool:
        return self.revision < len(self.hosts.log) and not (self.paused or self.cut)

    def leap(self) -> None:
        """After `paused`: all that it has missed at once, before anybody who waits for some of it goes on."""
        self.catch_up()
        self.go_on()

    def go_on(self) -> None:
        """After `paused` or `cut`."""
        self.paused = self.cut = False
        self.hosts.tell()

    async def _until(self, index: int) -> None:
        with trio.move_on_after(TIMEOUT_S):
            while self.revision < index:
                await self._moved.wait()
        if self.revision < index:
            raise errors.NoQuorum("the entry did not come back in time")

    # --- the port ---

    async def txn(
        self,
        compares: Sequence[Compare],
        then: Sequence[Operation],
        else_: Sequence[Operation] = (),
        *,
        dedup: Dedup | None = None,
        origin: object = None,
    ) -> TxnResult:
        command, _ = self.engine.txn_command(compares, then, else_, dedup)
        result = await self._run(command, origin)
        assert isinstance(result, TxnResult)
        return result

    def begin(
        self, compares: Sequence[Compare], then: Sequence[Operation], *, origin: object = None
    ) -> HostBegun | None:
        log = self.hosts.log
        under_way = log[self.revision :]
        if not self.leads or self.cut or any(entry.proposer != self.node_id for entry in under_way):
            return None
        _, encoded = self.engine.txn_command(compares, then)
        log.append(Entry(commands.decode(encoded), self.node_id, origin))
        index = len(log)
        self.outcomes[index] = Outcome(None, (), ())
        begun = HostBegun(self, index)
        self.begun.append(begun)
        self.hosts.tell()
        return begun

    def depose(self) -> None:
        """Another leader knows nothing of what is in the log, nowhere applied and not held by others: it is
        proposed again."""
        log = self.hosts.log
        applied = max(
            *(host.store.revision for host in self.hosts.hosts),
            *(begun.index for begun in self.begun if begun.known),
        )
        for begun in self.begun:
            if begun.index > applied:
                entry = log[begun.index - 1]
                begun.lost, begun.origin = entry.command, entry.origin
                self.outcomes.pop(begun.index, None)
        assert all(entry.proposer == self.node_id for entry in log[applied:])
        del log[applied:]
        self.leads = False
        self._moved.set()
        self._moved = trio.Event()

    async def _run(self, command: Command, origin: object = None) -> Any:
        command = commands.decode(commands.encode(command))  # what travels is bytes
        if self.cut:
            await trio.sleep(TIMEOUT_S)
            raise errors.NoQuorum("nobody answers")
        if not self.alone:
            await trio.sleep(self.delay())  # to the leader
        log = self.hosts.log
        log.append(Entry(command, self.node_id, origin))
        index = len(log)
        self.outcomes[index] = Outcome(None, (), ())
        self.hosts.tell()
        try:
            if self.alone:
                self.catch_up()
            await self._until(index)
            result = self.outcomes[index].result
        finally:
            del self.outcomes[index]
        if isinstance(result, errors.AspenError):
            raise result
        return result

    async def committed(self, revision: int | None = None) -> int:
        return await self.engine.committed(revision)

    def observe(self, observer: Observer, keyspaces: Collection[bytes] = ()) -> Callable[[], None]:
        return self.engine.observe(observer, keyspaces)

    def watch(self, start: bytes, end: bytes, *, from_revision: int | None = None) -> AsyncIterator[Batch]:
        return self.engine.watch(start, end, from_revision=from_revision)

    async def lease_grant(self, ttl_ms: int, lease: int = 0) -> int:
        return int(await self._run(self.engine.grant_command(ttl_ms, lease)))

    async def lease_keepalive(self, lease: int) -> int:
        return int(await self._run(self.engine.keepalive_command(lease)))

    async def lease_revoke(self, lease: int) -> None:
        await self._run(self.engine.revoke_command(lease))

    def leases(self) -> list[tuple[int, int, int]]:
        return self.engine.leases()

    async def compact(self, revision: int) -> None:
        while await self._run(self.engine.compact_command(revision)):
            pass

    async def barrier(self) -> int:
        if self.cut:
            await trio.sleep(TIMEOUT_S)
            raise errors.NoQuorum("nobody answers")
        end = len(self.hosts.log)
        if self.revision < end:
            await self._until(end)
        return self.revision

    async def fence(self, revision: int) -> None:
        await self._until(revision)


class Beside:
    """The Tasks port over a nursery; an error of ours is for those who wait, any other fails the test."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.nursery = nursery

    def event(self) -> trio.Event:
        return trio.Event()

    async def pause(self) -> None:
        await trio.sleep(0.001)

    def spawn(self, work: Callable[[], Awaitable[None]]) -> None:
        self.nursery.start_soon(work)


class Host:
    """files/ mounted on one host, with its housekeeping, but no kernel: `mounted` drives it by paths."""

    def __init__(self, hosts: "Hosts", node_id: int, delay_s: float = 0.002) -> None:
        self.hosts = hosts
        self.scope = trio.CancelScope()
        self.store = hosts.store(node_id, delay_s)
        self.volume = Volume(self.store, hosts.blobs, hosts.clock)
        self.tree = FilesTree(self.volume, lambda: Usage(4096, 100, 50, 0, 0))
        self.mounted = Mounted(self.tree)
        self.store.observe(self._observe)
        self.rounds = True

    async def start(self) -> None:
        await self.hosts.nursery.start(self._run)
        await self.volume.format()
        self.tree.orphans.recover()
        await self.tree.orphans.round()

    async def _run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                self.volume.tasks = Beside(nursery)
                nursery.start_soon(self._upkeep)
                task_status.started()

    async def _upkeep(self) -> None:
        while True:
            await trio.sleep(0.5)
            if self.rounds:
                with suppress(errors.NoQuorum):
                    await self.tree.orphans.round()
                    await self.tree.reap()

    def _observe(self, revision: int, events: Sequence[Event], origin: object) -> None:
        if not self.store.alone:
            for event in events:
                self.tree.noticed(event, origin is self.volume)

    def kill(self) -> None:
        """As SIGKILL does it: whatever it was about to do, it does not."""
        self.store.cut = True
        self.scope.cancel()

    async def unmount(self) -> None:
        self.tree.orphans.unmounted()
        await self.tree.orphans.session.close()
        await self.tree.reap()
        self.kill()


class Hosts:
    """The agreed log and those who follow it. `random` is the only source of chance."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.clock = VirtualClock()
        self.blobs = MemoryBlobs()  # replicated beside the log: every host has every chunk
        self.log: list[Entry] = []
        self.alone = False
        self.changed = trio.Event()
        self.hosts: list[Host] = []
        self.nursery: trio.Nursery

    def random_bytes(self, size: int) -> bytes:
        return self.random.randbytes(size)

    def tell(self) -> None:
        self.changed.set()
        self.changed = trio.Event()

    def store(self, node_id: int, delay_s: float = 0.002) -> HostStore:
        """A store that applies what is agreed, each entry within `delay_s`."""
        store = HostStore(self, node_id, lambda: self.random.uniform(0, delay_s))
        store.catch_up()
        self.nursery.start_soon(store.pump)
        return store

    async def host(self, node_id: int, delay_s: float = 0.002) -> Host:
        """files/ mounted on one host more."""
        host = Host(self, node_id, delay_s)
        await host.start()
        self.hosts.append(host)
        return host

    async def everywhere(self) -> None:
        """Returns when every host that is there has applied all that is agreed."""
        for host in self.hosts:
            if not host.store.cut:
                await host.store.barrier()

    def volume(self, node_id: int, delay_s: float = 0.002) -> Volume:
        return Volume(self.store(node_id, delay_s), self.blobs, self.clock)

    async def end_leases(self) -> None:
        """What the leader does now and then."""
        store = HostStore(self, 0, lambda: 0.0)
        while True:
            await trio.sleep(0.25)
            store.catch_up()
            command = store.engine.expire_command()
            if command is not None:
                self.log.append(Entry(command, 0, None))
                self.tell()

    def problems(self) -> list[Problem]:
        """What is wrong with files/ after all that is agreed."""
        store = HostStore(self, 0, lambda: 0.0)
        store.catch_up()
        return list(Check(store, self.blobs.has).problems())

    def rows(self, prefix: bytes) -> Iterator[tuple[bytes, Record]]:
        store = HostStore(self, 0, lambda: 0.0)
        store.catch_up()
        return store.scan(prefix, prefix + b"\xff" * 300)


def run(test: Callable[[Hosts], Awaitable[None]], seed: int = 0, *, seconds: float = 600) -> None:
    """Runs `test` in virtual time; afterwards every invariant of files/ holds."""

    async def main() -> None:
        hosts = Hosts(seed)
        async with trio.open_nursery() as nursery:
            hosts.nursery = nursery
            nursery.start_soon(hosts.end_leases)
            with trio.fail_after(seconds):
                await test(hosts)
            nursery.cancel_scope.cancel()
        assert hosts.problems() == []

    # As pytest-trio does it: the order in which tasks run is a function of the seed too.
    scheduling = vars(trio._core._run)
    scheduling["_ALLOW_DETERMINISTIC_SCHEDULING"] = True
    scheduling["_r"].seed(seed)
    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


async def together(*works: Callable[[], Awaitable[object]]) -> list[Any]:
    """All at once; what each returned, or the error of ours that it raised."""
    results: list[Any] = [None] * len(works)

    async def one(at: int, work: Callable[[], Awaitable[object]]) -> None:
        try:
            results[at] = await work()
        except errors.AspenError as error:
            results[at] = error

    async with trio.open_nursery() as nursery:
        for at, work in enumerate(works):
            nursery.start_soon(one, at, work)
    return results


async def until(condition: Callable[[], bool]) -> None:
    """Returns when it holds."""
    while not condition():  # noqa: ASYNC110 – virtual time costs nothing
        await trio.sleep(0.0005)
