"""`aspen kv` against a real control server: bytes in and out, exit codes, JSON, nothing capped in silence."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from aspenfs.cli.aspen import aspen
from aspenfs.cli.client import Client
from aspenfs.cli.output import from_json_bytes, json_bytes, shown
from aspenfs.limits import KEY_BYTES_MAX, VALUE_BYTES_MAX
from aspenfs.runtime import control_protocol as protocol
from tests.runtime.controlled import DEADLINE_SECONDS, Daemon, Raw, short_directory

MISSING, USAGE, COMPARE_FAILED, UNREACHABLE = 1, 2, 3, 4


class Shell:
    """Runs `aspen` in this process, or as a process of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.daemon = Daemon(directory / "ctl.sock")

    def __call__(self, *arguments: str, stdin: bytes = b"", code: int = 0) -> Result:
        result = CliRunner().invoke(aspen, ["--state-dir", str(self.directory), *arguments], input=stdin)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    def out(self, *arguments: str, stdin: bytes = b"", code: int = 0) -> bytes:
        return self(*arguments, stdin=stdin, code=code).stdout_bytes

    def json(self, *arguments: str, stdin: bytes = b"", code: int = 0) -> Any:
        return [json.loads(line) for line in self.out(*arguments, stdin=stdin, code=code).splitlines()]

    def process(self, *arguments: str | bytes, **options: Any) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-c", "from aspenfs.cli.aspen import main; main()"]
        environment = os.environ | {"ASPEN_STATE_DIR": str(self.directory)}
        return subprocess.Popen(
            [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
        )


@pytest.fixture
def shell() -> Iterator[Shell]:
    with short_directory() as directory:
        shell = Shell(directory)
        with shell.daemon:
            yield shell


# --- get and put ---


def test_what_was_put_comes_out_byte_for_byte(shell: Shell) -> None:
    shell("kv", "put", "app/db/host", "db1")
    assert shell.out("kv", "get", "app/db/host") == b"db1"


@pytest.mark.parametrize("value", [b"", b"\n", b"\0\xff\r\n", os.urandom(VALUE_BYTES_MAX)])
def test_any_value_goes_through_stdin_and_stdout(shell: Shell, value: bytes) -> None:
    shell("kv", "put", "k", "-", stdin=value)
    assert shell.out("kv", "get", "k") == value


def test_a_value_goes_from_a_file_and_into_one(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"\x89PNG")
    shell("kv", "put", "k", "--file", str(tmp_path / "in"))
    assert shell.out("kv", "get", "k", "--output", str(tmp_path / "out")) == b""
    assert (tmp_path / "out").read_bytes() == b"\x89PNG"


def test_a_file_that_cannot_be_read_is_named(shell: Shell) -> None:
    result = shell("kv", "put", "k", "--file", "/nonexistent/file", code=MISSING)
    assert "/nonexistent/file: No such file" in result.stderr


def test_a_value_that_is_too_long_is_refused_before_it_is_sent(shell: Shell) -> None:
    result = shell("kv", "put", "k", "-", stdin=b"x" * (VALUE_BYTES_MAX + 1), code=MISSING)
    assert str(VALUE_BYTES_MAX) in result.stderr
    shell("kv", "get", "k", code=MISSING)


def test_a_value_must_come_from_one_place(shell: Shell) -> None:
    shell("kv", "put", "k", code=USAGE)
    shell("kv", "put", "k", "v", "--file", "f", code=USAGE)


def test_a_missing_key_is_exit_code_1_with_its_name(shell: Shell) -> None:
    result = shell("kv", "get", "no/such", code=MISSING)
    assert result.stdout_bytes == b""
    assert "no/such: no such key" in result.stderr


def test_an_old_revision_is_readable(shell: Shell) -> None:
    first = shell.json("kv", "put", "k", "old", "--json")[0]["revision"]
    shell("kv", "put", "k", "new")
    assert shell.out("kv", "get", "k", "--revision", str(first)) == b"old"
    shell("kv", "get", "k", "--revision", str(first - 1 or 1_000_000), code=MISSING)


def test_json_tells_all_about_a_key(shell: Shell) -> None:
    revision = shell.json("kv", "put", "k", "v", "--json")[0]["revision"]
    (body,) = shell.json("kv", "get", "k", "--json")
    mtime = body.pop("mtime")
    assert mtime[:2] == "20"
    assert mtime.endswith("Z")
    assert body == {
        "key": "k",
        "value": "v",
        "size": 1,
        "create_revision": revision,
        "mod_revision": revision,
        "version": 1,
        "lease": 0,
    }


def test_json_marks_what_is_not_text(shell: Shell) -> None:
    key = base64.b64encode(b"\xff/k").decode()
    shell("kv", "put", "--key-base64", key, "-", stdin=b"\xfe")
    (body,) = shell.json("kv", "ls", "--json")
    assert (body["key"], body["key_encoding"]) == (key, "base64")
    assert (body["value"], body["value_encoding"]) == (base64.b64encode(b"\xfe").decode(), "base64")
    assert shell.out("kv", "get", "--key-base64", key) == b"\xfe"
    shell("kv", "get", "--key-base64", "not base64", code=USAGE)


@given(st.binary())
def test_bytes_survive_their_json_form(data: bytes) -> None:
    assert from_json_bytes(json.loads(json.dumps(json_bytes("x", data))), "x") == data


@given(st.binary())
def test_what_is_shown_to_a_person_is_one_printable_line(data: bytes) -> None:
    assert shown(data).isprintable()


def test_an_error_is_json_too_where_json_was_asked_for(shell: Shell) -> None:
    body = json.loads(shell("kv", "get", "k", "--json", code=MISSING).stderr)
    assert body["error"] == "NotFound"
    assert body["exit_code"] == MISSING


@pytest.mark.parametrize("key", ["", "k" * (KEY_BYTES_MAX + 1)])
def test_a_key_that_cannot_be_is_refused(shell: Shell, key: str) -> None:
    shell("kv", "put", key, "v", code=MISSING)


# --- delete ---


def test_delete_takes_all_keys_named_and_tells_which_were_not_there(shell: Shell) -> None:
    shell("kv", "put", "a", "1")
    shell("kv", "put", "b", "2")
    result = shell("kv", "delete", "a", "nope", "b", code=MISSING)
    assert "nope: no such key" in result.stderr
    assert shell.out("kv", "ls") == b""
    assert shell.json("kv", "delete", "--force", "--json", "a") == [{"deleted": 0, "missing": [{"key": "a"}]}]


def test_delete_takes_more_keys_than_a_transaction_holds(shell: Shell) -> None:
    names = [f"k{number}" for number in range(300)]
    fill(shell, names)
    assert shell.json("kv", "delete", "--json", *names) == [{"deleted": 300, "missing": []}]


def test_delete_by_prefix_leaves_the_neighbours(shell: Shell) -> None:
    fill(shell, [f"app/{number}" for number in range(2_500)] + ["app", "app0", "ap"])
    assert shell.json("kv", "delete", "--prefix", "app/", "--json")[0]["deleted"] == 2_500
    assert shell.out("kv", "ls") == b"ap\napp\napp0\n"


def test_deleting_everything_must_be_meant(shell: Shell) -> None:
    shell("kv", "put", "a", "1")
    shell("kv", "delete", "--prefix", "", code=USAGE)
    assert shell.out("kv", "ls") == b"a\n"
    shell("kv", "delete", "--prefix", "", "--yes")
    assert shell.out("kv", "ls") == b""


def fill(shell: Shell, names: list[str]) -> None:
    async def put_all() -> None:
        for name in names:
            await shell.daemon.store.txn(
                [], [(1, b"k/" + name.encode(), b"value of " + name.encode(), 0, None)]
            )

    shell.daemon.run(put_all)


# --- cas ---


def test_cas_changes_a_key_only_from_what_it_was(shell: Shell) -> None:
    shell("kv", "put", "k", "old")
    shell("kv", "cas", "k", "old", "new")
    result = shell("kv", "cas", "k", "old", "newer", code=COMPARE_FAILED)
    assert result.stdout_bytes == b"new"
    assert "compare failed" in result.stderr
    assert shell.out("kv", "get", "k") == b"new"


def test_cas_absent_makes_a_key_once(shell: Shell) -> None:
    shell("kv", "cas", "k", "--absent", "first")
    assert shell.out("kv", "cas", "k", "--absent", "second", code=COMPARE_FAILED) == b"first"


def test_cas_at_a_revision_sees_a_change_to_the_same_value(shell: Shell) -> None:
    revision = str(shell.json("kv", "put", "k", "v", "--json")[0]["revision"])
    shell("kv", "put", "k", "v")
    (body,) = shell.json("kv", "cas", "k", "--revision", revision, "new", "--json", code=COMPARE_FAILED)
    assert body["succeeded"] is False
    assert body["found"]["version"] == 2
    assert shell.json("kv", "cas", "k", "--json", "--revision", str(body["found"]["mod_revision"]), "new")[0][
        "succeeded"
    ]


def test_cas_of_a_missing_key_prints_nothing(shell: Shell) -> None:
    assert shell.out("kv", "cas", "k", "old", "new", code=COMPARE_FAILED) == b""
    assert shell.json("kv", "cas", "k", "old", "new", "--json", code=COMPARE_FAILED) == [
        {"succeeded": False, "found": None}
    ]


def test_cas_prints_the_largest_value_that_it_found(shell: Shell) -> None:
    value = os.urandom(VALUE_BYTES_MAX)
    shell("kv", "put", "k", "-", stdin=value)
    assert shell.out("kv", "cas", "k", "old", "new", code=COMPARE_FAILED) == value


@pytest.mark.parametrize(
    "arguments",
    [
        ["k", "new"],
        ["k", "a", "b", "c"],
        ["k", "--absent", "a", "b"],
        ["k", "--absent", "--revision", "1", "a"],
    ],
)
def test_cas_wants_one_thing_to_compare_with(shell: Shell, arguments: list[str]) -> None:
    shell("kv", "cas", *arguments, code=USAGE)


# --- ls ---


def test_ls_lists_every_key_in_byte_order_however_many(shell: Shell) -> None:
    names = sorted(f"k/{number}" for number in range(3_000))
    fill(shell, names)
    assert shell.out("kv", "ls", "k/").decode().split() == names
    assert [body["key"] for body in shell.json("kv", "ls", "--json", "--keys-only")] == names
    assert shell.json("kv", "ls", "--json", "k/2999")[0]["value"] == "value of k/2999"


def test_a_limit_is_not_silent(shell: Shell) -> None:
    fill(shell, ["a", "b", "c"])
    result = shell("kv", "ls", "--limit", "2")
    assert result.stdout_bytes == b"a\nb\n"
    assert "there are more" in result.stderr
    assert shell("kv", "ls", "--limit", "3").stderr == ""


def test_ls_shows_an_old_revision(shell: Shell) -> None:
    revision = str(shell.json("kv", "put", "a", "old", "--json")[0]["revision"])
    shell("kv", "delete", "a")
    shell("kv", "put", "b", "new")
    assert shell.out("kv", "ls", "--revision", revision) == b"a\n"
    assert shell.json("kv", "ls", "--revision", revision, "--json")[0]["value"] == "old"


def test_ls_long_tells_size_and_version(shell: Shell) -> None:
    shell("kv", "put", "a/b", "12345")
    header, line = shell.out("kv", "ls", "--long").decode().splitlines()
    assert header.split() == ["REVISION", "VERSION", "LEASE", "SIZE", "WRITTEN", "KEY"]
    assert line.split()[1:4] == ["1", "-", "5"]
    assert line.split()[-1] == "a/b"


def test_ls_null_keeps_keys_with_line_ends_apart(shell: Shell) -> None:
    shell("kv", "put", "a\nb", "1")
    shell("kv", "put", "c", "2")
    assert shell.out("kv", "ls", "--null") == b"a\nb\0c\0"


# --- txn ---

MOVE = """
# moves a key
if exists "app/old name"
if absent app/new
then put app/new 'the value'   # quoted
then delete "app/old name"
then get app/new
else get app/new
"""


def test_a_transaction_is_done_whole_or_its_else_is(shell: Shell) -> None:
    shell("kv", "put", "app/old name", "v")
    output = shell.out("kv", "txn", stdin=MOVE.encode()).decode()
    assert output.startswith("succeeded: revision ")
    assert "then delete app/old name: 1" in output
    assert "  app/new the value" in output
    output = shell.out("kv", "txn", stdin=MOVE.encode(), code=COMPARE_FAILED).decode()
    assert output.startswith("compare failed")
    assert "else get app/new: 1" in output


def test_a_transaction_that_only_reads_may_read_much(shell: Shell) -> None:
    shell("kv", "put", "a", "-", stdin=b"x" * VALUE_BYTES_MAX)
    shell("kv", "put", "b", "-", stdin=b"y" * VALUE_BYTES_MAX)
    assert len(shell.out("kv", "txn", stdin=b"then get a\nthen get b")) > 2 * VALUE_BYTES_MAX


def test_a_transaction_in_json_answers_in_json(shell: Shell) -> None:
    document = {
        "compare": [{"target": "absent", "key": "a"}, {"target": "empty", "prefix": "dir/"}],
        "then": [
            {
                "op": "put",
                "key": "a",
                "value": base64.b64encode(b"\xff").decode(),
                "value_encoding": "base64",
            },
            {"op": "append", "key": "b", "value": "x"},
            {"op": "range", "prefix": ""},
        ],
        "else": [{"op": "delete_range", "prefix": ""}],
    }
    (answer,) = shell.json("kv", "txn", "--json", stdin=json.dumps(document).encode())
    assert answer["succeeded"] is True
    assert [body["key"] for body in answer["responses"][2]["records"]] == ["a", "b"]
    assert answer["responses"][2]["records"][0]["value_encoding"] == "base64"
    (answer,) = shell.json("kv", "txn", "--json", stdin=json.dumps(document).encode(), code=COMPARE_FAILED)
    assert answer["responses"] == [{"op": "delete_range", "deleted": 2}]


@pytest.mark.parametrize(
    ("target", "operator", "operand", "code"),
    [
        ("value", "=", "v", 0),
        ("value", "<", "a", COMPARE_FAILED),
        ("value", ">", "a", 0),
        ("version", "=", "2", 0),
        ("version", "!=", "2", COMPARE_FAILED),
        ("mod", ">", "1", 0),
        ("create", "<", "1000000", 0),
    ],
)
def test_each_compare_holds_when_it_is_true(
    shell: Shell, target: str, operator: str, operand: str, code: int
) -> None:
    shell("kv", "put", "k", "u")
    shell("kv", "put", "k", "v")
    shell(
        "kv", "txn", stdin=f"if {target} k {operator} {operand}\nthen get k\nelse get k".encode(), code=code
    )


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("then put k", "line 1: after 'then'"),
        ("\nif foo k\nthen get k", 'line 2: after "if"'),
        ("maybe get k", "line 1: a line begins"),
        ("if mod k = x\nthen get k", "line 1"),
        ('then put k "open', "line 1"),
        ("", "nothing to do"),
        ("{", "stdin"),
        ('{"then": [{"op": "put", "key": "k"}]}', "then 1: 'value' must be text"),
        ('{"then": [{"op": "jump", "key": "k"}]}', "then 1"),
        ('{"than": []}', "'than'"),
        ('{"then": {}}', "list"),
    ],
)
def test_what_is_wrong_with_a_transaction_is_said(shell: Shell, source: str, says: str) -> None:
    assert says in shell("kv", "txn", stdin=source.encode(), code=USAGE).stderr


