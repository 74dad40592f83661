"""The control socket: who gets in, what hostile bytes can do, and requests of one connection."""

import logging
import os
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from aspenfs import errors
from aspenfs.kv.local import LocalStore
from aspenfs.kv.types import TxnResult
from aspenfs.limits import (
    CONTROL_CONNECTIONS_MAX,
    CONTROL_FRAME_BYTES_MAX,
    CONTROL_REQUESTS_MAX,
    KEY_BYTES_MAX,
    VALUE_BYTES_MAX,
)
from aspenfs.runtime import control_protocol as protocol
from aspenfs.runtime.control_command import Call
from tests.runtime.controlled import Daemon, Raw, short_directory


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
def daemon(directory: Path) -> Iterator[Daemon]:
    with Daemon(directory / "ctl.sock", extra=EXTRA) as running:
        yield running


async def _bug(call: Call) -> Any:
    raise KeyError("a bug")


async def _unsendable(call: Call) -> Any:
    return object()


async def _for_ever(call: Call) -> Any:
    await call.item("started")
    await trio.sleep_forever()


async def _echo(call: Call) -> Any:
    await call.item(dict(call.params))
    return call.uid


EXTRA = {"bug": _bug, "unsendable": _unsendable, "for_ever": _for_ever, "echo": _echo}


def put(key: bytes, value: bytes, **more: Any) -> dict[str, Any]:
    return {"op": "put", "key": key, "value": value, **more}


def value_of(daemon: Daemon, key: bytes) -> bytes | None:
    with Raw(daemon.path, client=b"x" * 16) as client:
        items = client.ask("kv.range", start=key, end=key + b"\0")["items"]
        return items[0]["records"][0][1] if items else None


# --- the socket ---


def test_only_its_owner_may_open_the_socket(daemon: Daemon) -> None:
    assert stat.S_IMODE(daemon.path.stat().st_mode) == 0o600


def test_another_user_is_refused_even_if_the_socket_lets_him_connect(daemon: Daemon) -> None:
    daemon.path.chmod(0o666)
    script = (
        "import os, socket, sys\n"
        "os.setuid(65534)\n"  # here, not before: the interpreter may lie where only root can read
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "data = b''\n"
        "while chunk := s.recv(65536): data += chunk\n"
        "sys.stdout.buffer.write(data)\n"
    )
    seen = subprocess.run(
        [sys.executable, "-c", script, str(daemon.path)], check=True, capture_output=True, timeout=30
    ).stdout
    message = protocol.decode(seen[protocol.HEADER_BYTES :])
    assert message["error"]["name"] == "AccessDenied"
    assert "uid 65534" in message["error"]["message"]


def test_a_handler_learns_the_uid_that_the_kernel_vouches_for(daemon: Daemon) -> None:
    with Raw(daemon.path) as client:
        answer = client.ask("echo", anything=1)
    assert answer["result"] == os.getuid()
    assert answer["items"] == [{"anything": 1}]


def test_the_socket_of_a_killed_daemon_is_replaced(directory: Path) -> None:
    path = directory / "ctl.sock"
    left_behind = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    left_behind.bind(str(path))
    left_behind.close()
    with Daemon(path) as running, Raw(path) as client:
        assert client.ask("status")["result"] == {}
        assert running.path.is_socket()
    assert list(directory.iterdir()) == []


def test_a_socket_that_is_served_is_left_alone(daemon: Daemon) -> None:
    second = Daemon(daemon.path)
    with pytest.raises(errors.Busy):
        trio.run(_serve_and_flatten, second)
    with Raw(daemon.path) as client:
        assert "result" in client.ask("status")


def test_a_file_in_the_place_of_the_socket_is_left_alone(directory: Path) -> None:
    path = directory / "ctl.sock"
    path.write_text("mine")
    with pytest.raises(errors.AlreadyExists, match="not a socket"):
        trio.run(_serve_and_flatten, Daemon(path))
    assert path.read_text() == "mine"


def test_a_path_too_long_for_a_socket_is_refused_with_its_length(directory: Path) -> None:
    path = directory / ("x" * 100) / "ctl.sock"
    with pytest.raises(errors.InvalidArgument, match=rf"107 bytes, this one has {len(str(path))}"):
        trio.run(_serve_and_flatten, Daemon(path))


