"""cluster.json: made once and whole, read back, refused when it cannot be understood."""

import json
from pathlib import Path

import pytest

from aspenfs.errors import Corrupt, IdentityLost, InvalidArgument
from aspenfs.limits import PEER_FORMER_LIVES_MAX
from aspenfs.runtime import identity
from tests.kv.subject import FakeEntropy


def test_what_was_created_is_read_back(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "state"
    created = identity.create(directory, "demo", FakeEntropy())
    assert identity.read(directory) == created
    assert (len(created.cluster_id), created.name, created.node_id) == (16, "demo", 1)
    assert [path.name for path in directory.iterdir()] == [identity.FILE_NAME]
    assert (directory / identity.FILE_NAME).stat().st_mode & 0o077 == 0


def test_a_directory_without_one_has_none(tmp_path: Path) -> None:
    assert identity.read(tmp_path) is None
    (tmp_path / f"{identity.FILE_NAME}.new").write_text("half of a dr")  # the process ended here
    assert identity.read(tmp_path) is None
    identity.create(tmp_path, "demo", FakeEntropy())
    assert identity.read(tmp_path) is not None


@pytest.mark.parametrize("name", ["", "a" * 65, "a/b", "a:b", "a b", "a,b", "a\n"])
def test_a_name_that_a_mount_table_cannot_hold_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidArgument):
        identity.create(tmp_path, name, FakeEntropy())
    assert not list(tmp_path.iterdir())


GOOD = {"format": 1, "cluster_id": "00" * 16, "name": "demo", "node_id": 1}


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b"\xff", *(json.dumps(GOOD | change).encode() for change in (
        {"format": 2}, {"cluster_id": "00"}, {"cluster_id": 7}, {"cluster_id": "zz" * 16}, {"name": 1},
        {"node_id": 0}, {"node_id": "1"})),
    json.dumps({"format": 1}).encode(),
])  # fmt: skip
def test_what_cannot_be_understood_is_corrupt(tmp_path: Path, text: bytes) -> None:
    (tmp_path / identity.FILE_NAME).write_bytes(text)
    with pytest.raises(Corrupt, match=r"cluster\.json"):
        identity.read(tmp_path)


def test_a_node_of_any_id_is_written_and_read_back(tmp_path: Path) -> None:
    node = identity.Identity(b"c" * 16, "demo", (1 << 63) - 1)
    identity.write(tmp_path, node)
    assert identity.read(tmp_path) == node


# --- the birth mark ---


def test_a_log_is_born_once(tmp_path: Path) -> None:
    assert identity.born(tmp_path) is None
    entropy = FakeEntropy()
    mark = identity.give_birth(tmp_path, entropy)
    assert len(mark) == identity.BORN_BYTES
    assert identity.give_birth(tmp_path, entropy) == mark == identity.born(tmp_path)
    identity.check_born(tmp_path, mark)


def test_a_log_that_is_gone_or_another_one_is_not_taken_for_the_one_that_was_there(tmp_path: Path) -> None:
    mark = identity.give_birth(tmp_path, FakeEntropy())
    with pytest.raises(IdentityLost):
        identity.check_born(tmp_path, b"x" * identity.BORN_BYTES)
    (tmp_path / identity.BORN_FILE).unlink()
    with pytest.raises(IdentityLost):
        identity.check_born(tmp_path, mark)


@pytest.mark.parametrize("text", [b"", b"00", b"zz" * 16, b"\xff" * 32, b"00" * 17])
def test_a_birth_mark_that_cannot_be_understood_is_corrupt(tmp_path: Path, text: bytes) -> None:
    identity.give_birth(tmp_path, FakeEntropy())
    (tmp_path / identity.BORN_FILE).write_bytes(text)
    with pytest.raises(Corrupt, match="birth mark"):
        identity.give_birth(tmp_path, FakeEntropy())


# --- what is left of a node ---


def test_who_was_killed_at_its_first_start_may_start(tmp_path: Path) -> None:
    identity.create(tmp_path, "demo", FakeEntropy())
    for _ in range(2):
        identity.check_kept(tmp_path)
        identity.give_birth(tmp_path, FakeEntropy())
    for _ in range(2):
        identity.begin_incarnation(tmp_path, FakeEntropy())
        identity.check_kept(tmp_path)


