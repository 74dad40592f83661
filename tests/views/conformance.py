"""What every writable tree must do, whatever is behind it: one suite, run over each of them.

A test class gives `open_tree` and says what its tree can do. Tests drive the tree as the kernel does
(`Mounted`), below the kernel's own checks of permissions and path lengths.
"""

import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import ClassVar, NamedTuple, TypeVar

import pytest
import trio

from aspenfs import errors
from aspenfs.vfs.tree import SetAttr, Tree
from tests.views.subject import ROOT, SECONDS_MAX, Mounted, User, whole

NOREPLACE, EXCHANGE = 1, 2


class Capabilities(NamedTuple):
    hard_links: bool = True
    special_files: bool = True
    file_bytes_max: int = 1 << 46
    exchange_directories: bool = True
    lends_identity: bool = True  # set-user-ID and set-group-ID bits are kept
    checks_kinds: bool = True  # refuses what the kernel refuses before it asks: ENOTDIR, EISDIR by type
    odd_names: tuple[bytes, ...] = (b"%", b"%2e", b"100%", b"a%b")  # legal names with a special character


class Conformance(ABC):
    can: ClassVar[Capabilities] = Capabilities()

    @abstractmethod
    async def open_tree(self) -> Tree:
        """An empty tree."""


C = TypeVar("C", bound=Conformance)
Body = Callable[[C, Mounted], Awaitable[None]]


def case(body: Body[C]) -> Callable[[C], None]:
    """A test of a fresh tree."""

    def test(self: C) -> None:
        async def main() -> None:
            with trio.fail_after(SECONDS_MAX):
                await body(self, Mounted(await self.open_tree()))

        trio.run(main)

    test.__name__, test.__doc__ = body.__name__, body.__doc__
    return test


