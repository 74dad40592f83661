"""Frames: read back as they were written; anything else is a ProtocolError and nothing but that."""

import contextlib
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aspenfs import errors
from aspenfs.cluster.messages import from_wire
from aspenfs.limits import PEER_FRAME_BYTES_MAX, PEER_ITEMS_MAX, PEER_REQUEST_BYTES_MAX
from aspenfs.runtime.peers import frames
from aspenfs.runtime.peers.frames import Admitted, Hello, Join, LinkKind, Parts, Type, Welcome
from tests.runtime.peers.nodes import message

HELLO = Hello(LinkKind.BULK, b"c" * 16, (1 << 63) - 1, 7, (1 << 64) - 1)
JOIN = Join(b"c" * 16, b"s" * 20, b"csr", b"b" * 16, "node", ("a:1", "b:2"), True)
ADMITTED = Admitted(5, "demo", b"certificate", (b"ca", b"ca 2"), ((1, ("a:1",), b"b" * 16), (5, (), b"")))


def payload(parts: bytes | Parts, kind: Type) -> memoryview:
    frame = parts if isinstance(parts, bytes) else b"".join(parts)
    assert int.from_bytes(frame[:4], "big") == len(frame) - 4
    found, rest = frames.split(memoryview(frame)[4:])
    assert found == kind
    return rest


def test_every_frame_is_read_back() -> None:
    assert frames.decode_hello(payload(frames.encode_hello(HELLO), Type.HELLO)) == HELLO
    welcome = Welcome(3, 9)
    assert frames.decode_welcome(payload(frames.encode_welcome(welcome), Type.WELCOME)) == welcome
    request = frames.encode_request(7, "blob.put", {"a": b"b"})
    assert frames.decode_request(payload(request, Type.REQUEST)) == (7, "blob.put", {"a": b"b"})
    answer = frames.encode_answer(7, "blob.put", [1, [2]])
    assert frames.decode_answer(payload(answer, Type.ANSWER)) == (7, (1, (2,)))
    assert frames.decode_join(bytes(payload(frames.encode_join(JOIN), Type.JOIN))) == JOIN
    assert frames.decode_admitted(payload(frames.encode_admitted(ADMITTED), Type.ADMITTED)) == ADMITTED
    authorities = frames.encode_authorities(b"c" * 16, [b"ca"])
    assert frames.decode_authorities(payload(authorities, Type.AUTHORITIES)) == (b"c" * 16, (b"ca",))
    frames.decode_question(bytes(payload(frames.encode_question(), Type.AUTHORITIES)))
    assert frames.decode_numbers(payload(frames.encode(Type.PING, (5,)), Type.PING), 1) == (5,)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 70_000])
def test_messages_are_read_back_in_order(count: int) -> None:
    sent = [message(2, 1, commit=number) for number in range(count)]
    frame = frames.encode_messages([frames.pack(each) for each in sent])
    values = frames.decode_messages(payload(frame, Type.MESSAGES))
    assert [from_wire(value) for value in values] == sent


@pytest.mark.parametrize("error", [
    errors.NotFound("a key"), errors.NotLeader("ask another", 7), errors.Compacted(9),
    errors.NoQuorum("text"), errors.IdentityLost("its disk"), errors.TicketUsed("twice"),
])  # fmt: skip
def test_an_error_is_raised_at_the_other_end_as_it_was_here(error: errors.AspenError) -> None:
    number, read = frames.decode_failure(payload(frames.encode_failure(3, error), Type.FAILURE))
    refused = frames.decode_refusal(payload(frames.encode_refusal(error), Type.REFUSED))
    assert number == 3
    for found in (read, refused):
        assert type(found) is type(error)
        assert str(found) == str(error)
        assert vars(found) == vars(error)


def test_an_error_by_any_name_is_an_error() -> None:
    names = [name for name, kind in vars(errors).items() if isinstance(kind, type)]
    assert len(names) > 50
    for name in [*names, "Any", "_errno", "KeyError", "", "AspenError", "StoreError"]:
        body = frames.encode(Type.REFUSED, {"name": name, "message": "text", "leader": "x", "oldest": b""})
        assert "text" in str(frames.decode_refusal(payload(body, Type.REFUSED)))


def test_what_is_too_long_or_cannot_be_packed_is_refused_before_it_is_sent() -> None:
    for encode in (frames.encode_request, frames.encode_answer):
        encode(1, "kind", b"x" * PEER_REQUEST_BYTES_MAX)
        with pytest.raises(errors.TooLarge):
            encode(1, "kind", b"x" * (PEER_REQUEST_BYTES_MAX + 200))
        with pytest.raises(errors.InvalidArgument):
            encode(1, "kind", object())
    with pytest.raises(errors.TooLarge):
        frames.encode(Type.ANSWER, b"x" * PEER_FRAME_BYTES_MAX)


DECODERS: list[Callable[[memoryview], Any]] = [
    frames.decode_hello, frames.decode_welcome, frames.decode_messages, frames.decode_request,
    frames.decode_answer, frames.decode_failure, frames.decode_refusal, frames.decode_admitted,
    frames.decode_authorities, lambda data: frames.decode_numbers(data, 1),
    lambda data: frames.decode_join(bytes(data)), lambda data: frames.decode_question(bytes(data)),
]  # fmt: skip
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.binary(max_size=20)
    | st.text(max_size=10) | st.floats(),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=12,
)  # fmt: skip


@pytest.mark.parametrize("decode", DECODERS)
@given(data=st.binary(max_size=200) | VALUES.map(frames.pack))
def test_bytes_that_anybody_sent_are_read_or_refused(
    decode: Callable[[memoryview], Any], data: bytes
) -> None:
    with contextlib.suppress(errors.ProtocolError, errors.NotSupported):
        decode(memoryview(data))


@pytest.mark.parametrize("announced", [9_999, 100_000, PEER_ITEMS_MAX, PEER_ITEMS_MAX + 1, 1 << 24])
def test_what_is_only_announced_takes_little_memory(announced: int) -> None:
    nested = memoryview((b"\xdd" + announced.to_bytes(4, "big")) * 2000)
    tracemalloc.start()
    try:
        with pytest.raises(errors.ProtocolError):
            frames.unpack(nested)
        # Ten thousand bytes may hold ten thousand items, but not more; each level costs their pointers.
        assert tracemalloc.get_traced_memory()[1] < (100 if announced < len(nested) else 1) << 20
    finally:
        tracemalloc.stop()


GOOD: list[bytes] = [
    frames.encode_hello(HELLO), frames.encode_welcome(Welcome(3, 9)), frames.encode_join(JOIN),
    b"".join(frames.encode_request(7, "k", (1,))), *frames.encode_failure(3, errors.NotLeader("x", 7)),
    frames.encode_admitted(ADMITTED), frames.encode_authorities(b"c" * 16, [b"ca"]),
]  # fmt: skip


@given(data=st.data())
def test_a_good_frame_with_bytes_changed_is_read_or_refused(data: st.DataObject) -> None:
    frame = bytearray(data.draw(st.sampled_from(GOOD))[5:])
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    for decode in DECODERS:
        try:
            decode(memoryview(bytes(frame)))
        except (errors.ProtocolError, errors.NotSupported):
            continue
