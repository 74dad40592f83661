"""A toy in-memory file system on the real pyfuse3: the daemon of the fuse tests and of `tools/bench_loop`.

    toyfs.py MOUNTPOINT [--stock] [--spin-us N] [--workers N] [--timeout S] [--idle]

Says `ready PID` on standard output once it is mounted, and then obeys one-line commands on standard input:
`cpu` answers with its CPU time and counters, `lateness` with the worst lateness of its ticker and its socket
echo since the last such command, `stop` ends it, `cancel` ends it by cancellation. End of input ends it too.
Names mean something: a lookup of `sleep-N` takes N ms, one of `meet-N` lasts until N of them are under way,
one of `hold` until the command `release`, one of `stop` calls `pyfuse3.terminate`, one of `cancel` cancels
the session's scope inside the handler.
Further commands change the tree behind the kernel's back and call the `Notifier` (`_command`).
"""

import argparse
import errno
import faulthandler
import json
import os
import signal
import socket
import stat
import sys
import time
from collections.abc import Sequence

import pyfuse3
import trio

from aspenfs.fuse import idle, loop, mounts, opened
from aspenfs.fuse.notifier import Notifier

TICK_S = 0.01
BLOCK_S_MAX = 600.0  # who is not woken shows


class Node:
    __slots__ = ("attributes", "children", "data", "direct_io")

    def __init__(self, ino: int, mode: int, timeout_s: float) -> None:
        self.attributes = entry = pyfuse3.EntryAttributes()
        entry.st_ino = ino
        entry.st_mode = mode
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        entry.entry_timeout = entry.attr_timeout = timeout_s
        self.children: dict[bytes, Node] = {}
        self.data = bytearray()
        self.direct_io = False


class ToyOperations(pyfuse3.Operations):
    enable_writeback_cache = False

    def __init__(self, timeout_s: float) -> None:
        super().__init__()
        self.timeout_s = timeout_s
        self.nodes = {pyfuse3.ROOT_INODE: Node(pyfuse3.ROOT_INODE, stat.S_IFDIR | 0o755, timeout_s)}
        self.requests = self.flushes = 0
        self.scope = trio.CancelScope()
        self.asleep = self.asleep_max = self.held = self.meeting = 0
        self.released, self.met = trio.Event(), trio.Event()

    def _add(self, parent: int, name: bytes, mode: int) -> Node:
        ino = len(self.nodes) + 1
        self.nodes[ino] = node = Node(ino, mode, self.timeout_s)
        self.nodes[parent].children[name] = node
        return node

    async def lookup(
        self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext | None
    ) -> pyfuse3.EntryAttributes:
        self.requests += 1
        if name.startswith((b"sleep-", b"meet-", b"hold")):
            self.asleep += 1
            self.asleep_max = max(self.asleep_max, self.asleep)
            await self._wait(*name.split(b"-"))
            self.asleep -= 1
        elif name == b"stop":
            pyfuse3.terminate()
        elif name == b"cancel":
            self.scope.cancel()
        node = self.nodes[parent_inode].children.get(name)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return node.attributes

    async def _wait(self, how: bytes, number: bytes = b"0") -> None:
        if how == b"sleep":
            await trio.sleep(float(number) / 1000)
        elif how == b"hold":
            self.held += 1
            await self.released.wait()
        else:
            self.meeting += 1
            met = self.met
            if self.meeting == int(number):
                self.meeting, self.met = 0, trio.Event()
                met.set()
            await met.wait()

    async def getattr(self, inode: int, ctx: pyfuse3.RequestContext | None) -> pyfuse3.EntryAttributes:
        self.requests += 1
        return self.nodes[inode].attributes

    async def setattr(
        self,
        inode: int,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: pyfuse3.RequestContext,
    ) -> pyfuse3.EntryAttributes:
        self.requests += 1
        node = self.nodes[inode]
        if fields.update_size:
            size = attr.st_size
            node.data[size:] = bytes(max(0, size - len(node.data)))
            node.attributes.st_size = size
        return node.attributes

    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: pyfuse3.RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        self.requests += 1
        node = self._add(parent_inode, name, mode)
        node.direct_io = name.startswith(b"direct")
        return pyfuse3.FileInfo(fh=node.attributes.st_ino), node.attributes

    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: pyfuse3.RequestContext
    ) -> pyfuse3.EntryAttributes:
        self.requests += 1
        return (self.nodes[parent_inode].children.get(name) or self._add(parent_inode, name, mode)).attributes

    async def unlink(self, parent_inode: int, name: bytes, ctx: pyfuse3.RequestContext) -> None:
        self.requests += 1
        self.nodes[parent_inode].children.pop(name, None)

    async def open(self, inode: int, flags: int, ctx: pyfuse3.RequestContext) -> pyfuse3.FileInfo:
        self.requests += 1
        if flags & os.O_ACCMODE == os.O_RDONLY:
            return opened.read_only(inode, direct_io=self.nodes[inode].direct_io, keep_cache=False)
        return pyfuse3.FileInfo(fh=inode, keep_cache=False)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        self.requests += 1
        return bytes(self.nodes[fh].data[off : off + size])

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        self.requests += 1
        node = self.nodes[fh]
        node.data[off : off + len(buf)] = buf
        node.attributes.st_size = len(node.data)
        return len(buf)

    async def flush(self, fh: int) -> None:
        self.requests += 1
        self.flushes += 1

    async def release(self, fh: int) -> None:
        self.requests += 1


