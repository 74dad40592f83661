"""Joining, changing, leaving, and everybody who must not get in."""

import json
import re
import shutil
import time
from collections.abc import Callable

import pytest

from aspenfs.runtime import identity
from aspenfs.runtime.peers import credentials
from aspenfs.runtime.system import SystemEntropy
from tests.mount.clusters import NAME, Cluster, Node
from tests.mount.mounting import alive

pytestmark = pytest.mark.mount


def members(node: Node) -> dict[str, str]:
    """Roles by name."""
    return {row["name"]: row["role"] for row in json.loads(node.aspen("member", "list", "--json"))}


def refused_join(node: Node, ticket: str) -> str:
    """What is said; and nothing is left behind."""
    said = node.refused("join", ticket, str(node.mountpoint), *node.addresses)
    assert not node.state.exists()
    assert not node.is_mounted()
    return said


def wipe(node: Node) -> None:
    """As if it had a new disk."""
    node.kill()
    node.pid = 0
    while node.is_mounted():
        node.run("umount", "-l", str(node.mountpoint))
    shutil.rmtree(node.state)


# --- tickets ---


def test_ticket_create_says_what_to_run_on_the_new_host(cluster: Cluster) -> None:
    first, second, third = cluster
    said = first.aspen("ticket", "create", "--ttl", "2h", "--learner").decode()
    found = re.search(r"^  aspen join (aspen1-\S+) /mnt/aspen --learner$", said, re.MULTILINE)
    assert found is not None, said
    (one,) = (one for one in json.loads(second.aspen("ticket", "list", "--json")) if one["state"] == "open")
    assert third.aspen("ticket", "revoke", found[1]).decode() == f"ticket {one['id']} is withdrawn\n"
    assert not [one for one in json.loads(first.aspen("ticket", "list", "--json")) if one["state"] == "open"]


def test_ticket_that_was_withdrawn_is_refused_and_says_how_to_get_another(
    cluster: Cluster, stranger: Node
) -> None:
    ticket = cluster.ticket()
    (one,) = (
        one for one in json.loads(cluster[1].aspen("ticket", "list", "--json")) if one["state"] == "open"
    )
    cluster[2].aspen("ticket", "revoke", one["id"][:6])
    said = refused_join(stranger, ticket)
    assert "the cluster knows no such ticket" in said
    assert "aspen ticket create" in said


def test_ticket_is_good_for_one_node_and_says_later_for_which(cluster: Cluster, stranger: Node) -> None:
    ticket = cluster.ticket("--learner")
    stranger.join(ticket, "--learner")
    node = json.loads((stranger.state / "cluster.json").read_text())["node_id"]
    assert members(stranger)["n4"] == "learner"
    assert "n4 (node" in cluster[2].insist("member", "remove", str(node))
    wipe(stranger)
    assert f"node {node} has joined with this ticket" in refused_join(stranger, ticket)
    assert "n4" not in members(cluster[1])


def test_a_join_that_ended_before_it_was_a_node_is_ended_by_the_same_command(
    cluster: Cluster, stranger: Node
) -> None:
    ticket = cluster.ticket("--learner")
    stranger.state.mkdir(mode=0o700)
    identity.give_birth(stranger.state, SystemEntropy())
    credentials.make_node_key(stranger.state)
    obstacle = stranger.state / "cluster.json.new"
    obstacle.mkdir()
    stranger.refused("join", ticket, str(stranger.mountpoint), *stranger.addresses, "--learner")
    rows = json.loads(cluster[1].aspen("member", "list", "--json"))
    (node,) = (row["id"] for row in rows if row["name"] == "n4")
    obstacle.rmdir()
    stranger.join(ticket, "--learner")
    assert json.loads((stranger.state / "cluster.json").read_text())["node_id"] == node
    assert "n4 (node" in cluster[2].insist("member", "remove", str(node))


def test_expired_ticket_is_refused(cluster: Cluster, stranger: Node) -> None:
    ticket = cluster.ticket("--ttl", "1s")
    time.sleep(1.2)  # it is what is tested
    assert "the ticket is over" in refused_join(stranger, ticket)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda ticket: ticket[:-5], "damaged or cut off"),
        (lambda ticket: ticket[:20] + ("A" if ticket[20] != "A" else "B") + ticket[21:], "damaged"),
        (lambda ticket: "hello", "begins with aspen1-"),
    ],
)
def test_what_is_no_ticket_is_refused(
    cluster: Cluster, stranger: Node, spoil: Callable[[str], str], told: str
) -> None:
    assert told in refused_join(stranger, spoil(cluster.ticket()))