@pytest.mark.parametrize(
    "source",
    [
        "if mod k ~ 1\nthen get k",
        f"if mod k = {1 << 70}\nthen get k",
        "then put k v 4711",
        "then ls k 9999999999999999999999",
    ],
)
def test_what_the_daemon_refuses_is_an_error_not_a_traceback(shell: Shell, source: str) -> None:
    assert shell("kv", "txn", stdin=source.encode(), code=MISSING).stderr.startswith("aspen: ")


# --- lease ---


def test_a_key_goes_with_its_lease(shell: Shell) -> None:
    lease = shell.out("kv", "lease", "grant", "60s").decode().strip()
    shell("kv", "put", "k", "v", "--lease", lease)
    assert shell.json("kv", "get", "k", "--json")[0]["lease"] == int(lease)
    assert shell.json("kv", "lease", "keepalive", lease, "--once", "--json") == [
        {"lease": int(lease), "ttl_ms": 60_000}
    ]
    (listed,) = shell.json("kv", "lease", "list", "--json")
    assert (listed["lease"], listed["ttl_ms"]) == (int(lease), 60_000)
    assert 0 < listed["remaining_ms"] <= 60_000
    assert lease in shell.out("kv", "lease", "list").decode()
    shell("kv", "lease", "revoke", lease)
    shell("kv", "get", "k", code=MISSING)
    shell("kv", "lease", "revoke", lease, code=MISSING)
    shell("kv", "put", "k", "v", "--lease", lease, code=MISSING)


