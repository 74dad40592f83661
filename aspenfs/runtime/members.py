"""Who belongs to the cluster: rows of the store, and the changes of configuration that go with them.

Belongs here: reading and writing the rows, admitting, promoting, demoting, removing, handing
leadership over; promotion of learners that have caught up. Not here: joint consensus
(`cluster/membership.py`), certificates and tickets (`peers/`), the words on a terminal (`cli/`).

A row is written before the configuration names its node and stays when it is gone, as "removed": an
id is never admitted twice. Row: `c/member/<id, 8 bytes big-endian>` -> msgpack map, see `Member`.
Changes are made by the leader; another node hands them on to it (`member.change`).
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol

import msgpack
import trio

from aspenfs import errors
from aspenfs.cluster.membership import Change, ChangeKind, ConfigurationChange
from aspenfs.cluster.types import Configuration, NodeId
from aspenfs.kv.store import Store
from aspenfs.kv.types import Compare, Event, Operation, compare_mod_revision, put
from aspenfs.limits import LEARNER_LAG_MAX, PROPOSAL_TIMEOUT_MS, TICK_MS
from aspenfs.runtime.consensus import Consensus
from aspenfs.runtime.peers.admission import Newcomer
from aspenfs.runtime.peers.network import REMOVED

logger = logging.getLogger(__name__)

PREFIX: Final = b"c/member/"
END: Final = b"c/member0"
CHANGE: Final = "member.change"

State = Literal["joining", "member", "removed"]
Act = Literal["promote", "demote", "remove", "lead"]
_EQUAL: Final = 1
_STEP_DOWN_S: Final = 2.0


class Member(NamedTuple):
    """What is known of a node for ever; its role is the configuration's."""

    node: int
    name: str
    addresses: tuple[str, ...]  # HOST:PORT, the first one preferred
    state: State
    born: bytes  # the birth mark of its log: see identity.py
    promote: bool  # becomes a voter when it has caught up
    topology: int = 0  # the start of it, counted, since which it is found at these addresses


class Requests(Protocol):
    """Asking another node: `runtime.peers.PeerNetwork`."""

    async def request(self, to: NodeId, kind: str, body: Any, *, timeout_s: float) -> Any: ...


def key_of(node: int) -> bytes:
    return PREFIX + node.to_bytes(8, "big")


def pack(member: Member) -> bytes:
    packed: bytes = msgpack.packb({**member._asdict(), "addresses": list(member.addresses)})
    return packed


def unpack(value: bytes) -> Member:
    """What later releases may have added is passed over."""
    fields = {name: field for name, field in msgpack.unpackb(value).items() if name in Member._fields}
    return Member(**{**fields, "addresses": tuple(fields["addresses"])})


