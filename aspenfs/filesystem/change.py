"""A transaction on names and inodes under construction, and how an inode ends in one."""

from aspenfs.filesystem.layout import HAS_XATTRS, USAGE_KEY, XATTR_PREFIX, Inode, inode_key, number
from aspenfs.filesystem.references import References
from aspenfs.filesystem.volume import Volume
from aspenfs.kv.types import Compare, Operation, add, delete, delete_range, merge, prefix_end


class Change:
    """What must hold, and what happens then. `references`: of blobs, that it takes away."""

    def __init__(self) -> None:
        self.compares: list[Compare] = []
        self.then: list[Operation] = []
        self.references: list[References] = []
        self.locked = False  # it changes the lock of renames
        self.going = 0  # the inode that it ends while nobody here has it open

    def destroy(self, node: int, inode: Inode, released: list[Operation]) -> None:
        """Ends an inode whose extents `released` drops, but for its names and the count of inodes."""
        self.then.append(delete(inode_key(node)))
        self.then += released
        if inode.flags & HAS_XATTRS:
            prefix = XATTR_PREFIX + number(node)
            self.then.append(delete_range(prefix, prefix_end(prefix)))

    def count(self, inodes: int) -> None:
        """There are so many inodes more."""
        self.then.append(merge(USAGE_KEY, add(0, inodes)))

    async def apply(self, volume: Volume) -> bool:
        """False if a compare did not hold: nothing has happened then."""
        succeeded = (await volume.txn(self.compares, self.then)).succeeded
        if succeeded:
            for references in self.references:
                volume.unreference(references.lost())
        return succeeded
