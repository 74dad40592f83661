"""Replication: logs come to agree, what a majority has is committed, and nobody is flooded."""

from collections.abc import Sequence
from typing import Any

import pytest

from aspenfs import errors
from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.progress import ProgressState
from aspenfs.cluster.types import Entry, HardState
from tests.cluster.network import NORMAL, Cluster, Node

ELECTION_TICKS, HEARTBEAT_TICKS = 14, 2


def appends(cluster: Cluster, to: int) -> list[Message]:
    return [message for message in cluster.mail if message.type is MessageType.APP and message.to == to]


def give_log(node: Node, *terms: int, term: int) -> None:
    """The node's disk as it was left by leaders of these terms."""
    node.crash()
    for image in (node.disk.view, node.disk.durable):
        image.entries = [
            Entry(each, index, NORMAL, b"%d of term %d" % (index, each))
            for index, each in enumerate(terms, 1)
        ]
        image.hard_state = HardState(term, 0)
    node.start(fresh=True)


def log_terms(node: Node) -> list[int]:
    log = node.raft.log
    return [entry.term for entry in log.slice(log.compacted + 1, log.last_index, 1 << 30)]


# --- committing ---


def test_what_is_proposed_is_applied_everywhere_in_order() -> None:
    cluster = Cluster(3, learners=[4])
    cluster.elect(2)
    for number in range(10):
        cluster.propose(2, b"%d" % number, b"%d'" % number)
    cluster.settle()
    expected = [b"%d%s" % (number, prime) for number in range(10) for prime in (b"", b"'")]
    assert [node.data for node in cluster.nodes.values()] == [expected] * 4


def test_a_majority_of_disks_commits_and_the_leaders_own_may_be_the_last() -> None:
    """Its appends overtake its own disk; it applies what it can not lose itself (Raft §10.2.1)."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    index = cluster.propose(1, b"x")
    leader.pump()
    for _ in range(3):
        while cluster.mail:
            cluster.deliver(cluster.mail.popleft())
        for node in (cluster[2], cluster[3]):
            node.pump()
            if node.unsynced:
                node.sync()
        leader.pump()
    assert leader.unsynced
    assert leader.raft.commit == index
    assert (leader.data, cluster[2].data, cluster[3].data) == ([], [b"x"], [b"x"])
    leader.sync()
    leader.pump()
    assert leader.data == [b"x"]


def test_a_leader_does_not_count_itself_before_its_own_sync() -> None:
    cluster = Cluster(2)
    leader = cluster.elect(1)
    index = cluster.propose(1, b"x")
    leader.pump()
    leader.begin_sync()
    cluster.deliver(cluster.mail.popleft())
    cluster[2].pump()
    cluster[2].sync()
    cluster.deliver(cluster.mail.popleft())
    assert leader.raft.commit == index - 1
    leader.end_sync()
    assert leader.raft.commit == index


def test_a_leader_counts_of_its_own_disk_what_was_written_when_the_sync_began() -> None:
    cluster = Cluster(2)
    leader = cluster.elect(1)
    first = cluster.propose(1, b"x")
    leader.pump()
    leader.begin_sync()
    cluster.propose(1, b"y")
    leader.pump()
    for _ in range(2):
        cluster.deliver(cluster.mail.popleft())
        cluster[2].pump()
    cluster[2].sync()
    while cluster.mail:
        cluster.deliver(cluster.mail.popleft())
    leader.end_sync()
    assert leader.raft.commit == first


def test_a_follower_acknowledges_when_its_disk_has_it() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose(1, b"x")
    cluster[1].pump()
    cluster.deliver(appends(cluster, 2)[0])
    cluster.mail.clear()
    cluster[2].pump()
    assert not cluster.mail
    cluster[2].sync()
    assert [(each.type, each.index) for each in cluster.mail] == [(MessageType.APP_RESP, 2)]


def test_a_node_alone_commits_after_its_own_sync_and_not_before() -> None:
    """etcd #14370."""
    cluster = Cluster(1)
    node = cluster.elect(1)
    index = cluster.propose(1, b"x")
    node.pump()
    assert node.raft.commit < index
    assert node.data == []
    node.sync()
    assert node.raft.commit == index
    node.pump()
    assert node.data == [b"x"]