class Members:
    """The members as this node's state has them."""

    def __init__(self, store: Store, consensus: Consensus) -> None:
        self._store, self._consensus = store, consensus
        self.changed: list[Callable[[], object]] = []  # called when rows or configuration have changed
        self.requests: Requests | None = None
        # How many chunks of files a node lacks, and whether that is all (`BlobReplicator.lacking`).
        self.lacking: Callable[[int], Awaitable[tuple[int, bool]]] | None = None
        store.observe(self._observe, (PREFIX[:2],))
        consensus.configuration_changed.append(lambda _: self._tell())

    def _observe(self, revision: int, events: Sequence[Event], origin: object) -> None:
        for event in events:
            if event[0].startswith(PREFIX):
                self._tell()
                return

    def _tell(self) -> None:
        for tell in self.changed:
            tell()

    # --- reading ---

    def table(self) -> dict[int, Member]:
        rows = self._store.range(PREFIX, END)
        return {member.node: member for member in (unpack(record.value) for _, record in rows)}

    @property
    def leader(self) -> int:
        """0: nobody, as far as this node knows."""
        return self._consensus.replica.raft.leader

    def is_voter(self, node: int) -> bool:
        configuration = self.configuration
        return node in configuration.voters or node in configuration.outgoing

    @property
    def configuration(self) -> Configuration:
        return self._consensus.replica.raft.configuration

    def role(self, node: int) -> str:
        """voter, learner, leader, or none of them."""
        configuration = self.configuration
        if node == self._consensus.replica.raft.leader:
            return "leader"
        if node in configuration.voters or node in configuration.outgoing:
            return "voter"
        if node in configuration.learners or node in configuration.learners_next:
            return "learner"
        return "none"

    def find(self, word: str) -> Member:
        """By id or by name. NotFound; InvalidArgument when a name is not unique."""
        table = self.table()
        if word.isdigit() and int(word) in table:
            return table[int(word)]
        found = [member for member in table.values() if member.name == word and member.state != "removed"]
        if not found:
            raise errors.NotFound(f"no member {word!r}: `aspen member list` shows them")
        if len(found) > 1:
            raise errors.InvalidArgument(f"{len(found)} members are called {word!r}: name one by its id")
        return found[0]

    # --- changing: the leader's own ---

    async def admit(self, newcomer: Newcomer, compares: Sequence[Compare],
                    operations: Sequence[Operation]) -> None:  # fmt: skip
        """A new node becomes a learner; its row and what its ticket needs change in one transaction.

        NotLeader; Conflict when its row is there or a compare did not hold.
        """
        self._lead()
        node = newcomer.node
        member = Member(node, newcomer.name, newcomer.addresses, "joining", newcomer.born, newcomer.promote)
        free = compare_mod_revision(key_of(node), _EQUAL, 0)
        done = await self._store.txn([free, *compares], [put(key_of(node), pack(member)), *operations])
        if not done.succeeded:
            raise errors.Conflict(f"node {node} is known already, or its ticket was used meanwhile")
        await self._store.committed(done.revision)
        await self._change(ChangeKind.ADD_LEARNER, node)

    async def readmit(self, node: int) -> None:
        """The row is there; the configuration gets to name the node, if it does not yet. NotLeader."""
        self._lead()
        member = self.table().get(node)
        if member is not None and member.state != "removed" and self.role(node) == "none":
            await self._change(ChangeKind.ADD_LEARNER, node)

    async def introduce(self, name: str, addresses: Sequence[str], born: bytes, incarnation: int) -> None:
        """This node's own row: what it is called and where it is found, as of its start `incarnation`."""
        node = self._consensus.replica.raft.node_id
        while True:
            record = self._store.get(key_of(node))
            if record is None:
                member = Member(node, name, tuple(addresses), "member", born, False, incarnation)
            else:
                member = unpack(record.value)
                topology = member.topology if member.addresses == tuple(addresses) else incarnation
                member = member._replace(name=name, addresses=tuple(addresses), topology=topology)
                if member.state == "removed" or pack(member) == record.value:
                    return
            revision = 0 if record is None else record.mod_revision
            unchanged = compare_mod_revision(key_of(node), _EQUAL, revision)
            if (await self._store.txn([unchanged], [put(key_of(node), pack(member))])).succeeded:
                await self._store.committed()
                return

    async def promote(self, node: int) -> None:
        """A learner that has caught up becomes a voter. Busy when it lags."""
        self._lead()
        if node not in self.configuration.learners:
            raise errors.InvalidArgument(f"node {node} is {self.role(node)}, not a learner")
        if not self._caught_up(node):
            raise errors.Busy(f"node {node} has not caught up yet: it will be promoted when it has")
        await self._check_complete(node)
        await self._change(ChangeKind.ADD_VOTER, node)
        await self._write(node, state="member", promote=False)

    async def demote(self, node: int) -> None:
        """A voter becomes a learner, and stays one."""
        self._lead()
        voters = self.configuration.voters
        if node not in voters:
            raise errors.InvalidArgument(f"node {node} is {self.role(node)}, not a voter")
        if len(voters) == 1:
            raise errors.InvalidArgument("the only voter cannot be demoted: promote another one before")
        await self._write(node, promote=False)
        await self._change(ChangeKind.ADD_LEARNER, node)

    async def remove(self, node: int) -> None:
        """The node is out for ever; its id is never admitted again. May be done again.

        This node itself hands leadership over, and does no more: NotLeader. Without a vote it could not
        write its row any more.
        """
        self._lead()
        own = self._consensus.replica.raft.node_id
        configuration = self.configuration
        if configuration.voters == (node,):
            raise errors.InvalidArgument("the only voter cannot be removed")
        await self._check_rest(node)
        if node == own:
            heir = self._heir()
            if heir is None:
                raise errors.Busy(f"node {node} leads, and no other voter is there to take over")
            await self.lead(heir)
            raise errors.NotLeader(leader=heir)
        if self.role(node) != "none":
            await self._change(ChangeKind.REMOVE, node)
        await self._write(node, state="removed", promote=False)

    async def lead(self, node: int) -> None:
        """Hands leadership over; returns when `node` leads. Busy when that does not happen in time."""
        raft = self._consensus.replica.raft
        self._lead()
        if node not in self.configuration.voters:
            raise errors.InvalidArgument(f"node {node} is {self.role(node)}: only a voter can lead")
        if node == raft.node_id:
            return
        self._consensus.replica.transfer_leader(node)
        self._consensus.wake()
        with trio.move_on_after(PROPOSAL_TIMEOUT_MS / 1000):
            while raft.leader != node:  # noqa: ASYNC110 – a change of leader has no event
                await trio.sleep(TICK_MS / 1000)
            return
        raise errors.Busy(f"node {node} did not take over: is it reachable and up to date?")

    async def step_down(self) -> None:
        """Before this node stops: if it leads and another voter could, that one does, so that nobody has to
        wait for an election. As far as that works within a second or two."""
        if not self._consensus.leading:
            return
        heir = self._heir()
        if heir is not None:
            with trio.move_on_after(_STEP_DOWN_S):
                try:
                    await self.lead(heir)
                except errors.AspenError as error:
                    logger.info("leadership was not handed over: %s", error)

    def _heir(self) -> int | None:
        """As the leader: of the other voters that are there, the one that has most of the log."""
        raft = self._consensus.replica.raft
        active = [(each.match, node) for node, each in raft.progress().items()
                  if each.active and node != raft.node_id and node in self.configuration.voters]  # fmt: skip
        return max(active)[1] if active else None

    def _lead(self) -> None:
        raft = self._consensus.replica.raft
        if not self._consensus.leading:
            raise errors.NotLeader(leader=raft.leader)

    async def _write(self, node: int, **fields: Any) -> None:
        while True:
            record = self._store.get(key_of(node))
            if record is None:
                return  # the founder of a cluster of one, before it had a row
            member = unpack(record.value)._replace(**fields)
            unchanged = compare_mod_revision(key_of(node), _EQUAL, record.mod_revision)
            done = await self._store.txn([unchanged], [put(key_of(node), pack(member))])
            if done.succeeded:
                await self._store.committed(done.revision)
                return

    async def _change(self, kind: ChangeKind, node: int) -> None:
        """Proposes it and waits until it is applied and no longer joint."""
        consensus = self._consensus
        change = ConfigurationChange((Change(kind, node),))
        raft = consensus.replica.raft
        with trio.move_on_after(PROPOSAL_TIMEOUT_MS / 1000):
            while True:
                self._lead()
                try:
                    index = consensus.replica.change_configuration(change)
                    break
                except errors.Busy:  # another change is under way, or the term has just begun
                    consensus.wake()
                    await trio.sleep(TICK_MS / 1000)
            term = raft.term
            consensus.wake()
            while consensus.revision < index or raft.configuration.outgoing:
                await trio.sleep(TICK_MS / 1000)
                if raft.term != term and consensus.revision < index:
                    raise errors.NotLeader("leadership changed meanwhile: look at `aspen member list`")
            return
        raise errors.NoQuorum("the change of members has no majority yet: `aspen status` says why")

    # --- changing: from anywhere ---

    async def change(self, act: Act, node: int) -> None:
        """Does it here if this node leads, else asks the leader to."""
        if act == "remove":
            await self._remove_patiently(node)
            return
        for _ in range(3):
            try:
                await self._do(act, node)
                return
            except errors.NotLeader as error:
                if not error.leader:
                    raise errors.NoQuorum("there is no leader now: `aspen status` says why") from None
                if self.requests is not None and error.leader != self._consensus.replica.raft.node_id:
                    await self.requests.request(NodeId(error.leader), CHANGE, [act, node],
                                                timeout_s=2 * PROPOSAL_TIMEOUT_MS / 1000)  # fmt: skip
                    return
            await trio.sleep(TICK_MS / 1000)
        raise errors.NotLeader("leadership moves about: try again")

    async def _remove_patiently(self, node: int) -> None:
        """Removing may take two leaders: one that goes hands over first. It may be done again, so
        whatever became of a request, the leader that is there now is asked."""
        raft = self._consensus.replica.raft
        end = trio.current_time() + PROPOSAL_TIMEOUT_MS / 1000
        while True:
            failure: errors.AspenError
            try:
                if self._consensus.leading:
                    await self.remove(node)
                    return
                if self.requests is not None and self.leader not in (0, raft.node_id):
                    await self.requests.request(NodeId(self.leader), CHANGE, ["remove", node],
                                                timeout_s=2 * PROPOSAL_TIMEOUT_MS / 1000)  # fmt: skip
                    return
                failure = errors.NoQuorum("there is no leader now: `aspen status` says why")
            except errors.NotLeader as error:
                failure = error
            except errors.PeerUnreachable as error:
                if node != raft.node_id:
                    raise
                if REMOVED in str(error):
                    return  # the connections of this node end before the answer comes
                failure = error
            if trio.current_time() > end:
                raise failure
            await trio.sleep(TICK_MS / 1000)

    async def answer(self, sender: NodeId, body: Any) -> None:
        """The request `member.change` of another node."""
        match body:
            case ["promote" | "demote" | "remove" | "lead" as act, int() as node]:
                await self._do(act, node)
            case _:
                raise errors.InvalidArgument("not a change of members")

    async def _do(self, act: Act, node: int) -> None:
        await {"promote": self.promote, "demote": self.demote, "remove": self.remove,
               "lead": self.lead}[act](node)  # fmt: skip

    # --- copies of chunks ---

    async def _check_complete(self, node: int) -> None:
        """A majority must hold every chunk that is named, also when it changes (docs/design/blobs.md). Busy:
        chunks are missing on `node`, or it does not know yet."""
        if self.lacking is not None:
            missing, all_known = await self.lacking(node)
            if missing or not all_known:
                raise errors.Busy(f"node {node} is still fetching {missing or 'the'} chunks of files")

    async def _check_rest(self, leaving: int) -> None:
        """Before a voter leaves that may be the only one with some chunk: those that stay have all of them.
        One that does not answer any more has nothing to give."""
        progress = self._consensus.replica.raft.progress().get(leaving)
        own = leaving == self._consensus.replica.raft.node_id
        if not self.is_voter(leaving) or progress is None or not (progress.active or own):
            return
        for node in self.configuration.voters:
            if node != leaving:
                await self._check_complete(node)

    # --- learners that have caught up ---

    def _caught_up(self, node: int) -> bool:
        raft = self._consensus.replica.raft
        progress = raft.progress().get(node)
        return progress is not None and progress.match + LEARNER_LAG_MAX >= raft.last_index

    async def run(self) -> None:
        """Promotes, as the leader, who shall be promoted and has caught up."""
        while True:
            await trio.sleep(4 * TICK_MS / 1000)
            if not self._consensus.leading or not self.configuration.learners:
                continue
            table: Mapping[int, Member] = self.table()
            for node in self.configuration.learners:
                member = table.get(node)
                if member is None or not member.promote or not self._caught_up(node):
                    continue
                try:
                    await self.promote(node)
                    logger.info("node=%d name=%s promoted", node, member.name)
                except errors.AspenError as error:
                    logger.info("node=%d not promoted yet: %s", node, error)
