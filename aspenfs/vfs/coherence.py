"""What the kernel may keep in its caches and for how long, when other hosts change the same files.

The steps and what they guarantee: docs/design/coherence.md. In short:

    open     what was committed anywhere before a lookup, open or opendir begins is seen by it; names and
             attributes that the kernel holds may be SHARED_TIMEOUT_S old, and are dropped within ms
    strict   the kernel keeps no names and attributes, and every question waits for the newest state
    stale    nothing waits for other hosts: answers are from what is applied here

A node that is alone has its trees' own, long timeouts, for all changes pass through it. It may become
part of a cluster while mounted: `look` notices, the timeouts fall, and all that the kernel holds is dropped.

Belongs here: how long, and what must be told. Not here: telling the kernel (`fuse/notifier.py`).
"""

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Final, NamedTuple, Protocol

from aspenfs.limits import ABSENT_NAMES_MAX
from aspenfs.vfs.tree import Tree

OPEN, STRICT, STALE = "open", "strict", "stale"
SHARED_TIMEOUT_S: Final = 1.0  # of names and attributes, with other hosts
PAUSES_MAX: Final = 100  # that an open waits for the kernel to be told; then it drops what it can itself


class Agreement(Protocol):
    """What coherence needs of the store."""

    @property
    def alone(self) -> bool: ...
    @property
    def revision(self) -> int: ...
    async def barrier(self) -> int: ...


class Notices(Protocol):
    """The way to tell the kernel. Nothing here waits."""

    def touch(self, inode: int, data: bool) -> None:
        """The attributes of `inode` have changed; with `data` also its content."""

    def entry(self, parent_inode: int, name: bytes) -> None:
        """`name` in `parent_inode` now means another inode, or none, or exists where it did not."""

    def everything(self) -> None:
        """All that the kernel holds may be out of date."""

    def is_untold(self, inode: int) -> bool:
        """Whether the kernel has yet to be told of a noted change to `inode`, or is being told."""

    def holds_old_pages(self, inode: int) -> bool:
        """Whether it may still have content of `inode` that a noted change made stale."""

    def drop_attributes(self, inode: int) -> None:
        """At once: the kernel asks for them again before it uses them."""


class Validity(Protocol):
    """How long the kernel may keep an answer, in seconds. Trees are such."""

    @property
    def entry_timeout_s(self) -> float: ...
    @property
    def attr_timeout_s(self) -> float: ...


class _Uncached(NamedTuple):
    entry_timeout_s: float = 0.0
    attr_timeout_s: float = 0.0


UNCACHED: Final[Validity] = _Uncached()  # of an answer that was overtaken while it was made


class Alone:
    """No other hosts, and nobody who waits."""

    alone, revision = True, 0

    async def barrier(self) -> int:
        return 0


class _Silence:
    """No kernel."""

    def touch(self, inode: int, data: bool) -> None:
        pass

    def entry(self, parent_inode: int, name: bytes) -> None:
        pass

    def everything(self) -> None:
        pass

    def is_untold(self, inode: int) -> bool:
        return False

    def holds_old_pages(self, inode: int) -> bool:
        return False

    def drop_attributes(self, inode: int) -> None:
        pass


