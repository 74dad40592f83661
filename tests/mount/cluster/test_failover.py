"""Nodes that die, stop, or are cut off: the others go on, nothing acknowledged is lost, they come back."""

import time

import pytest

from tests.mount.clusters import Cluster, Ended, Node

pytestmark = pytest.mark.mount
FAILOVER_S = 2.0  # from the leader's death to the first write at another node that has returned
ATTEMPTS = 4  # on a busy machine the programs alone may take as long, or an election comes to nothing


def others(cluster: Cluster, node: Node) -> list[Node]:
    return [other for other in cluster if other is not node]


def test_what_is_written_at_one_mount_is_read_at_every_other_one(cluster: Cluster) -> None:
    for node in cluster:
        node.sh(f"mkdir -p files/d{node.number} && echo {node.number} > files/d{node.number}/f")
        node.sh(f"echo {node.number} > kv/key-{node.number}")
        for other in cluster:
            assert other.sh(f"cat files/d{node.number}/f kv/key-{node.number}") == f"{node.number}\n" * 2


def test_a_large_file_is_the_same_at_every_mount(cluster: Cluster) -> None:
    first, second, third = cluster
    first.sh("dd if=/dev/urandom of=files/large bs=1M count=20 status=none")
    sums = {node.sh("md5sum < files/large") for node in cluster}
    assert len(sums) == 1
    first.kill()
    assert second.sh("md5sum < files/large") in sums
    assert third.sh("md5sum < files/large") in sums


def test_after_the_death_of_the_leader_a_write_returns_within_two_seconds(cluster: Cluster) -> None:
    elapsed = []
    for attempt in range(ATTEMPTS):
        leader = cluster.wait_leader()
        leader.sh(f"echo before {attempt} > files/acknowledged")
        survivor, other = others(cluster, leader)
        survivor.sh("ls files > /dev/null")
        leader.kill()
        begun = time.monotonic()
        survivor.sh(f"echo after {attempt} > files/first", timeout_s=20)
        elapsed.append(time.monotonic() - begun)
        told = other.sh("cat files/acknowledged files/first")
        assert told == f"before {attempt}\nafter {attempt}\n"
        if elapsed[-1] < FAILOVER_S:
            return
        cluster.extend()
        cluster.revive()
        cluster.wait_healthy()
    raise AssertionError(f"it took {elapsed} s")


def test_a_leader_that_was_stopped_longer_than_its_lease_serves_nothing_old(cluster: Cluster) -> None:
    old = cluster.wait_leader()
    other, _ = others(cluster, old)
    old.sh("echo old > kv/stopped; cat kv/stopped")
    old.pause()
    other.sh("echo new > kv/stopped", timeout_s=20)
    old.resume()
    assert old.sh("cat kv/stopped", timeout_s=20) == "new\n"


def test_a_leader_that_is_cut_off_is_replaced_and_comes_back(cluster: Cluster) -> None:
    old = cluster.wait_leader()
    other, _ = others(cluster, old)
    cluster.isolate(old)
    other.sh("echo new > files/cut-off", timeout_s=20)
    cluster.wait_leader(but=old)
    cluster.mend()
    assert old.sh("cat files/cut-off", timeout_s=20) == "new\n"


@pytest.mark.parametrize("direction", ["hears nobody", "is heard by nobody"])
def test_a_leader_of_which_one_direction_is_cut_does_not_stop_the_others(
    cluster: Cluster, direction: str
) -> None:
    old = cluster.wait_leader()
    other, last = others(cluster, old)
    for node in (other, last):
        ways = (node, old) if direction == "hears nobody" else (old, node)
        cluster.network.cut(ways[0].number, ways[1].number)
    other.sh(f"echo {direction} > files/one-way", timeout_s=20)
    assert last.sh("cat files/one-way", timeout_s=20) == f"{direction}\n"
    cluster.mend()
    assert old.sh("cat files/one-way", timeout_s=20) == f"{direction}\n"


def test_after_the_end_of_all_nodes_everything_is_there(cluster: Cluster) -> None:
    leader = cluster.wait_leader()
    leader.sh("mkdir files/kept && cp -r /etc/ssl files/kept/ 2>/dev/null; echo v > kv/kept")
    wanted = leader.sh("find files/kept -type f | sort | xargs md5sum")
    digests = cluster.digests()
    for node in cluster:
        node.kill()
    for node in cluster:
        with pytest.raises(Ended):
            node.sh("cat kv/kept", timeout_s=10)
    cluster.revive()
    for node in cluster:
        assert node.sh("find files/kept -type f | sort | xargs md5sum") == wanted
        assert node.sh("cat kv/kept") == "v\n"
    assert len(set(digests.values())) == 1


def test_a_node_that_ends_by_umount_leaves_and_comes_back_by_its_name_alone(cluster: Cluster) -> None:
    node = cluster.wait_leader()
    other, _ = others(cluster, node)
    node.stop()
    other.sh("echo meanwhile > files/umounted", timeout_s=20)
    node.start()
    assert node.sh("cat files/umounted") == "meanwhile\n"


def test_a_node_that_is_killed_as_soon_as_it_is_mounted_can_be_mounted_again(cluster: Cluster) -> None:
    node, _ = others(cluster, cluster.wait_leader())
    for delay_s in (0, 0.05, 0.2) * 2:
        node.kill()
        node.start()
        time.sleep(delay_s)
    assert node.sh("cat cluster/health") == "ok\n"
