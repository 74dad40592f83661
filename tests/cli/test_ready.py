"""How a daemon reports its start: to `mount.aspen` through a pipe, to systemd through a socket."""

import os
import socket
from pathlib import Path

import pytest

from aspenfs.cli.ready import READY_FD_VARIABLE, await_report, ready_fd, report, sd_notify


def test_report_arrives_and_closes_the_pipe() -> None:
    reader, writer = os.pipe()
    report(writer, {"error": "no such\nluck", "exit": 32})
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(writer)
    assert await_report(reader) == {"error": "no such\nluck", "exit": 32}


@pytest.mark.parametrize("said", [b"", b'{"ready": tr'])
def test_daemon_that_ends_without_a_whole_report_has_said_nothing(said: bytes) -> None:
    reader, writer = os.pipe()
    os.write(writer, said)
    os.close(writer)
    assert await_report(reader) is None


def test_who_waits_for_a_report_may_look_around_meanwhile() -> None:
    reader, writer = os.pipe()
    looks = []

    def look() -> None:
        looks.append(1)
        if len(looks) == 2:
            report(writer, {"ready": True})

    assert await_report(reader, look) == {"ready": True}
    assert len(looks) == 2


def test_report_that_nobody_waits_for_harms_nobody() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    report(writer, {"ready": True})
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(writer)


def test_error_in_the_foreground_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    report(None, {"error": "no luck", "exit": 32})
    assert capsys.readouterr().err == "mount.aspen: no luck\n"


def test_warning_in_the_foreground_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    report(None, {"ready": True, "warning": "removed"})
    assert capsys.readouterr().err == "mount.aspen: warning: removed\n"


def test_children_of_the_daemon_do_not_keep_the_pipe_open() -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    assert ready_fd({READY_FD_VARIABLE: str(writer)}) == writer
    assert not os.get_inheritable(writer)
    assert ready_fd({}) is None
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("abstract", [False, True])
def test_systemd_hears_that_the_mount_is_ready(tmp_path: Path, abstract: bool) -> None:
    name = f"{tmp_path}/notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + name if abstract else name)
        sd_notify("READY=1\nSTATUS=mounted", {"NOTIFY_SOCKET": "@" + name if abstract else name})
        assert manager.recv(4096) == b"READY=1\nSTATUS=mounted"


def test_service_manager_that_is_gone_costs_nobody_the_mount(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sd_notify("READY=1", {"NOTIFY_SOCKET": f"{tmp_path}/gone"})
    assert "NOTIFY_SOCKET" in capsys.readouterr().err
    sd_notify("READY=1", {})
    assert capsys.readouterr().err == ""
