"""What the tests of snapshots share: states to send, and a way between two nodes that can be cut."""

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgpack
import trio

from aspenfs.errors import PeerUnreachable
from aspenfs.kv.types import NO_ATTRIBUTES, Record
from aspenfs.limits import PEER_REQUEST_BYTES_MAX
from aspenfs.runtime.snapshots.server import Handler
from aspenfs.runtime.statedb import CONFIGURATION, TERM, StateDb

ITEMS = 3_000
META: Mapping[str, bytes] = {TERM: (3).to_bytes(8, "big"), CONFIGURATION: b"who votes"}


def record(value: bytes, revision: int = 1, lease: int = 0) -> Record:
    return Record(value, revision, revision, 1, lease, 0, NO_ATTRIBUTES)


def items(seed: int = 0, count: int = ITEMS) -> list[tuple[bytes, Record]]:
    """Short and long keys, in order, with values of all sizes, one of them the largest."""
    draw = random.Random(seed)
    made = {b"f/%06d" % at: record(draw.randbytes(draw.randrange(200)), at + 1) for at in range(count)}
    for number in range(count // 100):
        made[b"k/" + b"x" * draw.randrange(480, 1500)] = record(b"long", number + 1, lease=7)
    made[b"k/large"] = record(draw.randbytes(1 << 20))
    return sorted(made.items())


def filled(path: Path, index: int, seed: int = 0, count: int = ITEMS, **options: Any) -> StateDb:
    state = StateDb(path, **options)
    state.apply(items(seed, count), index, META)
    state.refresh()
    return state


class Wire:
    """The `Peers` of two nodes without sockets: what is asked and answered goes through msgpack.

    `cut` is called with (kind, number of the request) and ("answer", number); PeerUnreachable loses it.
    """

    def __init__(self) -> None:
        self.handlers: dict[tuple[int, str], Handler] = {}
        self.asked: list[tuple[int, str]] = []
        self.cut: Callable[[str, int], object] = lambda what, number: None
        self.change: Callable[[str, Any], Any] = lambda kind, answer: answer

    def end(self, node: int) -> "End":
        return End(self, node)

    def count(self, kind: str) -> int:
        return sum(asked == kind for _, asked in self.asked)


class End:
    """What `node` has of the wire."""

    def __init__(self, wire: Wire, node: int) -> None:
        self._wire, self._node = wire, node

    def handle(self, kind: str, handler: Handler) -> None:
        self._wire.handlers[self._node, kind] = handler

    async def request(self, to: int, kind: str, body: Any, *, timeout_s: float) -> Any:
        wire = self._wire
        wire.asked.append((to, kind))
        number = len(wire.asked)
        await trio.lowlevel.checkpoint()
        wire.cut(kind, number)
        handler = wire.handlers.get((to, kind))
        if handler is None:
            raise PeerUnreachable(f"node {to} does not answer")
        with trio.fail_after(timeout_s):
            answer = await handler(self._node, _packed(body))
        answer = wire.change(kind, _packed(answer))
        wire.cut("answer", number)
        return answer


def _packed(value: Any) -> Any:
    packed = msgpack.packb(value)
    assert len(packed) <= PEER_REQUEST_BYTES_MAX
    return msgpack.unpackb(packed)
