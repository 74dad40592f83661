"""Several nodes with files/ and chunks in one process: real stores, disks in memory, a network that can fail.

The log is one list that all nodes apply in its order; which of them lag is up to the test. Time is trio's.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence, Set
from contextlib import asynccontextmanager
from typing import Any

import msgpack
import trio
import trio.testing

from aspenfs import errors
from aspenfs.blobs.format import digest_of, prefix_of, record_size
from aspenfs.blobs.store import BlobStore
from aspenfs.cluster.types import Configuration, NodeId
from aspenfs.filesystem.layout import BLOB_PREFIX
from aspenfs.filesystem.volume import Volume
from aspenfs.kv import commands
from aspenfs.kv.commands import Command
from aspenfs.kv.local import LocalStore
from aspenfs.kv.store import Dedup
from aspenfs.kv.types import Compare, Operation, TxnResult
from aspenfs.limits import KIB, PEER_REQUEST_BYTES_MAX
from aspenfs.runtime.blob_replication.replicator import BlobReplicator
from aspenfs.sim.disk import SimDisk
from aspenfs.vfs.tree import Usage
from aspenfs.views.files import FilesTree
from tests.filesystem.volumes import CALLER
from tests.views.subject import CountingEntropy

Handler = Callable[[int, Any], Awaitable[Any]]


class TrioClock:
    def time_ns(self) -> int:
        return 1_700_000_000 * 10**9 + self.monotonic_ns()

    def monotonic_ns(self) -> int:
        return int(trio.current_time() * 1e9)


class Network:
    """Who reaches whom, and how long it takes."""

    def __init__(self) -> None:
        self.ports: dict[int, Port] = {}
        self.down: set[int] = set()  # nobody is connected to them
        self.hung: set[int] = set()  # connected, and never answer
        self.delay_s: dict[int, float] = {}  # before a node answers
        self.refusals: list[tuple[int, str, errors.AspenError]] = []  # the next answers of a node, by kind
        self.requests: list[tuple[int, int, str, int]] = []  # from, to, kind, chunks
        self.times: list[float] = []  # of these

    def asked(self, to: int, kind: str) -> int:
        """Chunks that a node was asked about, or sent."""
        return sum(count for _, target, what, count in self.requests if (target, what) == (to, kind))


class Port:
    """The Peers port of one node. Bodies are packed and unpacked, as on a wire."""

    def __init__(self, network: Network, node: int) -> None:
        self.network, self.node = network, node
        self.handlers: dict[str, Handler] = {}
        network.ports[node] = self

    def connected(self) -> Set[int]:
        if self.node in self.network.down:
            return frozenset()
        return {node for node in self.network.ports if node not in {self.node, *self.network.down}}

    def handle(self, kind: str, handler: Handler) -> None:
        self.handlers[kind] = handler

    async def request(self, to: NodeId, kind: str, body: Any, *, timeout_s: float) -> Any:
        network = self.network
        network.requests.append((self.node, to, kind, len(body or ())))
        network.times.append(trio.current_time())
        packed = msgpack.packb(body)
        assert len(packed) <= PEER_REQUEST_BYTES_MAX
        with trio.move_on_after(timeout_s):
            await trio.lowlevel.checkpoint()
            self._check(to)
            if to in network.hung:
                await trio.sleep_forever()
            if to in network.delay_s:
                await trio.sleep(network.delay_s[to])
            for refusal in network.refusals:
                if refusal[:2] == (to, kind):
                    network.refusals.remove(refusal)
                    raise refusal[2]
            answer = await network.ports[to].handlers[kind](
                self.node, msgpack.unpackb(packed, use_list=False, max_bin_len=2 << 20)
            )
            self._check(to)
            packed = msgpack.packb(answer)
            assert len(packed) <= PEER_REQUEST_BYTES_MAX
            return msgpack.unpackb(packed, use_list=False, max_bin_len=2 << 20)
        raise errors.PeerUnreachable(f"node {to} did not answer {kind} in {timeout_s:g} s")

    def _check(self, to: int) -> None:
        if to in self.network.down or self.node in self.network.down:
            raise errors.PeerUnreachable(f"node {to} is not connected")


class Log:
    """The entries that are committed."""

    def __init__(self) -> None:
        self.entries: list[tuple[bytes, LoggedStore, object]] = []
        self.stores: list[LoggedStore] = []


class LoggedStore(LocalStore):
    """A replica's store, as far as chunks are concerned: proposals go by the log to all who follow it."""

    def __init__(self, log: Log) -> None:
        super().__init__(TrioClock(), CountingEntropy(), trio.Event)
        self.log, self.applied, self.lagging = log, 0, False
        self.floor: int | None = None  # None: everything applied is durable
        self.before_propose: Callable[[Command], Awaitable[None]]
        log.stores.append(self)

    @property
    def replay_floor(self) -> int:
        return self.engine.revision if self.floor is None else self.floor

    async def barrier(self) -> int:
        if self.lagging:
            raise errors.NoQuorum("no quorum")
        return self.engine.revision

    async def txn(self, compares: Sequence[Compare], then: Sequence[Operation],
                  else_: Sequence[Operation] = (), *, dedup: Dedup | None = None,
                  origin: object = None) -> TxnResult:  # fmt: skip
        command, encoded = self.engine.txn_command(compares, then, else_, dedup)
        await self.before_propose(command)
        self.log.entries.append((encoded, self, origin))
        for store in self.log.stores:
            if store is not self and not store.lagging:
                store.follow()
        result = self.follow()
        assert isinstance(result, TxnResult)
        return result

    def follow(self) -> object:
        """Applies what it has not; the last result."""
        result = None
        for encoded, proposer, origin in self.log.entries[self.applied :]:
            self.applied += 1
            result = self._run(commands.decode(encoded), encoded, origin if proposer is self else None).result
        return result