class Files(Conformance):
    """Contents and attributes of files."""

    @case
    async def test_new_file_is_empty_and_has_mode_and_owner_of_its_creator(self, at: Mounted) -> None:
        attr = await at.create(b"f", mode=0o640, user=User(17, 18))
        assert (attr.mode, attr.uid, attr.gid, attr.size) == (stat.S_IFREG | 0o640, 17, 18, 0)
        assert attr == await at.stat(b"f")
        assert attr.nlink == 1
        assert await at.read(b"f") == b""

    @case
    async def test_create_with_excl_refuses_what_is_there(self, at: Mounted) -> None:
        await at.create(b"f", b"kept")
        await at.mkdir(b"d")
        await at.symlink(b"f", b"l")
        for path in (b"f", b"d", b"l"):
            with pytest.raises(errors.AlreadyExists):
                await at.create(path)
        assert await at.read(b"f") == b"kept"

    @case
    async def test_create_without_excl_opens_what_is_there(self, at: Mounted) -> None:
        first = await at.create(b"f", b"kept")
        attr, file = await at.tree.create(at.tree.root, b"f", 0o600, os.O_CREAT | os.O_RDWR, ROOT)
        assert (attr.node, attr.size, stat.S_IMODE(attr.mode)) == (first.node, 4, 0o644)
        assert await whole(file) == b"kept"
        await file.release()

    @case
    async def test_create_of_what_is_there_lets_the_kernel_check_who_may_open_it(self, at: Mounted) -> None:
        await at.create(b"f", b"kept", 0o600)
        owner, other, create = User(17, 18), User(19, 18), os.O_CREAT
        for user in (owner, other):
            with pytest.raises(errors.Stale):
                await at.tree.create(at.tree.root, b"f", 0o600, create | os.O_RDWR, user)
        await at.create(b"g", b"kept", 0o466, owner)
        attr, file = await at.tree.create(at.tree.root, b"g", 0o600, create | os.O_RDONLY, owner)
        assert attr.size == 4
        await file.release()
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_TRUNC):
            with pytest.raises(errors.Stale):
                await at.tree.create(at.tree.root, b"g", 0o600, create | flags, owner)
        with pytest.raises(errors.Stale):
            await at.tree.create(at.tree.root, b"g", 0o600, create | os.O_RDONLY, other)
        at.tree.owners_shown = False
        with pytest.raises(errors.Stale):
            await at.tree.create(at.tree.root, b"g", 0o600, create | os.O_RDONLY, owner)
        assert await at.read(b"g") == b"kept"

    @case
    async def test_create_without_excl_truncates_when_asked(self, at: Mounted) -> None:
        await at.create(b"f", b"old and long")
        flags = os.O_CREAT | os.O_WRONLY | os.O_TRUNC
        attr, file = await at.tree.create(at.tree.root, b"f", 0o644, flags, ROOT)
        assert attr.size == 0
        await file.write(0, b"new")
        await file.release()
        assert await at.read(b"f") == b"new"

    @case
    async def test_create_of_a_directory_is_refused(self, at: Mounted) -> None:
        await at.mkdir(b"d")
        refused = errors.IsADirectory if self.can.checks_kinds else errors.Stale  # the kernel looks again
        with pytest.raises(refused):
            await at.tree.create(at.tree.root, b"d", 0o644, os.O_CREAT | os.O_WRONLY, ROOT)

    @case
    async def test_any_bytes_come_back(self, at: Mounted) -> None:
        data = bytes(range(256)) * 40
        await at.create(b"f", data)
        assert await at.read(b"f") == data
        assert (await at.stat(b"f")).blocks == (len(data) + 511) // 512

    @case
    async def test_read_at_any_offset_and_beyond_the_end(self, at: Mounted) -> None:
        await at.create(b"f", b"0123456789")
        file = await at.open(b"f", os.O_RDONLY)
        assert await file.read(3, 4) == b"3456"
        assert await file.read(8, 100) == b"89"
        assert await file.read(10, 1) == b""
        assert await file.read(1_000_000, 10) == b""
        await file.release()

    @case
    async def test_write_keeps_the_rest_and_leaves_zeros_between(self, at: Mounted) -> None:
        await at.create(b"f", b"0123456789")
        file = await at.open(b"f")
        assert await file.write(3, b"abc") == 3
        assert await file.write(15, b"z") == 1
        assert await whole(file) == b"012abc6789\0\0\0\0\0z"
        await file.release()

    @case
    async def test_append_goes_to_the_end_whatever_the_offset(self, at: Mounted) -> None:
        await at.create(b"f", b"one")
        await at.append(b"f", b"two")
        await at.append(b"f", b"three")
        assert await at.read(b"f") == b"onetwothree"

    @case
    async def test_two_appending_handles_lose_nothing(self, at: Mounted) -> None:
        await at.create(b"f")
        one = await at.open(b"f", os.O_WRONLY | os.O_APPEND)
        two = await at.open(b"f", os.O_WRONLY | os.O_APPEND)
        for number in range(5):
            await one.write(0, b"a%d." % number)
            await two.write(0, b"b%d." % number)
        assert await at.read(b"f") == b"".join(b"a%d.b%d." % (number, number) for number in range(5))
        await one.release()
        await two.release()

    @case
    async def test_truncate_cuts_and_fills_with_zeros(self, at: Mounted) -> None:
        await at.create(b"f", b"0123456789")
        assert (await at.set(b"f", SetAttr(size=4))).size == 4
        assert (await at.set(b"f", SetAttr(size=6))).size == 6
        assert await at.read(b"f") == b"0123\0\0"

    @case
    async def test_open_with_trunc_empties_the_file(self, at: Mounted) -> None:
        await at.create(b"f", b"0123456789")
        file = await at.open(b"f", os.O_WRONLY | os.O_TRUNC)
        assert (await at.stat(b"f")).size == 0
        await file.release()
        assert await at.read(b"f") == b""

    @case
    async def test_file_size_limit_is_efbig(self, at: Mounted) -> None:
        limit = self.can.file_bytes_max
        await at.create(b"f", b"x")
        file = await at.open(b"f")
        with pytest.raises(errors.TooLarge):
            await file.write(limit, b"y")
        with pytest.raises(errors.TooLarge):
            await at.set(b"f", SetAttr(size=limit + 1))
        assert await at.read(b"f") == b"x"
        await file.release()

    @case
    async def test_setattr_changes_what_is_asked_and_nothing_else(self, at: Mounted) -> None:
        before = await at.create(b"f", b"content")
        after = await at.set(b"f", SetAttr(mode=0o4750))
        assert stat.S_IMODE(after.mode) == (0o4750 if self.can.lends_identity else 0o750)
        assert (after.uid, after.gid, after.size) == (before.uid, before.gid, 7)
        after = await at.set(b"f", SetAttr(uid=5, gid=6))
        assert (after.uid, after.gid) == (5, 6)
        after = await at.set(b"f", SetAttr(mtime_ns=1_000_000_007, atime_ns=2_000_000_009))
        assert (after.mtime_ns, after.atime_ns) == (1_000_000_007, 2_000_000_009)
        assert after.ctime_ns > 1_700_000_000_000_000_000
        assert after == await at.stat(b"f")

    @case
    async def test_setattr_of_all_at_once_leaves_the_mode_asked_for(self, at: Mounted) -> None:
        await at.create(b"f", b"content", mode=0o6755)
        after = await at.set(b"f", SetAttr(mode=0o644, uid=7, gid=8, size=3))
        assert (stat.S_IMODE(after.mode), after.uid, after.gid, after.size) == (0o644, 7, 8, 3)

    @case
    async def test_setattr_of_a_directory(self, at: Mounted) -> None:
        await at.mkdir(b"d", 0o755)
        after = await at.set(b"d", SetAttr(mode=0o1770, uid=3, gid=4, mtime_ns=5))
        assert (after.mode, after.uid, after.gid, after.mtime_ns) == (stat.S_IFDIR | 0o1770, 3, 4, 5)
        assert after == await at.stat(b"d")
        if self.can.checks_kinds:
            with pytest.raises(errors.IsADirectory):
                await at.set(b"d", SetAttr(size=0))

    @case
    async def test_write_moves_mtime_and_ctime(self, at: Mounted) -> None:
        await at.create(b"f", b"a")
        old = await at.set(b"f", SetAttr(mtime_ns=1, mode=0o600))
        file = await at.open(b"f")
        await file.write(0, b"b")
        new = await at.stat(b"f")
        assert new.mtime_ns > 1_700_000_000_000_000_000
        assert new.ctime_ns > old.ctime_ns
        await file.release()

    @case
    async def test_read_moves_neither_mtime_nor_ctime(self, at: Mounted) -> None:
        await at.create(b"f", b"a")
        old = await at.stat(b"f")
        await at.read(b"f")
        new = await at.stat(b"f")
        assert (new.mtime_ns, new.ctime_ns) == (old.mtime_ns, old.ctime_ns)

    @case
    async def test_sync_of_a_file_and_of_the_tree_return(self, at: Mounted) -> None:
        await at.create(b"f", b"a")
        file = await at.open(b"f")
        await file.write(1, b"b")
        await file.sync(False)
        await file.sync(True)
        await at.tree.sync()
        await file.release()

    @case
    async def test_unlinked_open_file_reads_and_writes_on(self, at: Mounted) -> None:
        await at.create(b"f", b"old")
        node = (await at.stat(b"f")).node
        file = await at.open(b"f")
        await at.unlink(b"f")
        assert not await at.exists(b"f")
        assert await whole(file) == b"old"
        await file.write(3, b"er")
        assert await whole(file) == b"older"
        attr = await at.tree.getattr(node)
        assert (attr.nlink, attr.size) == (0, 5)
        assert (await at.tree.setattr(node, SetAttr(size=2), ROOT)).size == 2
        await file.sync(False)
        assert await whole(file) == b"ol"
        assert not await at.exists(b"f")
        await file.release()
        at.tree.forgotten(node)

    @case
    async def test_new_file_under_the_name_of_an_unlinked_open_one_is_another(self, at: Mounted) -> None:
        await at.create(b"f", b"old")
        node = (await at.stat(b"f")).node
        file = await at.open(b"f")
        await at.unlink(b"f")
        await at.create(b"f", b"new")
        assert (await at.stat(b"f")).node != node
        await file.write(0, b"OLD")
        assert await whole(file) == b"OLD"
        assert await at.read(b"f") == b"new"
        await file.release()

    @case
    async def test_node_stays_the_same_while_it_is_known_and_after(self, at: Mounted) -> None:
        await at.create(b"f", b"a")
        node = (await at.stat(b"f")).node
        await at.write(b"f", b"bb")
        assert (await at.stat(b"f")).node == node
        at.tree.forgotten(node)
        assert (await at.stat(b"f")).node == node


