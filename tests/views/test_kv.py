"""kv/: what its files and directories are in the store, and the other way round."""

import stat

import pytest

from aspenfs import errors
from aspenfs.kv.types import delete, put
from aspenfs.limits import VALUE_BYTES_MAX
from aspenfs.vfs.tree import SetAttr
from aspenfs.views import kv_attributes
from aspenfs.views.kv_rename import RENAME_KEYS_MAX
from tests.views.subject import KVSetup, User, run


def test_file_is_the_key_of_its_path() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.mounted.mkdir(b"app")
        await kv.mounted.create(b"app/host", b"v1\n")
        assert kv.keys() == {b"app/host": b"v1\n"}
        await kv.store.txn([], [put(b"k/app/port", b"\xff80", 0)])
        assert await kv.mounted.read(b"app/port") == b"\xff80"
        assert await kv.mounted.names(b"app") == [b"host", b"port"]

    run(test)


def test_marker_of_a_directory_is_no_user_key() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.mounted.mkdir(b"a")
        await kv.mounted.mkdir(b"a/b")
        assert kv.keys() == {}
        assert await kv.mounted.names(b"a") == [b"b"]

    run(test)


def test_key_that_is_also_a_directory_is_its_value_file() -> None:
    async def test(kv: KVSetup) -> None:
        at = kv.mounted
        await kv.store.txn([], [put(b"k/a", b"own"), put(b"k/a/b", b"below")])
        assert await at.names() == [b"a"]
        assert await at.names(b"a") == [b"%value", b"b"]
        assert await at.read(b"a/%value") == b"own"
        await at.write(b"a/%value", b"changed")
        assert kv.keys() == {b"a": b"changed", b"a/b": b"below"}
        with pytest.raises(errors.DirectoryNotEmpty):
            await at.rmdir(b"a")
        await at.unlink(b"a/%value")
        assert kv.keys() == {b"a/b": b"below"}
        await at.create(b"a/%value", b"again")
        assert kv.keys()[b"a"] == b"again"
        await kv.store.txn([], [delete(b"k/a/b")])
        assert await at.read(b"a") == b"again"

    run(test)


def test_value_name_does_not_work_where_the_directory_is_gone() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.store.txn([], [put(b"k/a", b"own"), put(b"k/a/b", b"below")])
        node = (await kv.mounted.stat(b"a")).node
        await kv.store.txn([], [delete(b"k/a/b")])
        with pytest.raises(errors.NotFound):
            await kv.tree.lookup(node, b"%value")

    run(test)


def test_directory_without_marker_can_be_emptied_as_rm_r_does() -> None:
    async def test(kv: KVSetup) -> None:
        at = kv.mounted
        await kv.store.txn([], [put(b"k/a", b""), put(b"k/a/b/c", b""), put(b"k/a/b/d", b"")])
        for path in (b"a/%value", b"a/b/c", b"a/b/d"):
            await at.unlink(path)
        assert await at.names(b"a/b") == []
        await at.rmdir(b"a/b")
        assert await at.names(b"a") == []
        await at.rmdir(b"a")
        assert await at.names() == []
        assert kv.store.range(b"d/", b"d0") == []

    run(test)


def test_directory_without_marker_goes_with_its_last_key_when_others_delete_it() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.store.txn([], [put(b"k/a/b/c", b"")])
        assert await kv.mounted.names(b"a") == [b"b"]
        await kv.store.txn([], [delete(b"k/a/b/c")])
        assert await kv.mounted.names() == []

    run(test)


def test_file_moved_out_of_a_directory_without_marker_leaves_it() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.store.txn([], [put(b"k/a/b", b"1"), put(b"k/z/y/x", b"2")])
        await kv.mounted.rename(b"a/b", b"c")
        await kv.mounted.rename(b"z/y", b"y")
        assert await kv.mounted.names() == [b"a", b"c", b"y", b"z"]
        assert await kv.mounted.names(b"z") == []

    run(test)


@pytest.mark.parametrize("name", [b"%", b"100%", b"a%2E", b"%2e", b"%25%", b"%00%", b"x%+"])
def test_name_that_is_no_escape_is_einval_to_make_and_enoent_to_find(name: bytes) -> None:
    async def test(kv: KVSetup) -> None:
        at = kv.mounted
        await at.create(b"f")
        for call in (at.create, at.mkdir):
            with pytest.raises(errors.InvalidArgument):
                await call(name)
        with pytest.raises(errors.InvalidArgument):
            await at.rename(b"f", name)
        for other in (at.stat, at.unlink, at.rmdir):
            with pytest.raises(errors.NotFound):
                await other(name)

    run(test)


