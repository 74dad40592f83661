"""Reads: an index is an answer only from who still leads; rounds are shared; leases end in time.

That no answer is older than what was committed when it was asked for, and that nobody else is elected
while a lease runs, `invariants.py` checks in every test.
"""

import pytest

from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.readonly import Question, ReadRounds
from aspenfs.limits import RAFT_READS_MAX
from tests.cluster.network import Cluster, remove

ELECTION_TICKS, HEARTBEAT_TICKS = 14, 2


@pytest.mark.parametrize("node", [1, 2, 4])
def test_leader_follower_and_learner_get_an_index(node: int) -> None:
    cluster = Cluster(3, learners=[4])
    cluster.elect(1)
    index = cluster.propose(1, b"x")
    cluster.settle()
    assert cluster.read(node, b"r")
    cluster.settle()
    assert cluster[node].reads == {b"r": index}


def test_all_who_ask_in_one_turn_share_a_round() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    for number in range(50):
        cluster.read(1, b"%d" % number)
    cluster.read(2, b"of 2")
    cluster[2].pump()
    cluster.deliver(cluster.mail.popleft())
    leader.pump()
    assert [message.type for message in cluster.mail] == [MessageType.HEARTBEAT] * 2
    cluster.settle()
    assert len(leader.reads) == 50
    assert list(cluster[2].reads) == [b"of 2"]


def test_a_leader_that_was_cut_off_answers_nobody() -> None:
    """etcd and Consul, Jepsen 2014: what it would read is old."""
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(1)
    cluster.tick(ELECTION_TICKS - 1)
    assert cluster[1].leads
    cluster.elect(2)
    cluster.propose(2, b"new")
    cluster.settle()
    if cluster[1].leads:
        cluster.read(1, b"stale")
    cluster.tick(3 * ELECTION_TICKS)
    assert cluster[1].reads == {}
    cluster.heal()
    cluster.tick(3 * ELECTION_TICKS)
    assert cluster[1].reads == {}


def test_a_leader_answers_nobody_before_something_of_its_term_is_committed() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose(1, b"x")
    cluster.settle()
    cluster[1].raft.transfer_leader(2)
    cluster.until(lambda: cluster[2].leads)
    assert not cluster[2].raft.committed_in_term
    cluster.read(2, b"r")
    cluster.pump()
    assert cluster[2].reads == {}
    cluster.settle()
    assert cluster[2].reads == {b"r": cluster[2].raft.last_index}


def test_the_only_voter_answers_at_once() -> None:
    cluster = Cluster(1, learners=[2])
    cluster.elect(1)
    cluster.isolate(2)
    cluster.read(1, b"r")
    cluster[1].pump()
    assert cluster[1].reads == {b"r": 1}


def test_the_only_voter_answers_also_in_a_joint_configuration_of_itself_and_itself() -> None:
    from aspenfs.cluster.membership import Transition

    cluster = Cluster(1)
    cluster.elect(1)
    cluster.change(1, transition=Transition.JOINT_EXPLICIT)
    cluster.settle()
    assert cluster[1].raft.configuration.outgoing == (1,)
    cluster.read(1, b"r")
    cluster.settle()
    assert cluster[1].reads == {b"r": 2}


def test_a_lost_round_is_sent_again() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.read(1, b"r")
    cluster[1].pump()
    cluster.mail.clear()
    cluster.tick(HEARTBEAT_TICKS)
    assert cluster[1].reads == {b"r": 1}


def test_an_answer_to_a_later_round_answers_earlier_ones() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.read(1, b"first")
    cluster[1].pump()
    cluster.mail.clear()
    cluster.read(1, b"second")
    cluster.settle()
    assert cluster[1].reads.keys() == {b"first", b"second"}


def test_one_answer_of_four_is_no_quorum() -> None:
    cluster = Cluster(5)
    cluster.elect(1)
    cluster.isolate(1, 2)
    cluster.read(1, b"r")
    cluster.settle()
    assert cluster[1].reads == {}


