"""Elections: pre-votes, votes, promises, and what ends a leadership."""

import pytest

from aspenfs.cluster.membership import ConfigurationChange
from aspenfs.cluster.messages import CAMPAIGN_TRANSFER, Message, MessageType
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.types import Configuration, Entry, EntryKind, HardState, Role
from tests.cluster.network import Cluster, Node, add, learn, remove

ELECTION_TICKS = 14


def roles(cluster: Cluster) -> list[Role]:
    return [node.raft.role for node in cluster.nodes.values()]


def role(node: Node) -> Role:
    """By a call, so that mypy does not believe that it stays."""
    return node.raft.role


def vote_of(
    node: int, term: int, to: int, index: int = 99, log_term: int = 99, *, context: bytes = b""
) -> Message:
    return Message(MessageType.VOTE, to, node, term, log_term, index, context=context)


def answers(cluster: Cluster, node: int) -> list[Message]:
    """What `node` sends next, once its disk has it."""
    cluster.mail.clear()
    cluster[node].pump()
    if cluster[node].unsynced:
        cluster[node].sync()
    sent = list(cluster.mail)
    cluster.mail.clear()
    return sent


# --- somebody leads ---


def test_who_hears_nobody_for_its_timeout_leads() -> None:
    cluster = Cluster(3)
    cluster.tick(ELECTION_TICKS - 1)
    assert roles(cluster) == [Role.FOLLOWER] * 3
    cluster.tick()
    assert roles(cluster) == [Role.LEADER, Role.FOLLOWER, Role.FOLLOWER]
    assert [node.raft.leader for node in cluster.nodes.values()] == [1, 1, 1]
    assert [node.raft.term for node in cluster.nodes.values()] == [1, 1, 1]


@pytest.mark.parametrize("voters", [2, 4, 5, 7])
def test_clusters_of_any_size_find_a_leader(voters: int) -> None:
    cluster = Cluster(voters)
    cluster.elect(voters)
    assert roles(cluster).count(Role.LEADER) == 1


def test_the_only_voter_leads_at_once() -> None:
    cluster = Cluster(1)
    assert cluster[1].raft.campaign()
    assert cluster[1].leads
    cluster.settle()
    assert cluster[1].raft.commit == 1


def test_the_only_voter_is_not_heard_before_its_disk_knows_the_term() -> None:
    cluster = Cluster(1, learners=[2])
    cluster[1].raft.campaign()
    cluster[1].pump()
    assert cluster[1].leads
    assert list(cluster.mail) == []  # after a crash it could lead the same term again, with other entries
    cluster[1].sync()
    assert [message.type for message in cluster.mail] == [MessageType.APP]


def test_a_node_alone_may_begin_its_term_without_an_entry() -> None:
    cluster = Cluster(1)
    node = cluster.elect(1)
    cluster.propose(1, b"x")
    cluster.settle()
    node.sync_state()
    node.crash()
    node.start()
    assert node.raft.campaign(quietly=True)
    assert node.leads
    assert node.raft.last_index == 2
    assert node.raft.committed_in_term
    cluster.settle()
    assert cluster.propose(1, b"y") == 3
    cluster.settle()
    assert node.data == [b"x", b"y"]


@pytest.mark.parametrize("case", ["a learner", "an entry not applied"])
def test_who_is_not_alone_or_may_have_more_begins_its_term_with_an_entry(case: str) -> None:
    cluster = Cluster(1, learners=[2] if case == "a learner" else [])
    node = cluster.elect(1)
    if case == "a learner":
        node.sync_state()
    node.crash()
    node.start()
    assert node.raft.campaign(quietly=True)
    assert not node.raft.committed_in_term
    assert node.raft.last_index == 2


