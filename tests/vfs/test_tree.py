"""Who may change the attributes of an inode, by what is stored of it (setattr_prepare in Linux)."""

import os
import stat

import pytest

from aspenfs import errors
from aspenfs.vfs.tree import Attr, SetAttr, check_change, in_group
from tests.views.subject import User

NOW = 1_000_000_000_000
OWNER, OTHER, ROOT = User(1000, 100), User(1001, 101), User()


def attr(mode: int = 0o644, uid: int = 1000, gid: int = 100) -> Attr:
    return Attr(5, stat.S_IFREG | mode, 1, uid, gid, 0, 0, 0, NOW, NOW, NOW)


@pytest.mark.parametrize(
    "wanted",
    [
        SetAttr(mode=0o600), SetAttr(mode=0o4644), SetAttr(uid=1001), SetAttr(gid=101),
        SetAttr(mtime_ns=NOW - 10**10), SetAttr(atime_ns=NOW + 10**10, mtime_ns=NOW),
    ],
)  # fmt: skip
def test_only_the_owner_and_root_change_what_is_the_owners(wanted: SetAttr) -> None:
    with pytest.raises(errors.NotPermitted):
        check_change(attr(), wanted, OTHER, NOW)
    for caller in (OWNER, ROOT):
        assert check_change(attr(), wanted, caller, NOW) == wanted


@pytest.mark.parametrize(
    "wanted",
    [SetAttr(mtime_ns=NOW), SetAttr(atime_ns=NOW, mtime_ns=NOW + 10**6), SetAttr(size=3), SetAttr()],
)
def test_others_may_touch_and_truncate_as_the_kernel_has_allowed(wanted: SetAttr) -> None:
    assert check_change(attr(), wanted, OTHER, NOW) == wanted


def test_others_take_set_ids_away_by_writing_and_nothing_else() -> None:
    lent = attr(0o6755)
    for mode in (0o755, 0o4755, 0o2755, 0o6755):
        assert check_change(lent, SetAttr(mode=mode), OTHER, NOW).mode == mode
    for mode in (0o754, 0o7755, 0o777):
        with pytest.raises(errors.NotPermitted):
            check_change(lent, SetAttr(mode=mode), OTHER, NOW)
    with pytest.raises(errors.NotPermitted):
        check_change(attr(0o755), SetAttr(mode=0o4755), OTHER, NOW)


def test_an_owner_outside_the_group_sets_no_group_id() -> None:
    wanted = SetAttr(mode=0o2755)
    assert check_change(attr(), wanted, OWNER, NOW).mode == 0o2755
    assert check_change(attr(gid=500), wanted, OWNER, NOW).mode == 0o755
    assert check_change(attr(gid=500), wanted, ROOT, NOW).mode == 0o2755
    assert check_change(attr(gid=500), wanted._replace(gid=100), OWNER, NOW).mode == 0o2755


def test_groups_are_those_of_the_process() -> None:
    caller = User(1000, 100)
    caller.pid = os.getpid()
    assert in_group(caller, 100)
    for gid in os.getgroups():
        assert in_group(caller, gid)
    assert not in_group(caller, 4_000_000)
    caller.pid = 0  # whoever this process can not see
    assert not in_group(caller, os.getgid())