async def _serve_and_flatten(daemon: Daemon) -> None:
    from aspenfs.runtime.control import ControlServer
    from aspenfs.runtime.system import SystemClock

    with trio.fail_after(10):
        await ControlServer(daemon.store, dict, clock=SystemClock()).serve(str(daemon.path))


def test_too_many_connections_are_told_so_and_the_others_live(daemon: Daemon) -> None:
    clients = [Raw(daemon.path) for _ in range(CONTROL_CONNECTIONS_MAX)]
    try:
        with Raw(daemon.path, hello=False) as late:
            message = late.receive()
            assert message is not None
            assert message["error"]["name"] == "Overloaded"
        assert "result" in clients[0].ask("status")
    finally:
        for client in clients:
            client.socket.close()


# --- greeting and hostile bytes ---


def test_a_client_of_another_version_is_told_which_one_is_spoken(daemon: Daemon) -> None:
    with Raw(daemon.path, hello=False) as client:
        client.send({"hello": protocol.GREETING, "versions": [99], "client": b"x" * 16})
        message = client.receive()
        assert message is not None
        assert message["error"]["name"] == "NotSupported"
        assert "speaks version 1" in message["error"]["message"]
        assert client.receive() is None


def test_a_frame_longer_than_the_bound_is_refused_before_it_is_read(daemon: Daemon) -> None:
    with Raw(daemon.path) as client:
        client.socket.sendall(struct.pack(">I", CONTROL_FRAME_BYTES_MAX + 1))
        message = client.receive()
        assert message is not None
        assert message["error"]["name"] == "ProtocolError"
        assert client.receive() is None


def test_nested_arrays_cannot_announce_more_than_the_bound() -> None:
    announced = b"\x81\xa1a" + b"\xdd\x00\x3f\xff\xff" * 500
    with pytest.raises(errors.ProtocolError, match="max_array_len"):
        protocol.decode(announced + b"\xc0" * (CONTROL_FRAME_BYTES_MAX - len(announced)))


integers = st.integers(-(1 << 63), (1 << 64) - 1)
scalars = st.none() | st.booleans() | integers | st.text(max_size=9) | st.binary(max_size=9)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
METHODS = [
    "kv.range",
    "kv.txn",
    "kv.delete_range",
    "lease.grant",
    "lease.keepalive",
    "lease.revoke",
    "nothing",
]
clauses = st.fixed_dictionaries(
    {},
    optional={
        "op": st.sampled_from(["put", "append", "delete", "delete_range", "get", "range"]) | scalars,
        "target": st.sampled_from(["exists", "absent", "empty", "value", "mod", "create", "version"])
        | scalars,
        "operator": st.sampled_from(["=", "!=", "<", ">"]) | scalars,
        "key": st.binary(max_size=5) | trees,
        "value": st.binary(max_size=5) | trees,
        "operand": trees,
        "lease": trees,
        "start": st.binary(max_size=5) | trees,
        "end": st.binary(max_size=5) | trees,
        "limit": trees,
    },
)
params = st.fixed_dictionaries(
    {},
    optional={
        "start": st.binary(max_size=5) | trees,
        "end": st.binary(max_size=5) | trees,
        "limit": trees,
        "revision": trees,
        "keys_only": trees,
        "sequence": trees,
        "ttl_ms": trees,
        "lease": trees,
        "compares": st.lists(clauses, max_size=3) | trees,
        "then": st.lists(clauses, max_size=3) | trees,
        "else": st.lists(clauses, max_size=3) | trees,
    },
)
frames = (
    st.binary(max_size=80)
    | st.binary(max_size=80).map(lambda payload: struct.pack(">I", len(payload)) + payload)
    | (trees | st.dictionaries(integers | st.sampled_from(["id", "method", "params", "cancel"]), trees)).map(
        lambda tree: struct.pack(">I", len(msgpack.packb(tree))) + msgpack.packb(tree)
    )
)


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Daemon]:
    with short_directory() as directory, Daemon(directory / "ctl.sock") as running:
        yield running


