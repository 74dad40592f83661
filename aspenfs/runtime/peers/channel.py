"""One established connection, either end: what waits to be sent, the task that sends it, how it ends.

Belongs here: what both ends do alike. What comes in is for `links.py` (the end that connected) and
`server.py` (the other) to judge.

Everything is queued by plain calls; one task writes. What was queued in one turn of the loop leaves as
one piece: one record, one system call.
"""

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import trio

from aspenfs.errors import AspenError, ProtocolError
from aspenfs.limits import PEER_BATCH_BYTES, PEER_FRAME_BYTES_MAX, PEER_IDLE_MS, PEER_PING_MS
from aspenfs.runtime.peers import frames
from aspenfs.runtime.peers.frames import Parts
from aspenfs.runtime.peers.stream import Broken, TlsStream

log = logging.getLogger(__name__)

_JOIN_BYTES: Final = 64 * 1024  # smaller pieces are copied together, for fewer records
_FAREWELL_S: Final = 1
_MESSAGE_OVERHEAD: Final = 16
_NOW_BYTES_MAX: Final = 16 * 1024  # that a socket surely takes, and one record holds


@contextmanager
def unreadable(peer: int) -> Iterator[None]:
    """What bytes of a peer bring to light in our own reading of them ends that connection, and is logged."""
    try:
        yield
    except (ProtocolError, Broken):
        raise
    except AspenError as error:
        raise ProtocolError(str(error)) from None
    except Exception as error:
        log.exception("peers: node=%d a frame could not be read", peer)
        raise ProtocolError("a frame that this node failed to read; its log has the cause") from error


class Channel:
    """Owns the stream. `run` lives as long as the connection; `cause` says then why it ended."""

    def __init__(self, stream: TlsStream) -> None:
        self.stream = stream
        self.cause = ""
        self.queued_bytes = 0
        self._frames: deque[Parts] = deque()
        self._messages: deque[bytes] = deque()
        self._filled, self._drained = trio.Event(), trio.Event()
        self._writing = False  # the task that writes is at it
        self._scope = trio.CancelScope()
        self._farewell = b""
        self.nursery: trio.Nursery | None = None  # for what belongs to this connection; ends with it
        self.over = trio.Event()

    # --- sending ---

    def push(self, *frame: bytes) -> None:
        self._frames.append(frame)
        self.queued_bytes += sum(map(len, frame))
        self._filled.set()

    def push_message(self, packed: bytes) -> None:
        """To be followed by `flush`."""
        assert len(packed) + _MESSAGE_OVERHEAD <= PEER_FRAME_BYTES_MAX
        self._messages.append(packed)
        self.queued_bytes += len(packed)

    def flush(self) -> None:
        """Sends the messages that wait at once, if nothing else is under way: waking the task that writes
        would cost each of them a turn of the loop."""
        if not self._messages:
            return
        if self._writing or self._frames or self.queued_bytes > _NOW_BYTES_MAX or self.nursery is None:
            self._filled.set()
            return
        parts, size = self._take()
        try:
            if not self.stream.send_now(parts[0]):
                self._filled.set()
        except Broken as error:
            self.end(str(error))
        self.queued_bytes -= size
        self._drained.set()

    async def drained_to(self, queued_bytes: int) -> None:
        """Waits until no more than that waits to be sent."""
        while self.queued_bytes > queued_bytes:
            if self._drained.is_set():
                self._drained = trio.Event()
            await self._drained.wait()

    async def _write(self) -> None:
        while True:
            if not self._frames and not self._messages and not self.stream.flushing:
                self._emptied()
                self._filled, self._writing = trio.Event(), False
                await self._filled.wait()
                self._writing = True
            parts, size = self._take()
            await self.stream.send(parts)
            self.queued_bytes -= size
            self._drained.set()
            if self._frames or self._messages:
                await trio.lowlevel.checkpoint()  # a socket that takes all would keep the loop from others

    def _take(self) -> tuple[list[bytes], int]:
        """What goes out next, at most PEER_BATCH_BYTES or one frame, and how much of the queue that is."""
        parts: list[bytes] = []
        size = 0
        batch: list[bytes] = []
        while self._messages and (not batch or size + len(self._messages[0]) <= PEER_BATCH_BYTES):
            batch.append(self._messages.popleft())
            size += len(batch[-1])
        if batch:
            parts.append(frames.encode_messages(batch))
        while self._frames and (not parts or size + sum(map(len, self._frames[0])) <= PEER_BATCH_BYTES):
            frame = self._frames.popleft()
            parts += frame
            size += sum(map(len, frame))
        if len(parts) > 1 and size <= _JOIN_BYTES:
            parts = [b"".join(parts)]
        return parts, size

    def _emptied(self) -> None:
        """All that was queued has been sent. For subclasses."""

    # --- the life of it ---

    def end(self, cause: str, farewell: AspenError | None = None) -> None:
        """Closes the connection soon; `farewell` is told to the other end. The first cause counts."""
        if not self.cause:
            self.cause = cause
            if farewell is not None:
                self._farewell = frames.encode_refusal(farewell)
        self._scope.cancel()

    async def run(self) -> None:
        """Until the connection ends, from whatever side; then the stream is closed. Bugs pass through."""
        try:
            with self._scope:
                async with trio.open_nursery() as self.nursery:
                    nursery = self.nursery
                    nursery.start_soon(self._until_broken, self._write)
                    nursery.start_soon(self._look_after)
                    await self._until_broken(self._read)
            if self._farewell and not self.stream.flushing:
                with trio.move_on_after(_FAREWELL_S):
                    await self._until_broken(self._say_farewell)
        finally:
            self.stream.close()
            self.cause = self.cause or "closed"
            self.over.set()

    async def _until_broken(self, body: Callable[[], Awaitable[Any]]) -> None:
        try:
            await body()
        except Broken as error:
            self.end(str(error))
        except ProtocolError as error:
            self.end(str(error), error)

    async def _say_farewell(self) -> None:
        await self.stream.send([self._farewell])

    async def _read(self) -> None:
        """Judges what comes in; ends by raising Broken or ProtocolError."""
        raise NotImplementedError

    async def _look_after(self) -> None:
        """Once per ping interval: notices the other end's silence."""
        interval, patience = PEER_PING_MS / 1000, PEER_IDLE_MS / 1000
        looked = trio.current_time()
        while True:
            await trio.sleep(interval)
            now = trio.current_time()
            # After a stop of this very process, what came in meanwhile has not been read yet.
            if now - looked < 2 * interval and now - self.stream.received_at > patience:
                self.end(f"nothing was heard of it for {patience:g} s")
            looked = now
            self._looked()

    def _looked(self) -> None:
        """Called once per ping interval. For subclasses."""