@pytest.mark.parametrize("left", ["nothing", "directories"])
def test_a_node_of_which_log_and_state_are_gone_is_not_taken_for_a_new_one(tmp_path: Path, left: str) -> None:
    identity.create(tmp_path, "demo", FakeEntropy())
    identity.begin_incarnation(tmp_path, FakeEntropy())
    if left == "directories":  # on which a disk should be mounted
        (tmp_path / "wal").mkdir()
        (tmp_path / "state").mkdir()
    with pytest.raises(IdentityLost, match="aspen restore"):
        identity.check_kept(tmp_path)


@pytest.mark.parametrize("name", ["wal", "state"])
def test_a_log_of_an_earlier_version_needs_no_birth_mark(tmp_path: Path, name: str) -> None:
    identity.begin_incarnation(tmp_path, FakeEntropy())
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").touch()
    identity.check_kept(tmp_path)


# --- the incarnation ---


def test_a_life_knows_the_marks_of_those_before_it(tmp_path: Path) -> None:
    entropy = FakeEntropy()
    lives = [identity.begin_incarnation(tmp_path, entropy) for _ in range(PEER_FORMER_LIVES_MAX + 3)]
    marks = [life.mark for life in lives]
    assert len(set(marks)) == len(marks)
    assert lives[2].former == (marks[1], marks[0])
    assert lives[-1].former == tuple(reversed(marks[-1 - PEER_FORMER_LIVES_MAX : -1]))


def test_of_a_directory_of_an_earlier_release_only_the_count_is_known(tmp_path: Path) -> None:
    (tmp_path / identity.INCARNATION_FILE).write_text('{"format": 1, "incarnation": 7}')
    life = identity.begin_incarnation(tmp_path, FakeEntropy())
    assert (life.incarnation, life.former) == (8, ())
    assert identity.begin_incarnation(tmp_path, FakeEntropy()).former == (life.mark,)


def test_each_start_is_a_new_incarnation(tmp_path: Path) -> None:
    assert identity.incarnation(tmp_path) == 0
    assert [identity.begin_incarnation(tmp_path, FakeEntropy()).incarnation for _ in range(3)] == [1, 2, 3]
    assert identity.incarnation(tmp_path) == 3


@pytest.mark.parametrize("text", [
    b"", b"7", b'{"format": 1}', b'{"format": 2, "incarnation": 7}', b'{"format": 1, "incarnation": "7"}',
    b'{"format": 1, "incarnation": 0}', b'{"format": 1, "incarnation": 16777216}',
    b'{"format": 1, "incarnation": true}', b'{"format": 1, "incarnation": 7, "marks": 7}',
    b'{"format": 1, "incarnation": 7, "marks": ["x"]}',
    b'{"format": 1, "incarnation": 1, "marks": ["07", "08"]}',
    b'{"format": 1, "incarnation": 7, "marks": ["070707070707070707"]}',
])  # fmt: skip
def test_an_incarnation_that_cannot_be_understood_is_corrupt(tmp_path: Path, text: bytes) -> None:
    (tmp_path / identity.INCARNATION_FILE).write_bytes(text)
    with pytest.raises(Corrupt, match="incarnation"):
        identity.begin_incarnation(tmp_path, FakeEntropy())


def test_incarnations_end_before_they_overflow(tmp_path: Path) -> None:
    last = json.dumps({"format": 1, "incarnation": identity.INCARNATION_MAX}).encode()
    (tmp_path / identity.INCARNATION_FILE).write_bytes(last)
    with pytest.raises(InvalidArgument):
        identity.begin_incarnation(tmp_path, FakeEntropy())


def test_a_file_is_replaced_whole_whatever_was_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / "file.new").write_bytes(b"half of a draft that is lon")
    (tmp_path / "file.new").chmod(0o666)
    identity.write_file(path, b"one")
    identity.write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
    identity.remove_file(path)
    identity.remove_file(path)
    assert list(tmp_path.iterdir()) == []
