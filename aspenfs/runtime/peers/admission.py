"""Letting new nodes in: what the cluster answers to one who has a ticket but no certificate yet.

Belongs here: the two things that a stranger may ask (which CAs are here; let me in), checking its ticket,
passing it on to the leader, signing. Not here: the stranger's own side (`join.py`), the text and rows of
tickets (`tickets.py`), what makes a node a member (the host, behind `Cluster`).

1. Any node: takes the stranger's secret and passes its *hash* on to the leader (`member.join`).
2. Leader: the ticket is known, not used and not over; the signing request holds.
3. Leader, in one transaction: the ticket is used, the member's row is there. Then the configuration
   names it as a learner.
4. Leader signs a certificate for exactly that node; the answer goes back the way it came.

An answer may get lost after step 3: the row of the ticket says which node it was for, and that node alone
gets the same answer again.
"""

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import trio

from aspenfs import errors
from aspenfs.errors import InvalidArgument, ProtocolError
from aspenfs.kv.store import Store
from aspenfs.kv.types import Compare, Operation
from aspenfs.limits import (
    JOIN_FAILURE_S,
    JOIN_FAILURES_MAX,
    JOINS_MAX,
    MEMBERS_MAX,
    NODE_NAME_BYTES_MAX,
    PROPOSAL_TIMEOUT_MS,
)
from aspenfs.runtime import identity
from aspenfs.runtime.peers import addresses, ca, frames, tickets
from aspenfs.runtime.peers.authority import Keeper
from aspenfs.runtime.peers.ca import NodeName
from aspenfs.runtime.peers.frames import Admitted, Type
from aspenfs.runtime.peers.network import Member, PeerNetwork
from aspenfs.seams import Clock, Entropy

log = logging.getLogger(__name__)

JOIN: Final = "member.join"

_ATTEMPTS = 3
_HOSTS_MAX = 1024
_NS_PER_S = 1_000_000_000


class Newcomer(NamedTuple):
    """The member that is to be."""

    node: int
    name: str
    addresses: tuple[str, ...]
    born: bytes
    promote: bool  # becomes a voter when it has caught up


class NamedMember(Member, Protocol):
    @property
    def name(self) -> str: ...


class Cluster(Protocol):
    """What admission needs of the node; its host implements it."""

    @property
    def leader(self) -> int:
        """0: nobody, as far as this node knows."""

    def table(self) -> Mapping[int, NamedMember]: ...

    async def admit(self, newcomer: Newcomer, compares: Sequence[Compare],
                    operations: Sequence[Operation]) -> None:  # fmt: skip
        """As the leader: its row and `operations` in one transaction, if `compares` hold and the row is
        not there (Conflict); then the configuration has it as a learner. NotLeader, NoQuorum."""

    async def readmit(self, node: int) -> None:
        """As the leader: the row of `node` is there; sees to it that the configuration names it too."""


class Candidate(NamedTuple):
    """Who wants in, as one node passes it on to another."""

    ticket: bytes  # hash of the secret
    request: bytes  # for a certificate, DER
    born: bytes
    name: str
    addresses: tuple[str, ...]
    promote: bool