class Lateness:
    """Worst lateness, in ms, of a ticker and of an echo over a socket pair, both in the daemon's loop.

    Without the time in which the thread was ready to run and other processes had the CPUs: that is the
    machine's lateness, not the loop's. What is left is a lower bound.
    """

    def __init__(self) -> None:
        self.ticker_ms = self.echo_ms = 0.0
        self.ticker_raw_ms = 0.0  # with it
        self.ticker_busy_ms = self.echo_busy_ms = 0.0  # no more than the thread used: a stopped one uses none

    async def tick(self) -> None:
        due_s = trio.current_time()
        while True:
            due_s = max(due_s + TICK_S, trio.current_time())
            waited_s, used_s = _waited_for_cpu_s(), time.thread_time()
            await trio.sleep_until(due_s)
            late_s = trio.current_time() - due_s
            self.ticker_raw_ms = max(self.ticker_raw_ms, late_s * 1e3)
            late_s -= _waited_for_cpu_s() - waited_s
            self.ticker_ms = max(self.ticker_ms, late_s * 1e3)
            busy_s = min(late_s, time.thread_time() - used_s)
            self.ticker_busy_ms = max(self.ticker_busy_ms, busy_s * 1e3)

    async def echo(self) -> None:
        near, far = (trio.socket.from_stdlib_socket(end) for end in socket.socketpair())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._reflect, far)
            while True:
                sent_s, waited_s, used_s = trio.current_time(), _waited_for_cpu_s(), time.thread_time()
                await near.send(b"x")
                await near.recv(1)
                late_s = trio.current_time() - sent_s - (_waited_for_cpu_s() - waited_s)
                self.echo_ms = max(self.echo_ms, late_s * 1e3)
                busy_s = min(late_s, time.thread_time() - used_s)
                self.echo_busy_ms = max(self.echo_busy_ms, busy_s * 1e3)
                await trio.sleep(TICK_S)

    async def _reflect(self, far: trio.socket.SocketType) -> None:
        while True:
            await far.send(await far.recv(1))


def _waited_for_cpu_s() -> float:
    """Of the calling thread, since it began; proc_pid_schedstat, second field."""
    with open("/proc/thread-self/schedstat", "rb") as file:
        return int(file.read().split()[1]) / 1e9


def _answer(**values: object) -> None:
    print(json.dumps(values), flush=True)


