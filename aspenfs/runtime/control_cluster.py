"""Methods of the control socket that are about the cluster: tickets, members, leadership, the CA.

Belongs here: parameters in, results out. Not here: connections and who may come in (`control.py`), what
members, tickets and certificates are (`members.py`, `peers/`), printing (`cli/`).
"""

import logging
from collections.abc import Mapping
from typing import Any, Final, Protocol

import trio

from aspenfs import errors
from aspenfs.errors import AspenError, InvalidArgument, NotSupported
from aspenfs.kv.store import Store
from aspenfs.limits import PEER_ADDRESSES_MAX
from aspenfs.runtime import peer_settings
from aspenfs.runtime.cluster_view import member_rows, name_of
from aspenfs.runtime.control_command import Call, Handler
from aspenfs.runtime.identity import Identity
from aspenfs.runtime.lags import Lags
from aspenfs.runtime.members import Act, Member, Members
from aspenfs.runtime.peer_settings import PeerSettings
from aspenfs.runtime.peers import tickets
from aspenfs.runtime.peers.authority import Keeper
from aspenfs.runtime.peers.network import PeerNetwork
from aspenfs.runtime.peers.tickets import Known
from aspenfs.seams import Clock, Entropy

log = logging.getLogger(__name__)

TICKET_ID_BYTES: Final = 5  # of its hash: ten digits to type
_NS_PER_S: Final = 1_000_000_000
_HAS_ADDRESSES: Final = (
    f"this node has its addresses already: change them in {peer_settings.FILE_NAME} of the state directory, "
    "or with the mount options listen= and advertise=, and mount again"
)
_ACTS: Final[Mapping[str, Act]] = {"promote": "promote", "demote": "demote", "remove": "remove"}


class Peering(Protocol):
    """The node's way to others, which it may get while it runs. None: not yet."""

    @property
    def settings(self) -> PeerSettings | None: ...

    @property
    def network(self) -> PeerNetwork | None: ...

    @property
    def keeper(self) -> Keeper | None: ...

    async def begin(self, settings: PeerSettings) -> None:
        """Makes CA and certificate if there are none, listens, keeps the settings for the next start.
        Busy, InvalidArgument: it cannot listen there."""


