"""Nodes of one cluster in one process: real state directories, certificates and sockets on loopback."""

import gc
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import trio

from aspenfs.cluster.messages import Message, MessageType
from aspenfs.runtime import identity
from aspenfs.runtime.identity import Identity, Life
from aspenfs.runtime.peers import ca, credentials
from aspenfs.runtime.peers.ca import Authority, NodeName
from aspenfs.runtime.peers.credentials import Credentials
from aspenfs.runtime.peers.network import PeerNetwork
from aspenfs.runtime.system import SystemClock, SystemEntropy

CLOCK, ENTROPY = SystemClock(), SystemEntropy()
CLUSTER_ID = b"c" * 16
P = ParamSpec("P")
T = TypeVar("T")
SECONDS_MAX = 20  # for one condition; never waited out unless something is wrong


class Row(NamedTuple):
    """A member as the network wants it."""

    addresses: tuple[str, ...]
    state: str = "member"
    born: bytes = b""
    topology: int = 0


def make_authority(name: str = "demo") -> Authority:
    return ca.new_authority(name, CLOCK.time_ns())


def make_credentials(directory: Path, authority: Authority, node_id: int, *, cluster_id: bytes = CLUSTER_ID,
                     made_s_ago: int = 0, lifetime_s: int = 3600) -> Credentials:  # fmt: skip
    """A node's directory, as after a join."""
    identity.write(directory, Identity(cluster_id, "demo", node_id))
    born = identity.give_birth(directory, ENTROPY)
    key = credentials.make_node_key(directory)
    now = CLOCK.time_ns() - made_s_ago * 1_000_000_000
    certificate = ca.sign(authority, key.public_key(), NodeName(cluster_id, node_id, born), now, lifetime_s)
    return credentials.install(directory, certificate, [authority.certificate])


class Node:
    """One PeerNetwork and what it delivered."""

    def __init__(self, shown: Credentials, *, incarnation: int = 1, mark: int | None = None,
                 former: tuple[int, ...] = (), advertise: Sequence[str] = ()) -> None:  # fmt: skip
        """`mark`: drawn, if it is not given."""
        self.id = shown.name.node_id
        self.credentials = shown
        self.received: list[tuple[int, Message]] = []
        self.batches: list[int] = []  # how many messages came in one call
        self.lost: list[int] = []
        self.arrived = trio.Event()
        life = Life(incarnation, mark or int.from_bytes(ENTROPY.random_bytes(8)), former)
        self.network = PeerNetwork(shown, life, CLOCK, deliver=self._deliver,
                                   unreachable=self.lost.append, advertise=advertise)  # fmt: skip

    def _deliver(self, peer: int, messages: Sequence[Message]) -> None:
        self.received += [(peer, message) for message in messages]
        self.batches.append(len(messages))
        self.arrived.set()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.network.ports[0]}"

    @property
    def row(self) -> Row:
        return Row((self.address,), born=self.credentials.name.born)


def message(to: int, sender: int, *, term: int = 1, commit: int = 0, context: bytes = b"") -> Message:
    return Message(MessageType.HEARTBEAT, to, sender, term, commit=commit, context=context)


async def until(condition: Callable[[], object], what: str = "") -> None:
    with trio.move_on_after(SECONDS_MAX):
        while not condition():  # noqa: ASYNC110 – conditions of many kinds
            await trio.sleep(0.002)
        return
    raise AssertionError(f"it did not come to pass: {what}")


@asynccontextmanager
async def running(*nodes: Node, connect: bool = True) -> AsyncIterator[trio.Nursery]:
    """The networks run, know and, unless told otherwise, reach each other; all ends with the block."""
    async with trio.open_nursery() as nursery:
        for node in nodes:
            await nursery.start(node.network.run, ["127.0.0.1:0"])
        if connect:
            table = {node.id: node.row for node in nodes}
            for node in nodes:
                node.network.set_members(table)
            for node in nodes:
                others = {other.id for other in nodes} - {node.id}
                await until(lambda node=node, others=others: node.network.connected() >= others, "connected")  # type: ignore[misc]
        yield nursery
        nursery.cancel_scope.cancel()


def make_nodes(directory: Path, count: int, authority: Authority | None = None) -> list[Node]:
    authority = authority or make_authority()
    return [Node(make_credentials(directory / f"n{number}", authority, number))
            for number in range(1, count + 1)]  # fmt: skip


class Background:
    """Nodes that run in a thread of their own, for tests that speak to them by plain sockets."""

    def __init__(self, make: Callable[[], Sequence[Node]]) -> None:
        """`make` is called in the loop."""
        self._make = make
        self._started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._main,))

    def __enter__(self) -> "Background":
        self._thread.start()
        assert self._started.wait(SECONDS_MAX)
        return self

    def __exit__(self, *error: object) -> None:
        trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join(SECONDS_MAX)
        assert not self._thread.is_alive()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        with trio.CancelScope() as self._scope:
            self.nodes = self._make()
            async with running(*self.nodes):
                self._started.set()
                await trio.sleep_forever()

    def run(self, function: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """In the loop's thread; what it returns or raises."""
        return trio.from_thread.run(function, *arguments, trio_token=self._token)


def in_trio(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    """Runs the test in a loop of its own; every descriptor that it opened must be closed at its end."""

    @wraps(test)
    def run(*arguments: P.args, **named: P.kwargs) -> None:
        async def main() -> None:
            with trio.fail_after(4 * SECONDS_MAX):
                await test(*arguments, **named)

        gc.collect()  # what others left behind would go meanwhile
        before = descriptors()
        trio.run(main)
        gc.collect()
        deadline = time.monotonic() + SECONDS_MAX
        while descriptors() != before:  # a thread that looks up a name goes on to its end
            assert time.monotonic() < deadline, "descriptors were left open"
            time.sleep(0.01)

    return run


def descriptors() -> set[str]:
    """What this process has open, by what it is (a socket's has its inode number)."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue  # the listing's own
    return {each for each in found if not each.startswith(("/proc/", "anon_inode"))}
