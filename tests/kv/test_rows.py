"""Rows as bytes: what was packed comes back, and nothing else passes for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aspenfs.errors import Corrupt
from aspenfs.kv import records, rows
from aspenfs.kv.types import NO_ATTRIBUTES, Record
from aspenfs.limits import STORE_KEY_BYTES_MAX


def record(value: bytes) -> bytes:
    return records.pack(Record(value, 1, 1, 1, 0, 0, NO_ATTRIBUTES))


keys_and_values = st.lists(st.tuples(st.binary(min_size=1, max_size=20), st.binary(max_size=40)), max_size=8)


@given(keys_and_values)
def test_rows_come_back_as_they_were(given_rows: list[tuple[bytes, bytes]]) -> None:
    wanted = [(key, record(value)) for key, value in given_rows]
    block = b"".join(rows.pack(*row) for row in wanted)
    assert list(rows.unpack(block)) == wanted
    assert len(block) == sum(len(key) + len(raw) + rows.FRAMING_BYTES for key, raw in wanted)


@given(keys_and_values.filter(bool), st.data())
def test_half_a_row_is_corrupt(given_rows: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
    packed = [rows.pack(key, record(value)) for key, value in given_rows]
    block = b"".join(packed)
    size = len(block) - data.draw(st.integers(1, len(packed[-1]) - 1))
    with pytest.raises(Corrupt, match="half a row"):
        list(rows.unpack(block[:size]))


@pytest.mark.parametrize(
    ("key", "raw", "cause"),
    [
        (b"", record(b"v"), "a key of 0 bytes"),
        (b"x" * (STORE_KEY_BYTES_MAX + 1), record(b"v"), "bytes"),
        (b"key", b"no record", "key 6b6579"),
        (b"key", b"", "key 6b6579"),
    ],
)
def test_what_is_no_row_is_corrupt_and_says_where(key: bytes, raw: bytes, cause: str) -> None:
    before = rows.pack(b"a", record(b"1"))
    with pytest.raises(Corrupt, match=cause) as caught:
        list(rows.unpack(before + rows.pack(key, raw)))
    assert caught.value.offset == len(before)
