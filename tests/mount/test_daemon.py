"""The daemon as a process: how it starts, refuses, ends and recovers, and what it holds on to."""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.mounting import BIN, ROOT, Mount, alive, wait_for
from tests.mount.processes import Service
from tests.mount.torture import Torture

pytestmark = pytest.mark.mount
MOUNT_FAILED = 32  # mount(8)
DEAD = f"{os.strerror(errno.ENOTCONN)}|{os.strerror(errno.ECONNABORTED)}"
OPERATIONS = 2000  # of five kinds, ten thousand in all
GROWTH_KIB_MAX = 16 << 10


@pytest.fixture
def unmounted() -> Iterator[Mount]:
    """Directories for a mount that the test starts in its own way."""
    mount = Mount()
    try:
        yield mount
    finally:
        mount.close()


def mount_aspen(mount: Mount, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aspenfs.cli.mount", *arguments],
        env={**os.environ, **mount.environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# --- ending ---


def test_sigterm_unmounts_flushes_and_exits_with_0(unmounted: Mount) -> None:
    service = Service(unmounted)
    assert service.hear()["READY"] == "1"
    (unmounted.mountpoint / "files" / "f").write_bytes(b"x" * 100_000)
    (unmounted.mountpoint / "kv" / "k").write_bytes(b"v")
    code, log = service.end()
    assert code == 0, log
    assert not unmounted.is_mounted()
    assert not list(unmounted.mountpoint.iterdir())
    assert not (unmounted.state / "daemon.pid").exists()
    assert "Traceback" not in log
    unmounted.start()
    assert (unmounted.mountpoint / "files" / "f").read_bytes() == b"x" * 100_000
    assert (unmounted.mountpoint / "kv" / "k").read_bytes() == b"v"


def test_sigint_in_the_foreground_is_a_regular_end(unmounted: Mount) -> None:
    service = Service(unmounted)
    service.hear()
    code, log = service.end(signal.SIGINT)
    assert code == 0, log
    assert not unmounted.is_mounted()


def test_sigterm_under_load_loses_nothing_that_was_acknowledged(own_mount: Mount) -> None:
    torture = Torture(own_mount, seed=2)
    assert torture.round(signal.SIGTERM).operations > 10
    torture.finish()


def test_sigterm_ends_the_daemon_though_files_are_open(unmounted: Mount) -> None:
    service = Service(unmounted)
    service.hear()
    file = os.open(unmounted.mountpoint / "files" / "f", os.O_WRONLY | os.O_CREAT)
    os.write(file, b"before")
    code, log = service.end()
    assert code == 0, log
    with pytest.raises(OSError, match=DEAD):
        os.write(file, b"after")
    with contextlib.suppress(OSError):  # closing tells the same error, and closes
        os.close(file)
    unmounted.start()
    assert (unmounted.mountpoint / "files" / "f").read_bytes() == b"before"


def test_umount_of_a_busy_mount_is_refused_and_changes_nothing(own_mount: Mount) -> None:
    with open(own_mount.mountpoint / "files" / "f", "wb", buffering=0) as file:
        done = subprocess.run(
            ["umount", str(own_mount.mountpoint)], capture_output=True, check=False, timeout=30
        )
        assert done.returncode == MOUNT_FAILED
        file.write(b"still here")
        assert (own_mount.mountpoint / "files" / "f").read_bytes() == b"still here"
        own_mount.assert_healthy()
    own_mount.stop()


def test_after_a_lazy_umount_open_files_work_until_the_last_is_closed(own_mount: Mount) -> None:
    pid = own_mount.pid
    with open(own_mount.mountpoint / "files" / "f", "wb", buffering=0) as file:
        subprocess.run(
            ["umount", "-l", str(own_mount.mountpoint)], check=True, capture_output=True, timeout=30
        )
        file.write(b"written behind the umount")
        os.fsync(file.fileno())
        assert alive(pid)
    assert wait_for(lambda: not alive(pid), 30)
    own_mount.start()
    assert (own_mount.mountpoint / "files" / "f").read_bytes() == b"written behind the umount"


# --- starting ---


def test_systemd_is_told_ready_when_the_mount_answers_and_stopping_at_the_end(unmounted: Mount) -> None:
    service = Service(unmounted)
    assert service.hear() == {"READY": "1", "STATUS": "mounted"}
    assert sorted(os.listdir(unmounted.mountpoint)) == ["cluster", "files", "kv"]
    service.process.send_signal(signal.SIGTERM)
    assert service.hear() == {"STOPPING": "1"}
    assert service.wait()[0] == 0


def test_a_failed_start_in_the_foreground_tells_systemd_and_stderr_why(
    own_mount: Mount, unmounted: Mount
) -> None:
    unmounted.state = own_mount.state
    service = Service(unmounted)
    status = service.hear()["STATUS"]
    code, text = service.wait()
    unmounted.pid = 0
    assert code == MOUNT_FAILED
    assert f"in use by the daemon with pid {own_mount.pid}" in status
    assert status in text


def test_second_daemon_on_a_state_directory_is_refused_with_the_pid_of_the_first(
    own_mount: Mount, unmounted: Mount
) -> None:
    options = f"state_dir={own_mount.state}"
    done = mount_aspen(own_mount, "demo", str(unmounted.mountpoint), "-o", options)
    assert done.returncode == MOUNT_FAILED
    assert f"in use by the daemon with pid {own_mount.pid}" in done.stderr
    assert not unmounted.is_mounted()
    assert int((own_mount.state / "daemon.pid").read_text()) == own_mount.pid
    (own_mount.mountpoint / "files" / "f").write_bytes(b"undisturbed")


def test_second_mount_at_one_place_is_refused(own_mount: Mount, unmounted: Mount) -> None:
    options = f"create,state_dir={unmounted.state}"
    done = mount_aspen(own_mount, "other", str(own_mount.mountpoint), "-o", options)
    assert done.returncode == MOUNT_FAILED
    assert "demo is already mounted here" in done.stderr
    own_mount.assert_healthy()


def test_stale_mount_of_a_killed_daemon_is_removed_at_the_next_start(own_mount: Mount) -> None:
    (own_mount.mountpoint / "files" / "f").write_bytes(b"kept")
    own_mount.kill()
    with pytest.raises(OSError, match=DEAD):
        os.listdir(own_mount.mountpoint)
    options = f"state_dir={own_mount.state}"
    done = mount_aspen(own_mount, "demo", str(own_mount.mountpoint), "-o", options)
    own_mount.pid = int((own_mount.state / "daemon.pid").read_text())
    assert done.returncode == 0, done.stderr
    assert "removed the mount that a killed daemon had left" in done.stderr
    table = Path("/proc/self/mountinfo").read_text()
    assert table.count(f" {own_mount.mountpoint} ") == 1
    assert (own_mount.mountpoint / "files" / "f").read_bytes() == b"kept"


def test_state_with_a_damaged_log_is_not_mounted(own_mount: Mount) -> None:
    for number in range(200):
        with open(own_mount.mountpoint / "kv" / f"key{number}", "wb") as file:
            file.write(b"v" * 100)
            if not number % 50:
                os.fsync(file.fileno())  # what is not synced yet may be torn; this must be whole
    own_mount.kill()
    (segment,) = (path for path in (own_mount.state / "wal").glob("*.wal") if b"key30" in path.read_bytes())
    data = segment.read_bytes()
    at = data.index(b"key30")
    segment.write_bytes(data[:at] + b"?" + data[at + 1 :])
    done = mount_aspen(own_mount, "demo", str(own_mount.mountpoint), "-o", f"state_dir={own_mount.state}")
    own_mount.pid = 0
    assert done.returncode == MOUNT_FAILED
    assert f"{segment.name}: corrupt at offset" in done.stderr
    assert not own_mount.is_mounted()
    segment.write_bytes(data)
    own_mount.start()
    assert len(os.listdir(own_mount.mountpoint / "kv")) == 200


def test_a_node_whose_log_and_state_are_gone_is_not_mounted_as_an_empty_cluster(own_mount: Mount) -> None:
    (own_mount.mountpoint / "files" / "f").write_bytes(b"kept")
    own_mount.kill()
    away = own_mount.base / "away"
    away.mkdir()
    for name in ("wal", "state", "blobs"):
        (own_mount.state / name).rename(away / name)
    for options in ("", ",create"):
        done = mount_aspen(own_mount, "demo", str(own_mount.mountpoint), "-o",
                           f"state_dir={own_mount.state}{options}")  # fmt: skip
        assert done.returncode == MOUNT_FAILED
        assert "aspen restore" in done.stderr
        assert not own_mount.is_mounted()
    own_mount.pid = 0
    assert b"are not there" in own_mount.aspen("check", "--offline", check=False)
    for name in ("wal", "state", "blobs"):
        (away / name).rename(own_mount.state / name)
    own_mount.start()
    assert (own_mount.mountpoint / "files" / "f").read_bytes() == b"kept"


def test_a_node_that_was_killed_before_it_began_its_log_can_be_mounted(own_mount: Mount) -> None:
    own_mount.kill()
    for left in (["cluster.json"], ["cluster.json", "wal"], ["cluster.json", "wal", "incarnation"]):
        for path in own_mount.state.iterdir():
            if path.name not in left:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for segment in (own_mount.state / "wal").glob("*.wal"):
            segment.unlink()
        own_mount.start("")
        assert (own_mount.mountpoint / "cluster" / "health").read_text() == "ok\n"
        own_mount.kill()


# --- what is mounted ---


def test_read_only_mount_shows_everything_and_changes_nothing(own_mount: Mount) -> None:
    file, key = own_mount.mountpoint / "files" / "f", own_mount.mountpoint / "kv" / "k"
    file.write_bytes(b"old")
    key.write_bytes(b"old")
    own_mount.stop()
    own_mount.start("ro")
    refusals: list[Callable[[], object]] = [
        lambda: file.write_bytes(b"new"),
        lambda: key.write_bytes(b"new"),
        file.unlink,
        lambda: (own_mount.mountpoint / "files" / "d").mkdir(),
        lambda: os.truncate(file, 0),
        lambda: os.setxattr(file, "user.x", b"y"),
    ]
    for change in refusals:
        with pytest.raises(OSError, match=os.strerror(errno.EROFS)):
            change()
    assert (file.read_bytes(), key.read_bytes()) == (b"old", b"old")
    own_mount.assert_healthy()


def test_subtree_becomes_the_root_of_the_mount(own_mount: Mount) -> None:
    directory = own_mount.mountpoint / "files" / "a" / "b c"
    directory.mkdir(parents=True)
    (directory / "f").write_bytes(b"deep")
    own_mount.stop()
    own_mount.start(spec="demo:/files/a/b c")
    assert os.listdir(own_mount.mountpoint) == ["f"]
    assert (own_mount.mountpoint / "f").read_bytes() == b"deep"
    (own_mount.mountpoint / "g").write_bytes(b"new")
    assert sorted(os.listdir(own_mount.mountpoint / "..")) == sorted(os.listdir(own_mount.base))
    own_mount.stop()
    own_mount.start(spec="demo:/kv")
    assert os.listdir(own_mount.mountpoint) == []
    own_mount.stop()
    own_mount.start()
    assert (directory / "g").read_bytes() == b"new"


def test_subtree_that_is_not_there_is_refused_by_name(own_mount: Mount) -> None:
    own_mount.stop()
    where = str(own_mount.mountpoint)
    done = mount_aspen(own_mount, "demo:/files/nowhere", where, "-o", f"state_dir={own_mount.state}")
    assert done.returncode == MOUNT_FAILED
    assert "/files/nowhere" in done.stderr
    assert not own_mount.is_mounted()


@pytest.mark.parametrize("way", ["type", "fstab"])
def test_mount_8_finds_mount_aspen_and_hands_everything_on(unmounted: Mount, way: str) -> None:
    """In a mount namespace of its own, where /sbin holds our helper alone; it ends with its last process."""
    base = unmounted.base
    helpers = base / "sbin"
    helpers.mkdir()
    helper = helpers / "mount.aspen"
    helper.write_text(f'#!/bin/sh\nexec {BIN / "mount.aspen"} "$@"\n')
    helper.chmod(0o755)
    options = f"create,_netdev,x-systemd.requires=network.target,nofail,noatime,state_dir={unmounted.state}"
    where = unmounted.mountpoint
    (base / "fstab").write_text(f"demo:/files {where} aspen {options} 0 0\n")
    command = {
        "type": f"mount -t aspen -o {options} demo:/files {where}",
        "fstab": f"mount --fstab {base}/fstab {where}",
    }[way]
    script = f"""
        set -eu
        mount --bind {helpers} "$(readlink -f /sbin)"
        {command}
        echo through mount > {where}/f
        cat {where}/f
        grep ' {where} ' /proc/self/mountinfo
        pid=$(cat {unmounted.state}/daemon.pid)
        umount {where}
        while [ -e /proc/$pid ]; do read -t 0.05 < {base}/never || true; done
    """
    os.mkfifo(base / "never")
    done = subprocess.run(
        ["unshare", "--mount", "bash", "-c", script.replace(f"< {base}/never", f"<> {base}/never")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, table = done.stdout.splitlines()
    assert said == "through mount"
    assert re.search(r"noatime.* - fuse\.aspen demo:/files ", table)
    unmounted.start()
    assert (where / "files" / "f").read_text() == "through mount\n"


# --- living ---


def odd_calls(files: Path) -> Iterator[Callable[[], object]]:
    """What programs rarely do, and some that they never should."""
    path = files / "odd"
    path.write_bytes(b"odd")
    descriptor = os.open(path, os.O_RDWR)
    odd = os.fsencode(files) + b"/\xff\xfe\n\x01"
    yield lambda: fcntl.ioctl(descriptor, 0x12345678)
    yield lambda: fcntl.ioctl(descriptor, 0x80086601, bytes(8))  # FS_IOC_GETFLAGS
    yield lambda: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield lambda: fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield lambda: os.posix_fallocate(descriptor, 0, 1 << 20)
    yield lambda: os.lseek(descriptor, 0, os.SEEK_HOLE)
    yield lambda: os.lseek(descriptor, -5, os.SEEK_SET)
    yield lambda: os.open(files, os.O_TMPFILE | os.O_RDWR)
    yield lambda: os.pwrite(descriptor, b"x", (1 << 63) - 2)
    yield lambda: os.ftruncate(descriptor, (1 << 63) - 1)
    yield lambda: os.pread(descriptor, 10, (1 << 62))
    yield lambda: os.copy_file_range(descriptor, descriptor, 1, 0, 2)
    yield lambda: os.sendfile(descriptor, descriptor, 0, 3)
    yield lambda: mmap.mmap(descriptor, 0)[0]
    yield lambda: os.close(os.open(odd, os.O_CREAT | os.O_RDWR))
    yield lambda: os.rename(odd, odd + b"\xe9" * 300)
    yield lambda: os.mkdir(os.fsencode(files) + b"/" + b"n" * 256)
    yield lambda: os.symlink(b"t" * 4095, files / "long")
    yield lambda: os.symlink(b"", files / "empty")
    yield lambda: os.link(files, files / "linked")
    yield lambda: os.setxattr(path, "user." + "n" * 250, b"v")
    yield lambda: os.setxattr(path, "user.big", b"v" * 65536)
    yield lambda: os.setxattr(path, "system.unknown", b"v")
    yield lambda: os.setxattr(path, "security.capability", b"nonsense")
    yield lambda: os.setxattr(path, "system.posix_acl_access", b"nonsense")
    yield lambda: os.getxattr(path, "user.nothing")
    yield lambda: os.removexattr(path, "user.nothing")
    yield lambda: os.mknod(files / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    yield lambda: os.mknod(files / "strange", 0o170000 | 0o600)
    yield lambda: os.mkfifo(files / "fifo")
    yield lambda: bind(files / "socket")
    yield lambda: os.chown(path, 2**32 - 2, 2**32 - 2)
    yield lambda: os.utime(path, ns=(-1, 2**62))
    yield lambda: os.chmod(path, 0o7777)
    yield lambda: os.rmdir(files)
    yield lambda: os.rename(files, files.parent / "kv" / "x")
    yield lambda: os.rename(path, files.parent / "kv" / "x")
    yield lambda: os.unlink(files.parent / "cluster" / "status")
    yield lambda: (files.parent / "top").mkdir()
    yield lambda: (files.parent / "kv" / "k").write_bytes(bytes((1 << 20) + 1))
    yield lambda: (files.parent / "kv" / ("c" * 255) / "d").mkdir(parents=True)
    yield lambda: os.statvfs(files.parent)
    yield lambda: os.close(descriptor)


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def test_odd_calls_get_an_answer_and_never_end_the_mount(own_mount: Mount) -> None:
    answers = []
    for call in odd_calls(own_mount.mountpoint / "files"):
        try:
            call()
            answers.append("done")
        except (OSError, ValueError, OverflowError) as error:
            answers.append(f"refused: {error}")
        own_mount.assert_healthy()
    assert answers.count("done") > 10
    assert len([one for one in answers if "refused" in one]) > 10
    assert not [one for one in answers if re.search(f"{os.strerror(errno.EIO)}|{DEAD}", one)]
    assert own_mount.aspen("check").endswith(b"clean\n")


def test_clients_that_die_inside_a_call_do_no_harm(own_mount: Mount) -> None:
    files = own_mount.mountpoint / "files"
    script = (
        "import os, sys\nf = open(sys.argv[1], 'wb', 0)\nwhile True: os.pwrite(f.fileno(), bytes(3 << 20), 0)"
    )
    path = files / "f"
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", script, str(path)]) as client:
            assert wait_for(lambda: path.exists() and path.stat().st_size > 0, 30)
            client.kill()
        path.unlink()
    own_mount.assert_healthy()
    assert own_mount.aspen("check").endswith(b"clean\n")


def held(pid: int) -> tuple[int, int]:
    """Open descriptors, and resident memory in KiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return len(os.listdir(f"/proc/{pid}/fd")), int(found[1])


def work(files: Path, count: int) -> None:
    data = bytes(3000)
    for number in range(count):
        path = files / f"n{number % 50}"
        with open(path, "wb", buffering=0) as file:
            file.write(data)
        assert len(path.read_bytes()) == 3000
        os.stat(path)
        os.rename(path, files / "renamed")
        os.unlink(files / "renamed")
        with contextlib.suppress(FileNotFoundError):
            os.stat(files / "missing")


def test_ten_thousand_operations_leave_no_descriptors_and_no_memory_behind(own_mount: Mount) -> None:
    files = own_mount.mountpoint / "files"
    work(files, OPERATIONS)  # until caches, pools and the log's first segments have their size
    descriptors, memory = held(own_mount.pid)
    work(files, OPERATIONS)
    # What is given back now and then may not have been, yet.
    assert wait_for(lambda: held(own_mount.pid)[0] <= descriptors, 30)
    assert wait_for(lambda: held(own_mount.pid)[1] - memory < GROWTH_KIB_MAX, 30)
    own_mount.assert_healthy()


def test_aspen_sync_waits_until_everything_is_committed(mount: Mount) -> None:
    def figures() -> dict[str, int]:
        status = json.loads((mount.mountpoint / "cluster" / "status.json").read_text())
        return dict(status["figures"])

    for number in range(20):
        (mount.mountpoint / "files" / f"sync-{number}").write_bytes(b"x" * 100)
        written = figures()["revision"]
        told = json.loads(mount.aspen("sync", "--json"))["revision"]
        assert figures()["durable"] >= told >= written


def test_the_online_check_looks_at_what_was_just_written(own_mount: Mount) -> None:
    """Also right after a recovery, when the state database does not have the log's tail yet."""
    files = own_mount.mountpoint / "files"
    for number in range(50):
        (files / f"f{number}").write_bytes(b"x" * 20_000)
    assert json.loads(own_mount.aspen("check", "--json"))["totals"]["inodes"] == 51
    own_mount.kill()
    own_mount.start()
    totals = json.loads(own_mount.aspen("check", "--json"))["totals"]
    assert (totals["inodes"], totals["chunks"]) == (51, 1)
