"""What a leader takes in and refuses: entries, changes of the configuration, its own succession."""

import pytest

from aspenfs import errors
from aspenfs.cluster.log import ENTRY_OVERHEAD_BYTES
from aspenfs.cluster.membership import Transition
from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.types import Configuration, Entry, EntryKind, Role
from aspenfs.limits import MEMBERS_MAX
from tests.cluster.network import Cluster, add, learn, remove

ELECTION_TICKS, HEARTBEAT_TICKS = 14, 2


# --- entries ---


def test_proposals_get_consecutive_indices() -> None:
    cluster = Cluster(1)
    cluster.elect(1)
    assert cluster.propose(1, b"a", b"b", b"c") == 2
    assert cluster.propose(1, b"d") == 5
    cluster.settle()
    assert cluster[1].data == [b"a", b"b", b"c", b"d"]


def test_who_does_not_lead_names_who_does() -> None:
    cluster = Cluster(3)
    with pytest.raises(errors.NotLeader) as nobody:
        cluster.propose(2, b"x")
    assert nobody.value.leader == 0
    cluster.elect(1)
    with pytest.raises(errors.NotLeader) as somebody:
        cluster.propose(2, b"x")
    assert somebody.value.leader == 1


def test_what_waits_for_a_majority_is_bounded() -> None:
    size = 100 + ENTRY_OVERHEAD_BYTES
    cluster = Cluster(3, max_uncommitted_bytes=3 * size)
    cluster.elect(1)
    cluster.isolate(1)
    for _ in range(3):
        cluster.propose(1, bytes(100))
    last = cluster[1].raft.last_index
    with pytest.raises(errors.Overloaded):
        cluster.propose(1, bytes(100))
    with pytest.raises(errors.Overloaded):
        cluster.propose(1, b"", b"")
    assert cluster[1].raft.last_index == last  # all or nothing
    cluster.heal()
    cluster.tick(3 * HEARTBEAT_TICKS)
    cluster.propose(1, bytes(100), bytes(100), bytes(100))


def test_what_is_larger_than_the_bound_passes_when_nothing_else_waits() -> None:
    cluster = Cluster(3, max_uncommitted_bytes=10)
    cluster.elect(1)
    cluster.propose(1, bytes(1000))
    with pytest.raises(errors.Overloaded):
        cluster.propose(1, b"")
    cluster.settle()
    assert cluster[3].data == [bytes(1000)]


def test_a_new_leader_begins_its_term_however_much_waits() -> None:
    cluster = Cluster(3, max_uncommitted_bytes=10)
    cluster.elect(1)
    cluster.propose(1, bytes(1000))
    cluster[1].pump()
    cluster.deliver(cluster.mail.popleft())
    cluster[2].pump()
    cluster[2].sync()
    cluster[1].crash()
    cluster.elect(2)
    assert cluster[2].raft.committed_in_term
    assert cluster[2].data == [bytes(1000)]


def test_what_is_not_applied_here_is_bounded_too() -> None:
    cluster = Cluster(1, max_unapplied_bytes=1000)
    leader = cluster.elect(1)
    waiting: list[object] = []
    leader.apply = waiting.append  # type: ignore[method-assign, assignment]
    while leader.raft.log.unapplied_bytes <= 1000:
        cluster.propose(1, bytes(100))
        cluster.settle()
    with pytest.raises(errors.Overloaded):
        cluster.propose(1, b"")


# --- alone ---


def test_a_node_alone_appends_what_its_owner_writes_itself() -> None:
    cluster = Cluster(1)
    node = cluster.elect(1)
    entries = [node.raft.append_alone(1, b"%d" % number) for number in range(3)]
    assert entries == [Entry(1, 2, 1, b"0"), Entry(1, 3, 1, b"1"), Entry(1, 4, 1, b"2")]
    assert not node.raft.has_ready
    node.disk.write(None, entries, None)
    node.sync()
    node.pump()
    assert node.raft.commit == 4
    assert node.data == [b"0", b"1", b"2"]


