"""A state directory in which a node is being made: whole in the end, or as it was."""

import socket
from pathlib import Path

import pytest

from aspenfs import errors
from aspenfs.cli.founding import Making, refuse_inhabited
from aspenfs.cli.lock import StateLock
from aspenfs.cli.output import Failure
from aspenfs.cli.paths import StateDirectory


class Failed(Exception):
    pass


def make_something(path: Path) -> None:
    (path / "wal").mkdir()
    (path / "wal" / "born").write_text("x")
    (path / "cluster.json").write_text("{}")
    (path / "link").symlink_to("wal")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path / "ctl.sock"))


def make_in_vain(path: Path, error: type[BaseException] = Failed, *, keep: bool = False) -> None:
    with Making(StateDirectory(path)) as making:
        make_something(path)
        making.hand_over()
        if keep:
            making.keep()
        raise error


def test_what_fails_leaves_no_directory_behind_that_was_not_there(tmp_path: Path) -> None:
    with pytest.raises(Failed):
        make_in_vain(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == []


def test_what_fails_leaves_a_directory_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    (tmp_path / "wal2").mkdir()
    with pytest.raises(KeyboardInterrupt):
        make_in_vain(tmp_path, KeyboardInterrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "wal2"]


def test_what_succeeds_or_is_to_be_kept_stays(tmp_path: Path) -> None:
    with Making(StateDirectory(tmp_path / "a")):
        make_something(tmp_path / "a")
    with pytest.raises(Failed):
        make_in_vain(tmp_path / "b", keep=True)
    for name in "ab":
        assert (tmp_path / name / "wal" / "born").exists()


def test_nobody_else_begins_there_until_it_is_handed_over(tmp_path: Path) -> None:
    directory = StateDirectory(tmp_path)
    with Making(directory) as making:
        with pytest.raises(errors.Busy):
            StateLock.acquire(directory)
        making.hand_over()
        StateLock.acquire(directory).release()


@pytest.mark.parametrize("left", [[], ["wal"], ["wal/born"], ["wal/born.new"], ["wal/born", "node.crt"]])
def test_a_join_that_was_killed_is_gone_on_with_by_a_join_only(tmp_path: Path, left: list[str]) -> None:
    for name in left:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.mkdir() if name == "wal" else path.touch()
    refuse_inhabited(StateDirectory(tmp_path), "/mnt", joining=True)
    if left:
        with pytest.raises(Failure) as refusal:
            refuse_inhabited(StateDirectory(tmp_path), "/mnt", joining=False)
        assert "aspen join" in refusal.value.advice


@pytest.mark.parametrize("joining", [False, True])
@pytest.mark.parametrize("left", ["state/data.mdb", "blobs/1", "wal/1.wal"])
def test_what_is_left_of_a_node_is_not_used(tmp_path: Path, left: str, joining: bool) -> None:
    (tmp_path / left).parent.mkdir()
    (tmp_path / left).touch()
    with pytest.raises(Failure, match="remains of a node") as refusal:
        refuse_inhabited(StateDirectory(tmp_path), "/mnt", joining=joining)
    assert "aspen join" not in refusal.value.advice