class Directories(Conformance):
    """mkdir, rmdir, unlink, readdir."""

    @case
    async def test_empty_root(self, at: Mounted) -> None:
        assert await at.names() == []
        assert stat.S_ISDIR((await at.stat(b"")).mode)

    @case
    async def test_missing_name_is_enoent(self, at: Mounted) -> None:
        await at.mkdir(b"d")
        for path in (b"f", b"d/f"):
            with pytest.raises(errors.NotFound):
                await at.stat(path)
            with pytest.raises(errors.NotFound):
                await at.unlink(path)
            with pytest.raises(errors.NotFound):
                await at.rmdir(path)

    @case
    async def test_new_directory_has_mode_and_owner_and_stays_empty(self, at: Mounted) -> None:
        attr = await at.mkdir(b"d", 0o750, User(21, 22))
        assert (attr.mode, attr.uid, attr.gid) == (stat.S_IFDIR | 0o750, 21, 22)
        assert attr == await at.stat(b"d")
        assert await at.names(b"d") == []
        assert await at.names() == [b"d"]

    @case
    async def test_mkdir_of_what_is_there_is_eexist(self, at: Mounted) -> None:
        await at.mkdir(b"d")
        await at.create(b"f")
        await at.symlink(b"nowhere", b"l")
        for path in (b"d", b"f", b"l"):
            with pytest.raises(errors.AlreadyExists):
                await at.mkdir(path)

    @case
    async def test_unlink_of_a_directory_is_eisdir_and_rmdir_of_a_file_enotdir(self, at: Mounted) -> None:
        await at.mkdir(b"d")
        await at.create(b"f")
        await at.symlink(b"d", b"l")
        with pytest.raises(errors.IsADirectory):
            await at.unlink(b"d")
        for path in (b"f", b"l"):
            with pytest.raises(errors.NotADirectory):
                await at.rmdir(path)

    @case
    async def test_rmdir_of_a_directory_with_anything_in_it_is_enotempty(self, at: Mounted) -> None:
        for name, fill in ((b"a", at.create), (b"b", at.mkdir)):
            await at.mkdir(name)
            await fill(name + b"/x")
            with pytest.raises(errors.DirectoryNotEmpty):
                await at.rmdir(name)
        await at.unlink(b"a/x")
        await at.rmdir(b"b/x")
        await at.rmdir(b"a")
        await at.rmdir(b"b")
        assert await at.names() == []

    @case
    async def test_a_file_is_no_directory(self, at: Mounted) -> None:
        if not self.can.checks_kinds:
            return
        node = (await at.create(b"f")).node
        with pytest.raises(errors.NotADirectory):
            await at.tree.lookup(node, b"x")
        with pytest.raises(errors.NotADirectory):
            at.tree.list_names(node, None, 1)
        with pytest.raises(errors.NotADirectory):
            await at.tree.mkdir(node, b"x", 0o755, ROOT)

    @case
    async def test_a_directory_is_no_file(self, at: Mounted) -> None:
        if not self.can.checks_kinds:
            return
        node = (await at.mkdir(b"d")).node
        with pytest.raises(errors.IsADirectory):
            await at.tree.open(node, os.O_RDONLY, ROOT)
        with pytest.raises(errors.InvalidArgument):
            await at.tree.readlink(node)

    @case
    async def test_nothing_is_made_in_a_removed_directory(self, at: Mounted) -> None:
        node = (await at.mkdir(b"d")).node
        await at.rmdir(b"d")
        with pytest.raises(errors.NotFound):
            await at.tree.create(node, b"f", 0o644, os.O_CREAT | os.O_WRONLY, ROOT)
        with pytest.raises(errors.NotFound):
            await at.tree.mkdir(node, b"x", 0o755, ROOT)
        with pytest.raises(errors.NotFound):
            await at.tree.symlink(node, b"l", b"t", ROOT)
        with pytest.raises(errors.NotFound):
            await at.tree.lookup(node, b"x")
        await at.create(b"g")
        with pytest.raises(errors.NotFound):
            await at.tree.rename(at.tree.root, b"g", node, b"g", 0)
        await at.mkdir(b"d")
        assert (await at.stat(b"d")).node != node
        assert await at.names(b"d") == []

    @case
    async def test_emptied_directory_stays(self, at: Mounted) -> None:
        await at.mkdir(b"a")
        await at.mkdir(b"a/b")
        await at.create(b"a/b/f")
        await at.unlink(b"a/b/f")
        assert await at.names(b"a/b") == []
        await at.rmdir(b"a/b")
        assert await at.names(b"a") == []
        assert await at.names() == [b"a"]

    @case
    async def test_parent_of_a_directory(self, at: Mounted) -> None:
        a = await at.mkdir(b"a")
        b = await at.mkdir(b"a/b")
        assert at.tree.parent_of(b.node) == a.node
        assert at.tree.parent_of(a.node) == at.tree.root
        assert at.tree.parent_of(at.tree.root) == at.tree.root

    @case
    async def test_making_and_removing_names_moves_the_mtime_of_the_directory(self, at: Mounted) -> None:
        await at.mkdir(b"d")
        times = [(await at.stat(b"d")).mtime_ns]
        for change in (at.create(b"d/f"), at.rename(b"d/f", b"d/g"), at.unlink(b"d/g"), at.mkdir(b"d/x"),
                       at.rmdir(b"d/x"), at.symlink(b"t", b"d/l")):
            await change
            times.append((await at.stat(b"d")).mtime_ns)
        assert times == sorted(set(times))

    @case
    async def test_setgid_directory_gives_its_group(self, at: Mounted) -> None:
        await at.mkdir(b"d")
        await at.set(b"d", SetAttr(mode=0o2775, gid=77))
        file = await at.create(b"d/f", user=User(5, 6))
        below = await at.mkdir(b"d/x", 0o755, User(5, 6))
        assert (file.uid, file.gid) == (5, 77)
        assert (below.gid, stat.S_IMODE(below.mode)) == (77, 0o2755)

    @case
    async def test_names_of_any_bytes_up_to_255(self, at: Mounted) -> None:
        names = [b"\xff\xfe", b"a b", b"-rf", b"\n", b"...", b"..x", b".hidden", "Käse".encode(),
                 b"x" * 255, b"y" * 254, b"\x01" * 253, b"z" * 252, b"z" * 251, *self.can.odd_names]
        for name in names:
            await at.create(name, name)
        for name in names:
            assert await at.read(name) == name
        assert sorted(await at.names()) == sorted(names)
        for name in names:
            await at.unlink(name)
        assert await at.names() == []

    @case
    async def test_name_of_256_bytes_is_enametoolong(self, at: Mounted) -> None:
        name = b"n" * 256
        for call in (at.stat, at.create, at.mkdir, at.unlink, at.rmdir):
            with pytest.raises(errors.NameTooLong):
                await call(name)

    @case
    async def test_listing_gives_each_entry_once_in_batches_of_any_size(self, at: Mounted) -> None:
        names = {b"n%03d" % number for number in range(100)}
        for name in names:
            await (at.mkdir if name.endswith(b"7") else at.create)(name)
        for limit in (1, 3, 100, 1000):
            assert sorted(await at.names(limit=limit)) == sorted(names)

    @case
    async def test_listing_has_the_attributes_that_lookup_gives(self, at: Mounted) -> None:
        await at.create(b"f", b"abc", 0o600)
        await at.mkdir(b"d", 0o700)
        await at.symlink(b"target", b"l")
        for name, attr in await at.entries():
            assert attr == await at.stat(name)

    @case
    async def test_listing_is_stable_while_the_directory_changes(self, at: Mounted) -> None:
        """What is there all the time is given once; what comes or goes at most once."""
        stay = {b"stay%03d" % number for number in range(60)}
        go = {b"go%03d" % number for number in range(60)}
        for name in stay | go:
            await at.create(name)
        given: list[bytes] = []
        come: set[bytes] = set()
        cookie = 0
        for step in range(1000):
            batch = await at.after(at.tree.root, cookie, 5)
            if not batch:
                break
            given += [name for name, _ in batch]
            cookie = batch[-1][1]
            for name in (b"aaa%03d" % step, b"stay%03d.new" % step, b"zzz%03d" % step):
                if len(come) < 90:
                    await at.create(name)
                    come.add(name)
            if go:
                await at.unlink(go.pop())
        assert len(given) == len(set(given))
        assert stay <= set(given)

    @case
    async def test_removing_what_was_listed_empties_a_directory(self, at: Mounted) -> None:
        """As rm -r does: read some, remove them, read on."""
        await at.mkdir(b"d")
        for number in range(100):
            await at.create(b"d/f%02d" % number)
        node = (await at.stat(b"d")).node
        cookie = 0
        while batch := await at.after(node, cookie, 10):
            for name, cookie in batch:  # noqa: B007 – the last cookie is where the next batch begins
                await at.unlink(b"d/" + name)
        await at.rmdir(b"d")

    @case
    async def test_listing_can_go_back_to_a_cookie_and_to_the_start(self, at: Mounted) -> None:
        for number in range(20):
            await at.create(b"f%02d" % number)
        root = at.tree.root
        first = await at.after(root, 0, 8)
        second = await at.after(root, first[-1][1], 8)
        again = await at.after(root, first[3][1], 4)
        assert [name for name, _ in again] == [name for name, _ in first[4:8]]
        behind = await at.after(root, second[0][1], 2)
        assert [name for name, _ in behind] == [name for name, _ in second[1:3]]
        await at.create(b"e")
        assert b"e" in [name for name, _ in await at.after(root, 0, 1000)]