def test_put_without_a_lease_takes_the_key_off_it(shell: Shell) -> None:
    lease = shell.out("kv", "lease", "grant", "1h").decode().strip()
    shell("kv", "put", "k", "v", "--lease", lease)
    shell("kv", "put", "k", "w")
    shell("kv", "lease", "revoke", lease)
    assert shell.out("kv", "get", "k") == b"w"


@pytest.mark.parametrize(("ttl", "ms"), [("30", 30_000), ("500ms", 500), ("5m", 300_000), ("2h", 7_200_000)])
def test_a_lease_takes_its_time_with_a_unit(shell: Shell, ttl: str, ms: int) -> None:
    assert shell.json("kv", "lease", "grant", ttl, "--id", "7", "--json") == [{"lease": 7, "ttl_ms": ms}]


def test_a_lease_wants_a_time_and_a_free_id(shell: Shell) -> None:
    for ttl in ("0", "x", "-1", "5 s", "1y"):
        shell("kv", "lease", "grant", "--", ttl, code=USAGE)
    shell("kv", "lease", "grant", "10", "--id", "7")
    shell("kv", "lease", "grant", "10", "--id", "7", code=MISSING)


# --- as a process of its own ---


def test_a_key_is_the_very_bytes_of_the_command_line(shell: Shell) -> None:
    put = shell.process("kv", "put", b"caf\xe9/\xff", b"\xfe")
    assert put.communicate(timeout=DEADLINE_SECONDS) == (b"", b"")
    assert shell.daemon.store.get(b"k/caf\xe9/\xff") is not None
    get = shell.process("kv", "get", b"caf\xe9/\xff")
    assert get.communicate(timeout=DEADLINE_SECONDS) == (b"\xfe", b"")