def test_leader_does_not_commit_entry_of_earlier_term_by_counting() -> None:
    """Raft §5.4.2, figure 8: a majority has entry 2 of term 2, and 5 could still be elected over it."""
    cluster = Cluster(5)
    for node_id, terms in enumerate([(1, 2), (1, 2), (1,), (1,), (1, 3)], 1):
        give_log(cluster[node_id], *terms, term=3)
    cluster[5].crash()
    leader = cluster[1]
    leader.raft._campaign()
    for _ in range(8):
        cluster.round(0)
        for _ in range(len(cluster.mail)):
            message = cluster.mail.popleft()
            # The entry of its own term reaches nobody.
            cluster.deliver(message._replace(entries=[each for each in message.entries if each.index <= 2]))
    assert leader.leads
    assert [node.raft.log.persisted for node in cluster.running] == [3, 2, 2, 2]
    assert leader.raft.commit == 0
    cluster.tick(HEARTBEAT_TICKS * 3)
    assert leader.raft.commit == 3


def test_a_heartbeat_commits_no_more_than_is_known_to_match() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.isolate(3)
    cluster.propose(1, *[b"x"] * 5)
    cluster.settle()
    give_log(cluster[3], 1, 2, 2, 2, 2, 2, 2, term=2)  # longer, and another's
    leader.raft.tick()
    leader.raft.tick()
    leader.pump()
    heartbeats = {
        message.to: message.commit for message in cluster.mail if message.type is MessageType.HEARTBEAT
    }
    assert heartbeats == {2: 6, 3: 1}


# --- logs that differ (Raft §5.3, figure 7) ---


LEADERS_TERMS = (1, 1, 1, 4, 4, 5, 5, 6, 6, 6)


@pytest.mark.parametrize(
    ("terms", "probes"),
    [
        ((1, 1, 1, 4, 4, 5, 5, 6, 6), 2),
        ((1, 1, 1, 4), 2),
        ((*LEADERS_TERMS, 6), 2),
        ((*LEADERS_TERMS, 7, 7), 2),
        ((1, 1, 1, 4, 4, 4, 4), 2),
        ((1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3), 2),
        ((), 2),
        ((1,) + (2,) * 500, 2),
    ],
)
def test_logs_that_differ_are_brought_to_agree_with_few_probes(terms: tuple[int, ...], probes: int) -> None:
    cluster = Cluster(3)
    give_log(cluster[1], *LEADERS_TERMS, term=7)
    give_log(cluster[2], *LEADERS_TERMS, term=7)
    give_log(cluster[3], *terms, term=7)
    cluster.isolate(3)
    cluster[1].raft._campaign()
    cluster.settle()
    assert cluster[1].leads
    cluster.heal()
    refused = 0
    cluster.tick(HEARTBEAT_TICKS, settle=False)
    while cluster.round(0) or cluster.mail:
        for _ in range(len(cluster.mail)):
            message = cluster.mail.popleft()
            refused += message.type is MessageType.APP_RESP and message.reject
            cluster.deliver(message)
    assert log_terms(cluster[3]) == [*LEADERS_TERMS, 8]
    assert refused <= probes
    assert cluster[3].raft.commit == cluster[1].raft.commit


def test_void_entries_are_void_on_disk() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(1)
    cluster.propose(1, b"lost", b"too")
    cluster.pump()
    cluster[1].sync()
    cluster.elect(2)
    cluster.heal()
    cluster.tick(3 * HEARTBEAT_TICKS)
    cluster[1].crash()
    cluster[1].start()
    assert log_terms(cluster[1]) == [1, 2]


