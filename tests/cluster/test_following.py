"""What a follower does on a leader's word; above all, fetching a snapshot, and all that may come between."""

import pytest

from aspenfs import errors
from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.progress import ProgressState
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.types import Configuration, Entry, HardState, Role, Snapshot
from tests.cluster.network import Cluster, learn, remove

ELECTION_TICKS, HEARTBEAT_TICKS = 14, 2


def lagging(*, voters: int = 3, learners: tuple[int, ...] = ()) -> Cluster:
    """1 leads, 3 was cut off, and what it lacks is compacted everywhere else."""
    cluster = Cluster(voters, learners=learners)
    cluster.elect(1)
    cluster.isolate(3)
    cluster.propose(1, *[b"%d" % number for number in range(10)])
    cluster.settle()
    for node in cluster.running:
        if node.node_id != 3:
            node.compact()
    cluster.heal()
    return cluster


def fetching(cluster: Cluster) -> Snapshot:
    """Ticks until 3 knows that it needs a snapshot."""
    for _ in range(10):
        cluster.tick(HEARTBEAT_TICKS)
        if cluster[3].fetching is not None:
            return cluster[3].fetching
    raise AssertionError("3 was offered no snapshot")


def sent_to_3(cluster: Cluster, ticks: int) -> list[MessageType]:
    """What 3 gets in so many ticks."""
    kinds: list[MessageType] = []
    deliver = cluster.deliver

    def note(message: Message) -> None:
        if message.to == 3:
            kinds.append(message.type)
        deliver(message)

    cluster.deliver = note  # type: ignore[method-assign]
    cluster.tick(ticks)
    cluster.deliver = deliver  # type: ignore[method-assign]
    return kinds


def test_who_lacks_what_is_compacted_fetches_a_snapshot_and_goes_on() -> None:
    cluster = lagging()
    snapshot = fetching(cluster)
    assert snapshot == Snapshot(11, 1, Configuration((1, 2, 3)))
    assert cluster[1].raft.progress()[3].state is ProgressState.SNAPSHOT
    cluster[3].install(cluster[1])
    cluster.settle()
    assert cluster[1].raft.progress()[3].state is ProgressState.REPLICATE
    cluster.propose(1, b"more")
    cluster.settle()
    assert cluster[3].data == cluster[1].data
    assert cluster[3].raft.log.compacted == 11


def test_a_later_state_than_the_one_offered_is_as_good() -> None:
    cluster = lagging()
    fetching(cluster)
    cluster.propose(1, b"meanwhile")
    cluster.settle()
    cluster[1].compact()
    assert cluster[3].install(cluster[2]).index == 12
    cluster.propose(1, b"more")
    cluster.settle()
    assert cluster[3].data == cluster[1].data


def test_an_earlier_state_than_the_one_asked_for_is_a_mistake() -> None:
    cluster = lagging()
    fetching(cluster)
    with pytest.raises(AssertionError):
        cluster[3].raft.snapshot_installed(Snapshot(10, 1, Configuration((1, 2, 3))))


def test_a_snapshot_that_nobody_asked_for_is_a_mistake() -> None:
    cluster = Cluster(1)
    with pytest.raises(AssertionError):
        cluster[1].raft.snapshot_installed(Snapshot(10, 1, Configuration((1,))))


def test_a_snapshot_that_the_log_has_overtaken_is_followed_by_another() -> None:
    cluster = lagging()
    fetching(cluster)
    state = cluster[1].state.index
    cluster.propose(1, b"a", b"b")
    cluster.settle()
    cluster[1].compact()
    cluster[2].compact()
    cluster[3].install(cluster[1], state)
    again = fetching(cluster)
    assert again.index == state + 2
    cluster[3].install(cluster[1])
    cluster.settle()
    assert cluster[3].data == cluster[1].data


def test_nothing_is_sent_to_who_fetches_but_heartbeats() -> None:
    cluster = lagging()
    fetching(cluster)
    cluster.propose(1, b"x")
    assert set(sent_to_3(cluster, 10 * HEARTBEAT_TICKS)) == {MessageType.HEARTBEAT}


