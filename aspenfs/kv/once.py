"""Apply once: the last result of each client, kept in the state for retries.

A client numbers its transactions from 1 and has one under way at a time. A retry of the last number
gets the first result again; a lower number is refused (its result is gone, applying it again would be
wrong). A transaction that ended in an error changed nothing and is not remembered. Rows expire by log
position, so all nodes forget alike; a second row by position finds those that are due.

Row: client -> msgpack (sequence, index, revision, succeeded, responses); (index, client) -> nothing.
"""

from itertools import islice
from typing import Any

import msgpack

from aspenfs import errors
from aspenfs.kv import keys
from aspenfs.kv.state import Effect, State, internal
from aspenfs.kv.types import Record, TxnResult
from aspenfs.limits import DEDUP_RESULT_BYTES_MAX, DEDUP_REVISIONS

_GET, _RANGE = 1, 2
_EXPIRED_AT_ONCE = 4  # rows dropped by each entry that adds one, so the table shrinks back


def first_result(state: State, index: int, client: bytes, sequence: int) -> TxnResult | None:
    """The result of an earlier run of (client, sequence), None if it is new; Stale if it is too old."""
    row = state.get(keys.CLIENT + client)
    if row is None or row.mod_revision + DEDUP_REVISIONS <= index:
        return None
    last, revision, succeeded, responses = msgpack.unpackb(row.value)
    if sequence > last:
        return None
    if sequence < last:
        raise errors.Stale(f"transaction {sequence} of this client is older than its last, {last}")
    return TxnResult(revision, succeeded, [_loaded(response) for response in responses])


def remembered(state: State, index: int, client: bytes, sequence: int, result: TxnResult) -> list[Effect]:
    """The effects that keep `result` and let go of rows that are due. TxnTooLarge."""
    responses = [_stored(response) for response in result.responses]
    value = msgpack.packb((sequence, result.revision, result.succeeded, responses))
    if len(value) > DEDUP_RESULT_BYTES_MAX:
        raise errors.TxnTooLarge(f"a result of {len(value)} bytes cannot be kept for a retry")
    effects: list[Effect] = []
    row = state.get(keys.CLIENT + client)
    if row is not None:
        effects.append((_at(row.mod_revision, client), None))
    due = state.items(keys.CLIENT_AT, _at(max(index - DEDUP_REVISIONS + 1, 0), b""))
    for key, _ in islice(due, _EXPIRED_AT_ONCE):
        expired = key[len(keys.CLIENT_AT) + 8 :]
        if expired != client:
            effects += ((key, None), (keys.CLIENT + expired, None))
    effects.append((keys.CLIENT + client, internal(index, value)))
    effects.append((_at(index, client), internal(index, b"")))
    return effects


def _at(index: int, client: bytes) -> bytes:
    return keys.CLIENT_AT + keys.number(index) + client


def _stored(response: Any) -> Any:
    if isinstance(response, Record):
        return (_GET, response)
    return (_RANGE, response) if isinstance(response, list) else response


def _loaded(stored: Any) -> Any:
    if not isinstance(stored, list):
        return stored
    kind, payload = stored
    if kind == _GET:
        return Record(*payload)
    return [(key, Record(*fields)) for key, fields in payload]
