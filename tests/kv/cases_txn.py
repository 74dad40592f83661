"""Cases of the conformance suite: compares, operations, merge edits, bounds, atomicity."""

import struct
from collections.abc import Sequence
from typing import Any

import pytest

from aspenfs import errors
from aspenfs.kv.types import (
    EQUAL,
    GREATER,
    LESS,
    MERGE,
    NOT_EQUAL,
    Compare,
    Operation,
    Record,
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
from aspenfs.limits import (
    ATTRIBUTE_BYTES_MAX,
    ATTRIBUTES_MAX,
    KEY_BYTES_MAX,
    STORE_KEY_BYTES_MAX,
    TXN_OPS_MAX,
    VALUE_BYTES_MAX,
)
from tests.kv.subject import Subject, Suite, case

I64 = struct.Struct("<q")


def _value(subject: Subject, key: bytes) -> bytes | None:
    record = subject.store.get(key)
    return None if record is None else record.value


async def _holds(subject: Subject, *compares: Compare) -> bool:
    return (await subject.store.txn(compares, [])).succeeded


class TxnCases(Suite):
    @case
    async def test_put_creates_a_record_with_its_counters(self, subject: Subject) -> None:
        store = subject.store
        first = await store.txn([], [put(b"k/a", b"1"), put(b"k/b", b"2", 0, {"mode": 7})])
        assert first.succeeded
        assert first.responses == [None, None]
        at = first.revision
        assert at == store.revision
        assert store.get(b"k/a") == Record(b"1", at, at, 1, 0, 0, {})
        assert store.get(b"k/b") == Record(b"2", at, at, 1, 0, 1, {"mode": 7})
        second = await store.txn([], [put(b"k/b", b"3")])
        assert second.revision > at
        assert store.get(b"k/b") == Record(b"3", at, second.revision, 2, 0, 1, {"mode": 7})

    @case
    async def test_put_with_attributes_replaces_them_all(self, subject: Subject) -> None:
        await subject.store.txn([], [put(b"k/a", b"", 0, {"b": 1, "a": b"x"})])
        await subject.store.txn([], [put(b"k/a", b"", 0, {"c": "text"})])
        record = subject.store.get(b"k/a")
        assert record is not None
        assert record.attributes == {"c": "text"}

    @case
    async def test_delete_counts_what_was_there_and_ends_the_life_of_a_key(self, subject: Subject) -> None:
        store = subject.store
        await store.txn([], [put(b"k/a", b"1")])
        await store.txn([], [put(b"k/a", b"2")])
        gone = await store.txn([], [delete(b"k/a"), delete(b"k/none")])
        assert gone.responses == [1, 0]
        assert store.get(b"k/a") is None
        again = await store.txn([], [put(b"k/a", b"3")])
        assert store.get(b"k/a") == Record(b"3", again.revision, again.revision, 1, 0, 0, {})

    @case
    async def test_delete_range_takes_its_start_and_leaves_its_end(self, subject: Subject) -> None:
        store = subject.store
        await store.txn([], [put(key, b"x") for key in (b"k/a", b"k/b", b"k/ba", b"k/c")])
        assert (await store.txn([], [delete_range(b"k/b", b"k/c")])).responses == [2]
        assert [key for key, _ in store.range(b"k/", b"k0")] == [b"k/a", b"k/c"]
        assert (await store.txn([], [delete_range(b"k/b", b"")])).responses == [1]
        assert [key for key, _ in store.range(b"k/", b"k0")] == [b"k/a"]

    @case
    async def test_reads_inside_a_transaction_see_its_earlier_operations(self, subject: Subject) -> None:
        store = subject.store
        before = await store.txn([], [put(b"k/b", b"old"), put(b"k/d", b"d")])
        result = await store.txn(
            [],
            [
                get(b"k/b"),
                put(b"k/a", b"1"),
                put(b"k/b", b"new"),
                delete(b"k/d"),
                put(b"k/e", b"e"),
                get(b"k/b"),
                get(b"k/d"),
                range_(b"k/", b"k0"),
                range_(b"k/", b"k0", 2),
                delete_range(b"k/a", b"k/b"),
                range_(b"k/", b"k0"),
            ],
        )
        responses = result.responses
        assert responses[0] == Record(b"old", before.revision, before.revision, 1, 0, 0, {})
        assert responses[5].value == b"new"
        assert responses[6] is None
        assert [key for key, _ in responses[7]] == [b"k/a", b"k/b", b"k/e"]
        assert [key for key, _ in responses[8]] == [b"k/a", b"k/b"]
        assert responses[9] == 1
        assert [(key, record.value) for key, record in responses[10]] == [(b"k/b", b"new"), (b"k/e", b"e")]

    @case
    async def test_a_key_changed_twice_in_a_transaction_changes_once(self, subject: Subject) -> None:
        store = subject.store
        first = await store.txn([], [put(b"k/a", b"1"), put(b"k/a", b"2"), merge(b"k/a", append(b"3"))])
        assert store.get(b"k/a") == Record(b"23", first.revision, first.revision, 1, 0, 0, {})
        second = await store.txn([], [delete(b"k/a"), put(b"k/a", b"4")])
        assert store.get(b"k/a") == Record(b"4", second.revision, second.revision, 1, 0, 0, {})
        await store.txn([], [put(b"k/x", b"1"), delete(b"k/x")])
        assert store.get(b"k/x") is None

    @case
    async def test_else_runs_when_a_compare_fails_and_then_does_not(self, subject: Subject) -> None:
        store = subject.store
        result = await store.txn(
            [absent(b"k/a"), exists(b"k/a")], [put(b"k/then", b"")], [put(b"k/else", b"")]
        )
        assert not result.succeeded
        assert result.responses == [None]
        assert [key for key, _ in store.range(b"k/", b"k0")] == [b"k/else"]

    @case
    async def test_existence_compares(self, subject: Subject) -> None:
        await subject.store.txn([], [put(b"k/a", b"")])
        assert await _holds(subject, exists(b"k/a"), absent(b"k/b"))
        assert not await _holds(subject, absent(b"k/a"))
        assert not await _holds(subject, exists(b"k/b"))

    @case
    async def test_revision_and_version_compares_with_every_operator(self, subject: Subject) -> None:
        first = await subject.store.txn([], [put(b"k/a", b"")])
        second = await subject.store.txn([], [put(b"k/a", b"")])
        makers: Sequence[tuple[Any, int]] = (
            (compare_create_revision, first.revision),
            (compare_mod_revision, second.revision),
            (compare_version, 2),
        )
        for make, found in makers:
            for operator, held in ((EQUAL, {0}), (NOT_EQUAL, {-1, 1}), (LESS, {1}), (GREATER, {-1})):
                for distance in (-1, 0, 1):
                    expected = distance in held
                    assert await _holds(subject, make(b"k/a", operator, found + distance)) is expected
            assert await _holds(subject, make(b"k/none", EQUAL, 0)), "an absent key counts as 0"
            assert not await _holds(subject, make(b"k/none", GREATER, 0))

    @case
    async def test_value_compares_are_bytewise_and_false_for_an_absent_key(self, subject: Subject) -> None:
        await subject.store.txn([], [put(b"k/a", b"m")])
        for operator, held in (
            (EQUAL, {b"m"}),
            (NOT_EQUAL, {b"l", b"m\x00", b""}),
            (LESS, {b"m\x00"}),
            (GREATER, {b"l", b""}),
        ):
            for operand in (b"", b"l", b"m", b"m\x00"):
                assert await _holds(subject, compare_value(b"k/a", operator, operand)) is (operand in held)
            assert not await _holds(subject, compare_value(b"k/none", operator, b"m"))

    @case
    async def test_field_compares_read_a_signed_number_and_are_false_when_short(
        self, subject: Subject
    ) -> None:
        await subject.store.txn([], [put(b"f/a", b"xx" + I64.pack(-5))])
        for operator, held in ((EQUAL, {-5}), (NOT_EQUAL, {-6, 0}), (LESS, {0}), (GREATER, {-6})):
            for operand in (-6, -5, 0):
                assert await _holds(subject, compare_field(b"f/a", 2, operator, operand)) is (operand in held)
            assert not await _holds(subject, compare_field(b"f/a", 3, operator, -5))
            assert not await _holds(subject, compare_field(b"f/none", 0, operator, 0))

    @case
    async def test_range_empty_compare(self, subject: Subject) -> None:
        await subject.store.txn([], [put(b"k/b", b"")])
        assert await _holds(subject, range_empty(b"k/a", b"k/b"), range_empty(b"k/c", b"k0"))
        assert not await _holds(subject, range_empty(b"k/b", b"k/c"))
        assert not await _holds(subject, range_empty(b"k/a", b""))
        assert await _holds(subject, range_empty(b"k/z", b"k/a")), "an inverted range holds nothing"

    @case
    async def test_compares_are_made_before_any_operation(self, subject: Subject) -> None:
        result = await subject.store.txn([absent(b"k/a")], [put(b"k/a", b""), get(b"k/a")])
        assert result.succeeded
        assert result.responses[1] is not None

    @case
    async def test_patch_overwrites_extends_and_fills_holes_with_zeros(self, subject: Subject) -> None:
        store = subject.store
        for edit, expected in (
            (patch(0, b"hello"), b"hello"),
            (patch(1, b"EL"), b"hELlo"),
            (patch(5, b"!"), b"hELlo!"),
            (patch(4, b"123"), b"hELl123"),
            (patch(9, b"z"), b"hELl123\0\0z"),
            (patch(3, b""), b"hELl123\0\0z"),
            (patch(12, b""), b"hELl123\0\0z\0\0"),
        ):
            await store.txn([], [merge(b"f/a", edit)])
            assert _value(subject, b"f/a") == expected
            await store.txn([], [merge(b"f/b", edit, cut(100), cut(len(expected)))])
            assert _value(subject, b"f/b") == expected, "several edits in one go give the same"

    @case
    async def test_append_add_max_and_cut_edit_in_the_order_given(self, subject: Subject) -> None:
        store = subject.store
        await store.txn([], [merge(b"f/a", append(b"ab"), append(b"cd"))])
        assert _value(subject, b"f/a") == b"abcd"
        await store.txn([], [merge(b"f/a", append(b"e"))])
        await store.txn([], [merge(b"f/a", cut(2), append(b"X"), cut(5))])
        assert _value(subject, b"f/a") == b"abX\0\0"
        await store.txn([], [merge(b"f/n", add(8, 5), max_(0, -3), max_(16, 7))])
        assert _value(subject, b"f/n") == I64.pack(0) + I64.pack(5) + I64.pack(7)
        await store.txn([], [merge(b"f/n", add(8, -7), max_(16, 3), max_(8, -9), add(0, -1))])
        assert _value(subject, b"f/n") == I64.pack(-1) + I64.pack(-2) + I64.pack(7)
        await store.txn([], [merge(b"f/short", append(b"\x05"), add(0, 1))])
        assert _value(subject, b"f/short") == I64.pack(6), "a short number is extended with zeros"

    @case
    async def test_attribute_edits_merge_and_remove(self, subject: Subject) -> None:
        store = subject.store
        await store.txn([], [put(b"k/a", b"v", 0, {"x": 1, "y": b"2"})])
        await store.txn([], [merge(b"k/a", set_attributes({"y": b"", "z": "3", "a": 4}))])
        record = store.get(b"k/a")
        assert record is not None
        assert (record.value, record.version) == (b"v", 2)
        assert record.attributes == {"x": 1, "z": "3", "a": 4}
        assert list(record.attributes) == ["a", "x", "z"], "in order: equal records have equal bytes"

    @case
    async def test_an_update_sets_value_and_lease_and_lays_attributes_over_those_that_are_there(
        self, subject: Subject
    ) -> None:
        store = subject.store
        await store.lease_grant(60_000, 1)
        await store.txn([], [put(b"k/a", b"v", 1, {"x": 1, "y": b"2"})])
        await store.txn([], [update(b"k/a", b"w", 0, {"y": b"", "z": "3", "a": 4})])
        record = store.get(b"k/a")
        assert record is not None
        assert (record.value, record.version, record.lease) == (b"w", 2, 0)
        assert record.attributes == {"x": 1, "z": "3", "a": 4}
        assert list(record.attributes) == ["a", "x", "z"], "in order: equal records have equal bytes"
        made = await store.txn([], [update(b"k/b", b"n", 1, {"x": 1})])
        record = store.get(b"k/b")
        assert record is not None
        assert record[:5] == (b"n", made.revision, made.revision, 1, 1)
        await store.lease_revoke(1)
        assert store.get(b"k/a") is not None, "the update took it off its lease"
        assert store.get(b"k/b") is None
        with pytest.raises(errors.LeaseNotFound):
            await store.txn([], [update(b"k/b", b"n", 1, {})])

    @case
    async def test_a_number_that_leaves_64_bits_is_refused_and_nothing_happens(
        self, subject: Subject
    ) -> None:
        store = subject.store
        await store.txn([], [merge(b"f/n", add(0, (1 << 63) - 1))])
        with pytest.raises(errors.OutOfRange):
            await store.txn([], [put(b"f/m", b"x"), merge(b"f/n", add(0, 1))])
        assert store.get(b"f/m") is None
        assert _value(subject, b"f/n") == I64.pack((1 << 63) - 1)

    @case
    async def test_values_are_bounded_also_when_they_grow_by_edits(self, subject: Subject) -> None:
        store = subject.store
        await store.txn([], [put(b"k/a", bytes(VALUE_BYTES_MAX))])
        for operations in (
            [put(b"k/b", bytes(VALUE_BYTES_MAX + 1))],
            [merge(b"k/a", append(b"x"))],
            [merge(b"k/a", add(0, 1), append(b"x"))],
            [merge(b"k/c", patch(VALUE_BYTES_MAX, b"x"))],
            [merge(b"k/c", cut(VALUE_BYTES_MAX + 1))],
            [merge(b"k/c", add(VALUE_BYTES_MAX - 7, 1))],
        ):
            with pytest.raises(errors.TooLarge):
                await store.txn([], [put(b"k/other", b""), *operations])
            assert store.get(b"k/other") is None
        await store.txn([], [merge(b"k/a", cut(0))])

    @case
    async def test_transactions_are_bounded_in_operations_and_bytes(self, subject: Subject) -> None:
        store = subject.store
        puts = [put(b"k/%d" % number, b"") for number in range(TXN_OPS_MAX + 1)]
        await store.txn([], puts[:-1])
        before = store.revision
        with pytest.raises(errors.TxnTooLarge):
            await store.txn([], puts)
        with pytest.raises(errors.TxnTooLarge):
            await store.txn([], [], puts)
        with pytest.raises(errors.TxnTooLarge):
            await store.txn([absent(b"k/x")] * (TXN_OPS_MAX + 1), [])
        with pytest.raises(errors.TxnTooLarge):
            await store.txn(
                [], [put(b"k/x", bytes(VALUE_BYTES_MAX)), put(b"k/y", bytes(VALUE_BYTES_MAX // 2))]
            )
        assert store.revision == before

    @case
    async def test_key_bounds(self, subject: Subject) -> None:
        store = subject.store
        longest = b"k/" + b"\x00" * KEY_BYTES_MAX
        await store.txn([], [put(longest, b"1"), put(b"f/" + b"x" * (STORE_KEY_BYTES_MAX - 2), b"2")])
        await store.txn([], [put(longest, b"2")])
        assert _value(subject, longest) == b"2"
        for key in (longest + b"x", b"f/" + b"x" * (STORE_KEY_BYTES_MAX - 1)):
            with pytest.raises(errors.NameTooLong):
                await store.txn([], [put(key, b"")])
        await store.lease_grant(60_000, 1)
        await store.txn([], [put(b"f/" + b"x" * (STORE_KEY_BYTES_MAX - 12), b"", 1)])
        with pytest.raises(errors.NameTooLong):
            await store.txn([], [put(b"f/" + b"x" * (STORE_KEY_BYTES_MAX - 11), b"", 1)])
        for key in (b"", b"k/", b"c/", b"t/", b"\x00", b"\x00l\x00\x00\x00\x00\x00\x00\x00\x01"):
            operations: tuple[Operation, ...] = (
                put(key, b""),
                merge(key, append(b"")),
                delete(key),
                get(key),
            )
            for operation in operations:
                with pytest.raises(errors.InvalidArgument):
                    await store.txn([], [operation])
            with pytest.raises(errors.InvalidArgument):
                await store.txn([absent(key)], [])

    @case
    async def test_attributes_are_bounded_also_when_they_are_merged(self, subject: Subject) -> None:
        store = subject.store
        most = {f"{number:03}": number for number in range(ATTRIBUTES_MAX)}
        await store.txn([], [put(b"k/a", b"", 0, {**most, "000": bytes(ATTRIBUTE_BYTES_MAX)})])
        await store.txn([], [merge(b"k/a", set_attributes({"000": b"", "more": 1}))])
        for operation in (
            merge(b"k/a", set_attributes({"other": 1})),
            put(b"k/a", b"", 0, {**most, "more": 1}),
            update(b"k/a", b"", 0, {"other": 1}),
            put(b"k/a", b"", 0, {"x": bytes(ATTRIBUTE_BYTES_MAX + 1)}),
        ):
            with pytest.raises(errors.TooLarge):
                await store.txn([], [operation])

    @case
    async def test_wrong_types_are_refused_before_anything_is_ordered(self, subject: Subject) -> None:
        store = subject.store
        before = store.revision
        odd: Any = ("x", bytearray(b"x"), memoryview(b"x"), None, 1.5)
        number: Any = True
        operations: list[Operation] = [
            *(put(b"k/a", value) for value in odd),
            *(put(key, b"x") for key in odd),
            *(put(b"k/a", b"", 0, {"f": value}) for value in odd if value != "x"),
            put(b"k/a", b"", number),
            put(b"k/a", b"", -1),
            merge(b"k/a", add(0, 1 << 63)),
            merge(b"k/a", add(0, number)),
            merge(b"k/a", patch(-1, b"")),
            merge(b"k/a", (99, 0)),
            (MERGE, b"k/a", [append(b"")]),
            put(b"k/a", b"", 0, {"": 1}),
            put(b"k/a", b"", 0, {"x" * 256: 1}),
            (99, b"k/a"),
        ]
        for wrong in operations:
            with pytest.raises(errors.InvalidArgument):
                await store.txn([], [wrong])
        assert store.revision == before

    @case
    async def test_internal_keys_are_in_no_range(self, subject: Subject) -> None:
        store = subject.store
        await store.txn([], [put(b"k/a", b"1")], dedup=(b"c" * 16, 1))
        await store.txn([], [put(b"k/a", b"2", await store.lease_grant(60_000))])
        everything = [key for key, _ in store.range(b"", b"") if not key.startswith(b"c/")]
        assert everything == [b"k/a"]
        assert [key for key, _ in store.scan(b"", b"") if not key.startswith(b"c/")] == [b"k/a"]
        assert store.get(b"\x00t") is None
        result = await store.txn([range_empty(b"", b"\x01")], [range_(b"", b"c"), delete_range(b"", b"k0")])
        assert result.succeeded
        assert result.responses[0] == []
        assert store.leases(), "a range from b'' does not delete leases"
