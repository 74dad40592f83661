"""What the way between two nodes costs: `tools/bench_peers.py [--rounds N] [--mib N]`.

Two processes on loopback, one node each. Prints a table and a line of JSON: the round trip of a Raft
message and of a small request (µs, p50 and p99), requests a second from 1, 16 and 64 tasks, and bulk
requests of 1 MiB (MiB/s, CPU ms per MiB at each end). Beside the network of `runtime/peers`, in the same
interleaved run, the two other ways that were thought of: trio.SSLStream, and threads with blocking
sockets; each on an idle loop and on one that is busy with other tasks.
"""

import argparse
import json
import multiprocessing
import os
import queue
import resource
import socket
import ssl
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import trio

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aspenfs.cli.mount import MALLOC_ENVIRONMENT
from aspenfs.cluster.messages import Message, MessageType
from aspenfs.runtime import identity
from aspenfs.runtime.identity import Identity, Life
from aspenfs.runtime.peers import ca, credentials
from aspenfs.runtime.peers.ca import NodeName
from aspenfs.runtime.peers.credentials import Credentials
from aspenfs.runtime.peers.network import PeerNetwork
from aspenfs.runtime.system import SystemClock, SystemEntropy

MIB = 1 << 20
AHEAD = 8  # bulk requests under way at once
CLOCK, ENTROPY = SystemClock(), SystemEntropy()
Figures = dict[str, float]
Report = dict[str, Figures]


class Row:
    def __init__(self, port: int) -> None:
        self.addresses, self.state, self.born, self.topology = (f"127.0.0.1:{port}",), "member", b"", 0


def make(directory: Path, authority: ca.Authority, node: int) -> None:
    identity.write(directory, Identity(b"c" * 16, "bench", node))
    name = NodeName(b"c" * 16, node, identity.give_birth(directory, ENTROPY))
    key = credentials.make_node_key(directory).public_key()
    certificate = ca.sign(authority, key, name, CLOCK.time_ns())
    credentials.install(directory, certificate, [authority.certificate])


def shown(directory: Path) -> Credentials:
    found = credentials.load(directory)
    assert found is not None
    return found


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def work(busy: bool) -> None:
    """What the loop does beside: requests of the kernel take some 100 µs each."""
    while busy:
        until = time.perf_counter() + 0.0001
        while time.perf_counter() < until:
            pass
        await trio.lowlevel.checkpoint()


# --- the network of aspenfs ---


class Bench:
    """One end. The second end answers; `pipe` tells ports, and the CPU that it spent."""

    def __init__(self, directory: Path, pipe: Connection, arguments: argparse.Namespace) -> None:
        self.pipe, self.arguments = pipe, arguments
        self.arrived = trio.Event()
        mine = shown(directory)
        self.id = mine.name.node_id
        self.network = PeerNetwork(mine, Life(1, self.id), CLOCK, deliver=self._deliver,
                                   unreachable=lambda peer: None)  # fmt: skip
        self.network.handle("echo", self._echo)
        self.network.handle("blob.put", self._put)

    def _deliver(self, peer: int, messages: object) -> None:
        if self.id == 2:
            self.network.send(peer, Message(MessageType.HEARTBEAT_RESP, peer, 2, 1))
        self.arrived.set()

    async def _echo(self, peer: int, body: Any) -> Any:
        return body

    async def _put(self, peer: int, body: bytes) -> int:
        return len(body)

    async def run(self, part: Callable[[], Awaitable[None]], busy: bool) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.network.run, ["127.0.0.1:0"])
            self.pipe.send(self.network.ports[0])
            other = await trio.to_thread.run_sync(self.pipe.recv)
            self.network.set_members({3 - self.id: Row(other)})
            while not self.network.connected():  # noqa: ASYNC110 – once
                await trio.sleep(0.01)
            self.pipe.send("connected")
            assert await trio.to_thread.run_sync(self.pipe.recv) == "connected"
            nursery.start_soon(work, busy)
            await part()
            nursery.cancel_scope.cancel()


def second(directory: Path, pipe: Connection, arguments: argparse.Namespace, busy: bool) -> None:
    bench = Bench(directory, pipe, arguments)

    async def serve() -> None:
        while (word := await trio.to_thread.run_sync(pipe.recv)) is not None:
            assert word == "cpu"
            pipe.send(cpu_s())

    trio.run(bench.run, serve, busy)


