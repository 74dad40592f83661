"""Writes that are not committed yet: in their order, per file, one transaction of each file at a time.

On several nodes a commit is a round trip and a sync on a majority. While one transaction of a file is under
way, what is written to that file meanwhile gathers, and goes with the next one: so a stream of writes pays a
few commits, however small they are, and this host's writers of one file never conflict with each other.

A write may return before its commit where something later waits for it and can tell its error: where the
kernel sends FLUSH at close(2) (`returns_early`, docs/design/coherence.md). Otherwise it waits itself. Changes
of attributes may come in between (`change`). Either way reads here must show what was written: who reads a
file first waits until it is `settled`. Not here: what a write does to a file (`writing.py`), and who asks for
errors (`views/files.py`).
"""

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Final

from aspenfs import errors
from aspenfs.filesystem.attributes import Change, changed
from aspenfs.filesystem.layout import Inode, inode_key, unpack_inode
from aspenfs.filesystem.volume import Tasks, Volume
from aspenfs.filesystem.writing import BLOBS_MAX, Piece, Writer
from aspenfs.kv.watch import Signal
from aspenfs.limits import (
    CHUNK_BYTES_MAX,
    FILE_BYTES_MAX,
    WRITE_BEHIND_BYTES_MAX,
    WRITE_BEHIND_FILE_BYTES_MAX,
)

PAGE_BYTES: Final = 4096  # the kernel's
_FORESEEN_MAX: Final = 256  # writes under way of one file, whose effect is looked through
_CHANGES_MAX: Final = 64  # the same, when a change of attributes is taken in behind them
_CUT_PAUSES_MAX: Final = 10  # that the rest of a write that the kernel has cut may take to come


class _Waiting:
    """Bytes that belong together, not yet a piece, and what is to be changed behind them, if anything: then
    the bytes may lack. `believed` is where the writer thinks that they go."""

    __slots__ = ("believed", "change", "length", "offset", "parts", "piece", "time", "under_way", "writes")

    def __init__(self, time: int, offset: int | None, believed: int, data: bytes) -> None:
        self.time, self.offset, self.believed, self.length = time, offset, believed, len(data)
        self.parts, self.writes = [data], 1
        self.piece: Piece | None = None  # once its bytes are in the chunk store, or in a transaction
        self.change: dict[str, int] | None = None
        self.under_way = False  # in a transaction

    def continues(self, offset: int | None, believed: int, size: int) -> bool:
        """Whether `size` bytes more belong right behind."""
        return (
            self.piece is None
            and self.change is None
            and (offset is None) is (self.offset is None)
            and believed == self.believed + self.length
            and self.length + size <= CHUNK_BYTES_MAX
        )

    @property
    def may_be_cut(self) -> bool:
        """Whether this may be the first part of a larger write, which the kernel has cut at a page's end:
        the rest comes when it has heard of the first."""
        return (
            self.offset is None
            and bool(self.believed % PAGE_BYTES)
            and not ((self.believed + self.length) % PAGE_BYTES)
        )

    def extend(self, time: int, data: bytes) -> None:
        self.time = time
        self.parts.append(data)
        self.length += len(data)
        self.writes += 1