def test_long_component_made_through_the_mount_is_the_whole_key() -> None:
    async def test(kv: KVSetup) -> None:
        at = kv.mounted
        key = b"x" * 300
        await at.mkdir(b"x" * 251 + b"%+")
        assert await at.names() == [b"x" * 251 + b"%+"]
        await at.create(b"x" * 251 + b"%+/" + b"x" * 49, b"v")
        assert kv.keys() == {key: b"v"}
        await kv.store.txn([], [put(b"k/" + b"x" * 251, b"short"), put(b"k/" + b"x" * 255, b"fits")])
        assert await at.names() == [b"x" * 251, b"x" * 251 + b"%+", b"x" * 255]
        await at.unlink(b"x" * 251 + b"%+/" + b"x" * 49)
        await at.rmdir(b"x" * 251 + b"%+")
        assert await at.names() == [b"x" * 251, b"x" * 255]
        await kv.store.txn([], [put(b"k/" + key, b"")])
        with pytest.raises(errors.CrossTree):
            await at.rename(b"x" * 251 + b"%+", b"y")

    run(test)


def test_key_of_more_than_1024_bytes_is_enametoolong() -> None:
    async def test(kv: KVSetup) -> None:
        at, path = kv.mounted, b""
        for _ in range(5):
            path += b"d" * 199
            await at.mkdir(path)
            path += b"/"
        await at.create(path + b"f" * 24, b"fits")
        for call in (at.create, at.mkdir):
            with pytest.raises(errors.NameTooLong):
                await call(path + b"f" * 25)
        with pytest.raises(errors.NameTooLong):
            await at.mkdir(path + b"g" * 24)  # no key would fit below

    run(test)


def test_new_file_is_one_revision_although_it_is_opened_to_be_truncated() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.mounted.write(b"f", b"v")
        record = kv.store.get(b"k/f")
        assert record is not None
        assert record.version == 2  # made, written

    run(test)


def test_directory_without_marker_replaces_one_with_its_marker() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.store.txn([], [put(b"k/a/b", b"1")])
        await kv.mounted.mkdir(b"c", 0o700)
        await kv.mounted.rename(b"a", b"c")
        assert stat.S_IMODE((await kv.mounted.stat(b"c")).mode) == 0o755
        assert kv.keys() == {b"c/b": b"1"}

    run(test)


# --- attributes ---


def test_renamed_key_without_a_time_keeps_the_one_it_showed() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.store.txn([], [put(b"k/f", b"v")])
        before = await kv.mounted.stat(b"f")
        await kv.mounted.rename(b"f", b"g")
        after = await kv.mounted.stat(b"g")
        assert after.mtime_ns == before.mtime_ns
        assert after.ctime_ns > before.ctime_ns

    run(test)


def test_key_made_by_others_has_defaults() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.store.txn([], [put(b"k/plain", b"v")])
        first = await kv.mounted.stat(b"plain")
        assert (first.mode, first.uid, first.gid) == (stat.S_IFREG | 0o644, 1000, 1000)
        await kv.store.txn([], [put(b"k/plain", b"w")])
        assert (await kv.mounted.stat(b"plain")).mtime_ns > first.mtime_ns

    run(test)


def test_overwrite_stamps_the_time_and_keeps_everything_else() -> None:
    async def test(kv: KVSetup) -> None:
        attr = await kv.mounted.create(b"f", b"old", 0o600, User(7, 8))
        await kv.mounted.set(b"f", SetAttr(mtime_ns=1, atime_ns=1))
        await kv.tree.setxattr(attr.node, b"user.tag", b"t")
        await kv.store.txn([], [kv_attributes.overwrite(b"k/f", b"brand new", 1_800_000_000_000_000_000)])
        after = await kv.mounted.stat(b"f")
        assert await kv.mounted.read(b"f") == b"brand new"
        assert (stat.S_IMODE(after.mode), after.uid, after.node) == (0o600, 7, attr.node)
        assert {after.mtime_ns, after.ctime_ns, after.atime_ns} == {1_800_000_000_000_000_000}
        assert await kv.tree.getxattr(after.node, b"user.tag") == b"t"

    run(test)