def test_a_follower_that_lost_acknowledged_entries_stops() -> None:
    """A disk that lied: going on would let a majority forget what it has committed."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.propose(1, b"x", b"y")
    cluster.settle()
    give_log(cluster[2], 1, term=1)
    leader.raft.tick()
    leader.raft.tick()
    leader.pump()
    heartbeat = next(each for each in cluster.mail if each.to == 2)
    with pytest.raises(errors.EntriesLost, match="the log here ends at 1"):
        cluster.deliver(heartbeat)


# --- turns and flow control ---


def test_a_turn_sends_one_append_a_member() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    for number in range(20):
        cluster.propose(1, b"%d" % number)
    cluster[1].pump()
    assert [len(appends(cluster, node)[0].entries) for node in (2, 3)] == [20, 20]
    assert len(cluster.mail) == 2


def test_members_at_the_same_point_get_the_same_list_of_entries() -> None:
    """So that it is encoded once."""
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.propose(1, b"x")
    first, second = leader.raft.ready().messages
    assert first.entries is second.entries


def test_a_commit_index_travels_with_the_next_entries() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    first = cluster.propose(1, b"x")
    leader.pump()
    leader.sync()
    cluster.deliver(appends(cluster, 2)[0])
    cluster[2].pump()
    cluster[2].sync()
    cluster.deliver(cluster.mail.pop())
    cluster.mail.clear()
    cluster.propose(1, b"y")
    leader.pump()
    (message,) = appends(cluster, 2)
    assert (len(message.entries), message.commit) == (1, first)


def test_appends_on_their_way_are_limited_in_number() -> None:
    cluster = Cluster(2, max_inflight_messages=3, max_append_bytes=1)
    cluster.elect(1)
    cluster.propose(1, *[b"x"] * 10)
    cluster[1].pump()
    assert len(appends(cluster, 2)) == 3
    cluster.settle()
    assert cluster[2].data == [b"x"] * 10


def test_appends_on_their_way_are_limited_in_bytes() -> None:
    cluster = Cluster(2, max_inflight_bytes=500, max_append_bytes=1)
    cluster.elect(1)
    cluster.propose(1, *[bytes(136)] * 10)  # 200 with what an entry costs
    cluster[1].pump()
    assert len(appends(cluster, 2)) == 3
    cluster.settle()
    assert len(cluster[2].data) == 10


def test_an_append_is_limited_in_bytes_but_one_large_entry_passes() -> None:
    cluster = Cluster(2, max_append_bytes=1000)
    cluster.elect(1)
    cluster.propose(1, bytes(5000), *[bytes(136)] * 7)
    cluster[1].pump()
    assert [len(message.entries) for message in appends(cluster, 2)] == [1, 5, 2]


@pytest.mark.parametrize("options", [{}, {"max_inflight_messages": 2, "max_append_bytes": 1}])
def test_lost_appends_are_sent_again_after_a_heartbeat(options: dict[str, Any]) -> None:
    cluster = Cluster(3, **options)
    cluster.elect(1)
    cluster.isolate(3)
    cluster.propose(1, *[b"x"] * 6)
    cluster.settle()
    assert cluster[1].raft.progress()[3].state is ProgressState.REPLICATE
    cluster.heal()
    cluster.tick(HEARTBEAT_TICKS * 2)
    assert cluster[3].data == [b"x"] * 6


def test_a_broken_link_makes_the_leader_careful() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.isolate(3)
    cluster.propose(1, b"x")
    cluster.settle()
    leader.raft.report_unreachable(3)
    leader.raft.report_unreachable(9)
    assert leader.raft.progress()[3].state is ProgressState.PROBE
    cluster.heal()
    cluster.propose(1, b"y")
    cluster.settle()
    assert cluster[3].data == [b"x", b"y"]
    assert leader.raft.progress()[3].state is ProgressState.REPLICATE


def test_an_append_that_tells_of_a_commit_alone_is_not_answered() -> None:
    cluster = Cluster(2)
    cluster.elect(1)
    cluster.propose(1, b"x")
    answered: list[Message] = []
    for _ in range(6):
        cluster.round(0)
        for _ in range(len(cluster.mail)):
            message = cluster.mail.popleft()
            if message.type is MessageType.APP_RESP:
                answered.append(message)
            cluster.deliver(message)
    assert len(answered) == 1
    assert cluster[2].data == [b"x"]


def test_a_lost_acknowledgement_is_made_good_by_heartbeats() -> None:
    cluster = Cluster(2)
    leader = cluster.elect(1)
    cluster.cut((2, 1))
    index = cluster.propose(1, b"x")
    cluster.settle()
    assert cluster[2].raft.log.persisted == index
    cluster.heal()
    cluster.tick(2 * HEARTBEAT_TICKS)
    assert leader.raft.commit == index
    assert cluster[2].data == [b"x"]


def test_a_follower_that_applies_slowly_is_not_flooded_and_catches_up() -> None:
    cluster = Cluster(3, max_unapplied_bytes=1000)
    leader = cluster.elect(1)
    slow = cluster[3]
    apply = slow.apply
    waiting: list[Sequence[Entry]] = []
    slow.apply = waiting.append  # type: ignore[method-assign, assignment]
    for _ in range(20):
        cluster.propose(1, bytes(136))
        cluster.settle()
    assert slow.raft.log.unapplied_bytes < 1500
    assert len(cluster[2].data) == 20
    slow.apply = apply  # type: ignore[method-assign]
    for entries in waiting:
        apply(entries)
    cluster.tick(10 * HEARTBEAT_TICKS)
    assert len(slow.data) == 20
    assert leader.leads


def test_a_log_full_of_what_was_not_applied_before_a_crash_is_no_reason_to_take_nothing() -> None:
    cluster = Cluster(3, max_unapplied_bytes=500)
    cluster.elect(1)
    for _ in range(10):
        cluster.propose(1, bytes(136))
        cluster.settle()
    for node in cluster.running:
        node.crash()  # their states were never synced
    for node in cluster.nodes.values():
        node.start()
    cluster.tick(4 * ELECTION_TICKS)
    assert cluster.leader is not None
    assert [len(node.data) for node in cluster.nodes.values()] == [10, 10, 10]


def test_entries_of_earlier_terms_in_the_place_of_void_ones_are_no_reason_to_take_nothing() -> None:
    """A sync is believed again with the first entry of the leader's own term: it must get through."""
    cluster = Cluster(3, max_unapplied_bytes=100, max_append_bytes=1)
    for node, terms in ((1, (1,) * 8), (2, (1,) * 8), (3, (1, 2, 2))):
        give_log(cluster[node], *terms, term=2)
    cluster.isolate(3)
    cluster[1].raft._campaign()
    cluster.settle()
    cluster.heal()
    cluster.tick(10 * HEARTBEAT_TICKS)
    assert cluster[3].raft.commit == 9
    assert cluster[3].state.index == 9


