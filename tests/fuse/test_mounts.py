"""The mount table as text, and real mounts in every state: served, stale, hung, stacked, aborted."""

import errno
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aspenfs.fuse import mounts
from tests.fuse.toydaemon import DEADLINE_S, ToyDaemon

on_mount = pytest.mark.mount

TABLE = rb"""22 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,errors=remount-ro
55 22 0:51 / /mnt/with\040blank\134and\011tab rw,nosuid,nodev - fuse.aspen demo\043x rw,user_id=0,group_id=0
56 22 0:52 /sub /mnt/b rw shared:7 master:3 propagate_from:2 - fuse toyfs rw
this is no mount
57 22 0:53 / /mnt/\303\251 rw - fuse - rw
"""


def test_parse_reads_every_field_and_skips_what_it_does_not_understand() -> None:
    parsed = mounts.parse_mountinfo(TABLE)
    assert [mount.mount_id for mount in parsed] == [22, 55, 56, 57]
    assert parsed[1] == mounts.Mount(
        mount_id=55,
        parent_id=22,
        major=0,
        minor=51,
        root="/",
        mountpoint="/mnt/with blank\\and\ttab",
        options=("rw", "nosuid", "nodev"),
        fs_type="fuse.aspen",
        source="demo#x",
        super_options=("rw", "user_id=0", "group_id=0"),
    )


def test_parse_passes_over_any_number_of_optional_fields() -> None:
    assert mounts.parse_mountinfo(TABLE)[2][4:9] == ("/sub", "/mnt/b", ("rw",), "fuse", "toyfs")


def test_parse_takes_escapes_as_bytes_and_a_dash_as_a_source() -> None:
    odd = mounts.parse_mountinfo(TABLE)[3]
    assert odd.mountpoint == "/mnt/é"
    assert odd.source == "-"


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    return tmp_path / "a mount"


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is there may be slow to say so."""
    for function in (mounts.probe, mounts.is_stale):
        monkeypatch.setattr(function, "__kwdefaults__", {"timeout_s": DEADLINE_S})


@pytest.fixture
def fusectl() -> Iterator[Path]:
    """A fusectl mount of our own; not in pytest's tree, which other sessions rename when they clean up."""
    directory = Path(tempfile.mkdtemp(prefix="aspenfs-fusectl-"))
    try:
        subprocess.run(["mount", "-t", "fusectl", "none", str(directory)], check=True, timeout=DEADLINE_S)
        try:
            yield directory
        finally:
            subprocess.run(["umount", str(directory)], check=True, timeout=DEADLINE_S)
    finally:
        directory.rmdir()


