"""How far each member is behind the leader's log, in entries, as any node can show it.

Only a leader knows. The others ask it now and then, so that `aspen status` and `cluster/members` say the
same everywhere without waiting for anybody: what they show is at most two intervals old.

    member.lags   nil   ->   array of (node id, entries behind)     of a leader; NotLeader elsewhere
"""

import logging
from collections.abc import Mapping
from typing import Any, Final, Protocol

import trio

from aspenfs import errors
from aspenfs.cluster.types import NodeId
from aspenfs.runtime.consensus import Consensus

logger = logging.getLogger(__name__)

KIND: Final = "member.lags"
_INTERVAL_S: Final = 1.0
_TOLD_S: Final = 5.0  # what the leader told so long ago is not shown any more


class Requests(Protocol):
    """Asking another node: `runtime.peers.PeerNetwork`."""

    async def request(self, to: NodeId, kind: str, body: Any, *, timeout_s: float) -> Any: ...


class Lags:
    """`run` as long as there is a network."""

    def __init__(self, consensus: Consensus) -> None:
        self._consensus = consensus
        self._told: Mapping[int, int] = {}
        self._told_at = float("-inf")

    def of(self, node: int) -> int | None:
        """Entries behind the leader; None if nobody knows."""
        if self._consensus.leading:
            return self._own().get(node)
        if trio.current_time() - self._told_at > _TOLD_S:
            return None
        return self._told.get(node)

    def _own(self) -> dict[int, int]:
        """Of a leader. Who has not answered it yet may have all or nothing."""
        raft = self._consensus.replica.raft
        known = {node: each.match for node, each in raft.progress().items() if each.match}
        lags = {node: max(0, raft.last_index - match) for node, match in known.items()}
        return {**lags, raft.node_id: 0}

    async def answer(self, sender: NodeId, body: Any) -> list[tuple[int, int]]:
        """The request of another node."""
        if not self._consensus.leading:
            raise errors.NotLeader(leader=self._consensus.replica.raft.leader)
        return list(self._own().items())

    async def run(self, requests: Requests) -> None:
        """Asks the leader until cancelled."""
        while True:
            await trio.sleep(_INTERVAL_S)
            raft = self._consensus.replica.raft
            if self._consensus.leading or not raft.leader:
                continue
            try:
                told = await requests.request(NodeId(raft.leader), KIND, None, timeout_s=_INTERVAL_S)
            except errors.AspenError as error:
                logger.debug("leader=%d does not tell: %s", raft.leader, error)
                continue
            match told:
                case tuple() if all(type(each) is tuple and len(each) == 2 for each in told):
                    self._told, self._told_at = dict(told), trio.current_time()
