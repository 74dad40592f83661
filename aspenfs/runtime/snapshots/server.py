"""Snapshots for other nodes: each a read transaction that stays, read block by block in threads.

A pinned transaction keeps every page that was freed since, so the file of the state, which never
shrinks, grows by what is written meanwhile. Hence: at most SNAPSHOTS_MAX, one for each node that asks,
bounded in age, in idleness, and in the growth and the disk space that they cost.

    snapshot.open   {index}               -> {id, index, term, configuration, digest: "blake3", rows, bytes},
                                             the last two: about; or {refused: why}: ask again later
    snapshot.read   {id, after: key, max} -> {rows, last: key, digest, end}
                                             or {gone: why}: open another one
    snapshot.close  {id}                  -> {}
    state.digest    {}                    -> {index, digest, rows}

`digest` is that of all rows up to `last`, whatever blocks they came in; with `end` it is the state's own.
After a failure the same block can be had again: `after` may be the last `last`, or the one before it.

Belongs here: the life of pins and these answers. Not here: fetching (`client.py`), links (`peers/`).
"""

import logging
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from typing import Any, Final, Protocol

import trio
from blake3 import blake3

from aspenfs.errors import AspenError, ProtocolError
from aspenfs.limits import (
    SNAPSHOT_AGE_MAX_S,
    SNAPSHOT_BLOCK_BYTES,
    SNAPSHOT_FREE_BYTES_MIN,
    SNAPSHOT_GROWTH_BYTES_MAX,
    SNAPSHOT_IDLE_S_MAX,
    SNAPSHOTS_MAX,
)
from aspenfs.runtime.snapshots.blocks import Block, StateDigest, digest_of, next_block
from aspenfs.runtime.statedb import StateDb
from aspenfs.seams import Entropy

logger = logging.getLogger(__name__)

DIGEST: Final = "blake3"
_LOOK_SECONDS: Final = 1.0
_ID_BYTES: Final = 8

Answer = dict[str, Any]
Handler = Callable[[int, Any], Awaitable[Answer]]


class Handling(Protocol):
    """The part of `Peers` on which requests are answered."""

    def handle(self, kind: str, handler: Handler) -> None: ...


class _Pin:
    """One snapshot being sent. `hashers`: by the key after which a read may start."""

    def __init__(self, node: int, state: StateDb) -> None:
        self.node = node
        self._stack = ExitStack()
        self.snapshot = self._stack.enter_context(state.snapshot())
        self.index = self.snapshot.applied_index
        self.opened_s = self.read_s = trio.current_time()
        self.file_bytes = state.size_bytes()
        self.hashers = {b"": blake3()}
        self.lock = trio.Lock()  # held while a thread reads
        self.ended = ""  # why

    def read(self, after: bytes, bytes_max: int) -> tuple[Block, bytes]:
        """In a thread: the block behind `after`, and the digest up to its end."""
        block = next_block(self.snapshot, after, bytes_max)
        hasher = self.hashers[after].copy()
        hasher.update(block.rows)
        self.hashers = {after: self.hashers[after], block.last: hasher}
        return block, hasher.digest()

    def end(self, why: str) -> None:
        """Lets go of its pages, at once or when the thread that reads is done."""
        self.ended = self.ended or why
        if not self.lock.locked():
            self._stack.close()


