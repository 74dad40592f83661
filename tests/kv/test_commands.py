"""Commands as bytes: round trips, the bytes of format 1, and what is refused."""

from typing import Any

import msgpack
import pytest

from aspenfs import errors
from aspenfs.kv import commands
from aspenfs.kv.commands import Command, decode, encode
from aspenfs.kv.types import (
    absent,
    add,
    append,
    compare_field,
    compare_value,
    cut,
    delete,
    delete_range,
    exists,
    get,
    max_,
    merge,
    patch,
    put,
    range_,
    range_empty,
    set_attributes,
    update,
)
from aspenfs.limits import LEASE_TTL_MS_MAX, TXN_BYTES_MAX, VALUE_BYTES_MAX

CLIENT = b"0123456789abcdef"
TXN_BODY = (
    (absent(b"f/a"), exists(b"k/b"), compare_value(b"k/b", 1, b"x"), compare_field(b"f/a", 8, 4, -1)),
    (
        put(b"k/a", b"value", 9, {"mode": 1, "text": "t", "raw": b"r"}),
        merge(b"f/a", patch(1, b"p"), append(b"a"), add(0, -1), max_(8, 2), cut(3)),
        merge(b"f/a", set_attributes({"x": b""})),
        update(b"k/a", b"value", 9, {"mode": b"", "text": "t"}),
        delete(b"k/c"),
        delete_range(b"k/d", b""),
    ),
    (get(b"k/a"), range_(b"k/", b"k0", 5)),
)
ALL = [
    Command(commands.TXN, 1_700_000_000_000_000_000, (CLIENT, 7), TXN_BODY),
    Command(commands.TXN, 0, None, ((range_empty(b"", b""),), (), ())),
    Command(commands.LEASE_GRANT, 1, None, (77, 5_000)),
    Command(commands.LEASE_KEEPALIVE, 1, None, (77,)),
    Command(commands.LEASE_REVOKE, 1, None, (77,)),
    Command(commands.LEASE_EXPIRE, 1, None, (77, 78)),
    Command(commands.COMPACT, 1, None, (1_000,)),
    Command(commands.NOOP, 1, None, ()),
    Command(commands.CHECKPOINT, 1, None, ()),
]


@pytest.mark.parametrize("command", ALL, ids=str)
def test_what_is_encoded_decodes_to_the_same(command: Command) -> None:
    assert decode(encode(command)) == command
    assert decode(memoryview(encode(command))) == command


def test_the_bytes_of_format_1() -> None:
    """Entries written by any earlier version must stay readable: these bytes never change."""
    command = Command(
        commands.TXN, 1_700_000_000_000_000_000, None,
        ([absent(b"f/d")], [put(b"f/d", b"1"), merge(b"f/i", add(8, 1))], ()),
    )  # fmt: skip
    assert encode(command).hex() == (
        "9501" "01" "cf17979cfe362a0000" "c0" "93"
        "91" "94" "01" "01" "c403662f64" "c2"
        "92" "95" "01" "c403662f64" "c40131" "00" "c0"
        "93" "04" "c403662f69" "91" "93" "03" "08" "01"
        "90"
    )  # fmt: skip