@pytest.mark.parametrize("cluster", [Cluster(2), Cluster(1, learners=[2])], ids=["two voters", "a learner"])
def test_with_company_nothing_is_appended_alone(cluster: Cluster) -> None:
    cluster.elect(1)
    with pytest.raises(errors.NotLeader):
        cluster[1].raft.append_alone(1, b"")


def test_alone_ends_when_a_member_comes_and_begins_when_it_goes() -> None:
    cluster = Cluster(1)
    cluster.elect(1)
    cluster.add_node(2)
    cluster.change(1, learn(2))
    cluster.settle()
    with pytest.raises(errors.NotLeader):
        cluster[1].raft.append_alone(1, b"")
    cluster.change(1, remove(2))
    cluster.settle()
    assert cluster[1].raft.append_alone(1, b"").index == 4


def test_what_was_not_handed_out_comes_before_what_is_appended_alone() -> None:
    cluster = Cluster(1)
    cluster.elect(1)
    cluster.propose(1, b"x")
    with pytest.raises(AssertionError):
        cluster[1].raft.append_alone(1, b"y")


def test_a_follower_or_candidate_is_not_alone() -> None:
    cluster = Cluster(1)
    with pytest.raises(errors.NotLeader):
        cluster[1].raft.append_alone(1, b"")


# --- members come and go ---


def test_a_new_member_learns_all_and_then_votes() -> None:
    cluster = Cluster(1)
    cluster.elect(1)
    cluster.propose(1, *[b"%d" % number for number in range(100)])
    cluster.settle()
    for node in (2, 3):
        cluster.add_node(node)
        cluster.change(1, learn(node))
        cluster.settle()
        assert cluster[1].raft.configuration.learners == (node,)
        assert len(cluster[node].data) == 100
        assert cluster[1].raft.progress()[node].match == cluster[1].raft.last_index
        cluster.change(1, add(node))
        cluster.settle()
    assert [node.raft.configuration for node in cluster.nodes.values()] == [Configuration((1, 2, 3))] * 3
    cluster[1].crash()
    cluster.tick(4 * ELECTION_TICKS)
    assert cluster.leader is not None


def test_a_learner_does_not_hold_up_what_is_committed() -> None:
    cluster = Cluster(1, learners=[2])
    cluster.elect(1)
    cluster.isolate(2)
    index = cluster.propose(1, b"x")
    cluster.settle()
    assert cluster[1].raft.commit == index


def test_a_member_that_was_removed_gets_nothing_any_more() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.change(1, remove(3))
    cluster.settle()
    cluster.propose(1, b"x")
    cluster.settle()
    assert cluster[2].data == [b"x"]
    assert cluster[3].data == []
    assert 3 not in cluster[1].raft.progress()


def test_a_voter_can_be_demoted_and_promoted() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.change(1, learn(3))
    cluster.settle()
    assert cluster[3].raft.configuration == Configuration((1, 2), learners=(3,))
    cluster.isolate(3)
    cluster.propose(1, b"x")
    cluster.settle()
    cluster.heal()
    cluster.tick(4 * HEARTBEAT_TICKS)
    assert cluster[3].data == [b"x"]
    cluster.change(1, add(3))
    cluster.settle()
    assert cluster[3].raft.configuration == Configuration((1, 2, 3))


def test_two_changes_at_once_go_through_a_joint_configuration_that_is_left_by_itself() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    seen: list[Configuration] = []
    cluster.add_node(4)
    cluster.add_node(5)
    cluster.change(1, add(4), remove(3))
    while cluster.round():
        if cluster[1].raft.configuration not in seen:
            seen.append(cluster[1].raft.configuration)
    assert seen == [
        Configuration((1, 2, 3)),
        Configuration((1, 2, 4), (1, 2, 3), auto_leave=True),
        Configuration((1, 2, 4)),
    ]
    assert cluster[4].raft.configuration == Configuration((1, 2, 4))


def test_an_explicit_joint_configuration_stays_until_it_is_left() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.change(1, remove(3), transition=Transition.JOINT_EXPLICIT)
    cluster.settle()
    cluster.tick(2 * ELECTION_TICKS)
    assert cluster[1].raft.configuration == Configuration((1, 2), (1, 2, 3))
    assert cluster[1].raft.change_pending
    with pytest.raises(errors.InvalidArgument, match="can't apply simple config change in joint config"):
        cluster.change(1, add(3))
    cluster.change(1)
    cluster.settle()
    assert cluster[2].raft.configuration == Configuration((1, 2))


