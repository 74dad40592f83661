"""Commands: what a log entry of the store says, and its bytes.

Belongs here: the kinds of command, encoding, decoding, and every check that needs nothing but the
command. A command that passed `check_size` or `decode` is well-formed: evaluation trusts it. Not
here: what a command does (`machine.py`). Byte by byte: `docs/design/store.md`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgpack

from aspenfs import errors
from aspenfs.kv import keys, types
from aspenfs.kv.types import Compare, Operation
from aspenfs.limits import (
    ATTRIBUTE_BYTES_MAX,
    ATTRIBUTES_MAX,
    KEY_BYTES_MAX,
    LEASE_TTL_MS_MAX,
    STORE_KEY_BYTES_MAX,
    TXN_BYTES_MAX,
    TXN_OPS_MAX,
    VALUE_BYTES_MAX,
)

FORMAT = 1
TXN, LEASE_GRANT, LEASE_KEEPALIVE, LEASE_REVOKE, LEASE_EXPIRE, COMPACT, NOOP, CHECKPOINT = range(1, 9)
CLIENT_BYTES = 16

_HISTORY_KEY_BYTES_MAX = KEY_BYTES_MAX + 2
_LEASED_KEY_BYTES_MAX = STORE_KEY_BYTES_MAX - 10  # its attachment adds a prefix and the lease id
_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1

_packer = msgpack.Packer()  # one for all: a new one costs as much as a command

TxnBody = tuple[Sequence[Compare], Sequence[Operation], Sequence[Operation]]


class Command(NamedTuple):
    """`time_ns` is the proposer's wall clock. Bodies: TXN (compares, then, else_); LEASE_GRANT (lease,
    ttl_ms); LEASE_KEEPALIVE and LEASE_REVOKE (lease,); LEASE_EXPIRE leases; COMPACT (revision,); NOOP and
    CHECKPOINT ()."""

    kind: int
    time_ns: int
    dedup: tuple[bytes, int] | None
    body: tuple[Any, ...]


def encode(command: Command) -> bytes:
    """The bytes that go into the log. InvalidArgument for what has no encoding."""
    kind, time_ns, dedup, body = command
    try:
        packed: bytes = _packer.pack((FORMAT, kind, time_ns, dedup, body))
    except (TypeError, ValueError, OverflowError) as error:
        raise errors.InvalidArgument(f"command cannot be encoded: {error}") from error
    return packed


def decode(data: bytes | bytearray | memoryview) -> Command:
    """The well-formed command in `data`; InvalidArgument for any other bytes, however hostile. NotSupported
    for what only a newer release can have written: who goes on without it has another state than others."""
    try:
        fields = msgpack.unpackb(data, use_list=False)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise errors.InvalidArgument(f"not a command: {error}") from error
    if type(fields) is not tuple or not fields or type(fields[0]) is not int:
        raise errors.InvalidArgument("not a command")
    if fields[0] > FORMAT:
        raise _unknown(f"a command of format {fields[0]}")
    if len(fields) != 5 or fields[0] != FORMAT:
        raise errors.InvalidArgument("not a command of a known format")
    command = Command(*fields[1:])
    try:
        _check(command, len(data))
    except (TypeError, ValueError, IndexError, KeyError, AttributeError, OverflowError) as error:
        raise errors.InvalidArgument(f"malformed command: {error}") from error
    except _Newer as error:
        raise _unknown(str(error)) from error
    except errors.AspenError as error:
        raise errors.InvalidArgument(f"malformed command: {error}") from error
    return command


class _Newer(errors.InvalidArgument):
    """What this release does not know, and a newer one may."""


def _unknown(what: str) -> errors.NotSupported:
    return errors.NotSupported(f"{what}: a newer release of aspenfs wrote it; upgrade this node")


def _check(command: Command, encoded_len: int) -> None:
    kind, time_ns, dedup, body = command
    if type(kind) is not int or type(time_ns) is not int or not 0 <= time_ns <= _INT64_MAX:
        raise errors.InvalidArgument("kind or time of a command")
    if type(body) is not tuple:
        raise errors.InvalidArgument("body of a command")
    if dedup is not None:
        check_dedup(dedup)
    if kind == TXN:
        compares, then, else_ = body
        check_size(compares, then, else_, encoded_len)
    elif kind == LEASE_GRANT:
        check_lease(*body)
    elif kind in (LEASE_KEEPALIVE, LEASE_REVOKE, COMPACT):
        (argument,) = body
        check_natural(argument)
    elif kind == LEASE_EXPIRE:
        for lease in body:
            check_natural(lease)
    elif kind > CHECKPOINT:
        raise _Newer(f"a command of kind {kind}")
    elif kind not in (NOOP, CHECKPOINT) or body:
        raise errors.InvalidArgument(f"unknown kind of command: {kind}")


def check_dedup(dedup: tuple[bytes, int]) -> None:
    client, sequence = dedup
    if type(client) is not bytes or len(client) != CLIENT_BYTES:
        raise errors.InvalidArgument(f"a client id has {CLIENT_BYTES} bytes")
    if type(sequence) is not int or not 1 <= sequence <= _INT64_MAX:
        raise errors.InvalidArgument("a sequence number counts from 1")


def check_lease(lease: int, ttl_ms: int) -> None:
    if type(lease) is not int or not 1 <= lease <= _INT64_MAX:
        raise errors.InvalidArgument(f"lease id {lease!r}")
    if type(ttl_ms) is not int or not 1 <= ttl_ms <= LEASE_TTL_MS_MAX:
        raise errors.InvalidArgument(f"a lease lives for 1 to {LEASE_TTL_MS_MAX} ms, not {ttl_ms!r}")


def check_size(
    compares: Sequence[Compare], then: Sequence[Operation], else_: Sequence[Operation], encoded_len: int
) -> None:
    """Raises unless the transaction is well-formed and within bounds.

    TxnTooLarge: too many items or bytes. NameTooLong: a key. TooLarge: a value. InvalidArgument: an
    empty or reserved key, a wrong type, a number out of 64 bits.
    """
    if len(compares) > TXN_OPS_MAX or len(then) > TXN_OPS_MAX or len(else_) > TXN_OPS_MAX:
        raise errors.TxnTooLarge(f"more than {TXN_OPS_MAX} compares or operations")
    if encoded_len > TXN_BYTES_MAX:
        raise errors.TxnTooLarge(f"{encoded_len} bytes; a transaction has at most {TXN_BYTES_MAX}")
    for compare in compares:
        target, operator, key, operand = compare
        if target == types.EXISTS and operator == types.EQUAL and (operand is True or operand is False):
            _check_key(key)
        else:
            _check_compare(target, operator, key, operand)
    for operation in then:
        _check_operation(operation)
    for operation in else_:
        _check_operation(operation)


def _check_key(key: bytes) -> None:
    # The usual key passes with one comparison chain; the words are found on the slow path.
    if type(key) is bytes and key >= b"\x01" and len(key) <= _HISTORY_KEY_BYTES_MAX:
        if len(key) > 2 or key not in keys.HISTORY_KEYSPACES:
            return
        raise errors.InvalidArgument("empty key")
    if type(key) is not bytes:
        raise errors.InvalidArgument(f"a key is bytes, not {type(key).__name__}")
    if key < b"\x01":
        raise errors.InvalidArgument("empty key" if not key else "keys that begin with 0x00 are reserved")
    if len(key) > STORE_KEY_BYTES_MAX or key[:2] in keys.HISTORY_KEYSPACES:
        raise errors.NameTooLong(f"a key of {len(key)} bytes")


def _check_bounds(start: bytes, end: bytes) -> None:
    if type(start) is not bytes or type(end) is not bytes:
        raise errors.InvalidArgument("the bounds of a range are bytes")
    if len(start) > STORE_KEY_BYTES_MAX or len(end) > STORE_KEY_BYTES_MAX:
        raise errors.NameTooLong("a bound of a range")


def _check_value(value: bytes) -> None:
    if type(value) is not bytes:
        raise errors.InvalidArgument(f"a value is bytes, not {type(value).__name__}")
    if len(value) > VALUE_BYTES_MAX:
        raise errors.TooLarge(f"a value of {len(value)} bytes; at most {VALUE_BYTES_MAX}")


def check_natural(value: int) -> None:
    if type(value) is not int or not 0 <= value <= _INT64_MAX:
        raise errors.InvalidArgument(f"not a natural number of 63 bits: {value!r}")


def _int64(value: int) -> None:
    if type(value) is not int or not _INT64_MIN <= value <= _INT64_MAX:
        raise errors.InvalidArgument(f"not a signed number of 64 bits: {value!r}")


def _check_offset(offset: int, size: int) -> None:
    if type(offset) is not int or offset < 0:
        raise errors.InvalidArgument(f"offset {offset!r}")
    if offset + size > VALUE_BYTES_MAX:
        raise errors.TooLarge(f"a value of {offset + size} bytes; at most {VALUE_BYTES_MAX}")


def _check_compare(target: int, operator: int, key: bytes, operand: Any) -> None:
    if type(target) is not int or type(operator) is not int or not types.EQUAL <= operator <= types.GREATER:
        raise errors.InvalidArgument("target or operator of a compare")
    if target == types.RANGE_EMPTY:
        _check_bounds(key, operand)
        if operator != types.EQUAL:
            raise errors.InvalidArgument("a range is compared with EQUAL only")
        return
    _check_key(key)
    if target in (types.CREATE_REVISION, types.MOD_REVISION, types.VERSION):
        _int64(operand)
    elif target == types.VALUE:
        _check_value(operand)
    elif target == types.FIELD:
        offset, value = operand
        _check_offset(offset, 8)
        _int64(value)
    elif target > types.FIELD:
        raise _Newer(f"compare target {target}")
    else:
        raise errors.InvalidArgument(f"compare target {target!r}")


def _check_operation(operation: Operation) -> None:
    code = operation[0]
    if code == types.PUT or code == types.UPDATE:
        _, key, value, lease, attributes = operation
        _check_key(key)
        if type(value) is not bytes or len(value) > VALUE_BYTES_MAX:
            _check_value(value)
        if lease != 0 or type(lease) is not int:
            check_natural(lease)
            if len(key) > _LEASED_KEY_BYTES_MAX:
                raise errors.NameTooLong(f"a key of {len(key)} bytes with a lease")
        if attributes is not None or code == types.UPDATE:
            _check_attributes(attributes)
    elif code == types.MERGE:
        _, key, edits = operation
        _check_key(key)
        if type(edits) is not tuple or len(edits) > TXN_OPS_MAX:
            raise errors.InvalidArgument("the edits of a merge")
        for edit in edits:
            _check_edit(edit)
    elif code == types.DELETE or code == types.GET:
        _, key = operation
        _check_key(key)
    elif code == types.DELETE_RANGE:
        _, start, end = operation
        _check_bounds(start, end)
    elif code == types.RANGE:
        _, start, end, limit = operation
        _check_bounds(start, end)
        check_natural(limit)
    elif type(code) is int and code > types.UPDATE:
        raise _Newer(f"operation {code}")
    else:
        raise errors.InvalidArgument(f"operation {code!r}")


def _check_edit(edit: types.Edit) -> None:
    code = edit[0]
    if code == types.ADD or code == types.MAX:
        _, offset, value = edit
        if type(offset) is not int or not 0 <= offset <= VALUE_BYTES_MAX - 8:
            _check_offset(offset, 8)
        if type(value) is not int or not _INT64_MIN <= value <= _INT64_MAX:
            _int64(value)
    elif code == types.PATCH:
        _, offset, data = edit
        _check_value(data)
        _check_offset(offset, len(data))
    elif code == types.APPEND:
        _, data = edit
        _check_value(data)
    elif code == types.CUT:
        _, size = edit
        _check_offset(size, 0)
    elif code == types.ATTRIBUTES:
        _, attributes = edit
        _check_attributes(attributes)
    elif type(code) is int and code > types.ATTRIBUTES:
        raise _Newer(f"edit {code}")
    else:
        raise errors.InvalidArgument(f"edit {code!r}")


def _check_attributes(attributes: types.Attributes) -> None:
    if type(attributes) is not dict:
        raise errors.InvalidArgument("attributes are a dict")
    if len(attributes) > ATTRIBUTES_MAX:
        raise errors.TooLarge(f"more than {ATTRIBUTES_MAX} attributes")
    for name, value in attributes.items():
        if type(name) is not str or not 1 <= len(name) <= 255:
            raise errors.InvalidArgument(f"name of an attribute: {name!r}")
        if type(value) is int:
            _int64(value)
        elif type(value) is not bytes and type(value) is not str:
            raise errors.InvalidArgument(f"attribute {name}: {type(value).__name__}")
        elif len(value) > ATTRIBUTE_BYTES_MAX:
            raise errors.TooLarge(f"attribute {name}: more than {ATTRIBUTE_BYTES_MAX} bytes")
