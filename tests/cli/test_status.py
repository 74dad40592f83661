"""`aspen status`: with a daemon, without one, and with one that does not answer."""

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from aspenfs.cli.aspen import aspen
from aspenfs.cli.lock import StateLock
from aspenfs.cli.paths import StateDirectory
from aspenfs.runtime import identity
from aspenfs.runtime.system import SystemEntropy
from tests.runtime.controlled import Daemon, short_directory

HEALTHY, NOT_HEALTHY, NOT_RUNNING = 0, 1, 4


@pytest.fixture
def directory() -> Iterator[Path]:
    """The state directory of a node that is not running."""
    with short_directory() as path:
        identity.create(path, "demo", SystemEntropy())
        yield path


def status(directory: Path, *arguments: str, code: int) -> Result:
    runner = CliRunner()
    result = runner.invoke(aspen, ["--state-dir", str(directory), "--timeout", "30", "status", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_a_daemon_without_problems_is_healthy(directory: Path) -> None:
    with Daemon(
        directory / "ctl.sock",
        lambda: {
            "name": "demo",
            "members": [
                {
                    "name": "db1",
                    "id": 1,
                    "role": "leader",
                    "state": "here",
                    "lag": 0,
                    "topology": 3,
                    "addresses": ["192.0.2.7:7420"],
                    "since": None,
                    "cause": "",
                },
            ],
            "figures": {"blob_bytes": 5 << 20},
            "metrics": {"aspen_blob_bytes": {"type": "gauge", "value": 5 << 20}},
        },
    ):
        lines = status(directory, code=HEALTHY).output.splitlines()
        assert lines[0] == "healthy"
        assert [line.split() for line in lines[1:]] == [
            ["name", "demo"],
            ["blob", "bytes", "5", "MiB"],
            [],
            ["NAME", "ID", "ROLE", "STATE", "LAG", "TOPOLOGY", "ADDRESS"],
            ["db1", "1", "leader", "here", "0", "3", "192.0.2.7:7420"],
        ]
        body = json.loads(status(directory, "--json", code=HEALTHY).output)
    assert body["running"] is True
    assert body["healthy"] is True
    assert body["problems"] == []
    assert body["daemon"]["figures"]["blob_bytes"] == 5 << 20


def test_what_the_daemon_complains_about_is_told_with_the_next_step(directory: Path) -> None:
    def unhappy() -> dict[str, Any]:
        return {"problems": [{"cause": "no quorum", "advice": "start another node"}]}

    with Daemon(directory / "ctl.sock", unhappy):
        output = status(directory, code=NOT_HEALTHY).output
        body = json.loads(status(directory, "--json", code=NOT_HEALTHY).output)
    assert output.startswith("not healthy\n  ! no quorum\n    start another node\n")
    assert body["problems"] == [{"cause": "no quorum", "advice": "start another node"}]


def test_a_daemon_whose_mount_is_gone_is_not_healthy(directory: Path) -> None:
    with Daemon(directory / "ctl.sock", lambda: {"mountpoint": "/nonexistent/mount", "pid": 4711}):
        output = status(directory, code=NOT_HEALTHY).output
    assert "/nonexistent/mount is not its mount any more" in output
    assert "kill 4711" in output


def test_where_no_node_ever_was_it_tells_how_to_make_one(directory: Path) -> None:
    output = status(directory / "none", code=NOT_RUNNING).output
    assert output.startswith("not running\n")
    assert "does not exist" in output
    assert "aspen init" in output


def test_a_directory_without_a_cluster_is_no_node_yet() -> None:
    with short_directory() as path:
        output = status(path, code=NOT_RUNNING).output
    assert "holds no cluster" in output
    assert "aspen init" in output


def test_a_stopped_node_is_not_running(directory: Path) -> None:
    body = json.loads(status(directory, "--json", code=NOT_RUNNING).output)
    assert body["running"] is False
    assert body["daemon"] is None
    assert "no daemon runs" in body["problems"][0]["cause"]
    assert "mount -t aspen demo MOUNTPOINT" in body["problems"][0]["advice"]


def test_a_killed_daemon_is_told_from_a_stopped_one(directory: Path) -> None:
    (directory / "daemon.pid").write_text("4711\n")
    output = status(directory, code=NOT_RUNNING).output
    assert "the daemon with pid 4711 was killed or failed" in output
    assert "daemon.log" in output


def test_what_a_daemon_ended_with_is_told(directory: Path) -> None:
    log = directory / "daemon.log"
    log.write_text("2026-01-01 00:00:00,000 ERROR __main__ entries are lost: join again\n")
    output = status(directory, code=NOT_RUNNING).output
    assert "ended with an error: entries are lost: join again\n" in output
    with log.open("a") as file:
        file.write("2026-01-01 00:00:01,000 INFO __main__ stopping signal=SIGTERM\n")
    assert "entries are lost" not in status(directory, code=NOT_RUNNING).output


def test_a_daemon_at_work_that_does_not_answer_is_told_from_one_that_ended(directory: Path) -> None:
    with StateLock.acquire(StateDirectory(directory)):
        output = status(directory, code=NOT_RUNNING).output
        assert f"pid {os.getpid()} is at work" in output
        assert "does not answer" in output


def test_asking_for_the_status_takes_no_lock(directory: Path) -> None:
    lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT)
    try:
        status(directory, code=NOT_RUNNING)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(lock)


def test_a_daemon_that_hangs_is_given_up_after_the_timeout(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as mute:
        mute.bind(str(directory / "ctl.sock"))
        mute.listen()
        result = CliRunner().invoke(aspen, ["--state-dir", str(directory), "--timeout", "0.05", "status"])
    assert result.exit_code == NOT_RUNNING
