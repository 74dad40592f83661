"""Election: who asks for votes, when, and who gets them.

Belongs here: campaigns, pre-votes, votes, what a node has promised a leader. Not here: what a new leader
does (`replication.py`).

Pre-vote (Raft §9.6): a node asks whether it would win before it raises its term. Stickiness (§4.2.3, and
the ground of leases, §6.4.1): a node that heard a leader less than an election timeout ago votes for nobody,
unless that leader hands over. It is a matter of time alone: that the node's term rose meanwhile, or that
it was started again, ends no promise.
"""

from typing import Final

from aspenfs.cluster.core import CANDIDATE, FOLLOWER, LEADER, PRE_CANDIDATE
from aspenfs.cluster.leading import Leading
from aspenfs.cluster.messages import CAMPAIGN_TRANSFER, Message, MessageType
from aspenfs.cluster.quorum import VoteResult, joint_vote
from aspenfs.cluster.types import NOBODY

_VOTE: Final = MessageType.VOTE
_PRE_VOTE: Final = MessageType.PRE_VOTE
_PRE_VOTE_RESP: Final = MessageType.PRE_VOTE_RESP
_VOTE_RESP: Final = MessageType.VOTE_RESP


class Election(Leading):
    # --- campaigns ---

    def campaign(self, *, quietly: bool = False) -> bool:
        """Stands for election now. False: it may not, or leads already.

        A node that is the only voter leads when this returns; it needs nobody. If it is alone, `quietly`
        leaves out the empty entry of its term: nobody could have committed what it does not know of.
        """
        self._quietly = quietly
        if self.role is LEADER or not self._may_campaign or self._contact_elapsed < self._election_ticks:
            return False
        self._pre_campaign()
        return True

    @property
    def _may_campaign(self) -> bool:
        """Not who is no voter, is fetching a snapshot, or lags behind a change of the configuration that it
        knows to be committed: its idea of a majority is out of date."""
        log = self.log
        if not self._is_voter or self._wanted is not None:
            return False
        return log.applied == log.committed or not log.configurations_between(log.applied, log.committed)

    def _pre_campaign(self) -> None:
        """Would it win? Term and vote stay as they are."""
        self.role = PRE_CANDIDATE
        self.leader = NOBODY
        self._election_elapsed = 0
        self._draw_timeout()
        self._acknowledgement = self._acknowledged = 0
        self._votes = {self.node_id: True}
        if self._tally() is VoteResult.WON:
            self._campaign()
            return
        self._ask_voters(self._messages, _PRE_VOTE, self.term + 1, b"")

    def _campaign(self, context: bytes = b"") -> None:
        assert self.role is not LEADER, "a leader that stands for election"
        self._reset(self.term + 1)
        self.role = CANDIDATE
        self._vote = self.node_id
        self._votes = {self.node_id: True}
        if self._tally() is VoteResult.WON:
            self._become_leader()
            # Others must not hear of this term before the disk knows it: after a crash it could begin again.
            self._term_unsynced = True
            return
        # Not asked before its own vote is on disk: if it forgot that, it could lead twice in one term.
        # So whoever counts another's vote has its own on disk as well.
        self._ask_voters(self._messages_after_sync, _VOTE, self.term, context)

    def _ask_voters(self, outbox: list[Message], kind: MessageType, term: int, context: bytes) -> None:
        log = self.log
        outbox += [
            Message(kind, node, self.node_id, term, log.last_term, log.last_index, context=context)
            for node in sorted({*self.configuration.voters, *self.configuration.outgoing})
            if node != self.node_id
        ]

    def _tally(self) -> VoteResult:
        votes, configuration = self._votes, self.configuration
        return joint_vote(
            [votes.get(node) for node in configuration.voters],
            [votes.get(node) for node in configuration.outgoing],
        )

    def _on_vote_response(self, message: Message) -> None:
        """Of the election that is going on: `step` has dropped others by role and term."""
        self._votes.setdefault(message.sender, not message.reject)
        result = self._tally()
        if result is VoteResult.LOST:
            self._become_follower(self.term, NOBODY)
        elif result is VoteResult.WON:
            if self.role is PRE_CANDIDATE:
                self._campaign()
            else:
                self._become_leader()

    # --- votes ---

    @property
    def _loyal(self) -> bool:
        """Whether a leader may count on this node not to vote for another."""
        return self.role is LEADER or self._contact_elapsed < self._election_ticks

    def _on_vote_request(self, message: Message) -> None:
        """A VOTE of this node's term, or a PRE_VOTE for it or a later one."""
        sender = message.sender
        free = self._vote == sender or (not self._vote and not self.leader)
        up_to_date = self.log.is_up_to_date(message.index, message.log_term)
        if message.type is _PRE_VOTE:
            grant = up_to_date and (free or message.term > self.term)
            term = message.term if grant else self.term
            # It promises nothing, so nothing needs to be on disk.
            self._messages.append(self._vote_answer(_PRE_VOTE_RESP, sender, term, grant))
            return
        grant = up_to_date and free
        if grant:
            self._vote = sender
            self._election_elapsed = 0
        self._messages_after_sync.append(self._vote_answer(_VOTE_RESP, sender, self.term, grant))

    def _vote_answer(self, kind: MessageType, to: int, term: int, grant: bool) -> Message:
        """A refusal tells what is committed here: index in `commit`, its term in `log_term`.

        The candidate may not know of a change of the configuration which makes that it does not need this
        vote. Whom the change has left without a vote does not stand for election, and if its log is longer
        it votes for nobody: without this they would wait for each other for ever. (raft-rs does the same.)
        """
        if grant:
            return Message(kind, to, self.node_id, term)
        index = self.log.committed
        return Message(kind, to, self.node_id, term, self.log.term_at(index) or 0, commit=index, reject=True)

    def _learn_from_refusal(self, message: Message) -> None:
        """What is committed is so for ever, whatever the terms of those who talk about it."""
        if self.role is LEADER or not self.log.matches(message.commit, message.log_term):
            return
        if self.log.commit_to(message.commit) and self.role is not FOLLOWER and not self._may_campaign:
            self._become_follower(self.term, NOBODY)  # it stands with a configuration of the past

    def _on_timeout_now(self) -> None:
        """The leader hands over. No pre-vote: it would be refused, as the leader lives (dqlite/raft #203)."""
        if self.role is FOLLOWER and self._may_campaign:
            self._contact_elapsed = self._election_ticks
            self._campaign(CAMPAIGN_TRANSFER)

    # --- time ---

    def _tick_election(self) -> None:
        self._election_elapsed += 1
        if self._election_elapsed >= self._election_timeout and self._may_campaign:
            self._pre_campaign()
