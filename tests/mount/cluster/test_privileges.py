"""What is written to a file by somebody else gets nothing of what the file lent: its owner's identity, its
group's, capabilities. The kernel sees to that itself where a write goes through its pages, by the mode that
it remembers; an append goes past them, and so does everything on a strict mount."""

import os
from collections.abc import Iterator

import pytest

from tests.mount.cluster.test_coherence import at_once, python
from tests.mount.clusters import Cluster, Node

pytestmark = [pytest.mark.mount, pytest.mark.timeout(240)]

USER = 1000
MAKE = """
import struct
name, capable = sys.argv[1], int(sys.argv[2])
with open(name, "w") as file:
    file.write("program")
os.chmod(name, 0o6777)
if capable:
    os.setxattr(name, "security.capability", struct.pack("<5I", 0x02000001, 1 << 13, 0, 0, 0))
"""
WRITE = """
name, flags, user = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if user:
    os.setgid(user)
    os.setuid(user)
file = os.open(name, os.O_WRONLY | flags)
if not flags & os.O_TRUNC:
    os.write(file, b"other")
os.close(file)
"""
LOOK = """
held = "security.capability" in os.listxattr(sys.argv[1])
print(oct(os.stat(sys.argv[1]).st_mode & 0o7777), "capable" if held else "")
"""


def look(node: Node, name: str) -> list[str]:
    return python(node, LOOK, name).split()


@pytest.fixture(params=["open", "strict"])
def writer(request: pytest.FixtureRequest, cluster: Cluster) -> Iterator[Node]:
    """The node whose user writes; the mounts of the others have the default."""
    node = cluster[2]
    if request.param == "open":
        yield node
    else:
        node.stop()
        yield node.start("consistency=strict")
        node.stop()
        node.start()


@pytest.mark.parametrize(("flags", "what"), [(0, "over"), (os.O_APPEND, "behind"), (os.O_TRUNC, "nothing")])
def test_a_write_takes_what_the_file_lent(cluster: Cluster, writer: Node, flags: int, what: str) -> None:
    for user, left in ((USER, "0o777"), (0, "0o6777")):
        name = f"lent-{what}-{user}"
        python(cluster[1], MAKE, name, "1")
        assert look(writer, name) == ["0o6777", "capable"]
        python(writer, WRITE, name, str(flags), str(user))
        assert [look(node, name) for node in cluster] == [[left]] * 3
        writer.sh(f"rm files/{name}")


@pytest.mark.parametrize("flags", [0, os.O_APPEND])
@pytest.mark.parametrize("opener", [0, USER])
def test_who_writes_counts_and_not_who_opened(cluster: Cluster, opener: int, flags: int) -> None:
    name = f"inherited-{opener}-{flags}"
    python(cluster[1], MAKE, name, "0")
    script = """
name, flags, opener = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def write(user):
    pid = os.fork()
    if not pid:
        os.setuid(user)
        os.write(file, b"other")
        os._exit(0)
    os.waitpid(pid, 0)
    print(oct(os.stat(name).st_mode & 0o7777))

os.seteuid(opener)
file = os.open(name, os.O_WRONLY | flags)
os.seteuid(0)
write(0)
write(1000)
"""
    assert python(cluster[2], script, name, str(flags), str(opener)).split() == ["0o6777", "0o777"]


def test_a_bit_that_was_set_on_another_host_goes_too(cluster: Cluster) -> None:
    """The kernel of the writer does not ask for the mode before each write."""
    first, second, _ = cluster
    first.sh("echo program > files/set-later && chmod 0777 files/set-later")
    script = """
os.setgid(1000)
os.setuid(1000)
file = os.open("set-later", os.O_WRONLY)
os.write(file, b"x")
open("opened", "w").close()
while not os.path.exists("set"):
    time.sleep(0.01)
os.write(file, b"y")
os.close(file)
"""
    first.sh("mkdir -m 1777 -p files/signs")
    script = script.replace('"opened"', '"signs/opened"').replace('"set"', '"signs/set"')

    def set_later() -> str:
        return first.sh("""until [ -e files/signs/opened ]; do sleep 0.01; done
            chmod 6777 files/set-later; stat -c %a files/set-later; touch files/signs/set""")

    _, was = at_once(lambda: python(second, script), set_later)
    assert was.split() == ["6777"]
    assert {node.sh("stat -c %a files/set-later").strip() for node in cluster} == {"777"}
    first.sh("rm -r files/signs")