def test_directory_without_marker_has_the_time_of_what_is_in_it_and_can_be_changed() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.store.txn([], [put(b"k/d/f", b"", 0, kv_attributes.stamp(123) | {"ctime": 123})])
        attr = await kv.mounted.stat(b"d")
        assert (attr.mode, attr.mtime_ns, attr.uid) == (stat.S_IFDIR | 0o755, 123, 1000)
        assert stat.S_IMODE((await kv.mounted.set(b"d", SetAttr(mode=0o700))).mode) == 0o700
        assert kv.store.get(b"d/d/") is not None

    run(test)


def test_revision_version_and_lease_are_attributes() -> None:
    async def test(kv: KVSetup) -> None:
        tree = kv.tree
        node = (await kv.mounted.create(b"f", b"1")).node
        record = kv.store.get(b"k/f")
        assert record is not None
        assert await tree.getxattr(node, b"user.aspen.revision") == str(record.mod_revision).encode()
        assert await tree.getxattr(node, b"user.aspen.version") == b"2"
        with pytest.raises(errors.NoAttribute):
            await tree.getxattr(node, b"user.aspen.lease")
        lease = await kv.store.lease_grant(60_000)
        await kv.store.txn([], [put(b"k/f", b"2", lease)])
        assert await tree.getxattr(node, b"user.aspen.lease") == str(lease).encode()
        assert set(await tree.listxattr(node)) == {
            b"user.aspen.revision", b"user.aspen.version", b"user.aspen.lease"}
        await kv.mounted.append(b"f", b"3")
        after = kv.store.get(b"k/f")
        assert after is not None
        assert (after.value, after.lease) == (b"23", lease)

    run(test)


def test_other_namespaces_are_eopnotsupp_and_too_much_is_enospc() -> None:
    async def test(kv: KVSetup) -> None:
        tree = kv.tree
        node = (await kv.mounted.create(b"f")).node
        for name in (b"trusted.x", b"security.x", b"system.posix_acl_access", b"user.aspen.revision"):
            with pytest.raises(errors.NotSupported):
                await tree.setxattr(node, name, b"v")
        with pytest.raises(errors.NoSpace):
            await tree.setxattr(node, b"user.big", bytes(4096))
        for number in range(4):
            await tree.setxattr(node, b"user.%d" % number, bytes(4000))
        with pytest.raises(errors.NoSpace):
            await tree.setxattr(node, b"user.more", bytes(4000))
        await tree.setxattr(node, b"user.3", b"less")
        await tree.setxattr(node, b"user.more", bytes(3000))
        for number in range(27):
            await tree.setxattr(node, b"user.s%d" % number, b"")
        with pytest.raises(errors.NoSpace):
            await tree.setxattr(node, b"user.onemore", b"")

    run(test)


def test_attribute_names_of_any_bytes_come_back() -> None:
    async def test(kv: KVSetup) -> None:
        node = (await kv.mounted.create(b"f")).node
        name = b"user.\xff\xfe" + bytes(range(1, 200))
        await kv.tree.setxattr(node, name, b"v")
        assert name in await kv.tree.listxattr(node)
        assert await kv.tree.getxattr(node, name) == b"v"
        with pytest.raises(errors.OutOfRange):
            await kv.tree.setxattr(node, b"user." + b"n" * 250, b"")

    run(test)


# --- limits ---


def test_write_over_the_value_limit_takes_what_fits_then_efbig() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.mounted.create(b"f", bytes(VALUE_BYTES_MAX - 3))
        file = await kv.mounted.open(b"f")
        assert await file.write(VALUE_BYTES_MAX - 3, b"12345") == 3
        with pytest.raises(errors.TooLarge):
            await file.write(VALUE_BYTES_MAX, b"x")
        with pytest.raises(errors.TooLarge):
            await kv.mounted.append(b"f", b"x")
        assert len(kv.keys()[b"f"]) == VALUE_BYTES_MAX

    run(test)


def test_largest_value_with_largest_attributes_can_be_renamed() -> None:
    async def test(kv: KVSetup) -> None:
        node = (await kv.mounted.create(b"f", bytes(VALUE_BYTES_MAX))).node
        for number in range(4):
            await kv.tree.setxattr(node, b"user.%d" % number, bytes(4000))
        await kv.mounted.create(b"g", bytes(VALUE_BYTES_MAX))
        await kv.mounted.rename(b"f", b"g")
        assert set(kv.keys()) == {b"g"}

    run(test)


