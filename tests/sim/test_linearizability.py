"""The checker of histories: good ones pass, all kinds of bad ones are rejected, brute force agrees."""

import io
import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest

from aspenfs.sim.history import NEVER, History, Operation, Unique, load, save
from aspenfs.sim.linearizability import check, partition
from aspenfs.sim.models import UNKNOWN, AppendList, Entries, Inode, Model, Register

Row = tuple[Any, ...]  # process, name, arguments, result, called, returned (None: never)


def history(*rows: Row) -> list[Operation]:
    return [Operation._make((*row[:5], NEVER if row[5] is None else row[5])) for row in rows]


def outcome(model: Model, *rows: Row) -> str:
    return check(history(*rows), model).outcome


# --- registers ---


def test_overlapping_writes_may_come_in_either_order() -> None:
    for last in (1, 2):
        assert outcome(
            Register(),
            (1, "write", ("k", 1), None, 1, 10),
            (2, "write", ("k", 2), None, 2, 9),
            (3, "read", ("k",), last, 11, 12),
        ) == "linearizable"  # fmt: skip


def test_stale_read_is_rejected() -> None:
    verdict = check(
        history(
            (1, "write", ("k", 1), None, 1, 2),
            (1, "write", ("k", 2), None, 3, 4),
            (2, "read", ("k",), 1, 5, 6),
        ),
        Register(),
    )
    assert verdict.outcome == "violation"
    assert verdict.keys == ("k",)
    assert [one.name for one in verdict.longest] == ["write", "write"]
    assert verdict.state == 2
    assert [one.name for one in verdict.stuck] == ["read"]
    assert "read('k') -> 1 at 6" in verdict.explain()


def test_read_that_overlaps_the_write_may_see_either() -> None:
    for seen in (1, 2):
        assert outcome(
            Register(),
            (1, "write", ("k", 1), None, 1, 2),
            (1, "write", ("k", 2), None, 3, 6),
            (2, "read", ("k",), seen, 4, 5),
        ) == "linearizable"  # fmt: skip


def test_lost_update_is_rejected() -> None:
    rows: list[Row] = [
        (1, "write", ("k", 0), None, 1, 2),
        (1, "cas", ("k", 0, 1), True, 3, 6),
        (2, "cas", ("k", 0, 2), True, 4, 5),
    ]
    assert outcome(Register(), *rows) == "violation"
    rows[2] = (2, "cas", ("k", 0, 2), False, 4, 5)
    assert outcome(Register(), *rows) == "linearizable"


def test_read_of_a_refused_write_is_rejected() -> None:
    recorded = History()
    recorded.refused(recorded.call(1, "write", "k", 1))
    recorded.returns(recorded.call(2, "read", "k"), 1)
    assert check(recorded.operations(), Register()).outcome == "violation"


def test_read_of_a_value_from_the_future_is_rejected() -> None:
    assert outcome(
        Register(), (2, "read", ("k",), 1, 1, 2), (1, "write", ("k", 1), None, 3, 4)
    ) == "violation"  # fmt: skip


def test_reads_that_go_back_in_time_are_rejected() -> None:
    rows: list[Row] = [
        (1, "write", ("k", 1), None, 1, 2),
        (1, "write", ("k", 2), None, 3, 20),
        (2, "read", ("k",), 2, 4, 5),
        (3, "read", ("k",), 1, 6, 7),
    ]
    assert outcome(Register(), *rows) == "violation"
    rows[2], rows[3] = (3, "read", ("k",), 1, 4, 5), (2, "read", ("k",), 2, 6, 7)
    assert outcome(Register(), *rows) == "linearizable"


def test_deletion_tells_whether_it_found_something() -> None:
    first: Row = (1, "write", ("k", 1), None, 1, 2)
    assert outcome(Register(), first, (1, "delete", ("k",), True, 3, 4)) == "linearizable"
    assert outcome(Register(), first, (1, "delete", ("k",), False, 3, 4)) == "violation"
    both: list[Row] = [(n, "delete", ("k",), True, 3, 5) for n in (1, 2)]
    assert outcome(Register(), first, *both) == "violation"