def test_a_joint_configuration_commits_with_both_majorities() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    for node in (4, 5):
        cluster.add_node(node)
    cluster.change(1, add(4), add(5), remove(2), remove(3), transition=Transition.JOINT_EXPLICIT)
    cluster.settle()
    assert cluster[4].raft.configuration == Configuration((1, 4, 5), (1, 2, 3))
    index = cluster[1].raft.commit
    for isolated in ((4, 5), (2, 3)):
        cluster.isolate(*isolated)
        cluster.propose(1, b"x")
        cluster.settle()
        assert cluster[1].raft.commit == index  # one half alone is no majority of both
        cluster.heal()
        cluster.tick(4 * HEARTBEAT_TICKS)
        index = cluster[1].raft.commit
        assert index == cluster[1].raft.last_index


def test_a_joint_configuration_elects_with_both_majorities() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    for node in (4, 5):
        cluster.add_node(node)
    cluster.change(1, add(4), add(5), remove(2), remove(3), transition=Transition.JOINT_EXPLICIT)
    cluster.settle()
    cluster[1].crash()
    cluster.isolate(4, 5)
    cluster.tick(8 * ELECTION_TICKS)
    assert cluster.leader is None
    cluster.heal()
    cluster.tick(8 * ELECTION_TICKS)
    assert cluster.leader is not None


def test_a_new_leader_leaves_the_joint_configuration_of_the_old_one() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.add_node(4)
    cluster.change(1, add(4), remove(3))
    cluster.until(lambda: bool(cluster[1].raft.configuration.outgoing))
    cluster.isolate(1)  # the entry that leaves it reaches nobody
    cluster.settle()
    assert cluster[2].raft.configuration.outgoing or cluster[2].raft.last_index == 2
    cluster[1].crash()
    cluster.heal()
    cluster.mail.clear()
    cluster.tick(8 * ELECTION_TICKS)
    assert cluster.leader is not None
    assert cluster.leader.raft.configuration == Configuration((1, 2, 4))


def test_one_change_at_a_time() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(1)
    cluster.change(1, remove(3))
    pending = [cluster[1].raft.change_pending]
    with pytest.raises(errors.Busy):
        cluster.change(1, remove(2))
    cluster.heal()
    cluster.tick(4 * HEARTBEAT_TICKS)
    pending.append(cluster[1].raft.change_pending)
    assert pending == [True, False]
    cluster.change(1, remove(2))


def test_a_new_leader_waits_until_old_changes_are_applied() -> None:
    cluster = Cluster(5)
    cluster.elect(1)
    cluster.change(1, remove(5))
    cluster[1].pump()
    cluster.deliver(next(message for message in cluster.mail if message.to == 2))
    cluster.mail.clear()
    cluster[2].pump()
    cluster[2].sync()
    cluster[1].crash()
    cluster.mail.clear()
    leader = cluster[2]
    cluster.tick(ELECTION_TICKS, settle=False)
    leader.raft._campaign()
    for node in (3, 4):
        leader.raft.step(Message(MessageType.VOTE_RESP, 2, node, leader.raft.term))
    assert leader.leads
    with pytest.raises(errors.Busy):
        cluster.change(2, remove(4))


def test_a_change_waits_for_something_of_the_leaders_own_term() -> None:
    """Ongaro's bug of 2015: a leader that does not know of a change which an earlier one has committed would
    make another one, and two majorities that do not meet."""
    cluster = Cluster(4)
    cluster.elect(1)
    cluster[1].raft.transfer_leader(2)
    cluster.until(lambda: cluster[2].leads)
    assert not cluster[2].raft.committed_in_term
    assert cluster[2].raft.log.applied == cluster[2].raft.log.committed
    with pytest.raises(errors.Busy):
        cluster.change(2, remove(4))
    cluster.settle()
    cluster.change(2, remove(4))