def test_nothing_is_applied_or_appended_while_a_snapshot_is_fetched() -> None:
    """The log will be replaced: what it acknowledged now would be lost with it."""
    cluster = lagging()
    fetching(cluster)
    raft, last = cluster[3].raft, cluster[3].raft.last_index
    entry = Entry(1, last + 1, 1, b"x")
    raft.step(Message(MessageType.APP, 3, 1, 1, log_term=1, index=last, commit=last, entries=[entry]))
    cluster[3].pump()
    assert raft.last_index == last
    assert not cluster.mail


def test_a_fetch_that_failed_is_offered_again() -> None:
    cluster = lagging()
    fetching(cluster)
    cluster[3].fail_fetch()
    fetching(cluster)
    cluster[3].install(cluster[1])
    cluster.settle()
    assert cluster[3].data == cluster[1].data


def test_a_node_that_dies_while_it_fetches_is_offered_a_snapshot_again() -> None:
    cluster = lagging()
    fetching(cluster)
    cluster[3].crash()
    cluster.tick(3 * HEARTBEAT_TICKS)
    cluster[3].start()
    fetching(cluster)
    cluster[3].install(cluster[1])
    cluster.settle()
    assert cluster[3].data == cluster[1].data


def test_an_offer_that_was_lost_is_repeated() -> None:
    cluster = lagging()
    cluster[1].pump()
    cluster.cut((1, 3))
    cluster.tick(HEARTBEAT_TICKS)
    cluster[1].raft.step(Message(MessageType.HEARTBEAT_RESP, 1, 3, 1))
    cluster[1].raft.step(
        Message(MessageType.APP_RESP, 1, 3, 1, index=11, reject=True, reject_hint=1, log_term=1)
    )
    cluster.settle()
    assert cluster[1].raft.progress()[3].state is ProgressState.SNAPSHOT
    cluster.heal()
    fetching(cluster)


def test_a_node_that_is_not_heard_gets_no_offer() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(3)
    cluster.propose(1, *[b"x"] * 10)
    cluster.settle()
    cluster[1].compact()
    cluster[1].raft.report_unreachable(3)
    cluster.tick(2 * ELECTION_TICKS)
    assert cluster[1].raft.progress()[3].state is ProgressState.PROBE


def test_a_new_leader_leaves_who_fetches_in_peace_and_goes_on_when_it_is_done() -> None:
    cluster = lagging()
    fetching(cluster)
    cluster[1].raft.transfer_leader(2)
    cluster.settle()
    assert cluster[2].leads
    cluster.tick(2 * HEARTBEAT_TICKS)
    assert cluster[2].raft.progress()[3].state is ProgressState.SNAPSHOT
    assert set(sent_to_3(cluster, 5 * HEARTBEAT_TICKS)) == {MessageType.HEARTBEAT}
    cluster[3].install(cluster[1])  # from the old leader
    cluster.tick(2 * HEARTBEAT_TICKS)
    assert cluster[3].data == cluster[2].data
    assert cluster[2].raft.progress()[3].state is ProgressState.REPLICATE


def test_a_new_leader_that_still_has_the_entries_sends_them_after_a_fetch_that_failed() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(3)
    cluster.propose(1, *[b"x"] * 5)
    cluster.settle()
    cluster[1].compact()  # and 2 does not
    cluster.heal()
    fetching(cluster)
    cluster[1].raft.transfer_leader(2)
    cluster.settle()
    cluster[1].crash()
    cluster[3].fail_fetch()
    cluster.tick(4 * HEARTBEAT_TICKS)
    assert cluster[3].data == [b"x"] * 5


def test_who_fetches_stands_for_no_election() -> None:
    cluster = lagging()
    fetching(cluster)
    cluster[1].crash()
    cluster[2].crash()
    cluster.tick(4 * ELECTION_TICKS)
    assert cluster[3].raft.role is Role.FOLLOWER
    cluster[3].raft.step(Message(MessageType.TIMEOUT_NOW, 3, 1, 1))
    assert cluster[3].raft.role is Role.FOLLOWER


