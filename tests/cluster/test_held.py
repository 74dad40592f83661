"""What a majority has in its logs before it is on their disks: `Store.begin`, ADR 0016."""

import pytest

from aspenfs.cluster.messages import TELL_HELD, Message, MessageType
from aspenfs.cluster.types import Entry, EntryKind, Role
from tests.cluster.replicas import Node, Replicas


def begin(leader: Node, data: bytes = b"file") -> tuple[list[object], list[object]]:
    """Who hears that it is held, and who hears of its end."""
    held: list[object] = []
    ended: list[object] = []
    assert leader.replica.begin(data, None, ended.append)
    leader.replica.when_held(held.append)
    return held, ended


def deliver(cluster: Replicas, *kinds: MessageType) -> None:
    """Messages of these kinds arrive, and what they lead to, but no disk syncs. Others stay on their way."""
    while some := [message for message in cluster.sent if message.type in kinds]:
        for message in some:
            cluster.sent.remove(message)
            cluster[message.to].replica.receive(message)
            cluster[message.to].replica.pump()


def test_a_majority_tells_before_any_disk_has_it() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    for node in cluster.nodes.values():
        node.syncs = False
    held, ended = begin(leader)
    leader.replica.pump()
    assert not held
    deliver(cluster, MessageType.APP, MessageType.HELD)
    assert len(held) == 1
    assert not ended
    assert leader.raft.commit < leader.raft.held == leader.raft.last_index
    for node in cluster.nodes.values():
        node.syncs = True
    cluster.settle()
    assert len(held) == len(ended) == 1
    assert leader.applied == [b"file"]


def test_nobody_is_asked_to_tell_of_what_nobody_waits_for() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    leader.propose(b"a")
    assert leader.replica.begin(b"b", None, print)
    leader.replica.pump()
    assert MessageType.APP in {message.type for message in cluster.sent}
    assert all(message.context != TELL_HELD for message in cluster.sent)
    deliver(cluster, MessageType.APP)
    assert MessageType.HELD not in {message.type for message in cluster.sent}


def test_it_does_not_wait_for_a_sync_that_is_under_way() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    for node in cluster.nodes.values():
        node.syncs = False
    leader.propose(b"a")
    held, _ = begin(leader)
    leader.replica.pump()
    deliver(cluster, MessageType.APP, MessageType.HELD)
    assert len(held) == 1


def test_the_leader_alone_is_no_majority() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    cluster.cut |= {2, 3}
    held, ended = begin(leader)
    leader.replica.pump()
    cluster.settle()
    assert leader.raft.held < leader.raft.last_index
    assert not held
    assert not ended


def test_two_of_five_are_none() -> None:
    cluster = Replicas(5)
    leader = cluster.elect()
    held, _ = begin(leader)
    leader.replica.pump()
    for node in cluster.nodes.values():
        node.syncs = False
    near = next(message for message in cluster.sent if message.type == MessageType.APP)
    cluster.sent.clear()
    cluster[near.to].replica.receive(near)
    cluster[near.to].replica.pump()
    deliver(cluster, MessageType.HELD)
    assert not held


def test_both_halves_of_a_joint_configuration_must_have_it() -> None:
    cluster = Replicas(3)
    raft = cluster.elect().raft
    raft.configuration = raft.configuration._replace(outgoing=(1, 4, 5))
    raft._progress |= {4: raft._new_progress(), 5: raft._new_progress()}
    last = raft.propose([(EntryKind.PROPOSAL, bytes(16))])
    raft.ready()
    for node in (2, 3):
        raft.step(Message(MessageType.HELD, 1, node, raft.term, index=last))
    assert raft.held < last
    raft.step(Message(MessageType.HELD, 1, 4, raft.term, index=last))
    assert raft.held == last