class _File:
    """What is under way for one inode. Numbers count the writes that were `taken` in and `done`."""

    __slots__ = ("bytes", "done", "early", "taken", "waiters", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[_Waiting] = deque()
        self.bytes = self.taken = self.done = 0
        self.waiters: list[_Waiter] = []
        self.early = False  # something was taken that nobody waits for

    def last_between(self, start: int, end: int) -> int:
        """How many writes must be done for the last one that touches these bytes; 0 if none does."""
        upto, count = 0, self.done
        for waiting in self.waiting:
            count += waiting.writes
            if waiting.believed < end and start < waiting.believed + waiting.length:
                upto = count
        return upto

    def next(self) -> list[_Waiting]:
        """What may go together: up to the first change of attributes."""
        some: list[_Waiting] = []
        for waiting in islice(self.waiting, BLOBS_MAX):
            waiting.under_way = True
            some.append(waiting)
            if waiting.change is not None:
                break
        return some


class _Waiter:
    __slots__ = ("error", "signal", "upto")

    def __init__(self, signal: Signal, upto: int) -> None:
        self.signal, self.upto = signal, upto
        self.error: errors.AspenError | None = None


class WriteBehind:
    """The writes under way of one mount. `displaced(node)` hears of a file whose bytes are not where, or
    not what, the kernel believes."""

    def __init__(self, volume: Volume, writer: Writer, displaced: Callable[[int], None]) -> None:
        self.volume, self.writer, self.displaced = volume, writer, displaced
        self.returns_early = False
        self.files: dict[int, _File] = {}  # with writes under way
        self.bytes = 0  # of all of them
        # inode -> how often writes to it have failed behind their writers' backs, and the last error
        self.failures: dict[int, tuple[int, errors.AspenError]] = {}

    async def write(self, node: int, offset: int | None, believed: int, data: bytes) -> None:
        """Takes a write in, at `offset` or at the end (None). With `returns_early` its error is found in
        `failures`, else it is raised here when the write is committed. TooLarge at once."""
        if believed + len(data) > FILE_BYTES_MAX:
            raise errors.TooLarge(f"a file has at most {FILE_BYTES_MAX} bytes")
        tasks = self.volume.tasks
        if tasks is None:
            if await self.writer.write(node, offset, data) != believed:
                self.displaced(node)
            return
        await self._room(tasks, node, len(data))
        for at in range(0, len(data), CHUNK_BYTES_MAX):
            chunk = data[at : at + CHUNK_BYTES_MAX] if len(data) > CHUNK_BYTES_MAX else data
            file = self._take(tasks, node, None if offset is None else offset + at, believed + at, chunk)
        if not self.returns_early:
            await self._wait(tasks, file, file.taken)

    def _take(self, tasks: Tasks, node: int, offset: int | None, believed: int, data: bytes) -> _File:
        file, now = self.files.get(node), self.volume.now()
        last = file.waiting[-1] if file is not None and file.waiting else None
        if last is not None and last.continues(offset, believed, len(data)):
            last.extend(now, data)
        else:
            waiting = _Waiting(now, offset, believed, data)
            if len(data) == CHUNK_BYTES_MAX:
                self._seal(waiting)  # before it counts: on a full disk this write fails, and no other
            file = self._file(tasks, node)
            file.waiting.append(waiting)
        assert file is not None  # else there was no last one
        file.bytes += len(data)
        self.bytes += len(data)
        file.taken += 1
        file.early = file.early or self.returns_early
        return file

    def _file(self, tasks: Tasks, node: int) -> _File:
        file = self.files.get(node)
        if file is None:
            file = self.files[node] = _File()
            tasks.spawn(partial(self._run, tasks, node, file))
        return file

    def expected(self, node: int, inode: Inode) -> Inode | None:
        """What `inode`, as it is here, will be when all that was taken is committed; None: who knows?"""
        file = self.files.get(node)
        if file is None:
            return inode
        if len(file.waiting) > _FORESEEN_MAX:
            return None
        for waiting in file.waiting:
            if waiting.offset is None:
                return None  # it goes to wherever the end will be
            if waiting.length:
                size = max(inode.size, waiting.believed + waiting.length)
                time = max(waiting.time, inode.ctime)
                inode = inode._replace(size=size, mtime=time, ctime=time)
            if waiting.change is not None:
                inode = changed(inode, waiting.change)
        return inode._replace(allocated=inode.allocated + file.bytes)  # at the most

    def mode(self, node: int, mode: int) -> int:
        """What `mode`, as it is here, will be when all that was taken is committed."""
        file = self.files.get(node)
        for waiting in file.waiting if file is not None else ():
            if waiting.change is not None:
                mode = waiting.change.get("mode", mode)
        return mode

    def has_room(self, node: int) -> bool:
        """Whether a change may be taken in: each ends a transaction, and they are not counted as bytes."""
        file = self.files.get(node)
        return file is None or len(file.waiting) < _CHANGES_MAX

    def change(self, node: int, change: Change) -> None:
        """Takes a change of attributes in, behind what was written. Only where writes return early: its
        error is told as theirs."""
        tasks = self.volume.tasks
        assert tasks is not None  # or writes do not return early
        file = self._file(tasks, node)
        if not file.waiting or file.waiting[-1].under_way:
            nothing = _Waiting(0, 0, 0, b"")
            nothing.parts, nothing.writes = [], 0
            file.waiting.append(nothing)
        last = file.waiting[-1]
        last.change = {**(last.change or {}), "ctime": self.volume.now(), **change}
        last.writes += 1
        file.taken += 1
        file.early = True

    def _seal(self, waiting: _Waiting) -> Piece:
        if waiting.piece is None:
            data = waiting.parts[0] if len(waiting.parts) == 1 else b"".join(waiting.parts)
            waiting.piece = self.writer.piece(waiting.time, waiting.offset, data)
            waiting.parts.clear()
        return waiting.piece

    # --- waiting ---

    async def settled(self, node: int) -> None:
        """Returns when what was written to a file before the call is committed, or given up: then reads
        show it. What comes meanwhile is not waited for."""
        file = self.files.get(node)
        if file is not None:
            await self._over(file, file.taken)

    async def settled_between(self, node: int, start: int, end: int) -> None:
        """The same for who reads these bytes: of writes that touch them, or that move an end within them."""
        file = self.files.get(node)
        if file is not None:
            record = self.volume.store.get(inode_key(node))
            size = 0 if record is None else unpack_inode(record.value).size
            moves = any(
                waiting.offset is None or end > size < waiting.believed + waiting.length
                for waiting in file.waiting
            )
            await self._over(file, file.taken if moves else file.last_between(start, end))

    async def all_settled(self) -> None:
        while self.files:
            await self.settled(next(iter(self.files)))

    async def _room(self, tasks: Tasks, node: int, size: int) -> None:
        while (file := self.files.get(node)) is not None and file.bytes + size > WRITE_BEHIND_FILE_BYTES_MAX:
            await self._over(file, file.done + 1)
        while self.files and self.bytes + size > WRITE_BEHIND_BYTES_MAX:
            file = max(self.files.values(), key=_bytes)
            await self._over(file, file.done + 1)

    async def _over(self, file: _File, upto: int) -> None:
        """As `_wait`; how it ended is the business of others."""
        assert self.volume.tasks is not None  # else nothing is ever under way
        with suppress(errors.AspenError):
            await self._wait(self.volume.tasks, file, upto)

    @staticmethod
    async def _wait(tasks: Tasks, file: _File, upto: int) -> None:
        """Returns when `upto` writes of the file are committed. The error of those that are not."""
        if file.done < upto:
            waiter = _Waiter(tasks.event(), upto)
            file.waiters.append(waiter)
            await waiter.signal.wait()
            if waiter.error is not None:
                raise waiter.error

    # --- working ---

    async def _run(self, tasks: Tasks, node: int, file: _File) -> None:
        """Commits what waits until nothing does; after an error what is behind it is given up too, since it
        was written by who believed that the bytes before are there."""
        failure: errors.AspenError | None = None
        try:
            while file.waiting:
                for _ in range(_CUT_PAUSES_MAX):
                    if not self.returns_early or not file.waiting[-1].may_be_cut:
                        break
                    await tasks.pause()
                await self._commit(node, file)
        except errors.AspenError as error:
            failure = error
        except BaseException as error:
            failure = errors.Lost(f"writes to inode {node} were given up: {error!r}")
            raise
        finally:
            del self.files[node]
            if failure is not None:
                self._fail(node, file, failure)
            self._wake(file, failure)

    async def _commit(self, node: int, file: _File) -> None:
        """One transaction. Until it is over nothing is added to what it carries."""
        some = file.next()
        pieces = [self._seal(waiting) for waiting in some if waiting.length]
        starts = iter(await self.writer.write_some(node, pieces, some[-1].change))
        for waiting in some:
            start = next(starts, None) if waiting.length else waiting.believed
            if start is None:
                break  # what does not fit goes next
            file.waiting.popleft()
            self._done_with(file, waiting)
            if start != waiting.believed:
                self.displaced(node)
        self._wake(file, None)

    def _done_with(self, file: _File, waiting: _Waiting) -> None:
        file.bytes -= waiting.length
        self.bytes -= waiting.length
        file.done += waiting.writes
        if waiting.piece is not None:
            self.writer.done_with(waiting.piece)

    def _fail(self, node: int, file: _File, error: errors.AspenError) -> None:
        while file.waiting:
            self._done_with(file, file.waiting.popleft())
        if file.early:
            self.failed(node, error)
        self.displaced(node)

    def failed(self, node: int, error: errors.AspenError) -> None:
        """Whoever has the file open is to hear that something failed which had returned."""
        self.failures[node] = self.failures.get(node, (0, error))[0] + 1, error

    @staticmethod
    def _wake(file: _File, error: errors.AspenError | None) -> None:
        waiters, file.waiters = file.waiters, []
        for waiter in waiters:
            if error is None and waiter.upto > file.done:
                file.waiters.append(waiter)
            else:
                waiter.error = error
                waiter.signal.set()


def _bytes(file: _File) -> int:
    return file.bytes