def test_call_of_unknown_outcome_may_take_place_late_or_never() -> None:
    unknown: Row = (1, "write", ("k", 1), None, 1, None)
    for reads in ([], [None], [None, 1], [1, 1], [None, None, 1]):
        later: list[Row] = [(2, "read", ("k",), seen, 2 * n + 2, 2 * n + 3) for n, seen in enumerate(reads)]
        assert outcome(Register(), unknown, *later) == "linearizable", reads
    assert outcome(
        Register(), unknown, (2, "read", ("k",), 1, 2, 3), (2, "read", ("k",), None, 4, 5)
    ) == "violation"  # fmt: skip


def test_call_of_unknown_outcome_does_not_take_place_twice() -> None:
    rows: list[Row] = [
        (1, "write", ("k", 1), None, 1, None),
        (2, "read", ("k",), 1, 2, 3),
        (2, "write", ("k", 2), None, 4, 5),
        (2, "read", ("k",), 1, 6, 7),
    ]
    assert outcome(Register(), *rows) == "violation"


def test_call_of_unknown_outcome_does_not_take_place_before_it_was_made() -> None:
    assert outcome(
        Register(), (2, "read", ("k",), 1, 1, 2), (1, "write", ("k", 1), None, 3, None)
    ) == "violation"  # fmt: skip


def test_chain_of_unknown_calls_is_found() -> None:
    assert outcome(
        Register(),
        (1, "cas", ("k", 2, 3), None, 1, None),
        (2, "write", ("k", 1), None, 2, None),
        (3, "cas", ("k", 1, 2), None, 3, None),
        (4, "read", ("k",), 3, 4, 5),
        (4, "read", ("k",), 3, 6, 7),
    ) == "linearizable"  # fmt: skip


# --- lists ---


def test_double_apply_is_rejected() -> None:
    assert outcome(
        AppendList(), (1, "append", ("l", 1), None, 1, 2), (1, "read", ("l",), (1, 1), 3, 4)
    ) == "violation"  # fmt: skip


def test_double_apply_of_an_unknown_call_is_rejected() -> None:
    once: Row = (1, "append", ("l", 1), None, 1, None)
    assert outcome(AppendList(), once, (2, "read", ("l",), (1,), 3, 4)) == "linearizable"
    assert outcome(AppendList(), once, (2, "read", ("l",), (1, 1), 3, 4)) == "violation"


def test_append_that_was_overwritten_is_rejected() -> None:
    appends: list[Row] = [(n, "append", ("l", n), None, 1, 3) for n in (1, 2)]
    assert outcome(AppendList(), *appends, (3, "read", ("l",), (2, 1), 4, 5)) == "linearizable"
    assert outcome(AppendList(), *appends, (3, "read", ("l",), (2,), 4, 5)) == "violation"


def test_reads_that_disagree_on_the_order_are_rejected() -> None:
    appends: list[Row] = [(n, "append", ("l", n), None, 1, 9) for n in (1, 2)]
    reads: list[Row] = [(3, "read", ("l",), (1, 2), 2, 5), (4, "read", ("l",), (2,), 3, 6)]
    assert outcome(AppendList(), *appends, *reads) == "violation"


# --- directory entries ---


def test_only_one_of_two_exclusive_creators_wins() -> None:
    wins: Row = (1, "create", ("d/a", 7), True, 1, 4)
    assert outcome(Entries(), wins, (2, "create", ("d/a", 8), False, 2, 3)) == "linearizable"
    assert outcome(Entries(), wins, (2, "create", ("d/a", 8), True, 2, 3)) == "violation"