def test_ticket_of_another_cluster_with_the_same_addresses_is_refused(
    cluster: Cluster, stranger: Node, another: Node
) -> None:
    another.init()
    ticket = another.aspen("ticket", "create", "--quiet").decode().strip()
    another.stop()
    shutil.rmtree(another.state)
    another.init()  # a new cluster of that name listens there now
    assert "another cluster than 'demo'" in refused_join(stranger, ticket)


def test_node_that_reaches_nobody_says_whom_it_tried(cluster: Cluster, stranger: Node) -> None:
    ticket = cluster.ticket()
    for node in cluster:
        cluster.part(stranger, node)
    said = refused_join(stranger, ticket)
    for node in cluster:
        assert cluster.network.advertise(node.number) in said


def test_join_to_an_address_where_nobody_finds_it_ends_and_is_mended_by_a_mount(
    cluster: Cluster, stranger: Node
) -> None:
    nowhere, here = (cluster.network.advertise(number) for number in (5, stranger.number))
    said = stranger.refused(
        "join",
        cluster.ticket(),
        str(stranger.mountpoint),
        "--listen",
        cluster.network.listen(stranger.number),
        "--advertise",
        nowhere,
        "--name",
        "n4",
    )
    assert f"others look for it at {nowhere}" in said
    assert "mount it with -o advertise=HOST:PORT" in said
    assert not stranger.is_mounted()
    assert not alive(int((stranger.state / "daemon.pid").read_text()))
    leader = cluster.wait_leader()
    cluster.wait_for(
        lambda: f"the learner n4 is unreachable at {nowhere}" in str((leader.status() or {}).get("problems"))
    )
    stranger.start(f"advertise={here}")
    cluster.wait_for(lambda: members(cluster[1])["n4"] == "voter")
    cluster[1].insist("member", "remove", "n4")


# --- state directories ---


def test_state_directory_that_holds_a_node_is_not_joined_or_founded_anew(cluster: Cluster) -> None:
    node = cluster[2]
    before = {path.name for path in node.state.iterdir()}
    elsewhere = node.base / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    for command in (("init", NAME), ("join", cluster.ticket())):
        said = node.refused(*command, str(elsewhere), "--listen", "127.0.0.1:0", "--advertise", "127.0.0.1:9")
        assert f"of the cluster '{NAME}' already: nothing was changed" in said
        assert f"mount -t aspen {NAME} {elsewhere}" in said
    assert {path.name for path in node.state.iterdir()} == before
    assert node.sh("ls") == "cluster\nfiles\nkv\n"


def test_address_that_is_taken_is_refused_before_anything_is_made(cluster: Cluster, stranger: Node) -> None:
    stranger.number = 2  # at the second node's place
    taken = cluster.network.listen(2)
    for command in (("init", "another"), ("join", cluster.ticket())):
        said = stranger.refused(*command, str(stranger.mountpoint), "--listen", taken)
        assert f"cannot listen on {taken}" in said
    assert not stranger.state.exists()


def test_node_made_without_a_network_gets_one_with_its_first_ticket(
    cluster: Cluster, stranger: Node, another: Node
) -> None:
    stranger.start("create")  # as tools/up does
    stranger.sh("echo alone > kv/alone")
    listen, advertise = cluster.network.listen(stranger.number), cluster.network.advertise(stranger.number)
    said = stranger.aspen("ticket", "create", "--listen", listen, "--advertise", advertise).decode()
    assert f"this node listens on {listen} from now on, and is found at {advertise}" in said
    assert "has its addresses already" in stranger.refused("ticket", "create", "--listen", listen)
    another.join(stranger.aspen("ticket", "create", "--quiet").decode().strip())
    assert another.sh("cat kv/alone") == "alone\n"
    stranger.stop()
    stranger.start()  # where it listens is kept
    assert stranger.sh("cat kv/alone", timeout_s=20) == "alone\n"


# --- members ---


