"""Changes of who is a member: what a CONFIGURATION entry says, and what it makes of a configuration.

Belongs here: etcd's `confchange` (Changer) and ConfChangeV2, and their bytes. Not here: when a change
may be proposed (`raft.py`), rows about members (`c/member/` in the store), quorums (`quorum.py`).

A change of one voter is *simple*: old and new majorities overlap. Anything more goes through a *joint*
configuration, in which both halves must agree (Raft §4.3): entering is one entry, leaving another.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple

import msgpack

from aspenfs import errors
from aspenfs.cluster.progress import Progress
from aspenfs.cluster.types import Configuration
from aspenfs.limits import MEMBERS_MAX, RAFT_CONTEXT_BYTES_MAX

_FORMAT: Final = 1
_ID_MAX: Final = (1 << 63) - 1


class ChangeKind(IntEnum):
    ADD_VOTER = 0  # a learner is promoted by it
    REMOVE = 1
    UPDATE = 2  # changes nothing here
    ADD_LEARNER = 3  # a voter is demoted by it


class Transition(IntEnum):
    AUTO = 0  # simple if one change, else joint, left by itself
    JOINT_IMPLICIT = 1  # joint, left by itself
    JOINT_EXPLICIT = 2  # joint, until an empty change leaves it


class Change(NamedTuple):
    kind: int
    node: int


class ConfigurationChange(NamedTuple):
    """What a CONFIGURATION entry says; without changes: leave the joint configuration."""

    changes: tuple[Change, ...] = ()
    transition: int = Transition.AUTO
    context: bytes = b""  # the proposer's own

    @property
    def leaves_joint(self) -> bool:
        return not self.changes and self.transition == Transition.AUTO

    @property
    def enters_joint(self) -> bool:
        return self.transition != Transition.AUTO or len(self.changes) > 1

    @property
    def auto_leave(self) -> bool:
        """Whether the joint configuration that it enters is left by itself."""
        return self.transition != Transition.JOINT_EXPLICIT

    def encode(self) -> bytes:
        packed: bytes = msgpack.packb((_FORMAT, self.transition, self.changes, self.context))
        return packed

    @classmethod
    def decode(cls, data: bytes) -> "ConfigurationChange":
        """InvalidArgument for bytes that are not a change, however hostile."""
        try:
            value = msgpack.unpackb(data, use_list=False, max_array_len=2 * MEMBERS_MAX, max_map_len=0,
                                    max_ext_len=0)  # fmt: skip
        except (ValueError, msgpack.exceptions.UnpackException) as error:
            raise errors.InvalidArgument(f"not a change of the configuration: {error}") from None
        if type(value) is not tuple or len(value) != 4 or type(value[0]) is not int or value[0] != _FORMAT:
            raise errors.InvalidArgument("not a change of the configuration that this release knows")
        _, transition, changes, context = value
        if type(transition) is not int or transition not in _TRANSITIONS or type(changes) is not tuple:
            raise errors.InvalidArgument("a bad transition, or bad changes")
        if type(context) is not bytes or len(context) > RAFT_CONTEXT_BYTES_MAX:
            raise errors.InvalidArgument("a bad context")
        return cls(tuple(_read_change(change) for change in changes), transition, context)


_KINDS: Final = frozenset(map(int, ChangeKind))
_TRANSITIONS: Final = frozenset(map(int, Transition))


def _read_change(value: object) -> Change:
    if type(value) is not tuple or len(value) != 2:
        raise errors.InvalidArgument("a change is an array of 2")
    kind, node = value
    if type(kind) is not int or kind not in _KINDS or type(node) is not int or not 0 <= node <= _ID_MAX:
        raise errors.InvalidArgument("a bad kind of change, or a bad id")
    return Change(kind, node)


# --- configurations ---


def read_configuration(value: Any) -> Configuration:
    """The configuration in what msgpack made of some bytes (it packs one as it is). InvalidArgument."""
    if not isinstance(value, (tuple, list)) or len(value) != 5 or type(value[4]) is not bool:
        raise errors.InvalidArgument("a configuration is an array of 5")
    sets: list[tuple[int, ...]] = []
    for ids in value[:4]:
        if not isinstance(ids, (tuple, list)) or len(ids) > MEMBERS_MAX:
            raise errors.InvalidArgument("a set of members is no array, or too long")
        last = 0
        for node in ids:
            if type(node) is not int or not last < node <= _ID_MAX:
                raise errors.InvalidArgument("members are ids in ascending order")
            last = node
        sets.append(tuple(ids))
    voters, outgoing, learners, learners_next = sets
    configuration = Configuration(voters, outgoing, learners, learners_next, value[4])
    problem = contradiction(configuration)
    if problem:
        raise errors.InvalidArgument(problem)
    return configuration


def contradiction(configuration: Configuration) -> str:
    """What is wrong with it in itself; empty if nothing is. A node that joins may know nobody yet."""
    voters, outgoing, learners, learners_next = map(frozenset, configuration[:4])
    if learners & (voters | outgoing):
        return "a member is voter and learner"
    if not learners_next <= outgoing:
        return "who becomes a learner is no outgoing voter"
    if learners_next & voters:
        return "a member becomes a learner and stays a voter"
    if configuration.auto_leave and not outgoing:
        return "only a joint configuration can be left"
    return ""


Members = tuple[Configuration, dict[int, Progress]]


class Changer:
    """Works out what a change makes of a configuration and of what is known of its members.

    Changes neither; every method gives a new pair. Its InvalidArguments have etcd's texts.
    """

    def __init__(self, configuration: Configuration, progress: Mapping[int, Progress],
                 make_progress: Callable[[], Progress]) -> None:  # fmt: skip
        """`make_progress` makes the entry of a new member."""
        self._voters, self._outgoing, self._learners, self._learners_next = map(set, configuration[:4])
        self._auto_leave = configuration.auto_leave
        self._progress = dict(progress)
        self._make_progress = make_progress

    def apply(self, change: ConfigurationChange) -> Members:
        """Whichever of the three below `change` asks for."""
        if change.leaves_joint:
            return self.leave_joint()
        if change.enters_joint:
            return self.enter_joint(change.changes, auto_leave=change.auto_leave)
        return self.simple(change.changes)

    def simple(self, changes: Sequence[Change]) -> Members:
        if self._outgoing:
            raise errors.InvalidArgument("can't apply simple config change in joint config")
        before = set(self._voters)
        self._make(changes)
        if len(before ^ self._voters) > 1:
            raise errors.InvalidArgument("more than one voter changed without entering joint config")
        return self._result()

    def enter_joint(self, changes: Sequence[Change], *, auto_leave: bool) -> Members:
        if self._outgoing:
            raise errors.InvalidArgument("config is already joint")
        if not self._voters:
            raise errors.InvalidArgument("can't make a zero-voter config joint")
        self._outgoing = set(self._voters)
        self._make(changes)
        self._auto_leave = auto_leave
        return self._result()

    def leave_joint(self) -> Members:
        if not self._outgoing:
            raise errors.InvalidArgument("can't leave a non-joint config")
        self._learners |= self._learners_next
        self._learners_next = set()
        for node in self._outgoing - self._voters - self._learners:
            self._progress.pop(node, None)
        self._outgoing = set()
        self._auto_leave = False
        return self._result()

    def _make(self, changes: Sequence[Change]) -> None:
        for kind, node in changes:
            if not node:
                continue  # etcd: a change that was found to be void
            if kind == ChangeKind.ADD_VOTER:
                self._add_voter(node)
            elif kind == ChangeKind.ADD_LEARNER:
                self._add_learner(node)
            elif kind == ChangeKind.REMOVE:
                self._remove(node)
        if not self._voters:
            raise errors.InvalidArgument("removed all voters")

    def _add_voter(self, node: int) -> None:
        if node not in self._progress:
            self._progress[node] = self._make_progress()
        self._learners.discard(node)
        self._learners_next.discard(node)
        self._voters.add(node)

    def _add_learner(self, node: int) -> None:
        """A voter that still votes in the outgoing half becomes one on leaving, to be a learner in both
        halves or in none."""
        progress = self._progress.get(node)
        if progress is None:
            self._learners.add(node)
            self._progress[node] = self._make_progress()
        elif node not in self._learners:
            self._remove(node)
            self._progress[node] = progress
            (self._learners_next if node in self._outgoing else self._learners).add(node)

    def _remove(self, node: int) -> None:
        self._voters.discard(node)
        self._learners.discard(node)
        self._learners_next.discard(node)
        if node not in self._outgoing:
            self._progress.pop(node, None)

    def _result(self) -> Members:
        configuration = Configuration(
            tuple(sorted(self._voters)), tuple(sorted(self._outgoing)), tuple(sorted(self._learners)),
            tuple(sorted(self._learners_next)), self._auto_leave)  # fmt: skip
        problem = contradiction(configuration)
        assert not problem, problem
        assert self._progress.keys() == set().union(*configuration[:4]), "members and what is known of them"
        return configuration, self._progress
