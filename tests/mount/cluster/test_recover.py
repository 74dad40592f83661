"""A cluster that lost its majority, or all of its nodes, goes on as a new one, and the old is shut out."""

import json
import os
import shutil

import pytest

from tests.mount.clusters import Cluster

pytestmark = [pytest.mark.mount, pytest.mark.timeout(300)]

LARGE = "head -c 3000000 /dev/urandom > files/large; sha256sum files/large > files/sum"


def test_a_survivor_goes_on_as_a_new_cluster(own_cluster: Cluster) -> None:
    cluster = own_cluster.start()
    one, two, three = cluster
    one.sh(LARGE)
    one.aspen("kv", "put", "app/db", "kept")
    cluster.wait_healthy()
    old = json.loads(one.aspen("status", "--json"))["daemon"]

    two.kill()
    three.kill()
    cluster.wait_for(lambda: cluster.leader() is None)
    backup = str(one.base / "survivor.aspen")
    assert "majority" in one.refused("backup", backup)
    assert not os.path.exists(backup)
    assert b"chunks" in one.aspen("backup", "--stale", backup)
    assert b"is whole" in one.aspen("backup", "--verify", backup)
    assert "unmount it first" in one.refused("recover", "--force-new-cluster", "--yes")
    one.kill()

    said = one.aspen("recover", "--force-new-cluster", check=False).decode()
    assert "n2 (" in said
    assert "n3 (" in said
    told = json.loads(one.aspen("recover", "--force-new-cluster", "--yes", "--json"))
    assert told["missing_chunks"] == 0
    one.start()
    one.sh("sha256sum -c files/sum; echo new > files/new")
    assert one.aspen("kv", "get", "app/db") == b"kept"
    one.aspen("kv", "put", "app/db", "goes on")
    new = json.loads(one.aspen("status", "--json"))["daemon"]
    assert new["cluster_id"] == told["cluster_id"] != old["cluster_id"]

    # An old member comes back: it finds nobody, and does not get in.
    members = one.aspen("member", "list").decode()
    two.start()
    assert "majority" in two.refused("kv", "put", "app/db", "from the past")
    two.kill()
    assert one.aspen("member", "list").decode() == members

    cluster.extend()
    # It is welcome with an empty directory.
    for node in (two, three):
        shutil.rmtree(node.state)
        node.join(cluster.ticket())
    cluster.wait_healthy()
    for node in cluster:
        node.sh("sha256sum -c files/sum; test $(cat files/new) = new")
    assert len(set(cluster.digests().values())) == 1


def test_a_backup_of_a_follower_is_restored_and_others_join_it(own_cluster: Cluster) -> None:
    cluster = own_cluster.start()
    one, two, three = cluster
    one.sh(LARGE)
    follower = next(node for node in cluster if node is not cluster.leader())
    backup = str(one.base / "demo.aspen")
    follower.aspen("backup", backup)
    for node in cluster:
        node.kill()
        shutil.rmtree(node.state)
    cluster.extend()
    one.aspen("restore", backup)
    one.start()
    one.sh("sha256sum -c files/sum; echo new > files/new")
    for node in (two, three):
        node.join(cluster.ticket())
    cluster.wait_healthy()
    for node in cluster:
        node.sh("sha256sum -c files/sum; test $(cat files/new) = new")
    assert len(set(cluster.digests().values())) == 1
