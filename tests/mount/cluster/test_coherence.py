"""One tree from several hosts: what a program sees of what others do elsewhere, through real kernels."""

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import pytest

from aspenfs.limits import SESSION_TTL_MS
from tests.mount.clusters import Cluster, Node

pytestmark = pytest.mark.mount
KEPT_S = 1.0  # names and attributes in another host's kernel
GRACE_S = 1.5  # and what two busy cores may add
SOON_S = 30.0  # where a kernel must be told: it takes ms, but who tells may have to wait for a processor
ORPHANS_S = SESSION_TTL_MS / 1000 + 30  # until those of a host that is gone have ended


def at_once(*work: Any) -> list[Any]:
    """Runs all at the same time; what each returned."""
    with ThreadPoolExecutor(len(work)) as pool:
        return [future.result() for future in [pool.submit(one) for one in work]]


def python(node: Node, script: str, *arguments: str, check: bool = True, timeout_s: float = 60) -> str:
    """Runs a script with `os`, `sys`, `time`, `mmap` and `fcntl` in the mount's directory `files`."""
    text = f"import fcntl, mmap, os, sys, time\nos.chdir({str(node.mountpoint)!r} + '/files')\n{script}"
    done = node.run(sys.executable, "-c", text, *arguments, check=check, timeout_s=timeout_s)
    return done.stdout.decode() + done.stderr.decode()


@contextlib.contextmanager
def holding(node: Node, script: str) -> Iterator[Any]:
    """A process in the mount that does one step of `script`, a generator `steps()`, for each call; what the
    step yields."""
    text = f"""
import fcntl, mmap, os, sys
os.chdir({str(node.mountpoint)!r} + '/files')
{script}
step = steps()
for line in sys.stdin:
    print(next(step), flush=True)
"""
    command = [*node.network.place(node.number), sys.executable, "-c", text]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/"
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def step() -> str:
            stdin.write("\n")
            stdin.flush()
            return stdout.readline().rstrip("\n")

        try:
            yield step
        finally:
            process.kill()  # not one that waits for a daemon: then the tests end its daemon first


def until(condition: Any, seconds: float) -> float:
    """Waits until it holds: a look that begins so late must find it, however long the look itself takes."""
    begun = time.monotonic()
    while True:
        looked = time.monotonic() - begun
        if condition():
            return looked
        assert looked < seconds, "in vain"
        time.sleep(0.02)


# --- names ---


def test_an_exclusive_create_succeeds_at_one_mount_only(cluster: Cluster) -> None:
    script = """
for n in range(30):
    try:
        os.close(os.open(f'excl-{n}', os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        print(n)
    except FileExistsError:
        pass
"""
    won = [out.split() for out in at_once(*(lambda node=node: python(node, script) for node in cluster))]
    assert sorted(n for some in won for n in some) == sorted(str(n) for n in range(30))


def test_renames_that_race_leave_each_file_once(cluster: Cluster) -> None:
    first, *_ = cluster
    first.sh("mkdir files/race && for i in $(seq 30); do echo $i > files/race/$i; done")
    script = """
won = 0
for n in range(1, 31):
    try:
        os.rename(f'race/{n}', f'race/{sys.argv[1]}-{n}')
        won += 1
    except FileNotFoundError:
        pass
print(won)
"""
    counts = at_once(*(lambda n=node: python(n, script, str(n.number)) for node in cluster))
    assert sum(map(int, counts)) == 30
    for node in cluster:
        assert sorted(map(int, node.sh("cat files/race/*").split())) == list(range(1, 31))