def first(directory: Path, pipe: Connection, arguments: argparse.Namespace, busy: bool) -> Report:
    bench, report = Bench(directory, pipe, arguments), Report()
    network, rounds = bench.network, arguments.rounds

    async def other_cpu_s() -> float:
        pipe.send("cpu")
        return float(await trio.to_thread.run_sync(pipe.recv))

    async def message() -> None:
        bench.arrived = trio.Event()
        network.send(2, Message(MessageType.HEARTBEAT, 2, 1, 1))
        await bench.arrived.wait()

    async def request() -> None:
        await network.request(2, "echo", bytes(100), timeout_s=10)

    async def measure() -> None:
        for name, step in (("message", message), ("request", request)):
            samples = []
            for _ in range(rounds):
                start = time.perf_counter()
                await step()
                samples.append((time.perf_counter() - start) * 1e6)
            samples.sort()
            report[f"{name} round trip"] = {"p50_us": round(statistics.median(samples), 1),
                                            "p99_us": round(samples[rounds * 99 // 100], 1)}  # fmt: skip
        for tasks in (16, 64):
            start = time.perf_counter()
            async with trio.open_nursery() as nursery:
                for _ in range(tasks):
                    nursery.start_soon(repeat, request, rounds // tasks)
            spent = time.perf_counter() - start
            report[f"requests, {tasks} tasks"] = {"per_s": round(rounds // tasks * tasks / spent)}
        report["bulk"] = await bulk()

    async def repeat(step: Callable[[], Awaitable[None]], count: int) -> None:
        for _ in range(count):
            await step()

    async def bulk() -> Figures:
        data, room = bytes(MIB), trio.Semaphore(AHEAD)

        async def put() -> None:
            assert await network.request(2, "blob.put", data, timeout_s=60) == MIB
            room.release()

        theirs, mine, start = await other_cpu_s(), cpu_s(), time.perf_counter()
        async with trio.open_nursery() as nursery:
            for _ in range(arguments.mib):
                await room.acquire()
                nursery.start_soon(put)
        spent = time.perf_counter() - start
        return rates(arguments.mib, spent, cpu_s() - mine, await other_cpu_s() - theirs)

    trio.run(bench.run, measure, busy)
    pipe.send(None)
    return report


def rates(mib: int, spent_s: float, sender_s: float, receiver_s: float) -> Figures:
    return {"mib_s": round(mib / spent_s), "sender_cpu_ms_mib": round(sender_s / mib * 1000, 2),
            "receiver_cpu_ms_mib": round(receiver_s / mib * 1000, 2)}  # fmt: skip


# --- the other two: 1 MiB one way, two bytes back ---

Carry = Callable[[ssl.SSLContext, socket.socket, int, bool], Awaitable[None]]


async def with_sslstream(context: ssl.SSLContext, sock: socket.socket, count: int, sends: bool) -> None:
    sock.setblocking(False)
    transport = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
    stream = trio.SSLStream(transport, context, server_side=not sends)

    async def take(size: int) -> None:
        while size:
            size -= len(await stream.receive_some(size))

    if not sends:
        for _ in range(count):
            await take(MIB)
            await stream.send_all(b"ok")
        return
    data, room = bytes(MIB), trio.Semaphore(AHEAD)

    async def acknowledge() -> None:
        for _ in range(count):
            await take(2)
            room.release()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(acknowledge)
        for _ in range(count):
            await room.acquire()
            await stream.send_all(data)


async def with_threads(context: ssl.SSLContext, sock: socket.socket, count: int, sends: bool) -> None:
    tls = context.wrap_socket(sock, server_side=not sends)
    token, outbox = trio.lowlevel.current_trio_token(), queue.SimpleQueue[bytes]()
    data, room, done = bytes(MIB), trio.Semaphore(AHEAD), trio.Event()

    def write() -> None:
        for _ in range(count):
            tls.sendall(outbox.get())

    def read() -> None:
        for _ in range(count):
            view = memoryview(bytearray(2 if sends else MIB))
            while view:
                view = view[tls.recv_into(view):]
            token.run_sync_soon(room.release if sends else outbox.put, *(() if sends else (b"ok",)))
        token.run_sync_soon(done.set)

    threads = [threading.Thread(target=each) for each in (read, write)]
    for thread in threads:
        thread.start()
    if sends:
        for _ in range(count):
            await room.acquire()
            outbox.put(data)
    await done.wait()
    for thread in threads:
        thread.join()


async def carried(carry: Carry, context: ssl.SSLContext, sock: socket.socket, count: int, sends: bool,
                  busy: bool) -> None:  # fmt: skip
    async with trio.open_nursery() as nursery:
        nursery.start_soon(work, busy)
        await carry(context, sock, count, sends)
        nursery.cancel_scope.cancel()


def receiver(directory: Path, pipe: Connection, carry: Carry, count: int, busy: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    before = cpu_s()
    trio.run(carried, carry, shown(directory).server_context(), sock, count, False, busy)
    pipe.send(cpu_s() - before)


def other_way(directory: Path, pipe: Connection, carry: Carry, count: int, busy: bool) -> Figures:
    sock = socket.create_connection(("127.0.0.1", pipe.recv()))
    before, start = cpu_s(), time.perf_counter()
    trio.run(carried, carry, shown(directory).client_context(), sock, count, True, busy)
    spent, mine = time.perf_counter() - start, cpu_s() - before
    return rates(count, spent, mine, pipe.recv())


# --- both ends ---


@contextmanager
def far_end(target: Callable[..., None], directory: Path, *arguments: object) -> Iterator[Connection]:
    near, far = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=target, args=(directory, far, *arguments))
    process.start()
    try:
        yield near
        process.join(30)
    finally:
        process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3000)
    parser.add_argument("--mib", type=int, default=400)
    arguments = parser.parse_args()
    if not os.environ.keys() >= MALLOC_ENVIRONMENT.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC_ENVIRONMENT})
    sys.setswitchinterval(0.0005)  # as the daemon has it
    report: Report = {}
    with tempfile.TemporaryDirectory() as name:
        authority = ca.new_authority("bench", CLOCK.time_ns())
        one, two = Path(name) / "1", Path(name) / "2"
        make(one, authority, 1)
        make(two, authority, 2)
        for busy in (False, True):
            loop = "busy loop" if busy else "idle loop"
            with far_end(second, two, arguments, busy) as pipe:
                for what, figures in first(one, pipe, arguments, busy).items():
                    report[f"{loop}: {what}"] = figures
            for way, carry in (("trio.SSLStream", with_sslstream), ("threads", with_threads)):
                count = arguments.mib // 8 if busy else arguments.mib
                with far_end(receiver, two, carry, count, busy) as pipe:
                    report[f"{loop}: bulk by {way}"] = other_way(one, pipe, carry, count, busy)
    for what, figures in report.items():
        print(f"{what:34}", "  ".join(f"{name} {value:g}" for name, value in figures.items()))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