def test_get_imports_nothing_heavy() -> None:
    script = (
        "import sys; from aspenfs.cli.aspen import aspen; import aspenfs.cli.kv\n"
        "print([name for name in ('trio', 'lmdb', 'pyfuse3', 'rich', 'asyncio') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", script]) == b"[]\n"


def test_ls_ends_quietly_when_its_reader_goes(shell: Shell) -> None:
    fill(shell, [f"{number:04}" + "x" * 900 for number in range(2_000)])
    process = shell.process("kv", "ls")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline()[:4] == b"0000"
    process.stdout.close()
    assert process.wait(DEADLINE_SECONDS) == -signal.SIGPIPE
    assert process.stderr.read() == b""
    process.stderr.close()


def test_a_watch_goes_on_where_it_was_when_the_daemon_comes_back(shell: Shell) -> None:
    watch = shell.process("kv", "watch", "app/", "--json")
    assert watch.stdout is not None
    assert watch.stderr is not None
    lines = map(json.loads, watch.stdout)
    assert next(lines)["type"] == "watching"
    shell("kv", "put", "app/a", "1")
    assert next(lines)["value"] == "1"
    shell.daemon.stop()
    assert b"waiting for it" in watch.stderr.readline()
    shell.daemon.start()
    shell("kv", "put", "other", "x")
    shell("kv", "delete", "app/a")
    deleted = next(lines)
    assert (deleted["type"], deleted["key"]) == ("delete", "app/a")
    watch.send_signal(signal.SIGINT)
    assert watch.wait(DEADLINE_SECONDS) == 130
    assert watch.stderr.read() == b""
    watch.stdout.close()
    watch.stderr.close()