class Names(Conformance):
    """rename, link, symlink, mknod."""

    @case
    async def test_symlink_keeps_its_target_and_has_the_type(self, at: Mounted) -> None:
        attr = await at.symlink(b"../some/target", b"l")
        assert stat.S_IFMT(attr.mode) == stat.S_IFLNK
        assert attr.size == 14
        at.tree.forgotten(attr.node)
        again = await at.stat(b"l")
        assert stat.S_IFMT(again.mode) == stat.S_IFLNK
        assert await at.tree.readlink(again.node) == b"../some/target"

    @case
    async def test_symlink_over_what_is_there_is_eexist(self, at: Mounted) -> None:
        await at.create(b"f")
        with pytest.raises(errors.AlreadyExists):
            await at.symlink(b"t", b"f")

    @case
    async def test_readlink_of_a_file_is_einval(self, at: Mounted) -> None:
        if not self.can.checks_kinds:
            return
        node = (await at.create(b"f")).node
        with pytest.raises(errors.InvalidArgument):
            await at.tree.readlink(node)

    @case
    async def test_hard_links(self, at: Mounted) -> None:
        await at.create(b"f", b"shared")
        if not self.can.hard_links:
            with pytest.raises(errors.NotPermitted):
                await at.link(b"f", b"g")
            return
        attr = await at.link(b"f", b"g")
        assert (attr.nlink, attr.node) == (2, (await at.stat(b"f")).node)
        await at.unlink(b"f")
        assert await at.read(b"g") == b"shared"
        assert (await at.stat(b"g")).nlink == 1
        with pytest.raises(errors.AlreadyExists):
            await at.link(b"g", b"g")

    @case
    async def test_mknod(self, at: Mounted) -> None:
        attr = await at.tree.mknod(at.tree.root, b"f", stat.S_IFREG | 0o600, 0, ROOT)
        assert attr.mode == stat.S_IFREG | 0o600
        with pytest.raises(errors.AlreadyExists):
            await at.tree.mknod(at.tree.root, b"f", stat.S_IFREG | 0o600, 0, ROOT)
        if self.can.special_files:
            attr = await at.tree.mknod(at.tree.root, b"p", stat.S_IFIFO | 0o600, 0, ROOT)
            assert attr.mode == stat.S_IFIFO | 0o600
        else:
            with pytest.raises(errors.NotPermitted):
                await at.tree.mknod(at.tree.root, b"p", stat.S_IFIFO | 0o600, 0, ROOT)

    @case
    async def test_rename_of_a_file_keeps_node_content_and_mode(self, at: Mounted) -> None:
        await at.mkdir(b"d")
        await at.create(b"f", b"content", 0o640)
        before = await at.stat(b"f")
        await at.rename(b"f", b"d/g")
        after = await at.stat(b"d/g")
        assert not await at.exists(b"f")
        assert await at.read(b"d/g") == b"content"
        assert (after.node, after.mode, after.mtime_ns) == (before.node, before.mode, before.mtime_ns)

    @case
    async def test_open_file_follows_its_renames(self, at: Mounted) -> None:
        await at.create(b"f", b"1")
        file = await at.open(b"f")
        await at.rename(b"f", b"g")
        await file.write(1, b"2")
        await at.rename(b"g", b"h")
        await file.write(2, b"3")
        assert await at.read(b"h") == b"123"
        assert sorted(await at.names()) == [b"h"]
        await file.release()

    @case
    async def test_rename_replaces_a_file_that_may_be_open(self, at: Mounted) -> None:
        await at.create(b"new", b"new")
        await at.create(b"config", b"old")
        old = await at.open(b"config")
        await at.rename(b"new", b"config")
        assert await at.read(b"config") == b"new"
        assert await whole(old) == b"old"
        await old.write(0, b"OLD")
        assert await at.read(b"config") == b"new"
        assert await at.names() == [b"config"]
        await old.release()

    @case
    async def test_rename_of_what_is_not_there_is_enoent(self, at: Mounted) -> None:
        await at.create(b"f")
        with pytest.raises(errors.NotFound):
            await at.rename(b"nothing", b"f")

    @case
    async def test_rename_onto_itself_does_nothing(self, at: Mounted) -> None:
        await at.create(b"f", b"x")
        await at.mkdir(b"d")
        await at.rename(b"f", b"f")
        await at.rename(b"d", b"d")
        assert await at.read(b"f") == b"x"
        assert sorted(await at.names()) == [b"d", b"f"]

    @case
    async def test_rename_between_kinds_is_refused(self, at: Mounted) -> None:
        await at.create(b"f")
        await at.mkdir(b"d")
        with pytest.raises(errors.IsADirectory):
            await at.rename(b"f", b"d")
        with pytest.raises(errors.NotADirectory):
            await at.rename(b"d", b"f")

    @case
    async def test_rename_of_a_directory_takes_all_below_along(self, at: Mounted) -> None:
        await at.mkdir(b"a")
        await at.mkdir(b"a/empty")
        await at.mkdir(b"a/b", 0o700)
        await at.create(b"a/b/f", b"deep", 0o600)
        await at.symlink(b"b/f", b"a/l")
        nodes = [(await at.stat(path)).node for path in (b"a", b"a/empty", b"a/b", b"a/b/f", b"a/l")]
        await at.mkdir(b"z")
        file = await at.open(b"a/b/f")
        await at.rename(b"a", b"z/c")
        assert not await at.exists(b"a")
        moved = [await at.stat(path) for path in (b"z/c", b"z/c/empty", b"z/c/b", b"z/c/b/f", b"z/c/l")]
        assert [attr.node for attr in moved] == nodes
        assert stat.S_IMODE(moved[2].mode) == 0o700
        await file.write(4, b"er")
        assert await at.read(b"z/c/b/f") == b"deeper"
        assert await at.tree.readlink(moved[4].node) == b"b/f"
        assert await at.names(b"z/c/empty") == []
        assert sorted(await at.names(b"z/c")) == [b"b", b"empty", b"l"]
        await at.create(b"z/c/b/new")
        assert sorted(await at.names(b"z/c/b")) == [b"f", b"new"]
        assert at.tree.parent_of(moved[0].node) == (await at.stat(b"z")).node
        await file.release()

    @case
    async def test_rename_of_a_directory_over_an_empty_one_replaces_it(self, at: Mounted) -> None:
        await at.mkdir(b"a")
        await at.create(b"a/f", b"x")
        await at.mkdir(b"b", 0o700)
        node = (await at.stat(b"a")).node
        await at.rename(b"a", b"b")
        assert await at.names() == [b"b"]
        assert (await at.stat(b"b")).node == node
        assert await at.read(b"b/f") == b"x"

    @case
    async def test_rename_of_a_directory_over_a_full_one_is_enotempty(self, at: Mounted) -> None:
        await at.mkdir(b"a")
        await at.mkdir(b"b")
        await at.create(b"b/f")
        with pytest.raises(errors.DirectoryNotEmpty):
            await at.rename(b"a", b"b")

    @case
    async def test_rename_of_a_directory_into_itself_is_einval(self, at: Mounted) -> None:
        await at.mkdir(b"a")
        await at.mkdir(b"a/b")
        for target in (b"a/x", b"a/b/x"):
            with pytest.raises(errors.InvalidArgument):
                await at.rename(b"a", target)
        assert await at.names(b"a") == [b"b"]

    @case
    async def test_rename_with_noreplace(self, at: Mounted) -> None:
        await at.create(b"f", b"1")
        await at.create(b"g", b"2")
        await at.mkdir(b"d")
        for target in (b"g", b"d"):
            with pytest.raises(errors.AlreadyExists):
                await at.rename(b"f", target, NOREPLACE)
        await at.rename(b"f", b"h", NOREPLACE)
        assert await at.read(b"h") == b"1"
        assert await at.read(b"g") == b"2"

    @case
    async def test_rename_with_exchange_swaps_two_files(self, at: Mounted) -> None:
        await at.mkdir(b"d")
        await at.create(b"f", b"1", 0o600)
        await at.create(b"d/g", b"two", 0o640)
        one, two = (await at.stat(b"f")).node, (await at.stat(b"d/g")).node
        await at.rename(b"f", b"d/g", EXCHANGE)
        assert (await at.read(b"f"), await at.read(b"d/g")) == (b"two", b"1")
        assert ((await at.stat(b"f")).node, (await at.stat(b"d/g")).node) == (two, one)
        assert stat.S_IMODE((await at.stat(b"f")).mode) == 0o640

    @case
    async def test_rename_with_exchange_needs_both(self, at: Mounted) -> None:
        await at.create(b"f")
        with pytest.raises(errors.NotFound):
            await at.rename(b"f", b"g", EXCHANGE)

    @case
    async def test_rename_with_exchange_of_a_file_and_a_directory(self, at: Mounted) -> None:
        if not self.can.exchange_directories:
            return
        await at.mkdir(b"d")
        await at.create(b"d/x", b"below")
        await at.create(b"f", b"file")
        one, two = (await at.stat(b"d")).node, (await at.stat(b"f")).node
        await at.rename(b"d", b"f", EXCHANGE)
        assert await at.read(b"d") == b"file"
        assert await at.read(b"f/x") == b"below"
        assert ((await at.stat(b"f")).node, (await at.stat(b"d")).node) == (one, two)

    @case
    async def test_rename_with_unknown_flags_is_einval(self, at: Mounted) -> None:
        await at.create(b"f")
        with pytest.raises(errors.InvalidArgument):
            await at.rename(b"f", b"g", 4)


