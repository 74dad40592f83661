"""Changes of the configuration: etcd's case files, and what bytes may say."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aspenfs import errors
from aspenfs.cluster.membership import (
    Change,
    ChangeKind,
    Changer,
    ConfigurationChange,
    Transition,
    contradiction,
    read_configuration,
)
from aspenfs.cluster.progress import Inflights, Progress, ProgressState
from aspenfs.cluster.types import Configuration
from tests.cluster.datadriven import VECTORS, Case, read_cases

FILES = {
    "joint_autoleave.txt": 4,
    "joint_idempotency.txt": 3,
    "joint_learners_next.txt": 3,
    "joint_safety.txt": 15,
    "simple_idempotency.txt": 11,
    "simple_promote_demote.txt": 7,
    "simple_safety.txt": 11,
    "update.txt": 3,
    "zero.txt": 1,
}
KINDS = {
    "v": ChangeKind.ADD_VOTER,
    "l": ChangeKind.ADD_LEARNER,
    "r": ChangeKind.REMOVE,
    "u": ChangeKind.UPDATE,
}
STATES = {
    ProgressState.PROBE: "StateProbe",
    ProgressState.REPLICATE: "StateReplicate",
    ProgressState.SNAPSHOT: "StateSnapshot",
}


class Members:
    """A configuration and its progress through one case file."""

    def __init__(self) -> None:
        self.configuration = Configuration(())
        self.progress: dict[int, Progress] = {}
        self.last_index = 0

    def run(self, case: Case) -> str:
        self.check()
        changer = Changer(self.configuration, self.progress, self.new_progress)
        changes = [Change(KINDS[word[0]], int(word[1:])) for line in case.input for word in line.split()]
        try:
            if case.command == "simple":
                self.configuration, self.progress = changer.simple(changes)
            elif case.command == "enter-joint":
                auto_leave = case.arguments.get("autoleave", ["false"]) == ["true"]
                self.configuration, self.progress = changer.enter_joint(changes, auto_leave=auto_leave)
            else:
                assert case.command == "leave-joint"
                assert not changes
                self.configuration, self.progress = changer.leave_joint()
        except errors.InvalidArgument as error:
            return str(error)
        finally:
            self.last_index += 1
            self.check()
        return self.shown()

    def new_progress(self) -> Progress:
        return Progress(max(self.last_index, 1), Inflights(1, 1))

    def check(self) -> None:
        assert contradiction(self.configuration) == ""
        assert set().union(*self.configuration[:4]) == self.progress.keys()

    def shown(self) -> str:
        voters, outgoing, learners, learners_next, auto_leave = self.configuration
        line = f"voters={shown_ids(voters)}"
        if outgoing:
            line += f"&&{shown_ids(outgoing)}"
        if learners:
            line += f" learners={shown_ids(learners)}"
        if learners_next:
            line += f" learners_next={shown_ids(learners_next)}"
        if auto_leave:
            line += " autoleave"
        lines = [line]
        for node, progress in sorted(self.progress.items()):
            learner = " learner" if node in learners else ""
            lines.append(
                f"{node}: {STATES[progress.state]} match={progress.match} next={progress.next}{learner}"
            )
        return "\n".join(lines)


def shown_ids(ids: tuple[int, ...]) -> str:
    return "(" + " ".join(f"{node:x}" for node in ids) + ")"


@pytest.mark.parametrize(("name", "count"), FILES.items())
def test_etcds_cases(name: str, count: int) -> None:
    cases = read_cases(VECTORS / "confchange" / name)
    assert len(cases) == count
    members = Members()
    for case in cases:
        assert members.run(case) == case.expected, f"{name}:{case.line}"


def test_there_is_no_other_file() -> None:
    assert {path.name for path in (VECTORS / "confchange").iterdir()} == FILES.keys()


def test_a_changer_leaves_what_it_was_given_alone() -> None:
    members = Members()
    configuration, progress = Configuration((1, 2)), {1: members.new_progress(), 2: members.new_progress()}
    before = dict(progress)
    Changer(configuration, progress, members.new_progress).enter_joint(
        [Change(ChangeKind.REMOVE, 2), Change(ChangeKind.ADD_LEARNER, 3)], auto_leave=True
    )
    assert progress == before
    assert configuration == Configuration((1, 2))


# --- which way a change goes (etcd's ConfChangeV2.EnterJoint and LeaveJoint) ---

ADD_2, ADD_3 = Change(ChangeKind.ADD_VOTER, 2), Change(ChangeKind.ADD_VOTER, 3)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (ConfigurationChange((ADD_2,)), "voters=(1 2)"),
        (ConfigurationChange((ADD_2, ADD_3)), "voters=(1 2 3)&&(1) autoleave"),
        (ConfigurationChange((ADD_2,), Transition.JOINT_IMPLICIT), "voters=(1 2)&&(1) autoleave"),
        (ConfigurationChange((ADD_2,), Transition.JOINT_EXPLICIT), "voters=(1 2)&&(1)"),
    ],
)
def test_a_change_goes_the_way_that_it_needs(change: ConfigurationChange, expected: str) -> None:
    members = Members()
    members.run(Case(1, "simple", {}, ["v1"], ""))
    changer = Changer(members.configuration, members.progress, members.new_progress)
    members.configuration, members.progress = changer.apply(change)
    assert members.shown().splitlines()[0] == expected


def test_an_empty_change_leaves_a_joint_configuration() -> None:
    members = Members()
    members.run(Case(1, "simple", {}, ["v1"], ""))
    members.run(Case(1, "enter-joint", {}, ["v2"], ""))
    changer = Changer(members.configuration, members.progress, members.new_progress)
    assert changer.apply(ConfigurationChange())[0] == Configuration((1, 2))


# --- bytes ---

ids = st.integers(0, (1 << 63) - 1)
changes = st.builds(
    ConfigurationChange,
    st.lists(st.builds(Change, st.sampled_from([int(kind) for kind in ChangeKind]), ids), max_size=5).map(
        tuple
    ),
    st.sampled_from([int(transition) for transition in Transition]),
    st.binary(max_size=100),
)
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats()
    | st.binary()
    | st.text(),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=20,
)


@given(changes)
def test_a_change_survives_its_bytes(change: ConfigurationChange) -> None:
    assert ConfigurationChange.decode(change.encode()) == change


@given(
    st.binary()
    | anything.map(msgpack.packb)
    | st.tuples(changes, st.data()).map(lambda pair: pair[0].encode()[:-1])
)
def test_other_bytes_are_refused(data: bytes) -> None:
    try:
        change = ConfigurationChange.decode(data)
    except errors.InvalidArgument:
        return
    assert ConfigurationChange.decode(change.encode()) == change


@pytest.mark.parametrize(
    "value",
    [
        (2, 0, (), b""),  # a format to come
        (True, 0, (), b""),
        (1, 3, (), b""),
        (1, 0, ((4, 1),), b""),
        (1, 0, ((0, -1),), b""),
        (1, 0, ((0, 1, 2),), b""),
        (1, 0, ((0, 1 << 63),), b""),
        (1, 0, ((0, 1),) * 1000, b""),
        (1, 0, (), "text"),
        (1, 0, (), bytes(2000)),
    ],
)
def test_a_change_that_is_not_one_is_refused(value: object) -> None:
    with pytest.raises(errors.InvalidArgument):
        ConfigurationChange.decode(msgpack.packb(value))


@pytest.mark.parametrize(
    "configuration",
    [
        Configuration(()),
        Configuration((1,)),
        Configuration((1, 2, 3), (1, 4), (5,), (4,), True),
    ],
)
def test_a_configuration_survives_its_bytes(configuration: Configuration) -> None:
    assert read_configuration(msgpack.unpackb(msgpack.packb(configuration))) == configuration
    assert read_configuration(msgpack.unpackb(msgpack.packb(configuration), use_list=False)) == configuration


@pytest.mark.parametrize(
    "value",
    [
        None,
        (),
        ((1,), (), (), ()),
        ((1,), (), (), (), 0),
        ((2, 1), (), (), (), False),  # not in order
        ((1, 1), (), (), (), False),
        ((0,), (), (), (), False),
        ((1,), (), (1,), (), False),  # voter and learner
        ((1,), (2,), (2,), (), False),
        ((1,), (2,), (), (3,), False),  # was no voter
        ((1, 2), (2,), (), (2,), False),  # learner to be, and stays a voter
        ((1,), (), (), (), True),  # nothing to leave
        ((1.0,), (), (), (), False),
        ("1", (), (), (), False),
        (tuple(range(1, 1000)), (), (), (), False),
    ],
)
def test_a_configuration_that_is_not_one_is_refused(value: object) -> None:
    with pytest.raises(errors.InvalidArgument):
        read_configuration(value)


@given(anything)
def test_any_value_is_a_configuration_or_refused(value: object) -> None:
    try:
        configuration = read_configuration(value)
    except errors.InvalidArgument:
        return
    assert read_configuration(tuple(configuration)) == configuration
