"""What is said of a cluster's health: who is lost, whether writes go on, what to do."""

from typing import Any

import pytest

from aspenfs.cluster.types import Configuration
from aspenfs.runtime.cluster_view import certificate_problem, problems, quorum
from aspenfs.runtime.peers.network import COPIED, OLD_COPY

DAY_NS = 86_400 * 1_000_000_000
NOW_NS = 50 * 365 * DAY_NS


def row(node: int, state: str) -> dict[str, Any]:
    return {"id": node, "name": f"n{node}", "role": "voter", "state": state, "lag": 0, "addresses": [],
            "since_ns": None}  # fmt: skip


@pytest.mark.parametrize(
    ("configuration", "reached", "lost", "held"),
    [
        (Configuration((1,)), {1}, (), True),
        (Configuration((1, 2)), {1}, (2,), False),
        (Configuration((1, 2, 3)), {1, 2}, (3,), True),
        (Configuration((1, 2, 3)), {1}, (2, 3), False),
        (Configuration((1, 2, 3, 4)), {1, 2}, (3, 4), False),
        (Configuration((1, 2, 3), learners=(4,)), {1, 4}, (2, 3), False),
        (Configuration((1, 2, 3), outgoing=(1, 4, 5)), {1, 2, 3}, (4, 5), False),  # each half needs its own
        (Configuration((1, 2, 3), outgoing=(1, 4, 5)), {1, 2, 4}, (3, 5), True),
    ],
)
def test_a_quorum_is_a_majority_of_each_half(
    configuration: Configuration, reached: set[int], lost: tuple[int, ...], held: bool
) -> None:
    assert quorum(configuration, reached)[1:] == (lost, held)


def test_a_node_alone_and_a_whole_cluster_have_no_problems() -> None:
    assert problems([row(1, "here")], Configuration((1,)), 1, 1, NOW_NS) == []
    rows = [row(1, "here"), row(2, "connected"), row(3, "connected")]
    assert problems(rows, Configuration((1, 2, 3)), 2, 1, NOW_NS) == []


def test_a_voter_that_is_lost_is_named_and_writes_go_on() -> None:
    rows = [row(1, "here"), row(2, "connected"), row(3, "unreachable")]
    (problem,) = problems(rows, Configuration((1, 2, 3)), 1, 1, NOW_NS)
    assert problem.cause == "1 of 3 voters unreachable: n3; writes go on"
    assert "aspen member remove n3" in problem.advice


def test_without_a_majority_that_is_the_only_problem_worth_telling() -> None:
    rows = [row(1, "here"), row(2, "unreachable"), row(3, "unreachable")]
    (problem,) = problems(rows, Configuration((1, 2, 3)), 0, 1, NOW_NS)
    assert problem.cause == "no quorum: 2 of 3 voters unreachable: n2, n3"
    assert "consistency=stale" in problem.advice


def test_a_cluster_without_a_leader_says_so_though_all_are_there() -> None:
    rows = [row(1, "here"), row(2, "connected"), row(3, "connected")]
    (problem,) = problems(rows, Configuration((1, 2, 3)), 0, 1, NOW_NS)
    assert problem.cause == "no leader"


def test_a_node_that_was_removed_is_told_so_and_nothing_else() -> None:
    rows = [row(1, "removed"), row(2, "unreachable"), row(3, "unreachable")]
    (problem,) = problems(rows, Configuration((2, 3)), 0, 1, NOW_NS)
    assert problem.cause == "this node was removed from the cluster"


def test_a_learner_that_is_lost_is_told_of_after_a_while_and_where_it_is_looked_for() -> None:
    configuration = Configuration((1,), learners=(2,))
    lost = {**row(2, "unreachable"), "addresses": ["192.0.2.2:7420"]}
    for since_ns in (None, NOW_NS - 1_000_000_000):
        assert problems([row(1, "here"), {**lost, "since_ns": since_ns}], configuration, 1, 1, NOW_NS) == []
    rows = [row(1, "here"), {**lost, "since_ns": NOW_NS - 20_000_000_000}]
    (problem,) = problems(rows, configuration, 1, 1, NOW_NS)
    assert problem.cause.startswith("the learner n2 is unreachable at 192.0.2.2:7420")
    assert "advertise=" in problem.advice
    assert "aspen member remove n2" in problem.advice


@pytest.mark.parametrize("why", [OLD_COPY, COPIED])
def test_a_node_that_is_refused_as_a_copy_is_told_so_and_nothing_else(why: str) -> None:
    refused = row(2, "unreachable") | {"cause": f"node 1 was seen before: {why}"}
    rows = [row(1, "here"), refused, row(3, "unreachable")]
    (problem,) = problems(rows, Configuration((1, 2, 3)), 0, 1, NOW_NS)
    assert problem.cause == f"this node is refused: node 1 was seen before: {why}"
    assert "start it again does not help" in problem.advice
    refused["cause"] = f"node 2 was seen before: {why}"  # this node refuses the other
    (problem,) = problems(rows, Configuration((1, 2, 3)), 0, 1, NOW_NS)
    assert problem.cause.startswith("no quorum")
    (problem,) = problems(
        [row(1, "here"), refused, row(3, "connected")], Configuration((1, 2, 3)), 3, 1, NOW_NS
    )
    assert problem.cause == "1 of 3 voters unreachable: n2; writes go on"
    assert problem.advice.startswith(f"n2 is refused: node 2 was seen before: {why}. Start it from its own")


@pytest.mark.parametrize(
    ("left_ns", "told"),
    [(31 * DAY_NS, None), (3 * DAY_NS, "expires in 3 days"), (1, "expires in 1 days"), (-1, "has expired")],
)
def test_a_certificate_that_was_not_renewed_is_told_of(left_ns: int, told: str | None) -> None:
    problem = certificate_problem(10**18 + left_ns, 10**18)
    assert (problem.cause if problem else None) == (told and f"the certificate of this node {told}")
