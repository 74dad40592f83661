"""Three mounts under one load for a long time: the same few files and directories, from every host at once.

    python -m tests.mount.soak --minutes 10

Every kernel is told of others' changes to what its own processes have locked, mapped and half written:
whole pages wait for READs and for dirty pages to be written back, names for directory locks, while writes
fill their queues. A call that takes longer than PATIENCE_S ends the run with a stack of everybody. At the
end all mounts must show the same, and `aspen check` has nothing to say.
"""

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from tests.mount.clusters import Cluster, Node

PATIENCE_S: Final = 30.0
LOAD: Final = """
import mmap, os, random, sys, time
os.chdir(sys.argv[1])
random.seed(sys.argv[2])
end, patience = time.monotonic() + float(sys.argv[3]), float(sys.argv[4])
counts = {}

def path(kind):
    return f'{kind}{random.randrange(6)}'

def replace():
    name = f'tmp-{os.getpid()}'
    with open(name, 'wb') as file:
        file.write(os.urandom(random.randrange(60000)))
    os.rename(name, path('f'))

def stream():
    with open(path('big'), 'wb') as file:
        for _ in range(random.randrange(1, 24)):
            file.write(b'x' * (1 << 20))
        if random.random() < 0.3:
            os.fsync(file.fileno())

def append():
    with open(path('log'), 'ab') as file:
        for n in range(random.randrange(1, 50)):
            file.write(b'%d\\n' % n)
            file.flush()
    if os.stat(path('log')).st_size > 1 << 20:
        os.truncate(path('log'), 0)

def mapped():
    with open(path('m'), 'a+b') as file:
        file.truncate(1 << 16)
    with open(path('m'), 'r+b') as file:
        size = os.fstat(file.fileno()).st_size
        if size:
            with mmap.mmap(file.fileno(), size) as pages:
                for _ in range(20):
                    at = random.randrange(size)
                    pages[at:at + 1] = b'm'
                if random.random() < 0.5:
                    pages.flush()

def read():
    with open(random.choice((path('f'), path('log'), path('big'), path('m'))), 'rb') as file:
        while file.read(1 << 18):
            pass

def unlinked():
    with open(path('f'), 'r+b') as file:
        os.unlink(file.name)
        file.write(b'late')
        file.seek(0)
        file.read()

def directories():
    name = path('d')
    random.choice((os.mkdir, os.rmdir))(name)

def move():
    os.rename(path('d'), path('d') + '/' + path('d'))

def listing():
    for entry in os.scandir('.'):
        entry.stat()

work = [replace, stream, append, append, mapped, mapped, read, read, read]
work += [unlinked, directories, move, listing]
while time.monotonic() < end:
    one = random.choice(work)
    begun = time.monotonic()
    try:
        one()
    except (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError):
        pass
    except OSError as error:
        if error.errno not in (22, 39, 75, 116):  # a loop, not empty, a mapping that was cut, gone
            raise
    took = time.monotonic() - begun
    assert took < patience, f'{one.__name__} took {took:.1f} s'
    counts[one.__name__] = counts.get(one.__name__, 0) + 1
print(counts)
"""


def load(node: Node, number: int, seconds: float) -> str:
    place = f"{node.mountpoint}/files/soak"
    arguments = (place, str(number), str(seconds), str(PATIENCE_S))
    done = node.run(sys.executable, "-c", LOAD, *arguments, timeout_s=seconds + 3 * PATIENCE_S, check=False)
    if done.returncode not in (0, -7):  # SIGBUS: somebody else has cut the file of a mapping
        raise AssertionError(f"{node}: {done.stderr.decode()}")
    return done.stdout.decode()


def seen(node: Node) -> str:
    return node.sh("cd files/soak; find . -type f | sort | xargs -r md5sum; find . | sort", timeout_s=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--processes", type=int, default=3, help="on each host")
    options = parser.parse_args()
    seconds = options.minutes * 60
    with Cluster(3, deadline_s=seconds + 300) as cluster:
        cluster.start()
        cluster[1].sh("mkdir files/soak")
        begun = time.monotonic()
        rounds = 0
        while (left := seconds - (time.monotonic() - begun)) > 1:
            rounds += 1
            jobs = [
                (node, rounds * 100 + node.number * 10 + k)
                for node in cluster
                for k in range(options.processes)
            ]
            with ThreadPoolExecutor(len(jobs)) as pool:
                running = [pool.submit(load, node, number, min(left, 60.0)) for node, number in jobs]
                counts = [future.result() for future in running]
            print(f"{time.monotonic() - begun:.0f} s: {counts[0].strip()}", flush=True)
            time.sleep(1.5)
            looks = {node.number: seen(node) for node in cluster}
            assert len(set(looks.values())) == 1, looks
        assert len(set(cluster.digests().values())) == 1
        for node in cluster:
            found = node.aspen("check", check=False).decode()
            told = node.call("status", timeout_s=30)["figures"]["invalidations"]
            print(f"{node}: {told} invalidations; {found.strip()[-300:]}")


if __name__ == "__main__":
    main()