def _packed(*fields: Any) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x01",
        b"\x95\x01",
        _packed(1, commands.NOOP, 1, None),
        _packed(0, commands.NOOP, 1, None, ()),
        _packed(1, 0, 1, None, ()),
        _packed(1, commands.NOOP, 1, None, (1,)),
        _packed(1, commands.NOOP, -1, None, ()),
        _packed(1, commands.NOOP, 1 << 63, None, ()),
        _packed(1, commands.NOOP, 1, None, {}),
        _packed(1, commands.CHECKPOINT, 1, None, (1,)),
        _packed(1, commands.NOOP, 1, None, ()) + b"\x00",
        _packed(1, commands.TXN, 1, None, ((), ())),
        _packed(1, commands.TXN, 1, None, (7, (), ())),
        _packed(1, commands.TXN, 1, None, ({}, {}, {1: 2})),
        _packed(1, commands.TXN, 1, None, ((), (7,), ())),
        _packed(1, commands.TXN, 1, None, ((), ((),), ())),
        _packed(1, commands.TXN, 1, None, (((1, 2, b"k/a", True),), (), ())),
        _packed(1, commands.TXN, 1, None, (((2, 9, b"k/a", 1),), (), ())),
        _packed(1, commands.TXN, 1, None, (((7, 1, b"k/a", 1),), (), ())),
        _packed(1, commands.TXN, 1, None, (((6, 2, b"k/a", b""),), (), ())),
        _packed(1, commands.TXN, 1, None, ((), ((1, b"\x00l", b"", 0, None),), ())),
        _packed(1, commands.TXN, 1, None, ((), ((1, b"k/a", b"", 0, ()),), ())),
        _packed(1, commands.TXN, 1, None, ((), ((4, b"k/a", 5),), ())),
        _packed(1, commands.TXN, 1, None, ((), ((7, b"k/a", b"", 0, None),), ())),
        _packed(1, commands.TXN, 1, None, ((), ((7, b"k/a", "", 0, {}),), ())),
        _packed(1, commands.TXN, 1, None, ((), ((7, b"k/a", b"", -1, {}),), ())),
        _packed(1, commands.TXN, 1, None, ((), ((0, b"k/a", b"", 0, {}),), ())),
        _packed(1, commands.TXN, 1, None, ((), ((4, b"k/a", ((3, 1 << 62, 1),)),), ())),
        _packed(1, commands.TXN, 1, (b"short", 1), ((), (), ())),
        _packed(1, commands.TXN, 1, (CLIENT,), ((), (), ())),
        _packed(1, commands.TXN, 1, 5, ((), (), ())),
        _packed(1, commands.LEASE_GRANT, 1, None, (1, LEASE_TTL_MS_MAX + 1)),
        _packed(1, commands.LEASE_GRANT, 1, None, (0, 1)),
        _packed(1, commands.LEASE_GRANT, 1, None, (1,)),
        _packed(1, commands.LEASE_EXPIRE, 1, None, (b"x",)),
        _packed(1, commands.COMPACT, 1, None, (-1,)),
        _packed(1, commands.TXN, 1, None, ((), tuple((2, b"k/a") for _ in range(129)), ())),
        b"\x91" * 5_000 + b"\xc0",
        b"\xdd\xff\xff\xff\xff",
        b"\xc7\x01\x05x",
    ],
)
def test_hostile_bytes_are_an_invalid_argument(data: bytes) -> None:
    with pytest.raises(errors.InvalidArgument):
        decode(data)


@pytest.mark.parametrize(
    "data",
    [
        _packed(commands.FORMAT + 1, {"any": "thing"}),
        _packed(1, commands.CHECKPOINT + 1, 1, None, ()),
        _packed(1, 99, 1, None, (b"x",)),
        _packed(1, commands.TXN, 1, None, ((), ((8, b"k/a", b"", 0, {}),), ())),
        _packed(1, commands.TXN, 1, None, ((), (), ((8,),))),
        _packed(1, commands.TXN, 1, None, ((), ((4, b"k/a", ((7, 1),)),), ())),
        _packed(1, commands.TXN, 1, None, (((8, 1, b"k/a", 1),), (), ())),
    ],
)
def test_what_a_newer_release_wrote_is_told_from_what_is_malformed(data: bytes) -> None:
    with pytest.raises(errors.NotSupported, match="newer release"):
        decode(data)


def test_what_has_no_encoding_is_an_invalid_argument() -> None:
    for value in (1 << 64, object(), "\ud800"):
        with pytest.raises(errors.InvalidArgument):
            encode(Command(commands.TXN, 1, None, ((), ((1, b"k/a", value, 0, None),), ())))


def test_a_transaction_of_the_largest_value_fits_and_one_byte_more_than_the_bound_does_not() -> None:
    largest = [put(b"k/" + b"x" * 1024, bytes(VALUE_BYTES_MAX))]
    encoded = encode(Command(commands.TXN, 1, None, ((), largest, ())))
    commands.check_size((), largest, (), len(encoded))
    commands.check_size((), [], (), TXN_BYTES_MAX)
    with pytest.raises(errors.TxnTooLarge):
        commands.check_size((), [], (), TXN_BYTES_MAX + 1)
