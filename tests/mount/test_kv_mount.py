"""kv/ through a shell and through `aspen kv`: each sees at once what the other wrote."""

import mmap
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from tests.mount.mounting import Mount
from tests.mount.posix.calls import EXCHANGE, NOREPLACE, error, renameat2

MIB: Final = 1 << 20
RENAME_KEYS_MAX: Final = 58  # docs/design/kv-paths.md
Shell = Callable[[str], str]


@pytest.fixture
def kv(mount: Mount, request: pytest.FixtureRequest) -> Path:
    """A directory of its own in kv/."""
    path = mount.mountpoint / "kv" / str(request.node.name)
    path.mkdir()
    return path


@pytest.fixture
def shell(mount: Mount, kv: Path) -> Shell:
    """Runs a line of bash in that directory; its output. A failure, or a word on stderr, fails the test."""

    def run(line: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", line],
            cwd=kv,
            env={**os.environ, **mount.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), line
        return done.stdout

    return run


def test_echo_and_cat(shell: Shell) -> None:
    shell("echo one > key; echo two >> key; printf three > other")
    assert shell("cat key other") == "one\ntwo\nthree"
    shell("echo new > key")
    assert shell("cat key; wc -c < key") == "new\n4\n"
    shell(": > key")
    assert shell("cat key; stat -c %s key") == "0\n"


def test_copies_moves_and_removals(shell: Shell) -> None:
    shell("mkdir -p a/b/c; echo value > a/b/c/key; cp a/b/c/key copy; cp -r a tree; mv copy moved")
    assert shell("cat moved tree/b/c/key; ls") == "value\nvalue\na\nmoved\ntree\n"
    shell("cp -p moved kept; mv tree a/; rm moved; rm -r a/b")
    assert shell("find . -type f | sort") == "./a/tree/b/c/key\n./kept\n"
    shell("rmdir a/tree/b/c 2>/dev/null && exit 1; rm -rf a kept")
    assert shell("ls -A") == ""


def test_listing_finding_and_stat(shell: Shell) -> None:
    shell("mkdir -p app/db; echo 12345 > app/db/host; touch app/empty; echo x > app/name; chmod 600 app/name")
    assert shell("find app | sort") == "app\napp/db\napp/db/host\napp/empty\napp/name\n"
    assert shell("stat -c '%A %s %U %F' app/name app/db/host") == (
        "-rw------- 2 root regular file\n-rw-r--r-- 6 root regular file\n"
    )
    assert shell("ls -l app | awk '{print $1, $5, $9}' | sed 1d").splitlines()[1:] == [
        "-rw-r--r-- 0 empty",
        "-rw------- 2 name",
    ]
    assert shell("find . -size +4c -name 'h*'") == "./app/db/host\n"
    assert shell("du -a --apparent-size -b app/db/host | cut -f1") == "6\n"


def test_chmod_chown_and_touch(shell: Shell, kv: Path) -> None:
    shell("echo x > key; chmod 640 key; chown 12:34 key; touch -d '2001-02-03 04:05:06.789 UTC' key")
    assert shell("stat -c '%a %u %g' key") == "640 12 34\n"
    assert os.stat(kv / "key").st_mtime_ns == 981_173_106_789_000_000
    shell("echo y >> key")
    assert shell("stat -c '%a %u %g' key; cat key") == "640 12 34\nx\ny\n"
    assert os.stat(kv / "key").st_mtime_ns > 981_173_106_789_000_000


def test_symbolic_links(shell: Shell) -> None:
    shell("echo x > key; ln -s key link; ln -s no/where dangling; ln -sfn key link")
    assert shell("cat link; readlink link dangling; stat -c %F link") == "x\nkey\nno/where\nsymbolic link\n"
    shell("cp -a dangling copy; rsync -aX dangling another; rm copy another")
    shell("echo y > link; rm link")
    assert shell("cat key") == "y\n"


def test_editors_that_write_a_new_file_and_rename_it(shell: Shell) -> None:
    shell("printf 'a=1\\nb=2\\n' > conf; sed -i s/1/one/ conf; sed -i.bak s/2/two/ conf")
    assert shell("cat conf conf.bak; ls") == "a=one\nb=two\na=one\nb=2\nconf\nconf.bak\n"
    # As vim with backupcopy=no: the old one aside, the new one written and synced, the old one removed.
    shell("mv conf conf~; echo new > conf; sync conf; chmod --reference=conf~ conf; rm conf~")
    assert shell("cat conf; ls") == "new\nconf\nconf.bak\n"
    shell("echo newest > .conf.swp; mv -f .conf.swp conf")
    assert shell("cat conf") == "newest\n"


def test_files_that_are_written_in_pieces(shell: Shell, kv: Path) -> None:
    shell("dd if=/dev/zero of=key bs=1000 count=5 status=none")
    shell("printf X | dd of=key bs=1 seek=2500 conv=notrunc status=none")
    data = (kv / "key").read_bytes()
    assert data == bytes(2500) + b"X" + bytes(2499)
    shell("truncate -s 10 key; truncate -s 20 key")
    assert (kv / "key").read_bytes() == bytes(20)


# --- with the command line ---


def name_of(kv: Path, key: str) -> str:
    return f"{kv.name}/{key}"


def test_what_the_shell_writes_is_a_key_at_once(mount: Mount, kv: Path) -> None:
    for number in range(5):
        (kv / "key").write_text(f"value {number}")
        assert mount.aspen("kv", "get", name_of(kv, "key")) == f"value {number}".encode()
    os.rename(kv / "key", kv / "moved")
    assert mount.aspen("kv", "get", name_of(kv, "key"), check=False) == b""
    assert mount.aspen("kv", "get", name_of(kv, "moved")) == b"value 4"
    os.unlink(kv / "moved")
    assert mount.aspen("kv", "get", name_of(kv, "moved"), check=False) == b""


def test_what_the_command_puts_is_in_the_mount_at_once(mount: Mount, kv: Path) -> None:
    """Also where the kernel has cached that there is no such name, the old size, and the old pages."""
    key = name_of(kv, "key")
    assert error(os.stat, kv / "key") == "ENOENT"
    for value in ("first", "second, longer", "3"):
        mount.aspen("kv", "put", key, value)
        assert os.stat(kv / "key").st_size == len(value)
        assert (kv / "key").read_text() == value
    assert os.listdir(kv) == ["key"]
    mount.aspen("kv", "delete", key)
    assert error(os.stat, kv / "key") == "ENOENT"
    assert os.listdir(kv) == []


def test_a_file_that_is_open_shows_what_the_command_puts(mount: Mount, kv: Path) -> None:
    (kv / "key").write_text("old")
    descriptor = os.open(kv / "key", os.O_RDONLY)
    assert os.pread(descriptor, 100, 0) == b"old"
    mount.aspen("kv", "put", name_of(kv, "key"), "something new")
    assert os.fstat(descriptor).st_size == 13
    assert os.pread(descriptor, 100, 0) == b"something new"
    os.close(descriptor)


def test_directories_come_and_go_with_the_keys_of_others(mount: Mount, kv: Path) -> None:
    assert error(os.stat, kv / "a" / "b") == "ENOENT"
    mount.aspen("kv", "put", name_of(kv, "a/b/c"), "x")
    assert (kv / "a" / "b" / "c").read_text() == "x"
    assert os.listdir(kv) == ["a"]
    mount.aspen("kv", "delete", name_of(kv, "a/b/c"))
    assert error(os.stat, kv / "a") == "ENOENT"


def test_a_key_that_becomes_a_directory(mount: Mount, kv: Path) -> None:
    (kv / "a").write_text("value of a")
    mount.aspen("kv", "put", name_of(kv, "a/b"), "value of b")
    assert os.path.isdir(kv / "a")
    assert sorted(os.listdir(kv / "a")) == ["%value", "b"]
    assert (kv / "a" / "%value").read_text() == "value of a"
    mount.aspen("kv", "delete", name_of(kv, "a/b"))
    assert (kv / "a").read_text() == "value of a"


def test_keys_of_any_bytes_have_their_path(mount: Mount, kv: Path) -> None:
    for key, path in [
        ("x//y", "x/%empty/y"),
        ("..", "%2E%2E"),
        ("100%", "100%25"),
        ("l" * 300, f"{'l' * 251}%+/{'l' * 49}"),
    ]:
        mount.aspen("kv", "put", name_of(kv, key), "v")
        assert (kv / path).read_text() == "v", key
        (kv / path).write_text("w")
        assert mount.aspen("kv", "get", name_of(kv, key)) == b"w"
    os.close(os.open(os.fsencode(kv) + b"/\xff\xfe", os.O_CREAT | os.O_WRONLY))
    assert b"\xff\xfe" in mount.aspen("kv", "ls", kv.name + "/")


def test_revision_version_and_lease_are_attributes(mount: Mount, kv: Path) -> None:
    path = kv / "key"
    path.write_text("one")
    first = int(os.getxattr(path, "user.aspen.revision"))
    version = int(os.getxattr(path, "user.aspen.version"))
    mount.aspen("kv", "put", name_of(kv, "key"), "two")
    assert int(os.getxattr(path, "user.aspen.revision")) > first
    assert int(os.getxattr(path, "user.aspen.version")) == version + 1
    assert error(os.getxattr, path, "user.aspen.lease") == "ENODATA"
    assert error(os.setxattr, path, "user.aspen.revision", b"1") == "EOPNOTSUPP"
    os.setxattr(path, "user.note", b"mine")
    assert os.getxattr(path, "user.note") == b"mine"


# --- limits ---


def test_a_value_has_1_mib_at_most(kv: Path) -> None:
    descriptor = os.open(kv / "key", os.O_RDWR | os.O_CREAT)
    assert os.write(descriptor, b"x" * MIB) == MIB
    assert error(os.write, descriptor, b"y") == "EFBIG"
    assert error(os.ftruncate, descriptor, MIB + 1) == "EFBIG"
    assert error(os.pwrite, descriptor, b"y", 2 * MIB) == "EFBIG"
    assert os.fstat(descriptor).st_size == MIB
    assert os.pread(descriptor, 2 * MIB, 0) == b"x" * MIB
    os.close(descriptor)


def test_a_directory_moves_whole_up_to_a_limit_and_then_not_at_all(kv: Path, shell: Shell) -> None:
    small, large = kv / "small", kv / "large"
    for path, count in (
        (small, RENAME_KEYS_MAX - 1),
        (large, RENAME_KEYS_MAX + 1),
    ):  # the directory itself counts
        path.mkdir()
        for number in range(count):
            (path / f"{number}").write_text(f"{number}")
    os.rename(small, kv / "moved")
    assert len(os.listdir(kv / "moved")) == RENAME_KEYS_MAX - 1
    assert not small.exists()
    assert error(os.rename, large, kv / "elsewhere") == "EXDEV"
    assert len(os.listdir(large)) == RENAME_KEYS_MAX + 1
    shell("mv large elsewhere")
    assert shell("ls elsewhere | wc -l; cat elsewhere/7; ls") == f"{RENAME_KEYS_MAX + 1}\n7elsewhere\nmoved\n"


def test_renames(kv: Path) -> None:
    (kv / "a").write_text("a")
    (kv / "b").write_text("b")
    (kv / "full" / "sub").mkdir(parents=True)
    (kv / "empty").mkdir()
    assert error(renameat2, kv / "a", kv / "b", NOREPLACE) == "EEXIST"
    renameat2(kv / "a", kv / "b", EXCHANGE)
    assert (kv / "a").read_text() == "b"
    assert error(os.rename, kv / "a", kv / "empty") == "EISDIR"
    assert error(os.rename, kv / "empty", kv / "a") == "ENOTDIR"
    assert error(os.rename, kv / "empty", kv / "full") == "ENOTEMPTY"
    assert error(os.rename, kv / "full", kv / "full" / "sub" / "x") == "EINVAL"
    os.rename(kv / "full", kv / "empty")
    assert os.listdir(kv / "empty") == ["sub"]


def test_what_a_key_cannot_be(kv: Path) -> None:
    (kv / "key").write_text("x")
    assert error(os.link, kv / "key", kv / "second") == "EPERM"
    assert error(os.mkfifo, kv / "fifo") == "EPERM"
    assert error(os.mknod, kv / "device", 0o20600, 259) == "EPERM"
    assert error((kv / "100%").write_text, "x") == "EINVAL"
    deep = kv / "/".join(["d" * 200] * 6)
    assert error(os.makedirs, deep) == "ENAMETOOLONG"


def test_a_removed_key_reads_on_where_it_is_open(kv: Path) -> None:
    (kv / "key").write_text("data")
    descriptor = os.open(kv / "key", os.O_RDONLY)
    os.unlink(kv / "key")
    assert os.read(descriptor, 10) == b"data"
    os.close(descriptor)


def test_the_root_holds_the_trees_and_nothing_else(mount: Mount) -> None:
    """docs/posix.md."""
    root = mount.mountpoint
    assert sorted(os.listdir(root)) == ["cluster", "files", "kv"]
    assert error(os.mkdir, root / "new") == "EROFS"
    assert error((root / "new").write_text, "x") == "EROFS"
    assert error(os.symlink, "x", root / "new") == "EROFS"
    assert error(os.rmdir, root / "kv") == "EROFS"
    assert error(os.unlink, root / "kv") in ("EROFS", "EISDIR")
    assert error(os.rename, root / "kv", root / "other") == "EROFS"
    assert error(os.chmod, root, 0o777) == "EROFS"
    assert len({os.stat(root / name).st_ino for name in ("cluster", "files", "kv")}) == 3


def test_a_mapping_is_written_back_in_place_also_by_a_handle_that_appends(kv: Path) -> None:
    path = kv / "mapped"
    path.write_bytes(b"a" * 5000)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
    with mmap.mmap(descriptor, 5000) as mapped:
        mapped[10:15] = b"HELLO"
        mapped.flush()
    assert path.read_bytes() == b"a" * 10 + b"HELLO" + b"a" * 4985
    os.write(descriptor, b"end")
    os.close(descriptor)
    assert path.read_bytes()[-4:] == b"aend"
