"""A swap of parts of a state directory: old or new, never a mixture, wherever power or process end."""

from collections.abc import Callable

import pytest

from aspenfs.errors import Corrupt
from aspenfs.runtime import swap
from aspenfs.runtime.disk import RealDisk
from aspenfs.runtime.swap import MARKER, Swap, SwapDisk
from aspenfs.seams import Disk
from aspenfs.sim.disk import SimDisk, SimulatedCrash

PLAN = Swap(("cluster.json", "state", "wal"), ("keys", "ca.crt", "never-there"))
INSTALL = Swap(("state",), log_index=77)


def write(disk: Disk, path: str, content: bytes, *, named: bool = True) -> None:
    """Durable, and with `named` its first name too."""
    if "/" in path:
        disk.make_directory(path.rpartition("/")[0])
    file = disk.open(path, create=True)
    file.pwrite(content, 0)
    file.datasync()
    file.close()
    while path := path.rpartition("/")[0]:
        disk.sync_directory(path)
    if named:
        disk.sync_directory("")


def contents(disk: Disk, path: str = "") -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name in disk.list(path):
        below = f"{path}/{name}" if path else name
        try:
            found.update(contents(disk, below) or {below: b"(empty directory)"})
        except NotADirectoryError:
            file = disk.open(below)
            found[below] = file.pread(file.size(), 0)
            file.close()
    return found


BEFORE = {"cluster.json": b"old", "state/data": b"old", "state/lock": b"old", "wal/1": b"old",
          "wal/2": b"old", "blobs/1": b"kept", "keys/a/b": b"secret", "ca.crt": b"secret"}  # fmt: skip
COMING = {"cluster.json.new": b"new", "state.new/data": b"new", "wal.new/3": b"new"}
AFTER = {"cluster.json": b"new", "state/data": b"new", "wal/3": b"new", "blobs/1": b"kept"}
INSTALLED = {**BEFORE, "state/data": b"new"}
del INSTALLED["state/lock"]


def a_disk(seed: int, coming: dict[str, bytes] = COMING) -> SimDisk:
    disk = SimDisk(seed=seed)
    for path, content in BEFORE.items():
        write(disk, path, content)
    for path, content in coming.items():
        write(disk, path, content, named=False)
    return disk


def do_all(disk: SwapDisk) -> None:
    swap.commit(disk, PLAN)
    assert swap.carry_out(disk) is None
    swap.finish(disk)


def test_what_was_committed_takes_the_places_of_what_was_there() -> None:
    disk = a_disk(0)
    do_all(disk)
    assert contents(disk) == AFTER


def test_what_was_not_committed_is_forgotten() -> None:
    disk = a_disk(0)
    write(disk, MARKER + ".new", b"half a mark")
    write(disk, "notes.new", b"the user's")
    assert swap.recover(disk) is None
    assert contents(disk) == {**BEFORE, "notes.new": b"the user's"}


def operations(work: Callable[[SimDisk], object], coming: dict[str, bytes] = COMING) -> range:
    """The numbers of the operations that `work` does on a fresh disk."""
    disk = a_disk(0, coming)
    before = disk.operations
    work(disk)
    return range(before + 1, disk.operations + 1)


def down_at(disk: SimDisk, number: int, power: bool) -> None:
    if power:
        disk.crash_at(number)
    else:
        disk.kill_at(number)


@pytest.mark.parametrize("power", [False, True])
def test_it_is_old_or_new_wherever_it_ends_and_the_recovery_too(power: bool) -> None:
    outcomes = set()
    for number in operations(do_all):
        for seed in range(6):
            disk = a_disk(seed)
            down_at(disk, number, power)
            with pytest.raises(SimulatedCrash):
                do_all(disk)
            disk.restart()
            committed = MARKER in disk.list("")
            # The recovery dies too, in another place each time, until it gets through.
            for step in range(1, 60):
                down_at(disk, disk.operations + step, power)
                try:
                    assert swap.recover(disk) is None
                    disk.heal()
                    break
                except SimulatedCrash:
                    disk.restart()
            found = contents(disk)
            assert found in (BEFORE, AFTER), (number, seed)
            assert found == AFTER or not committed
            outcomes.add(found == AFTER)
            disk.crash()
            disk.restart()
            # Removing what was never committed need not be durable: the next start does it again.
            assert swap.recover(disk) is None
            assert contents(disk) == found
    assert outcomes == {False, True}


@pytest.mark.parametrize("power", [False, True])
def test_the_log_is_asked_to_be_reset_until_that_is_said_to_be_done(power: bool) -> None:
    def install(disk: SwapDisk) -> None:
        swap.commit(disk, INSTALL)
        assert swap.carry_out(disk) == 77
        write(disk, "wal/reset", b"")
        swap.finish(disk)

    coming = {"state.new/data": b"new"}
    for number in operations(install, coming):
        for seed in range(6):
            disk = a_disk(seed, coming)
            down_at(disk, number, power)
            with pytest.raises(SimulatedCrash):
                install(disk)
            disk.restart()
            index = swap.recover(disk)
            found = contents(disk)
            was_reset = found.pop("wal/reset", None) is not None
            assert (found.pop(MARKER, None) is not None) == (index == 77)
            assert found in (BEFORE, INSTALLED), (number, seed)
            if found == BEFORE:
                assert index is None
                continue
            assert was_reset or index == 77
            swap.finish(disk)
            assert swap.recover(disk) is None


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{}", b"[]", b'{"format": 1, "replace": ["../etc"], "remove": [], "log_index": null}',
        b'{"format": 1, "replace": ["keys"], "remove": [], "log_index": null}',
        b'{"format": 1, "replace": ["state"], "remove": ["a/b"], "log_index": null}',
        b'{"format": 1, "replace": ["state"], "remove": [], "log_index": -1}',
        b'{"format": 2, "replace": ["state"], "remove": [], "log_index": null}',
    ],
)  # fmt: skip
def test_a_mark_that_cannot_be_understood_changes_nothing(content: bytes) -> None:
    disk = a_disk(0)
    write(disk, MARKER, content)
    with pytest.raises(Corrupt, match=r"swap\.json"):
        swap.recover(disk)
    assert contents(disk) == BEFORE | COMING | {MARKER: content}


def test_a_tree_is_synced_with_all_that_is_in_it() -> None:
    for seed in range(10):
        disk = SimDisk(seed=seed)
        disk.make_directory("state.new/sub")
        for path in ("state.new/data", "state.new/sub/more"):
            file = disk.open(path, create=True)
            file.pwrite(b"x" * 5000, 0)
            file.close()
        swap.sync_tree(disk, "state.new")
        disk.sync_directory("")
        disk.crash()
        disk.restart()
        assert contents(disk) == {"state.new/data": b"x" * 5000, "state.new/sub/more": b"x" * 5000}


def test_a_real_directory_is_swapped_as_well(tmp_path: object) -> None:
    disk = RealDisk(str(tmp_path))
    for path, content in (BEFORE | COMING).items():
        write(disk, path, content)
    for name in ("cluster.json", "state", "wal"):
        swap.sync_tree(disk, name + ".new")
    do_all(disk)
    assert contents(disk) == AFTER
    assert swap.recover(disk) is None
