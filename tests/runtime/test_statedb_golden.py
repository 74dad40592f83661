"""A state written by format 1 is read for ever: `tests/golden/state-v1`, 5 entries."""

import shutil
from pathlib import Path

from aspenfs.kv.types import NO_ATTRIBUTES, Record
from aspenfs.runtime.statedb import StateDb

GOLDEN = Path(__file__).resolve().parent.parent / "golden" / "state-v1"


def test_state_of_format_1_is_read(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "state")
    db = StateDb(tmp_path / "state")
    attributes: dict[str, int | bytes | str] = {"mode": 420, "note": b"\x00"}
    assert list(db.items(b"", b"")) == [
        (b"\x00t", Record(b"12345678", 5, 5, 1, 0, 0, NO_ATTRIBUTES)),
        (b"k/" + b"x" * 498, Record(b"a chunk long", 2, 2, 1, 0, 0, NO_ATTRIBUTES)),
        (b"k/" + b"x" * 1500, Record(b"three chunks", 4, 4, 1, 7, 0, attributes)),
        (b"k/" + b"x" * 498 + b"y", Record(b"one more", 3, 3, 1, 0, 0, NO_ATTRIBUTES)),
    ]
    assert (db.applied_index, db.meta("note")) == (5, b"meta")
    assert db.verify().nodes == 3
    db.close()
