"""Directories with and without OPENDIR: the kernel is given the same, and asks as it was told."""

from pathlib import Path

import pytest

from tests.fuse.toydaemon import ToyDaemon

pytestmark = pytest.mark.mount


class MemoryDaemon(ToyDaemon):
    script = "tests/fuse/memoryfs.py"


USE = """
d = m + "/files/d"
os.makedirs(d + "/sub/deep")
for n in range(700): open(f"{d}/f{n}", "w").close()
names = {f"f{n}" for n in range(700)} | {"sub"}
for _ in range(5): assert set(os.listdir(d)) == names and len(os.listdir(d)) == len(names)
one, two = os.scandir(d), os.scandir(d)
seen = [next(one).name for _ in range(300)]
os.unlink(f"{d}/{seen[0]}"); os.rename(f"{d}/f699", f"{d}/moved")
seen += [entry.name for entry in one]
assert len(set(seen)) == len(seen) and names - {"f699"} <= set(seen)
assert names - {seen[0], "f699"} <= {entry.name for entry in two}
assert set(os.listdir(d)) == names - {seen[0], "f699"} | {"moved"}
assert [(at, sorted(below)) for at, below, _ in os.walk(m)] == [
    (m, ["files"]), (m + "/files", ["d"]), (d, ["sub"]), (d + "/sub", ["deep"]), (d + "/sub/deep", [])]
descriptor = os.open(d + "/sub/deep", os.O_RDONLY)
os.fsync(descriptor)
os.rmdir(d + "/sub/deep")
assert os.listdir(descriptor) == []
os.close(descriptor)
for _ in range(5): assert os.listdir(d + "/sub") == []
"""


@pytest.mark.parametrize("options", [(), ("--asked",), ("--stock",), ("--asked", "--stock")])
def test_directories_are_the_same_however_they_are_opened(tmp_path: Path, options: tuple[str, ...]) -> None:
    with MemoryDaemon(tmp_path / "mount", *options) as daemon:
        daemon.run_in_mount(USE)
        counts = daemon.ask("requests")
    if options:
        # Without the hook there is no way to see which directory is read, so the kernel asks.
        assert counts["opened"] > 20
        assert counts["read"] > 5 * 5
    else:
        assert counts["opened"] == 1, "it was told never to ask again"
        assert counts["read"] < 5 * 5, "most listings came from its own pages"
