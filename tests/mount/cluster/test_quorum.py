"""Without a majority: writes fail with a clear error after a bounded time, stale mounts go on reading."""

import errno
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from aspenfs.limits import PROPOSAL_TIMEOUT_MS
from tests.mount.clusters import Cluster, Ended

pytestmark = pytest.mark.mount
TIMED_OUT = os.strerror(errno.ETIMEDOUT)
PATIENCE_S = PROPOSAL_TIMEOUT_MS / 1000
SPARE_S = 8.0  # a few round trips, and the start of the programs on a busy machine


def test_a_minority_refuses_writes_and_fresh_reads_and_stale_mounts_go_on_reading(cluster: Cluster) -> None:
    first, second, third = cluster
    # Each waits in a directory of its own: the kernel has a directory locked while it waits for a name in it.
    first.sh("echo there > files/there; echo there > kv/there; mkdir files/elsewhere")
    third.stop()
    third.start("consistency=stale")
    third.sh("cat files/there kv/there")
    cluster.isolate(first)
    cluster.part(second, third)
    cluster.wait_for(lambda: cluster.leader() is None)
    with ThreadPoolExecutor() as pool:
        begun = time.monotonic()
        waiting = [
            pool.submit(refusal, lambda: third.sh("echo new > files/elsewhere/new")),
            pool.submit(refusal, lambda: second.sh("cat files/there")),
            pool.submit(refusal, lambda: first.sh("echo new > kv/new")),
            pool.submit(first.refused, "kv", "put", "there", "new"),
        ]
        assert third.sh("cat files/there kv/there; ls files | grep -c there") == "there\nthere\n1\n"
        assert time.monotonic() - begun < SPARE_S
        for each in waiting[:-1]:
            assert TIMED_OUT in each.result()
        told = waiting[-1].result()
        assert time.monotonic() - begun < 2 * PATIENCE_S + SPARE_S  # bash looks the name up, then opens it
    assert "majority" in told
    assert "`aspen status` shows which voters are missing" in told
    status = third.status()
    assert status is not None
    assert status["problems"][0]["cause"] == "no quorum: 2 of 3 voters unreachable: n1, n2"
    assert "not ok" in third.sh("cat cluster/health")
    third.kill()
    cluster.mend()
    third.start("")
    assert third.sh("cat kv/there", timeout_s=20) == "there\n"


def refusal(act: Callable[[], object]) -> str:
    with pytest.raises(Ended) as caught:
        act()
    return str(caught.value)


def test_when_one_of_three_is_away_everybody_says_so_and_writes_go_on(cluster: Cluster) -> None:
    leader = cluster.wait_leader()
    away, other = (node for node in cluster if node is not leader)
    away.kill()
    cause = f"1 of 3 voters unreachable: n{away.number}; writes go on"
    statuses: list[dict[str, Any]] = []

    def says_so() -> bool:
        statuses[:] = filter(None, [leader.status()])
        return [problem["cause"] for status in statuses for problem in status["problems"]] == [cause]

    cluster.wait_for(says_so)
    (status,) = statuses
    assert f"aspen member remove n{away.number}" in status["problems"][0]["advice"]
    (row,) = (row for row in status["members"] if row["name"] == f"n{away.number}")
    assert (row["state"], bool(row["since"])) == ("unreachable", True)
    assert "unreachable for" in leader.aspen("member", "list").decode()

    def shows() -> bool:
        shown = leader.run("aspen", "status", check=False)
        assert shown.returncode == 1
        return shown.stdout.decode().startswith("not healthy\n  ! 1 of 3 voters unreachable")

    cluster.wait_for(shows)  # while there is no leader, that comes first
    other.sh("echo on > files/goes-on")
    assert leader.sh("cat files/goes-on") == "on\n"
