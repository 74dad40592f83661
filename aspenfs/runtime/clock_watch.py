"""Looks at the clocks of the other voters, so that a leader here knows whether it may count on its lease.

Belongs here: asking, answering, the log. Not here: what follows from readings (`cluster/clock_rates.py`).

    clock.read   nil   ->   array of (number of the start, boot time in ns)

A node that does not know the kind (of an older release), or is not reached, tells nothing of its clock: then
leases rest on what is supposed of it, as long as nothing else is known.
"""

import logging
from collections.abc import Awaitable, Callable, Set
from typing import Any, Final, Protocol

import trio

from aspenfs import errors
from aspenfs.cluster.clock_rates import ClockRates, Reading
from aspenfs.cluster.types import NodeId
from aspenfs.limits import CLOCK_CLEAN_S, CLOCK_DOUBT_PPM, CLOCK_READINGS, CLOCK_SAMPLE_S
from aspenfs.runtime.consensus import Consensus

logger = logging.getLogger(__name__)

KIND: Final = "clock.read"
_ANSWER_S: Final = 2.0  # what takes longer says nothing within the hour
_NS_PER_S: Final = 1_000_000_000
_OWN: Final = 0  # nobody's id: stands for the own clock


class Clocks(Protocol):
    """Of this machine: `system.SystemClock`."""

    def monotonic_ns(self) -> int:
        """CLOCK_BOOTTIME."""

    def awake_ns(self) -> int:
        """CLOCK_MONOTONIC: stands still while the machine sleeps."""


class Requests(Protocol):
    """Asking other nodes: `peering.Switch`."""

    def handle(self, kind: str, handler: Callable[[NodeId, Any], Awaitable[Any]]) -> None: ...

    async def request(self, to: NodeId, kind: str, body: Any, *, timeout_s: float) -> Any: ...

    def connected(self) -> Set[Any]: ...


class ClockWatch:
    """`run` as long as the node runs. From its construction on it decides whether leases may be used."""

    def __init__(self, consensus: Consensus, requests: Requests, clocks: Clocks, incarnation: int, *,
                 period_s: float = CLOCK_SAMPLE_S) -> None:  # fmt: skip
        """`incarnation`: greater with each start of this node."""
        self._consensus, self._requests, self._incarnation = consensus, requests, incarnation
        self._boot_ns, self._period_s = clocks.monotonic_ns, period_s
        self.rates = ClockRates(clocks.monotonic_ns, clocks.awake_ns)
        self._told: Set[int] = frozenset()  # whose clocks the log says are doubted
        consensus.replica.leases_allowed = self.rates.leases_allowed
        requests.handle(KIND, self._answer)

    async def _answer(self, sender: NodeId, body: Any) -> tuple[int, int]:
        return self._incarnation, self._boot_ns()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self.look()
            await trio.sleep(self._period_s)

    async def look(self) -> None:
        """Once at all clocks."""
        raft = self._consensus.replica.raft
        configuration = raft.configuration
        voters = {*configuration.voters, *configuration.outgoing} - {raft.node_id}
        self.rates.look()
        self.rates.keep(voters)
        async with trio.open_nursery() as nursery:
            for node in sorted(voters & self._requests.connected()):
                nursery.start_soon(self._sample, NodeId(node))
        self._tell()

    async def _sample(self, node: NodeId) -> None:
        readings: list[Reading] = []
        life = 0
        try:
            for _ in range(CLOCK_READINGS):
                sent_ns = self._boot_ns()
                told = await self._requests.request(node, KIND, None, timeout_s=_ANSWER_S)
                received_ns = self._boot_ns()
                of_life, peer_ns = _checked(told)
                if of_life != life:
                    readings, life = [], of_life
                readings.append(Reading(sent_ns, peer_ns, received_ns))
        except errors.AspenError as error:
            logger.debug("node=%d does not tell its clock: %s", node, error)
        if readings:
            self.rates.sampled(node, life, readings)

    def _tell(self) -> None:
        """The log what has changed."""
        rates = self.rates
        doubts = rates.doubts
        for node in doubts.keys() - self._told:
            rate = doubts[node]
            logger.warning(
                "node=%d clock: it gains %+d to %+d ppm on this node's (over %d s; more than %d is doubted): "
                "no reads under a lease here until it has run well for %d s; aspen status tells more",
                node, rate.low_ppm, rate.high_ppm, rate.over_ns // _NS_PER_S, CLOCK_DOUBT_PPM, CLOCK_CLEAN_S,
            )  # fmt: skip
        if rates.leap_ns and _OWN not in self._told:
            logger.warning("clock: this machine has slept for %.3f s: no reads under a lease here for %d s",
                           rates.leap_ns / _NS_PER_S, CLOCK_CLEAN_S)  # fmt: skip
        now = {*doubts, _OWN} if rates.leap_ns else set(doubts)
        for node in self._told - now:
            logger.info("node=%d clock: doubted no more", node or self._consensus.replica.raft.node_id)
        self._told = now


def _checked(told: Any) -> tuple[int, int]:
    """Life and boot time, of whoever it comes from. ProtocolError."""
    match told:
        case (int(life), int(boot_ns), *_) if 0 <= life < 1 << 63 and 0 <= boot_ns < 1 << 63:
            return life, boot_ns
    raise errors.ProtocolError(f"not the reading of a clock: {str(told)[:80]}")