class ClusterControl:
    """The handlers, by method: see `docs/design/control-socket.md`."""

    def __init__(self, node: Identity, store: Store, members: Members, lags: Lags, peering: Peering,
                 clock: Clock, entropy: Entropy) -> None:  # fmt: skip
        self._node, self._store, self._members, self._lags = node, store, members, lags
        self._peering, self._clock, self._entropy = peering, clock, entropy

    @property
    def handlers(self) -> dict[str, Handler]:
        return {
            "ticket.create": self.ticket_create,
            "ticket.list": self.ticket_list,
            "ticket.revoke": self.ticket_revoke,
            "member.list": self.member_list,
            "member.change": self.member_change,
            "leader.transfer": self.leader_transfer,
            "ca.rotate": self.ca_rotate,
        }

    # --- tickets ---

    async def ticket_create(self, call: Call) -> dict[str, Any]:
        """{ttl_s, listen, advertise: only for a node without a network} -> the ticket, and what began."""
        ttl_s = call.params.get("ttl_s")
        if type(ttl_s) is not int:
            raise InvalidArgument("ttl_s must be a number")
        began = await self._begin(call.params)
        keeper, settings = self._peering.keeper, self._peering.settings
        assert keeper is not None
        assert settings is not None
        await self._store.barrier()
        now_ns = self._clock.time_ns()
        ticket = tickets.new(self._node.cluster_id, self._node.name, self._addresses(),
                             keeper.signing_fingerprint, ttl_s, now_ns, self._entropy)  # fmt: skip
        done = await self._store.txn(*tickets.create(self._store, ticket, now_ns))
        await self._store.committed(done.revision)
        log.info("ticket=%s created ttl_s=%d", ticket_id(ticket.hash), ttl_s)
        return {"ticket": ticket.encode(), "id": ticket_id(ticket.hash),
                "expires_ns": ticket.expires_s * _NS_PER_S, "began": began, "listen": settings.listen,
                "advertise": list(settings.advertise)}  # fmt: skip

    async def _begin(self, params: Mapping[str, Any]) -> bool:
        """Whether this node has just got its network."""
        listen, advertise = params.get("listen") or "", params.get("advertise") or ()
        if type(listen) is not str or not all(type(each) is str for each in advertise):
            raise InvalidArgument("listen is an address, advertise a list of them")
        if self._peering.network is not None:
            if listen or advertise:
                raise InvalidArgument(_HAS_ADDRESSES)
            return False
        await self._peering.begin(peer_settings.decide("", listen, advertise))
        return True

    def _addresses(self) -> list[str]:
        """Where a joiner may ask: here first, then at others, so that it need not be this node."""
        own = self._members.table().get(self._node.node_id)
        settings = self._peering.settings
        assert settings is not None
        found = list(own.addresses if own is not None and own.addresses else settings.advertise)
        for node, member in sorted(self._members.table().items()):
            if node != self._node.node_id and self._members.role(node) in ("voter", "leader"):
                found += member.addresses[:1]
        return list(dict.fromkeys(found))[:PEER_ADDRESSES_MAX]

    async def ticket_list(self, call: Call) -> dict[str, Any]:
        """Items {id, created_ns, expires_ns, state, node}, the newest first."""
        await self._store.barrier()
        known = sorted(tickets.all_known(self._store), key=lambda item: -item[1].created_ns)
        for ticket_hash, ticket in known:
            await call.item({"id": ticket_id(ticket_hash), "created_ns": ticket.created_ns,
                             "expires_ns": ticket.expires_ns, "node": ticket.node,
                             "state": self._state(ticket)})  # fmt: skip
        return {"count": len(known)}

    def _state(self, ticket: Known) -> str:
        if ticket.node:
            return "used"
        return "open" if ticket.expires_ns > self._clock.time_ns() else "expired"

    async def ticket_revoke(self, call: Call) -> dict[str, Any]:
        """{ticket: its id, or the ticket itself} -> {id}. NotFound."""
        text = call.params.get("ticket")
        if type(text) is not str or not text:
            raise InvalidArgument("ticket must be an id or a ticket")
        await self._store.barrier()
        ticket_hash = self._known_hash(text)
        done = await self._store.txn([], [tickets.withdraw(ticket_hash)])
        await self._store.committed(done.revision)
        log.info("ticket=%s revoked", ticket_id(ticket_hash))
        return {"id": ticket_id(ticket_hash)}

    def _known_hash(self, text: str) -> bytes:
        if text.startswith(tickets.TEXT_PREFIX):
            wanted = tickets.decode(text).hash
            found = [wanted] if tickets.find(self._store, wanted) is not None else []
        else:
            known = (ticket_hash for ticket_hash, _ in tickets.all_known(self._store))
            found = [each for each in known if each.hex().startswith(text.lower())]
        if len(found) != 1:
            raise errors.NotFound(f"{'several tickets are' if found else 'no ticket is'} called {text[:20]}: "
                                  "`aspen ticket list` shows those there are")  # fmt: skip
        return found[0]

    # --- members ---

    async def member_list(self, call: Call) -> dict[str, Any]:
        """{removed: those too} -> {members: see `cluster_view.member_rows`}."""
        removed = bool(call.params.get("removed"))
        rows = member_rows(self._members, self._lags, self._peering.network, self._node.node_id)
        return {"members": [row for row in rows if removed or row["state"] != "removed"]}

    async def member_change(self, call: Call) -> dict[str, Any]:
        """{act: promote|demote|remove, member: id or name} -> {node, name, role}."""
        act, word = _ACTS.get(call.params.get("act", "")), call.params.get("member")
        if act is None or type(word) is not str:
            raise InvalidArgument("act is promote, demote or remove; member is an id or a name")
        member = self._find(word)
        await self._members.change(act, member.node)
        log.info("node=%d name=%s: %s", member.node, member.name, act)
        return {"node": member.node, "name": member.name, "role": self._members.role(member.node)}

    def _find(self, word: str) -> Member:
        member = self._members.find(word)
        if member.state == "removed":
            raise InvalidArgument(f"node {member.node} ({member.name}) was removed, and never comes back")
        return member

    async def leader_transfer(self, call: Call) -> dict[str, Any]:
        """{member: id or name, or "": who is best} -> {node, name}."""
        word = call.params.get("member")
        if type(word) is not str:
            raise InvalidArgument("member is an id or a name")
        node = self._find(word).node if word else self._best_follower()
        await self._members.change("lead", node)
        return {"node": node, "name": name_of(self._members, node)}

    def _best_follower(self) -> int:
        """The voter that lags least, of those that do not lead."""
        configuration = self._members.configuration
        followers = [node for node in configuration.voters if self._members.role(node) != "leader"]
        lags = {node: lag for node in followers if (lag := self._lags.of(node)) is not None}
        if not lags:
            raise errors.Busy("no other voter can lead now: `aspen member list` shows them")
        return min(lags, key=lambda node: (lags[node], node))

    # --- certificates ---

    async def ca_rotate(self, call: Call) -> dict[str, Any]:
        """Items are lines that tell how far it is. It may be cut off and asked for again at any point."""
        keeper = self._peering.keeper
        if keeper is None:
            raise NotSupported("this cluster has no CA yet: `aspen ticket create` makes it")
        outbox, lines = trio.open_memory_channel[str](64)
        failure: AspenError | None = None

        async def rotate() -> None:
            nonlocal failure
            with outbox:
                try:
                    await keeper.rotate(outbox.send_nowait)
                except AspenError as error:
                    failure = error

        async with trio.open_nursery() as nursery:
            nursery.start_soon(rotate)
            async for line in lines:
                await call.item(line)
        if failure is not None:
            raise failure
        return {"expires_ns": keeper.expires_ns}


def ticket_id(ticket_hash: bytes) -> str:
    return ticket_hash[:TICKET_ID_BYTES].hex()
