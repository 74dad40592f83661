"""Telling the kernel to forget what it caches, without ever making the event loop wait.

`touch` and `entry` note what has changed and return; one thread of its own makes the calls, because the
kernel may answer an invalidation only after a request that is in flight: of a whole inode after its READ,
of a name after a LOOKUP of that name. What is noted twice before the thread comes to it is told once.
What has changed, and which of it the kernel may know, is the business of the caller.
"""

import errno
import logging
import threading
from collections.abc import Callable, Iterable
from time import monotonic
from typing import NamedTuple, Protocol

import pyfuse3

from aspenfs import limits

logger = logging.getLogger(__name__)

# The kernel does not know the inode or name; or the mount is gone, and its caches with it.
_HARMLESS = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENOTCONN, errno.EBADF})


class InvalidateInode(Protocol):
    def __call__(self, inode: int, attr_only: bool) -> None:
        """Attributes, and the pages too unless `attr_only`. OSError ENOENT if the kernel knows it not."""


class InvalidateEntry(Protocol):
    def __call__(self, inode_p: int, name: bytes) -> None:
        """The name `name` in the directory `inode_p`."""


class Statistics(NamedTuple):
    pending: int  # inodes and names that wait for the thread
    told: int  # calls to the kernel
    unknown: int  # of these, the kernel did not know the inode or the name
    overflows: int
    busy_s: float  # how long the call under way has taken; 0.0 if there is none


class Notifier:
    """A bounded, coalescing queue of invalidations, and the thread that empties it.

    `touch`, `entry` and `statistics` never block and may be called from any thread. `known_inodes` lists
    the inodes that the kernel may know; it is called in the notifier's thread, so it must take a
    snapshot in one step, like `list(a_dict)` does.

    Of what is pending, names go first and inodes after them: a late answer to a LOOKUP may bring in old
    attributes again, and the second call then drops them.

    Not covered by an overflow: names. Those that were pending are bounded by their entry timeout.
    """

    def __init__(
        self,
        known_inodes: Callable[[], Iterable[int]],
        *,
        pending_max: int = limits.NOTIFY_PENDING_MAX,
        invalidate_inode: InvalidateInode = pyfuse3.invalidate_inode,
        invalidate_entry: InvalidateEntry = pyfuse3.invalidate_entry,
    ) -> None:
        self._known_inodes = known_inodes
        self._pending_max = pending_max
        self._invalidate_inode = invalidate_inode
        self._invalidate_entry = invalidate_entry
        # Held for a few dictionary operations only, never across a call to the kernel.
        self._changed = threading.Condition(threading.Lock())
        self._inodes: dict[int, bool] = {}  # inode -> its data too
        self._entries: dict[tuple[int, bytes], None] = {}
        self._everything = False
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._idle = True
        self._busy_since_s = 0.0
        self._told = self._unknown = self._overflows = 0
        self._warned: set[int | None] = set()

    def start(self) -> None:
        assert self._thread is None, "a notifier is started once"
        # A daemon thread: one that the kernel does not let go must not keep the process from its exit.
        self._thread = threading.Thread(target=self._run, name="fuse-notifier", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: float = 1.0) -> bool:
        """Tells what is pending, then ends the thread. False if it still waits for the kernel.

        On False the session must not be destroyed under the thread: answer the requests in flight or
        abort the connection (`mounts.abort`), and call it again. Later `touch`es are dropped.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify()
        thread = self._thread
        if thread is None:
            return True
        thread.join(timeout_s)
        return not thread.is_alive()

    def touch(self, inode: int, data: bool) -> None:
        """The attributes of `inode` have changed; with `data` also its content (of a directory: its list)."""
        with self._changed:
            inodes = self._inodes
            if inode in inodes:
                if data:
                    inodes[inode] = True
            elif self._has_room():
                inodes[inode] = data
            if self._idle:
                self._changed.notify()

    def entry(self, parent_inode: int, name: bytes) -> None:
        """`name` in `parent_inode` now means another inode, or none, or exists where it did not."""
        with self._changed:
            key = (parent_inode, name)
            if key not in self._entries and self._has_room():
                self._entries[key] = None
            if self._idle:
                self._changed.notify()

    def statistics(self) -> Statistics:
        with self._changed:
            since_s = self._busy_since_s
            return Statistics(
                pending=len(self._inodes) + len(self._entries),
                told=self._told,
                unknown=self._unknown,
                overflows=self._overflows,
                busy_s=monotonic() - since_s if since_s else 0.0,
            )

    # --- under the lock ---

    def _has_room(self) -> bool:
        """False if the note is not needed: everything will be told, or nothing any more."""
        if self._everything or self._stopping:
            return False
        if len(self._inodes) + len(self._entries) < self._pending_max:
            return True
        self._overflows += 1
        self._everything = True
        self._inodes.clear()
        self._entries.clear()
        return False

    # --- in the thread ---

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._inodes or self._entries or self._everything):
                    if self._stopping:
                        return
                    self._idle = True
                    self._changed.wait()
                self._idle = False
                inodes, self._inodes = self._inodes, {}
                entries, self._entries = self._entries, {}
                everything, self._everything = self._everything, False
            try:
                for parent_inode, name in entries:
                    self._tell(self._invalidate_entry, parent_inode, name)
                for inode, data in inodes.items():
                    self._tell(self._invalidate_inode, inode, not data)
                if everything:
                    for inode in self._known_inodes():
                        self._tell(self._invalidate_inode, inode, False)
            except Exception:
                # The thread must live on: without it every cache of this mount goes stale.
                logger.exception("invalidations lost: inodes=%d entries=%d", len(inodes), len(entries))

    def _tell(self, invalidate: Callable[..., None], inode: int, what: bytes | bool) -> None:
        self._told += 1
        self._busy_since_s = monotonic()
        try:
            invalidate(inode, what)
        except OSError as error:
            if error.errno in _HARMLESS:
                self._unknown += 1
            elif error.errno not in self._warned:
                # A cache that may be stale until its timeout; once is enough, it will not be alone.
                self._warned.add(error.errno)
                logger.warning("invalidation failed: inode=%d error=%s", inode, error)
        finally:
            self._busy_since_s = 0.0
