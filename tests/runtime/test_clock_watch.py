"""Nodes that look at each other's clocks: real stores, certificates and sockets, and clocks that go wrong."""

import logging
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from aspenfs.cli.cluster_status import _clock_figures
from aspenfs.cluster.types import NodeId
from aspenfs.kv.types import put
from aspenfs.runtime.clock_watch import KIND, ClockWatch
from aspenfs.runtime.cluster_view import clock_problem
from aspenfs.runtime.host import NodeStore
from aspenfs.runtime.identity import Life
from aspenfs.runtime.peering import Switch
from aspenfs.runtime.peers.network import PeerNetwork
from tests.runtime.peers.nodes import CLOCK, Row, make_authority, make_credentials
from tests.runtime.store_cluster import StoreCluster, grown, until

PERIOD_S = 0.1


class Clocks:
    """The system's, until told otherwise."""

    def __init__(self) -> None:
        self._since_ns = CLOCK.monotonic_ns()
        self._gain = 0.0
        self.slept_ns = 0

    def run(self, gain: float) -> None:
        """From now on; a share of the time that passes."""
        self._since_ns, self._gain = CLOCK.monotonic_ns(), gain

    def monotonic_ns(self) -> int:
        now = CLOCK.monotonic_ns()
        return now + int((now - self._since_ns) * self._gain) + self.slept_ns

    def awake_ns(self) -> int:
        return self.monotonic_ns() - self.slept_ns


class Part(NamedTuple):
    network: PeerNetwork
    watch: ClockWatch
    clocks: Clocks
    row: Row


class WatchedCluster(StoreCluster):
    """Voters that reach each other over TLS."""

    def __init__(self, directory: Path, nursery: trio.Nursery, old: frozenset[int]) -> None:
        super().__init__(directory, nursery)
        self.authority, self.old = make_authority(), old
        self.parts: dict[int, Part] = {}

    async def start(self, node: int, **options: Any) -> NodeStore:
        shown = make_credentials(self.directory / str(node), self.authority, node)
        store = await super().start(node, **options)
        consensus, switch, clocks = store.consensus, Switch(), Clocks()
        network = PeerNetwork(shown, Life(self.lives, self.lives), CLOCK, deliver=consensus.receive,
                              unreachable=consensus.unreachable)  # fmt: skip
        watch = ClockWatch(consensus, switch, clocks, self.lives, period_s=PERIOD_S)
        await self.nursery.start(network.run, ["127.0.0.1:0"])
        switch.attach(network)
        if node in self.old:
            del network.handlers[KIND]
        else:
            self.nursery.start_soon(watch.run)
        consensus.network = network
        row = Row((f"127.0.0.1:{network.ports[0]}",), born=shown.name.born)
        self.parts[node] = Part(network, watch, clocks, row)
        for part in self.parts.values():
            part.network.set_members({number: each.row for number, each in self.parts.items()})
        return store

    async def lead(self) -> tuple[int, NodeStore]:
        """Who leads, under a lease if it may."""
        await until(lambda: self.leader() is not None)
        leader = self.leader()
        assert leader is not None
        await leader.txn([], [put(b"k/a", b"1")])
        await leader.barrier()
        return leader.node_id, leader


def watched(
    directory: Path, count: int = 3, old: frozenset[int] = frozenset()
) -> AbstractAsyncContextManager[WatchedCluster]:
    """`old`: those who neither look nor tell."""
    return grown(lambda nursery: WatchedCluster(directory, nursery, old), count)


def names(node: int) -> str:
    return f"n{node}"


