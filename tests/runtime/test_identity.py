"""cluster.json: made once and whole, read back, refused when it cannot be understood."""

import json
from pathlib import Path

import pytest

from aspenfs.errors import Corrupt, InvalidArgument
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