@on_mount
def test_find_mount_sees_through_a_linked_parent_but_not_inside_the_mount(
    mountpoint: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert mounts.find_mount(mountpoint) is None
    with ToyDaemon(mountpoint) as toy:
        toy.run_in_mount("os.mkdir(m + '/d')")
        found = mounts.find_mount(link / mountpoint.name)
        assert found is not None
        assert found.mountpoint == str(mountpoint)
        assert (found.fs_type, found.source) == ("fuse", "toyfs")
        assert mounts.find_mount(mountpoint / "d") is None


@on_mount
def test_probe_tells_absent_served_hung_and_stale_apart(mountpoint: Path) -> None:
    mountpoint.mkdir()
    assert mounts.probe(mountpoint) is mounts.State.ABSENT
    with ToyDaemon(mountpoint, "--timeout", "60") as toy:
        toy.run_in_mount("os.stat(m)")  # the kernel now has the attributes, and would answer for the daemon
        assert mounts.probe(mountpoint) is mounts.State.SERVED
        toy.send_signal(signal.SIGSTOP)
        began_s = time.monotonic()
        assert mounts.probe(mountpoint, timeout_s=0.3) is mounts.State.HUNG
        assert time.monotonic() - began_s < 10.0
        toy.send_signal(signal.SIGKILL)
        toy.ends()
        assert mounts.probe(mountpoint) is mounts.State.STALE
        assert mounts.is_stale(mountpoint)
        assert mounts.recover_stale(mountpoint) == 1
        assert mounts.probe(mountpoint) is mounts.State.ABSENT


def test_probe_leaves_mounts_of_others_alone() -> None:
    assert mounts.find_mount("/proc") is not None
    assert mounts.probe("/proc") is mounts.State.ABSENT
    assert mounts.recover_stale("/proc") == 0
    assert os.path.ismount("/proc")


@on_mount
def test_recover_takes_away_stacked_stale_mounts_and_keeps_a_served_one(mountpoint: Path) -> None:
    with ToyDaemon(mountpoint) as served:
        assert mounts.recover_stale(mountpoint) == 0
        served.run_in_mount("os.stat(m)")
        with ToyDaemon(mountpoint) as middle, ToyDaemon(mountpoint) as top:
            found = mounts.find_mount(mountpoint)
            assert found is not None
            assert top.ask("connection") == {"connections": [found.minor]}
            for toy in (middle, top):
                toy.send_signal(signal.SIGKILL)
                toy.ends()
            assert mounts.recover_stale(mountpoint) == 2
            for toy in (middle, top):
                toy.forget()
        served.run_in_mount("os.stat(m)")


@on_mount
def test_connection_number_is_the_minor_number_of_the_mount(mountpoint: Path) -> None:
    with ToyDaemon(mountpoint) as toy:
        found = mounts.find_mount(mountpoint)
        assert found is not None
        assert toy.ask("connection") == {"connections": [found.minor]}


def test_connection_number_refuses_other_descriptors(tmp_path: Path) -> None:
    with (tmp_path / "f").open("w") as file, pytest.raises(OSError, match="no fuse connection") as raised:
        mounts.connection_number(file.fileno())
    assert raised.value.errno == errno.ENXIO


def _abort_frees_a_stuck_client(mountpoint: Path, fusectl: Path, given: Path) -> None:
    with ToyDaemon(mountpoint) as toy:
        found = mounts.find_mount(mountpoint)
        assert found is not None
        toy.run_in_mount("os.stat(m)")  # the kernel's first question is answered, nothing else waits
        toy.send_signal(signal.SIGSTOP)
        with toy.client(
            "print(1, flush=True)\ntry: os.stat(m)\nexcept OSError as e: print(e.errno, flush=True)"
        ) as client:
            assert client.stdout is not None
            client.stdout.readline()
            waiting = fusectl / str(found.minor) / "waiting"
            end_s = time.monotonic() + DEADLINE_S
            while waiting.read_text() == "0\n":
                assert time.monotonic() < end_s
                time.sleep(0.001)
            mounts.abort(found.minor, fusectl=given)
            output, _ = client.communicate(timeout=DEADLINE_S)
            assert int(output) in (errno.ECONNABORTED, errno.ENOTCONN)


@on_mount
def test_abort_through_fusectl_frees_a_client_of_a_hung_daemon(mountpoint: Path, fusectl: Path) -> None:
    _abort_frees_a_stuck_client(mountpoint, fusectl, fusectl)


@on_mount
def test_abort_without_fusectl_frees_a_client_of_a_hung_daemon(
    mountpoint: Path, fusectl: Path, tmp_path: Path
) -> None:
    _abort_frees_a_stuck_client(mountpoint, fusectl, tmp_path / "not mounted")


def test_abort_of_an_unknown_connection_is_an_error() -> None:
    with pytest.raises(OSError, match="no fuse connection 999999"):
        mounts.abort(999_999)


@on_mount
def test_set_read_ahead_changes_the_mount_and_nothing_else(mountpoint: Path) -> None:
    with ToyDaemon(mountpoint) as toy:
        found = mounts.find_mount(mountpoint)
        assert found is not None
        toy.run_in_mount("os.stat(m)")  # the reply to INIT sets the read-ahead too: let it come first
        mounts.set_read_ahead(mountpoint, 1024)
        assert (mounts.BDI / f"0:{found.minor}" / "read_ahead_kb").read_text() == "1024\n"
    with pytest.raises(OSError, match="nothing is mounted here"):
        mounts.set_read_ahead(mountpoint, 1024)


@on_mount
def test_background_limits_are_raised_and_never_lowered(mountpoint: Path, fusectl: Path) -> None:
    with ToyDaemon(mountpoint) as toy:
        [connection] = toy.ask("connection")["connections"]
        assert mounts.raise_background_limits(connection, 64, 48, fusectl=fusectl)
        assert mounts.raise_background_limits(connection, 20, 10, fusectl=fusectl)
        control = fusectl / str(connection)
        assert (control / "max_background").read_text() == "64\n"
        assert (control / "congestion_threshold").read_text() == "48\n"
        assert not mounts.raise_background_limits(connection, 64, 48, fusectl=mountpoint.parent)
