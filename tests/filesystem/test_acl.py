"""ACLs: what the kernel leaves to the file system."""

import pytest

from aspenfs import errors
from aspenfs.filesystem import acl
from aspenfs.filesystem.acl import GROUP_OBJ, MASK, OTHER, USER, USER_OBJ, AclEntry
from aspenfs.vfs.tree import SetAttr
from tests.filesystem.volumes import CALLER, Setup, run
from tests.views.subject import User

NONE = 0xFFFFFFFF
NAMED = [
    AclEntry(USER_OBJ, 7, NONE),
    AclEntry(USER, 7, 1000),
    AclEntry(GROUP_OBJ, 5, NONE),
    AclEntry(MASK, 7, NONE),
    AclEntry(OTHER, 5, NONE),
]
PLAIN = [AclEntry(USER_OBJ, 6, NONE), AclEntry(GROUP_OBJ, 4, NONE), AclEntry(OTHER, 0, NONE)]


@pytest.mark.parametrize(
    "entries",
    [
        NAMED[1:],
        [*PLAIN, PLAIN[0]],
        [*PLAIN, AclEntry(USER, 7, 1)],
        [*PLAIN, AclEntry(64, 7, NONE)],
        [PLAIN[0]._replace(permissions=8), *PLAIN[1:]],
    ],
)
def test_an_invalid_list_is_EINVAL(entries: list[AclEntry]) -> None:
    with pytest.raises(errors.InvalidArgument):
        acl.parse(acl.pack(entries))
    with pytest.raises(errors.InvalidArgument):
        acl.parse(acl.pack(PLAIN)[:-1])
    with pytest.raises(errors.InvalidArgument):
        acl.parse(b"\1" + acl.pack(PLAIN)[1:])


def test_the_group_bits_of_the_mode_are_the_mask_if_there_is_one() -> None:
    assert acl.mode_bits(NAMED) == 0o775
    assert acl.mode_bits(PLAIN) == 0o640
    assert acl.mode_bits(acl.with_mode(NAMED, 0o700)) == 0o700
    assert acl.with_mode(NAMED, 0o700)[2] == NAMED[2], "the owning group's own entry stays"


def test_an_access_list_sets_the_mode_and_chmod_sets_the_list() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        attr, _ = await tree.create(1, b"f", 0o600, 2, CALLER)
        await tree.setxattr(attr.node, acl.ACCESS, acl.pack(NAMED))
        assert (await tree.getattr(attr.node)).mode & 0o7777 == 0o775
        await tree.setattr(attr.node, SetAttr(mode=0o750), CALLER)
        held = acl.parse(await tree.getxattr(attr.node, acl.ACCESS))
        assert acl.mode_bits(held) == 0o750
        await tree.setxattr(attr.node, acl.ACCESS, acl.pack(PLAIN))
        with pytest.raises(errors.NoAttribute):
            await tree.getxattr(attr.node, acl.ACCESS)
        with pytest.raises(errors.AccessDenied):
            await tree.setxattr(attr.node, acl.DEFAULT, acl.pack(NAMED))

    run(test)


def test_only_the_owner_sets_a_list_and_outside_the_group_takes_its_bit() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        attr, _ = await tree.create(1, b"f", 0o600, 2, CALLER)
        for gid, mode in ((100, 0o2775), (500, 0o775)):
            await tree.setattr(attr.node, SetAttr(mode=0o2755, uid=1000, gid=gid), CALLER)
            await tree.setxattr(attr.node, acl.ACCESS, acl.pack(NAMED), User(1000, 100))
            assert (await tree.getattr(attr.node)).mode & 0o7777 == mode
        with pytest.raises(errors.NotPermitted):
            await tree.setxattr(attr.node, acl.ACCESS, acl.pack(PLAIN), User(1001, 100))
        with pytest.raises(errors.NotPermitted):
            await tree.removexattr(attr.node, acl.ACCESS, User(1001, 100))
        for _ in range(2):  # one that is not there goes without an error
            await tree.removexattr(attr.node, acl.ACCESS, User(1000, 100))

    run(test)


def test_a_default_list_is_inherited_and_limits_the_mode() -> None:
    async def test(setup: Setup) -> None:
        tree = setup.tree
        top = (await tree.mkdir(1, b"top", 0o755, CALLER)).node
        await tree.setxattr(top, acl.DEFAULT, acl.pack(NAMED))
        below = await tree.mkdir(top, b"below", 0o777, CALLER)
        attr, _ = await tree.create(below.node, b"f", 0o666, 2, CALLER)
        link = await tree.symlink(top, b"l", b"t", CALLER)
        assert (below.mode & 0o777, attr.mode & 0o777, link.mode & 0o777) == (0o775, 0o664, 0o777)
        assert await tree.getxattr(below.node, acl.DEFAULT) == acl.pack(NAMED)
        assert acl.mode_bits(acl.parse(await tree.getxattr(attr.node, acl.ACCESS))) == 0o664
        assert list(await tree.listxattr(link.node)) == []

    run(test)
