"""Inodes that lost their last name while somebody, here or on another host, may still use them.

On a node alone only this mount can have a file open, so who removes the last name knows whether anybody
does. On several nodes the inode always becomes an orphan first, and these rules end it
(docs/design/coherence.md, "Orphans"):

1. A host that applies the unlink notes the orphan. It may be opened here for a moment yet: a lookup of the
   old name may be under way, and a rename must look atomic to it.
2. A round later the host settles what it has noted: a hold row for each orphan that is open here, and,
   in the same transaction, its session acknowledges all up to that revision. From just before then on
   an orphan without a hold row is never opened here again.
3. An orphan ends when no row holds it and every session older than it has acknowledged its revision. The
   transaction compares all that.
4. Rows of a host hang on the lease of its session. A host whose session has ended may lose its orphans.

Belongs here: this mount's part in that. Not here: the session itself, and who removes names.
"""

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Final

from aspenfs.filesystem.change import Change
from aspenfs.filesystem.content import EXTENTS_A_STEP, INLINE_BYTES_A_STEP, OPS_ROOM, Content
from aspenfs.filesystem.layout import (
    HOLD_PREFIX,
    ORPHAN_GOING,
    ORPHAN_LIVE,
    ORPHAN_PREFIX,
    hold_key,
    hold_prefix,
    inode_key,
    orphan_key,
    unpack_inode,
)
from aspenfs.filesystem.session import HOLDS_A_STEP, Mounted, Session
from aspenfs.filesystem.volume import Volume
from aspenfs.kv.types import (
    EQUAL,
    GREATER,
    Event,
    Record,
    compare_field,
    compare_mod_revision,
    compare_value,
    delete,
    max_,
    merge,
    prefix_end,
    put,
    range_empty,
)

GRACE_ROUNDS: Final = 2  # that an orphan may be opened by its old name
CARE_ROUNDS: Final = 20  # between two looks for orphans that nobody else ends
BATCH: Final = 24  # orphans that one transaction ends: three compares and two to four operations each