def test_a_report_that_a_fetch_ended_is_faster_than_heartbeats() -> None:
    cluster = lagging()
    fetching(cluster)
    cluster[1].raft.report_snapshot(2, True)  # nobody said so
    cluster[3].fail_fetch()
    cluster[1].raft.report_snapshot(3, False)
    assert cluster[1].raft.progress()[3].state is ProgressState.PROBE
    assert cluster[1].raft.progress()[3].next == 2
    fetching(cluster)
    snapshot = cluster[3].install(cluster[1])
    cluster[1].raft.report_snapshot(3, True)
    assert cluster[1].raft.progress()[3].next == snapshot.index + 1
    cluster.tick(HEARTBEAT_TICKS)
    cluster.propose(1, b"x")
    cluster.settle()
    assert cluster[3].data[-1] == b"x"


def test_a_snapshot_of_what_is_here_already_is_not_fetched() -> None:
    cluster = Cluster(2)
    cluster.elect(1)
    cluster.propose(1, b"x")
    cluster.settle()
    raft = cluster[2].raft
    raft.step(Message(MessageType.SNAP, 2, 1, 1, snapshot=Snapshot(2, 1, Configuration((1, 2)))))
    cluster[2].pump()
    assert cluster[2].fetching is None
    assert [(message.type, message.index) for message in cluster.mail] == [(MessageType.APP_RESP, 2)]


def test_a_snapshot_that_the_log_agrees_with_tells_what_is_committed() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.propose(1, b"x")
    cluster[1].pump()
    cluster.deliver(next(message for message in cluster.mail if message.to == 2))
    cluster.mail.clear()
    cluster[2].pump()
    cluster[2].sync()
    assert cluster[2].raft.commit == 1
    cluster[2].raft.step(
        Message(MessageType.SNAP, 2, 1, 1, snapshot=Snapshot(2, 1, Configuration((1, 2, 3))))
    )
    cluster[2].pump()
    assert cluster[2].data == [b"x"]
    assert cluster[2].fetching is None


def test_a_log_that_contradicts_the_snapshot_is_replaced_on_disk_too() -> None:
    cluster = Cluster(3)
    cluster.elect(3)
    cluster.isolate(3)
    cluster.propose(3, *[b"lost"] * 20)
    cluster.pump()
    cluster[3].sync()
    cluster.elect(1)
    cluster.propose(1, *[b"x"] * 5)
    cluster.settle()
    cluster[1].compact()
    cluster.heal()
    fetching(cluster)
    cluster[3].install(cluster[1])
    cluster.settle()
    cluster[3].crash()
    cluster[3].start()
    assert cluster[3].data == [b"x"] * 5
    cluster.propose(1, b"y")
    cluster.tick(2 * HEARTBEAT_TICKS)
    assert cluster[3].data == cluster[1].data


def test_a_snapshot_brings_the_configuration() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(3)
    cluster.add_node(4)
    cluster.change(1, learn(4))
    cluster.settle()
    cluster[1].compact()
    cluster.heal()
    fetching(cluster)
    assert cluster[3].raft.configuration == Configuration((1, 2, 3))
    cluster[3].install(cluster[1])
    cluster.settle()
    assert cluster[3].raft.configuration == Configuration((1, 2, 3), learners=(4,))


def test_a_node_that_joins_a_compacted_cluster_begins_with_a_snapshot() -> None:
    cluster = Cluster(1)
    cluster.elect(1)
    cluster.propose(1, *[b"x"] * 5)
    cluster.settle()
    cluster[1].compact()
    cluster.add_node(3)
    cluster.change(1, learn(3))
    cluster.settle()
    fetching(cluster)
    cluster[3].install(cluster[1])
    cluster.propose(1, b"y")
    cluster.settle()
    assert cluster[3].data == [b"x"] * 5 + [b"y"]
    assert cluster[3].raft.configuration == Configuration((1,), learners=(3,))


def test_the_state_offered_is_the_one_that_the_owner_set_while_the_log_reaches_back_to_it() -> None:
    cluster = lagging()
    leader = cluster[1]
    cluster.propose(1, b"not in the durable state")
    cluster.settle()
    assert fetching(cluster).index == leader.durable_index == 11
    cluster[3].fail_fetch()
    leader.raft.compact(leader.raft.log.applied)
    assert fetching(cluster).index == leader.raft.log.applied == 12