def test_what_can_not_be_is_refused() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    for changes, message in (
        ([remove(1), remove(2), remove(3)], "removed all voters"),
        ([], "can't leave a non-joint config"),
        ([learn(10 + number) for number in range(MEMBERS_MAX)], "at most"),
    ):
        with pytest.raises(errors.InvalidArgument, match=message):
            cluster.change(1, *changes)
    assert cluster[1].raft.last_index == 1
    with pytest.raises(errors.NotLeader):
        cluster.change(2, remove(3))


def test_a_committed_change_that_does_not_fit_stops_the_node() -> None:
    cluster = Cluster(1)
    cluster.elect(1)
    from aspenfs.cluster.membership import ConfigurationChange

    with pytest.raises(AssertionError, match="does not fit"):
        cluster[1].raft.apply_configuration(ConfigurationChange((remove(1),)))


# --- a leader that is removed ---


@pytest.mark.parametrize("change", [remove, learn])
@pytest.mark.parametrize("voters", [2, 3])
def test_a_leader_without_a_vote_hands_over_and_steps_down(voters: int, change: type) -> None:
    cluster = Cluster(voters)
    cluster.elect(1)
    cluster.change(1, change(1))
    cluster.settle()
    assert not cluster[1].leads
    assert cluster.leader is not None  # nobody had to wait for a timeout
    cluster.propose(cluster.leader.node_id, b"x")
    cluster.tick(HEARTBEAT_TICKS)
    assert cluster[2].data == [b"x"]
    assert cluster[1].data == ([b"x"] if change is learn else [])


def test_a_leader_without_a_vote_takes_nothing_more_and_stays_until_the_others_know() -> None:
    """Of two voters the one that is left could not be elected without this node, whose log is longer."""
    cluster = Cluster(2)
    leader = cluster.elect(1)
    index = cluster.change(1, remove(1))
    cluster.until(lambda: leader.raft.commit == index)
    cluster.isolate(1)
    cluster.tick(4 * ELECTION_TICKS)
    assert leader.raft.configuration == Configuration((2,))
    assert cluster[2].raft.configuration == Configuration((1, 2))
    assert cluster.leader is leader
    assert leader.raft.transferring
    assert not leader.raft.read_index(b"r")
    leader.raft.step(Message(MessageType.READ_INDEX, 1, 2, leader.raft.term, context=b"r"))
    with pytest.raises(errors.NotLeader):
        cluster.propose(1, b"x")
    with pytest.raises(errors.NotLeader):
        cluster.change(1, add(1))
    leader.raft.transfer_leader(2)
    cluster.heal()
    cluster.tick(3 * HEARTBEAT_TICKS)
    assert cluster.leader is cluster[2]
    assert leader.raft.role is Role.FOLLOWER


def test_a_leader_that_dies_as_it_is_removed_leaves_the_others_able_to_go_on() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.change(1, remove(1))
    cluster.until(lambda: leader.raft.configuration == Configuration((2, 3)))
    leader.crash()
    cluster.mail.clear()
    cluster.tick(8 * ELECTION_TICKS)
    assert cluster.leader is not None
    assert cluster.leader.raft.configuration == Configuration((2, 3))


# --- handing over ---


def test_leadership_is_handed_over_at_once() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster[1].raft.transfer_leader(3)
    cluster.settle()
    assert cluster[3].leads
    assert [node.raft.leader for node in cluster.nodes.values()] == [3] * 3


def test_a_transfer_is_not_undone_by_pre_votes_and_promises() -> None:
    """dqlite/raft #203."""
    cluster = Cluster(5)
    cluster.elect(1)
    cluster.tick(1)  # everybody has just heard the leader
    kinds = []
    cluster[1].raft.transfer_leader(2)
    while cluster.round(0) or cluster.mail:
        kinds += [message.type for message in cluster.mail]
        cluster.round()
    assert cluster[2].leads
    assert MessageType.PRE_VOTE not in kinds


def test_a_node_that_lags_is_brought_up_to_date_before_it_leads() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(3)
    cluster.propose(1, b"x", b"y")
    cluster.settle()
    cluster.heal()
    cluster[1].raft.transfer_leader(3)
    cluster.tick(2 * HEARTBEAT_TICKS)
    assert cluster[3].leads
    assert cluster[3].data == [b"x", b"y"]


