"""Edits of a MERGE, applied to a value as it stands at apply.

Pure bytes to bytes. The hot ones are PATCH and APPEND on file extents (large values, so copies
count) and ADD and MAX on inode fields (small values, so calls count).
"""

from collections.abc import Sequence
from struct import Struct

from aspenfs import errors
from aspenfs.kv.types import ADD, APPEND, ATTRIBUTES, CUT, MAX, NO_ATTRIBUTES, PATCH, Attributes, Edit
from aspenfs.limits import ATTRIBUTES_MAX, VALUE_BYTES_MAX

_INT64 = Struct("<q")
_read, _write = _INT64.unpack_from, _INT64.pack_into
_NUMERIC = (ADD, MAX)
_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1


def apply_edits(value: bytes, attributes: Attributes, edits: Sequence[Edit]) -> tuple[bytes, Attributes]:
    """Value and attributes after `edits`, in order. TooLarge, OutOfRange; nothing is changed then."""
    if len(edits) == 1:
        edit = edits[0]
        code = edit[0]
        if code == PATCH:
            return _patched(value, edit[1], edit[2]), attributes
        if code == APPEND:
            data: bytes = edit[1]
            return _bounded(value + data), attributes
    buffer = bytearray(value)
    size = len(buffer)
    for edit in edits:
        code = edit[0]
        if code in _NUMERIC:
            _, offset, operand = edit
            if offset + 8 > size:
                buffer.extend(bytes(offset + 8 - size))
                size = offset + 8
            (number,) = _read(buffer, offset)
            if code == ADD:
                number += operand
                if not _INT64_MIN <= number <= _INT64_MAX:
                    raise errors.OutOfRange(f"the number at offset {offset} leaves 64 bits")
                _write(buffer, offset, number)
            elif operand > number:
                _write(buffer, offset, operand)
        elif code == PATCH:
            _, offset, data = edit
            if offset > size:
                buffer.extend(bytes(offset - size))
            buffer[offset : offset + len(data)] = data
            size = len(buffer)
        elif code == APPEND:
            buffer += edit[1]
            size = len(buffer)
            if size > VALUE_BYTES_MAX:
                break
        elif code == CUT:
            (_, wanted) = edit
            if wanted < size:
                del buffer[wanted:]
            else:
                buffer.extend(bytes(wanted - size))
            size = wanted
        elif code == ATTRIBUTES:
            attributes = changed_attributes(attributes, edit[1])
    if size > VALUE_BYTES_MAX:
        raise errors.TooLarge(f"a value of {size} bytes; at most {VALUE_BYTES_MAX}")
    return bytes(buffer), attributes


def changed_attributes(held: Attributes, changes: Attributes) -> Attributes:
    """`changes` laid over `held`, sorted by name (so that equal maps have equal bytes); b'' removes."""
    together = {**held, **changes}
    if len(together) > ATTRIBUTES_MAX and len(together) - list(together.values()).count(b"") > ATTRIBUTES_MAX:
        raise errors.TooLarge(f"more than {ATTRIBUTES_MAX} attributes")
    return {name: together[name] for name in sorted(together) if together[name] != b""} or NO_ATTRIBUTES


def _bounded(value: bytes) -> bytes:
    if len(value) > VALUE_BYTES_MAX:
        raise errors.TooLarge(f"a value of {len(value)} bytes; at most {VALUE_BYTES_MAX}")
    return value


def _patched(value: bytes, offset: int, data: bytes) -> bytes:
    size = len(value)
    end = offset + len(data)
    if offset == size:
        return value + data
    if offset > size:
        return b"".join((value, bytes(offset - size), data))
    held = memoryview(value)  # slices without a copy: the join is the only one
    return b"".join((held[:offset], data, held[end:]))