def test_a_removed_member_that_fetches_is_forgotten() -> None:
    cluster = lagging()
    fetching(cluster)
    cluster.change(1, remove(3))
    cluster.settle()
    cluster[3].install(cluster[1])
    cluster.tick(2 * ELECTION_TICKS)
    assert cluster[1].leads
    assert cluster[3].raft.configuration == Configuration((1, 2))


# --- states that the owner replaces of its own accord ---


def test_nothing_is_handed_out_for_applying_while_the_owner_says_so() -> None:
    cluster = Cluster(2)
    cluster.elect(1)
    cluster[2].raft.suspended = True
    index = cluster.propose(1, b"x")
    cluster.settle()
    assert cluster[2].raft.commit == index  # the log goes on
    assert cluster[2].data == []
    assert not cluster[2].raft.has_ready
    cluster[2].raft.suspended = False
    cluster.settle()
    assert cluster[2].data == [b"x"]


def test_a_log_that_leads_on_from_another_state_stays() -> None:
    cluster = Cluster(2)
    cluster.elect(1)
    cluster.propose(1, b"x", b"y")
    cluster.settle()
    raft = cluster[2].raft
    assert raft.keeps_log(Snapshot(3, 1, Configuration((1, 2))))
    assert raft.last_index == 3
    cluster.propose(1, b"z")
    cluster.settle()
    assert cluster[2].data == [b"x", b"y", b"z"]


@pytest.mark.parametrize(
    "snapshot", [Snapshot(9, 1, Configuration((1, 2, 3))), Snapshot(3, 2, Configuration((1, 2, 3)))]
)
def test_a_log_that_does_not_lead_there_takes_nothing_until_it_is_replaced(snapshot: Snapshot) -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.isolate(3)
    raft = cluster[3].raft
    raft.step(Message(MessageType.APP, 3, 1, 1, log_term=1, index=1, commit=1, entries=[
        Entry(1, 2, 1, b"x"), Entry(1, 3, 1, b"not committed")]))  # fmt: skip
    cluster.settle()
    assert not raft.keeps_log(snapshot)
    raft.step(
        Message(MessageType.APP, 3, 1, 1, log_term=1, index=3, commit=1, entries=[Entry(1, 4, 1, b"y")])
    )
    assert raft.last_index == 3
    assert not raft.campaign()
    raft.snapshot_installed(snapshot)
    assert (raft.last_index, raft.commit, raft.log.last_term) == (
        snapshot.index,
        snapshot.index,
        snapshot.term,
    )


# --- appends ---


def test_an_append_before_what_is_committed_is_answered_with_what_is() -> None:
    cluster = Cluster(2)
    cluster.elect(1)
    cluster.propose(1, b"x", b"y")
    cluster.settle()
    cluster[2].raft.step(Message(MessageType.APP, 2, 1, 1, index=0, entries=[Entry(1, 1, 1, b"")]))
    cluster[2].pump()
    assert [(message.type, message.index) for message in cluster.mail] == [(MessageType.APP_RESP, 3)]


def test_a_commit_index_counts_only_as_far_as_logs_are_known_to_agree() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    raft = cluster[2].raft
    entries = [Entry(1, index, 1, b"x") for index in (2, 3, 4)]
    raft.step(Message(MessageType.APP, 2, 1, 1, log_term=1, index=1, commit=1, entries=entries))
    raft.step(Message(MessageType.APP, 2, 1, 1, log_term=1, index=2, commit=9))
    assert raft.commit == 2


def test_all_appends_of_a_turn_are_acknowledged_at_once() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    for index in (1, 2, 3):
        entry = Entry(1, index + 1, 1, b"x")
        cluster[2].raft.step(Message(MessageType.APP, 2, 1, 1, log_term=1, index=index, entries=[entry]))
    cluster[2].pump()
    cluster[2].sync()
    assert [(message.type, message.index) for message in cluster.mail] == [(MessageType.APP_RESP, 4)]


def test_two_leaders_of_one_term_stop_a_node() -> None:
    cluster = Cluster(3)
    cluster.elect(1)
    with pytest.raises(AssertionError, match="both lead"):
        cluster[2].raft.step(Message(MessageType.HEARTBEAT, 2, 3, 1))
    with pytest.raises(AssertionError, match="both lead"):
        cluster[1].raft.step(Message(MessageType.APP, 1, 3, 1))


