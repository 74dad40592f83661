"""A node with a bad state: its log goes on and counts, it applies nothing, it takes over another state."""

import pytest

from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.types import Entry, Role, Snapshot
from tests.cluster.network import Cluster

ELECTION_TICKS = 14


def suspended() -> Cluster:
    """1 leads, 3 has applied what was proposed, and applies nothing any more."""
    cluster = Cluster()
    cluster.elect(1)
    cluster.propose(1, b"a", b"b")
    cluster.settle()
    cluster.tick(2)
    assert cluster[3].data == [b"a", b"b"]
    cluster[3].raft.suspended = True
    return cluster


def take_over(cluster: Cluster, source: int) -> None:
    """3 gets the state that `source` has applied, as far as its log leads on from there."""
    node, state = cluster[3], cluster[source].state
    assert node.raft.keeps_log(state.snapshot(state.index))
    node.state = state.until(state.index)
    node.apply = _behind(cluster, state.index)  # type: ignore[method-assign]
    node.raft.suspended = False


def _behind(cluster: Cluster, index: int):  # type: ignore[no-untyped-def]
    node = cluster[3]
    apply = type(node).apply

    def passing_over(entries: list[Entry]) -> None:
        apply(node, [entry for entry in entries if entry.index > index])
        if entries and entries[-1].index <= index:
            node.raft.applied_to(entries[-1].index)

    return passing_over


def test_its_log_goes_on_and_counts_and_nothing_is_applied() -> None:
    cluster = suspended()
    cluster.isolate(2)
    cluster.propose(1, b"c", b"d")
    cluster.settle()
    cluster.tick(4)
    assert cluster[1].data == [b"a", b"b", b"c", b"d"]  # committed with the help of 3
    assert cluster[3].raft.commit == cluster[1].raft.commit
    assert cluster[3].data == [b"a", b"b"]
    cluster[3].raft.suspended = False
    cluster.settle()
    assert cluster[3].data == cluster[1].data


def test_it_votes_and_may_lead() -> None:
    cluster = suspended()
    cluster[1].crash()
    cluster.tick(3 * ELECTION_TICKS)
    assert cluster[2].leads
    cluster[1].start()
    cluster.tick(4)
    cluster[2].raft.transfer_leader(3)
    cluster.settle()
    assert cluster[3].leads
    cluster[2].crash()
    cluster.propose(3, b"c")
    cluster.settle()
    cluster.tick(4)
    assert cluster[1].data == [b"a", b"b", b"c"]
    assert cluster[3].data == [b"a", b"b"]


def test_a_log_that_leads_on_from_the_new_state_stays() -> None:
    cluster = suspended()
    cluster.propose(1, b"c", b"d")
    cluster.settle()
    cluster.tick(2)
    raft = cluster[3].raft
    last, term = raft.last_index, raft.log.last_term
    take_over(cluster, 2)
    cluster.propose(1, b"e")
    cluster.settle()
    cluster.tick(2)
    assert raft.log.term_at(last) == term
    assert cluster[3].data == cluster[1].data == [b"a", b"b", b"c", b"d", b"e"]
    assert raft.configuration == cluster[1].raft.configuration


def test_what_it_takes_over_is_committed_though_it_has_not_heard_so() -> None:
    cluster = suspended()
    cluster.propose(1, b"c")
    cluster.until(lambda: cluster[1].data == [b"a", b"b", b"c"])
    raft = cluster[3].raft
    if raft.commit == cluster[1].raft.commit:
        pytest.fail("it has heard already")
    snapshot = cluster[1].state.snapshot(cluster[1].state.index)
    cluster.isolate(3)
    assert raft.keeps_log(snapshot)
    assert raft.commit == snapshot.index


def test_a_log_that_ends_before_the_new_state_is_emptied_and_acknowledges_nothing_until_then() -> None:
    cluster = suspended()
    cluster.isolate(3)
    cluster.propose(1, b"c", b"d")
    cluster.settle()
    node, raft = cluster[3], cluster[3].raft
    snapshot = cluster[1].state.snapshot(cluster[1].state.index)
    assert not raft.keeps_log(snapshot)
    last = raft.last_index
    entry = Entry(1, last + 1, 1, b"c")
    raft.step(Message(MessageType.APP, 3, 1, 1, log_term=1, index=last, commit=last, entries=[entry]))
    node.pump()
    assert raft.last_index == last
    node.fetching = snapshot
    cluster.heal()
    node.install(cluster[1])
    raft.suspended = False
    cluster.propose(1, b"e")
    cluster.settle()
    cluster.tick(4)
    assert node.data == cluster[1].data == [b"a", b"b", b"c", b"d", b"e"]


def test_a_log_that_has_something_else_in_its_place_is_emptied() -> None:
    cluster = Cluster()
    cluster.elect(3)
    cluster.propose(3, b"a")
    cluster.settle()
    cluster.isolate(3)
    cluster.propose(3, b"never", b"committed")
    cluster.settle()
    cluster.tick(3 * ELECTION_TICKS)  # 3 steps down and stands for election in vain
    leader = cluster[1] if cluster[1].leads else cluster[2]
    cluster.propose(leader.node_id, b"b", b"c")
    cluster.settle()
    node, raft = cluster[3], cluster[3].raft
    for _ in range(3 * ELECTION_TICKS):
        if raft.role.name == "PRE_CANDIDATE":
            break
        cluster.tick()
    assert raft.role.name == "PRE_CANDIDATE"
    raft.suspended = True
    snapshot: Snapshot = leader.state.snapshot(leader.state.index)
    assert snapshot.index <= raft.last_index + 1
    assert not raft.keeps_log(snapshot)
    assert raft.role is Role.FOLLOWER
    assert not raft.campaign()
    node.fetching = snapshot
    node.install(leader)
    raft.suspended = False
    cluster.heal()
    cluster.tick(4 * ELECTION_TICKS)
    assert node.data == leader.data == [b"a", b"b", b"c"]


def test_a_leader_lacks_nothing_that_is_committed() -> None:
    cluster = suspended()
    with pytest.raises(AssertionError):
        cluster[1].raft.keeps_log(Snapshot(99, 1, cluster.genesis))
