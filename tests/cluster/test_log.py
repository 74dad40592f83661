"""The log in memory: matching, truncating, marks, bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aspenfs.cluster.log import ENTRY_OVERHEAD_BYTES, RaftLog
from aspenfs.cluster.types import Entry, EntryKind
from aspenfs.limits import RAFT_APPEND_ENTRIES_MAX

SIZE = 10 + ENTRY_OVERHEAD_BYTES


def entries(first: int, *terms: int, kind: int = EntryKind.NORMAL) -> list[Entry]:
    return [Entry(term, index, int(kind), bytes(10)) for index, term in enumerate(terms, first)]


def a_log(*terms: int, compacted: int = 0, compacted_term: int = 0, applied: int | None = None) -> RaftLog:
    """Entries of these terms behind `compacted`, all of them written and durable."""
    return RaftLog(
        compacted,
        compacted_term,
        entries(compacted + 1, *terms),
        compacted if applied is None else applied,
    )


def terms_of(log: RaftLog) -> list[int]:
    return [entry.term for entry in log.slice(log.compacted + 1, log.last_index, 1 << 30)]


# --- looking ---


def test_terms_are_known_from_the_last_compacted_entry_on() -> None:
    log = a_log(2, 3, compacted=5, compacted_term=1)
    assert [log.term_at(index) for index in range(4, 9)] == [None, 1, 2, 3, None]
    assert a_log().term_at(0) == 0


@pytest.mark.parametrize(
    ("index", "term", "expected"),
    [(3, 2, True), (2, 2, False), (4, 2, True), (1, 3, True), (9, 1, False)],
)
def test_the_log_of_the_later_last_term_or_else_the_longer_one_is_up_to_date(
    index: int, term: int, expected: bool
) -> None:
    assert a_log(1, 1, 2).is_up_to_date(index, term) is expected


def test_a_slice_keeps_to_its_bytes_but_has_at_least_one_entry() -> None:
    log = a_log(*[1] * 10, compacted=4, compacted_term=1)
    assert [entry.index for entry in log.slice(6, 9, 1 << 30)] == [6, 7, 8, 9]
    assert [entry.index for entry in log.slice(6, 9, 2 * SIZE)] == [6, 7]
    assert [entry.index for entry in log.slice(6, 9, 3 * SIZE - 1)] == [6, 7]
    assert [entry.index for entry in log.slice(6, 9, 1)] == [6]
    assert [entry.index for entry in log.slice(5, 99, 1 << 30)] == list(range(5, 15))
    assert log.slice(15, 20, 1 << 30) == []


def test_a_slice_keeps_to_the_number_of_entries_that_a_message_may_have() -> None:
    log = RaftLog(0, 0, [Entry(1, index, 1, b"") for index in range(1, RAFT_APPEND_ENTRIES_MAX + 10)], 0)
    assert len(log.slice(2, log.last_index, 1 << 40)) == RAFT_APPEND_ENTRIES_MAX


def test_a_slice_of_what_is_compacted_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        a_log(1, compacted=5).slice(5, 6, 1)


# --- matching (Raft §5.3) ---


@pytest.mark.parametrize(
    ("index", "log_term", "new", "last", "terms"),
    [
        (3, 2, entries(4, 2), 4, [1, 1, 2, 2]),
        (3, 2, [], 3, [1, 1, 2]),
        (1, 1, [], 1, [1, 1, 2]),  # what is behind is not contradicted
        (1, 1, entries(2, 1), 2, [1, 1, 2]),
        (1, 1, entries(2, 1, 2, 3), 4, [1, 1, 2, 3]),
        (1, 1, entries(2, 3), 2, [1, 3]),
        (0, 0, entries(1, 1, 3), 2, [1, 3]),
        (3, 1, entries(4, 2), None, [1, 1, 2]),
        (4, 2, entries(5, 2), None, [1, 1, 2]),
    ],
)
def test_a_leaders_entries_take_the_place_of_those_that_contradict_them(
    index: int, log_term: int, new: list[Entry], last: int | None, terms: list[int]
) -> None:
    log = a_log(1, 1, 2)
    assert log.maybe_append(index, log_term, new, 3) == last
    assert terms_of(log) == terms


def test_committed_entries_are_never_made_void() -> None:
    log = a_log(1, 1, 2)
    log.commit_to(2)
    with pytest.raises(AssertionError):
        log.maybe_append(1, 1, entries(2, 3), 3)
    assert terms_of(log) == [1, 1, 2]


@pytest.mark.parametrize(
    ("index", "term", "expected"),
    [
        (7, 2, (6, 2)),
        (7, 1, (6 - 2, 1)),
        (7, 5, (7, 4)),
        (5, 4, (5, 2)),
        (3, 1, (3, 1)),  # the last compacted one: its term is known
        (3, 0, (2, 0)),
        (2, 9, (2, 0)),
        (9, 9, (9, 0)),
    ],
)
def test_the_last_entry_that_may_agree(index: int, term: int, expected: tuple[int, int]) -> None:
    log = a_log(1, 2, 2, 4, compacted=3, compacted_term=1)
    assert log.find_conflict_by_term(index, term) == expected


def test_the_empty_log_agrees_at_its_beginning() -> None:
    assert a_log(2, 2).find_conflict_by_term(2, 1) == (0, 0)


# --- what the owner has ---


def test_entries_are_handed_out_once() -> None:
    log = a_log(1)
    log.append(entries(2, 1, 1))
    assert [entry.index for entry in log.take_unwritten()] == [2, 3]
    assert log.take_unwritten() == []
    assert log.take_truncation() is None


def test_a_truncation_tells_of_what_was_handed_out_and_of_nothing_else() -> None:
    log = a_log(1, 1)
    log.append(entries(3, 1, 1))
    log.take_unwritten()
    log.append(entries(5, 1))
    log.maybe_append(4, 1, entries(5, 2), 2)  # the owner never saw the one of term 1
    assert log.take_truncation() is None
    log.maybe_append(3, 1, entries(4, 3), 3)
    log.maybe_append(1, 1, entries(2, 4), 4)
    assert log.take_truncation() == 1
    assert log.take_truncation() is None
    assert [(entry.index, entry.term) for entry in log.take_unwritten()] == [(2, 4)]


def test_what_is_durable_is_known_up_to_what_was_written() -> None:
    log = a_log(1)
    log.append(entries(2, 1, 1))
    assert not log.persisted_to(3, 1)
    log.take_unwritten()
    assert log.persisted_to(2, 1)
    assert not log.persisted_to(1, 1)
    assert log.persisted == 2


def test_a_sync_of_an_entry_since_replaced_says_nothing() -> None:
    log = a_log(1)
    log.append(entries(2, 1))
    log.take_unwritten()  # a sync begins
    log.maybe_append(1, 1, entries(2, 2), 2)
    log.take_unwritten()
    assert not log.persisted_to(2, 1)  # it ends
    assert not log.persisted_to(2, 3)
    assert log.persisted == 1
    assert log.persisted_to(2, 2)


def test_a_sync_of_an_entry_that_went_and_came_back_says_nothing() -> None:
    log = a_log(1)
    log.append(entries(2, 2))
    log.take_unwritten()  # a sync begins
    log.maybe_append(1, 1, entries(2, 3), 3)
    log.take_unwritten()
    log.maybe_append(1, 1, entries(2, 2), 4)  # another leader has the first one
    log.take_unwritten()
    assert not log.persisted_to(2, 2)  # it ends; the disk may have the one of term 3
    assert log.persisted == 1
    log.append(entries(3, 4))  # what that leader began its term with
    log.take_unwritten()
    assert log.persisted_to(3, 4)
    assert log.persisted == 3


def test_nothing_is_handed_out_for_applying_before_it_is_durable_here() -> None:
    log = a_log(1)
    log.append(entries(2, 1, 1))
    log.take_unwritten()
    log.commit_to(3)
    assert [entry.index for entry in log.take_committed(1 << 30)] == [1]
    assert log.take_committed(1 << 30) == []
    log.persisted_to(2, 1)
    assert log.has_next_committed
    assert [entry.index for entry in log.take_committed(1 << 30)] == [2]


def test_applying_goes_by_bounded_parts() -> None:
    log = a_log(*[1] * 5)
    log.commit_to(5)
    assert [entry.index for entry in log.take_committed(2 * SIZE)] == [1, 2]
    assert [entry.index for entry in log.take_committed(1)] == [3]
    log.applied_to(3)
    assert log.applied == 3
    assert [entry.index for entry in log.take_committed(1 << 30)] == [4, 5]


def test_what_the_log_has_not_can_not_be_committed() -> None:
    log = a_log(1)
    with pytest.raises(AssertionError, match="it has lost entries"):
        log.commit_to(2)


def test_what_is_not_committed_can_not_be_applied() -> None:
    log = a_log(1)
    with pytest.raises(AssertionError):
        log.applied_to(1)


# --- bytes and compaction ---


def test_bytes_are_counted_through_appends_truncations_and_compactions() -> None:
    log = a_log(1, 1, 1, 1)
    assert log.bytes == 4 * SIZE
    log.commit_to(2)
    log.applied_to(2)
    log.compact(2)
    assert (log.bytes, log.compacted, log.compacted_term) == (2 * SIZE, 2, 1)
    log.maybe_append(3, 1, entries(4, 2, 2, 2), 2)
    assert log.bytes == 4 * SIZE
    assert log.bytes_between(3, 5) == 2 * SIZE
    assert log.bytes_between(0, 4) == 2 * SIZE
    assert log.bytes_between(0, 2) == 0
    assert log.bytes_between(6, 6) == 0
    assert log.index_of_tail(0) == 6
    assert log.index_of_tail(2 * SIZE) == 4
    assert log.index_of_tail(3 * SIZE - 1) == 4
    assert log.index_of_tail(1 << 30) == 2
    assert log.unapplied_bytes == 0
    log.commit_to(4)
    assert log.unapplied_bytes == SIZE  # 4 is not durable
    log.take_unwritten()
    log.persisted_to(6, 2)
    assert log.unapplied_bytes == 2 * SIZE


def test_compacting_beyond_what_is_applied_is_a_mistake() -> None:
    log = a_log(1, 1)
    log.commit_to(2)
    with pytest.raises(AssertionError):
        log.compact(1)


def test_compacting_again_to_where_it_is_or_before_does_nothing() -> None:
    log = a_log(1, 1, applied=2)
    log.compact(2)
    log.compact(2)
    log.compact(1)
    assert (log.compacted, log.last_index) == (2, 2)


def test_a_reset_leaves_nothing_but_where_the_log_goes_on() -> None:
    log = a_log(1, 1, applied=1)
    log.append(entries(3, 1))
    log.reset(9, 4)
    assert (log.compacted, log.applied, log.committed, log.persisted, log.last_index) == (9, 9, 9, 9, 9)
    assert (log.last_term, log.bytes) == (4, 0)
    log.append(entries(10, 4))
    assert [entry.index for entry in log.take_unwritten()] == [10]


def test_a_log_with_a_hole_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        RaftLog(0, 0, entries(2, 1), 0)
    with pytest.raises(AssertionError):
        a_log(1).append(entries(3, 1))


def test_an_entry_that_the_owner_wrote_itself_is_not_handed_out() -> None:
    log = a_log(1)
    log.append_written(entries(2, 1)[0])
    assert log.take_unwritten() == []
    assert (log.last_index, log.bytes) == (2, 2 * SIZE)
    log.append(entries(3, 1))
    with pytest.raises(AssertionError):
        log.append_written(entries(4, 1)[0])


def test_changes_of_the_configuration_are_found() -> None:
    log = RaftLog(2, 1, entries(3, 1) + entries(4, 1, 1, kind=EntryKind.CONFIGURATION) + entries(6, 1), 2)
    assert log.configurations_between(0, 6) == [4, 5]
    assert log.configurations_between(4, 5) == [5]
    assert log.configurations_between(5, 6) == []


@given(st.data())
def test_the_log_does_what_a_list_would_do(data: st.DataObject) -> None:
    """Against a plain list of terms, entry i at place i."""
    log, model, term = a_log(), [0], 1
    for _ in range(data.draw(st.integers(1, 20))):
        match data.draw(st.sampled_from(["append", "replace", "commit", "compact"])):
            case "append":
                new = entries(len(model), *[term] * data.draw(st.integers(1, 5)))
                log.append(new)
                model += [entry.term for entry in new]
            case "replace":
                index = data.draw(st.integers(log.committed, len(model) - 1))
                term += 1
                new = entries(index + 1, *[term] * data.draw(st.integers(1, 5)))
                assert log.maybe_append(index, model[index], new, term) == new[-1].index
                model[index + 1 :] = [entry.term for entry in new]
            case "commit":
                log.commit_to(data.draw(st.integers(log.committed, len(model) - 1)))
                log.take_unwritten()
                log.persisted_to(log.last_index, log.last_term)
                taken = log.take_committed(1 << 30)
                if taken:
                    log.applied_to(taken[-1].index)
            case "compact":
                log.compact(data.draw(st.integers(0, log.applied)))
        assert terms_of(log) == model[log.compacted + 1 :]
        assert (log.last_index, log.last_term) == (len(model) - 1, model[-1])
        assert log.bytes == SIZE * (log.last_index - log.compacted)
        index = data.draw(st.integers(log.compacted, log.last_index))
        assert log.term_at(index) == model[index]
        sought = data.draw(st.integers(0, term + 1))
        found, found_term = log.find_conflict_by_term(index, sought)
        if found_term:
            assert model[found] == found_term <= sought
            assert all(each > sought for each in model[found + 1 : index + 1])
