"""The state directory on a disk that is full: an error for who writes, and nothing else."""

import errno
import os
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.mount.mounting import Mount, alive, wait_for

pytestmark = pytest.mark.mount
DISK_BYTES = 384 << 20  # 128 MiB are for the log, 48 are kept back
CHUNK = 1 << 20
RECOVERY_S = 60.0


@pytest.fixture
def disk() -> Iterator[Path]:
    """A small ext4 of its own on a loop device, which goes with its mount."""
    base = Path(tempfile.mkdtemp(prefix="aspen-full-"))
    image, mountpoint = base / "image", base / "disk"
    mountpoint.mkdir()
    with image.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", str(image), str(mountpoint)], check=True, timeout=30)
    try:
        yield mountpoint
    finally:
        # The threads of a daemon that was killed may hold on to it for a moment.
        command = ["umount", str(mountpoint)]
        assert wait_for(lambda: not subprocess.run(command, check=False, timeout=30).returncode, 30)
        image.unlink()
        mountpoint.rmdir()
        base.rmdir()


@pytest.fixture
def small(disk: Path) -> Iterator[Mount]:
    """A mount with its state on the small disk."""
    mount = Mount()
    mount.state = disk / "state"
    mount.environment["ASPEN_STATE_DIR"] = str(mount.state)
    try:
        yield mount.start()
    finally:
        mount.close()


def content(number: int, size: int = CHUNK) -> bytes:
    return random.Random(number).randbytes(size)


def refusal(call: Callable[[], object]) -> int:
    """The errno with which `call` fails, 0 if it does not."""
    try:
        call()
    except OSError as error:
        return error.errno or -1
    return 0


def write(path: Path, data: bytes) -> None:
    """Removes what it could not write whole."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    except OSError:
        with suppress(OSError):
            path.unlink()
        raise
    finally:
        os.close(descriptor)


def fill(files: Path, first: int = 0) -> dict[Path, int]:
    """Writes files until that is refused, the last ones small; each that is there is whole and fsynced."""
    there: dict[Path, int] = {}
    for size in (CHUNK, 100_000, 1000):
        for number in range(first, 100_000):
            path = files / f"{size}-{number}"
            code = refusal(lambda path=path, number=number, size=size: write(path, content(number, size)))  # type: ignore[misc]
            if code:
                assert code == errno.ENOSPC
                break
            there[path] = number
    return there


def delete_most(there: dict[Path, int]) -> None:
    """Two files of three."""
    for number, path in enumerate(list(there)):
        if number % 3:
            path.unlink()
            del there[path]


def assert_intact(there: dict[Path, int]) -> None:
    for path, number in there.items():
        assert path.read_bytes() == content(number, int(path.name.split("-")[0])), path


def assert_lives(mount: Mount) -> None:
    assert alive(mount.pid)
    assert mount.is_mounted()
    log = (mount.state / "daemon.log").read_text()
    assert "Traceback" not in log, log[-3000:]


def assert_clean(mount: Mount) -> None:
    assert mount.aspen("check").endswith(b"clean\n")
    mount.stop()
    assert mount.aspen("check", "--offline").endswith(b"clean\n")
    mount.start()


def until_it_writes(path: Path, data: bytes) -> None:
    assert wait_for(lambda: not refusal(lambda: write(path, data)), RECOVERY_S), "still no space"


def test_full_disk_refuses_writers_serves_readers_and_recovers_by_deleting_files(small: Mount) -> None:
    files = small.mountpoint / "files"
    there = fill(files)
    assert sum(1 for path in there if path.name.startswith(f"{CHUNK}-")) > 20
    for number in range(20_000, 100_000, 20_000):
        code = refusal(lambda number=number: write(files / f"{CHUNK}-{number}", content(number)))  # type: ignore[misc]
        if code:
            break
        # What was removed because it was not whole has been collected meanwhile.
        there |= {files / f"{CHUNK}-{number}": number, **fill(files, first=number + 1)}
    assert code == errno.ENOSPC
    assert refusal(lambda: (small.mountpoint / "kv" / "k").write_bytes(bytes(100_000))) in (0, errno.ENOSPC)
    assert_lives(small)
    assert_intact(there)
    assert set(files.iterdir()) == set(there)
    delete_most(there)
    until_it_writes(files / f"{CHUNK}-7000", content(7000))
    there[files / f"{CHUNK}-7000"] = 7000
    assert_lives(small)
    assert_intact(there)
    assert_clean(small)
    assert_intact(there)


@pytest.mark.timeout(300)
def test_a_disk_that_is_filled_whenever_there_is_room_recovers_by_deleting_files(small: Mount) -> None:
    """What was written in part is collected while the disk is full, and whoever waits for it writes again:
    never so much that deleting files would no longer help."""
    files = small.mountpoint / "files"
    there: dict[Path, int] = {}
    for turn in range(4):
        small.extend()
        there |= fill(files, first=turn * 1000)
        time.sleep(4)  # two rounds of housekeeping
    delete_most(there)
    until_it_writes(files / f"{CHUNK}-7000", content(7000))
    assert_lives(small)
    assert_intact(there)
    assert_clean(small)


def test_space_freed_outside_makes_writes_work_again(small: Mount, disk: Path) -> None:
    files = small.mountpoint / "files"
    write(files / f"{CHUNK}-0", content(0))
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(CHUNK)):
            pass
    there = {files / f"{CHUNK}-0": 0, **fill(files, first=1)}
    assert_intact(there)
    ballast.unlink()
    until_it_writes(files / f"{CHUNK}-8000", content(8000))
    assert_lives(small)
    assert_intact({**there, files / f"{CHUNK}-8000": 8000})
    assert_clean(small)


def test_daemon_killed_with_a_full_disk_comes_back_with_everything(small: Mount) -> None:
    files = small.mountpoint / "files"
    there = fill(files)
    small.kill()
    small.start()
    assert_intact(there)
    delete_most(there)
    until_it_writes(files / f"{CHUNK}-9000", content(9000))
    assert_lives(small)
    assert_intact(there)
    assert_clean(small)
