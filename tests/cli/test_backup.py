"""`aspen backup`, `restore`, `recover`: files, names, exit codes, and what is said."""

import io
import json
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from aspenfs import errors
from aspenfs.cli import mount
from aspenfs.cli.aspen import aspen
from aspenfs.cli.lock import StateLock
from aspenfs.cli.options import parse_mount
from aspenfs.cli.paths import StateDirectory
from aspenfs.runtime import identity, swap
from aspenfs.runtime.backup.restoring import restore
from aspenfs.runtime.control_command import Call
from aspenfs.runtime.statedb import StateDb
from aspenfs.runtime.system import SystemClock, SystemEntropy
from tests.runtime.backed_up import a_backup
from tests.runtime.controlled import Daemon, short_directory
from tests.runtime.test_backup_recovering import a_survivor

REFUSED, USAGE, UNREACHABLE = 1, 2, 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return a_backup(tmp_path_factory.mktemp("node"))


class Sender:
    """A daemon's answer: `data` in pieces, the last of them followed by what `then` raises."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.then: Exception | None = None
        self.params: dict[str, Any] = {}

    async def handle(self, call: Call) -> dict[str, Any]:
        self.params = dict(call.params)
        for at in range(0, len(self.data), 100_000):
            await call.item({"data": self.data[at : at + 100_000], "rows_total": 50, "blobs_total": 4})
        if self.then is not None:
            raise self.then
        return {}


@pytest.fixture
def place() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
def sender(place: Path, whole: bytes) -> Iterator[Sender]:
    sender = Sender(whole)
    with Daemon(place / "ctl.sock", extra={"backup": sender.handle}):
        yield sender


def run(place: Path, *arguments: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(aspen, ["--state-dir", str(place), *arguments], input=stdin)


def test_a_backup_becomes_a_file_of_its_owner_alone(
    place: Path, sender: Sender, tmp_path: Path, whole: bytes
) -> None:
    target = tmp_path / "demo.aspen"
    result = run(place, "backup", str(target))
    assert result.exit_code == 0, result.output
    assert "revision" in result.stdout
    assert "4 chunks" in result.stdout
    assert target.read_bytes() == whole
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["demo.aspen"]
    assert sender.params == {"stale": False, "skip_damaged": False}


def test_options_reach_the_daemon_and_json_tells_what_is_in_it(
    place: Path, sender: Sender, tmp_path: Path
) -> None:
    result = run(place, "backup", "--stale", "--skip-damaged", "--json", str(tmp_path / "b"))
    assert result.exit_code == 0
    assert sender.params == {"stale": True, "skip_damaged": True}
    told = json.loads(result.stdout)
    assert told.keys() == {
        "file", "cluster", "cluster_id", "revision", "created", "rows", "blobs", "bytes", "lost"}  # fmt: skip
    assert (told["cluster"], told["blobs"], told["lost"]) == ("aspen", 4, [])
    assert json.loads(run(place, "backup", "--verify", "--json", str(tmp_path / "b")).stdout) == told


def test_a_file_that_is_there_stays_until_told_otherwise(
    place: Path, sender: Sender, tmp_path: Path
) -> None:
    target = tmp_path / "demo.aspen"
    target.write_text("dear")
    result = run(place, "backup", str(target))
    assert (result.exit_code, target.read_text()) == (REFUSED, "dear")
    assert "--force" in result.stderr
    assert run(place, "backup", "--force", str(target)).exit_code == 0
    assert target.stat().st_size == len(sender.data)
    assert os.listdir(tmp_path) == ["demo.aspen"]


def test_a_file_that_comes_meanwhile_stays_too(place: Path, sender: Sender, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    target = tmp_path / "demo.aspen"
    link = os.link

    def linked(*arguments: Any) -> None:
        target.write_text("quicker")
        link(*arguments)

    monkeypatch.setattr(os, "link", linked)
    assert run(place, "backup", str(target)).exit_code == REFUSED
    assert target.read_text() == "quicker"
    assert os.listdir(tmp_path) == ["demo.aspen"]


@pytest.mark.parametrize("what", ["cut", "damaged", "failed", "gone"])
def test_what_is_not_whole_leaves_no_file(place: Path, sender: Sender, tmp_path: Path, what: str) -> None:
    code = REFUSED
    if what == "cut":
        sender.data = sender.data[:-10]
    elif what == "damaged":
        sender.data = sender.data[:200_000] + b"?" + sender.data[200_001:]
    elif what == "failed":
        sender.data, sender.then = sender.data[:300_000], errors.NoQuorum("nobody answers")
    else:
        code = UNREACHABLE
        place = tmp_path  # where no daemon is
    result = run(place, "backup", str(tmp_path / "b"))
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("waiting for the daemon\n")
    assert "aspen: " in result.stderr
    assert os.listdir(tmp_path) == []


def test_stdout_gets_the_bytes_and_nothing_else(place: Path, sender: Sender, whole: bytes) -> None:
    result = run(place, "backup", "-")
    assert result.exit_code == 0
    assert result.stdout_bytes == whole
    assert "the backup written" in result.stderr
    assert run(place, "backup", "-", "--json").exit_code == USAGE
    assert run(place, "backup", "--verify", "--force", "x").exit_code == USAGE


def test_a_pipe_is_written_as_it_is(place: Path, sender: Sender, tmp_path: Path, whole: bytes) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    assert run(place, "backup", str(pipe)).exit_code == 0
    reader.join()
    assert read == [whole]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_verifying_names_offset_and_cause(place: Path, tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "b"
    path.write_bytes(whole)
    assert run(place, "backup", "--verify", str(path)).exit_code == 0
    assert run(place, "backup", "--verify", "-", stdin=whole).exit_code == 0
    path.write_bytes(whole[:250_000])
    result = run(place, "backup", "--verify", str(path))
    assert result.exit_code == REFUSED
    assert f"{path}: corrupt at offset" in result.stderr
    assert "cut off" in result.stderr
    assert run(place, "backup", "--verify", str(tmp_path / "never")).exit_code == REFUSED


# --- restore ---


def test_a_restored_cluster_is_told_with_what_to_do_next(tmp_path: Path, whole: bytes) -> None:
    backup, target = tmp_path / "b", tmp_path / "new" / "node"
    backup.write_bytes(whole)
    result = run(tmp_path, "restore", str(backup), "--state-dir", str(target), "--name", "demo2")
    assert result.exit_code == 0, result.output
    assert f"mount -t aspen -o state_dir={target} demo2" in result.stdout
    node = identity.read(target)
    assert node is not None
    assert node.name == "demo2"
    assert stat.S_IMODE(target.stat().st_mode) == 0o700
    again = run(tmp_path, "restore", str(backup), "--state-dir", str(target))
    assert again.exit_code == REFUSED
    assert "holds a node of the cluster 'demo2'" in again.stderr
    assert identity.read(target) == node


def test_it_is_restored_from_stdin_and_told_as_json(tmp_path: Path, whole: bytes) -> None:
    result = run(tmp_path / "node", "restore", "-", "--json", stdin=whole)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told.keys() == {"state_directory", "cluster", "cluster_id", "node", "revision", "backup"}
    assert told["revision"] > told["backup"]["revision"]
    assert told["state_directory"] == str(tmp_path / "node")


def test_a_damaged_file_leaves_not_even_the_directory(tmp_path: Path, whole: bytes) -> None:
    backup = tmp_path / "b"
    backup.write_bytes(whole[:-1])
    result = run(tmp_path, "restore", str(backup), "--state-dir", str(tmp_path / "a" / "b"))
    assert result.exit_code == REFUSED
    assert f"{backup}: corrupt at offset" in result.stderr
    assert os.listdir(tmp_path) == ["b"]


def test_a_directory_in_use_is_left_alone(tmp_path: Path, whole: bytes) -> None:
    with StateLock.acquire(StateDirectory(tmp_path)):
        assert run(tmp_path, "restore", "-", stdin=whole).exit_code == REFUSED
        assert run(tmp_path, "recover", "--force-new-cluster", "--yes").exit_code == REFUSED


# --- recover ---


def test_without_a_yes_it_warns_and_changes_nothing(tmp_path: Path) -> None:
    last = a_survivor(tmp_path)
    before = identity.read(tmp_path)
    result = run(tmp_path, "recover", "--force-new-cluster")
    assert result.exit_code == REFUSED
    for words in ("node4711 (4711)", f"entry {last} of term 8", "is lost", "must never run again", "--yes"):
        assert words in result.stdout
    assert identity.read(tmp_path) == before
    told = json.loads(run(tmp_path, "recover", "--force-new-cluster", "--json").stdout)
    assert (told["last_index"], told["last_term"], told["others"]) == (last, 8, ["node4711 (4711)"])
    assert run(tmp_path, "recover").exit_code == USAGE
    assert run(tmp_path, "recover", "--yes").exit_code == USAGE


def test_with_a_yes_it_is_a_new_cluster(tmp_path: Path) -> None:
    last = a_survivor(tmp_path)
    before = identity.read(tmp_path)
    assert before is not None
    result = run(tmp_path, "recover", "--force-new-cluster", "--yes", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    after = identity.read(tmp_path)
    assert after is not None
    assert told["cluster_id"] == after.cluster_id.hex() != before.cluster_id.hex()
    assert told["revision"] > last
    state = StateDb(tmp_path / "state")
    assert state.applied_index == told["revision"]
    state.close()


def test_where_no_node_is_there_is_nothing_to_recover(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "never"):
        result = run(place, "recover", "--force-new-cluster", "--yes")
        assert result.exit_code == REFUSED
        assert "no node here" in result.stderr
    assert not (tmp_path / "never").exists()



def test_a_restore_killed_when_all_was_decided_is_finished_by_the_next_mount(
    tmp_path: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "node"
    target.mkdir()

    def killed(_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(swap, "carry_out", killed)
        with pytest.raises(KeyboardInterrupt):
            restore(io.BytesIO(whole), "b", target, name="demo", clock=SystemClock(), entropy=SystemEntropy())
    assert identity.read(target) is None
    (tmp_path / "mnt").mkdir()
    options = parse_mount(
        "demo", str(tmp_path / "mnt"), [f"state_dir={target}"], environ=os.environ, uid=os.geteuid()
    )
    assert mount._prepare_state(options).path == target
    node = identity.read(target)
    assert node is not None
    assert node.name == "demo"
    assert sorted(path.name for path in target.iterdir()) == ["blobs", "cluster.json", "lock", "state", "wal"]
