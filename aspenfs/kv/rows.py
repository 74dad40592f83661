"""Rows <-> bytes: what a state is made of when it travels, and the digest that names the whole of it.

A row is a key and its packed record (`records.py`). Rows stand one behind the other in key order:

    u32 key length, key, u32 record length, record        both little-endian

The digest of a state is BLAKE3 over all its rows. It does not depend on where they were cut into blocks,
so what snapshots, backups and the state hash compare is one and the same number.
"""

from collections.abc import Iterator
from struct import Struct
from struct import error as StructError

from aspenfs.errors import Corrupt
from aspenfs.kv import records
from aspenfs.limits import STORE_KEY_BYTES_MAX

Row = tuple[bytes, bytes]  # key, packed record

FRAMING_BYTES = 8  # of a row, beside key and record
_LENGTH = Struct("<I")
_pack, _unpack = _LENGTH.pack, _LENGTH.unpack_from


def pack(key: bytes, record: bytes) -> bytes:
    return _pack(len(key)) + key + _pack(len(record)) + record


def unpack(block: bytes) -> Iterator[Row]:
    """The rows of `block`, each with a record that decodes; Corrupt names the offset of what is not one."""
    at, size = 0, len(block)
    while at < size:
        start = at
        try:
            (length,) = _unpack(block, at)
            key_end = at + 4 + length
            key = block[at + 4 : key_end]
            (length,) = _unpack(block, key_end)
        except StructError as error:
            raise _corrupt(start, "half a row") from error
        at = key_end + 4 + length
        record = block[key_end + 4 : at]
        if at > size or not 0 < len(key) <= STORE_KEY_BYTES_MAX:
            raise _corrupt(start, "half a row" if at > size else f"a key of {len(key)} bytes")
        try:
            records.unpack(record)
        except Corrupt as error:
            raise _corrupt(start, f"key {key[:80].hex()}: {error}") from error
        yield key, record


def _corrupt(offset: int, cause: str) -> Corrupt:
    return Corrupt("rows of a state", offset, cause, "fetch them again, from another node or backup")