def test_timeouts_are_drawn_anew_between_one_and_two_election_timeouts() -> None:
    drawn: list[int] = []

    def random(bound: int) -> int:
        drawn.append(bound)
        return bound - 1

    cluster = Cluster(2, random=lambda _: random)
    cluster.cut((1, 2), (2, 1))
    before = len(drawn)
    cluster.tick(2 * ELECTION_TICKS - 2)
    assert roles(cluster) == [Role.FOLLOWER] * 2
    cluster.tick()
    assert roles(cluster) == [Role.PRE_CANDIDATE] * 2
    assert len(drawn) > before
    assert set(drawn) == {ELECTION_TICKS}


def test_a_lost_vote_is_asked_for_again() -> None:
    cluster = Cluster(3)
    cluster.isolate(1)
    cluster.tick(ELECTION_TICKS)
    assert cluster[1].raft.role is Role.PRE_CANDIDATE
    cluster.heal()
    cluster.cut((2, 3), (3, 2))
    cluster.tick(4 * ELECTION_TICKS)
    assert cluster.leader is not None


def test_a_candidate_whom_a_majority_refuses_is_a_follower() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(3)
    cluster.propose(1, b"3 lacks this")
    cluster.settle()
    cluster[1].crash()
    cluster.heal()
    cluster.tick(ELECTION_TICKS)
    cluster[3].raft.campaign()
    cluster.settle()
    assert role(cluster[3]) is Role.PRE_CANDIDATE  # 2 said no, 1 may yet say yes
    cluster[3].raft.step(Message(MessageType.PRE_VOTE_RESP, 3, 1, 1, reject=True))
    assert role(cluster[3]) is Role.FOLLOWER


def test_a_candidate_yields_to_the_leader_of_its_term() -> None:
    cluster = Cluster(3)
    cluster[2].raft.campaign()
    cluster[2].pump()
    for kind in (MessageType.PRE_VOTE_RESP,):
        cluster[2].raft.step(Message(kind, 2, 3, 1))
    assert cluster[2].raft.role is Role.CANDIDATE
    cluster[2].raft.step(Message(MessageType.HEARTBEAT, 2, 1, 1))
    assert (cluster[2].raft.role, cluster[2].raft.leader) == (Role.FOLLOWER, 1)


# --- votes ---


def test_a_node_votes_once_in_a_term() -> None:
    cluster = Cluster(3)
    raft = cluster[1].raft
    raft.step(vote_of(2, 1, 1))
    assert [(each.to, each.reject) for each in answers(cluster, 1)] == [(2, False)]
    raft.step(vote_of(3, 1, 1))
    assert [(each.to, each.reject) for each in answers(cluster, 1)] == [(3, True)]
    raft.step(vote_of(2, 1, 1))  # its answer was lost
    assert [(each.to, each.reject) for each in answers(cluster, 1)] == [(2, False)]


def test_a_vote_is_remembered_through_a_crash() -> None:
    cluster = Cluster(3)
    cluster[1].raft.step(vote_of(2, 1, 1))
    answers(cluster, 1)
    cluster[1].crash()
    cluster[1].start()
    cluster.tick(ELECTION_TICKS - 1, settle=False)
    cluster[1].raft._contact_elapsed = ELECTION_TICKS  # its promises are over
    cluster[1].raft.step(vote_of(3, 1, 1))
    assert [(each.to, each.reject) for each in answers(cluster, 1)] == [(3, True)]


def test_a_vote_is_not_given_before_it_is_on_disk() -> None:
    cluster = Cluster(3)
    cluster[1].raft.step(vote_of(2, 1, 1))
    cluster[1].pump()
    assert not cluster.mail
    cluster[1].sync()
    assert [message.type for message in cluster.mail] == [MessageType.VOTE_RESP]


def test_votes_are_not_asked_for_before_the_candidates_own_is_on_disk() -> None:
    cluster = Cluster(3)
    cluster[1].raft.campaign()
    cluster[1].pump()
    cluster.mail.clear()
    cluster[1].raft.step(Message(MessageType.PRE_VOTE_RESP, 1, 2, 1))
    cluster[1].pump()
    assert cluster[1].raft.role is Role.CANDIDATE
    assert not cluster.mail
    cluster[1].sync()
    assert [message.type for message in cluster.mail] == [MessageType.VOTE] * 2