class Failures:
    """Wrong secrets by address: so many at once, then one each JOIN_FAILURE_S. A bounded memory."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until: OrderedDict[str, int] = OrderedDict()  # when all of a host's failures are forgiven

    def check(self, host: str) -> None:
        """Overloaded if the host has to wait."""
        ahead_s = (self._until.get(host, 0) - self._clock.monotonic_ns()) / _NS_PER_S
        wait_s = ahead_s - (JOIN_FAILURES_MAX - 1) * JOIN_FAILURE_S
        if wait_s > 0:
            raise errors.Overloaded(f"too many wrong tickets from {host}: try again in {wait_s:.0f} s")

    def note(self, host: str) -> None:
        until = max(self._until.pop(host, 0), self._clock.monotonic_ns())
        self._until[host] = until + JOIN_FAILURE_S * _NS_PER_S
        if len(self._until) > _HOSTS_MAX:
            self._until.popitem(last=False)


class Reception:
    """Answers strangers, and `member.join`, for the network that it is made for."""

    def __init__(self, network: PeerNetwork, keeper: Keeper, store: Store, cluster: Cluster, clock: Clock,
                 entropy: Entropy) -> None:  # fmt: skip
        self._network, self._keeper, self._store, self._cluster = network, keeper, store, cluster
        self._clock, self._entropy = clock, entropy
        self._failures = Failures(clock)
        self._under_way = 0
        network.strangers = self.answer
        network.handle(JOIN, self._passed_on)

    # --- strangers ---

    async def answer(self, kind: int, payload: bytes, host: str) -> bytes:
        """The frame that answers a stranger's; an AspenError refuses it, and says what to do."""
        if kind == Type.AUTHORITIES:
            frames.decode_question(payload)
            cluster_id = self._network.credentials.name.cluster_id
            return frames.encode_authorities(cluster_id, map(ca.der, self._keeper.bundle))
        if kind != Type.JOIN:
            raise ProtocolError("a certificate of this cluster, or a ticket, is needed")
        self._failures.check(host)
        if self._under_way >= JOINS_MAX:
            raise errors.Overloaded(f"{JOINS_MAX} nodes are joining just now: try again")
        self._under_way += 1
        try:
            admitted = await self._admit(self._candidate(payload))
        except (errors.TicketUnknown, errors.TicketUsed, ProtocolError):
            self._failures.note(host)
            raise
        finally:
            self._under_way -= 1
        return frames.encode_admitted(admitted)

    def _candidate(self, payload: bytes) -> Candidate:
        join = frames.decode_join(payload)
        if join.cluster_id != self._network.credentials.name.cluster_id:
            raise errors.ForeignCluster("this node is of another cluster than the ticket: correct the "
                                        "address, or use a ticket of this cluster")  # fmt: skip
        ticket = tickets.secret_hash(join.cluster_id, join.secret)
        return _checked(Candidate(ticket, *join[2:]))

    async def _admit(self, candidate: Candidate) -> Admitted:
        """Here if this node leads, else at the leader."""
        for attempt in range(_ATTEMPTS):
            if attempt:
                await trio.sleep(PROPOSAL_TIMEOUT_MS / 1000 / 10)
            leader = self._cluster.leader
            try:
                if leader == self._network.node_id:
                    return await self._admit_here(candidate)
                if leader:
                    answer = await self._network.request(leader, JOIN, tuple(candidate),
                                                         timeout_s=PROPOSAL_TIMEOUT_MS / 1000)  # fmt: skip
                    return frames.read_admitted(answer)
            except (errors.NotLeader, errors.PeerUnreachable) as error:
                log.info("join: name=%s not yet: %s", candidate.name, error)
        raise errors.NoQuorum("the cluster has no leader just now: try again; `aspen status` on a member "
                              "shows who is missing")  # fmt: skip

    # --- the leader ---

    async def _passed_on(self, peer: int, body: Any) -> Admitted:
        """`member.join`: a Candidate that another node met."""
        match body:
            case (bytes(), bytes(), bytes(), str(), tuple() as places, bool()):
                if all(type(place) is str for place in places):
                    return await self._admit_here(_checked(Candidate(*body)))
        raise InvalidArgument("not a candidate")

    async def _admit_here(self, candidate: Candidate) -> Admitted:
        if self._cluster.leader != self._network.node_id:
            raise errors.NotLeader(leader=self._cluster.leader)
        public_key = ca.check_request(candidate.request)
        own = self._network.credentials.name
        self._keeper.check_signs()  # before anything is changed
        await self._store.barrier()
        for _ in range(_ATTEMPTS):
            try:
                node = await self._member_for(candidate, ca.key_fingerprint(public_key))
                break
            except errors.Conflict:  # the ticket, or the id, was taken meanwhile: look again
                continue
        else:
            raise errors.Conflict("others took the ticket: make a new one with `aspen ticket create`")
        certificate = self._keeper.sign(public_key, NodeName(own.cluster_id, node, candidate.born))
        log.info("join: node=%d name=%s admitted", node, candidate.name)
        return Admitted(node, self._cluster_name(), ca.der(certificate),
                        tuple(ca.der(each) for each in self._keeper.bundle), self._contacts())  # fmt: skip

    async def _member_for(self, candidate: Candidate, key: bytes) -> int:
        """The id that the candidate has from now on. Conflict: look again."""
        found = tickets.find(self._store, candidate.ticket)
        if found is None:
            raise errors.TicketUnknown("the cluster knows no such ticket: it was withdrawn, or is long over; "
                                       "make a new one with `aspen ticket create`")  # fmt: skip
        known, mod_revision = found
        if known.node:
            if (known.born, known.key) != (candidate.born, key):
                raise errors.TicketUsed(f"node {known.node} has joined with this ticket; each node needs its "
                                        "own: `aspen ticket create` makes one")  # fmt: skip
            await self._cluster.readmit(known.node)
            return known.node
        if known.expires_ns <= self._clock.time_ns():
            raise errors.TicketExpired("the ticket is over; make a new one with `aspen ticket create`")
        node = self._free_id()
        compares, operations = tickets.use(candidate.ticket, known, mod_revision, node=node,
                                           born=candidate.born, key=key)  # fmt: skip
        newcomer = Newcomer(node, candidate.name, candidate.addresses, candidate.born, candidate.promote)
        await self._cluster.admit(newcomer, compares, operations)
        return node

    def _free_id(self) -> int:
        table = self._cluster.table()
        if sum(member.state != "removed" for member in table.values()) >= MEMBERS_MAX:
            raise InvalidArgument(f"the cluster has {MEMBERS_MAX} members: `aspen member remove` one before")
        while True:
            node = int.from_bytes(self._entropy.random_bytes(8), "big") >> 1
            if node > 1 and node not in table:
                return node

    def _contacts(self) -> tuple[tuple[int, tuple[str, ...], bytes], ...]:
        return tuple((node, tuple(member.addresses), member.born)
                     for node, member in sorted(self._cluster.table().items())
                     if member.state != "removed")  # fmt: skip

    def _cluster_name(self) -> str:
        here = identity.read(self._network.credentials.directory)
        assert here is not None
        return here.name


def check_node_name(name: str) -> None:
    """InvalidArgument for what cannot be a node's name."""
    if not 0 < len(name.encode()) <= NODE_NAME_BYTES_MAX or not name.isprintable() or {*"/ ,"} & {*name}:
        raise InvalidArgument(f"node name {name!r}: 1 to {NODE_NAME_BYTES_MAX} bytes without / , or space")


def _checked(candidate: Candidate) -> Candidate:
    check_node_name(candidate.name)
    addresses.parse_all(candidate.addresses)
    if len(candidate.born) != identity.BORN_BYTES:
        raise InvalidArgument("not a birth mark")
    return candidate
