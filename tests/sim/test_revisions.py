"""The checks of answers and watches against the log: each way of being wrong is named."""

from aspenfs.sim.history import NEVER
from aspenfs.sim.revisions import Answer, Change, Watched, check_answers, check_resumed, check_watch

LOG = [
    Change(1, [(b"a", b"1")], "first"),
    Change(2, [(b"b", b"2"), (b"a", b"3")], "second"),
    Change(3, [], None),
    Change(4, [(b"a", None)], "third"),
    Change(5, [(b"c", b"4")], "fourth"),
]
BY_REVISION = {change.revision: change for change in LOG}


def answers(*more: Answer) -> list[str]:
    return check_answers([Answer(1, 2, 1, "first"), Answer(3, 4, 2, "second"), *more], LOG)


def test_right_answers_pass() -> None:
    assert not answers(
        Answer(5, 6, 2, None, b"a", b"3"),
        Answer(3, 9, 1, None, b"a", b"1"),  # called before the second write had returned
        Answer(5, 6, 4, "third"),
        Answer(7, 8, 4, None, b"a", None),
        Answer(7, 8, 5, None, b"c", b"4"),
        Answer(1, NEVER, 0, "fourth"),
    )


def test_stale_read_is_named() -> None:
    assert answers(Answer(5, 6, 1, None, b"a", b"1")) == [
        "read of b'a' stands at 1, after 2 had been answered to somebody"
    ]


def test_read_of_what_was_not_there_is_named() -> None:
    assert answers(Answer(5, 6, 2, None, b"a", b"1")) == ["read of b'a' at 2 gave b'1'; it was b'3'"]
    assert answers(Answer(5, 6, 9, None, b"a", b"1")) == ["a read at revision 9, but the log ends with 5"]


def test_lost_and_misplaced_writes_are_named() -> None:
    assert answers(Answer(5, 6, 5, "gone")) == [
        "'gone' was acknowledged at revision 5, but it is not in the log"
    ]
    assert answers(Answer(5, 6, 5, "third")) == [
        "'third' was acknowledged at revision 5, but the log has it at 4"
    ]


def test_write_that_was_applied_twice_is_named() -> None:
    assert check_answers([], [*LOG, Change(6, [(b"a", b"1")], "first")]) == [
        "'first' was applied twice: at 1 and 6"
    ]


def test_writes_out_of_real_time_are_named() -> None:
    wrong = check_answers([Answer(1, 2, 2, "second"), Answer(3, 4, 1, "first")], LOG)
    assert wrong == ["write 'first' stands at 1, after 2 had been answered to somebody"]


def watch(*batches: Change, first: int = 1, upto: int = 0, start: bytes = b"a", end: bytes = b"b") -> Watched:
    return Watched(start, end, first, batches, upto)


ONLY_A = [Change(1, [(b"a", b"1")]), Change(2, [(b"a", b"3")]), Change(4, [(b"a", None)])]


def test_whole_watch_passes() -> None:
    assert not check_watch(watch(*ONLY_A, upto=5), BY_REVISION)
    assert not check_watch(watch(*LOG[:2], *LOG[3:], start=b"", end=b""), BY_REVISION)
    assert not check_watch(watch(*ONLY_A[2:], first=3), BY_REVISION)
    assert not check_watch(watch(), BY_REVISION)


def test_gap_is_named() -> None:
    assert check_watch(watch(ONLY_A[0], ONLY_A[2]), BY_REVISION) == ["revision 2 was left out"]
    assert check_watch(watch(*ONLY_A[1:]), BY_REVISION) == ["revision 1 was left out"]
    assert check_watch(watch(*ONLY_A[:2], upto=4), BY_REVISION) == ["revision 4 was left out"]


def test_disorder_and_repetition_are_named() -> None:
    assert check_watch(watch(*ONLY_A, ONLY_A[2]), BY_REVISION) == ["revision 4 was given after 4"]
    assert check_watch(watch(ONLY_A[1], ONLY_A[0], first=2), BY_REVISION) == ["revision 1 was given after 2"]
    assert check_watch(watch(ONLY_A[0], first=2), BY_REVISION) == ["revision 1 was given after 1"]


def test_split_revision_is_named() -> None:
    half = watch(LOG[0], Change(2, [(b"b", b"2")]), start=b"", end=b"")
    assert check_watch(half, BY_REVISION) == [
        "revision 2 was given as [(b'b', b'2')], it did [(b'b', b'2'), (b'a', b'3')]"
    ]


def test_invented_event_is_named() -> None:
    assert check_watch(watch(Change(3, [(b"a", b"9")]), first=3), BY_REVISION) == [
        "revision 3 changed nothing that is watched, yet it was given"
    ]


def test_resuming_elsewhere_leaves_nothing_out_and_repeats_nothing() -> None:
    assert not check_resumed([watch(ONLY_A[0]), watch(*ONLY_A[1:], first=2)], BY_REVISION)
    assert check_resumed([watch(ONLY_A[0]), watch(ONLY_A[2], first=3)], BY_REVISION) == [
        "revision 2 was left out"
    ]
    assert check_resumed([watch(*ONLY_A[:2]), watch(*ONLY_A[1:], first=2)], BY_REVISION) == [
        "revision 2 was given again after 2"
    ]