def test_a_log_that_lacks_entries_gets_no_vote() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(3)
    cluster.propose(1, b"x")
    cluster.settle()
    cluster.heal()
    cluster[1].crash()
    cluster.tick(6 * ELECTION_TICKS)
    assert cluster.leader is cluster[2]
    assert cluster[3].data == [b"x"]


def test_an_equal_log_of_a_later_term_is_ahead_of_a_longer_one() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(1)
    cluster.propose(1, b"a", b"b", b"c")
    cluster.pump()
    cluster[1].sync()
    cluster.elect(2)
    cluster.heal()
    cluster.tick(4)
    assert cluster[1].raft.leader == 2
    assert cluster[1].raft.log.last_term == 2


def test_an_old_pre_vote_counts_for_nothing() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.tick(ELECTION_TICKS, settle=False)
    cluster.mail.clear()
    raft = cluster[2].raft
    raft.campaign()
    assert role(cluster[2]) is Role.PRE_CANDIDATE
    raft.step(Message(MessageType.PRE_VOTE_RESP, 2, 3, 1))  # for term 1, which is over; it asked for 2
    assert role(cluster[2]) is Role.PRE_CANDIDATE
    raft.step(Message(MessageType.PRE_VOTE_RESP, 2, 3, 2))
    assert role(cluster[2]) is Role.CANDIDATE


def test_an_answer_counts_once() -> None:
    cluster = Cluster(5)
    raft = cluster[1].raft
    raft.campaign()
    for _ in range(3):
        raft.step(Message(MessageType.PRE_VOTE_RESP, 1, 2, 1))
    assert raft.role is Role.PRE_CANDIDATE


def test_a_learner_does_not_stand_and_its_vote_does_not_count() -> None:
    cluster = Cluster(2, learners=[3])
    cluster.cut((1, 2), (2, 1))
    cluster.tick(4 * ELECTION_TICKS)
    assert cluster.leader is None
    assert cluster[3].raft.role is Role.FOLLOWER
    assert not cluster[3].raft.campaign()


# --- disturbing nobody ---


def test_a_node_that_was_cut_off_raises_no_term_and_disturbs_nobody() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(3)
    cluster.tick(10 * ELECTION_TICKS)
    assert cluster[3].raft.role is Role.PRE_CANDIDATE
    assert cluster[3].raft.term == 1
    cluster.heal()
    cluster.tick(4 * ELECTION_TICKS)
    assert cluster[1].leads
    assert cluster[1].raft.term == 1
    assert cluster[3].raft.leader == 1


def test_who_hears_a_leader_votes_for_nobody_else() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    raft = cluster[2].raft
    for kind in (MessageType.VOTE, MessageType.PRE_VOTE):
        raft.step(Message(kind, 2, 3, 9, 9, 9))
    assert raft.term == 1
    assert answers(cluster, 2) == []
    cluster[1].raft.step(vote_of(3, 9, 1))  # nor does the leader itself
    assert cluster[1].leads


def test_a_promise_outlives_a_rise_of_the_term() -> None:
    """Else a late answer of some node that had campaigned would end the lease of a leader that lives."""
    cluster = Cluster(3)
    cluster.elect(1)
    raft = cluster[2].raft
    raft.step(Message(MessageType.HEARTBEAT_RESP, 2, 3, 8))
    assert (raft.term, raft.leader) == (8, 0)
    raft.step(vote_of(3, 9, 2))
    assert raft.term == 8
    assert not raft.campaign()
    for _ in range(ELECTION_TICKS):
        raft.tick()
    cluster.mail.clear()
    raft.step(vote_of(3, 9, 2))
    assert (raft.term, raft._vote) == (9, 3)


