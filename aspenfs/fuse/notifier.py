"""Telling the kernel to forget what it caches, without ever making the event loop wait.

`touch`, `entry` and `everything` note what has changed and return; threads of our own make the calls, because
the kernel may answer an invalidation only after a request that is in flight: of a whole inode after its
READ, or after it has written its dirty pages; of a name after whatever holds the directory's lock, so after
each LOOKUP, create or rename there, which may wait for other hosts. Only attributes can be dropped at
once. What is noted twice before a thread comes to it is told once. A directory or inode at which one thread
waits is left to that thread, so what the kernel holds up there does not hold up the rest.

What has changed, and which of it the kernel may know, is the business of the caller.
"""

import errno
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from itertools import islice
from time import monotonic
from typing import Final, NamedTuple, Protocol

import pyfuse3

from aspenfs import limits
from aspenfs.fuse import epoch

logger = logging.getLogger(__name__)

# The kernel does not know the inode or name; or the mount is gone, and its caches with it.
_HARMLESS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENOTCONN, errno.EBADF})
WORKERS: Final = 4  # threads; one of them never waits for a name
NAMES_A_STEP: Final = 64
INODES_A_STEP: Final = 16  # what waits behind one that the kernel holds up
AGAIN_S: Final = 0.02  # after which an answer that was on its way has arrived


class InvalidateInode(Protocol):
    def __call__(self, inode: int, attr_only: bool) -> None:
        """Attributes, and the pages too unless `attr_only`. OSError ENOENT if the kernel knows it not."""


class InvalidateEntry(Protocol):
    def __call__(self, inode_p: int, name: bytes) -> None:
        """The name `name` in the directory `inode_p`."""


class Statistics(NamedTuple):
    pending: int  # inodes and names that wait for a thread
    told: int  # calls to the kernel
    unknown: int  # of these, the kernel did not know the inode or the name
    overflows: int
    busy_s: float  # how long the longest call under way has taken; 0.0 if there is none


class _Work(NamedTuple):
    """What one thread tells in one go: `names` of one directory, or `inodes` (whether their data too), some
    of them `again`."""

    directory: int = 0
    names: Sequence[bytes] = ()
    inodes: Mapping[int, bool] = {}
    again: Set[int] = frozenset()
    everything: bool = False


