"""What the parts of the file system share."""

from aspenfs.limits import INODE_BLOCK
from tests.filesystem.volumes import Setup, run


def test_ids_that_were_reserved_in_a_bad_state_are_not_used() -> None:
    async def test(setup: Setup) -> None:
        volume = setup.tree.volume
        first = await volume.new_id()
        assert await volume.new_id() == first + 1
        volume.forget_ids()
        assert await volume.new_id() == first + INODE_BLOCK

    run(test)