def test_a_joint_configuration_needs_both_halves() -> None:
    from aspenfs.cluster.membership import Transition

    cluster = Cluster(3)
    cluster.elect(1)
    cluster.change(1, remove(3), transition=Transition.JOINT_EXPLICIT)
    cluster.settle()
    cluster.isolate(1, 3)  # a majority of the old half, not of the new one
    cluster.read(1, b"r")
    cluster.settle()
    assert cluster[1].reads == {}
    cluster.heal()
    cluster.tick(HEARTBEAT_TICKS)
    assert cluster[1].reads.keys() == {b"r"}


def test_without_a_leader_there_is_nobody_to_ask() -> None:
    cluster = Cluster(3)
    assert not cluster[1].raft.read_index(b"r")


def test_who_led_and_does_not_any_more_has_forgotten_the_questions() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(1)
    cluster.read(1, b"r")
    cluster.tick(3 * ELECTION_TICKS)
    cluster.heal()
    cluster.tick(3 * ELECTION_TICKS)
    assert cluster[1].reads == {}


def test_a_round_of_an_earlier_term_confirms_nothing() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.read(1, b"r")
    leader.pump()
    cluster.mail.clear()
    leader.raft.step(Message(MessageType.HEARTBEAT_RESP, 1, 2, 1, context=(99).to_bytes(8, "big")))
    leader.raft.step(Message(MessageType.HEARTBEAT_RESP, 1, 2, 1, context=b"\x01"))
    leader.pump()
    assert leader.reads == {}


def test_reads_under_load_do_not_make_appends() -> None:
    """Hundreds of rounds a second: their answers are no reason to look whether appends were lost."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.propose(1, b"x")
    leader.pump()
    cluster.mail.clear()
    cluster.read(1, b"r")
    leader.pump()
    cluster.mail.clear()
    leader.raft.step(Message(MessageType.HEARTBEAT_RESP, 1, 2, 1, context=(1).to_bytes(8, "big")))
    leader.pump()
    assert not [message for message in cluster.mail if message.type is MessageType.APP]


# --- leases ---


def test_nobody_is_elected_while_a_round_may_still_count() -> None:
    """The round proves leadership when it was asked for; an election timeout from then on is the leader's."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.tick(3)
    cluster.read(1, b"r")
    cluster.settle()
    asked = cluster.now
    assert leader.reads
    cluster.isolate(1)
    cluster[2].crash()
    cluster[2].start()  # it has forgotten whom it heard, and keeps its promise all the same
    while cluster.leader is leader:
        cluster[2].raft.campaign()
        cluster[3].raft.campaign()
        cluster.tick()
    assert cluster.now - asked >= ELECTION_TICKS


def test_a_leader_that_began_a_transfer_says_so_for_the_rest_of_its_term() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    said = [leader.raft.transferred_in_term]
    cluster.isolate(3)
    leader.raft.transfer_leader(3)
    cluster.tick(2 * ELECTION_TICKS)
    assert not leader.raft.transferring
    assert leader.raft.term == 1
    said.append(leader.raft.transferred_in_term)
    leader.raft.transfer_leader(2)
    cluster.settle()
    cluster[2].raft.transfer_leader(1)
    cluster.settle()
    assert leader.leads
    said.append(leader.raft.transferred_in_term)
    assert said == [False, True, False]


# --- the rounds themselves ---


def test_rounds_are_answered_in_order_and_once() -> None:
    rounds = ReadRounds()
    rounds.ask(1, b"a")
    first = rounds.start(5)
    rounds.ask(2, b"b")
    rounds.ask(1, b"c")
    second = rounds.start(7)
    assert (rounds.round_of(first), rounds.round_of(second)) == (1, 2)
    assert rounds.confirm(0) == []
    assert rounds.confirm(1) == [(5, [Question(1, b"a")])]
    assert rounds.pending
    assert rounds.confirm(2) == [(7, [Question(2, b"b"), Question(1, b"c")])]
    assert rounds.confirm(2) == []
    assert not rounds.pending


def test_who_waits_is_bounded() -> None:
    rounds = ReadRounds()
    for number in range(RAFT_READS_MAX + 5):
        rounds.ask(1, b"%d" % number)
    assert len(rounds.waiting) == RAFT_READS_MAX
    rounds.start(1)
    rounds.ask(1, b"one more")
    assert rounds.waiting == []
    rounds.confirm(1)
    rounds.ask(1, b"room again")
    assert len(rounds.take_waiting()) == 1
    assert rounds.waiting == []