def loud(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


def test_on_one_machine_all_clocks_run_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with watched(tmp_path) as cluster:
            def measured() -> bool:
                return all(part.watch.rates.rates.keys() == cluster.parts.keys() - {node}
                           for node, part in cluster.parts.items())  # fmt: skip

            await until(measured)
            await trio.sleep(5 * PERIOD_S)
            for part in cluster.parts.values():
                for rate in part.watch.rates.rates.values():
                    assert rate.low_ppm <= 0 <= rate.high_ppm
                    assert rate.over_ns > 0
                assert not part.watch.rates.doubts
                figures = _clock_figures(part.watch.rates)
                assert figures["read_leases_off"] == figures["clocks_doubted"] == 0
                assert abs(figures["clock_gain_ppm"]) <= figures["clock_uncertainty_ppm"] + 1
            _, leader = await cluster.lead()
            await until(leader._replica.read_now)

    trio.run(main)
    assert loud(caplog) == []


@pytest.mark.parametrize("gain", [0.5, -0.3])
def test_a_clock_that_runs_otherwise_ends_leases_and_reads_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, gain: float
) -> None:
    async def main() -> None:
        async with watched(tmp_path) as cluster:
            node, leader = await cluster.lead()
            bad = min(cluster.parts.keys() - {node})
            cluster.parts[bad].clocks.run(gain)
            watches = {number: part.watch for number, part in cluster.parts.items()}
            await until(lambda: all(list(watch.rates.doubts) == [bad] for number, watch in watches.items()
                                    if number != bad))  # fmt: skip
            await until(lambda: watches[bad].rates.doubts.keys() == watches.keys() - {bad})
            for store in cluster.stores.values():
                done = await store.txn([], [put(b"k/a", b"%d" % store.node_id)])
                assert await store.barrier() >= done.revision
                assert not store._replica.read_now()
            assert not leader._replica._has_lease()
            problem = clock_problem(watches[node].rates.doubts, names)
            assert problem is not None
            assert problem.cause.endswith(f"n{bad}'s is {'fast' if gain > 0 else 'slow'}")
            assert "chronyc" in problem.advice
            figures = _clock_figures(watches[node].rates)
            assert (figures["read_leases_off"], figures["clocks_doubted"]) == (1, 1)
            assert (figures["clock_gain_ppm"] > 0) == (gain > 0)

    trio.run(main)
    told = loud(caplog)
    assert len(told) == 4  # each of two of one, that one of two; once
    assert all("clock: it gains" in line for line in told)


def test_a_machine_that_slept_says_so_and_uses_no_lease(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        async with watched(tmp_path, 2) as cluster:
            node, leader = await cluster.lead()
            await until(leader._replica.read_now)
            part = cluster.parts[node]
            part.clocks.slept_ns = 50_000_000
            assert not leader._replica.read_now()  # at once
            await until(lambda: part.watch.rates.leap_ns)
            await leader.barrier()
            assert not leader._replica.read_now()
            assert _clock_figures(part.watch.rates)["read_leases_off"] == 1

    trio.run(main)
    assert [line for line in loud(caplog) if "this machine has slept for 0.050 s" in line]


def test_a_node_of_an_older_release_hurts_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async with watched(tmp_path, 2, frozenset({2})) as cluster:
            watch = cluster.parts[1].watch
            await trio.sleep(3 * PERIOD_S)
            assert watch.rates.rates == {}
            _, leader = await cluster.lead()
            await until(leader._replica.read_now)

    trio.run(main)
    assert loud(caplog) == []


@pytest.mark.parametrize("told", [None, 7, (1,), ("1", 2), (1, -2), (1, 1 << 63), {"a": 1}, (1.5, 2)])
def test_an_answer_that_is_none_is_passed_over(tmp_path: Path, told: Any) -> None:
    class Liars:
        def handle(self, kind: str, handler: Any) -> None: ...

        async def request(self, to: NodeId, kind: str, body: Any, *, timeout_s: float) -> Any:
            await trio.lowlevel.checkpoint()
            return told

        def connected(self) -> frozenset[int]:
            return frozenset({2})

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            cluster = StoreCluster(tmp_path, nursery)
            await cluster.grow(2)
            watch = ClockWatch(cluster.stores[1].consensus, Liars(), CLOCK, 1)
            await watch.look()
            await watch.look()
            assert watch.rates.rates == {}
            assert watch.rates.leases_allowed()
            for node in list(cluster.stores):
                await cluster.stop(node)

    trio.run(main)


def test_without_doubts_there_is_no_problem() -> None:
    none: Mapping[int, Any] = {}
    assert clock_problem(none, names) is None