def test_rename_that_is_seen_half_is_rejected() -> None:
    rows: list[Row] = [
        (1, "create", ("a", 7), True, 1, 2),
        (1, "rename", ("a", "b"), True, 3, 20),
        (2, "lookup", ("b",), 7, 4, 5),
    ]
    for half in ((2, "lookup", ("a",), 7, 6, 7), (2, "list", ("a", "b"), ("a", "b"), 6, 7)):
        assert outcome(Entries(), *rows, half) == "violation"
    neither: Row = (3, "list", ("a", "b"), (), 6, 7)
    assert outcome(Entries(), *rows, neither) == "violation"
    assert outcome(Entries(), *rows, (2, "lookup", ("a",), None, 6, 7)) == "linearizable"


def test_rename_replaces_and_link_does_not() -> None:
    rows: list[Row] = [(1, "create", ("a", 7), True, 1, 2), (1, "create", ("b", 8), True, 3, 4)]
    renamed: Row = (1, "rename", ("a", "b"), True, 5, 6)
    assert outcome(Entries(), *rows, renamed, (1, "lookup", ("b",), 7, 7, 8)) == "linearizable"
    assert outcome(Entries(), *rows, renamed, (1, "lookup", ("b",), 8, 7, 8)) == "violation"
    assert outcome(Entries(), *rows, (1, "link", ("a", "b"), True, 5, 6)) == "violation"
    linked: Row = (1, "link", ("a", "c"), True, 5, 6)
    assert outcome(Entries(), *rows, linked, (1, "unlink", ("a",), True, 7, 8),
                   (1, "lookup", ("c",), 7, 9, 10)) == "linearizable"  # fmt: skip


def test_rename_of_a_name_onto_another_of_the_same_inode_keeps_both() -> None:
    rows: list[Row] = [
        (1, "create", ("a", 7), True, 1, 2),
        (1, "link", ("a", "b"), True, 3, 4),
        (1, "rename", ("a", "b"), True, 5, 6),
    ]
    assert outcome(Entries(), *rows, (1, "list", ("a", "b"), ("a", "b"), 7, 8)) == "linearizable"
    assert outcome(Entries(), *rows, (1, "list", ("a", "b"), ("b",), 7, 8)) == "violation"


def test_unlink_that_did_not_stay_is_rejected() -> None:
    rows: list[Row] = [(1, "create", ("a", 7), True, 1, 2), (1, "unlink", ("a",), True, 3, 4)]
    assert outcome(Entries(), *rows, (2, "lookup", ("a",), 7, 5, 6)) == "violation"


# --- inodes ---


def test_appends_of_two_hosts_do_not_overwrite_each_other() -> None:
    appends: list[Row] = [(1, "append", ("i", b"aa"), 0, 1, 5), (2, "append", ("i", b"b"), 2, 2, 4)]
    assert outcome(Inode(), *appends, (3, "read", ("i",), b"aab", 6, 7)) == "linearizable"
    assert outcome(Inode(), appends[0], (2, "append", ("i", b"b"), 0, 2, 4)) == "violation"
    assert outcome(Inode(), *appends, (3, "size", ("i",), 2, 6, 7)) == "violation"


def test_size_of_a_truncated_file_does_not_come_back() -> None:
    rows: list[Row] = [
        (1, "append", ("i", b"abc"), None, 1, 2),
        (2, "truncate", ("i", 1), None, 3, 4),
        (2, "write", ("i", 2, b"z"), None, 5, 6),
    ]
    assert outcome(Inode(), *rows, (1, "read", ("i",), b"a\0z", 7, 8)) == "linearizable"
    assert outcome(Inode(), *rows, (1, "read", ("i",), b"abz", 7, 8)) == "violation"
    assert outcome(Inode(), *rows, (1, "size", ("i",), 3, 7, 8)) == "linearizable"


# --- partitions, limits, files ---


def test_calls_on_different_keys_are_checked_apart_and_renames_join_them() -> None:
    calls = history(
        (1, "create", ("a", 1), True, 1, 2),
        (1, "create", ("b", 2), True, 3, 4),
        (1, "create", ("c", 3), True, 5, 6),
        (1, "rename", ("b", "c"), True, 7, 8),
    )
    assert [keys for keys, _ in partition(calls, Entries())] == [("a",), ("b", "c")]
    rows: list[Row] = [(1, "write", ("good", 1), None, 1, 2), (2, "read", ("bad",), 1, 3, 4)]
    assert check(history(*rows), Register()).keys == ("bad",)


