"""Pages of a mapped file are given back, and are there again when they are touched."""

import mmap
import os
import re
from pathlib import Path

from aspenfs.kv.types import NO_ATTRIBUTES, Record
from aspenfs.limits import MAPPED_BYTES_MAX
from aspenfs.runtime.mapped import MappedFile, mapped_bytes
from aspenfs.runtime.statedb import StateDb

MIB = 1 << 20


def resident(path: Path) -> int:
    """Bytes of the file's mapping that this process holds."""
    blocks = re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    return sum(
        int(found[1]) * 1024
        for block in blocks
        if str(path) in block.split("\n", 1)[0]
        and (found := re.search(r"^Rss:\s+(\d+) kB", block, re.MULTILINE))
    )


def test_pages_given_back_read_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"aspen" * MIB)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ) as view:
        assert view[:] == b"aspen" * MIB
        assert resident(path) == 5 * MIB
        MappedFile(str(path)).give_back()
        assert resident(path) == 0
        assert view[:] == b"aspen" * MIB


def test_a_file_that_is_not_mapped_is_no_error(tmp_path: Path) -> None:
    MappedFile(str(tmp_path / "none")).give_back()


def test_the_state_keeps_its_map_small_and_its_readers_right(tmp_path: Path) -> None:
    state = StateDb(tmp_path / "state")
    record = Record(bytes(3000), 1, 1, 1, 0, 0, NO_ATTRIBUTES)
    keys = [b"f/%08d" % number for number in range(25_000)]
    state.apply([(key, record) for key in keys], 1)
    state.refresh()
    assert all(state.get(key) == record for key in keys)
    data = Path(os.path.realpath(tmp_path)) / "state" / "data.mdb"
    held = resident(data)
    assert held > 60 * MIB
    assert mapped_bytes() > MAPPED_BYTES_MAX
    walk = state.items(b"f/", b"")
    next(walk)
    state.give_back_pages()
    assert resident(data) < held // 10
    assert sum(1 for _ in walk) == len(keys) - 1
    assert state.get(keys[0]) == record
    state.close()