def test_exchange_of_two_largest_values_is_exdev_and_changes_nothing() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.mounted.create(b"f", b"f" * VALUE_BYTES_MAX)
        await kv.mounted.create(b"g", b"g" * VALUE_BYTES_MAX)
        with pytest.raises(errors.CrossTree):
            await kv.mounted.rename(b"f", b"g", 2)
        assert kv.keys()[b"f"][:1] == b"f"

    run(test)


def test_directory_moves_at_once_up_to_its_limit_and_is_exdev_beyond() -> None:
    async def test(kv: KVSetup) -> None:
        at = kv.mounted
        await at.mkdir(b"d")
        await at.mkdir(b"e")
        for number in range(RENAME_KEYS_MAX - 1):  # and the marker
            await at.create(b"d/%d" % number, b"x")
        revision = kv.store.revision
        await at.rename(b"d", b"e")
        assert kv.store.revision == revision + 1
        assert len(await at.names(b"e")) == RENAME_KEYS_MAX - 1
        await at.create(b"e/one more")
        before = kv.keys()
        with pytest.raises(errors.CrossTree):
            await at.rename(b"e", b"f")
        assert kv.keys() == before

    run(test)


def test_directory_of_too_many_bytes_is_exdev() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.mounted.mkdir(b"d")
        for number in range(3):
            await kv.mounted.create(b"d/%d" % number, bytes(400_000))
        with pytest.raises(errors.CrossTree):
            await kv.mounted.rename(b"d", b"e")
        assert len(await kv.mounted.names(b"d")) == 3

    run(test)


def test_directory_takes_its_own_key_along() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.store.txn([], [put(b"k/a", b"own"), put(b"k/a/", b"empty"), put(b"k/a/b/c", b"deep"),
                                put(b"k/a-b", b"other"), put(b"k/ab", b"other")])
        file = await kv.mounted.open(b"a/%value")
        await kv.mounted.rename(b"a", b"z")
        assert kv.keys() == {b"z": b"own", b"z/": b"empty", b"z/b/c": b"deep",
                             b"a-b": b"other", b"ab": b"other"}
        await file.write(0, b"OWN")
        assert kv.keys()[b"z"] == b"OWN"

    run(test)


def test_directory_over_one_whose_own_key_exists_is_enotempty() -> None:
    async def test(kv: KVSetup) -> None:
        at = kv.mounted
        await at.mkdir(b"a")
        await at.mkdir(b"b")
        await kv.store.txn([], [put(b"k/b", b"own")])
        with pytest.raises(errors.DirectoryNotEmpty):
            await at.rename(b"a", b"b")

    run(test)


# --- nodes ---


def test_node_of_a_file_is_made_of_its_creation() -> None:
    async def test(kv: KVSetup) -> None:
        await kv.store.txn([], [put(b"k/a", b""), put(b"k/b", b"")])
        record = kv.store.get(b"k/b")
        assert record is not None
        assert (await kv.mounted.stat(b"b")).node == record.create_revision << 7 | 1

    run(test)


def test_forgotten_nodes_leave_nothing_behind() -> None:
    async def test(kv: KVSetup) -> None:
        at, nodes = kv.mounted, kv.tree.space.nodes
        await at.mkdir(b"d")
        await at.create(b"d/f")
        await at.create(b"d/g")
        await at.rename(b"d/f", b"d/g")
        await at.unlink(b"d/g")
        await at.rmdir(b"d")
        for node in list(nodes.by_id):
            kv.tree.forgotten(node)
        assert list(nodes.by_id) == [kv.tree.root]
        assert nodes.files == {}
        assert list(nodes.directories) == [b""]
        with pytest.raises(errors.Stale):
            await kv.tree.getattr(12345)

    run(test)


def test_new_file_gets_no_id_that_an_unlinked_one_still_has() -> None:
    async def test(kv: KVSetup) -> None:
        at = kv.mounted
        victim = (await at.create(b"b", b"old")).node
        mover = (await at.create(b"a", b"new")).node
        await at.rename(b"a", b"b")  # the key keeps its creation, the file its id
        kv.tree.forgotten(mover)
        again = (await at.stat(b"b")).node
        assert again not in (victim, mover)
        assert (await kv.tree.getattr(victim)).nlink == 0

    run(test)