def test_a_leader_that_hears_of_committed_entries_which_it_does_not_have_stops() -> None:
    cluster = Cluster(2)
    leader = cluster.elect(1)
    assert leader.raft.commit == 1
    with pytest.raises(errors.EntriesLost, match=r"entries up to 99.*ends at 1"):
        leader.raft.step(Message(MessageType.APP_RESP, 1, 2, 1, index=99))
    assert leader.raft.progress()[2].match == 1
    assert not leader.raft.has_ready


def test_answers_of_strangers_are_ignored() -> None:
    cluster = Cluster(2)
    leader = cluster.elect(1)
    leader.raft.step(Message(MessageType.APP_RESP, 1, 7, 1, index=1))  # nobody knows 7
    leader.raft.step(Message(MessageType.HEARTBEAT_RESP, 1, 7, 1))
    assert leader.raft.commit == 1


def test_answers_that_come_late_or_twice_change_nothing() -> None:
    cluster = Cluster(2)
    leader = cluster.elect(1)
    cluster.propose(1, b"x", b"y")
    cluster.settle()
    before = leader.raft.progress()[2]
    for message in (
        Message(MessageType.APP_RESP, 1, 2, 1, index=2),
        Message(MessageType.APP_RESP, 1, 2, 1, index=1, reject=True, reject_hint=0),
        Message(MessageType.APP_RESP, 1, 2, 1, index=3, reject=True, reject_hint=0),
    ):
        leader.raft.step(message)
    assert leader.raft.progress()[2] == before


def test_progress_is_known_to_the_leader_alone() -> None:
    cluster = Cluster(2, learners=[3])
    cluster.elect(1)
    progress = cluster[1].raft.progress()
    assert {node: (each.match, each.learner) for node, each in progress.items()} == {
        1: (1, False), 2: (1, False), 3: (1, True)
    }  # fmt: skip
    assert cluster[2].raft.progress() == {}