def hard_history() -> list[Operation]:
    """Twelve writes at once and a read of none of them."""
    rows: list[Row] = [(n, "write", ("k", n), None, 1, 50) for n in range(12)]
    return history(*rows, (20, "read", ("k",), "nothing", 60, 61))


def test_too_long_a_search_is_unknown_and_not_a_pass() -> None:
    verdict = check(hard_history(), Register(), steps_max=1_000)
    assert verdict.outcome == "unknown"
    assert verdict.keys == ("k",)
    assert verdict.explain().startswith("unknown")
    # A violation elsewhere is still found, and counts more.
    bad = history((1, "read", ("other",), 1, 1, 2))
    assert check([*hard_history(), *bad], Register(), steps_max=1_000).outcome == "violation"


def test_history_survives_being_written_down() -> None:
    recorded = History()
    call = recorded.call(1, "write", "k", b"\xff\0")
    recorded.call(2, "append", "l", 3)
    recorded.returns(call, None)
    read = recorded.call(3, "list", "a", "b")
    recorded.returns(read, ("a", b"b"))
    file = io.StringIO()
    save(recorded.operations(), file)
    assert list(load(file.getvalue().splitlines())) == recorded.operations()
    assert [one.name for one in recorded.open_calls()] == ["append"]


def test_unique_values_are_unique() -> None:
    unique, other = Unique(), Unique(b"w")
    made = [unique() for _ in range(100)] + [other() for _ in range(100)]
    assert len(set(made)) == 200


# --- against brute force ---


def brute_force(operations: Sequence[Operation], model: Model) -> bool:
    """Tries every order of every subset that has all known calls."""
    known = [one for one in operations if one.known]
    loose = [one for one in operations if not one.known]
    for size in range(len(loose) + 1):
        for some in itertools.combinations(loose, size):
            for order in itertools.permutations([*known, *some]):
                in_time = all(a.called <= b.returned for a, b in itertools.combinations(order, 2))
                if in_time and runs(order, model):
                    return True
    return False


def runs(order: Sequence[Operation], model: Model) -> bool:
    state: Any = model.initial()
    for one in order:
        fits, state = model.step(state, one, one.result if one.known else UNKNOWN)
        if not fits:
            return False
    return True


def random_history(rng: random.Random, calls: int) -> list[Operation]:
    times = rng.sample(range(100), 2 * calls)
    rows = []
    for number in range(calls):
        called, returned = sorted((times.pop(), times.pop()))
        ends: float = NEVER if rng.random() < 0.2 else returned
        name = rng.choice(("write", "cas", "read", "delete"))
        value, other = rng.randrange(3), rng.randrange(3)
        arguments: dict[str, tuple[Any, ...]] = {
            "write": ("k", value), "cas": ("k", value, other), "read": ("k",), "delete": ("k",),
        }  # fmt: skip
        result = {"write": None, "cas": rng.random() < 0.5, "delete": rng.random() < 0.5,
                  "read": rng.choice((None, 0, 1, 2))}[name]  # fmt: skip
        rows.append(Operation(number, name, arguments[name], result, called, ends))
    return rows


@pytest.mark.parametrize("part", range(4))
def test_agrees_with_brute_force(part: int) -> None:
    verdicts = {True: 0, False: 0}
    for seed in range(400):
        rng = random.Random(seed * 4 + part)
        operations = random_history(rng, rng.randint(2, 5))
        expected = brute_force(operations, Register())
        verdict = check(operations, Register())
        assert (verdict.outcome == "linearizable") == expected, (seed, operations)
        verdicts[expected] += 1
    assert min(verdicts.values()) > 20  # both kinds were met