class Orphans:
    """Those of one mount. `is_open(node)` says whether a handle is open on it here, `is_known(node)`
    whether the kernel here has looked it up and not forgotten it."""

    def __init__(
        self,
        volume: Volume,
        content: Content,
        is_open: Callable[[int], bool],
        is_known: Callable[[int], bool],
    ) -> None:
        self.volume, self.content, self.store = volume, content, volume.store
        self.is_open, self.is_known = is_open, is_known
        self.session = Session(volume)
        self.kept: dict[int, int] = {}  # that may be opened here yet -> revision that made them orphans
        self.held: set[int] = set()  # of those, the ones that a row of ours holds
        self.doomed: dict[int, None] = {}  # ours to end, in this order
        self._letting_go: set[int] = set()  # rows of ours to be taken away
        self._marks: deque[int] = deque(maxlen=GRACE_ROUNDS)  # the revision at each of the last rounds
        self._rounds = 0
        self._shared = False  # as of the last round
        self._settled = self._acknowledged = 0  # up to which revision, here, and as the others know
        self._cared_for = 0  # up to which revision all orphans are somebody's to end

    # --- at once, when a change is applied or a handle closed ---

    def noticed(self, event: Event) -> None:
        """Any change of the store, at apply, whoever made it."""
        key, record, previous = event
        if key.startswith(ORPHAN_PREFIX):
            node = int.from_bytes(key[3:11], "big")
            if record is None:
                self.kept.pop(node, None)
                self.held.discard(node)
                self.doomed.pop(node, None)
            elif previous is None and not self.store.alone:
                self.kept[node] = record.mod_revision
        else:
            self.session.noticed(event)

    def may_open(self, node: int) -> bool:
        """Whether an inode without a name may be opened here."""
        return node in self.kept

    def removed(self, node: int) -> None:
        """This mount took its last name, and left it as an orphan."""
        if self.store.alone and (self.is_open(node) or self.is_known(node)):
            self.kept[node] = self.store.revision
        else:
            self.doomed[node] = None

    def unused(self, node: int) -> None:
        """No handle is open on it here any more, and the kernel has forgotten it."""
        if self.store.alone and node in self.kept:
            self._doom(node)

    def unmounted(self) -> None:
        """The kernel holds nothing any more, and will not say so."""
        for node in list(self.kept):
            self._doom(node)

    def _doom(self, node: int) -> None:
        del self.kept[node]
        if node in self.held:
            self.held.discard(node)
            self._letting_go.add(node)
        self.doomed[node] = None

    def recover(self) -> int:
        """At start: what was open and without a name when the last daemon ended is to be ended; how many.
        On several hosts whoever takes care of them finds them."""
        found = list(self._rows()) if self.store.alone else []
        self.doomed.update(dict.fromkeys(node for node, _ in found))
        return len(found)

    def leapt(self) -> None:
        """The state is another one, without the changes in between: what is an orphan in it."""
        found = {node: row.create_revision for node, row in self._rows()}
        seen = self._settled
        self.held &= found.keys()
        self.kept = {node: at for node, at in found.items() if at > seen or node in self.kept}
        row = self.store.get(self.session.key)
        if row is None or row.create_revision != self.session.created:
            self.session.created = 0

    def _rows(self) -> Iterator[tuple[int, Record]]:
        for key, row in self.store.scan(ORPHAN_PREFIX, prefix_end(ORPHAN_PREFIX)):
            yield int.from_bytes(key[3:11], "big"), row

    # --- every now and then ---

    async def round(self) -> None:
        """Keeps the session, and settles what was noted GRACE_ROUNDS ago. NoQuorum: next time."""
        if self._shared is self.store.alone:
            self._changed()
        if not self.session.created:
            self.held.clear()
            self._letting_go.clear()
        in_use = [node for node in self.kept if self.is_open(node)]
        self.held.update(await self.session.refresh(in_use))
        if not self.store.alone:
            if len(self._marks) == GRACE_ROUNDS:
                await self._settle(self._marks[0])
            self._marks.append(self.store.revision)
        elif self._letting_go:
            await self._hold([], None)
        self._rounds += 1
        if self._rounds % CARE_ROUNDS == 0:
            await self._take_care()

    def _changed(self) -> None:
        """This node is alone no more, or again: then what others left may be ours to end."""
        self._shared = not self.store.alone
        self._marks.clear()
        if not self._shared:
            for node in list(self.kept):
                if not self.is_open(node) and not self.is_known(node):
                    self._doom(node)

    async def _settle(self, upto: int) -> None:
        """Holds by rows what is used here of the orphans up to a revision, and acknowledges that revision."""
        for node in [node for node in self.held if not self.is_open(node)]:
            self._doom(node)
        due = [node for node, revision in self.kept.items() if revision <= upto and node not in self.held]
        if due:
            self._settled = upto
        if self._settled <= self._acknowledged and not self._letting_go:
            return
        # From here on nobody opens those that nobody has open.
        holding = [node for node in due if self.is_open(node)]
        for node in due:
            if not self.is_open(node):
                del self.kept[node]
        while len(holding) > HOLDS_A_STEP:
            some, holding = holding[:HOLDS_A_STEP], holding[HOLDS_A_STEP:]
            if not await self._hold(some, None):
                return
        if await self._hold(holding, self._settled):
            self._acknowledged = max(self._acknowledged, self._settled)

    async def _hold(self, nodes: list[int], upto: int | None) -> bool:
        session, change = self.session, Change()
        change.compares.append(session.is_ours)
        change.then += session.holds(nodes, session.lease)
        gone = list(islice(self._letting_go, HOLDS_A_STEP - len(nodes)))
        change.then += [delete(hold_key(node, self.store.node_id)) for node in gone]
        if upto is not None:
            change.then.append(merge(session.key, max_(0, upto)))
        if not await change.apply(self.volume):
            session.created = 0  # it has ended: a new one holds what it still can
            return False
        self.held.update(node for node in nodes if node in self.kept)
        self._letting_go.difference_update(gone)
        return True

    async def _take_care(self) -> None:
        """The host with the oldest session ends what those leave behind who removed names and died."""
        cared_for, self._cared_for = self._cared_for, self.store.revision
        await self.session.mend_others()
        if self.store.alone:
            return  # all of them are its own already
        if all(other.created > self.session.created for other in self.session.others()):
            left = [node for node, row in self._rows() if row.create_revision <= cared_for]
            self.doomed.update(dict.fromkeys(left))

    # --- ending them ---

    async def reap(self, most: int = 64) -> int:
        """Ends up to `most` orphans that nobody holds any more; how many it ended."""
        others, ended = self.session.others(), 0
        looked_at = list(islice(self.doomed, most))
        ready = [node for node in looked_at if self._is_free(node, others)]
        if len(ready) < most < len(self.doomed):  # those in use step behind the others
            for node in looked_at:
                self.doomed[node] = self.doomed.pop(node)
        while ready:
            change, batch = self._batch(ready, others)
            if batch:
                if not change.then or await change.apply(self.volume):
                    ended += len(batch)
                    for node in batch:
                        self.doomed.pop(node, None)
            else:
                ended += await self._empty(ready.pop(0), others)
        return ended

    def _is_free(self, node: int, others: list[Mounted]) -> bool:
        """As far as can be told from here; the transaction compares it."""
        row = self.store.get(orphan_key(node))
        if row is None or self.is_open(node) or node in self.kept:
            return row is None
        prefix = hold_prefix(node)
        return not self.store.range(prefix, prefix_end(prefix), limit=1) and all(
            other.acknowledged >= row.create_revision or other.created > row.create_revision
            for other in others
        )

    def _batch(self, ready: list[int], others: list[Mounted]) -> tuple[Change, list[int]]:
        """Takes as many from `ready` as one transaction can end; none if the first is too large for one."""
        change, batch, revision, extents, inline_bytes = Change(), list[int](), 0, 0, 0
        while ready and len(batch) < BATCH:
            node = ready[0]
            record, row = self.store.get(inode_key(node)), self.store.get(orphan_key(node))
            if record is None or row is None:
                if row is not None:
                    change.then.append(delete(orphan_key(node)))
                batch.append(ready.pop(0))
                continue
            inode = unpack_inode(record.value)
            released = self.content.release_operations(node, inode.size)
            if released is None:
                break
            operations, references = released
            extents += references.extents
            inline_bytes += references.inline_bytes
            full = extents > EXTENTS_A_STEP or inline_bytes > INLINE_BYTES_A_STEP
            if batch and (full or len(change.then) + len(operations) + 3 > OPS_ROOM):
                break
            self._condition(change, node, record, row)
            change.destroy(node, inode, operations)
            change.references.append(references)
            change.then.append(delete(orphan_key(node)))
            revision = max(revision, row.create_revision)
            batch.append(ready.pop(0))
        if change.references:
            change.count(-len(change.references))
        _acknowledged(change, others, revision)
        return change, batch

    @staticmethod
    def _condition(change: Change, node: int, record: Record, row: Record) -> None:
        prefix = hold_prefix(node)
        change.compares += (
            compare_mod_revision(inode_key(node), EQUAL, record.mod_revision),
            compare_value(orphan_key(node), EQUAL, row.value),
            range_empty(prefix, prefix_end(prefix)),
        )

    async def _empty(self, node: int, others: list[Mounted]) -> int:
        """Ends an orphan that is too large for one transaction: from the first on nobody can hold it."""
        record, row = self.store.get(inode_key(node)), self.store.get(orphan_key(node))
        if record is None or row is None:
            return 0
        if row.value == ORPHAN_LIVE:
            change = Change()
            self._condition(change, node, record, row)
            _acknowledged(change, others, row.create_revision)
            change.then.append(put(orphan_key(node), ORPHAN_GOING))
            if not await change.apply(self.volume):
                return 0
        await self.content.truncate(node, 0)
        change, batch = self._batch([node], others)
        if not batch or not await change.apply(self.volume):
            return 0
        self.doomed.pop(node, None)
        return 1

    def holders(self) -> int:
        """How many rows hold orphans, of all hosts."""
        return len(self.store.range(HOLD_PREFIX, prefix_end(HOLD_PREFIX), keys_only=True))


def _acknowledged(change: Change, others: list[Mounted], revision: int) -> None:
    """Sessions older than the orphans have settled them; younger ones could never open them."""
    change.compares += [
        compare_field(other.key, 0, GREATER, revision - 1) for other in others if other.created < revision
    ]
