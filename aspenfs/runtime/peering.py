"""Peering: this node's way to the others, from the moment it has one: network, certificates, admission.

Belongs here: introducing the parts to each other, and beginning while the node runs. Not here: what the
parts do (`peers/`), who is a member (`members.py`), where to listen (`peer_settings.py`).
"""

import logging
from collections.abc import Awaitable, Callable, Set
from pathlib import Path
from typing import Any

import trio

from aspenfs import errors
from aspenfs.cluster.types import NodeId
from aspenfs.runtime import contacts, peer_settings
from aspenfs.runtime.host import NodeStore
from aspenfs.runtime.identity import Life
from aspenfs.runtime.lags import KIND as LAGS
from aspenfs.runtime.lags import Lags
from aspenfs.runtime.members import CHANGE, Members
from aspenfs.runtime.peer_settings import PeerSettings
from aspenfs.runtime.peers import credentials
from aspenfs.runtime.peers.admission import Reception
from aspenfs.runtime.peers.authority import Keeper
from aspenfs.runtime.peers.credentials import Credentials
from aspenfs.runtime.peers.network import Member, PeerNetwork
from aspenfs.seams import Clock, Entropy

logger = logging.getLogger(__name__)

_INTRODUCE_AGAIN_S = 5.0

Handler = Callable[[NodeId, Any], Awaitable[Any]]


class Switch:
    """The Peers port, but for Raft messages, of a node that may get its network later: until then nobody
    is there."""

    def __init__(self) -> None:
        self._network: PeerNetwork | None = None
        self._handlers: dict[str, Handler] = {}

    def attach(self, network: PeerNetwork) -> None:
        self._network = network
        for kind, handler in self._handlers.items():
            network.handle(kind, handler)  # type: ignore[arg-type]  # NodeId is an int

    def handle(self, kind: str, handler: Handler) -> None:
        """Who answers requests of that kind."""
        assert kind not in self._handlers, kind
        self._handlers[kind] = handler
        if self._network is not None:
            self._network.handle(kind, handler)  # type: ignore[arg-type]

    async def request(self, to: int, kind: str, body: Any, *, timeout_s: float) -> Any:
        """PeerUnreachable, and what the other side raises."""
        if self._network is None:
            raise errors.PeerUnreachable("this node has no network")
        return await self._network.request(to, kind, body, timeout_s=timeout_s)

    def connected(self) -> Set[Any]:
        return self._network.connected() if self._network is not None else frozenset()


class Peering:
    """`run` as long as the node runs; `begin` gives it a network if it has none."""

    def __init__(self, directory: Path, store: NodeStore, members: Members, lags: Lags, switch: Switch,
                 life: Life, clock: Clock, entropy: Entropy,
                 settings: PeerSettings | None) -> None:  # fmt: skip
        """`settings` None: no network, until `begin`. IdentityLost, Corrupt: the certificate here is not
        for what else is here."""
        self._directory, self._store, self._members, self._lags = directory, store, members, lags
        self._switch, self._life, self._clock, self._entropy = switch, life, clock, entropy
        self.settings: PeerSettings | None = None
        self.network: PeerNetwork | None = None
        self.keeper: Keeper | None = None
        self._wanted = settings
        self._known = contacts.read(directory)
        self._nursery: trio.Nursery | None = None
        self._beginning = trio.Lock()
        switch.handle(CHANGE, members.answer)
        switch.handle(LAGS, lags.answer)
        members.requests = switch
        members.changed.append(self._members_changed)
        store.replaced.append(self._members_changed)

    async def run(self, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; `started` once this node listens, if it is to."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._members.run)
            if self._wanted is not None:
                await self._begin(self._wanted)
            task_status.started()
            await trio.sleep_forever()

    async def begin(self, settings: PeerSettings) -> None:
        """Makes CA and certificate if there are none, listens, and keeps the settings for the next start.

        Busy, InvalidArgument: it cannot listen there, and nothing was changed but that there is a CA.
        """
        async with self._beginning:
            if self.network is None:
                await self._begin(settings)
                await trio.to_thread.run_sync(peer_settings.write, self._directory, settings)

    async def _begin(self, settings: PeerSettings) -> None:
        assert self._nursery is not None, "begin before run"
        made: Credentials = await trio.to_thread.run_sync(
            credentials.establish, self._directory, self._clock, self._entropy
        )
        consensus = self._store.consensus
        network = PeerNetwork(made, self._life, self._clock,
                              deliver=consensus.receive, unreachable=consensus.unreachable,
                              advertise=settings.advertise)  # fmt: skip
        keeper = Keeper(network, self._store, self._members, self._clock)
        Reception(network, keeper, self._store, self._members, self._clock, self._entropy)
        network.set_members(self._table())
        await self._nursery.start(network.run, [settings.listen])
        self._switch.attach(network)
        network.gathers = True
        consensus.network = network
        consensus.configuration_changed.append(lambda _: keeper.stir())
        self.network, self.keeper, self.settings = network, keeper, settings
        logger.info("listening on=%s found at=%s", settings.listen, ",".join(settings.advertise))
        self._nursery.start_soon(keeper.run)
        self._nursery.start_soon(self._lags.run, network)
        if self._store.alone:
            await self._introduce(settings, made)
            await keeper.establish()
        else:
            self._nursery.start_soon(self._introduce_patiently, settings, made)

    async def _introduce(self, settings: PeerSettings, made: Credentials) -> None:
        await self._members.introduce(settings.name, settings.advertise, made.name.born,
                                      self._life.incarnation)  # fmt: skip

    async def _introduce_patiently(self, settings: PeerSettings, made: Credentials) -> None:
        """The others get to know this node's addresses as they are now, as soon as they agree on anything."""
        node = self._store.node_id
        while True:
            try:
                await self._store.barrier()
                if node in self._members.table():  # else it has not caught up with its own admission
                    await self._introduce(settings, made)
                    return
            except errors.AspenError as error:
                logger.debug("not introduced yet: %s", error)
            await trio.sleep(_INTRODUCE_AGAIN_S)

    # --- members ---

    def _table(self) -> dict[int, Member]:
        """The rows; where this node has not got them yet, what it was told when it joined."""
        return {**self._known, **self._members.table()}

    def _members_changed(self) -> None:
        if self.network is not None:
            self.network.set_members(self._table())

