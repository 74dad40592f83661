"""`contacts.json`: whom a new node may talk to at first."""

from pathlib import Path

import pytest

from aspenfs import errors
from aspenfs.runtime import contacts
from aspenfs.runtime.peers.join import Contact

MEMBERS = {1: Contact(("192.0.2.7:7420", "db1:7420"), b"b" * 16), 1 << 62: Contact(("db2:1",), b"c" * 16)}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    assert contacts.read(tmp_path) == {}
    contacts.write(tmp_path, MEMBERS)
    assert contacts.read(tmp_path) == MEMBERS


@pytest.mark.parametrize(
    "body",
    [
        "",
        "[]",
        "{}",
        '{"format": 2, "members": []}',
        '{"format": 1, "members": [{"node": "x"}]}',
        '{"format": 1}',
    ],
)
def test_what_is_no_such_list_is_refused_by_the_name_of_the_file(tmp_path: Path, body: str) -> None:
    (tmp_path / "contacts.json").write_text(body)
    with pytest.raises(errors.Corrupt, match=r"contacts\.json"):
        contacts.read(tmp_path)
