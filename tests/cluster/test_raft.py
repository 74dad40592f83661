"""The seam to the owner: what a Ready says and when, what comes in from outside, how a node starts."""

from collections.abc import Sequence

import pytest

from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.types import Configuration, Entry, HardState, Role, Snapshot
from tests.cluster.network import Cluster

ELECTION_TICKS, HEARTBEAT_TICKS = 14, 2


def a_raft(
    *, term: int = 0, entries: Sequence[Entry] = (), base: tuple[int, int] = (0, 0), applied: int = 0
) -> Raft:
    """Node 1 of three."""
    return Raft(
        1, Configuration((1, 2, 3)), hard_state=HardState(term, 0), entries=entries, base_index=base[0],
        base_term=base[1], applied=applied, random=lambda bound: 0, fresh=True,
    )  # fmt: skip


def test_a_new_node_has_nothing_to_do() -> None:
    raft = a_raft()
    assert not raft.has_ready
    ready = raft.ready()
    assert (ready.truncate_after, ready.hard_state, ready.must_sync, ready.snapshot) == (
        None,
        None,
        False,
        None,
    )
    assert not any((ready.entries, ready.messages, ready.messages_after_sync, ready.committed, ready.reads))


def test_a_ready_says_once_what_is_to_be_done() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.propose(1, b"x")
    first, second = leader.raft.ready(), leader.raft.ready()
    assert [entry.data for entry in first.entries] == [b"x"]
    assert first.must_sync
    assert len(first.messages) == 2
    assert not any((second.entries, second.messages, second.messages_after_sync, second.must_sync))
    assert not leader.raft.has_ready


def test_term_and_vote_are_said_when_they_change_and_with_what_depends_on_them() -> None:
    raft = a_raft()
    raft.step(Message(MessageType.VOTE, 1, 2, 5, 9, 9))
    ready = raft.ready()
    assert ready.hard_state == HardState(5, 2)
    assert ready.must_sync
    assert [message.type for message in ready.messages_after_sync] == [MessageType.VOTE_RESP]
    assert not ready.messages
    raft.step(Message(MessageType.HEARTBEAT, 1, 2, 5))
    ready = raft.ready()
    assert ready.hard_state is None
    assert not ready.must_sync


def test_void_entries_are_named_before_those_that_take_their_place() -> None:
    raft = a_raft(term=2, entries=[Entry(1, 1, 1, b""), Entry(1, 2, 1, b""), Entry(2, 3, 1, b"")])
    entry = Entry(3, 2, 1, b"new")
    raft.step(Message(MessageType.APP, 1, 2, 3, log_term=1, index=1, entries=[entry]))
    ready = raft.ready()
    assert (ready.truncate_after, list(ready.entries)) == (1, [entry])
    assert ready.must_sync
    assert [(each.type, each.index) for each in ready.messages_after_sync] == [(MessageType.APP_RESP, 2)]


def test_entries_of_a_leader_go_out_before_its_disk_has_them_and_answers_after() -> None:
    cluster = Cluster(2)
    leader = cluster.elect(1)
    cluster.propose(1, b"x")
    ready = leader.raft.ready()
    assert [message.type for message in ready.messages] == [MessageType.APP]
    assert not ready.messages_after_sync
    cluster[2].raft.step(ready.messages[0])
    ready = cluster[2].raft.ready()
    assert not ready.messages
    assert [message.type for message in ready.messages_after_sync] == [MessageType.APP_RESP]


def test_has_ready_tells_whether_a_ready_has_anything() -> None:
    """After each of many inputs, on every node."""
    cluster = Cluster(3)
    cluster.elect(1)
    cluster.add_node(4)
    looked = 0
    for number in range(60):
        cluster.propose(1, b"%d" % number)
        if number % 7 == 0:
            cluster.read(1 + number % 3, b"%d" % number)
        for node in cluster.running:
            node.raft.tick()
            while True:
                has = node.raft.has_ready
                ready = node.raft.ready()
                some = any(
                    (ready.truncate_after is not None, ready.entries, ready.hard_state, ready.messages,
                     ready.messages_after_sync, ready.snapshot, ready.committed, ready.reads)
                )  # fmt: skip
                assert has or not some
                node.carry_out(ready)
                looked += 1
                if not some:
                    break
            if node.unsynced:
                node.sync()
        for _ in range(len(cluster.mail)):
            cluster.deliver(cluster.mail.popleft())
    assert looked > 300


