"""What people are told about states of members that are not the same."""

from aspenfs.cli.cluster_status import _state_figures
from aspenfs.runtime.cluster_view import state_problems
from aspenfs.runtime.divergence import IN_QUARANTINE, Verdict
from aspenfs.runtime.quarantine import Quarantine

A, B = b"a" * 32, b"b" * 32
HERE = 1


def name(node: int) -> str:
    return f"n{node}"


def told(verdict: Verdict | None, marker: Quarantine | None = None, own: int = HERE) -> list[str]:
    return [problem.cause for problem in state_problems(verdict, marker, own, name)]


def test_nothing_is_said_where_nothing_is_wrong() -> None:
    assert told(None) == []
    assert told(Verdict(7, 0, A, {1: A, 2: A, 3: A}, {})) == []
    assert told(Verdict(7, 0, A, {1: A, 2: A}, {3: "not connected"})) == []
    assert told(Verdict(7, 0, b"", {1: A}, {2: "away", 3: "away"})) == []


def test_a_node_in_quarantine_says_where_it_gets_well() -> None:
    (problem,) = state_problems(None, Quarantine(7, A, B, (2, 3)), HERE, name)
    assert "it serves nothing" in problem.cause
    assert "entry 7" in problem.cause
    assert "n2, n3" in problem.advice


def test_the_others_say_who_differs_until_the_next_comparison_and_that_node_no_more() -> None:
    verdict = Verdict(7, 0, A, {1: A, 2: B, 3: A}, {4: IN_QUARANTINE})
    (cause,) = told(verdict)
    assert "n2, n4" in cause
    (cause,) = told(verdict, own=2)
    assert "n2" not in cause
    assert [*_state_figures(verdict).values()] == [2, 0, 7]


def test_without_a_majority_all_are_named_with_what_they_have() -> None:
    verdict = Verdict(7, 0, b"", {1: A, 2: b""}, {})
    (problem,) = state_problems(verdict, None, HERE, name)
    assert f"n1 {A.hex()[:8]}, n2 unreadable" in problem.cause
    assert "nothing was touched" in problem.advice
    assert [*_state_figures(verdict).values()] == [0, 1, 7]