def test_renames_at_two_mounts_never_make_a_loop(cluster: Cluster) -> None:
    first, second, third = cluster
    script = """
try:
    os.rename(*sys.argv[1:])
    print('ok')
except OSError:
    pass
"""
    for attempt in range(10):
        top = f"loop-{attempt}"
        first.sh(f"mkdir -p files/{top}/x/1 files/{top}/y/1")
        done = at_once(
            lambda top=top: python(first, script, f"{top}/x", f"{top}/y/1/x"),
            lambda top=top: python(second, script, f"{top}/y", f"{top}/x/1/y"),
        )
        assert sum("ok" in out for out in done) == 1
        assert third.sh(f"find files/{top} -type d | wc -l").strip() == "5"


def test_what_is_made_and_removed_is_seen_at_once_by_who_looks_then(cluster: Cluster) -> None:
    first, second, _ = cluster
    first.sh("mkdir files/seen")
    for n in range(30):
        first.sh(f"echo {n} > files/seen/{n}")
        assert second.sh("ls files/seen | wc -l").strip() == str(n + 1)
        assert second.sh(f"cat files/seen/{n}").strip() == str(n)
    for n in range(30):
        first.sh(f"rm files/seen/{n}")
        assert second.sh("ls files/seen | wc -l").strip() == str(29 - n)


def test_names_that_another_kernel_holds_are_dropped_within_a_moment(cluster: Cluster) -> None:
    first, second, _ = cluster
    first.sh("mkdir -p files/stale/d/e && echo 1 > files/stale/f && ln -s f files/stale/link")
    with holding(second, """
def steps():
    def look():
        return [name for name in ('f', 'g', 'd/e', 'h/e', 'link', 'new') if os.path.lexists('stale/' + name)]
    while True:
        yield look()
""") as look:  # fmt: skip
        assert eval(look()) == ["f", "d/e", "link"]
        first.sh("cd files/stale && mv f g && mv d h && ln -sfn g link && touch new")
        took = until(lambda: eval(look()) == ["g", "h/e", "link", "new"], KEPT_S + GRACE_S)
        print(f"stale names for {took:.3f} s")


def test_a_directory_removed_elsewhere_is_still_there_for_who_is_in_it(cluster: Cluster) -> None:
    first, second, _ = cluster
    first.sh("mkdir files/cwd")
    with holding(second, """
def steps():
    os.chdir('cwd')
    yield 'in'
    yield os.stat('.').st_nlink
    try:
        open('f', 'w')
    except FileNotFoundError:
        yield 'gone'
""") as step:  # fmt: skip
        assert step() == "in"
        first.sh("rmdir files/cwd")
        time.sleep(KEPT_S + 0.2)
        assert step() == "0"
        assert step() == "gone"


# --- contents ---


def test_what_was_closed_anywhere_is_read_by_who_opens_after_it(cluster: Cluster) -> None:
    """With pages and attributes of the version before in the kernel, each time."""
    first, second, third = cluster
    write = """
def steps():
    n = 0
    while True:
        n += 1
        with open('version', 'wb') as file:
            file.write(b'%05d' % n * (n * 50))
        yield n
"""
    read = """
def steps():
    while True:
        with open('version', 'rb') as file:
            data = file.read()
        yield data[:5].decode(), len(data), len(set(data[i:i + 5] for i in range(0, len(data), 5)))
"""
    with holding(first, write) as writer, holding(second, read) as one, holding(third, read) as other:
        for _ in range(60):
            n = int(writer())
            for reader in (one, other):
                assert eval(reader()) == (f"{n:05d}", n * 250, 1)


def test_a_file_that_grows_at_one_mount_is_seen_whole_at_another(cluster: Cluster) -> None:
    first, second, _ = cluster
    write = """
def steps():
    open('grows', 'wb').close()
    while True:
        with open('grows', 'ab') as file:
            file.write(b'x' * 1000)
        yield os.stat('grows').st_size
"""
    read = """
def steps():
    while True:
        with open('grows', 'rb') as file:
            yield len(file.read())
"""
    with holding(first, write) as writer, holding(second, read) as reader:
        for _ in range(40):
            size = int(writer())
            assert int(reader()) == size