class Notifier:
    """A bounded, coalescing queue of invalidations, and the threads that empty it.

    All but `start` and `stop` never block and may be called from any thread. `known_inodes` lists the
    inodes that the kernel may know; it is called in a thread of the notifier's, so it must take a snapshot in
    one step, like `list(a_dict)` does. `is_known` tells it of one.

    An inode that the kernel knows not, but must have been told of, is told again AGAIN_S later: a LOOKUP that
    was answered before the change may bring in old attributes after it.

    An overflow tells everything; names too, if the kernel can doubt all of them (`epoch.py`), else they are
    bounded by their timeouts.
    """

    def __init__(
        self,
        known_inodes: Callable[[], Iterable[int]],
        is_known: Callable[[int], bool] = lambda inode: False,
        *,
        pending_max: int = limits.NOTIFY_PENDING_MAX,
        workers: int = WORKERS,
        invalidate_inode: InvalidateInode = pyfuse3.invalidate_inode,
        invalidate_entry: InvalidateEntry = pyfuse3.invalidate_entry,
        doubt_names: Callable[[], bool] = epoch.doubt_names,
    ) -> None:
        self._known_inodes, self._is_known = known_inodes, is_known
        self._pending_max, self._workers = pending_max, workers
        self._invalidate_inode = invalidate_inode
        self._invalidate_entry = invalidate_entry
        self._doubt_names = doubt_names
        # Held for a few dictionary operations only, never across a call to the kernel.
        self._changed = threading.Condition(threading.Lock())
        self._inodes: dict[int, bool] = {}  # inode -> its data too
        self._entries: dict[int, dict[bytes, None]] = {}  # directory -> names
        self._names = 0  # in all of them
        self._again: deque[tuple[float, int]] = deque()  # when, and which inode
        self._everything = False
        # Inodes from the note until the kernel has dropped what it has of them, how often, and those of
        # which it may have old pages. Read without the lock: one look into a dictionary is atomic.
        self._untold: dict[int, int] = {}
        self._old_pages: dict[int, int] = {}
        self._all_untold = 0
        self._busy: set[int] = set()  # inodes at which a thread is
        self._waiting_for_names = 0  # threads at a name
        self._idle = 0
        self._stopping = False
        self._threads: list[threading.Thread] = []
        self._began_s: dict[int, float] = {}  # by thread: the call under way
        self._told = self._unknown = self._overflows = 0
        self._warned: set[int | None] = set()

    def start(self) -> None:
        assert not self._threads, "a notifier is started once"
        # Daemon threads: one that the kernel does not let go must not keep the process from its exit.
        for number in range(self._workers):
            thread = threading.Thread(target=self._run, name=f"fuse-notifier-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self, timeout_s: float = 1.0) -> bool:
        """Tells what is pending, then ends the threads. False if one still waits for the kernel.

        On False the session must not be destroyed under the threads: answer the requests in flight or
        abort the connection (`mounts.abort`), and call it again. Later notes are dropped.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        deadline_s = monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    # --- noting ---

    def touch(self, inode: int, data: bool) -> None:
        """The attributes of `inode` have changed; with `data` also its content (of a directory: its list)."""
        with self._changed:
            inodes = self._inodes
            noted = inodes.get(inode)
            if noted is None and not self._has_room():
                return
            if noted is None:
                _count_up(self._untold, inode)
            if data and not noted:
                _count_up(self._old_pages, inode)
            inodes[inode] = data or bool(noted)
            self._wake()

    def entry(self, parent_inode: int, name: bytes) -> None:
        """`name` in `parent_inode` now means another inode, or none, or exists where it did not."""
        with self._changed:
            names = self._entries.get(parent_inode)
            if (names is None or name not in names) and self._has_room():
                if names is None:
                    names = self._entries[parent_inode] = {}
                names[name] = None
                self._names += 1
            self._wake()

    def everything(self) -> None:
        """All that the kernel holds may be out of date."""
        with self._changed:
            if not self._stopping:
                self._note_everything()
                self._wake()

    def is_untold(self, inode: int) -> bool:
        """Whether the kernel has yet to be told of a noted change to `inode`, or is being told."""
        return inode in self._untold or bool(self._all_untold)

    def holds_old_pages(self, inode: int) -> bool:
        """Whether it may still have content of `inode` that a noted change made stale."""
        return inode in self._old_pages or bool(self._all_untold)

    def drop_attributes(self, inode: int) -> None:
        """At once, in the caller's thread: the kernel never holds that up."""
        failure = self._call(self._invalidate_inode, inode, True)
        with self._changed:
            self._told += 1
            self._unknown += failure in _HARMLESS

    def statistics(self) -> Statistics:
        with self._changed:
            now_s = monotonic()
            return Statistics(
                pending=len(self._inodes) + self._names,
                told=self._told,
                unknown=self._unknown,
                overflows=self._overflows,
                busy_s=max((now_s - began_s for began_s in list(self._began_s.values())), default=0.0),
            )

    # --- under the lock ---

    def _wake(self) -> None:
        if self._idle:
            self._changed.notify()

    def _has_room(self) -> bool:
        """False if the note is not needed: everything will be told, or nothing any more."""
        if self._everything or self._stopping:
            return False
        if len(self._inodes) + self._names < self._pending_max:
            return True
        self._overflows += 1
        self._note_everything()
        return False

    def _note_everything(self) -> None:
        if not self._everything:
            self._everything = True
            self._all_untold += 1
        self._settle(self._inodes)
        self._inodes.clear()
        self._entries.clear()
        self._names = 0

    def _settle(self, inodes: Mapping[int, bool]) -> None:
        for inode, data in inodes.items():
            _count_down(self._untold, inode)
            if data:
                _count_down(self._old_pages, inode)

    def _take(self) -> _Work | None:
        """What a thread may do now. Names first: the inodes behind them are told when they mean the right
        thing again. But one thread never waits for a name."""
        if self._everything:
            self._everything = False
            return _Work(everything=True)
        if self._waiting_for_names < max(1, self._workers - 1):
            for directory, names in self._entries.items():
                if directory not in self._busy:
                    some = list(islice(names, NAMES_A_STEP))
                    for name in some:
                        del names[name]
                    if not names:
                        del self._entries[directory]
                    self._names -= len(some)
                    self._busy.add(directory)
                    self._waiting_for_names += 1
                    return _Work(directory, some)
        free = ((inode, data) for inode, data in self._inodes.items() if inode not in self._busy)
        due = dict(islice(free, INODES_A_STEP))
        again = set()
        while self._again and (self._again[0][0] <= monotonic() or self._stopping):
            _, inode = self._again.popleft()
            if inode not in due and inode not in self._busy:
                again.add(inode)
                due[inode] = False
                _count_up(self._untold, inode)
        if not due:
            return None
        for inode in due:
            self._inodes.pop(inode, None)
        self._busy.update(due)
        return _Work(inodes=due, again=again)

    def _finished(self, work: _Work) -> None:
        if work.names:
            self._busy.discard(work.directory)
            self._waiting_for_names -= 1
        self._busy.difference_update(work.inodes)
        self._settle(work.inodes)
        if work.everything:
            self._all_untold -= 1
        if self._stopping:
            self._changed.notify_all()
        elif self._idle and (self._inodes or self._entries):
            self._changed.notify()  # this thread may have been in the way of one that waits

    # --- in the threads ---

    def _run(self) -> None:
        while True:
            with self._changed:
                while (work := self._take()) is None:
                    if self._stopping and not (self._inodes or self._entries):
                        return
                    self._idle += 1
                    self._changed.wait(max(0.0, self._again[0][0] - monotonic()) if self._again else None)
                    self._idle -= 1
            failures: list[int] = []
            try:
                failures.extend(self._tell(work))
            except Exception:
                # The thread must live on: without it every cache of this mount goes stale.
                logger.exception("invalidations lost: inodes=%d names=%d", len(work.inodes), len(work.names))
            with self._changed:
                self._told += len(failures)
                self._unknown += sum(failure in _HARMLESS for failure in failures)
                self._finished(work)

    def _tell(self, work: _Work) -> Iterator[int]:
        """Makes the calls; how each ended."""
        for name in work.names:
            yield self._call(self._invalidate_entry, work.directory, name)
        for inode, data in work.inodes.items():
            failure = self._call(self._invalidate_inode, inode, not data)
            if failure == errno.ENOENT and inode not in work.again and self._is_known(inode):
                self._again.append((monotonic() + AGAIN_S, inode))
            yield failure
        if work.everything:
            self._doubt_names()
            for inode in self._known_inodes():
                yield self._call(self._invalidate_inode, inode, False)

    def _call(self, invalidate: Callable[..., None], inode: int, what: bytes | bool) -> int:
        """Makes one call; its errno, 0 if it did something."""
        thread = threading.get_ident()
        self._began_s[thread] = monotonic()
        try:
            invalidate(inode, what)
            return 0
        except OSError as error:
            if error.errno not in _HARMLESS and error.errno not in self._warned:
                # A cache that may be stale until its timeout; once is enough, it will not be alone.
                self._warned.add(error.errno)
                logger.warning("invalidation failed: inode=%d error=%s", inode, error)
            return error.errno or errno.EIO
        finally:
            del self._began_s[thread]


def _count_up(counts: dict[int, int], key: int) -> None:
    counts[key] = counts.get(key, 0) + 1


def _count_down(counts: dict[int, int], key: int) -> None:
    left = counts[key] - 1
    if left:
        counts[key] = left
    else:
        del counts[key]
