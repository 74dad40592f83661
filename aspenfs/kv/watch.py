"""Watches: committed changes of a range, in order, one batch per revision, never a gap.

Belongs here: the ring of recent batches, the buffer of each watcher, and the iterator that a reader
holds. A watcher of a keyspace with history first replays stored history and turns live when it has
caught up; one of another range replays from the ring. A reader that falls behind its buffer gets what
the buffer holds and then Lagged with the revision to go on from.
"""

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Protocol

from aspenfs import errors
from aspenfs.kv import history, keys
from aspenfs.kv.state import State
from aspenfs.kv.types import Batch, Event
from aspenfs.limits import WATCH_BUFFER_BATCHES, WATCH_BUFFER_BYTES

_TURNS = 64  # batches that a reader gets before others have a turn


class Signal(Protocol):
    """A one-shot event; trio.Event fits."""

    def set(self) -> object: ...

    async def wait(self) -> object: ...


def _bytes(events: Iterable[Event]) -> int:
    size = 0
    for key, record, previous in events:
        size += len(key) + 200
        if record is not None:
            size += len(record[0])
        if previous is not None:
            size += len(previous[0])
    return size


class _Buffer:
    """What is waiting for one live watcher."""

    __slots__ = ("batches", "bytes", "end", "error", "next_revision", "signal", "start")

    def __init__(self, start: bytes, end: bytes, next_revision: int) -> None:
        self.start, self.end = start, end
        self.next_revision = next_revision  # events below are not wanted
        self.batches: deque[tuple[Batch, int]] = deque()
        self.bytes = 0
        self.error: errors.AspenError | None = None
        self.signal: Signal | None = None

    def feed(self, batch: Batch) -> bool:
        """Adds what the watcher wants of `batch`; False when that was too much for it."""
        if batch.revision < self.next_revision:
            return True
        start, end = self.start, self.end
        events = [event for event in batch.events if start <= event[0] and (not end or event[0] < end)]
        if events:
            size = _bytes(events)
            waiting = len(self.batches)
            if waiting >= WATCH_BUFFER_BATCHES or (waiting and self.bytes + size > WATCH_BUFFER_BYTES):
                self.fail(errors.Lagged(f"too slow: watch again from {batch.revision}", batch.revision))
                return False
            self.batches.append((Batch(batch.revision, events), size))
            self.bytes += size
            self.wake()
        return True

    def fail(self, error: errors.AspenError) -> None:
        self.error = error
        self.wake()

    def wake(self) -> None:
        if self.signal is not None:
            self.signal.set()
            self.signal = None


