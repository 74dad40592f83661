"""Joining, leaving, and everybody who must not get in; on clusters of the tests' own."""

import json
import re
import shutil
import time
from collections.abc import Iterator

import pytest

from tests.mount.clusters import NAME, Cluster, Node

pytestmark = pytest.mark.mount


@pytest.fixture(scope="module")
def pair() -> Iterator[Cluster]:
    """Two nodes in a cluster, and a third that tries to get in; it has nothing to begin with."""
    with Cluster(3) as cluster:
        first, second, _ = cluster
        first.init()
        second.join(cluster.ticket())
        yield cluster


@pytest.fixture
def stranger(pair: Cluster) -> Iterator[Node]:
    """The third node, with nothing on its disk; so it is afterwards, unless it was let in."""
    pair.extend()
    node = pair[3]
    assert not node.state.exists()
    yield node
    assert not node.state.exists(), "something was left behind"
    assert not node.is_mounted()
    assert len(members(pair[1])) == 2
    pair.rest()


def members(node: Node) -> dict[str, str]:
    """Roles by name."""
    return {row["name"]: row["role"] for row in json.loads(node.aspen("member", "list", "--json"))}


def refused_join(node: Node, ticket: str) -> str:
    return node.refused("join", ticket, str(node.mountpoint), *node.addresses)


# --- tickets ---


def test_ticket_create_says_what_to_run_on_the_new_host(pair: Cluster) -> None:
    said = pair[1].aspen("ticket", "create", "--ttl", "2h", "--learner").decode()
    found = re.search(r"^  aspen join (aspen1-\S+) /mnt/aspen --learner$", said, re.MULTILINE)
    assert found is not None, said
    listed = json.loads(pair[2].aspen("ticket", "list", "--json"))
    assert [one["state"] for one in listed] == ["open", "used"]
    assert (
        pair[2].aspen("ticket", "revoke", found[1]).decode().strip()
        == f"ticket {listed[0]['id']} is withdrawn"
    )
    assert len(json.loads(pair[1].aspen("ticket", "list", "--json"))) == 1


def test_ticket_lets_one_node_in_and_no_other(pair: Cluster, stranger: Node) -> None:
    (used,) = (one for one in json.loads(pair[1].aspen("ticket", "list", "--json")) if one["state"] == "used")
    ticket = pair.ticket()
    other = Node(2, pair.network, deadline_s=60)  # at the second node's place, but not that node
    try:
        said = other.refused("join", used["id"], str(other.mountpoint))
        assert "a join ticket begins with aspen1-" in said
    finally:
        other.close()
    pair[1].aspen("ticket", "revoke", ticket)
    said = refused_join(stranger, ticket)
    assert "the cluster knows no such ticket" in said
    assert "aspen ticket create" in said


def test_ticket_that_was_used_is_refused_and_names_who_used_it(pair: Cluster, stranger: Node) -> None:
    ticket = pair.ticket()
    stranger.join(ticket, "--learner")
    node = json.loads((stranger.state / "cluster.json").read_text())["node_id"]
    pair[1].aspen("member", "remove", f"n{stranger.number}")
    stranger.kill()
    wipe(stranger)
    assert f"node {node} has joined with this ticket" in refused_join(stranger, ticket)


def wipe(node: Node) -> None:
    """As a new disk would be."""
    node.pid = 0
    while node.is_mounted():
        node.run("umount", "-l", str(node.mountpoint))
    shutil.rmtree(node.state)


def test_expired_ticket_is_refused(pair: Cluster, stranger: Node) -> None:
    ticket = pair.ticket("--ttl", "1s")
    time.sleep(1.2)  # it is what is tested
    assert "the ticket is over" in refused_join(stranger, ticket)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda ticket: ticket[:-5], "damaged or cut off"),
        (lambda ticket: ticket[:20] + "A" + ticket[21:], "damaged"),
        (lambda ticket: "hello", "begins with aspen1-"),
    ],
)
def test_what_is_no_ticket_is_refused(pair: Cluster, stranger: Node, spoil: object, told: str) -> None:
    assert callable(spoil)
    assert told in refused_join(stranger, spoil(pair.ticket()))


def test_node_that_reaches_nobody_says_whom_it_tried(pair: Cluster, stranger: Node) -> None:
    ticket = pair.ticket()
    pair.isolate(stranger)
    try:
        said = refused_join(stranger, ticket)
    finally:
        pair.mend()
    for node in (1, 2):
        assert pair.network.advertise(node) in said


def test_state_directory_that_holds_a_node_is_not_joined_or_founded_anew(pair: Cluster) -> None:
    second = pair[2]
    before = sorted(path.name for path in second.state.iterdir())
    elsewhere = second.base / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    for command in (("init", NAME), ("join", pair.ticket())):
        said = second.refused(
            *command, str(elsewhere), "--listen", "127.0.0.1:0", "--advertise", "127.0.0.1:9"
        )
        assert f"of the cluster '{NAME}' already: nothing was changed" in said
        assert f"mount -t aspen {NAME}" in said
    assert sorted(path.name for path in second.state.iterdir()) == before
    assert second.sh("ls") == "cluster\nfiles\nkv\n"


