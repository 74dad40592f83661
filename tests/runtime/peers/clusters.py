"""A cluster for tests of joining and certificates: real networks, keepers and receptions over one LocalStore.

The one store stands for the replicated one: what one node commits, all have applied. Who leads and who
votes, the test says.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import msgpack
import trio

from aspenfs import errors
from aspenfs.kv.local import LocalStore
from aspenfs.kv.types import Compare, Operation, absent, put
from aspenfs.runtime import identity
from aspenfs.runtime.peers import credentials, tickets
from aspenfs.runtime.peers.admission import Newcomer, Reception
from aspenfs.runtime.peers.authority import Keeper
from aspenfs.runtime.peers.join import Joined, join
from aspenfs.runtime.peers.network import PeerNetwork
from aspenfs.runtime.peers.tickets import Ticket
from aspenfs.seams import Clock
from tests.runtime.peers.nodes import CLOCK, ENTROPY

PREFIX, END = b"c/member/", b"c/member0"


class ShiftedClock:
    """The system's clock, some time ahead."""

    def __init__(self) -> None:
        self.ahead_ns = 0

    def time_ns(self) -> int:
        return CLOCK.time_ns() + self.ahead_ns

    def monotonic_ns(self) -> int:
        return CLOCK.monotonic_ns() + self.ahead_ns


class Row(NamedTuple):
    name: str
    addresses: tuple[str, ...]
    state: str
    born: bytes
    topology: int = 0


def _key(node: int) -> bytes:
    return PREFIX + node.to_bytes(8, "big")


class Cluster:
    """What `authority.Cluster` and `admission.Cluster` want, for all nodes of a test."""

    def __init__(self) -> None:
        self.store = LocalStore(CLOCK, ENTROPY, trio.Event)
        self.leader = 1
        self.voters = {1}
        self.learners: set[int] = set()
        self.admissions = 0
        self.fail_after_commit = False

    def table(self) -> Mapping[int, Row]:
        found = {}
        for key, record in self.store.range(PREFIX, END):
            fields = msgpack.unpackb(record.value, use_list=False)
            found[int.from_bytes(key[len(PREFIX):], "big")] = Row(*fields)
        return found

    def is_voter(self, node: int) -> bool:
        return node in self.voters

    def write(self, node: int, row: Row) -> None:
        operations = [put(_key(node), msgpack.packb(row))]
        self.store._run(*self.store.engine.txn_command([], operations, (), None), None)

    async def admit(self, newcomer: Newcomer, compares: Sequence[Compare],
                    operations: Sequence[Operation]) -> None:  # fmt: skip
        await trio.lowlevel.checkpoint()
        row = Row(newcomer.name, newcomer.addresses, "member", newcomer.born)
        key = _key(newcomer.node)
        done = await self.store.txn([absent(key), *compares], [put(key, msgpack.packb(row)), *operations])
        if not done.succeeded:
            raise errors.Conflict("taken meanwhile")
        self.admissions += 1
        if self.fail_after_commit:
            self.fail_after_commit = False
            raise errors.NotLeader("it has just lost its leadership")
        self.learners.add(newcomer.node)

    async def readmit(self, node: int) -> None:
        self.learners.add(node)


class Member:
    """A node that runs: network, keeper, reception."""

    def __init__(self, cluster: Cluster, directory: Path, clock: Clock) -> None:
        shown = credentials.load(directory)
        assert shown is not None
        self.id, self.directory = shown.name.node_id, directory
        self.network = PeerNetwork(shown, identity.begin_incarnation(directory, ENTROPY), clock,
                                   deliver=lambda peer, messages: None,
                                   unreachable=lambda peer: None)  # fmt: skip
        self.keeper = Keeper(self.network, cluster.store, cluster, clock)
        self.reception = Reception(self.network, self.keeper, cluster.store, cluster, clock, ENTROPY)


class Running:
    """The cluster of a test, its members running in a nursery."""

    def __init__(self, directory: Path, nursery: trio.Nursery) -> None:
        self.directory, self._nursery = directory, nursery
        self.cluster, self.clock = Cluster(), ShiftedClock()
        self.members: dict[int, Member] = {}
        self._scopes: dict[int, trio.CancelScope] = {}

    async def found(self) -> Member:
        """The first node, as `aspen init` makes it."""
        directory = self.directory / "n1"
        identity.create(directory, "demo", ENTROPY)
        credentials.establish(directory, self.clock, ENTROPY)
        member = await self.start(directory)
        await member.keeper.establish()
        return member

    async def start(self, directory: Path) -> Member:
        member = Member(self.cluster, directory, self.clock)
        self.members[member.id] = member
        self._scopes[member.id] = scope = trio.CancelScope()
        started = trio.Event()
        self._nursery.start_soon(self._run, member, scope, started)
        await started.wait()
        born = member.network.credentials.name.born
        address = f"127.0.0.1:{member.network.ports[0]}"
        self.cluster.write(member.id, Row(f"n{member.id}", (address,), "member", born))
        self.tell()
        return member

    async def _run(self, member: Member, scope: trio.CancelScope, started: trio.Event) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(member.network.run, ["127.0.0.1:0"])
                nursery.start_soon(member.keeper.run)
                started.set()

    def stop(self, node: int) -> None:
        self._scopes.pop(node).cancel()
        del self.members[node]

    def tell(self) -> None:
        """All members learn of the table, as they would by applying."""
        for member in self.members.values():
            member.network.set_members(self.cluster.table())
            member.keeper.stir()

    async def make_ticket(self, *addresses: str, ttl_s: int = 600) -> Ticket:
        first = self.members[self.cluster.leader]
        name = first.network.credentials.name
        places = addresses or tuple(f"127.0.0.1:{each.network.ports[0]}" for each in self.members.values())
        ticket = tickets.new(name.cluster_id, "demo", places, first.keeper.signing_fingerprint, ttl_s,
                             self.clock.time_ns(), ENTROPY)  # fmt: skip
        compares, operations = tickets.create(self.cluster.store, ticket, self.clock.time_ns())
        done = await self.cluster.store.txn(compares, operations)
        assert done.succeeded
        return ticket

    async def join(self, ticket: Ticket, name: str) -> Joined:
        return await join(ticket, self.directory / name, name, ["127.0.0.1:1"], self.clock, ENTROPY)

    async def add(self, name: str, *, voter: bool = False) -> Member:
        """A further node, by ticket, running."""
        joined = await self.join(await self.make_ticket(), name)
        if voter:
            self.cluster.voters.add(joined.identity.node_id)
        return await self.start(self.directory / name)


@asynccontextmanager
async def running_cluster(directory: Path) -> AsyncIterator[Running]:
    async with trio.open_nursery() as nursery:
        yield Running(directory, nursery)
        nursery.cancel_scope.cancel()