# --- entries that are committed here and lost elsewhere ---


def with_committed(*terms: int, compacted: int = 0) -> Raft:
    """A follower of term 8 that has applied entries of these terms."""
    entries = [Entry(each, index, 1, b"") for index, each in enumerate(terms, 1)]
    return Raft(
        1, Configuration((1, 2, 3)), hard_state=HardState(8, 0), entries=entries[compacted:],
        base_index=compacted, base_term=terms[compacted - 1] if compacted else 0, applied=len(terms),
        random=lambda _: 0,
    )  # fmt: skip


def append(index: int, log_term: int, *terms: int, term: int = 8) -> Message:
    entries = [Entry(each, position, 1, b"") for position, each in enumerate(terms, index + 1)]
    return Message(MessageType.APP, 1, 2, term, log_term=log_term, index=index, commit=0, entries=entries)


LOST = [
    (0, append(2, 3)),  # it follows another entry than the one here
    (0, append(4, 3)),  # also where it is the last one that is committed
    (0, append(1, 1, 3)),
    (0, append(1, 1, 1, 1, 3)),
    (3, append(3, 3)),  # the last one that is compacted
    (3, append(2, 3)),  # no entry here is known; but none before the third is of a later term than that one
    (3, append(1, 1, 3)),
    (0, Message(MessageType.SNAP, 1, 2, 8, snapshot=Snapshot(3, 3, Configuration((1, 2, 3))))),
]


@pytest.mark.parametrize(("compacted", "message"), LOST)
def test_a_leader_without_what_is_committed_here_stops_this_node(compacted: int, message: Message) -> None:
    raft = with_committed(1, 1, 2, 2, compacted=compacted)
    with pytest.raises(errors.EntriesLost, match=r"committed here.*recover --force-new-cluster"):
        raft.step(message)
    assert not raft.has_ready
    raft.tick()
    with pytest.raises(errors.EntriesLost):  # it says nothing any more, to nobody
        raft.step(Message(MessageType.VOTE, 1, 3, 9, log_term=9, index=99))
    assert not raft.has_ready


@pytest.mark.parametrize(
    ("compacted", "message"),
    [
        (0, append(0, 0, 1, 1, 2)),
        (0, append(3, 2)),
        (0, append(3, 2, 2, 3)),
        (0, append(4, 2, 3)),
        (2, append(1, 1, 1, 2)),
        (3, append(0, 0, 1, 1, 2, 2, 2)),
        (3, append(1, 1)),
        (0, Message(MessageType.SNAP, 1, 2, 8, snapshot=Snapshot(3, 2, Configuration((1, 2, 3))))),
        (3, Message(MessageType.SNAP, 1, 2, 8, snapshot=Snapshot(2, 1, Configuration((1, 2, 3))))),
        (0, append(9, 8)),
    ],
)
def test_what_agrees_with_what_is_committed_stops_nobody(compacted: int, message: Message) -> None:
    raft = with_committed(1, 1, 2, 2, compacted=compacted)
    for _ in range(2):
        raft.step(message)
        assert raft.ready().messages_after_sync


def test_a_leader_of_an_earlier_term_than_the_fetched_state_is_not_answered() -> None:
    """Its log may lack what the state has, and nothing is wrong: a later leader has committed that."""
    raft = with_committed(1, 1)
    raft.step(Message(MessageType.HEARTBEAT, 1, 2, 8))
    assert not raft.keeps_log(Snapshot(20, 9, Configuration((1, 2, 3))))
    raft.snapshot_installed(Snapshot(20, 9, Configuration((1, 2, 3))))
    raft.step(append(3, 8, 8))
    raft.step(append(20, 8))
    assert not raft.ready().messages_after_sync
    raft.step(append(10, 9, 9, term=9))
    (answer,) = raft.ready().messages_after_sync
    assert (answer.index, answer.reject) == (20, False)


def test_a_node_that_has_less_than_it_has_acknowledged_stops() -> None:
    raft = with_committed(1, 1)
    with pytest.raises(errors.EntriesLost, match=r"old copy.*aspen join"):
        raft.step(Message(MessageType.HEARTBEAT, 1, 2, 8, commit=3))
    assert not raft.has_ready