async def _obey(operations: ToyOperations, lateness: Lateness, notifier: Notifier) -> None:
    os.set_blocking(0, False)
    stream = trio.lowlevel.FdStream(os.dup(0))
    pending = b""
    while True:
        received = await stream.receive_some()
        *lines, pending = (pending + received).split(b"\n")
        for line in lines if received else [b"stop"]:
            match line.split():
                case [b"cpu"]:
                    used = os.times()
                    hook = loop.active()
                    session = hook.session if hook is not None else None
                    _answer(
                        cpu_s=used.user + used.system,
                        cpu_ns=time.process_time_ns(),
                        requests=operations.requests,
                        flushes=operations.flushes,
                        asleep_max=operations.asleep_max,
                        held=operations.held,
                        hand_overs=session.hand_overs if session else 0,
                        visits=session.visits if session else 0,
                        dozes=session.dozes if session else 0,
                    )
                case [b"lateness"]:
                    _answer(
                        ticker_ms=lateness.ticker_ms,
                        ticker_raw_ms=lateness.ticker_raw_ms,
                        ticker_busy_ms=lateness.ticker_busy_ms,
                        echo_ms=lateness.echo_ms,
                        echo_busy_ms=lateness.echo_busy_ms,
                    )
                    lateness.ticker_ms = lateness.ticker_raw_ms = lateness.ticker_busy_ms = 0.0
                    lateness.echo_ms = lateness.echo_busy_ms = 0.0
                case [b"stop"]:
                    pyfuse3.terminate()
                    return
                case [b"cancel"]:
                    operations.scope.cancel()
                    return
                case command:
                    _command(operations, notifier, command)


def _command(operations: ToyOperations, notifier: Notifier, command: Sequence[bytes]) -> None:
    """Changes of the tree behind the kernel's back, and the notifier's calls that go with them."""
    root = operations.nodes[pyfuse3.ROOT_INODE]
    match command:
        case [b"grow", name, size]:  # no invalidation: what the kernel caches becomes stale
            node = root.children.get(name) or operations._add(pyfuse3.ROOT_INODE, name, stat.S_IFREG | 0o644)
            node.data = bytearray(b"y" * int(size))
            node.attributes.st_size = int(size)
        case [b"release"]:
            operations.released.set()
        case [b"drop", name]:
            root.children.pop(name, None)
        case [b"touch", name, kind]:
            notifier.touch(root.children[name].attributes.st_ino, data=kind == b"data")
        case [b"entry", name]:
            notifier.entry(pyfuse3.ROOT_INODE, name)
        case [b"everything"]:
            notifier.everything()
        case [b"ino", name]:
            _answer(ino=root.children[name].attributes.st_ino)
            return
        case [b"connection"]:
            _answer(connections=[mounts.connection_number(fd) for fd in mounts.dev_fuse_fds()])
            return
        case [b"notifier"]:
            _answer(**notifier.statistics()._asdict())
            return
        case [b"stop-notifier"]:
            began_s = time.monotonic()
            stopped = notifier.stop(timeout_s=0.3)
            _answer(stopped=stopped, took_s=time.monotonic() - began_s)
            return
        case _:
            raise ValueError(command)
    _answer(done=True)


async def _main(options: argparse.Namespace, operations: ToyOperations) -> None:
    lateness = Lateness()
    notifier = Notifier(lambda: list(operations.nodes))
    notifier.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_on_signal)
        nursery.start_soon(_obey, operations, lateness, notifier)
        if not options.idle:
            nursery.start_soon(lateness.tick)
            nursery.start_soon(lateness.echo)
        print(f"ready {os.getpid()}", flush=True)
        with operations.scope:
            await pyfuse3.main(min_tasks=options.min_workers or options.workers, max_tasks=options.workers)
        nursery.cancel_scope.cancel()
    notifier.stop()


async def _on_signal() -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            pyfuse3.terminate()
            return


def main() -> None:
    faulthandler.register(signal.SIGUSR1)
    parser = argparse.ArgumentParser()
    parser.add_argument("mountpoint")
    parser.add_argument("--stock", action="store_true", help="pyfuse3 as it is")
    parser.add_argument("--spin-us", type=int, default=loop.SPIN_US)
    parser.add_argument("--workers", type=int, default=loop.WORKERS)
    parser.add_argument("--min-workers", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=0.0, help="of attributes and entries, s")
    parser.add_argument("--idle", action="store_true", help="neither ticker nor echo")
    options = parser.parse_args()
    vars(idle)["_BLOCK_S_MAX"] = BLOCK_S_MAX
    if not options.stock and not loop.install(spin_us=options.spin_us):
        sys.exit("the hook is not active")
    operations = ToyOperations(options.timeout)
    mount_options = set(pyfuse3.default_options) | {"fsname=toyfs"}
    pyfuse3.init(operations, options.mountpoint, mount_options)
    try:
        trio.run(_main, options, operations)
    except* KeyboardInterrupt:
        print("interrupted", flush=True)
    finally:
        pyfuse3.close(unmount=True)
    print("ended", flush=True)


if __name__ == "__main__":
    main()
