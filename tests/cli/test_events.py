"""What is told of changes from one look at the cluster to the next."""

from typing import Any

from aspenfs.cli.events import Events
from aspenfs.limits import EVENTS_MAX


class Cluster:
    """A status that changes."""

    def __init__(self) -> None:
        self.status: dict[str, Any] = {"leader": "a", "term": 1, "problems": [], "members": []}
        self.member("a", "leader", "here")
        self.member("b", "voter", "connected")
        self.events = Events(lambda: self.status, lambda: 7)
        self.told()

    def member(self, name: str, role: str, state: str) -> None:
        others = [one for one in self.status["members"] if one["name"] != name]
        self.status["members"] = [*others, {"name": name, "role": role, "state": state}]

    def told(self) -> list[str]:
        self.events.kept.clear()
        self.events.look()
        return [event.text for event in self.events.kept]


def test_nothing_is_told_of_a_cluster_that_stays_as_it_is() -> None:
    cluster = Cluster()
    assert cluster.told() == []


def test_another_leader_is_told_once_and_not_as_a_change_of_roles() -> None:
    cluster = Cluster()
    cluster.status |= {"leader": None, "term": 2}
    assert cluster.told() == ["no leader, term 2"]
    cluster.status |= {"leader": "b", "term": 3}
    cluster.member("a", "voter", "here")
    cluster.member("b", "leader", "connected")
    assert cluster.told() == ["b leads, term 3"]
    assert cluster.told() == []


def test_members_that_come_change_and_go_are_told_of() -> None:
    cluster = Cluster()
    cluster.member("c", "learner", "connected")
    assert cluster.told() == ["c joined as a learner"]
    cluster.member("c", "voter", "connected")
    assert cluster.told() == ["c is a voter now"]
    cluster.member("b", "voter", "unreachable")
    cluster.status["problems"] = [{"cause": "1 of 3 voters unreachable: b"}]
    assert cluster.told() == ["b: unreachable", "problem: 1 of 3 voters unreachable: b"]
    cluster.member("b", "none", "removed")
    cluster.status["problems"] = []
    assert cluster.told() == ["b is no member any more", "over: 1 of 3 voters unreachable: b"]


def test_the_oldest_events_make_room() -> None:
    cluster = Cluster()
    for term in range(2, EVENTS_MAX + 10):
        cluster.status["term"] = term
        cluster.events.look()
    assert len(cluster.events.kept) == EVENTS_MAX
    assert cluster.events.kept[-1].text == f"a leads, term {term}"
    assert cluster.events.kept[0].time_ns == 7