@settings(max_examples=200, deadline=None)
@given(greeted=st.booleans(), data=st.lists(frames, min_size=1, max_size=4).map(b"".join))
def test_hostile_bytes_end_their_connection_and_nothing_else(
    fuzzed: Daemon, greeted: bool, data: bytes
) -> None:
    with Raw(fuzzed.path) as bystander:
        with Raw(fuzzed.path, hello=greeted) as hostile:
            hostile.socket.sendall(data)
            hostile.socket.shutdown(socket.SHUT_WR)
            while hostile.receive() is not None:
                pass
        assert "result" in bystander.ask("status")


@settings(max_examples=200, deadline=None)
@given(method=st.sampled_from(METHODS), body=params)
def test_any_parameters_get_an_answer_that_is_no_bug(
    fuzzed: Daemon, method: str, body: dict[str, Any]
) -> None:
    with Raw(fuzzed.path) as client:
        answer = client.ask(method, **body)
        assert answer.get("error", {}).get("name") != "RemoteFailure"


# --- requests ---


def test_an_unknown_method_is_refused_and_the_connection_stays(daemon: Daemon) -> None:
    with Raw(daemon.path) as client:
        assert client.ask("kv.frobnicate")["error"]["name"] == "NotSupported"
        assert "result" in client.ask("status")


@pytest.mark.parametrize(("method", "says"), [("bug", "failed at bug"), ("unsendable", "cannot be sent")])
def test_a_bug_in_a_handler_is_logged_and_costs_one_request(
    daemon: Daemon, caplog: pytest.LogCaptureFixture, method: str, says: str
) -> None:
    with Raw(daemon.path) as client:
        error = client.ask(method)["error"]
        assert error["name"] == "RemoteFailure"
        assert says in error["message"]
        assert "result" in client.ask("status")
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


def test_a_command_of_the_daemon_cannot_take_the_name_of_another() -> None:
    with pytest.raises(ValueError, match=r"kv\.txn"):
        trio.run(_make_server_with, {"kv.txn": _echo})


async def _make_server_with(extra: Any) -> None:
    from aspenfs.runtime.control import ControlServer

    daemon = Daemon(Path("/nowhere"))
    ControlServer(daemon.store, dict, extra, clock=daemon.store.engine._clock)


def test_a_request_can_be_cancelled_and_its_number_used_again(daemon: Daemon) -> None:
    with Raw(daemon.path) as client:
        client.send({"id": 7, "method": "for_ever", "params": {}})
        assert client.receive() == {"id": 7, "item": "started"}
        client.send({"cancel": 7})
        message = client.receive()
        assert message is not None
        assert message["error"]["name"] == "Closed"
        assert "result" in client.ask("status", 7)


def test_one_request_more_than_the_bound_is_refused_and_those_under_way_go_on(daemon: Daemon) -> None:
    with Raw(daemon.path) as client:
        for number in range(CONTROL_REQUESTS_MAX):
            client.send({"id": number, "method": "for_ever", "params": {}})
            assert client.receive() == {"id": number, "item": "started"}
        assert client.ask("status", 999)["error"]["name"] == "Overloaded"
        client.send({"cancel": 0})
        client.receive()
        assert "result" in client.ask("status", 999)


def test_a_number_that_is_under_way_ends_the_connection(daemon: Daemon) -> None:
    with Raw(daemon.path) as client:
        client.send({"id": 1, "method": "for_ever", "params": {}})
        assert client.receive() == {"id": 1, "item": "started"}
        client.send({"id": 1, "method": "status", "params": {}})
        message = client.receive()
        assert message is not None
        assert message["error"]["name"] == "ProtocolError"


# --- keys ---


class Unsteady(LocalStore):
    """As on a node that has to ask another one: each transaction waits, the earlier the longer."""

    waits = 240

    async def txn(self, *arguments: Any, **options: Any) -> TxnResult:
        self.waits -= 4
        for _ in range(self.waits):
            await trio.lowlevel.checkpoint()
        return await super().txn(*arguments, **options)