def test_a_watch_replays_from_a_revision_and_takes_one_key_if_asked(shell: Shell) -> None:
    first = shell.json("kv", "put", "app", "one", "--json")[0]["revision"]
    shell("kv", "put", "app2", "no")
    watch = shell.process("kv", "watch", "--exact", "app", "--from-revision", str(first))
    assert watch.stdout is not None
    assert watch.stdout.readline() == b"%d put app one\n" % first
    shell("kv", "put", "app2", "no")
    last = shell.json("kv", "put", "app", "two\n", "--json")[0]["revision"]
    assert watch.stdout.readline() == b"%d put app two\\n\n" % last
    watch.send_signal(signal.SIGINT)
    watch.communicate(timeout=DEADLINE_SECONDS)


def test_a_watch_that_would_have_to_skip_says_so(shell: Shell) -> None:
    for number in range(5):
        shell("kv", "put", "k", str(number))
    shell.daemon.run(shell.daemon.store.compact, shell.daemon.store.revision)
    watch = shell.process("kv", "watch", "--from-revision", "1")
    _, said = watch.communicate(timeout=DEADLINE_SECONDS)
    assert watch.returncode == MISSING
    assert b"watch anew" in said


def test_keys_complete_one_component_at_a_time(shell: Shell) -> None:
    fill(shell, ["app/db/host", "app/db/port", "app/name", "apple"])
    environment = {
        "_ASPEN_COMPLETE": "bash_complete",
        "COMP_WORDS": "aspen kv get app",
        "COMP_CWORD": "3",
        "ASPEN_STATE_DIR": str(shell.directory),
    }
    script = "from aspenfs.cli.aspen import main; main()"
    offered = subprocess.check_output([sys.executable, "-c", script], env=os.environ | environment)
    assert offered.split() == [b"plain,app/", b"plain,apple"]


