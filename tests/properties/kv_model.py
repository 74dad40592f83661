"""The store as a plain dict: slow, obvious, and written apart from the store itself."""

import operator as python
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from aspenfs.kv import types
from aspenfs.kv.types import Compare, Operation

# key -> [value, create revision, mod revision, version, lease, ordinal, attributes]
Rows = dict[bytes, list[Any]]

_COMPARISONS = {1: python.eq, 2: python.ne, 3: python.lt, 4: python.gt}
_INT64_MAX = (1 << 63) - 1


class Refused(Exception):
    """The transaction ends in an error and changes nothing."""


class Model:
    def __init__(self, leases: Sequence[int] = ()) -> None:
        self.rows: Rows = {}
        self.leases = set(leases)
        self._created = 0  # keys, by the transaction under way

    def txn(
        self, index: int, compares: Sequence[Compare], then: Sequence[Operation], else_: Sequence[Operation]
    ) -> tuple[bool, list[Any]]:
        """Whether the compares held, and the responses with records as tuples."""
        held = all(self._holds(compare) for compare in compares)
        before = deepcopy(self.rows)
        self._created = 0
        try:
            responses = [self._run(index, operation) for operation in (then if held else else_)]
        except Refused:
            self.rows = before
            raise
        return held, responses

    def between(self, start: bytes, end: bytes) -> list[bytes]:
        return [key for key in sorted(self.rows) if key >= start and (end == b"" or key < end)]

    def _holds(self, compare: Compare) -> bool:
        target, operator, key, operand = compare
        row = self.rows.get(key)
        compared = _COMPARISONS[operator]
        if target == types.EXISTS:
            return (row is not None) is operand
        if target == types.RANGE_EMPTY:
            return self.between(key, operand) == []
        place = {types.CREATE_REVISION: 1, types.MOD_REVISION: 2, types.VERSION: 3}.get(target)
        if place is not None:
            return bool(compared(0 if row is None else row[place], operand))
        if row is None:
            return False
        if target == types.VALUE:
            return bool(compared(row[0], operand))
        offset, number = operand
        field = row[0][offset : offset + 8]
        return len(field) == 8 and bool(compared(int.from_bytes(field, "little", signed=True), number))

    def _run(self, index: int, operation: Operation) -> Any:
        match operation:
            case (types.PUT, key, value, lease, attributes):
                if lease and lease not in self.leases:
                    raise Refused
                row = self._row(index, key)
                row[0], row[4] = value, lease
                if attributes is not None:
                    row[6] = {name: held for name, held in attributes.items() if held != b""}
            case (types.UPDATE, key, value, lease, changes):
                if lease and lease not in self.leases:
                    raise Refused
                row = self._row(index, key)
                row[0], row[4] = value, lease
                self._edit(row, (types.ATTRIBUTES, changes))
            case (types.MERGE, key, edits):
                row = self._row(index, key)
                for edit in edits:
                    self._edit(row, edit)
            case (types.DELETE, key):
                return int(self.rows.pop(key, None) is not None)
            case (types.DELETE_RANGE, start, end):
                doomed = self.between(start, end)
                for key in doomed:
                    del self.rows[key]
                return len(doomed)
            case (types.GET, key):
                return tuple(deepcopy(self.rows[key])) if key in self.rows else None
            case (types.RANGE, start, end, limit):
                found = self.between(start, end)
                return [(key, tuple(deepcopy(self.rows[key]))) for key in (found[:limit] if limit else found)]
        return None

    def _row(self, index: int, key: bytes) -> list[Any]:
        row = self.rows.get(key)
        if row is None:
            row = self.rows[key] = [b"", index, index, 1, 0, self._created, {}]
            self._created += 1
        elif row[2] != index:
            row[2], row[3] = index, row[3] + 1
        return row

    def _edit(self, row: list[Any], edit: types.Edit) -> None:
        value: bytes = row[0]
        match edit:
            case (types.PATCH, offset, data):
                padded = value.ljust(offset, b"\x00")
                row[0] = padded[:offset] + data + padded[offset + len(data) :]
            case (types.APPEND, data):
                row[0] = value + data
            case (types.CUT, size):
                row[0] = value[:size].ljust(size, b"\x00")
            case (types.ADD | types.MAX as code, offset, number):
                padded = value.ljust(offset + 8, b"\x00")
                held = int.from_bytes(padded[offset : offset + 8], "little", signed=True)
                new = held + number if code == types.ADD else max(held, number)
                if not -_INT64_MAX - 1 <= new <= _INT64_MAX:
                    raise Refused
                row[0] = padded[:offset] + new.to_bytes(8, "little", signed=True) + padded[offset + 8 :]
            case (types.ATTRIBUTES, changes):
                together = row[6] | changes
                row[6] = {name: held for name, held in together.items() if held != b""}