def test_what_is_applied_is_handed_out_in_bounded_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    import aspenfs.cluster.raft as module

    monkeypatch.setattr(module, "RAFT_APPLY_BYTES_MAX", 1)
    cluster = Cluster(1)
    node = cluster.elect(1)
    cluster.propose(1, b"a", b"b")
    node.pump()
    node.sync()
    assert [entry.data for entry in node.raft.ready().committed] == [b"a"]
    assert [entry.data for entry in node.raft.ready().committed] == [b"b"]


def test_a_node_starts_where_its_owner_is() -> None:
    log = [Entry(2, 6, 1, b"a"), Entry(3, 7, 1, b"b"), Entry(3, 8, 1, b"c")]
    raft = a_raft(term=4, entries=log, base=(5, 2), applied=6)
    assert (raft.term, raft.commit, raft.last_index, raft.role) == (4, 6, 8, Role.FOLLOWER)
    assert not raft.has_ready
    raft.step(Message(MessageType.HEARTBEAT, 1, 2, 4, commit=8))
    assert list(raft.ready().committed) == log[1:]


def test_a_log_of_a_later_term_than_the_nodes_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        a_raft(term=1, entries=[Entry(2, 1, 1, b"")])


def test_messages_for_others_of_oneself_and_of_strangers_change_nothing() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    leader.raft.step(Message(MessageType.HEARTBEAT, 2, 3, 9))
    leader.raft.step(Message(MessageType.HEARTBEAT, 1, 1, 9))
    leader.raft.step(Message(MessageType.APP_RESP, 1, 9, 1, index=1))
    leader.raft.step(Message(MessageType.READ_INDEX_RESP, 1, 9, 1))
    assert leader.leads
    assert leader.raft.term == 1


@pytest.mark.parametrize("kind", list(MessageType))
@pytest.mark.parametrize("term", [1, 2, 3, 9])
@pytest.mark.parametrize("role", [Role.FOLLOWER, Role.PRE_CANDIDATE, Role.CANDIDATE, Role.LEADER])
def test_every_message_is_taken_in_every_role(kind: MessageType, term: int, role: Role) -> None:
    """Nothing that a peer of another version or an earlier time may say stops a node, but two leaders, and
    proof that what was committed is lost."""
    raft = a_raft(term=1)
    raft.campaign()
    if role is not Role.PRE_CANDIDATE:
        raft.step(Message(MessageType.PRE_VOTE_RESP, 1, 2, 2))
    if role is Role.LEADER:
        raft.step(Message(MessageType.VOTE_RESP, 1, 2, 2))
    if role is Role.FOLLOWER:
        raft.step(Message(MessageType.HEARTBEAT, 1, 2, 2))
    assert raft.role is role
    snapshot = Snapshot(7, 1, Configuration((1, 2, 3))) if kind is MessageType.SNAP else None
    index = 1 if role is Role.LEADER and kind is MessageType.APP_RESP else 2
    message = Message(kind, 1, 2, term, index=index, context=b"c", snapshot=snapshot)
    from_leader = kind in (MessageType.APP, MessageType.HEARTBEAT, MessageType.SNAP)
    if role is Role.LEADER and term == raft.term and from_leader:
        with pytest.raises(AssertionError, match="both lead"):
            raft.step(message)
        return
    for _ in range(2):
        raft.step(message)
        while raft.has_ready:
            raft.ready()
        raft.tick()


def test_a_leader_keeps_its_log_while_it_leads() -> None:
    cluster = Cluster(3)
    leader = cluster.elect(1)
    cluster.isolate(1)
    cluster.propose(1, b"x")
    cluster.tick(ELECTION_TICKS)
    log = leader.raft.log
    assert [entry.data for entry in log.slice(1, log.last_index, 1 << 20)] == [b"", b"x"]