def test_a_truncation_is_seen_against_cached_pages(cluster: Cluster) -> None:
    first, second, _ = cluster
    first.sh("yes 0123456 | head -c 1000000 > files/cut")
    assert second.sh("wc -c < files/cut; md5sum files/cut").split()[0] == "1000000"
    first.sh("truncate -s 5000 files/cut && truncate -s 20000 files/cut")
    script = "data = open('cut', 'rb').read(); print(len(data), data[5000:].strip(b'\\0') == b'')"
    assert python(second, script).split() == ["20000", "True"]


@pytest.mark.parametrize("access", ["O_WRONLY", "O_RDWR"])
def test_appends_at_every_mount_overwrite_nothing(cluster: Cluster, access: str) -> None:
    """Whole lines, by who only writes. By who may map the file, some are cut in two (docs/posix.md)."""
    name = f"appended-{access}"
    script = """
name, flags = sys.argv[2], getattr(os, sys.argv[3]) | os.O_APPEND
fd = os.open(name, os.O_CREAT | flags, 0o644)
for n in range(100):
    line = f'{sys.argv[1]}.{n}.'.ljust(37 * (n % 5 + 1), 'x') + '\\n'
    assert os.write(fd, line.encode()) == len(line)
    if n % 10 == 0:
        os.close(fd)
        fd = os.open(name, flags)
os.close(fd)
"""
    at_once(*(lambda n=node: python(n, script, str(n.number), name, access) for node in cluster))
    lines = [f"{node.number}.{n}.".ljust(37 * (n % 5 + 1), "x") for node in cluster for n in range(100)]
    for node in cluster:
        found = node.sh(f"cat files/{name}")
        if access == "O_WRONLY":
            assert sorted(found.splitlines()) == sorted(lines)
        else:
            assert sorted(found) == sorted("".join(f"{line}\n" for line in lines))


def test_pages_appended_at_two_mounts_by_who_may_map_them(cluster: Cluster) -> None:
    script = """
fd = os.open('pages', os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o644)
for n in range(30):
    os.write(fd, sys.argv[1].encode() * 4096)
os.close(fd)
"""
    first, second, third = cluster
    at_once(lambda: python(first, script, "a"), lambda: python(second, script, "b"))
    data = third.run("cat", f"{third.mountpoint}/files/pages").stdout
    assert len(data) == 60 * 4096
    assert (data.count(b"a"), data.count(b"b")) == (30 * 4096, 30 * 4096)


def test_a_mapping_shows_what_was_written_elsewhere_soon(cluster: Cluster) -> None:
    first, second, _ = cluster
    first.sh("head -c 8192 /dev/zero | tr '\\0' a > files/mapped")
    with holding(second, """
def steps():
    with open('mapped', 'r+b') as file, mmap.mmap(file.fileno(), 8192) as mapped:
        while True:
            seen = mapped[0:1] + mapped[5000:5001]
            yield seen
            if seen == b'ba':
                mapped[1:2] = b'B'
                mapped.flush()
                break
    yield 'written'
""") as step:  # fmt: skip
        assert step() == "b'aa'"
        first.sh("printf b | dd of=files/mapped conv=notrunc status=none")
        until(lambda: step() == "b'ba'", SOON_S)
        assert step() == "written"
        assert first.sh("head -c 3 files/mapped") == "bBa"


def test_times_and_modes_of_another_host_arrive(cluster: Cluster) -> None:
    first, second, _ = cluster
    first.sh("echo > files/modes")
    assert second.sh("stat -c %a files/modes").strip() == "644"
    first.sh("chmod 600 files/modes && touch -d @1000000000 files/modes")
    until(lambda: second.sh("stat -c '%a %Y' files/modes").split() == ["600", "1000000000"], KEPT_S + GRACE_S)


# --- files without a name ---


def orphans(node: Node) -> int:
    """How many inodes have no name."""
    told = node.sh("stat -f -c '%c %d' files; find files -xdev -printf '%i\\n' | sort -u | wc -l").split()
    total, free, named = map(int, told)
    return total - free - named


