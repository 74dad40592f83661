"""Records as bytes."""

import pytest

from aspenfs import errors
from aspenfs.kv import records
from aspenfs.kv.types import NO_ATTRIBUTES, Record

PLAIN = Record(b"value", 3, 9, 2, 0, 1, NO_ATTRIBUTES)
FULL = Record(b"value", 3, 9, 2, 77, 65535, {"b": b"\xff", "a": -1, "c": "text"})


@pytest.mark.parametrize(
    "record",
    [PLAIN, FULL, Record(b"", 0, 0, 0, 0, 0, {}), FULL._replace(lease=0), FULL._replace(attributes={}),
     Record(b"x", 2**63, 2**64 - 1, 2**64 - 1, 2**63 - 1, 0, {})],
)  # fmt: skip
def test_what_is_packed_unpacks_to_the_same(record: Record) -> None:
    assert records.unpack(records.pack(record)) == record
    view = memoryview(bytearray(records.pack(record)))
    unpacked = records.unpack(view)
    assert unpacked == record
    view[:] = bytes(len(view))
    assert unpacked == record, "nothing of the buffer is kept"


def test_the_bytes_of_format_1() -> None:
    """State written by any earlier version must stay readable: these bytes never change."""
    head = "0100 0100 0300000000000000 0900000000000000 0200000000000000"
    assert records.pack(PLAIN) == bytes.fromhex(head) + b"value"
    head = "0103 ffff 0300000000000000 0900000000000000 0200000000000000 4d00000000000000 10000000"
    attributes = bytes.fromhex("83 a161 ff a162 c401ff a163 a474657874")
    assert records.pack(FULL) == bytes.fromhex(head) + attributes + b"value"


def test_equal_records_have_equal_bytes_whatever_the_order_of_their_attributes() -> None:
    turned = FULL._replace(attributes=dict(reversed(list(FULL.attributes.items()))))
    assert records.pack(turned) == records.pack(FULL)


@pytest.mark.parametrize(
    "data",
    [b"", records.pack(PLAIN)[:27], b"\x02" + records.pack(PLAIN)[1:], b"\x01\x04" + records.pack(PLAIN)[2:],
     records.pack(FULL)[:36], records.pack(FULL)[:45], records.pack(FULL)[:40] + b"\xc1" * 30],
)  # fmt: skip
def test_anything_else_is_corrupt(data: bytes) -> None:
    with pytest.raises(errors.Corrupt):
        records.unpack(data)
