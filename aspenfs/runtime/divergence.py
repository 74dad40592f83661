"""Do all members have the same state? Compared now and then; who differs from a majority is quarantined.

The leader puts a checkpoint into the log, every member computes the digest of its state there
(`checkpoints.py`), the leader asks for them and writes down in the log what it was told. Each node that comes
to that row holds its own digest against it: so one that was slow, or away, finds out as well. Where there is
no digest that a majority of the voters has, nobody knows who is right: all say so, and nothing is touched.

    state.checkpoint  {index, hurry}  ->  {digest, rows, cpu_ms}, {why} if there is none, {} if not yet
    state.compare     {index}         ->  {index, verdict: packed, or nil: not yet}; of the leader. Index 0:
                                          begins one, unless one is under way

Belongs here: these requests, when it is done, judging, noticing that it is this node. Not here: digests, what
quarantine means (`quarantine.py`), getting well (`catching_up.py`). Steps: docs/design/cluster.md.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, Protocol

import msgpack
import trio

from aspenfs import errors
from aspenfs.cluster.types import Configuration
from aspenfs.errors import AspenError
from aspenfs.kv.types import Event, put
from aspenfs.limits import (
    DIGEST_AGAIN_S,
    DIGEST_AGE_MAX_S,
    DIGEST_MEAN_PERCENT,
    DIGEST_PERIOD_S,
    PROPOSAL_TIMEOUT_MS,
)
from aspenfs.runtime import quarantine
from aspenfs.runtime.checkpoints import UNREADABLE, Checkpoints, Digest
from aspenfs.runtime.host import NodeStore
from aspenfs.runtime.quarantine import Quarantine
from aspenfs.seams import Clock

logger = logging.getLogger(__name__)

ROW_KEY: Final = b"c/digests"
CHECKPOINT, COMPARE = "state.checkpoint", "state.compare"

IN_QUARANTINE: Final = "in quarantine: it is fetching another state"  # why a member told nothing

_LOOK_S: Final = 1.0
_ASK_S: Final = 5.0  # for one answer of a member
_ASK_PAUSE_S: Final = (0.05, 0.1, 0.2, 0.5, 1.0)  # before it is asked again, the last one for ever
_FAILURES_MAX: Final = 3  # answers that did not come, in a row
_ANSWER_S: Final = 5.0  # what `state.compare` waits for the end
_COMPARE_S: Final = _ANSWER_S + PROPOSAL_TIMEOUT_MS / 1000
_ATTEMPTS: Final = 3  # of `compare`, where leadership moves about


class Peers(Protocol):
    """The part of the port by which other nodes are asked and answered."""

    def handle(self, kind: str, handler: Callable[[Any, Any], Awaitable[Any]]) -> None: ...

    async def request(self, to: int, kind: str, body: Any, *, timeout_s: float) -> Any: ...


class Verdict(NamedTuple):
    """What the leader was told of the states at one entry."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs
    time_ns: int  # wall clock of the leader
    digest: bytes  # that of a majority of the voters; empty: no digest is
    told: Mapping[int, bytes]  # by node; UNREADABLE: it cannot read its state
    silent: Mapping[int, str]  # members that told nothing, and why

    @property
    def differing(self) -> tuple[int, ...]:
        """Nodes that do not have what the majority has; without a majority all that told, if not the same."""
        if self.digest:
            return tuple(node for node, digest in self.told.items() if digest != self.digest)
        digests = set(self.told.values())
        return tuple(self.told) if len(digests) > 1 or UNREADABLE in digests else ()

    @property
    def says_something(self) -> bool:
        return bool(self.digest or self.differing)

    @property
    def quarantined(self) -> tuple[int, ...]:
        return tuple(node for node, why in self.silent.items() if why == IN_QUARANTINE)


def pack(verdict: Verdict) -> bytes:
    packed: bytes = msgpack.packb(verdict._asdict())
    return packed


def unpack(value: bytes) -> Verdict:
    """ValueError, KeyError, TypeError for what another release may have written."""
    fields = msgpack.unpackb(value, strict_map_key=False)
    return Verdict(int(fields["index"]), int(fields["time_ns"]), bytes(fields["digest"]),
                   {int(node): bytes(digest) for node, digest in fields["told"].items()},
                   {int(node): str(why) for node, why in fields["silent"].items()})  # fmt: skip


def majority(configuration: Configuration, told: Mapping[int, bytes]) -> bytes:
    """The digest that a majority of the voters has, in both halves of a joint configuration; else b""."""
    halves = [half for half in (configuration.voters, configuration.outgoing) if half]
    for digest in sorted(set(told.values()) - {UNREADABLE}):
        if all(2 * sum(told.get(node) == digest for node in half) > len(half) for half in halves):
            return digest
    return b""


def _members(configuration: Configuration) -> list[int]:
    return sorted(set().union(*configuration[:4]))