def test_a_node_that_was_started_again_votes_for_nobody_for_an_election_timeout() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster[2].crash()
    cluster[2].start()
    raft = cluster[2].raft
    for _ in range(ELECTION_TICKS - 1):
        raft.step(vote_of(3, 9, 2))
        raft.step(Message(MessageType.PRE_VOTE, 2, 3, 9, 9, 9))
        assert raft.term == 1
        raft.tick()
    assert answers(cluster, 2) == []
    raft.tick()
    raft.step(vote_of(3, 9, 2))
    assert raft.term == 9


def test_the_only_voter_has_promised_nobody_anything() -> None:
    cluster = Cluster(1)
    cluster.elect(1)
    cluster[1].crash()
    cluster[1].start()
    assert cluster[1].raft.campaign()
    assert cluster[1].leads


def test_the_only_voter_of_some_time_ago_may_have_promised_something_since() -> None:
    """Its state lags behind its log, by which there is another voter, who may lead and read under a lease."""
    cluster = Cluster(1)
    cluster.elect(1)
    cluster.add_node(2)
    cluster.change(1, add(2))
    cluster.settle()
    cluster[1].raft.transfer_leader(2)
    cluster.settle()
    assert cluster[2].leads
    cluster[1].crash()
    cluster[1].start()
    assert cluster[1].raft.configuration == Configuration((1,))
    assert not cluster[1].raft.campaign()
    cluster[1].raft.step(vote_of(2, 9, 1))
    assert cluster[1].raft.term == 2


def test_a_leader_hands_over_although_others_hear_it() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster[3].raft.step(vote_of(2, 2, 3, context=CAMPAIGN_TRANSFER))
    assert cluster[3].raft._vote == 2


# --- leaderships end ---


def test_a_leader_without_a_majority_steps_down() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(1)
    cluster.tick(2 * ELECTION_TICKS)
    assert not cluster[1].leads
    cluster.tick(ELECTION_TICKS)
    assert cluster.leader is not None


def test_a_leader_with_a_majority_stays() -> None:
    cluster = Cluster(5)
    cluster.elect(1)
    cluster.isolate(4, 5)
    cluster.tick(10 * ELECTION_TICKS)
    assert cluster[1].leads
    assert cluster[1].raft.term == 1


def test_learners_make_no_majority() -> None:
    cluster = Cluster(2, learners=[3, 4, 5])
    cluster.elect(1)
    cluster.isolate(2)
    cluster.tick(3 * ELECTION_TICKS)
    assert cluster.leader is None


def test_a_node_of_a_higher_term_is_not_stuck() -> None:
    """Its term rose while it was cut off; the others' leader is of a lower one and does not know."""
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(3)
    cluster.tick(ELECTION_TICKS)
    cluster[3].raft._campaign()
    cluster.settle()
    assert cluster[3].raft.term == 2
    cluster.heal()
    cluster.tick(8 * ELECTION_TICKS)
    leader = cluster.leader
    assert leader is not None
    assert leader.raft.term > 2
    assert [node.raft.leader for node in cluster.nodes.values()] == [leader.node_id] * 3


def test_a_refusal_of_a_later_term_is_heeded() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster[2].raft.step(Message(MessageType.PRE_VOTE_RESP, 2, 3, 7, reject=True))
    assert cluster[2].raft.term == 7


def test_a_pre_vote_of_an_earlier_term_is_answered() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster[1].raft.transfer_leader(2)
    cluster.settle()
    cluster[2].raft.step(Message(MessageType.PRE_VOTE, 2, 3, 1))
    assert [(each.type, each.term, each.reject) for each in answers(cluster, 2)] == [
        (MessageType.PRE_VOTE_RESP, 2, True)
    ]


# --- partitions that are not clean (Cloudflare, 2020) ---


@pytest.mark.parametrize("voters", [3, 5])
def test_a_bridge_between_two_halves_keeps_one_leader(voters: int) -> None:
    """1 and 2 do not hear each other, all others hear both: the leader stays, and what it commits spreads."""
    cluster = Cluster(voters)
    cluster.elect(1)
    cluster.cut((1, 2), (2, 1))
    term = cluster[1].raft.term
    for number in range(5):
        cluster.propose(1, b"%d" % number)
        cluster.tick(2 * ELECTION_TICKS)
        assert cluster[1].leads
        assert cluster[1].raft.term == term
    assert len(cluster[3].data) == 5


