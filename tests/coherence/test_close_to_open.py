"""Close-to-open through modelled kernels: who opens reads what was closed last, whatever threads do.

One writer at a time, on any host; readers on all. A read counts if nobody wrote between the start of its
open and its end: then it must be the content of the last close, of the last SHARED_TIMEOUT_S if names
may have been held by the kernel so long.
"""

import os
from collections.abc import Sequence
from contextlib import suppress

import pytest
import trio

from aspenfs import errors
from aspenfs.kv.types import Event
from aspenfs.vfs.coherence import OPEN, SHARED_TIMEOUT_S, STRICT, Coherence
from aspenfs.vfs.filesystem import FileSystem
from tests.coherence.hosts import Host, Hosts, run
from tests.coherence.kernel import Kernel

SEEDS = range(8)
ROUNDS = 30


class Machine:
    """One host with its kernel."""

    def __init__(self, hosts: Hosts, host: Host, mode: str, slow_s: float) -> None:
        random = hosts.random
        self.host = host
        self.kernel = Kernel(
            lambda: random.choice((0.0, 0.0, random.random() / 500)),
            lambda: random.random() * slow_s,
            hosts.nursery,
        )
        self.kernel.fs = FileSystem([host.tree], 1, Coherence(host.store, mode, self.kernel, _moment))
        host.store.observe(self._observe)
        self.files = 0

    def _observe(self, revision: int, events: Sequence[Event], origin: object) -> None:
        self.kernel.fs.noticed(events, own=origin is self.host.volume)

    async def start(self) -> "Machine":
        self.files = await self.kernel.directory(b"files")
        return self


async def _moment() -> None:
    await trio.sleep(0.001)


class History:
    """What was closed, when, and whether anybody writes."""

    def __init__(self) -> None:
        self.closed: list[tuple[float, bytes]] = [(-1e9, b"")]
        self.writes = 0  # begun
        self.writing = trio.Lock()
        self.checked = 0

    def allowed(self, opened: float, held_s: float) -> set[bytes]:
        """The contents that an open may show that began then and saw no write."""
        last = max(at for at, _ in self.closed if at <= opened)
        return {data for at, data in self.closed if at >= min(last, opened - held_s)} | {
            next(data for at, data in reversed(self.closed) if at <= opened - held_s)
        }


async def write(machine: Machine, history: History, data: bytes, how: str) -> None:
    kernel, directory = machine.kernel, machine.files
    async with history.writing:
        history.writes += 1
        with suppress(errors.Stale):  # twice in a row: the name was replaced while it was opened
            if how == "replace":
                name = b"new-%d" % history.writes
                file = await kernel.open(directory, name, os.O_CREAT | os.O_WRONLY)
                await kernel.write(file, 0, data)
                await kernel.close(file)
                await kernel.names(
                    directory, lambda: kernel.fs.rename(directory, name, directory, b"f", 0), name, b"f"
                )
            else:
                flags = os.O_CREAT | os.O_WRONLY | (os.O_TRUNC if how == "truncate" else 0)
                file = await kernel.open(directory, b"f", flags)
                if how == "grow":
                    old = history.closed[-1][1]
                    data, start = old + data, len(old) // 2
                    await kernel.write(file, start, data[start:])
                elif how in ("inside", "hide"):
                    old = history.closed[-1][1]
                    data = (
                        old[:5] + data[:7].ljust(7, b"!") + old[12:]
                        if len(old) > 12
                        else data.ljust(len(old), b"+")
                    )
                    await kernel.write(file, 0, data)
                    if how == "hide":  # as rsync -t does: neither size nor time tell of it
                        await kernel.set_mtime(file, 1)
                else:
                    await kernel.write(file, 0, data)
                await kernel.close(file)
            history.closed.append((trio.current_time(), data))


async def read(machine: Machine, history: History, held_s: float) -> None:
    kernel = machine.kernel
    opened, writes = trio.current_time(), history.writes
    quiet = not history.writing.locked()
    try:
        file = await kernel.open(machine.files, b"f", os.O_RDONLY)
        data = await kernel.read(file)
    except (errors.NotFound, errors.Stale):
        return
    await kernel.close(file)
    if quiet and history.writes == writes:
        history.checked += 1
        allowed = history.allowed(opened, held_s)
        assert data in allowed, (data, allowed, history.closed[-3:])


def check(mode: str, ways: Sequence[str], seed: int, slow_s: float, held_s: float) -> int:
    checked = 0

    async def main(hosts: Hosts) -> None:
        nonlocal checked
        machines = [await Machine(hosts, await hosts.host(n), mode, slow_s).start() for n in (1, 2, 3)]
        history, random = History(), hosts.random

        async def writer() -> None:
            for n in range(ROUNDS):
                data = (b"%d," % n) * random.randrange(1, 12)
                await write(random.choice(machines), history, data, random.choice(ways))
                await trio.sleep(random.choice((0.0, random.random() / 100, random.random() * 1.5)))

        async def reader(machine: Machine, nursery: trio.Nursery) -> None:
            while True:
                await read(machine, history, held_s)
                await trio.sleep(random.choice((0.0, random.random() / 200, random.random() / 3)))

        async with trio.open_nursery() as nursery:
            for machine in machines * 2:
                nursery.start_soon(reader, machine, nursery)
            await writer()
            nursery.cancel_scope.cancel()
        checked = history.checked
        await trio.sleep(30)

    run(main, seed)
    return checked


@pytest.mark.parametrize("slow_s", [0.003, 3.0], ids=["notifier at work", "notifier held up"])
@pytest.mark.parametrize("seed", SEEDS)
def test_who_opens_a_file_reads_what_was_closed_last(seed: int, slow_s: float) -> None:
    assert check(OPEN, ("truncate", "inside", "hide", "grow"), seed, slow_s, 0.0) > ROUNDS


@pytest.mark.parametrize("seed", SEEDS)
def test_a_file_that_is_replaced_is_seen_within_the_time_that_names_are_held(seed: int) -> None:
    assert check(OPEN, ("replace",), seed, 3.0, SHARED_TIMEOUT_S) > ROUNDS // 2


@pytest.mark.parametrize("seed", SEEDS)
def test_a_strict_mount_sees_a_replaced_file_at_once(seed: int) -> None:
    assert check(STRICT, ("replace", "truncate"), seed, 3.0, 0.0) > ROUNDS // 2