def test_writes_sent_ahead_of_their_answers_take_effect_in_order(directory: Path) -> None:
    def append(number: int) -> dict[str, Any]:
        operation = {"op": "append", "key": b"k", "value": b"%d," % number}
        return {"id": number, "method": "kv.txn", "params": {"then": [operation], "sequence": number}}

    with Daemon(directory / "ctl.sock", store=Unsteady) as daemon:
        with Raw(daemon.path) as client:
            client.send(*map(append, range(1, 51)))
            answered = set()
            for _ in range(50):
                message = client.receive()
                assert message is not None
                assert message["result"]["succeeded"]
                answered.add(message["id"])
        assert answered == set(range(1, 51))
        assert value_of(daemon, b"k") == b"".join(b"%d," % number for number in range(1, 51))


def test_a_write_repeated_on_a_new_connection_applies_once_and_gets_the_first_answer(daemon: Daemon) -> None:
    append: dict[str, Any] = {"then": [{"op": "append", "key": b"k", "value": b"once"}], "sequence": 1}
    with Raw(daemon.path) as client:
        first = client.ask("kv.txn", **append)["result"]
    with Raw(daemon.path) as again:
        assert again.ask("kv.txn", **append)["result"] == first
    assert value_of(daemon, b"k") == b"once"


def test_a_key_of_another_keyspace_cannot_be_reached(daemon: Daemon) -> None:
    daemon.run(daemon.store.txn, [], [(1, b"f/secret", b"not yours", 0, None), (1, b"k/mine", b"v", 0, None)])
    with Raw(daemon.path) as client:
        found = [
            record[0]
            for item in client.ask("kv.range", start=b"", end=b"")["items"]
            for record in item["records"]
        ]
        assert found == [b"mine"]
        client.ask("kv.delete_range", start=b"", end=b"\xff" * 3)
    assert daemon.store.get(b"f/secret") is not None
    assert daemon.store.get(b"k/mine") is None


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        (b"", b"v", "InvalidArgument"),
        (b"k" * (KEY_BYTES_MAX + 1), b"v", "InvalidArgument"),
        (b"k", b"v" * (VALUE_BYTES_MAX + 1), "TooLarge"),
    ],
)
def test_a_key_or_value_out_of_bounds_is_refused(daemon: Daemon, key: bytes, value: bytes, name: str) -> None:
    with Raw(daemon.path) as client:
        assert client.ask("kv.txn", then=[put(key, value)], sequence=1)["error"]["name"] == name


def test_the_largest_key_and_value_go_in_and_out(daemon: Daemon) -> None:
    key, value = b"k" * KEY_BYTES_MAX, os.urandom(VALUE_BYTES_MAX)
    with Raw(daemon.path) as client:
        assert client.ask("kv.txn", then=[put(key, value)], sequence=1)["result"]["succeeded"]
    assert value_of(daemon, key) == value


def test_a_put_is_stamped_with_the_time_and_keeps_what_a_mount_set(daemon: Daemon) -> None:
    daemon.run(daemon.store.txn, [], [(1, b"k/a", b"", 0, {"mode": 0o600, "mtime": 5})])
    with Raw(daemon.path) as client:
        client.ask("kv.txn", then=[put(b"a", b"new")], sequence=1)
    record = daemon.store.get(b"k/a")
    assert record is not None
    assert record.attributes["mode"] == 0o600
    mtime = record.attributes["mtime"]
    assert isinstance(mtime, int)
    assert mtime > 1_000_000_000
    assert record.version == 2


def test_responses_stay_with_their_operations_around_a_put(daemon: Daemon) -> None:
    with Raw(daemon.path) as client:
        client.ask("kv.txn", then=[put(b"x", b"1"), put(b"y", b"2")], sequence=1)
        answer = client.ask(
            "kv.txn",
            then=[
                put(b"a", b"v"),
                {"op": "get", "key": b"x"},
                put(b"b", b"v"),
                {"op": "delete", "key": b"y"},
                {"op": "get", "key": b"y"},
            ],
            sequence=2,
        )
    assert answer["result"]["responses"] == [None, {"count": 1}, None, {"count": 1}, {"count": 0}]
    assert [(item["response"], item["records"][0][1]) for item in answer["items"]] == [(1, b"1")]