def test_address_that_is_taken_is_refused_before_anything_is_made(pair: Cluster) -> None:
    other = Node(2, pair.network, deadline_s=60)
    try:
        for command in (("init", "another"), ("join", pair.ticket())):
            said = other.refused(*command, str(other.mountpoint), "--listen", pair.network.listen(2))
            assert f"cannot listen on {pair.network.listen(2)}" in said
        assert not other.state.exists()
    finally:
        other.close()


def test_join_that_is_interrupted_after_it_was_let_in_can_go_on(pair: Cluster, stranger: Node) -> None:
    """The mount fails: the place is taken by then, which cannot be known before."""
    stranger.join(pair.ticket(), "--learner")
    stranger.kill()
    assert members(pair[1])["n3"] == "learner"
    stranger.start()
    stranger.sh("ls files")
    pair[1].aspen("member", "remove", "n3")
    stranger.kill()
    wipe(stranger)


# --- one story ---


def test_members_come_change_and_go(own_cluster: Cluster) -> None:
    first, second, third = own_cluster
    first.init()
    assert "node 1 of the cluster 'demo' already" in first.refused("init", NAME, str(second.mountpoint))
    first.sh("mkdir files/d; echo early > files/d/f; echo early > kv/early")
    second.join(own_cluster.ticket())
    assert second.sh("cat files/d/f kv/early") == "early\nearly\n"
    third.join(own_cluster.ticket("--learner"), "--learner")
    assert members(third) == {"n1": "leader", "n2": "voter", "n3": "learner"}
    assert third.sh("cat files/d/f kv/early") == "early\nearly\n"
    assert third.aspen("member", "promote", "n3").decode().endswith("is a voter now\n")
    own_cluster.wait_healthy()

    said = second.aspen("leader", "transfer").decode()
    assert re.match(r"n[23] \(node \d+\) leads now", said)
    assert "n1 (node 1) leads now" in first.aspen("leader", "transfer", "n1").decode()
    assert "never" not in first.aspen("member", "demote", "n2").decode()
    assert members(first) == {"n1": "leader", "n2": "learner", "n3": "voter"}
    second.aspen("member", "promote", "n2")

    first.aspen("member", "remove", "n3")
    third.sh("true")
    own_cluster.wait_for(lambda: "removed" in str((third.status() or {}).get("problems")))
    assert "was removed, and never comes back" in first.refused("member", "promote", third_id(first))
    assert members(first) == {"n1": "leader", "n2": "voter"}
    third.kill()
    third.start("consistency=stale")  # what it has is its own; but it is no member
    own_cluster.wait_for(lambda: "removed" in str((third.status() or {}).get("problems")))
    assert "n3" not in members(second)
    first.sh("echo late > kv/late")
    assert "late" not in third.sh("ls kv")


def third_id(node: Node) -> str:
    rows = json.loads(node.aspen("member", "list", "--removed", "--json"))
    return next(str(row["id"]) for row in rows if row["name"] == "n3")


def test_node_whose_log_is_lost_is_refused_and_can_be_replaced(own_cluster: Cluster) -> None:
    first, second, third = own_cluster.start()
    first.sh("echo kept > files/kept")
    third.stop()
    shutil.rmtree(third.state / "wal")
    said = third.start_refused()
    assert "not the log that belongs to it" in said
    assert "aspen member remove" in said
    shutil.rmtree(third.state)
    assert "holds no cluster" in third.start_refused()
    first.aspen("member", "remove", "n3")
    third.join(own_cluster.ticket())
    assert third.sh("cat files/kept") == "kept\n"
    own_cluster.wait_healthy()
    assert len(set(own_cluster.digests().values())) == 1
    assert second.sh("cat files/kept") == "kept\n"


def test_node_made_without_a_network_gets_one_with_its_first_ticket(own_cluster: Cluster) -> None:
    first, second, _ = own_cluster
    first.sh("true", check=False)
    first.options = "create"  # as tools/up does
    first.start()
    first.options = ""
    first.sh("echo alone > kv/alone")
    listen, advertise = own_cluster.network.listen(1), own_cluster.network.advertise(1)
    said = first.aspen("ticket", "create", "--listen", listen, "--advertise", advertise).decode()
    assert f"this node listens on {listen} from now on, and is found at {advertise}" in said
    assert "has its addresses already" in first.refused("ticket", "create", "--listen", listen)
    second.join(own_cluster.ticket())
    assert second.sh("cat kv/alone") == "alone\n"
    first.stop()
    first.start()  # where it listens is kept
    assert first.sh("cat kv/alone", timeout_s=20) == "alone\n"


def test_the_certificate_authority_is_replaced_while_everything_goes_on(own_cluster: Cluster) -> None:
    first, second, third = own_cluster.start()
    before = {node.number: (node.state / "ca.crt").read_bytes() for node in own_cluster}
    leader = own_cluster.wait_leader()
    assert "is the only one" in leader.aspen("ca", "rotate").decode()
    for node in own_cluster:
        own_cluster.wait_for(lambda node=node: (node.state / "ca.crt").read_bytes() != before[node.number])
    assert len({(node.state / "ca.crt").read_bytes() for node in own_cluster}) == 1
    first.sh("echo after > files/after")
    assert third.sh("cat files/after") == "after\n"
    second.stop()
    second.start()
    own_cluster.wait_healthy()