@pytest.mark.parametrize("how", ["rm", "mv"])
def test_a_file_open_elsewhere_is_read_and_written_after_its_name_went(cluster: Cluster, how: str) -> None:
    first, second, _ = cluster
    until(lambda: orphans(first) == 0, ORPHANS_S)  # of other tests
    first.sh("rm -f files/open; head -c 100000 /dev/zero | tr '\\0' z > files/open; echo new > files/new")
    with holding(second, """
def steps():
    fd = os.open('open', os.O_RDWR)
    yield 'open'
    os.pwrite(fd, b'late', 10)
    os.fsync(fd)
    data = os.pread(fd, 200000, 0)
    yield len(data), data[8:16], os.fstat(fd).st_nlink
    os.close(fd)
    yield 'closed'
""") as step:  # fmt: skip
        assert step() == "open"
        first.sh("rm files/open" if how == "rm" else "mv files/new files/open")
        time.sleep(5)
        assert eval(step()) == (100000, b"zzlatezz", 0)
        assert orphans(first) == 1
        assert step() == "closed"
        until(lambda: orphans(first) == 0, ORPHANS_S)


def test_what_a_killed_daemon_held_ends_with_its_session(cluster: Cluster) -> None:
    first, second, _ = cluster
    until(lambda: orphans(first) == 0, ORPHANS_S)  # of other tests
    first.sh("echo held > files/held")
    with holding(second, """
def steps():
    fd = os.open('held', os.O_RDWR)
    yield os.read(fd, 100)
""") as step:  # fmt: skip
        assert step() == "b'held\\n'"
        first.sh("rm files/held")
        time.sleep(4)
        assert orphans(first) == 1
        second.kill()
        until(lambda: orphans(first) == 0, ORPHANS_S)


# --- git ---


def test_git_in_one_work_tree_from_two_hosts_in_turn(cluster: Cluster) -> None:
    first, second, third = cluster
    git = "git -c user.name=t -c user.email=t@example.org -c safe.directory='*' -C files/work"
    first.sh("mkdir files/work")
    first.sh(f"{git} init -q -b main && echo 0 > files/work/f && {git} add f && {git} commit -qm 0")
    for n in range(1, 9):
        node = (first, second)[n % 2]
        node.sh(
            f"echo {n} >> files/work/f && echo {n} > files/work/g{n} && {git} add -A && {git} commit -qm {n}"
        )
        other = (first, second)[1 - n % 2]
        assert other.sh(f"{git} status --porcelain") == ""
        assert other.sh(f"{git} log -1 --format=%s").strip() == str(n)
    first.sh(f"{git} checkout -qb side && rm files/work/g1 && {git} commit -qam side")
    second.sh(f"{git} checkout -q main && {git} merge -q side && {git} gc -q")
    assert third.sh(f"{git} fsck --strict 2>&1; {git} status --porcelain; ls files/work").split() == [
        "f", *(f"g{n}" for n in range(2, 9))
    ]  # fmt: skip


# --- close(2) tells ---


def test_a_close_without_a_quorum_tells_so_and_the_file_is_as_it_was(cluster: Cluster) -> None:
    leader = cluster.wait_leader()
    node = next(node for node in cluster if node is not leader)
    node.sh("echo old > files/closed")
    with holding(node, """
def steps():
    fd = os.open('closed', os.O_WRONLY)
    yield 'open'
    try:
        os.pwrite(fd, b'new', 0)
        os.close(fd)
        yield 'closed'
    except OSError as error:
        yield error.errno
""") as step:  # fmt: skip
        assert step() == "open"
        cluster.isolate(node)
        begun = time.monotonic()
        told = step()
        assert told == "110", told  # ETIMEDOUT
        assert time.monotonic() - begun < 20
        cluster.mend()
    cluster.wait_healthy()
    # It may have been committed after all, once the ways were open again: but never in part.
    assert node.sh("cat files/closed").strip() in ("old", "new")