# --- without a daemon ---


def test_without_a_daemon_the_exit_code_is_4_and_the_next_step_is_told(shell: Shell) -> None:
    shell.daemon.stop()
    result = shell("kv", "get", "k", code=UNREACHABLE)
    assert "no daemon answers" in result.stderr
    assert "aspen status" in result.stderr


def test_a_listing_goes_on_behind_its_last_key_when_the_daemon_comes_back(shell: Shell) -> None:
    names = [b"%05d" % number + b"x" * 900 for number in range(8_000)]
    fill(shell, [name.decode() for name in names])
    with Client(str(shell.daemon.path)) as client:
        listing = client.range(b"", b"", keys_only=True)
        seen = [next(listing).key]
        shell.daemon.stop()
        shell.daemon.start()
        seen += [record.key for record in listing]
        assert client.repeated
    assert seen == names


def test_an_abandoned_listing_is_not_taken_for_the_next_answer(shell: Shell) -> None:
    fill(shell, [f"{number:05}" for number in range(3_000)])
    with Client(str(shell.daemon.path)) as client:
        listing = client.range(b"", b"")
        next(listing)
        listing.close()
        record = client.get(b"00007")
    assert record is not None
    assert record.value == b"value of 00007"


def test_a_write_whose_answer_was_lost_is_sent_again_and_applied_once(shell: Shell) -> None:
    path = shell.directory / "between.sock"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen()
    between = threading.Thread(target=_lose_one_answer, args=(listening, shell.daemon.path))
    between.start()
    with Client(str(path)) as client:
        client.txn([], [{"op": "append", "key": b"k", "value": b"once"}])
        assert client.repeated
    between.join(DEADLINE_SECONDS)
    listening.close()
    assert shell.out("kv", "get", "k") == b"once"


def _lose_one_answer(listening: socket.socket, path: Path) -> None:
    """Hands frames to the daemon and back, but closes the first connection when its second answer comes."""
    for answers in (1, 2):
        client, _ = listening.accept()
        with client, Raw(path, hello=False) as daemon:
            for number in (1, 2):
                size = client.recv(protocol.HEADER_BYTES, socket.MSG_WAITALL)
                daemon.socket.sendall(size + client.recv(protocol.payload_size(size), socket.MSG_WAITALL))
                answer = daemon.receive()
                assert answer is not None
                if number <= answers:
                    client.sendall(protocol.encode(answer))


@pytest.fixture(scope="module")
def lasting_shell() -> Iterator[Shell]:
    with short_directory() as directory:
        shell = Shell(directory)
        with shell.daemon:
            yield shell


@settings(max_examples=30, deadline=None)
@given(key=st.binary(min_size=1, max_size=40), value=st.binary(max_size=40))
def test_any_key_is_reachable_by_base64(lasting_shell: Shell, key: bytes, value: bytes) -> None:
    name = base64.b64encode(key).decode()
    lasting_shell("kv", "put", "--key-base64", "--", name, "-", stdin=value)
    assert lasting_shell.out("kv", "get", "--key-base64", "--", name) == value
