"""Random transactions and commands for the properties of the store."""

from hypothesis import strategies as st

from aspenfs.kv import commands
from aspenfs.kv.commands import Command
from aspenfs.kv.types import (
    absent,
    add,
    append,
    compare_create_revision,
    compare_field,
    compare_mod_revision,
    compare_value,
    compare_version,
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

# Few keys, so that they meet; with the bytes that escaping must get right.
KEYS = [
    space + name
    for space in (b"k/", b"f/")
    for name in (b"a", b"a\x00", b"a\x00\xff", b"a\xff", b"b", b"\x00")
]
keys = st.sampled_from(KEYS)
bounds = st.one_of(keys, st.sampled_from([b"", b"\x00", b"f/", b"k/", b"k/a\x00\x00", b"k0", b"\xff"]))
values = st.binary(max_size=24)
operators = st.integers(1, 4)
small = st.integers(0, 12)
numbers = st.one_of(small, st.integers(-(1 << 63), (1 << 63) - 1))
attributes = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.one_of(numbers, st.sampled_from([b"", b"x", "", "t"])), max_size=3
)
leases = st.sampled_from([0, 0, 0, 1, 2, 3])

compares = st.one_of(
    st.builds(exists, keys),
    st.builds(absent, keys),
    st.builds(range_empty, bounds, bounds),
    st.builds(compare_create_revision, keys, operators, small),
    st.builds(compare_mod_revision, keys, operators, small),
    st.builds(compare_version, keys, operators, small),
    st.builds(compare_value, keys, operators, values),
    st.builds(compare_field, keys, small, operators, numbers),
)
edits = st.one_of(
    st.builds(patch, small, values),
    st.builds(append, values),
    st.builds(add, small, numbers),
    st.builds(max_, small, numbers),
    st.builds(cut, small),
    st.builds(set_attributes, attributes),
)
operations = st.one_of(
    st.builds(put, keys, values, leases, st.one_of(st.none(), attributes)),
    st.builds(update, keys, values, leases, attributes),
    st.builds(lambda key, some: merge(key, *some), keys, st.lists(edits, max_size=4)),
    st.builds(delete, keys),
    st.builds(delete_range, bounds, bounds),
    st.builds(get, keys),
    st.builds(range_, bounds, bounds, st.integers(0, 3)),
)
transactions = st.tuples(
    st.lists(compares, max_size=2), st.lists(operations, max_size=5), st.lists(operations, max_size=3)
)

_times = st.integers(0, 50).map(lambda seconds: seconds * 1_000_000_000)
_ids = st.integers(1, 3)
_clients = st.tuples(st.sampled_from([b"c" * 16, b"o" * 16]), st.integers(1, 6))
log_commands = st.one_of(
    *[st.builds(Command, st.just(commands.TXN), _times, st.one_of(st.none(), _clients), transactions)] * 4,
    st.builds(
        Command, st.just(commands.LEASE_GRANT), _times, st.none(), st.tuples(_ids, st.integers(1, 20_000))
    ),
    st.builds(Command, st.just(commands.LEASE_KEEPALIVE), _times, st.none(), st.tuples(_ids)),
    st.builds(Command, st.just(commands.LEASE_REVOKE), _times, st.none(), st.tuples(_ids)),
    st.builds(Command, st.just(commands.LEASE_EXPIRE), _times, st.none(), st.lists(_ids).map(tuple)),
    st.builds(Command, st.just(commands.COMPACT), _times, st.none(), st.tuples(st.integers(0, 30))),
    st.builds(Command, st.sampled_from((commands.NOOP, commands.CHECKPOINT)), _times, st.none(), st.just(())),
)