# --- a node that was alone ---


def test_a_mount_that_was_alone_relies_on_nothing_when_others_come(own_cluster: Cluster) -> None:
    first, second, third = own_cluster
    first.init()
    first.sh("mkdir -p files/d/e && echo 1 > files/d/f && echo 1 > files/gone && cat files/d/f > /dev/null")
    # Whatever the kernel can keep for an hour: names, absent names, attributes, pages, a listing; and it
    # has been told that it need not ask at close(2) nor before it reads a directory.
    look = """
def steps():
    fd = os.open('gone', os.O_RDWR)
    os.unlink('gone')
    while True:
        yield (
            sorted(os.listdir('d')),
            [name for name in ('f', 'g', 'new', 'e', 'x/y') if os.path.lexists('d/' + name)],
            os.stat('d/g' if os.path.lexists('d/g') else 'd/f').st_size,
            open('d/g' if os.path.lexists('d/g') else 'd/f').read(),
            os.pread(fd, 10, 0),
        )
"""
    with holding(first, look) as step:
        before = (["e", "f"], ["f", "e"], 2, "1\n", b"1\n")
        assert eval(step()) == before
        assert eval(step()) == before
        second.join(own_cluster.ticket())
        second.sh(
            "cd files/d && mv f g && echo more >> g && touch new && mv e x && mkdir x/y && rm -f ../gone"
        )
        after = (["g", "new", "x"], ["g", "new", "x/y"], 7, "1\nmore\n", b"1\n")
        until(lambda: eval(step()) == after, SOON_S)
        for n in range(10):
            second.sh(f"touch files/d/{n}")
            assert str(n) in eval(step())[0]  # a listing, though the kernel does not ask for it
        third.join(own_cluster.ticket())
        own_cluster.wait_healthy()
        time.sleep(5)
        assert eval(step())[-1] == b"1\n"
    # Nobody hears of its closes, so a write itself waits, and tells.
    with holding(first, """
def steps():
    fd = os.open('d/g', os.O_WRONLY)
    yield 'open'
    try:
        os.write(fd, b'x')
        yield 'written'
    except OSError as error:
        yield error.errno
""") as step:  # fmt: skip
        assert step() == "open"
        own_cluster.isolate(first)
        assert step() == "110"
        own_cluster.mend()


def test_what_is_written_after_a_replacement_elsewhere_is_in_the_new_file(cluster: Cluster) -> None:
    """The kernel may know the name as that of the file which was replaced."""
    first, second, _ = cluster
    replace = """
def steps():
    for n in range(100):
        with open("new", "w") as file:
            file.write("new\\n")
        os.rename("new", "replaced")
        yield n
"""
    append = """
def steps():
    for n in range(100):
        os.stat("replaced")
        yield n
        with open("replaced", "a") as file:
            file.write("more\\n")
        with open("replaced") as file:
            yield repr(file.read())
"""
    with holding(first, replace) as replaced, holding(second, append) as appended:
        replaced()
        for _ in range(99):
            appended()
            replaced()
            assert eval(appended()) == "new\nmore\n"


# --- load ---


