"""The lock on a state directory: one holder, named, and gone when its process is gone."""

import os
import signal
from pathlib import Path

import pytest

from aspenfs import errors
from aspenfs.cli.lock import StateLock, holder_pid
from aspenfs.cli.paths import StateDirectory


@pytest.fixture
def directory(tmp_path: Path) -> StateDirectory:
    return StateDirectory(tmp_path)


def test_pid_file_is_there_exactly_while_the_lock_is_held(directory: StateDirectory) -> None:
    with StateLock.acquire(directory):
        assert directory.pid.read_text() == f"{os.getpid()}\n"
    assert not directory.pid.exists()


def test_second_holder_is_refused_with_the_pid_of_the_first(directory: StateDirectory) -> None:
    with StateLock.acquire(directory):
        with pytest.raises(errors.Busy, match=f"{directory.path}.* pid {os.getpid()};"):
            StateLock.acquire(directory)
        assert holder_pid(directory) == os.getpid()  # the refused one has not touched it


def test_released_lock_can_be_taken_again_and_releasing_twice_harms_nobody(directory: StateDirectory) -> None:
    first = StateLock.acquire(directory)
    first.release()
    with StateLock.acquire(directory):
        first.release()
        with pytest.raises(errors.Busy):
            StateLock.acquire(directory)
        assert holder_pid(directory) == os.getpid()


def test_lock_of_a_killed_process_is_free_though_its_pid_file_is_there(directory: StateDirectory) -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        StateLock.acquire(directory)
        os.write(writer, b"held")
        signal.pause()
    os.close(writer)
    assert os.read(reader, 4) == b"held"
    os.close(reader)
    with pytest.raises(errors.Busy, match=f"pid {child};"):
        StateLock.acquire(directory)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert holder_pid(directory) == child
    with StateLock.acquire(directory):
        assert holder_pid(directory) == os.getpid()


def test_unreadable_pid_file_leaves_the_holder_unnamed(directory: StateDirectory) -> None:
    with StateLock.acquire(directory):
        directory.pid.write_text("")
        with pytest.raises(errors.Busy, match="another daemon"):
            StateLock.acquire(directory)


def test_missing_directory_is_the_disks_error(directory: StateDirectory) -> None:
    with pytest.raises(FileNotFoundError):
        StateLock.acquire(StateDirectory(directory.path / "missing"))