class Node:
    """One host."""

    def __init__(self, cluster: "Cluster", number: int) -> None:
        self.cluster, self.number = cluster, number
        self.disk = SimDisk()
        self.full = False
        self.leads = number == 1
        self.store = LoggedStore(cluster.log)
        self.start()

    def start(self) -> None:
        """Also again, after the death of the process: what is in memory only is new."""
        self.blobs = BlobStore.open(self.disk, segment_bytes=1 << 20)
        self.replicator = BlobReplicator(
            self.blobs, self.store, Port(self.cluster.network, self.number),
            lambda: self.cluster.configuration, NodeId(self.number), TrioClock(),
            sync=self._sync, leads=lambda: self.leads,
            refusal=lambda: errors.NoSpace("full") if self.full else None,
        )  # fmt: skip
        self.store.before_propose = self.replicator.before_propose
        self.volume = Volume(self.store, self.replicator, TrioClock())
        self.replicator.bind(self.volume)
        self.tree = FilesTree(self.volume, lambda: Usage(4096, 100, 50, 0, 0), atime=False)
        self.scope = trio.CancelScope()
        self._forget = self.store.observe(self.replicator.observe)

    async def run(self, task_status: Any) -> None:
        with self.scope:
            await self.replicator.run(task_status)

    async def restart(self, nursery: trio.Nursery) -> None:
        """As after SIGKILL, once its directory is opened again."""
        self.stop()
        self.start()
        await nursery.start(self.run)

    def stop(self) -> None:
        self.scope.cancel()
        self._forget()

    async def _sync(self) -> None:
        await trio.lowlevel.checkpoint()
        self.blobs.sync()

    # --- for tests ---

    async def create(self, name: bytes, *pieces: bytes) -> int:
        attr, handle = await self.tree.create(1, name, 0o644, 2, CALLER)
        at = 0
        for piece in pieces:
            at += await handle.write(at, piece)
        await handle.release()
        return attr.node

    async def read(self, name: bytes, offset: int = 0, size: int = 1 << 30) -> bytes:
        handle = await self.tree.open((await self.tree.lookup(1, name)).node, 0, CALLER)
        try:
            return bytes(await handle.read(offset, size))
        finally:
            await handle.release()

    def has(self, *chunks: bytes) -> bool:
        return all(self.blobs.has(digest_of(chunk)) for chunk in chunks)

    async def collect(self) -> int:
        """What `Upkeep` does every other second, until nothing is left to do."""
        total = 0
        while found := await self.tree.content.collect():
            total += found
        return total


class Cluster:
    def __init__(self, voters: int, learners: int, configuration: Configuration | None) -> None:
        self.network, self.log = Network(), Log()
        everybody = range(1, voters + learners + 1)
        self.configuration = configuration or Configuration(
            tuple(everybody[:voters]), learners=tuple(everybody[voters:])
        )
        self.nodes = {number: Node(self, number) for number in everybody}
        self.nursery: trio.Nursery

    def __getitem__(self, number: int) -> Node:
        return self.nodes[number]

    def named(self, chunk: bytes) -> int:
        """How often, by the state of node 1."""
        row = self[1].store.get(BLOB_PREFIX + digest_of(chunk))
        return -1 if row is None else int.from_bytes(row.value[:8], "little", signed=True)


@asynccontextmanager
async def cluster(
    voters: int = 3, learners: int = 0, *, configuration: Configuration | None = None,
    off: Collection[int] = (),
) -> AsyncIterator[Cluster]:  # fmt: skip
    """Nodes 1, 2, … that run, except those that are `off`, which never came up."""
    made = Cluster(voters, learners, configuration)
    made.network.down.update(off)
    async with trio.open_nursery() as nursery:
        made.nursery = nursery
        for node in made.nodes.values():
            await nursery.start(node.run)
        await made[1].volume.format()
        yield made
        nursery.cancel_scope.cancel()


def run(test: Callable[[], Awaitable[None]]) -> None:
    """In time that jumps to whatever is next."""
    trio.run(test, clock=trio.testing.MockClock(autojump_threshold=0))


async def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110 – it is about many things that tell nobody
            await trio.sleep(0.01)


def on_disk(blobs: BlobStore, data: bytes) -> bool:
    """Would it be there after the power failed now?"""
    segments = blobs._segments.segments
    return any(
        location >> 32 in segments
        and segments[location >> 32].synced >= (location & 0xFFFFFFFF) + record_size(len(data))
        for location in blobs._index.find(prefix_of(digest_of(data)))
    )


def damage(node: Node, data: bytes) -> None:
    """Flips a bit of the only copy on that disk."""
    blobs = node.blobs
    (location,) = (
        place
        for place in blobs._index.find(prefix_of(digest_of(data)))
        if blobs._segments.header(place).digest == digest_of(data)
    )
    node.disk.flip(blobs._segments.segments[location >> 32].path, (location & 0xFFFFFFFF) + 100, 3)


def chunk(number: int, size: int = 20 * KIB) -> bytes:
    """A chunk unlike all others; too large to travel in the log."""
    return number.to_bytes(4, "little") * (size // 4)