def test_what_has_nothing_of_this_term_before_it_is_not_held() -> None:
    """As with commits (Raft §5.4.2): another leader might not have it, though a majority has."""
    cluster = Replicas(3)
    leader = cluster.elect()
    leader.propose(b"old")
    cluster.sent.clear()
    for node in (2, 3):  # they have it, and the answers are lost
        entry = Entry(leader.raft.term, leader.raft.last_index, EntryKind.PROPOSAL, b"")
        cluster[node].raft.log.append([entry])
    old = leader.raft.last_index
    leader.raft.step(Message(MessageType.HEARTBEAT_RESP, 1, 2, leader.raft.term + 1))
    assert leader.raft.held == 0
    leader.raft.campaign()
    leader.replica.pump()
    for message in [message for message in cluster.sent if message.type == MessageType.PRE_VOTE]:
        grant = Message(MessageType.PRE_VOTE_RESP, 1, message.to, message.term)
        leader.replica.receive(grant)
    leader.replica.pump()
    leader.sync()
    for node in (2, 3):
        leader.replica.receive(Message(MessageType.VOTE_RESP, 1, node, leader.raft.term))
    leader.replica.pump()
    assert leader.raft.leader == leader.node_id
    for node in (2, 3):
        leader.raft.step(Message(MessageType.HELD, 1, node, leader.raft.term, index=old))
    assert leader.raft.held == 0
    leader.raft.step(Message(MessageType.HELD, 1, 2, leader.raft.term, index=leader.raft.last_index))
    assert leader.raft.held == leader.raft.last_index


@pytest.mark.parametrize("index", [0, 1, 10**6])
def test_an_answer_of_old_or_of_no_entry_changes_nothing(index: int) -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    held, _ = begin(leader)
    leader.replica.pump()
    before = leader.raft.held
    leader.replica.receive(Message(MessageType.HELD, 1, 2, leader.raft.term, index=index))
    leader.replica.receive(Message(MessageType.HELD, 1, 9, leader.raft.term, index=leader.raft.last_index))
    leader.replica.pump()
    assert leader.raft.held == before
    assert not held


def test_who_leads_no_more_tells_nobody_that_it_is_held() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    held, ended = begin(leader)
    leader.replica.pump()
    cluster.sent.clear()
    term = leader.raft.term
    leader.replica.receive(Message(MessageType.HEARTBEAT, 1, 2, term + 1))
    leader.replica.pump()
    for node in (2, 3):
        leader.replica.receive(Message(MessageType.HELD, 1, node, term, index=leader.raft.last_index))
        leader.replica.receive(Message(MessageType.HELD, 1, node, term + 1, index=leader.raft.last_index))
    leader.replica.pump()
    assert not held
    assert not ended


def test_who_follows_another_leader_counts_nothing() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    held, _ = begin(leader)
    leader.replica.pump()
    raft, index = leader.raft, leader.raft.last_index
    before, previous = raft.term, raft.log.term_at(index - 1)
    assert previous is not None
    for node in (2, 3):  # as in the log of a leader that was deposed before it looked
        raft._progress[node].held = index
    theirs = [Entry(before + 1, index, EntryKind.NORMAL, b"")]
    leader.replica.receive(
        Message(MessageType.APP, 1, 2, before + 1, log_term=previous, index=index - 1, entries=theirs)
    )
    leader.replica.pump()
    assert raft.log.term_at(index) == raft.term == before + 1
    assert raft.held == 0
    assert not held


def test_what_was_begun_in_another_term_holds_nobody_up() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    held, _ = begin(leader)
    leader.replica._held.append((leader.raft.term - 1, leader.raft.last_index + 100, held.append))
    leader.replica.pump()
    cluster.settle()
    assert len(held) == 1
    assert not leader.replica._held


def test_who_leads_next_has_what_was_held() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    held, _ = begin(leader)
    leader.syncs = False
    leader.replica.pump()
    deliver(cluster, MessageType.APP, MessageType.HELD)
    assert held
    (near,) = (node for node in (2, 3) if cluster[node].raft.last_index == leader.raft.last_index)
    cluster.sent.clear()
    cluster.cut.add(1)
    far = 5 - near
    for node in (far, near):  # the one that lacks it tries first
        cluster[node].raft._contact_elapsed = cluster[5 - node].raft._contact_elapsed = 10**6
        cluster[node].raft.campaign()
        cluster[node].replica.pump()
        cluster.settle()
    assert cluster[far].raft.role is not Role.LEADER
    assert cluster[near].raft.role is Role.LEADER
    assert b"file" in cluster[near].applied


def test_who_refuses_an_append_may_have_lost_what_it_held() -> None:
    cluster = Replicas(3)
    leader = cluster.elect()
    begin(leader)
    leader.replica.pump()
    raft, last = leader.raft, leader.raft.last_index
    raft._progress[2].held = raft._progress[3].held = last
    assert raft.held == last
    for node in (2, 3):
        refusal = Message(
            MessageType.APP_RESP, 1, node, raft.term, index=last, reject=True, reject_hint=last - 1
        )
        raft.step(refusal)
    assert raft.held < last