class ExtendedAttributes(Conformance):
    @case
    async def test_user_attributes_of_files_and_directories(self, at: Mounted) -> None:
        for node in ((await at.create(b"f")).node, (await at.mkdir(b"d")).node):
            before = set(await at.tree.listxattr(node))
            with pytest.raises(errors.NoAttribute):
                await at.tree.getxattr(node, b"user.x")
            await at.tree.setxattr(node, b"user.x", b"\0\xff")
            await at.tree.setxattr(node, b"user.empty", b"")
            assert await at.tree.getxattr(node, b"user.x") == b"\0\xff"
            assert await at.tree.getxattr(node, b"user.empty") == b""
            assert {b"user.x", b"user.empty"} <= set(await at.tree.listxattr(node))
            await at.tree.setxattr(node, b"user.x", b"again")
            assert await at.tree.getxattr(node, b"user.x") == b"again"
            await at.tree.removexattr(node, b"user.x")
            await at.tree.removexattr(node, b"user.empty")
            with pytest.raises(errors.NoAttribute):
                await at.tree.removexattr(node, b"user.x")
            assert {b"user.x", b"user.empty"}.isdisjoint(await at.tree.listxattr(node))
            assert before <= set(await at.tree.listxattr(node))

    @case
    async def test_attributes_survive_writes_truncation_and_rename(self, at: Mounted) -> None:
        node = (await at.create(b"f", b"x")).node
        await at.tree.setxattr(node, b"user.tag", b"kept")
        await at.write(b"f", b"other")
        await at.rename(b"f", b"g")
        assert await at.tree.getxattr((await at.stat(b"g")).node, b"user.tag") == b"kept"

    @case
    async def test_attributes_go_with_the_file(self, at: Mounted) -> None:
        node = (await at.create(b"f", b"x")).node
        await at.tree.setxattr(node, b"user.tag", b"v")
        await at.unlink(b"f")
        again = (await at.create(b"f", b"x")).node
        with pytest.raises(errors.NoAttribute):
            await at.tree.getxattr(again, b"user.tag")

    @case
    async def test_set_attribute_moves_ctime_alone(self, at: Mounted) -> None:
        before = await at.create(b"f")
        await at.tree.setxattr(before.node, b"user.tag", b"v")
        after = await at.stat(b"f")
        assert after.ctime_ns > before.ctime_ns
        assert after.mtime_ns == before.mtime_ns


class WritableTree(Files, Directories, Names, ExtendedAttributes):
    """All of it."""
