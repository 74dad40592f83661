"""The bytes on disk: each field where docs/design/blobs.md says, and nothing believed unchecked."""

import pytest

from aspenfs.blobs.format import (
    CHUNK,
    TOMBSTONE,
    Table,
    Tombstone,
    decode_record_header,
    decode_segment_header,
    decode_tombstone,
    digest_of,
    encode_record_header,
    encode_segment_header,
    encode_tombstone,
    location_of,
    prefix_of,
    record_size,
)

DIGEST = digest_of(b"a chunk")
PLACE = location_of(7, 4096)


def test_every_record_starts_at_a_multiple_of_eight() -> None:
    for length in range(1, 100):
        assert record_size(length) % 8 == 0
        assert 0 <= record_size(length) - 56 - length < 8


def test_a_segment_header_is_read_back_and_any_flipped_bit_is_seen() -> None:
    data = encode_segment_header(0xABCDEF)
    assert decode_segment_header(data) == (1, 0xABCDEF)
    for bit in range(8 * len(data)):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        assert decode_segment_header(bytes(bad)) is None
    assert decode_segment_header(data[:-1]) is None


def test_a_record_header_is_read_back_and_any_flipped_bit_is_seen() -> None:
    data = encode_record_header(PLACE, CHUNK, 1234, 4000, 0, DIGEST)
    assert decode_record_header(data, PLACE) == (CHUNK, 1234, 4000, 0, DIGEST)
    for bit in range(8 * len(data)):
        if bit // 8 in (9, 10, 11):
            continue  # padding, see below
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        assert decode_record_header(bytes(bad), PLACE) is None
    assert decode_record_header(data[:-1], PLACE) is None
    assert decode_record_header(bytes(len(data)), PLACE) is None


def test_padding_of_a_record_header_is_checked_too() -> None:
    data = bytearray(encode_record_header(PLACE, CHUNK, 1234, 4000, 0, DIGEST))
    data[9] ^= 1
    assert decode_record_header(bytes(data), PLACE) is None


@pytest.mark.parametrize("other", [location_of(8, 4096), location_of(7, 4104), 4096])
def test_a_record_header_holds_at_its_own_place_only(other: int) -> None:
    data = encode_record_header(PLACE, CHUNK, 1234, 4000, 0, DIGEST)
    assert decode_record_header(data, other) is None


def test_a_record_header_does_not_claim_what_can_not_be() -> None:
    assert decode_record_header(encode_record_header(PLACE, 3, 1, 0, 0, DIGEST), PLACE) is None
    assert decode_record_header(encode_record_header(PLACE, CHUNK, 1, 4097, 0, DIGEST), PLACE) is None


def test_a_tombstone_is_read_back_and_any_flipped_bit_is_seen() -> None:
    from crc32c import crc32c

    payload = encode_tombstone(PLACE, 77)
    header = decode_record_header(
        encode_record_header(PLACE, TOMBSTONE, 16, 0, crc32c(payload), DIGEST), PLACE
    )
    assert header is not None
    assert decode_tombstone(payload, 64, header) == (64, PLACE, 77)
    for bit in range(8 * len(payload)):
        bad = bytearray(payload)
        bad[bit // 8] ^= 1 << bit % 8
        assert decode_tombstone(bytes(bad), 64, header) is None


def table() -> Table:
    made = Table()
    for number in range(5):
        made.add_chunk(prefix_of(digest_of(bytes([number]))), 32 + 64 * number, number + 1)
    made.add_tombstone(Tombstone(400, PLACE, 9))
    made.damaged = [(480, 56), (600, 8)]
    made.end = 700
    return made


def test_a_table_is_read_back() -> None:
    again = Table.decode(table().encode(9), 9)
    assert again is not None
    assert list(again.chunks()) == list(table().chunks())
    assert list(again.tombstones()) == [Tombstone(400, PLACE, 9)]
    assert again.damaged == [(480, 56), (600, 8)]
    assert again.end == 700
    assert again.counts() == (5, 1)


def test_a_table_of_another_segment_or_with_a_flipped_bit_is_none() -> None:
    data = table().encode(9)
    assert Table.decode(data, 10) is None
    for bit in range(8 * len(data)):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << bit % 8
        assert Table.decode(bytes(bad), 9) is None
    for size in range(len(data)):
        assert Table.decode(data[:size], 9) is None
