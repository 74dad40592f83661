"""Who has entries and hears of commits when (ADR 0013), and proposals that have begun (ADR 0012)."""

import pytest

from aspenfs.cluster.messages import MessageType
from aspenfs.cluster.types import Role
from tests.cluster.replicas import Replicas


def test_a_majority_has_entries_at_once_and_the_rest_together_later() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    results: list[object] = []
    for number in range(10):
        results += leader.propose(b"%d" % number)
        cluster.settle()
    (far,) = leader.raft.can_wait
    near = 5 - far
    assert len(leader.applied) == 10
    assert leader.appends == {near: 10}
    assert len(cluster[near].applied) == 9  # of the last commit it hears with the next append
    assert cluster[far].applied == []
    leader.remember()
    cluster.settle()
    assert leader.appends[far] == 1
    leader.remember()
    cluster.settle()
    assert cluster[far].applied == cluster[near].applied == leader.applied
    assert not leader.remind_due  # nobody lacks anything


def test_five_have_two_that_can_wait() -> None:
    cluster = Replicas(5)
    leader = cluster.elect()
    leader.propose(b"a")
    cluster.settle()
    assert len(leader.raft.can_wait) == 2
    assert leader.applied == [b"a"]
    assert set(leader.appends) == {2, 3, 4, 5} - set(leader.raft.can_wait)


@pytest.mark.parametrize("asks", ["reads", "proposes"])
def test_who_asks_has_everything_at_once(asks: str) -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    leader.propose(b"a")
    cluster.settle()
    (far,) = leader.raft.can_wait
    answers: list[object] = []
    if asks == "reads":
        cluster[far].replica.read(answers.append)
        cluster[far].replica.pump()
        cluster.settle()
        assert cluster[far].applied == [b"a"]
    else:
        answers = cluster[far].propose(b"b")
        cluster.settle()
        assert cluster[far].applied == [b"a", b"b"]
    assert len(answers) == 1
    leader.propose(b"c")
    cluster.settle()
    assert cluster[far].applied[-1] == b"c"
    cluster.tick(5)
    leader.propose(b"d")
    cluster.settle()
    assert leader.raft.can_wait  # it has asked long ago
    assert b"d" not in cluster[leader.raft.can_wait[0]].applied


@pytest.mark.parametrize("trouble", ["cut off", "a slow disk"])
def test_if_a_majority_does_not_answer_in_time_all_have_everything_for_a_while(trouble: str) -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    leader.propose(b"a")
    cluster.settle()
    (far,) = leader.raft.can_wait
    near = 5 - far
    if trouble == "cut off":
        cluster.cut.add(near)
    else:
        cluster[near].syncs = False
    leader.propose(b"b")
    cluster.settle()
    assert leader.applied == [b"a"]
    leader.remember()
    leader.remember()
    cluster.settle()
    assert leader.applied == [b"a", b"b"]
    leader.propose(b"c")
    cluster.settle()
    assert leader.applied[-1] == b"c"
    assert leader.raft.can_wait == ()


def test_what_is_on_its_way_is_told_by_a_later_reminder() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    leader.propose(b"a")
    leader.remember()  # before the answers
    cluster.settle()
    assert leader.applied == [b"a"]
    assert leader.remind_due
    leader.remember()
    cluster.settle()
    leader.remember()
    cluster.settle()
    assert {tuple(node.applied) for node in cluster.nodes.values()} == {(b"a",)}
    assert not leader.remind_due


def test_a_follower_tells_nobody_anything() -> None:
    """The simulator found one that did: asked for a read, it sent what it had known as a leader."""
    cluster = Replicas(3)
    leader = cluster.elect()
    leader.propose(b"a")
    cluster.settle()
    leader.replica.transfer_leader(2)
    leader.replica.pump()
    cluster.settle()
    assert cluster[2].raft.role is Role.LEADER
    leader.appends.clear()
    leader.raft.tell()
    leader.remember()
    leader.replica.pump()
    assert not leader.appends


# --- what has begun ---


def test_it_shares_the_sync_of_what_comes_soon() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    results: list[object] = []
    tickets = leader.ticket
    assert leader.replica.begin(b"file", None, results.append)
    assert not cluster.sent
    leader.propose(b"bytes")
    assert leader.ticket == tickets + 1
    cluster.settle()
    assert leader.applied == [b"file", b"bytes"]
    assert len(results) == 1


def test_it_needs_a_lease_and_leadership() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    assert not cluster[2].replica.begin(b"a", None, print)
    assert leader.replica.begin(b"a", None, print)
    cluster.now_ns += 10_000_000_000
    assert not leader.replica.begin(b"b", None, print)


@pytest.mark.parametrize("where", ["in the queue", "in the log"])
def test_nothing_of_others_may_be_before_it(where: str) -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    if where == "in the queue":
        leader.syncs = False
        leader.propose(b"mine")  # a sync is under way
    cluster[2].propose(b"theirs")
    message = cluster.sent.pop()
    assert message.type == MessageType.PROP
    leader.replica.receive(message)
    if where == "in the log":
        leader.replica.pump()
    assert not leader.replica.begin(b"a", None, print)
    leader.syncs = True
    cluster.settle()
    assert b"theirs" in leader.applied
    assert leader.replica.begin(b"a", None, print)


def test_what_this_node_has_under_way_itself_may_be_before_it() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    leader.syncs = False
    leader.propose(b"a")
    assert leader.replica.begin(b"b", None, print)
    assert leader.replica.begin(b"c", None, print)
    leader.syncs = True
    cluster.settle()
    leader.replica.pump()
    cluster.settle()
    assert leader.applied == [b"a", b"b", b"c"]


def test_somebody_whose_proposer_has_given_up_may_not() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    cluster.cut |= {2, 3}
    results = leader.propose(b"a")
    cluster.now_ns += 11_000_000_000
    leader.replica._expire()
    leader.replica.pump()
    assert len(results) == 1
    cluster.now_ns -= 11_000_000_000  # it has its lease again
    assert not leader.replica.begin(b"b", None, print)


@pytest.mark.parametrize("lease", [True, False])
@pytest.mark.parametrize("syncing", [True, False])
def test_readers_elsewhere_see_it(lease: bool, syncing: bool) -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    if syncing:
        leader.syncs = False
        leader.propose(b"a")
    assert leader.replica.begin(b"b", None, print)
    if not lease:
        leader.replica.leases_allowed = lambda: False
    seen: list[list[bytes]] = []
    reader = cluster[3]
    reader.replica.read(lambda index: seen.append(list(reader.applied)))
    reader.replica.pump()
    for _ in range(3):
        cluster.settle()
        leader.syncs = True
    assert seen
    assert seen[0][-1] == b"b"


def test_under_another_leader_it_comes_again_once() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    results: list[object] = []
    cluster.cut.add(1)
    assert leader.replica.begin(b"mine", None, results.append)
    leader.replica.pump()
    cluster.tick(40)
    new = next(node for node in (cluster[2], cluster[3]) if node.raft.role is Role.LEADER)
    new.propose(b"theirs")
    cluster.settle()
    assert results == []
    cluster.cut.clear()
    cluster.tick(20)
    for node in cluster.nodes.values():
        node.remember()
    cluster.tick(20)
    assert leader.applied == new.applied == [b"theirs", b"mine"]
    assert len(results) == 1
