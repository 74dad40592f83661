"""files/ across the loss of power, or of its process, at every n-th disk operation of log and blobs.

Everything below the kernel is real but the disk. The state is LMDB on a real file system; after a loss of
power a copy of it is found that is as old as the contract of StateDb allows (see test_power_loss.py).
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from aspenfs.errors import StorageError
from aspenfs.sim.disk import SimDisk, SimulatedCrash
from tests.runtime.files_driver import Life, Stack

BURSTS = 120


@pytest.fixture
def place() -> Iterator[Path]:
    """In memory if there is such a place: thousands of syncs of the state are not what is tested."""
    memory = Path("/dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="aspenfs-test-", dir=memory if memory.is_dir() else None))
    yield directory
    shutil.rmtree(directory)


def undisturbed(place: Path, seed: int) -> tuple[int, int]:
    """The first and the last disk operation of a life, after its directory was made."""
    disk = SimDisk(seed)
    life = Life(place / "undisturbed", disk, seed, BURSTS)
    first = last = 0

    async def main() -> None:
        nonlocal first, last
        Stack(life.directory, disk).close()
        first = disk.operations
        await life.live()
        last = disk.operations
        assert life.stack is not None
        assert await life.stack.look() == life.model.seen()
        life.stack.assert_sound()
        life.stack.close()

    trio.run(main)
    shutil.rmtree(life.directory)
    return first, last


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("power", [True, False], ids=["power", "process"])
def test_what_comes_back_is_a_prefix_with_everything_that_was_fsynced(
    place: Path, power: bool, seed: int
) -> None:
    first, last = undisturbed(place, seed)
    step = 7 if power else 29
    for at in range(first + 1 + seed, last + 1, step):
        disk = SimDisk(at)
        life = Life(place / str(at), disk, seed, BURSTS)

        async def main(life: Life = life, disk: SimDisk = disk, at: int = at) -> None:
            Stack(life.directory, disk).close()
            (disk.crash_at if power else disk.kill_at)(at)
            with pytest.raises((SimulatedCrash, StorageError)):  # the latter from the call after it
                await life.live()
            if life.stack is not None:  # else it went down while it was opened
                life.die(power=power)
            disk.restart()
            await life.come_back(power=power)

        trio.run(main)
        shutil.rmtree(life.directory)