@pytest.mark.parametrize("to", [4, 9])
def test_who_is_no_voter_can_not_lead(to: int) -> None:
    """Consul #7031."""
    cluster = Cluster(3, learners=[4])
    cluster.elect(1)
    with pytest.raises(errors.InvalidArgument):
        cluster[1].raft.transfer_leader(to)
    assert not cluster[1].raft.transferring
    assert not cluster[1].raft.transferred_in_term
    cluster[2].raft.transfer_leader(to)  # asked of another node: the leader does not do it
    cluster.settle()
    assert cluster[1].leads
    assert not cluster[1].raft.transferring


def test_another_node_passes_the_wish_on() -> None:
    cluster = Cluster(3)
    with pytest.raises(errors.NotLeader):
        cluster[2].raft.transfer_leader(3)
    cluster.elect(1)
    cluster[2].raft.transfer_leader(3)
    cluster.settle()
    assert cluster[3].leads


def test_a_learner_that_is_told_to_stand_does_not() -> None:
    cluster = Cluster(3, learners=[4])
    cluster.elect(1)
    cluster[4].raft.step(Message(MessageType.TIMEOUT_NOW, 4, 1, 1))
    assert cluster[4].raft.role is Role.FOLLOWER


def test_nothing_is_proposed_while_leadership_is_handed_over() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(3)
    cluster[1].raft.transfer_leader(3)
    cluster.settle()
    assert cluster[1].raft.transferring
    with pytest.raises(errors.NotLeader):
        cluster.propose(1, b"x")
    with pytest.raises(errors.NotLeader):
        cluster.change(1, remove(3))


def test_a_transfer_that_takes_longer_than_an_election_timeout_is_given_up() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(3)
    cluster.tick(5)
    cluster[1].raft.transfer_leader(3)
    cluster.tick(ELECTION_TICKS - 1)
    assert cluster[1].raft.transferring
    cluster.tick()
    cluster.propose(1, b"x")
    cluster.settle()
    assert cluster[1].leads
    assert cluster[2].data == [b"x"]


def test_a_transfer_to_oneself_or_again_to_the_same_changes_nothing() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster[1].raft.transfer_leader(1)
    assert not cluster[1].raft.transferring
    cluster.isolate(3)
    cluster[1].raft.transfer_leader(3)
    cluster.tick(ELECTION_TICKS - 1)
    cluster[1].raft.transfer_leader(3)
    cluster.tick()
    assert not cluster[1].raft.transferring


def test_a_second_transfer_takes_the_place_of_the_first() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(3)
    cluster[1].raft.transfer_leader(3)
    cluster[1].raft.transfer_leader(2)
    cluster.settle()
    assert cluster[2].leads


def test_a_transfer_ends_when_its_target_is_removed() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.change(1, remove(3))
    leader.pump()
    cluster.isolate(3)
    leader.raft.transfer_leader(3)
    cluster.settle()
    assert leader.raft.configuration == Configuration((1, 2))
    assert not leader.raft.transferring
    cluster.propose(1, b"x")


def test_a_joint_configuration_is_left_after_a_transfer_that_failed() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.add_node(4)
    cluster.isolate(3)
    cluster.change(1, add(4), learn(4), add(4), transition=Transition.JOINT_IMPLICIT)
    leader.raft.transfer_leader(3)
    cluster.settle()
    assert leader.raft.configuration.outgoing
    cluster.tick(2 * ELECTION_TICKS)
    assert leader.raft.configuration == Configuration((1, 2, 3, 4))


def test_a_late_order_to_stand_is_void_in_a_later_term() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster[1].raft.transfer_leader(2)
    cluster.settle()
    cluster[3].raft.step(Message(MessageType.TIMEOUT_NOW, 3, 1, 1))
    cluster.settle()
    assert cluster[2].leads
    assert cluster[2].raft.term == 2


def test_the_kinds_of_entries_are_kept() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    leader.raft.propose([(int(EntryKind.PROPOSAL), b"p"), (int(EntryKind.NORMAL), b"n")])
    cluster.settle()
    log = cluster[3].raft.log
    assert [entry.kind for entry in log.slice(1, 3, 1 << 20)] == [1, 3, 1]
