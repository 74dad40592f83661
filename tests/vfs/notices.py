"""A stand-in for the notifier: what the kernel would be told, in the order in which it is noted."""


class Noted:
    """`untold`: inodes of which the kernel still holds old content."""

    def __init__(self) -> None:
        self.inodes: list[tuple[int, bool]] = []
        self.names: list[tuple[int, bytes]] = []
        self.dropped: list[int] = []
        self.all = 0
        self.untold: set[int] = set()

    def touch(self, inode: int, data: bool) -> None:
        self.inodes.append((inode, data))
        if data:
            self.untold.add(inode)

    def entry(self, parent_inode: int, name: bytes) -> None:
        self.names.append((parent_inode, name))

    def everything(self) -> None:
        self.all += 1

    def is_untold(self, inode: int) -> bool:
        return False  # nobody here would tell it

    def holds_old_pages(self, inode: int) -> bool:
        return inode in self.untold

    def drop_attributes(self, inode: int) -> None:
        self.dropped.append(inode)

    def clear(self) -> None:
        for noted in (self.inodes, self.names, self.dropped, self.untold):
            noted.clear()
