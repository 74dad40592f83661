"""Record <-> bytes, as the state database, snapshots and state hashes hold it.

    u8 format (1), u8 flags, u16 ordinal, u64 create revision, u64 mod revision, u64 version,
    [flag 1: i64 lease] [flag 2: u32 n, then n bytes of msgpack map sorted by name], value to the end

All little-endian. Equal records have equal bytes. Packing and unpacking a record without lease and
attributes costs about a microsecond: it is on the path of every lookup.
"""

from struct import Struct
from struct import error as StructError

import msgpack

from aspenfs import errors
from aspenfs.kv.types import NO_ATTRIBUTES, Record

FORMAT = 1
_LEASED, _ATTRIBUTED = 1, 2
_HEADER = Struct("<BBHQQQ")
_LEASE = Struct("<q")
_LENGTH = Struct("<I")
_PLAIN = FORMAT  # format and flags of a plain record, read as one little-endian u16
_FIRST = Struct("<HHQQQ")
_pack, _unpack, _head = _FIRST.pack, _FIRST.unpack_from, _HEADER.size
_new = tuple.__new__


def pack(record: Record) -> bytes:
    """The stored bytes of `record`."""
    value, create, mod, version, lease, ordinal, attributes = record
    if not lease and not attributes:
        return _pack(_PLAIN, ordinal, create, mod, version) + value
    flags = 0
    parts = [b""]
    if lease:
        flags |= _LEASED
        parts.append(_LEASE.pack(lease))
    if attributes:
        flags |= _ATTRIBUTED
        packed = msgpack.packb({name: attributes[name] for name in sorted(attributes)})
        parts += (_LENGTH.pack(len(packed)), packed)
    parts[0] = _HEADER.pack(FORMAT, flags, ordinal, create, mod, version)
    parts.append(value)
    return b"".join(parts)


def unpack(data: bytes | memoryview) -> Record:
    """The record in `data`, which may be a view of memory that goes away. Corrupt if there is none."""
    try:
        first, ordinal, create, mod, version = _unpack(data)
    except StructError as error:
        raise _corrupt(f"a record of {len(data)} bytes") from error
    if first == _PLAIN:
        return _new(Record, (bytes(data[_head:]), create, mod, version, 0, ordinal, NO_ATTRIBUTES))
    return _unpack_full(data, first, (create, mod, version), ordinal)


def _unpack_full(data: bytes | memoryview, first: int, counts: tuple[int, int, int], ordinal: int) -> Record:
    flags = first >> 8
    if first & 0xFF != FORMAT or flags & ~(_LEASED | _ATTRIBUTED):
        raise _corrupt(f"record format {first & 0xFF}, flags {flags}")
    lease, attributes, offset = 0, NO_ATTRIBUTES, _head
    try:
        if flags & _LEASED:
            (lease,) = _LEASE.unpack_from(data, offset)
            offset += 8
        if flags & _ATTRIBUTED:
            (size,) = _LENGTH.unpack_from(data, offset)
            offset += 4
            attributes = msgpack.unpackb(data[offset : offset + size])
            offset += size
            if type(attributes) is not dict:
                raise _corrupt("the attributes of a record are no map")
    except (StructError, ValueError, TypeError, msgpack.UnpackException) as error:
        raise _corrupt(f"attributes or lease of a record: {error}") from error
    return Record(bytes(data[offset:]), *counts, lease, ordinal, attributes)


def _corrupt(cause: str) -> errors.Corrupt:
    return errors.Corrupt("state record", 0, cause, "run `aspen check`")
