"""Messages as bytes: they come back as they were, and nothing else is taken for one."""

from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aspenfs import errors
from aspenfs.cluster.messages import NUMBER_MAX, Message, MessageType, from_wire
from aspenfs.cluster.types import Configuration, Entry, Snapshot
from aspenfs.limits import RAFT_CONTEXT_BYTES_MAX, WAL_FRAME_BYTES_MAX

APPEND = Message(
    MessageType.APP,
    2,
    1,
    7,
    log_term=5,
    index=10,
    commit=9,
    entries=[Entry(5, 11, 1, b"a"), Entry(7, 12, 3, b"")],
)
SNAP = Message(
    MessageType.SNAP, 2, 1, 7, snapshot=Snapshot(9, 5, Configuration((1, 2), (1,), (3,), (), True))
)


def over_the_wire(message: Message) -> Message:
    return from_wire(msgpack.unpackb(msgpack.packb(message)))


@pytest.mark.parametrize(
    "message",
    [
        APPEND,
        SNAP,
        Message(MessageType.APP_RESP, 1, 2, 7, 5, 12, reject=True, reject_hint=10),
        Message(MessageType.VOTE, 1, 2, 7, 5, 12, context=b"transfer"),
        Message(
            MessageType.HEARTBEAT, NUMBER_MAX, NUMBER_MAX, NUMBER_MAX, commit=NUMBER_MAX, context=bytes(8)
        ),
        Message(
            MessageType.PROP,
            1,
            2,
            7,
            entries=[Entry(0, 5 << 40 | 1, 3, b"x"), Entry(0, 9 << 40 | 1, 3, b"y")],
        ),
    ],
)
def test_a_message_survives_its_bytes(message: Message) -> None:
    again = over_the_wire(message)
    assert again._replace(entries=list(again.entries)) == message._replace(entries=list(message.entries))
    assert type(again.type) is MessageType
    assert all(type(entry) is Entry for entry in again.entries)
    assert from_wire(msgpack.unpackb(msgpack.packb(message), use_list=False)) == again


def fields_of(message: Message) -> list[Any]:
    """As msgpack gives them."""
    return [int(message.type), *message[1:]]


def with_field(message: Message, **fields: Any) -> list[Any]:
    return fields_of(message._replace(**fields))


def test_what_the_cases_below_start_from_is_right() -> None:
    for message in (APPEND, SNAP):
        assert from_wire(fields_of(message)) == message
    assert type(from_wire(fields_of(APPEND)).entries[0]) is Entry


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        [],
        fields_of(APPEND)[:-1],
        [*fields_of(APPEND), 0],
        with_field(APPEND, type=0),
        with_field(APPEND, type=16),
        with_field(APPEND, to=0),
        with_field(APPEND, sender=0),
        with_field(APPEND, term=0),
        with_field(APPEND, term=True),
        with_field(APPEND, term=7.0),
        with_field(APPEND, term=1 << 63),
        with_field(APPEND, commit=-1),
        with_field(APPEND, reject=0),
        with_field(APPEND, reject_hint=None),
        with_field(APPEND, context="text"),
        with_field(APPEND, context=bytes(RAFT_CONTEXT_BYTES_MAX + 1)),
        with_field(APPEND, entries=b"entries"),
        with_field(APPEND, entries={}),
        with_field(APPEND, entries=[Entry(5, 12, 1, b"")]),  # a gap
        with_field(APPEND, entries=[Entry(5, 11, 1, b""), Entry(5, 11, 1, b"")]),
        with_field(APPEND, entries=[Entry(4, 11, 1, b"")]),  # a term that falls
        with_field(APPEND, entries=[Entry(8, 11, 1, b"")]),  # a term to come
        with_field(APPEND, index=0, log_term=0, entries=[Entry(0, 1, 1, b"")]),
        with_field(APPEND, entries=[(5, 11.0, 1, b"")]),
        with_field(APPEND, entries=[(5, 11, 1)]),
        with_field(APPEND, entries=[(5, 11, 0, b"")]),
        with_field(APPEND, entries=[(5, 11, 16, b"")]),  # a frame of the WAL that is no entry
        with_field(APPEND, entries=[(5, 11, 1, "text")]),
        with_field(APPEND, entries=[(5, 11, 1, bytes(WAL_FRAME_BYTES_MAX + 1))]),
        with_field(APPEND, entries=[None]),
        with_field(APPEND, index=NUMBER_MAX, entries=[(7, NUMBER_MAX + 1, 1, b"")]),
        with_field(APPEND, snapshot=SNAP.snapshot),
        with_field(APPEND, type=MessageType.VOTE),  # no entries there
        with_field(SNAP, snapshot=None),
        with_field(SNAP, snapshot=(9, 5)),
        with_field(SNAP, snapshot=(0, 5, ((1,), (), (), (), False))),
        with_field(SNAP, snapshot=(9, 5, ((1, 1), (), (), (), False))),
        with_field(Message(MessageType.PROP, 1, 2, 7), entries=[(0, 0, 3, b"")]),
        with_field(Message(MessageType.PROP, 1, 2, 7), entries=[(0, 1 << 63, 3, b"")]),
    ],
)
def test_what_is_no_message_is_refused(value: object) -> None:
    with pytest.raises(errors.InvalidArgument):
        from_wire(value)


def test_too_many_entries_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import aspenfs.cluster.messages as module

    monkeypatch.setattr(module, "RAFT_APPEND_ENTRIES_MAX", 1)
    with pytest.raises(errors.InvalidArgument):
        from_wire(fields_of(APPEND))


scalars = (
    st.none() | st.booleans() | st.integers(-5, 20) | st.integers() | st.floats() | st.binary() | st.text()
)
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=5), max_leaves=10)


@given(st.sampled_from([APPEND, SNAP]), st.dictionaries(st.integers(0, 11), anything, max_size=3), st.data())
def test_a_damaged_message_is_a_message_or_refused(
    message: Message, damage: dict[int, Any], data: st.DataObject
) -> None:
    fields = fields_of(message)
    fields[7] = [list(entry) for entry in message.entries]
    for at, value in damage.items():
        fields[at] = value
    if (
        fields[7]
        and isinstance(fields[7], list)
        and isinstance(fields[7][0], list)
        and data.draw(st.booleans())
    ):
        fields[7][0][data.draw(st.integers(0, 3)) % max(len(fields[7][0]), 1) :] = [data.draw(anything)]
    try:
        again = from_wire(fields)
    except errors.InvalidArgument:
        return
    assert from_wire(fields_of(again)) == again
    assert over_the_wire(again) == again


@given(anything)
def test_any_value_is_a_message_or_refused(value: object) -> None:
    with pytest.raises(errors.InvalidArgument):
        from_wire(value)
