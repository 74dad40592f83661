"""Checks that need no search, because every answer of the store says at which revision it stands.

Belongs here: answers against the order of the log, in O(n log n); and what watchers were given against
what the log did. Both say what is wrong in words, and an empty list means that nothing is. Histories
without revisions are for `linearizability.py`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from aspenfs.sim.history import NEVER

Value = bytes | None  # None: the key is not there


class Answer(NamedTuple):
    """One call of a client that says at which revision it stands. `write` names what was to be written
    (None for a read); `seen` is what a read of `key` got."""

    called: float
    returned: float  # NEVER: unknown, and then `revision` means nothing
    revision: int
    write: object = None
    key: bytes = b""
    seen: Value = None


class Change(NamedTuple):
    """What one revision changed, events in order, and the write that did it (None: not a client's)."""

    revision: int
    events: Sequence[tuple[bytes, Value]]
    write: object = None


def check_answers(answers: Sequence[Answer], log: Sequence[Change]) -> list[str]:
    """Every answer stands where the log has it, after all that had returned before it was called.

    `log` is in the order of revisions and complete. Together with unique writes this is strict
    serializability with the order given: real time, no lost write, none applied twice, no stale read.
    """
    wrong = [*_writes_in_log(answers, log), *_real_time(answers)]
    history: dict[bytes, list[tuple[int, Value]]] = {}
    for change in log:
        for key, value in change.events:
            history.setdefault(key, []).append((change.revision, value))
    last = log[-1].revision if log else 0
    reads = (one for one in answers if one.write is None and one.returned != NEVER)
    for one in sorted(reads, key=lambda one: one.revision):
        if one.revision > last:
            wrong.append(f"a read at revision {one.revision}, but the log ends with {last}")
        elif (there := value_at(history.get(one.key, []), one.revision)) != one.seen:
            wrong.append(f"read of {one.key!r} at {one.revision} gave {one.seen!r}; it was {there!r}")
    return wrong


def value_at(history: Sequence[tuple[int, Value]], revision: int) -> Value:
    """The last value at or before `revision`; `history` is in order."""
    low, high = 0, len(history)
    while low < high:
        middle = (low + high) // 2
        if history[middle][0] <= revision:
            low = middle + 1
        else:
            high = middle
    return history[low - 1][1] if low else None


def _writes_in_log(answers: Iterable[Answer], log: Iterable[Change]) -> list[str]:
    wrong = []
    at: dict[object, int] = {}
    for change in log:
        if change.write is None:
            continue
        if change.write in at:
            wrong.append(f"{change.write!r} was applied twice: at {at[change.write]} and {change.revision}")
        at[change.write] = change.revision
    for one in answers:
        if one.write is not None and one.returned != NEVER and at.get(one.write) != one.revision:
            found = f"the log has it at {at[one.write]}" if one.write in at else "it is not in the log"
            wrong.append(f"{one.write!r} was acknowledged at revision {one.revision}, but {found}")
    return wrong


def _real_time(answers: Iterable[Answer]) -> list[str]:
    """A read stands at or after, a write after, all that had returned before its call."""
    wrong = []
    events: list[tuple[float, int, int, Answer]] = []
    for number, one in enumerate(answers):
        if one.returned != NEVER:
            events += [(one.called, 0, number, one), (one.returned, 1, number, one)]
    events.sort(key=lambda event: event[:3])
    floor = 0
    floors: dict[int, int] = {}
    for _, is_return, number, one in events:
        if not is_return:
            floors[number] = floor
            continue
        before = floors.pop(number)
        if one.revision < before or (one.write is not None and one.revision == before):
            what = f"write {one.write!r}" if one.write is not None else f"read of {one.key!r}"
            wrong.append(f"{what} stands at {one.revision}, after {before} had been answered to somebody")
        floor = max(floor, one.revision)
    return wrong


class Watched(NamedTuple):
    """What one watch of keys in [start, end) was given; `end` b'' is no end.

    `upto` is the revision up to which it was told that it has everything: of its last batch, if nothing
    else was said (0). A watch that ended in an error ended; what it had until then counts.
    """

    start: bytes
    end: bytes
    from_revision: int
    batches: Sequence[Change]
    upto: int = 0


def check_watch(watch: Watched, log: Mapping[int, Change]) -> list[str]:
    """Ordered, unique, whole revisions, none invented, no gap from `from_revision` on."""
    wrong = []
    last = watch.from_revision - 1
    for batch in watch.batches:
        if batch.revision <= last:
            wrong.append(f"revision {batch.revision} was given after {last}")
        wrong += _missing(watch, log, last + 1, batch.revision - 1)
        expected = _wanted(watch, log, batch.revision)
        if not expected:
            wrong.append(f"revision {batch.revision} changed nothing that is watched, yet it was given")
        elif list(batch.events) != expected:
            wrong.append(f"revision {batch.revision} was given as {list(batch.events)}, it did {expected}")
        last = max(last, batch.revision)
    return [*wrong, *_missing(watch, log, last + 1, watch.upto)]


def check_resumed(watches: Sequence[Watched], log: Mapping[int, Change]) -> list[str]:
    """One reader that went from watch to watch, on any nodes: each is right, and nothing is between them."""
    wrong = []
    last: int | None = None
    for watch in watches:
        wrong += check_watch(watch, log)
        if last is not None:
            wrong += _missing(watch, log, last + 1, watch.from_revision - 1)
            for batch in watch.batches:
                if batch.revision <= last:
                    wrong.append(f"revision {batch.revision} was given again after {last}")
        seen = [watch.from_revision - 1, watch.upto, *(batch.revision for batch in watch.batches)]
        last = max(seen if last is None else [last, *seen])
    return wrong


def _wanted(watch: Watched, log: Mapping[int, Change], revision: int) -> list[tuple[bytes, Value]]:
    change = log.get(revision)
    if change is None:
        return []
    start, end = watch.start, watch.end
    return [one for one in change.events if start <= one[0] and (not end or one[0] < end)]


def _missing(watch: Watched, log: Mapping[int, Change], first: int, last: int) -> list[str]:
    return [
        f"revision {revision} was left out"
        for revision in range(first, last + 1)
        if _wanted(watch, log, revision)
    ]