def test_members_change_their_roles(cluster: Cluster, stranger: Node) -> None:
    first, second, third = cluster
    first.sh("mkdir files/early; echo early > files/early/f; echo early > kv/early")
    stranger.join(cluster.ticket(), "--learner")
    assert stranger.sh("cat files/early/f kv/early") == "early\nearly\n"
    assert members(stranger)["n4"] == "learner"
    assert stranger.insist("member", "promote", "n4").endswith("is a voter now\n")
    cluster.wait_healthy()

    def goes_to_it_and_away() -> bool:
        said = stranger.insist("leader", "transfer", "n4")
        assert re.fullmatch(r"n4 \(node \d+\) leads now\n", said)
        return bool(re.fullmatch(r"n[123] \(node \d+\) leads now\n", second.insist("leader", "transfer")))

    cluster.wait_for(goes_to_it_and_away)  # at once, unless another has been elected in between
    assert third.insist("member", "demote", "n4").endswith("is a learner now\n")
    cluster.wait_for(lambda: sorted(members(first).values()) == ["leader", "learner", "voter", "voter"])
    third.insist("member", "remove", "n4")
    cluster.wait_for(lambda: "was removed" in str((stranger.status() or {}).get("problems")))


def test_member_that_was_removed_gets_nothing_any_more(cluster: Cluster, stranger: Node) -> None:
    first, second, _ = cluster
    stranger.join(cluster.ticket())
    first.insist("member", "remove", "n4")
    cluster.wait_for(lambda: "was removed" in str((stranger.status() or {}).get("problems")))
    stranger.kill()
    stranger.start("consistency=stale")  # what it has is its own; but it is no member
    assert "warning: this node was removed from the cluster" in stranger.said
    cluster.wait_for(lambda: "was removed" in str((stranger.status() or {}).get("problems")))
    second.sh("echo late > kv/late")
    assert "late" not in stranger.sh("ls kv")
    rows = json.loads(first.aspen("member", "list", "--removed", "--json"))
    node = max((row for row in rows if row["name"] == "n4"), key=lambda row: bool(row["state"] == "removed"))
    assert node["state"] == "removed"
    assert "was removed, and never comes back" in first.refused("member", "promote", str(node["id"]))
    assert "no member 'n4'" in first.refused("member", "demote", "n4")


@pytest.mark.parametrize("asked", ["the leader", "another"])
def test_leader_is_removed_and_its_host_joins_again_under_its_name(own_cluster: Cluster, asked: str) -> None:
    cluster = own_cluster.start()
    leader = cluster.wait_leader()
    name, others = f"n{leader.number}", [node for node in cluster if node is not leader]
    others[0].sh("echo kept > files/kept")
    node = leader if asked == "the leader" else others[0]
    assert "is removed" in node.aspen("member", "remove", name).decode()  # the first time
    cluster.wait_for(lambda: "was removed" in str((leader.status() or {}).get("problems")))
    for other in others:
        assert sorted(members(other).values()) == ["leader", "voter"]
    cluster.wait_for(lambda: all((other.status() or {}).get("problems") == [] for other in others))
    wipe(leader)
    leader.join(cluster.ticket())
    cluster.wait_healthy()
    assert leader.sh("cat files/kept") == "kept\n"
    assert sorted(members(leader)) == ["n1", "n2", "n3"]


def test_node_whose_log_is_lost_is_refused_and_can_be_replaced(cluster: Cluster) -> None:
    first, _, third = cluster
    first.sh("echo kept > files/after-loss")
    third.stop()
    shutil.rmtree(third.state / "wal")
    said = third.start_refused()
    assert "not the log that belongs to it" in said
    assert "aspen member remove" in said
    shutil.rmtree(third.state)
    assert "holds no cluster" in third.start_refused()
    first.insist("member", "remove", "n3")
    third.join(cluster.ticket())
    assert third.sh("cat files/after-loss") == "kept\n"


def test_certificate_authority_is_replaced_while_everything_goes_on(cluster: Cluster) -> None:
    before = {node.number: (node.state / "ca.crt").read_bytes() for node in cluster}
    assert "to trust the new CA" in cluster.wait_leader().aspen("ca", "rotate").decode()
    cluster.wait_for(lambda: len({(node.state / "ca.crt").read_bytes() for node in cluster}) == 1)
    assert (cluster[1].state / "ca.crt").read_bytes() != before[1]
    cluster[1].sh("echo after > files/rotated")
    for node in cluster:
        assert node.sh("cat files/rotated") == "after\n"
    cluster[2].stop()
    cluster[2].start()