class Hub:
    """All watchers of a store, and the recent batches from which they can resume."""

    def __init__(self, state: State, committed: int, signals: Callable[[], Signal]) -> None:
        self._state = state
        self._signals = signals
        self.committed = committed
        self._ring: deque[tuple[Batch, int]] = deque()
        self._ring_bytes = 0
        self._ring_from = committed + 1  # the ring has every batch from here on
        self._live: dict[int, _Buffer] = {}  # by number, so that their order is that of their start
        self._started = 0
        self._closed: errors.AspenError | None = None

    def publish(self, committed: int, batches: Sequence[Batch]) -> None:
        """Makes `batches`, all above the last commit, known; `committed` is the new commit."""
        ring = self._ring
        for batch in batches:
            size = _bytes(batch[1])
            ring.append((batch, size))
            self._ring_bytes += size
            if self._live:
                for number, buffer in list(self._live.items()):
                    if not buffer.feed(batch):
                        del self._live[number]
        while len(ring) > WATCH_BUFFER_BATCHES or self._ring_bytes > WATCH_BUFFER_BYTES:
            oldest, size = ring.popleft()
            self._ring_bytes -= size
            self._ring_from = oldest.revision + 1
        self.committed = committed

    def rebase(self, committed: int) -> None:
        """The state has leapt to `committed`: the batches in between are in its history at best."""
        leap = self.committed + 1
        self._ring.clear()
        self._ring_bytes, self._ring_from = 0, committed + 1
        self.committed = committed
        for number, buffer in list(self._live.items()):
            if buffer.next_revision <= committed:
                revision = max(leap, buffer.next_revision)
                buffer.fail(errors.Lagged(f"the state leapt ahead: watch again from {revision}", revision))
                del self._live[number]

    def watch(self, start: bytes, end: bytes, from_revision: int | None) -> "Watcher":
        """A watcher that is registered at once; see Store.watch."""
        if self._closed is not None:
            raise self._closed
        if from_revision is None:
            from_revision = self.committed + 1
        if from_revision < 0:
            raise errors.InvalidArgument(f"revision {from_revision}")
        buffer = _Buffer(max(start, keys.USER_START), end, from_revision)
        watcher = Watcher(self, buffer, self._signals)
        if from_revision > self.committed:
            self.go_live(buffer)
        elif keys.keyspace_with_history(start, end):
            self._check_compacted(from_revision)
            watcher.replaying = True
        elif from_revision < self._ring_from:
            raise errors.Compacted(self._ring_from)
        else:
            for batch, _ in self._ring:
                buffer.feed(batch)
            self.go_live(buffer)
        return watcher

    def _check_compacted(self, revision: int) -> None:
        oldest = history.compacted(self._state)
        if revision < oldest:
            raise errors.Compacted(oldest)

    def replay(self, buffer: _Buffer) -> bool:
        """Puts the next batch of stored history into the buffer; False when live feeding took over."""
        # Between this check of the mark and the reads below nothing else runs.
        self._check_compacted(buffer.next_revision)
        upto = self.committed
        if buffer.next_revision > upto:
            self.go_live(buffer)
            return False
        resume, batch = history.next_batch(self._state, buffer.start, buffer.end, buffer.next_revision, upto)
        buffer.next_revision = resume
        if batch is not None:
            buffer.batches.append((batch, 0))
        return True

    def go_live(self, buffer: _Buffer) -> None:
        if self._closed is not None:
            buffer.fail(self._closed)
            return
        self._started += 1
        self._live[self._started] = buffer

    def leave(self, buffer: _Buffer) -> None:
        for number, live in self._live.items():
            if live is buffer:
                del self._live[number]
                return

    def close(self, error: errors.AspenError) -> None:
        """Ends all watchers with `error`, once they have read what is buffered."""
        self._closed = error
        for buffer in self._live.values():
            buffer.fail(error)
        self._live.clear()


class Watcher(AsyncIterator[Batch]):
    """The reader's end of a watch. For one task; `aclose` ends it, and so does dropping it."""

    def __init__(self, hub: Hub, buffer: _Buffer, signals: Callable[[], Signal]) -> None:
        self._hub, self._buffer, self._signals = hub, buffer, signals
        self.replaying = False
        self._turns = 0
        self._ended = False

    async def __anext__(self) -> Batch:
        buffer = self._buffer
        self._turns += 1
        if self._turns % _TURNS == 0:
            await self._yield()
        while not self._ended:
            if buffer.batches:
                batch, size = buffer.batches.popleft()
                buffer.bytes -= size
                return batch
            if buffer.error is not None:
                self._ended = True
                raise buffer.error
            if self.replaying:
                try:
                    self.replaying = self._hub.replay(buffer)
                except errors.AspenError as error:
                    buffer.error = error
                if self.replaying and not buffer.batches:
                    await self._yield()
            else:
                buffer.signal = signal = self._signals()
                await signal.wait()
        raise StopAsyncIteration

    async def _yield(self) -> None:
        signal = self._signals()
        signal.set()
        await signal.wait()

    async def aclose(self) -> None:
        """Ends the watch; a task that waits for its next batch finds it ended."""
        self._ended = True
        self._hub.leave(self._buffer)
        self._buffer.wake()

    def __del__(self) -> None:
        self._hub.leave(self._buffer)
