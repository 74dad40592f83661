"""The row by which other hosts know that this one has files/ mounted, and that it is alive.

A session is a row on a lease. While it lives, no orphan made after it ends before this host has said that
it does not hold it (`orphans.py`); when the host dies, the lease ends, and its rows with it. A node that is
alone keeps its row on a lease of years, so that an idle one writes nothing; the row must be there before
anybody else can join and unlink what is open here. Not here: what is held.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Final, NamedTuple

from aspenfs import errors
from aspenfs.filesystem.layout import I64, ORPHAN_LIVE, SESSION_PREFIX, hold_key, orphan_key, session_key
from aspenfs.filesystem.volume import ATTEMPTS, Volume, conflict
from aspenfs.kv.types import (
    EQUAL,
    Compare,
    Event,
    Operation,
    Record,
    absent,
    compare_create_revision,
    compare_mod_revision,
    compare_value,
    prefix_end,
    put,
)
from aspenfs.limits import LEASE_TTL_MS_MAX, SESSION_KEEPALIVE_MS, SESSION_TTL_MS

HOLDS_A_STEP: Final = 96  # hold rows that one transaction puts or takes away, a compare and an operation each
_NS_PER_MS: Final = 1_000_000


class Mounted(NamedTuple):
    """Another host's session: the revision that made it, and up to which it has settled orphans."""

    key: bytes
    created: int
    acknowledged: int


class Session:
    """This mount's session. `created` is the revision of its row, 0 while it has none."""

    def __init__(self, volume: Volume) -> None:
        self.volume, self.store = volume, volume.store
        self.created = 0
        self.lease = self._ttl_ms = 0
        self._kept_alive_ns = 0

    @property
    def key(self) -> bytes:
        return session_key(self.store.node_id)

    @property
    def is_ours(self) -> Compare:
        """Holds while the row is the one that we made: what hangs on it is there too."""
        return compare_create_revision(self.key, EQUAL, self.created)

    def noticed(self, event: Event) -> None:
        """Our row is gone when its lease has ended: this host was away for too long."""
        if event.key == self.key and event.record is None:
            self.created = 0

    async def refresh(self, in_use: Sequence[int]) -> list[int]:
        """To be called every now and then: makes the row or keeps it alive. `in_use` are the orphans that
        this host uses; those that it holds by a new row are given back."""
        if not self.created:
            return await self._open(in_use)
        if self._ttl_ms != SESSION_TTL_MS:
            if not self.store.alone:
                await self._shorten()
        elif self.volume.monotonic_ns() - self._kept_alive_ns >= SESSION_KEEPALIVE_MS * _NS_PER_MS:
            now = self.volume.monotonic_ns()
            try:
                await self.store.lease_keepalive(self.lease)
            except errors.LeaseNotFound:
                self.created = 0
                return await self._open(in_use)
            self._kept_alive_ns = now
        return []

    async def _open(self, in_use: Sequence[int]) -> list[int]:
        """A new row, and with it holds on those orphans in use that are still there."""
        now = self.volume.monotonic_ns()
        ttl_ms = LEASE_TTL_MS_MAX if self.store.alone else SESSION_TTL_MS
        lease = await self.store.lease_grant(ttl_ms)
        for _ in range(ATTEMPTS):
            # This node's last life may have left a row that has not come in here yet, or is still on its
            # way to the leader.
            earlier = self.store.get(self.key)
            if earlier is not None:
                await self._revoke(earlier.lease)
            held = [node for node in in_use if self._is_live(node)][:HOLDS_A_STEP]
            compares: list[Compare] = [absent(self.key)]
            compares += [compare_value(orphan_key(node), EQUAL, ORPHAN_LIVE) for node in held]
            operations: list[Operation] = [put(self.key, I64(0), lease)]
            operations += self.holds(held, lease)
            result = await self.volume.txn(compares, operations)
            if result.succeeded:
                self.created, self.lease, self._ttl_ms = result.revision, lease, ttl_ms
                self._kept_alive_ns = now
                return held
            await self.store.barrier()
        raise conflict("session")

    def _is_live(self, node: int) -> bool:
        row = self.store.get(orphan_key(node))
        return row is not None and row.value == ORPHAN_LIVE

    def holds(self, nodes: Iterable[int], lease: int) -> list[Operation]:
        """Operations that hold these orphans while the lease lasts."""
        return [put(hold_key(node, self.store.node_id), b"", lease) for node in nodes]

    async def _shorten(self) -> None:
        """This node is alone no more: the same row on a lease that ends soon after this host does. Nothing
        hangs on the long one besides, for who is alone holds nothing by rows."""
        row = self.store.get(self.key)
        now = self.volume.monotonic_ns()
        lease = await self.store.lease_grant(SESSION_TTL_MS)
        value = I64(0) if row is None else row.value
        if not (await self.volume.txn([self.is_ours], [put(self.key, value, lease)])).succeeded:
            self.created = 0
            return
        earlier, self.lease, self._ttl_ms, self._kept_alive_ns = self.lease, lease, SESSION_TTL_MS, now
        await self._revoke(earlier)

    async def close(self) -> None:
        """At unmount: nothing is held here any more."""
        if self.created:
            self.created = 0
            await self._revoke(self.lease)

    async def _revoke(self, lease: int) -> None:
        with suppress(errors.LeaseNotFound):  # it has ended by itself
            await self.store.lease_revoke(lease)

    def others(self) -> list[Mounted]:
        """The sessions of all other members. A node is a member before it can make one."""
        return [
            Mounted(key, row.create_revision, int.from_bytes(row.value[:8], "little", signed=True))
            for key, row in self._rows()
            if self.volume.is_member(_host(key))
        ]

    def _rows(self) -> list[tuple[bytes, Record]]:
        found = self.store.range(SESSION_PREFIX, prefix_end(SESSION_PREFIX))
        return [(key, row) for key, row in found if key != self.key]

    async def mend_others(self) -> None:
        """Ends sessions of hosts that are no members any more. A host that died just after it had been alone
        left its row on a lease of years: that row gets one that ends soon, unless the host says otherwise."""
        ttls_ms = {lease: ttl_ms for lease, ttl_ms, _ in self.store.leases()}
        for key, row in self._rows():
            if not self.volume.is_member(_host(key)):
                await self._revoke(row.lease)
            elif ttls_ms.get(row.lease, 0) > SESSION_TTL_MS:
                lease = await self.store.lease_grant(SESSION_TTL_MS)
                same = compare_mod_revision(key, EQUAL, row.mod_revision)
                await self.volume.txn([same], [put(key, row.value, lease)])


def _host(key: bytes) -> int:
    return int.from_bytes(key[len(SESSION_PREFIX) :], "big")
