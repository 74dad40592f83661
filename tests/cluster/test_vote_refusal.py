"""A refused vote tells what is committed: a node that lags behind a change of the configuration learns of it.

Found by simulation (seed 1311): a leader demoted itself and crashed with entries behind that change which the
other voter, the only one left, had not got. The other did not know that the change was committed, needed
the demoted node's vote, and never got it, for that one's log was longer.
"""

from aspenfs.cluster.membership import Change, ChangeKind, ConfigurationChange
from aspenfs.cluster.messages import Message, MessageType
from aspenfs.cluster.raft import Raft
from aspenfs.cluster.types import Configuration, Entry, EntryKind, HardState, Role
from aspenfs.limits import ELECTION_TICKS

DEMOTION = ConfigurationChange((Change(ChangeKind.ADD_LEARNER, 2),)).encode()
LOG = [Entry(1, 1, EntryKind.NORMAL, b""), Entry(1, 2, EntryKind.CONFIGURATION, DEMOTION)]
BEHIND = Entry(1, 3, EntryKind.NORMAL, b"nobody else has it")


def node(node_id: int, configuration: Configuration, entries: list[Entry], applied: int) -> Raft:
    return Raft(node_id, configuration, hard_state=HardState(1, 0), entries=entries, base_index=0,
                base_term=0, applied=applied, random=lambda bound: 0, fresh=True)  # fmt: skip


def turn(raft: Raft) -> list[Message]:
    """Carries out all that it asks for; what it says."""
    messages: list[Message] = []
    while raft.has_ready:
        ready = raft.ready()
        messages += [*ready.messages, *ready.messages_after_sync]
        if ready.entries:
            raft.persisted(ready.entries[-1].index, ready.entries[-1].term)
        for entry in ready.committed:
            if entry.kind == EntryKind.CONFIGURATION:
                raft.apply_configuration(ConfigurationChange.decode(entry.data))
            raft.applied_to(entry.index)
    return messages


def test_demoted_node_with_a_longer_log_tells_the_voter_that_is_left() -> None:
    voter = node(1, Configuration((1, 2)), LOG, applied=0)
    demoted = node(2, Configuration((1,), (), (2,)), [*LOG, BEHIND], applied=2)
    answers = []
    for _ in range(4 * ELECTION_TICKS):
        voter.tick()
        demoted.tick()
        for message in turn(voter):
            demoted.step(message)
        for answer in turn(demoted):
            answers.append(answer)
            voter.step(answer)
    assert (answers[0].type, answers[0].reject) == (MessageType.PRE_VOTE_RESP, True)
    assert (answers[0].commit, answers[0].log_term) == (2, 1)
    assert voter.role is Role.LEADER
    assert voter.configuration == Configuration((1,), (), (2,))
    assert demoted.last_index == 3  # the voter's log has taken the place of its own
    assert demoted.log.term_at(3) == voter.term


def test_what_is_said_to_be_committed_is_believed_only_of_the_very_same_entry() -> None:
    voter = node(1, Configuration((1, 2)), LOG, applied=0)
    for index, term in ((3, 1), (2, 0), (2, 2)):
        voter.step(Message(MessageType.PRE_VOTE_RESP, 1, 2, 1, term, commit=index, reject=True))
    assert voter.commit == 0
    voter.step(Message(MessageType.PRE_VOTE_RESP, 1, 2, 1, 1, commit=2, reject=True))
    assert voter.commit == 2