def test_a_ring_finds_a_leader_that_can_commit() -> None:
    cluster = Cluster(5)
    cluster.cut(*((a, b) for a in range(1, 6) for b in range(1, 6) if a != b and (a - b) % 5 not in (1, 4)))
    cluster.tick(8 * ELECTION_TICKS)
    leader = cluster.leader
    assert leader is not None
    assert leader.raft.committed_in_term


def test_a_leader_that_hears_nobody_gives_way_although_all_hear_it() -> None:
    """One way only: its heartbeats arrive, no answer does."""
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.cut((2, 1), (3, 1))
    cluster.tick(6 * ELECTION_TICKS)
    assert cluster.leader is not None
    assert cluster.leader is not cluster[1]


# --- configurations and campaigns ---


def started(entries: list[Entry], *, configuration: Configuration, applied: int = 0) -> Raft:
    return Raft(
        2, configuration, hard_state=HardState(5, 0), entries=entries, base_index=0, base_term=0,
        applied=applied, random=lambda bound: 0,
    )  # fmt: skip


def change_entry(index: int, node: int) -> Entry:
    return Entry(1, index, int(EntryKind.CONFIGURATION), ConfigurationChange((add(node),)).encode())


def test_a_change_in_the_log_says_that_the_one_before_is_committed() -> None:
    """The commit index is not stored, and a majority of two changes ago may meet nobody of today's."""
    log = [change_entry(1, 4), Entry(1, 2, 1, b"x"), change_entry(3, 5), Entry(1, 4, 1, b"y")]
    raft = started(log, configuration=Configuration((1, 2, 3)))
    assert raft.commit == 1
    for _ in range(3 * ELECTION_TICKS):
        raft.tick()
    ready = raft.ready()
    assert not ready.messages  # it may not stand with the old configuration
    assert [entry.index for entry in ready.committed] == [1]
    raft.apply_configuration(ConfigurationChange.decode(ready.committed[0].data))
    raft.applied_to(1)
    raft.tick()
    assert raft.role is Role.PRE_CANDIDATE
    assert {message.to for message in raft.ready().messages} == {1, 3, 4}


def test_one_change_in_the_log_may_not_be_committed() -> None:
    raft = started([change_entry(1, 4), Entry(1, 2, 1, b"x")], configuration=Configuration((1, 2, 3)))
    assert raft.commit == 0


def test_two_changes_and_a_crash_elect_nobody_with_the_old_majority() -> None:
    """Of three voters two become five; node 2 has both changes in its log and lost what it had applied."""
    cluster = Cluster(3)
    cluster.elect(1)
    for node in (4, 5):
        cluster.add_node(node)
        cluster.change(1, learn(node))
        cluster.settle()
        cluster.change(1, add(node))
        cluster.settle()
    cluster.isolate(1, 4, 5)
    cluster.propose(1, b"committed by 1, 4 and 5")
    cluster.settle()
    assert cluster[4].raft.commit == cluster[1].raft.last_index
    for node in (2, 3):  # their states were never synced: they begin with what the cluster began with
        cluster[node].crash()
        cluster[node].start()
    cluster.tick(8 * ELECTION_TICKS)
    assert not cluster[2].leads
    assert not cluster[3].leads
    cluster.heal()
    cluster.tick(8 * ELECTION_TICKS)
    assert cluster[2].data == [b"committed by 1, 4 and 5"]


def test_who_is_removed_while_it_stands_for_election_stops() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.change(1, remove(3))
    cluster.settle()
    raft = cluster[3].raft
    cluster.tick(8 * ELECTION_TICKS)
    assert raft.role is Role.FOLLOWER
    assert not raft.campaign()
    assert cluster[1].raft.term == 1