class _Round:
    """One comparison."""

    def __init__(self, index: int, *, hurry: bool) -> None:
        self.index, self.hurry = index, hurry
        self.told: dict[int, Digest] = {}
        self.silent: dict[int, str] = {}
        self.over = trio.Event()
        self.verdict: Verdict | None = None  # when it is over; None: it came to nothing

    def judged(self, configuration: Configuration, now_ns: int) -> Verdict:
        told = {node: digest.digest for node, digest in sorted(self.told.items())}
        silent = {node: self.silent.get(node, "it took too long") for node in _members(configuration)
                  if node not in told}  # fmt: skip
        return Verdict(self.index, now_ns, majority(configuration, told), told, silent)


class Divergence:
    """See the head of this file. All methods belong to the loop's thread."""

    def __init__(self, store: NodeStore, checkpoints: Checkpoints, peers: Peers, clock: Clock,
                 hand_over: Callable[[], Awaitable[object]], *, period_s: float = DIGEST_PERIOD_S,
                 again_s: float = DIGEST_AGAIN_S) -> None:  # fmt: skip
        """`hand_over` makes another node the leader, if that works."""
        self._store, self._checkpoints, self._peers, self._clock = store, checkpoints, peers, clock
        self._hand_over, self._period_s, self._again_s = hand_over, period_s, again_s
        self.latest: Verdict | None = None  # the last one in the log
        self._round: _Round | None = None  # the one under way, or the last one
        self._beginning = trio.Lock()
        self._nursery: trio.Nursery | None = None
        self._next_at = 0.0  # trio's time
        self._bad: Quarantine | None = None  # what this node has found out about itself
        self._found = trio.Event()
        peers.handle(CHECKPOINT, self._tell)
        peers.handle(COMPARE, self._answer)
        checkpoints.digested.append(lambda _: self._look_at_own())
        store.observe(self._observe, (ROW_KEY[:2],))
        store.replaced.append(self._replaced)
        self._read_row()

    # --- tasks ---

    async def run(self) -> None:
        """Compares as the leader, and notices what concerns this node, until cancelled."""
        self._next_at = trio.current_time() + self._period_s
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._quarantine_if_due)
            nursery.start_soon(self._stay_no_leader)
            while True:
                await trio.sleep(min(_LOOK_S, self._period_s))
                if self._leads and self._store.quarantine is None and trio.current_time() >= self._next_at:
                    try:
                        await (await self._begin(hurry=False)).over.wait()
                    except AspenError as error:
                        logger.debug("states not compared: %s", error)

    @property
    def _leads(self) -> bool:
        return self._store.consensus.leading and not self._store.alone

    async def _quarantine_if_due(self) -> None:
        while True:
            await self._found.wait()
            self._found = trio.Event()
            bad, self._bad = self._bad, None
            if bad is None or self._store.quarantine is not None:
                continue
            self._store.suspend(bad)
            try:
                await trio.to_thread.run_sync(quarantine.write, self._store.directory, bad)
            except OSError as error:
                logger.error("index=%d quarantine not written down, a start would not know of it: %s",
                             bad.index, error)  # fmt: skip

    async def _stay_no_leader(self) -> None:
        """A node in quarantine can lead, but it has no state to offer to others."""
        while True:
            await trio.sleep(_LOOK_S)
            if self._store.quarantine is not None and self._leads:
                await self._hand_over()

    # --- comparing, as the leader ---

    async def _begin(self, *, hurry: bool) -> _Round:
        """The comparison under way, or a new one. NoQuorum and so on."""
        async with self._beginning:
            found = self._round
            if found is None or found.over.is_set():
                index = await self._store.checkpoint()
                assert self._nursery is not None, "compared before `run`"
                found = self._round = _Round(index, hurry=hurry)
                self._nursery.start_soon(self._compare, found)
            found.hurry = found.hurry or hurry
            return found

    async def _compare(self, found: _Round) -> None:
        configuration = self._store.consensus.replica.raft.configuration
        try:
            with trio.move_on_after(DIGEST_AGE_MAX_S + _ASK_S):
                async with trio.open_nursery() as nursery:
                    for node in _members(configuration):
                        nursery.start_soon(self._ask, node, found)
            if not self._leads:
                return
            verdict = found.judged(configuration, self._clock.time_ns())
            logger.info("index=%d states compared: told=%d silent=%d differing=%s", verdict.index,
                        len(verdict.told), len(verdict.silent),
                        " ".join(map(str, verdict.differing)) or "none")  # fmt: skip
            if verdict.says_something:
                await self._store.txn([], [put(ROW_KEY, pack(verdict))])
            found.verdict = verdict
        except AspenError as error:
            logger.info("index=%d states not compared: %s", found.index, error)
        finally:
            self._plan(found)
            found.over.set()

    def _plan(self, found: _Round) -> None:
        """When to do it again: so that walking over states costs each member no more than it may."""
        verdict = found.verdict
        well = verdict is not None and not verdict.differing and not verdict.quarantined
        cpu_s = max((digest.cpu_s for digest in found.told.values()), default=0.0)
        pause_s = max(self._period_s if well else self._again_s, cpu_s * 100 / DIGEST_MEAN_PERCENT)
        self._next_at = trio.current_time() + pause_s

    async def _ask(self, node: int, found: _Round) -> None:
        """Until it has told, or will not; or this node leads no more."""
        failures = attempt = 0
        while self._leads:
            body = {"index": found.index, "hurry": found.hurry}
            try:
                if node == self._store.node_id:
                    answer = await self._tell(node, body)
                else:
                    answer = await self._peers.request(node, CHECKPOINT, body, timeout_s=_ASK_S)
                failures = 0
                match answer:
                    case {"digest": bytes(digest), "rows": int(rows), "cpu_ms": int(cpu_ms)}:
                        found.told[node] = Digest(found.index, digest, rows, cpu_ms / 1000)
                        return
                    case {"why": str(why)}:
                        found.silent[node] = why
                        return
            except AspenError as error:
                failures += 1
                if failures == _FAILURES_MAX:
                    found.silent[node] = str(error)
                    return
            await trio.sleep(_ASK_PAUSE_S[min(attempt, len(_ASK_PAUSE_S) - 1)])
            attempt += 1

    # --- requests ---

    async def _tell(self, node: int, body: Any) -> dict[str, Any]:
        """`state.checkpoint`."""
        match body:
            case {"index": int(index), "hurry": bool(hurry)}:
                pass
            case _:
                raise errors.InvalidArgument("a checkpoint is asked for by its index")
        if self._store.quarantine is not None:
            return {"why": IN_QUARANTINE}
        if hurry:
            self._checkpoints.hurry(index)
        found = self._checkpoints.find(index)
        if isinstance(found, Digest):
            return {"digest": found.digest, "rows": found.rows, "cpu_ms": int(found.cpu_s * 1000)}
        return {} if found is None else {"why": found}

    async def _answer(self, node: int, body: Any) -> dict[str, Any]:
        """`state.compare`."""
        if not self._leads or self._store.quarantine is not None:
            raise errors.NotLeader(leader=self._store.consensus.replica.raft.leader)
        match body:
            case {"index": int(index)}:
                pass
            case _:
                raise errors.InvalidArgument("a comparison is asked for by its index, or 0")
        found = self._round
        if not index or found is None or found.index != index:
            found = await self._begin(hurry=True)
        with trio.move_on_after(_ANSWER_S):
            await found.over.wait()
        if found.over.is_set() and found.verdict is None:
            raise errors.NoQuorum("the comparison came to nothing: try again")
        return {"index": found.index, "verdict": pack(found.verdict) if found.verdict is not None else None}

    async def compare(self, waits: Callable[[int], Awaitable[object]]) -> Verdict:
        """Has all members compared now; returns when they have told. `waits` is called with the index every
        few seconds until then. InvalidArgument on a node that is alone; Diverged on one in quarantine;
        NoQuorum, NotLeader, PeerUnreachable: no leader had it done."""
        if self._store.alone:
            raise errors.InvalidArgument("this node is alone: there is nothing to compare its state with")
        own, failures, index = self._store.node_id, 0, 0
        while True:
            if self._store.quarantine is not None:
                raise self._store.quarantine.error()
            leader, body = self._store.consensus.replica.raft.leader, {"index": index}
            try:
                if leader == own:
                    answer = await self._answer(own, body)
                elif leader:
                    answer = await self._peers.request(leader, COMPARE, body, timeout_s=_COMPARE_S)
                else:
                    raise errors.NoQuorum("there is no leader now: `aspen status` says why")
            except (errors.NoQuorum, errors.NotLeader, errors.PeerUnreachable):
                failures, index = failures + 1, 0
                if failures == _ATTEMPTS:
                    raise
                await trio.sleep(_LOOK_S)
                continue
            match answer:
                case {"index": int(index), "verdict": bytes(packed)}:
                    return unpack(packed)
                case {"index": int(index)}:
                    await waits(index)
                case _:
                    raise errors.ProtocolError(f"node {leader} answers what is no comparison")

    # --- what the log says ---

    def _observe(self, revision: int, events: Sequence[Event], origin: object) -> None:
        for event in events:
            if event.key == ROW_KEY:
                self._read_row()
                self._next_at = max(self._next_at, trio.current_time() + self._again_s)
                self._look_at_own()

    def _read_row(self) -> None:
        record = self._store.get(ROW_KEY)
        if record is not None:
            try:
                self.latest = unpack(record.value)
            except (ValueError, KeyError, TypeError) as error:
                logger.info("a comparison of states that this release does not understand: %r", error)

    def _replaced(self) -> None:
        self._checkpoints.forget()
        self._bad = None
        self._read_row()

    def _look_at_own(self) -> None:
        """This node's digest against the verdict, once it has both."""
        verdict = self.latest
        own = self._checkpoints.find(verdict.index) if verdict is not None else None
        if verdict is None or not verdict.digest or not isinstance(own, Digest):
            return
        if own.digest != verdict.digest:
            sources = tuple(node for node, digest in verdict.told.items() if digest == verdict.digest)
            self._bad = Quarantine(verdict.index, verdict.digest, own.digest, sources)
            self._found.set()