class Coherence:
    """The rules of one mount. `alone` is as of the last `look`."""

    def __init__(
        self,
        store: Agreement | None = None,
        mode: str = OPEN,
        notices: Notices | None = None,
        pause: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`pause` returns after a moment: about as long as it takes to tell the kernel of something."""
        self.store, self.mode, self._pause = store or Alone(), mode, pause
        self.notices: Notices = notices or _Silence()
        self.alone = self.store.alone
        # The kernel was told that it need not ask, and remembers: before it opens a directory, of which it
        # then keeps the listing; at each close(2).
        self.opendir_unasked = self.flush_unasked = False
        self._trees: Sequence[Tree] = ()
        # What was dropped lately may come back with an answer that was on its way; this and the last period.
        self._lately: tuple[set[int], set[int]] = (set(), set())
        # Names that the kernel may know to be absent, alike. None: too many, it may be any.
        self._absent: tuple[set[tuple[int, bytes]] | None, set[tuple[int, bytes]] | None] = (None, None)

    def govern(self, trees: Sequence[Tree]) -> None:
        """Sets the timeouts of these trees, now and whenever they change."""
        self._trees = trees
        self._set_timeouts()
        for tree in trees:
            tree.write_behind = True

    def _set_timeouts(self) -> None:
        most = 0.0 if self.mode == STRICT else SHARED_TIMEOUT_S
        for tree in filter(_is_shared, self._trees):
            own = type(tree)
            for name in ("entry_timeout_s", "attr_timeout_s", "negative_timeout_s"):
                timeout = getattr(own, name)
                unbounded = self.alone and self.mode != STRICT
                setattr(tree, name, timeout if unbounded else min(timeout, most))

    # --- waiting for others ---

    async def barrier(self) -> None:
        """Before a name is looked up or a file opened: returns when all that was committed anywhere before
        the call is seen here. NoQuorum."""
        if self.mode != STALE:
            await self.store.barrier()

    async def strict_barrier(self) -> None:
        """Before any other question."""
        if self.mode == STRICT:
            await self.store.barrier()

    async def has_newer(self, revision: int) -> bool:
        """Whether the state has moved beyond `revision`, at which something was refused, by what was
        committed before the call: then it must be tried again. NoQuorum."""
        if self.mode == STALE or self.store.alone:
            return False
        return await self.store.barrier() > revision

    def asks_for_directories(self) -> bool:
        """Whether the kernel must ask before it lists a directory."""
        return not (self.mode == STALE or self.store.alone)

    def asks_at_close(self) -> bool:
        """Whether the kernel must tell of each close(2). Once it was told that it need not, a write waits
        for its own commit: it is the last to hear of an error."""
        if not self.store.alone:
            return True
        self.flush_unasked = True
        for tree in self._trees:
            tree.write_behind = False
        return False

    # --- what the kernel may hold ---

    def absent(self, parent: int, name: bytes) -> None:
        """The kernel is told that there is no such name, and may keep that."""
        now = self._absent[0]
        if now is not None:
            if len(now) < ABSENT_NAMES_MAX:
                now.add((parent, name))
            else:
                self._absent = None, self._absent[1]

    def _may_know_absent(self, parent: int, name: bytes) -> bool:
        now, before = self._absent
        return now is None or before is None or (parent, name) in now or (parent, name) in before

    def touched(self, ino: int, data: bool) -> None:
        """A change from elsewhere to an inode that the kernel knows."""
        self._lately[0].add(ino)
        self.notices.touch(ino, data)

    def renamed(self, parent: int, name: bytes, child_known: bool | None) -> None:
        """A change from elsewhere to a name in a directory that the kernel knows. `child_known`: whether it
        knows what the name meant, False if that was nothing, None if nobody can tell."""
        if child_known is not False or self._may_know_absent(parent, name):
            self.notices.entry(parent, name)
        # A new listing; else the directory's times tell.
        self.touched(parent, self.opendir_unasked)

    async def told(self, ino: int) -> None:
        """Before the answer to an open: the kernel is told of the changes to the file first. When it is told
        while it asks for attributes it throws the answer away, and goes on with the size that it knew."""
        if self._pause is not None:
            for _ in range(PAUSES_MAX):
                if not self.notices.is_untold(ino):
                    return
                await self._pause()

    def opened(self, ino: int) -> bool:
        """A file is about to be opened: whether its pages in the kernel are those of this moment. Its
        attributes there are, or are dropped now: once, see `told`."""
        for some in self._lately:
            if ino in some:
                some.discard(ino)
                self.notices.drop_attributes(ino)
        return not self.notices.holds_old_pages(ino)

    def reads_past_pages(self, tree: Tree) -> bool:
        """Whether a file that is opened now is read and written past the kernel's pages. A read from pages
        ends at the size that the kernel knew when it began, which a change elsewhere makes a lie: what it
        gives may be cut, or zeros. `strict` promises better; a shared mapping of such a file is ENODEV."""
        return self.mode == STRICT and tree.shared and not self.store.alone

    def forgotten(self, ino: int) -> None:
        for some in self._lately:
            some.discard(ino)

    # --- now and then ---

    def tick(self) -> None:
        """To be called when more than SHARED_TIMEOUT_S has gone by since the last time."""
        self._lately = set(), self._lately[0]
        shared = not self.alone
        self._absent = (set() if shared else None), self._absent[0]

    def look(self) -> bool:
        """Whether this node has stopped being alone since the last call, or is alone again. If others have
        come, whoever calls tells the kernel that it must not rely on what it holds: `everything`."""
        alone = self.store.alone
        if alone is self.alone:
            return False
        self.alone = alone
        self._set_timeouts()
        return True

    def everything(self, known: Iterable[int]) -> None:
        """Anything may have changed, of what the kernel knows."""
        self._lately[0].update(known)
        self.notices.everything()


def _is_shared(tree: Tree) -> bool:
    return tree.shared