def test_a_listing_is_of_one_revision_also_if_keys_change_between_its_pages(daemon: Daemon) -> None:
    async def fill() -> None:
        for number in range(2_000):
            await daemon.store.txn([], [(1, b"k/%04d" % number, b"old" * 1000, 0, None)])

    async def change() -> None:
        await daemon.store.txn([], [(3, b"k/", b"k0")])

    daemon.run(fill)
    with Raw(daemon.path) as client:
        client.send({"id": 1, "method": "kv.range", "params": {}})
        seen = 0
        changed = False
        while True:
            message = client.receive()
            assert message is not None
            if "result" in message:
                break
            seen += len(message["item"]["records"])
            assert all(record[1] == b"old" * 1000 for record in message["item"]["records"])
            if not changed:
                changed = True
                daemon.run(change)
    assert seen == 2_000
    assert message["result"]["snapshot"] is True


def test_a_page_is_closed_before_it_outgrows_a_frame(daemon: Daemon) -> None:
    with Raw(daemon.path) as client:
        for number in range(8):
            client.ask("kv.txn", then=[put(b"%d" % number, b"x" * VALUE_BYTES_MAX)], sequence=number + 1)
        answer = client.ask("kv.range")
    assert [len(item["records"]) for item in answer["items"]] == [1] * 8


def test_a_watch_hears_each_revision_from_where_it_says_it_begins(daemon: Daemon) -> None:
    with Raw(daemon.path) as watcher, Raw(daemon.path, client=b"w" * 16) as writer:
        watcher.send({"id": 1, "method": "kv.watch", "params": {"start": b"a/", "end": b"a0"}})
        first = watcher.receive()
        assert first is not None
        assert first["item"]["events"] == []
        writer.ask("kv.txn", then=[put(b"b/x", b"no")], sequence=1)
        writer.ask("kv.txn", then=[put(b"a/1", b"one"), put(b"a/2", b"two")], sequence=2)
        writer.ask("kv.txn", then=[{"op": "delete", "key": b"a/1"}], sequence=3)
        both, deletion = watcher.receive(), watcher.receive()
    assert both is not None
    assert deletion is not None
    assert [event[:2] for event in both["item"]["events"]] == [[b"a/1", b"one"], [b"a/2", b"two"]]
    assert deletion["item"]["events"] == [[b"a/1"]]
    assert first["item"]["revision"] < both["item"]["revision"] < deletion["item"]["revision"]


def test_a_revision_with_very_many_events_comes_in_several_frames(daemon: Daemon) -> None:
    async def fill() -> None:
        for start in range(0, 2_000, 100):
            await daemon.store.txn(
                [], [(1, b"k/%04d" % number, b"", 0, None) for number in range(start, start + 100)]
            )

    async def empty() -> None:
        await daemon.store.txn([], [(3, b"k/", b"k0")])

    daemon.run(fill)
    with Raw(daemon.path) as watcher:
        watcher.send({"id": 1, "method": "kv.watch", "params": {}})
        watcher.receive()
        daemon.run(empty)
        items: list[Any] = []
        while not items or not items[-1]["last"]:
            message = watcher.receive()
            assert message is not None
            items.append(message["item"])
    assert len(items) == 4
    assert len({item["revision"] for item in items}) == 1
    assert [event[0] for item in items for event in item["events"]] == [
        b"%04d" % number for number in range(2_000)
    ]


def test_errors_come_out_of_the_socket_as_they_went_in() -> None:
    for error in (errors.Compacted(17), errors.NoSpace("the disk is full"), errors.LeaseNotFound("5")):
        received = protocol.decode_error(
            protocol.decode(
                protocol.encode({"error": protocol.encode_error(error)})[protocol.HEADER_BYTES :]
            )["error"]
        )
        assert type(received) is type(error)
        assert str(received) == str(error)
    assert isinstance(protocol.decode_error({"name": "os", "message": "x"}), errors.RemoteFailure)
    assert isinstance(protocol.decode_error({"name": "StoreError", "message": "x"}), errors.RemoteFailure)