def test_a_value_lends_nothing(cluster: Cluster) -> None:
    first, second, _ = cluster
    first.sh("echo program > kv/lent && chmod 6755 kv/lent")
    assert {node.sh("stat -c %a kv/lent").strip() for node in (first, second)} == {"755"}
    first.sh("rm kv/lent")


# --- descriptors: the kernel does not ask anew who owns what is open ---

FORMER = """
import struct
name, user = sys.argv[1], 1000
os.chown(name, user, user)
os.setegid(user)
os.seteuid(user)
file = os.open(name, os.O_RDONLY)
os.seteuid(0)
open("signs/opened", "w").close()
while not os.path.exists("signs/taken"):
    time.sleep(0.01)
time.sleep(1.5)  # names and attributes that the kernel has kept are old by now
os.seteuid(user)
entries = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, 7, 0xFFFFFFFF) for tag in (0x01, 0x04, 0x20)
)
for call in (
    lambda: os.fchmod(file, 0o4777),
    lambda: os.chmod(f"/proc/self/fd/{file}", 0o666),
    lambda: os.utime(file, ns=(1, 1)),
    lambda: os.setxattr(file, "system.posix_acl_access", entries),
):
    try:
        call()
        print("done")
    except OSError as error:
        print(error.strerror.replace(" ", "-"))
"""


@pytest.mark.parametrize("kind", ["files", "directories", "kv"])
def test_a_former_owner_may_nothing_by_a_descriptor(cluster: Cluster, writer: Node, kind: str) -> None:
    first = cluster[1]
    name = "../kv/owned" if kind == "kv" else "owned"
    make = "mkdir" if kind == "directories" else "touch"
    first.sh(f"mkdir -m 1777 files/signs; {make} files/{name}; chmod 700 files/{name}")

    def take() -> None:
        first.sh(f"""until [ -e files/signs/opened ]; do sleep 0.01; done
            chown 0:0 files/{name}; touch files/signs/taken""")

    told, _ = at_once(lambda: python(writer, FORMER, name), take)
    refused = "Operation-not-permitted"
    assert told.split()[:3] == [refused] * 3
    assert told.split()[3] in (refused, "Operation-not-supported")  # the latter without -o acl
    assert {node.sh(f"stat -c '%a %u' files/{name}").strip() for node in cluster} == {"700 0"}


def test_what_another_host_has_set_since_goes_at_ftruncate_and_by_a_descriptor_of_root(
    cluster: Cluster, writer: Node
) -> None:
    first = cluster[1]
    first.sh("mkdir -m 1777 files/signs")
    for name in ("cut", "filled"):
        first.sh(f"echo program > files/{name}; chmod 777 files/{name}")
    script = """
root = os.open("filled", os.O_WRONLY)
os.setegid(1000)
os.seteuid(1000)
user = os.open("cut", os.O_RDWR)
open("signs/opened", "w").close()
while not os.path.exists("signs/set"):
    time.sleep(0.01)
os.ftruncate(user, 3)
os.pwrite(root, b"other", 0)
"""

    def set_later() -> None:
        first.sh("""until [ -e files/signs/opened ]; do sleep 0.01; done
            chmod 6777 files/cut files/filled; touch files/signs/set""")

    at_once(lambda: python(writer, script), set_later)
    assert {node.sh("stat -c %a files/cut files/filled") for node in cluster} == {"777\n777\n"}