class SnapshotServer:
    """Answers for the state of this node. All methods belong to the loop's thread."""

    def __init__(self, state: StateDb, entropy: Entropy, free_bytes: Callable[[], int],
                 refusal: Callable[[], AspenError | None] = lambda: None) -> None:  # fmt: skip
        """`refusal`: why the state here is not to be had, if so."""
        self._state, self._entropy, self._free_bytes, self._refusal = state, entropy, free_bytes, refusal
        self._pins: dict[bytes, _Pin] = {}
        self._digesting = trio.Lock()

    def register(self, peers: Handling) -> None:
        peers.handle("snapshot.open", self.open)
        peers.handle("snapshot.read", self.read)
        peers.handle("snapshot.close", self.end)
        peers.handle("state.digest", self.digest)

    async def run(self) -> None:
        """Ends the pins that have become too old or too expensive, until cancelled; then all."""
        try:
            while True:
                await trio.sleep(_LOOK_SECONDS)
                self.look()
        finally:
            for number in list(self._pins):
                self._end(number, "the node stops")

    def look(self) -> None:
        """What `run` does now and then."""
        now, refusal = trio.current_time(), self._refusal()
        for number, pin in list(self._pins.items()):
            why = ""
            if refusal is not None:
                why = str(refusal)
            elif now - pin.opened_s > SNAPSHOT_AGE_MAX_S:
                why = f"older than {SNAPSHOT_AGE_MAX_S} s"
            elif now - pin.read_s > SNAPSHOT_IDLE_S_MAX:
                why = f"not read for {SNAPSHOT_IDLE_S_MAX} s"
            elif self._state.size_bytes() - pin.file_bytes > SNAPSHOT_GROWTH_BYTES_MAX:
                why = f"the state grew by {SNAPSHOT_GROWTH_BYTES_MAX} bytes meanwhile"
            elif self._free_bytes() < SNAPSHOT_FREE_BYTES_MIN:
                why = "the disk of the sender is nearly full"
            if why:
                self._end(number, why)

    @property
    def pinned(self) -> int:
        return len(self._pins)

    def _end(self, number: bytes, why: str) -> None:
        pin = self._pins.pop(number)
        pin.end(why)
        logger.info("snapshot ended to=%d index=%d: %s", pin.node, pin.index, why)

    # --- requests ---

    async def open(self, node: int, body: Any) -> Answer:
        """A snapshot of at least `index`. The one that the node had is over."""
        wanted = _natural(body, "index")
        for number, pin in list(self._pins.items()):
            if pin.node == node:
                self._end(number, "another one was asked for")
        if (refusal := self._refusal()) is not None:
            return {"refused": str(refusal)}
        if len(self._pins) >= SNAPSHOTS_MAX:
            return {"refused": f"{SNAPSHOTS_MAX} other nodes are being sent a snapshot"}
        if self._free_bytes() < SNAPSHOT_FREE_BYTES_MIN:
            return {"refused": "the disk of the sender is nearly full"}
        pin = _Pin(node, self._state)
        if pin.index < wanted:
            pin.end("too old")
            return {"refused": f"entry {wanted} is not applied here yet, the newest is {pin.index}"}
        number = self._entropy.random_bytes(_ID_BYTES)
        self._pins[number] = pin
        rows, size = pin.snapshot.size()
        logger.info("snapshot begins to=%d index=%d rows=%d bytes=%d", node, pin.index, rows, size)
        return {"id": number, "index": pin.index, "term": pin.snapshot.term, "digest": DIGEST, "rows": rows,
                "bytes": size, "configuration": pin.snapshot.meta("configuration")}  # fmt: skip

    async def read(self, node: int, body: Any) -> Answer:
        """The rows behind the key `after`, at most `max` bytes of them or one."""
        after, most = _bytes(body, "after"), _natural(body, "max")
        pin = self._pin(node, body)
        if pin is None:
            return {"gone": "there is no such snapshot any more"}
        async with pin.lock:
            if not pin.ended and after in pin.hashers:
                most = min(most, SNAPSHOT_BLOCK_BYTES)
                block, digest = await trio.to_thread.run_sync(pin.read, after, most)
                pin.read_s = trio.current_time()
        if pin.ended:
            pin.end(pin.ended)
            return {"gone": pin.ended}
        if after not in pin.hashers:
            return {"gone": "it can only be read from the last key on, or the one before"}
        return {"rows": block.rows, "last": block.last, "digest": digest, "end": block.end}

    async def end(self, node: int, body: Any) -> Answer:
        """The snapshot is needed no more."""
        if self._pin(node, body) is not None:
            self._end(_bytes(body, "id"), "read")
        return {}

    async def digest(self, node: int, body: Any) -> Answer:
        """The digest of what is applied here now; one at a time."""
        if (refusal := self._refusal()) is not None:
            raise refusal
        async with self._digesting:
            return (await digest_of_state(self._state))._asdict()

    def _pin(self, node: int, body: Any) -> _Pin | None:
        pin = self._pins.get(_bytes(body, "id"))
        return pin if pin is not None and pin.node == node else None


async def digest_of_state(state: StateDb) -> StateDigest:
    """That of what is applied now, computed in a thread beside the loop."""

    def walk() -> StateDigest:
        with state.snapshot() as snapshot:
            return digest_of(snapshot)

    return await trio.to_thread.run_sync(walk)


def _natural(body: Any, name: str) -> int:
    value = body.get(name) if isinstance(body, dict) else None
    if type(value) is not int or value < 0:
        raise ProtocolError(f"{name} must be a natural number")
    return value


def _bytes(body: Any, name: str) -> bytes:
    value = body.get(name) if isinstance(body, dict) else None
    if type(value) is not bytes:
        raise ProtocolError(f"{name} must be bytes")
    return value
