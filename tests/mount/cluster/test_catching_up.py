"""Nodes that were away, and nodes that are new: they get what they lack, by the log or as a whole state."""

import pytest

from aspenfs.limits import MIB, RAFT_LOG_BYTES_MAX
from tests.mount.clusters import Cluster, Node

pytestmark = pytest.mark.mount
WHOLE_STATE = "the log does not reach back: fetching the state"


def away(cluster: Cluster) -> tuple[Node, Node]:
    """A node that does not lead, killed, and one that goes on."""
    leader = cluster.wait_leader()
    gone, other = (node for node in cluster if node is not leader)
    gone.kill()
    gone.new_log()
    return gone, other


def test_node_that_was_away_for_a_while_catches_up_by_the_log(cluster: Cluster) -> None:
    gone, other = away(cluster)
    other.sh("mkdir -p files/away; for i in $(seq 100); do echo $i > files/away/$i; done")
    gone.start()
    assert gone.sh("cat files/away/* | sort -n | tail -1") == "100\n"
    cluster.wait_healthy()
    assert WHOLE_STATE not in gone.new_log()


def test_node_that_was_away_for_long_gets_the_state_as_a_whole(cluster: Cluster) -> None:
    gone, other = away(cluster)
    count = RAFT_LOG_BYTES_MAX // MIB + 8
    other.sh(
        "mkdir -p kv/long; head -c 1000000 /dev/urandom > /tmp/$$.value\n"
        f"for i in $(seq {count}); do dd if=/tmp/$$.value of=kv/long/$i bs=1M status=none; done\n"
        "rm /tmp/$$.value"
    )
    wanted = other.sh("cat kv/long/* | md5sum")
    gone.start()
    assert gone.sh("cat kv/long/* | md5sum") == wanted
    cluster.wait_healthy()
    assert WHOLE_STATE in gone.new_log()
    other.sh("rm -r kv/long")


def test_new_node_gets_files_whose_bytes_are_not_in_the_log(cluster: Cluster, stranger: Node) -> None:
    first = cluster[1]
    first.sh("mkdir files/chunks")
    for number in range(4):
        first.sh(f"dd if=/dev/urandom of=files/chunks/{number} bs=1M count=2 status=none")
    wanted = first.sh("md5sum files/chunks/*")
    stranger.join(cluster.ticket(), "--learner")
    assert stranger.sh("md5sum files/chunks/*") == wanted
    first.insist("member", "remove", "n4")
