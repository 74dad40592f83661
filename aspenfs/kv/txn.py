"""Evaluation of a transaction: compares, then operations, on a state that does not change meanwhile.

This is the hottest code of the store: no attribute is looked up twice, a key is read from the state at
most once, and what only some keyspaces need (history, leases) is done after the fact, from the events.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from struct import Struct
from typing import Any

from aspenfs import errors
from aspenfs.kv import history, leases, types
from aspenfs.kv.keys import HISTORY_KEYSPACES, USER_START
from aspenfs.kv.merge import apply_edits, changed_attributes
from aspenfs.kv.state import Effect, Outcome, State
from aspenfs.kv.types import (
    EXISTS,
    MERGE,
    NO_ATTRIBUTES,
    PUT,
    UPDATE,
    Compare,
    Event,
    Operation,
    Record,
    TxnResult,
)
from aspenfs.limits import TXN_DELETED_KEYS_MAX

_new = tuple.__new__
_INT64 = Struct("<q")
_WRITES = (PUT, MERGE, UPDATE)
Known = dict[bytes, Record | None]


def run(
    state: State,
    index: int,
    compares: Sequence[Compare],
    then: Sequence[Operation],
    else_: Sequence[Operation],
) -> Outcome:
    """The outcome of the transaction as entry `index`.

    A key changed more than once counts as changed once: the last value wins, its version goes up by one,
    and it has one event, at the place of its first change. LeaseNotFound, TooLarge, OutOfRange, TxnTooLarge.
    """
    before: Known = {}  # records as the state has them
    get = state.get
    succeeded = True
    for compare in compares:
        target, _, key, operand = compare
        if target == EXISTS:
            if key in before:
                record = before[key]
            else:
                record = before[key] = get(key)
            if (record is None) is operand:
                succeeded = False
                break
        elif not _holds(state, compare):
            succeeded = False
            break
    after: Known = {}  # records as the operations so far leave them, None = deleted
    responses: list[Any] = []
    created = 0
    for operation in then if succeeded else else_:
        code = operation[0]
        if code in _WRITES:
            key = operation[1]
            if key in after:
                held = after[key]
            elif key in before:
                held = before[key]
            else:
                held = before[key] = get(key)
            if held is None:
                value, attributes, lease = b"", NO_ATTRIBUTES, 0
                create, version, ordinal = index, 1, created
                created += 1
            else:
                value, create, modified, version, lease, ordinal, attributes = held
                if modified != index:
                    version += 1
            if code == MERGE:
                value, attributes = apply_edits(value, attributes, operation[2])
            else:
                _, _, value, lease, given = operation
                if code == UPDATE:
                    attributes = changed_attributes(attributes, given)
                elif given is not None:
                    attributes = changed_attributes(NO_ATTRIBUTES, given)
                if lease:
                    leases.require(state, lease)
            after[key] = _new(Record, (value, create, index, version, lease, ordinal, attributes))
            responses.append(None)
        else:
            responses.append(_other(state, before, after, operation))
    result = _new(TxnResult, (index, succeeded, responses))
    if not after:
        return _new(Outcome, (result, (), ()))
    return _settled(index, result, before, after)


def _settled(index: int, result: TxnResult, before: Known, after: Known) -> Outcome:
    """The outcome of changes `after`, with the history and the attachments that they entail."""
    effects: list[Effect] = []
    events: list[Event] = []
    leased = historic = False
    for key, record in after.items():
        previous = before[key]
        if previous is None:
            if record is None:
                continue  # made and deleted in this transaction
            if record[4]:
                leased = True
        elif previous[4] or (record is not None and record[4]):
            leased = True
        if key[:2] in HISTORY_KEYSPACES:
            historic = True
        effects.append((key, record))
        events.append(_new(Event, (key, record, previous)))
    if leased:
        for key, record, previous in events:
            old, new = previous.lease if previous else 0, record.lease if record else 0
            effects += leases.moved(index, key, old, new)
    if historic:
        effects += history.recorded(index, events)
    return _new(Outcome, (result, effects, events))


def removal(state: State, index: int, doomed: Sequence[bytes], result: int | None) -> Outcome:
    """The outcome of deleting the keys `doomed`, all of them there, as entry `index`."""
    before = {key: state.get(key) for key in doomed}
    changes = _settled(index, TxnResult(index, True, ()), before, dict.fromkeys(doomed))
    return Outcome(result, changes.effects, changes.events)


def _other(state: State, before: Known, after: Known, operation: Operation) -> Any:
    """Runs an operation that is no write of one key; its response."""
    match operation:
        case (types.DELETE, key):
            if _current(state, before, after, key) is None:
                return 0
            after[key] = None
            return 1
        case (types.GET, key):
            return _current(state, before, after, key)
        case (types.RANGE, start, end, limit):
            rows = _visible(state, after, start, end)
            return list(islice(rows, limit) if limit else rows)
        case (types.DELETE_RANGE, start, end):
            doomed = list(islice(_visible(state, after, start, end), TXN_DELETED_KEYS_MAX + 1))
            if len(doomed) > TXN_DELETED_KEYS_MAX:
                raise errors.TxnTooLarge(f"more than {TXN_DELETED_KEYS_MAX} keys to delete")
            for key, record in doomed:
                if key not in after:
                    before[key] = record
                after[key] = None
            return len(doomed)
    raise AssertionError(f"unchecked operation {operation!r}")


def _current(state: State, before: Known, after: Known, key: bytes) -> Record | None:
    if key in after:
        return after[key]
    if key not in before:
        before[key] = state.get(key)
    return before[key]


def _visible(state: State, after: Known, start: bytes, end: bytes) -> Iterator[tuple[bytes, Record]]:
    """The user keys of [start, end) with the changes `after` laid over the state."""
    start = max(start, USER_START)
    if end and start >= end:
        return
    own = sorted(key for key in after if start <= key and (not end or key < end))
    place = 0
    for item in state.items(start, end):
        key = item[0]
        while place < len(own) and own[place] < key:
            record = after[own[place]]
            if record is not None:
                yield own[place], record
            place += 1
        if place < len(own) and own[place] == key:
            continue
        yield item
    for key in own[place:]:
        record = after[key]
        if record is not None:
            yield key, record


def _holds(state: State, compare: Compare) -> bool:
    target, operator, key, operand = compare
    if target == types.RANGE_EMPTY:
        start = max(key, USER_START)
        return bool(operand and start >= operand) or next(state.items(start, operand), None) is None
    record = state.get(key)
    if target == EXISTS:
        return (record is not None) is operand
    found: Any
    if target == types.CREATE_REVISION:
        found = record.create_revision if record is not None else 0
    elif target == types.MOD_REVISION:
        found = record.mod_revision if record is not None else 0
    elif target == types.VERSION:
        found = record.version if record is not None else 0
    elif record is None:
        return False
    elif target == types.VALUE:
        found = record.value
    else:
        offset, operand = operand
        if offset + 8 > len(record.value):
            return False
        (found,) = _INT64.unpack_from(record.value, offset)
    if operator == types.EQUAL:
        return bool(found == operand)
    if operator == types.NOT_EQUAL:
        return bool(found != operand)
    return bool(found < operand if operator == types.LESS else found > operand)
