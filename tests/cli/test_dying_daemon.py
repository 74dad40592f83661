"""A killed daemon that cannot end by itself, and what mount.aspen does about it."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from aspenfs.cli.lock import is_dying
from aspenfs.cli.mount import free_dying
from aspenfs.cli.paths import StateDirectory
from aspenfs.fuse import mounts
from tests.fuse.toydaemon import ToyDaemon

pytestmark = pytest.mark.mount
SECONDS = 30.0
QUICK_S = 20.0  # it takes two; the daemon would stay as long as its client does


def wait_until(true: Callable[[], bool]) -> bool:
    end = time.monotonic() + SECONDS
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_killed_daemon_whose_thread_waits_for_a_directory_that_its_client_holds_is_freed(
    tmp_path: Path,
) -> None:
    directory = StateDirectory(tmp_path / "state")
    directory.path.mkdir()
    with ToyDaemon(tmp_path / "mnt", "--timeout", "60") as toy:
        pid = toy.process.pid
        directory.pid.write_text(f"{pid}\n")
        toy.ask("grow known 1")
        toy.run_in_mount("os.stat(m + '/known')")
        # mkdir holds the directory while it asks for the name, which this daemon never answers.
        with toy.client("os.mkdir(m + '/hold')") as client:
            assert wait_until(lambda: toy.ask("cpu")["held"] == 1)
            toy.ask("entry known")  # a thread now waits for the directory
            assert wait_until(lambda: waits_for_a_directory(pid))
            os.kill(pid, signal.SIGKILL)
            assert wait_until(lambda: is_dying(pid))
            assert mounts.probe(toy.mountpoint, timeout_s=1) is mounts.State.HUNG
            begun = time.monotonic()
            free_dying(str(toy.mountpoint), directory)
            assert time.monotonic() - begun < QUICK_S
            assert not is_dying(pid)
            assert client.wait(SECONDS)
        assert mounts.is_stale(toy.mountpoint)


def waits_for_a_directory(pid: int) -> bool:
    """Whether a thread of the process does, in the kernel, to tell of a name."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return any((thread / "wchan").read_text() == "fuse_reverse_inval_entry" for thread in threads)


def test_mount_of_a_daemon_that_lives_or_has_ended_is_left_alone(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path / "state")
    directory.path.mkdir()
    with ToyDaemon(tmp_path / "mnt") as toy:
        for pid in (toy.process.pid, 2**22 - 1):
            directory.pid.write_text(f"{pid}\n")
            free_dying(str(toy.mountpoint), directory)
        free_dying(str(toy.mountpoint), StateDirectory(tmp_path / "nowhere"))
        assert mounts.probe(toy.mountpoint, timeout_s=SECONDS) is mounts.State.SERVED