def test_mounts_that_make_and_remove_the_same_names_do_not_hang(cluster: Cluster) -> None:
    """Every kernel holds directory locks while its calls wait for the others, and must drop names there."""
    cluster.nodes[1].sh("mkdir files/churn")
    script = """
import random
end = time.monotonic() + 15
random.seed(sys.argv[1])
done = 0
while time.monotonic() < end or done <= 20:
    name = f'churn/{random.randrange(20)}'
    try:
        match random.randrange(5):
            case 0: open(name, 'wb').write(b'x' * random.randrange(5000))
            case 1: os.unlink(name)
            case 2: os.rename(name, f'churn/{random.randrange(20)}')
            case 3: open(name, 'rb').read()
            case 4: os.listdir('churn')
    except (FileNotFoundError, FileExistsError):
        pass
    done += 1
print(done)
"""
    work = [
        lambda n=node, k=k: int(python(n, script, str(n.number * 10 + k), timeout_s=90))
        for node in cluster
        for k in range(2)
    ]
    counts = at_once(*work)
    assert min(counts) > 20, counts
    listings = {node.sh("ls -l --time-style=full-iso files/churn | tail -n +2") for node in cluster}
    if len(listings) > 1:
        time.sleep(KEPT_S + 0.1)
        listings = {node.sh("ls -l --time-style=full-iso files/churn | tail -n +2") for node in cluster}
    assert len(listings) == 1


@pytest.mark.parametrize("tree", ["files", "kv"])
def test_whoever_appends_by_fcntl_overwrites_nobody_either(cluster: Cluster, tree: str) -> None:
    """As fdopen(3) does it; the kernel has the end as it was when it last asked."""
    script = f"""
os.chdir("../{tree}")
file = os.open("switched", os.O_WRONLY | os.O_CREAT)
fcntl.fcntl(file, fcntl.F_SETFL, os.O_APPEND)
for n in range(100):
    os.write(file, b"%s-%03d " % (sys.argv[1].encode(), n))
"""
    at_once(*(lambda node=node: python(node, script, str(node.number)) for node in cluster))
    wanted = sorted(f"{node.number}-{n:03}" for node in cluster for n in range(100))
    assert {" ".join(sorted(node.sh(f"cat {tree}/switched").split())) for node in cluster} == {
        " ".join(wanted)
    }


@pytest.mark.parametrize("mode", ["open", "strict"])
def test_a_write_past_the_pages_that_is_to_be_synced_waits_for_a_majority(
    cluster: Cluster, mode: str
) -> None:
    first, *others = cluster
    if mode == "strict":
        first.stop()
        first.start("consistency=strict")
    cluster.wait_healthy()
    script = """
def steps():
    file = os.open("synced", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_DSYNC)
    yield "ready"
    os.write(file, b"line")
    yield "written"
"""
    with holding(first, script) as step, ThreadPoolExecutor(1) as one:
        assert step() == "ready"
        for node in others:
            node.pause()
        try:
            writing = one.submit(step)
            assert not wait([writing], 2.0).done
        finally:
            for node in others:
                node.resume()
        assert writing.result() == "written"
    if mode == "strict":
        first.stop()
        first.start()


# --- strict ---

REWRITES = """
body = lambda n: (b"%09d" % n) * (1 + n % 7)
end = time.monotonic() + 4
n = 0
while time.monotonic() < end or n <= 100:
    n += 1
    fd = os.open("rewritten", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.write(fd, body(n))
    os.close(fd)
print(n)
"""
READS = """
body = lambda n: (b"%09d" % n) * (1 + n % 7)
end = time.monotonic() + 4
last = count = 0
while time.monotonic() < end or count <= 100:
    with open("rewritten", "rb", buffering=0) as file:
        found = file.read(4096)
    if not found:
        continue  # between the truncation and the write
    n = int(found[:9])
    assert found == body(n), found
    assert n >= last, (n, last)
    last, count = n, count + 1
print(count)
"""


def test_a_strict_mount_reads_no_mixture_of_a_file_that_another_one_rewrites(cluster: Cluster) -> None:
    first, second, _ = cluster
    first.sh("echo > files/rewritten; printf '%09d%09d' 1 1 > files/rewritten")
    second.stop()
    second.start("consistency=strict")
    written, read = at_once(lambda: python(first, REWRITES), lambda: python(second, READS))
    assert int(written) > 100
    assert int(read) > 100
    assert "No such device" in python(
        second, "mmap.mmap(os.open('rewritten', os.O_RDWR), 9)", check=False
    )  # the price: no shared mappings
    second.stop()
    second.start()
